"""The one form every scan takes after reading: int16 voxels, spacing and affine in canonical LPS.

Shape suffixes: Z Y X voxels. World coordinates are x, y, z.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.findings import Report
from tapct_fast.io.orient import StoredGrid, apart_mm, lps_affine

# Checked before memory is allocated: 1024 x 1024 x 2048, far beyond a whole-body scan at 0.5 mm.
MAX_VOXELS = 2**31

INT16_MIN, INT16_MAX = -(2**15), 2**15 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """One CT scan (or label map) with its place in the patient.

    Attributes:
        hu_ZYX: C-contiguous int16 Hounsfield units (or label numbers). x grows to the patient's
            Left, y to Posterior, z to Superior; for an oblique scan, along the axes nearest to
            these.
        spacing_mm: Distance of neighbouring voxel centres in z, y, x order.
        affine: (4, 4) float64; maps the voxel index (x, y, z, 1) of ``hu_ZYX[z, y, x]`` to RAS+
            world millimetres (the NIfTI convention). A plain axial scan has
            ``diag(-sx, -sy, +sz)``.
        report: What the reader found; None for a volume that was not read from a scan.
        stored: The voxel grid of the file before its axes were turned to LPS, in which
            ``save_nifti`` writes what overlays the file; None where there is no other grid than
            this volume's own.

    Raises:
        InputError: The parts do not have these types and shapes.
    """

    hu_ZYX: NDArray[np.int16]
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64]
    report: Report | None = None
    stored: StoredGrid | None = None

    def __post_init__(self) -> None:
        if self.hu_ZYX.ndim != 3 or self.hu_ZYX.dtype != np.int16:
            raise InputError(
                f"Volume.hu_ZYX is {self.hu_ZYX.dtype} with {self.hu_ZYX.ndim} axes; "
                "give int16 with the axes z, y, x"
            )
        if not self.hu_ZYX.flags.c_contiguous:
            raise InputError("Volume.hu_ZYX is not contiguous; give np.ascontiguousarray(hu_ZYX)")
        if self.affine.shape != (4, 4):
            raise InputError(f"Volume.affine has shape {self.affine.shape}; give (4, 4)")
        if len(self.spacing_mm) != 3 or not all(0 < mm < np.inf for mm in self.spacing_mm):
            raise InputError(
                f"Volume.spacing_mm is {self.spacing_mm}; give three positive z, y, x millimetres"
            )
        if self.stored is not None and not (
            sorted(self.stored.shape_zyx) == sorted(self.hu_ZYX.shape)
            and apart_mm(lps_affine(self.stored), self.affine, self.hu_ZYX.shape) < 1e-3
        ):
            raise InputError(
                "Volume.stored is not the volume's own grid with its axes turned; "
                "give stored=None for voxels that were resampled or cropped"
            )


def to_int16(values: NDArray[np.generic], field: str) -> NDArray[np.int16]:
    """Round real values to int16 and refuse those that do not fit.

    Args:
        values: Integers or floats of any shape.
        field: Name for the error message.

    Raises:
        FormatError: A value is not a finite number or lies outside int16.
    """
    if values.dtype == np.int16:
        return values.astype(np.int16, copy=False)
    if not (np.issubdtype(values.dtype, np.integer) or np.issubdtype(values.dtype, np.floating)):
        raise FormatError(field, f"voxels of type {values.dtype} are not real numbers", "dtype")
    if values.size == 0:
        raise FormatError(field, "the volume has no voxels", "dims")
    low, high = values.min(), values.max()  # NaN anywhere makes both NaN
    if not (np.isfinite(low) and np.isfinite(high)):
        raise FormatError(field, "a voxel is NaN or infinite", "non_finite")
    if low < INT16_MIN - 0.5 or high >= INT16_MAX + 0.5:
        raise FormatError(
            field, f"values {low:g}..{high:g} do not fit int16 and cannot be HU", "hu"
        )
    if np.issubdtype(values.dtype, np.floating):
        values = np.rint(values)
    return values.astype(np.int16)

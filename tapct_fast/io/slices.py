"""Turn the slice positions of a DICOM series into one regular voxel grid, or say why there is none.

Readers in common use average uneven gaps and ignore gantry tilt, which moves organs by centimetres
without a word. Here every departure from a regular grid is an error.

Shape suffixes: N slices (in file order). Positions are x, y, z in DICOM's LPS+ millimetres.
Source: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError
from tapct_fast.io.orient import MAX_SHEAR_DEG, Affine, check_affine

Floats = NDArray[np.float64]

_COSINE_TOLERANCE = 1e-3  # direction cosines are often written with 4 digits
_RELATIVE_TOLERANCE = 0.02  # of the spacing; positions are often written with 2 digits
_POSITION_TOLERANCE_MM = 0.02
_MAX_DRIFT = 0.1  # spacings a slice may lie off the regular grid
_MAX_WOBBLE_MM = 0.1  # sideways, off the straight line through the slice origins


class SliceStack(NamedTuple):
    """A regular grid made of slices."""

    order: tuple[int, ...]  # indices of the slices, sorted along their normal
    affine: Affine  # (4, 4): (column x, row y, sorted slice z, 1) to RAS+ mm


def stack_slices(position_N3: Floats, orientation_N6: Floats, spacing_N2: Floats) -> SliceStack:
    """Sort slices along their normal and check that they form a regular grid.

    Args:
        position_N3: ``ImagePositionPatient`` of each slice, mm.
        orientation_N6: ``ImageOrientationPatient``: direction along a row, then down a column.
        spacing_N2: ``PixelSpacing``: between rows, then between columns, mm.

    Raises:
        FormatError: Fewer than two slices, slices of different orientation or pixel spacing, or
            positions that are duplicate, missing, uneven or sheared.
    """
    if len(position_N3) < 2:
        raise FormatError(
            "ImagePositionPatient",
            "the series has one slice, which has no slice spacing; a volume needs two or more",
        )
    row, column = _orientation(orientation_N6)
    if not (spacing_N2 > 0).all():
        raise FormatError("PixelSpacing", "is not positive in every slice")
    if np.ptp(spacing_N2, axis=0).max() > 1e-3 * spacing_N2.min():
        raise FormatError("PixelSpacing", "differs between slices; they are not one volume")

    normal = np.cross(row, column)
    along_N = position_N3 @ normal
    order_N = np.argsort(along_N, kind="stable")
    sorted_N3 = position_N3[order_N]
    problems = _position_problems(sorted_N3, along_N[order_N], normal)
    if problems:
        raise FormatError("ImagePositionPatient", "; ".join(problems))

    affine_lps = np.eye(4)
    affine_lps[:3, 0] = row * spacing_N2[0, 1]
    affine_lps[:3, 1] = column * spacing_N2[0, 0]
    affine_lps[:3, 2] = (sorted_N3[-1] - sorted_N3[0]) / (len(sorted_N3) - 1)
    affine_lps[:3, 3] = sorted_N3[0]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine_lps
    check_affine(affine, field="PixelSpacing, ImageOrientationPatient, ImagePositionPatient")
    return SliceStack(order=tuple(int(index) for index in order_N), affine=affine)


def _orientation(orientation_N6: Floats) -> tuple[Floats, Floats]:
    """Return the unit vectors along a row and down a column that all slices share."""
    field = "ImageOrientationPatient"
    row, column = orientation_N6[0, :3], orientation_N6[0, 3:]
    norms = np.linalg.norm([row, column], axis=1)
    if np.abs(norms - 1.0).max() > _COSINE_TOLERANCE:
        raise FormatError(field, "its two directions are not of unit length")
    if abs(row @ column) > _COSINE_TOLERANCE:
        raise FormatError(field, "its two directions are not at right angles")
    if np.abs(orientation_N6 - orientation_N6[0]).max() > _COSINE_TOLERANCE:
        raise FormatError(
            field,
            "differs between slices (a localizer or a second reconstruction in the folder?); "
            "keep the slices of one volume",
        )
    row = row / norms[0]
    column = column - (column @ row) * row  # exactly at right angles, so that no shear is invented
    return row, column / np.linalg.norm(column)


def _position_problems(sorted_N3: Floats, along_N: Floats, normal: Floats) -> list[str]:
    """Say everything that keeps the sorted slices from being a regular grid."""
    num = len(along_N)
    gaps = np.diff(along_N)
    num_duplicates = int((gaps < _POSITION_TOLERANCE_MM / 2).sum())
    if num_duplicates:
        return [
            f"{num_duplicates} of {num} slices lie where another one does (a file copied twice, or "
            "several phases or reconstructions in one series); keep one slice per position"
        ]

    problems = []
    step = (along_N[-1] - along_N[0]) / (num - 1)
    offset_N3 = sorted_N3 - sorted_N3[0]
    sideways_N3 = offset_N3 - np.outer(offset_N3 @ normal, normal)
    tilt_deg = float(
        np.degrees(np.arctan2(np.linalg.norm(sideways_N3[-1]), along_N[-1] - along_N[0]))
    )
    wobble_N3 = sideways_N3 - np.outer(
        (along_N - along_N[0]) / (along_N[-1] - along_N[0]), sideways_N3[-1]
    )
    if tilt_deg > MAX_SHEAR_DEG:
        problems.append(
            f"the stack leans {tilt_deg:.2f} degrees off the slices' normal (gantry tilt); "
            "correct the tilt first, for example with dcm2niix"
        )
    elif np.linalg.norm(wobble_N3, axis=1).max() > _MAX_WOBBLE_MM:
        problems.append("slice origins are shifted sideways against each other")

    tolerance = max(_RELATIVE_TOLERANCE * step, _POSITION_TOLERANCE_MM)
    drift_N = along_N - along_N[0] - step * np.arange(num)
    if np.abs(gaps - step).max() <= tolerance and np.abs(drift_N).max() <= _MAX_DRIFT * step:
        return problems
    usual = float(gaps.min())
    multiples = np.rint(gaps / usual)
    if np.abs(gaps - multiples * usual).max() <= max(0.05 * usual, _POSITION_TOLERANCE_MM) and (
        multiples.min() >= 1 and multiples.max() >= 2
    ):
        after = int(np.argmax(multiples)) + 1
        problems.append(
            f"{int((multiples - 1).sum())} slice(s) missing: a gap of {gaps.max():.3f} mm after "
            f"slice {after} of {num}, where {usual:.3f} mm is usual; export the series again"
        )
    else:
        problems.append(
            f"uneven slice spacing, {gaps.min():.3f} to {gaps.max():.3f} mm; export the series "
            "again, or resample it to even spacing"
        )
    return problems

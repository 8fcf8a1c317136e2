"""Turn the slice positions of a DICOM series into one regular voxel grid, or say why there is none.

Readers in common use average uneven gaps and ignore gantry tilt, which moves organs by centimetres
without a word. Here every departure from a regular grid is found and named.

Shape suffixes: N slices. Positions are x, y, z in DICOM's LPS+ millimetres.
Source: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError
from tapct_fast.io.findings import Code
from tapct_fast.io.orient import MAX_SHEAR_DEG, Affine, check_affine

Floats = NDArray[np.float64]

_COSINE_TOLERANCE = 1e-3  # direction cosines are often written with 4 digits
_RELATIVE_TOLERANCE = 0.02  # of the spacing; positions are often written with 2 digits
_POSITION_TOLERANCE_MM = 0.02
_MAX_DRIFT = 0.1  # spacings a slice may lie off the regular grid
_MAX_WOBBLE_MM = 0.1  # sideways, off the straight line through the slice origins

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Problem(NamedTuple):
    """Why sorted slices are no regular grid, and whether resampling makes them one."""

    severity: Literal["mend", "refuse"]
    code: Code
    reason: str


class SliceStack(NamedTuple):
    """Parallel slices sorted along their normal."""

    order: tuple[int, ...]  # indices of the slices as given
    row: Floats  # unit vectors: along a row, down a column
    column: Floats
    spacing_yx_mm: tuple[float, float]
    position_N3: Floats  # sorted
    tilt_deg: float
    problems: tuple[Problem, ...]

    @property
    def normal(self) -> Floats:
        """The direction in which the slices are sorted."""
        return np.cross(self.row, self.column)

    @property
    def along_mm_N(self) -> Floats:
        """Place of each slice along the normal."""
        along_N: Floats = self.position_N3 @ self.normal
        return along_N

    @property
    def affine(self) -> Affine:
        """Map (column x, row y, sorted slice z, 1) to RAS+ mm; right where there is no problem."""
        step = (self.position_N3[-1] - self.position_N3[0]) / (len(self.position_N3) - 1)
        return self.affine_of(step, self.position_N3[0])

    def affine_of(self, step: Floats, origin: Floats) -> Affine:
        """Return the affine of a grid of these slices with another step or origin, LPS+ mm."""
        spacing_y, spacing_x = self.spacing_yx_mm
        affine_lps = np.eye(4)
        affine_lps[:3, 0] = self.row * spacing_x
        affine_lps[:3, 1] = self.column * spacing_y
        affine_lps[:3, 2] = step
        affine_lps[:3, 3] = origin
        affine = LPS_TO_RAS @ affine_lps
        check_affine(affine, field="PixelSpacing, ImageOrientationPatient, ImagePositionPatient")
        return affine

    def copies(self) -> list[list[int]]:
        """Return groups of slices, by their index as given, that lie in one place."""
        groups: list[list[int]] = []
        is_next_N = np.diff(self.along_mm_N) < _POSITION_TOLERANCE_MM / 2
        for place, is_copy in enumerate(is_next_N):
            if is_copy and groups and groups[-1][-1] == self.order[place]:
                groups[-1].append(self.order[place + 1])
            elif is_copy:
                groups.append([self.order[place], self.order[place + 1]])
        return groups


def stack_slices(position_N3: Floats, orientation_N6: Floats, spacing_N2: Floats) -> SliceStack:
    """Sort slices along their normal and say whether they form a regular grid.

    Args:
        position_N3: ``ImagePositionPatient`` of each slice, mm.
        orientation_N6: ``ImageOrientationPatient``: direction along a row, then down a column.
        spacing_N2: ``PixelSpacing``: between rows, then between columns, mm.

    Raises:
        FormatError: Fewer than two slices, or slices of different orientation or pixel spacing.
    """
    if len(position_N3) < 2:
        raise FormatError(
            "ImagePositionPatient",
            "the series has one slice, which has no slice spacing; a volume needs two or more",
            "missing_slices",
        )
    row, column = _orientation(orientation_N6)
    if not (spacing_N2 > 0).all():
        raise FormatError("PixelSpacing", "is not positive in every slice", "spacing")
    if np.ptp(spacing_N2, axis=0).max() > 1e-3 * spacing_N2.min():
        raise FormatError(
            "PixelSpacing", "differs between slices; they are not one volume", "foreign_slices"
        )
    normal = np.cross(row, column)
    along_N = position_N3 @ normal
    order_N = np.argsort(along_N, kind="stable")
    sorted_N3, along_N = position_N3[order_N], along_N[order_N]
    sideways_N3 = sorted_N3 - sorted_N3[0]
    sideways_N3 -= np.outer(sideways_N3 @ normal, normal)
    lean_mm, length_mm = float(np.linalg.norm(sideways_N3[-1])), float(along_N[-1] - along_N[0])
    tilt_deg = float(np.degrees(np.arctan2(lean_mm, length_mm)))
    return SliceStack(
        order=tuple(int(index) for index in order_N),
        row=row,
        column=column,
        spacing_yx_mm=(float(spacing_N2[0, 0]), float(spacing_N2[0, 1])),
        position_N3=sorted_N3,
        tilt_deg=tilt_deg,
        problems=tuple(_problems(along_N, sideways_N3, tilt_deg)),
    )


def _orientation(orientation_N6: Floats) -> tuple[Floats, Floats]:
    """Return the unit vectors along a row and down a column that all slices share."""
    field = "ImageOrientationPatient"
    row, column = orientation_N6[0, :3], orientation_N6[0, 3:]
    norms = np.linalg.norm([row, column], axis=1)
    if np.abs(norms - 1.0).max() > _COSINE_TOLERANCE:
        raise FormatError(field, "its two directions are not of unit length", "orientation")
    if abs(row @ column) > _COSINE_TOLERANCE:
        raise FormatError(field, "its two directions are not at right angles", "orientation")
    if np.abs(orientation_N6 - orientation_N6[0]).max() > _COSINE_TOLERANCE:
        raise FormatError(
            field,
            "differs between slices (a localizer or a second reconstruction in the folder?); "
            "keep the slices of one volume",
            "foreign_slices",
        )
    row = row / norms[0]
    column = column - (column @ row) * row  # exactly at right angles, so that no shear is invented
    return row, column / np.linalg.norm(column)


def _problems(along_N: Floats, sideways_N3: Floats, tilt_deg: float) -> list[Problem]:
    """Name everything that keeps the sorted slices from being a regular grid."""
    num = len(along_N)
    gaps = np.diff(along_N)
    num_duplicates = int((gaps < _POSITION_TOLERANCE_MM / 2).sum())
    if num_duplicates:
        reason = (
            f"{num_duplicates} of {num} slices lie where another one does (a file copied twice, or "
            "several phases or reconstructions in one series); keep one slice per position"
        )
        return [Problem("refuse", "duplicate_slices", reason)]

    problems = []
    length = along_N[-1] - along_N[0]
    step = length / (num - 1)
    wobble_N3 = sideways_N3 - np.outer((along_N - along_N[0]) / length, sideways_N3[-1])
    if np.linalg.norm(wobble_N3, axis=1).max() > _MAX_WOBBLE_MM:
        reason = "slice origins are shifted sideways against each other; export the series again"
        problems.append(Problem("refuse", "form_conflict", reason))
    if tilt_deg > MAX_SHEAR_DEG:
        reason = (
            f"the stack leans {tilt_deg:.2f} degrees off the slices' normal (gantry tilt); correct "
            "the tilt first, or let policy='repair' resample it to upright slices"
        )
        problems.append(Problem("mend", "tilt", reason))

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
        reason = (
            f"{int((multiples - 1).sum())} slice(s) missing: a gap of {gaps.max():.3f} mm after "
            f"slice {after} of {num}, where {usual:.3f} mm is usual; export the series again"
        )
        problems.append(Problem("refuse", "missing_slices", reason))
    else:
        reason = (
            f"uneven slice spacing, {gaps.min():.3f} to {gaps.max():.3f} mm; export the series "
            "again, or let policy='repair' resample it to even spacing"
        )
        problems.append(Problem("mend", "uneven_spacing", reason))
    return problems

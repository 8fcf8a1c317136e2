"""Resample parallel CT slices at uneven positions, or shifted against each other, to an even grid.

Two causes: a protocol that changes the slice distance on the way, and gantry tilt, under which each
slice starts a little to the side of the last. Both keep every slice parallel, so that its pixels
are moved within the plane by one constant amount and blended with the next slice: trilinear, with
weights that are constant over a slice. The blend is along the slices' normal, not along the leaning
axis of a tilted stack: the two samples are then the nearest there are to the voxel in the patient.

Rules:

- A voxel is measured where both slices around it (or the one it lies in) surround it with pixel
  centres. Every other voxel is air, -1024 HU, and counted; nothing is extrapolated.
- The plane grows until it holds the pixel centres of all slices.
- Fractions of a pixel or of a step below 1e-3 are rounding of the header and count as none.

Shape suffixes: Z Y X voxels, N slices as scanned, S rows or columns of one slice. Axis order is z
(normal), y (down a column), x (along a row), also for millimetres.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.orient import MAX_SHEAR_DEG, Affine, check_affine
from tapct_fast.io.volume import MAX_VOXELS

Floats = NDArray[np.float64]
Slices = NDArray[np.int16]

AIR_HU = -1024
MAX_GROWTH = 2.0  # times the slices; see _slice_spacing
_TOLERANCE = 1e-3  # pixels or steps: 0.5 to 5 um


class EvenGrid(NamedTuple):
    """A volume on a rectangular grid, and where it lies relative to the slices it was made of."""

    hu_ZYX: Slices
    spacing_mm: tuple[float, float, float]
    offset_zyx_mm: tuple[float, float, float]  # of its first voxel from the old first voxel
    num_filled: int  # voxels set to air because no slice measured them


class Straightened(NamedTuple):
    """A volume whose slice axis no longer leans; every voxel is where its tissue was."""

    hu_ZYX: Slices
    affine: Affine
    num_filled: int


class _Run(NamedTuple):
    """Where one axis of a moved slice lies in the new grid: new pixel first + i is i + fraction."""

    first: int
    fraction: float
    num: int


class _Plane(NamedTuple):
    """One slice moved to the pixels of the new grid."""

    y: int
    x: int
    hu_SS: NDArray[np.int16] | Floats


def even_grid(
    hu_ZYX: Slices,
    *,
    position_mm_N: Floats,
    shift_yx_mm_N2: Floats,
    pixel_spacing_mm: tuple[float, float],
    slice_spacing_mm: float | None = None,
) -> EvenGrid:
    """Resample slices to a rectangular grid of even spacing.

    Padding far below air (-3024 HU around the circle of reconstruction) would bleed into its
    neighbours: set it to air first.

    Args:
        hu_ZYX: One slice per position.
        position_mm_N: Place of each slice along the common normal, strictly increasing.
        shift_yx_mm_N2: How far the first pixel of each slice lies to the side, down a column and
            along a row, measured from any common point; zeros where nothing leans.
        pixel_spacing_mm: Between rows, then between columns; kept.
        slice_spacing_mm: Wanted along the normal. By default the smallest gap, so that no detail is
            lost, or the median gap where that made more than twice the slices, made a little
            smaller so that the first and the last slice are both met exactly.

    Returns:
        The even grid; ``hu_ZYX`` itself, not a copy, where it was even before.

    Raises:
        InputError: The arguments do not describe parallel slices in ascending order.
        FormatError: The grid would have more voxels than any scan.
    """
    _check(hu_ZYX, position_mm_N, shift_yx_mm_N2)
    for length in (*pixel_spacing_mm, 1.0 if slice_spacing_mm is None else slice_spacing_mm):
        if not (math.isfinite(length) and length > 0):
            raise InputError("even_grid: a spacing is not positive")
    num_slices = len(position_mm_N)
    span_mm = float(position_mm_N[-1] - position_mm_N[0])
    if slice_spacing_mm is None:
        step_mm, num_z = _slice_spacing(position_mm_N)
    else:
        step_mm, num_z = slice_spacing_mm, math.floor(span_mm / slice_spacing_mm + _TOLERANCE) + 1
    # From here on in steps and pixels, counted from the first slice and the smallest shift.
    place_N = (position_mm_N - position_mm_N[0]) / step_mm
    shift_N2 = (shift_yx_mm_N2 - shift_yx_mm_N2.min(axis=0)) / pixel_spacing_mm
    offset_y_mm, offset_x_mm = map(float, shift_yx_mm_N2.min(axis=0) - shift_yx_mm_N2[0])
    spacing_mm = (step_mm, float(pixel_spacing_mm[0]), float(pixel_spacing_mm[1]))
    offset_mm = (0.0, offset_y_mm, offset_x_mm)

    is_even = num_z == num_slices and np.abs(place_N - np.arange(num_slices)).max() <= _TOLERANCE
    if is_even and shift_N2.max() <= _TOLERANCE:
        return EvenGrid(hu_ZYX, spacing_mm, offset_mm, 0)

    growth_y, growth_x = (math.ceil(shift - _TOLERANCE) for shift in shift_N2.max(axis=0))
    shape_ZYX = (num_z, hu_ZYX.shape[1] + growth_y, hu_ZYX.shape[2] + growth_x)
    if math.prod(shape_ZYX) > MAX_VOXELS:
        text = "x".join(map(str, shape_ZYX))
        raise FormatError(
            "ImagePositionPatient", f"an even grid needs {text} voxels, too many", "limit"
        )
    even_ZYX = np.full(shape_ZYX, AIR_HU, np.int16)
    num_measured = _resample(hu_ZYX, place_N, shift_N2, even_ZYX)
    return EvenGrid(even_ZYX, spacing_mm, offset_mm, even_ZYX.size - num_measured)


def straighten(hu_ZYX: Slices, affine: Affine, *, field: str = "sform") -> Straightened:
    """Resample a volume whose slice axis z leans, so that its three axes are at right angles.

    Args:
        hu_ZYX: In file order.
        affine: Maps the index (x, y, z, 1) to RAS+ millimetres.
        field: Names the affine in an error.

    Raises:
        FormatError: The rows and columns of a slice are not at right angles, the affine is
            singular, or the volume has one slice, which cannot lean.
    """
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise FormatError(field, "is not a 4x4 matrix of finite numbers", "orientation")
    if len(hu_ZYX) < 2:
        raise FormatError(field, "leans, but the volume has one slice", "shear")
    column_x, column_y, column_z = affine[:3, :3].T
    pixel_x, pixel_y = float(np.linalg.norm(column_x)), float(np.linalg.norm(column_y))
    if min(pixel_x, pixel_y) == 0.0:
        raise FormatError(field, "singular: a voxel axis has no length", "orientation")
    unit_x, unit_y = column_x / pixel_x, column_y / pixel_y
    if abs(unit_x @ unit_y) > math.sin(math.radians(MAX_SHEAR_DEG)):
        raise FormatError(
            field,
            "rows and columns of a slice are not at right angles, which no scanner makes (a "
            "registration?); resample the scan with the tool that made it",
            "shear",
        )
    normal = np.cross(unit_x, unit_y)
    normal *= math.copysign(1.0 / float(np.linalg.norm(normal)), float(column_z @ normal))
    # Solved, not projected: exact also where x and y are off a right angle within the tolerance.
    lean_x, lean_y, gap = np.linalg.solve(np.stack([unit_x, unit_y, normal], axis=1), column_z)
    if gap <= 1e-3 * np.linalg.norm(column_z):
        raise FormatError(field, "singular: the voxel axes lie in one plane", "orientation")

    index_N = np.arange(len(hu_ZYX), dtype=np.float64)
    grid = even_grid(
        hu_ZYX,
        position_mm_N=gap * index_N,
        shift_yx_mm_N2=np.outer(index_N, (lean_y, lean_x)),
        pixel_spacing_mm=(pixel_y, pixel_x),
    )
    _, offset_y, offset_x = grid.offset_zyx_mm
    upright = affine.astype(np.float64)
    upright[:3, 2] = normal * grid.spacing_mm[0]
    upright[:3, 3] += offset_x * unit_x + offset_y * unit_y
    check_affine(upright, field=field)
    return Straightened(grid.hu_ZYX, upright, grid.num_filled)


def _check(hu_ZYX: Slices, position_N: Floats, shift_N2: Floats) -> None:
    if hu_ZYX.ndim != 3 or hu_ZYX.dtype != np.int16 or len(hu_ZYX) < 2:
        raise InputError("even_grid needs two or more int16 slices in one array")
    if position_N.shape != (len(hu_ZYX),) or shift_N2.shape != (len(hu_ZYX), 2):
        raise InputError(f"even_grid needs one position and (y, x) shift for {len(hu_ZYX)} slices")
    if not (np.isfinite(position_N).all() and np.isfinite(shift_N2).all()):
        raise InputError("even_grid: a position or shift is not finite")
    if not (np.diff(position_N) > 0).all():
        raise InputError("even_grid: positions do not increase; sort the slices, drop duplicates")


def _slice_spacing(position_N: Floats) -> tuple[float, int]:
    """Choose the distance and number of new slices, of which the first and last are old ones.

    A head CT of 1, 4 and 7 mm gaps becomes seven times as large at 1 mm, nearly all of it made up
    between slices 7 mm apart; its median loses detail where slices lie close, and says so in the
    spacing. Where a few gaps are so wide that the median grows as much, the number stays.
    """
    gaps = np.diff(position_N)
    span, num_slices = float(position_N[-1] - position_N[0]), len(position_N)
    num_z = num_slices
    for step in (float(gaps.min()), float(np.median(gaps))):
        if span / step < MAX_GROWTH * num_slices - 1:
            num_z = math.ceil(span / step - _TOLERANCE) + 1
            break
    return span / (num_z - 1), num_z


def _resample(hu_ZYX: Slices, place_N: Floats, shift_N2: Floats, even_ZYX: Slices) -> int:
    """Fill what the slices measured, and return how many voxels that is."""
    planes: dict[int, _Plane] = {}  # the two slices around the new one
    num_measured = 0
    for z, new_SS in enumerate(even_ZYX):
        below = int(np.searchsorted(place_N, z + _TOLERANCE, side="right")) - 1
        weight = 0.0
        if z - place_N[below] > _TOLERANCE and below + 1 < len(place_N):
            weight = float((z - place_N[below]) / (place_N[below + 1] - place_N[below]))
        needed = (below, below + 1) if weight else (below,)
        planes = {
            n: planes[n] if n in planes else _move(hu_ZYX[n], shift_N2[n], new_SS.shape)
            for n in needed
        }
        rows, columns = _overlap([planes[n] for n in needed])
        first, *second = (
            plane.hu_SS[
                rows.start - plane.y : rows.stop - plane.y,
                columns.start - plane.x : columns.stop - plane.x,
            ]
            for plane in planes.values()
        )
        if second:
            blend_SS = first * (1.0 - weight)
            blend_SS += second[0] * weight
            new_SS[rows, columns] = np.rint(blend_SS, out=blend_SS)
        else:
            new_SS[rows, columns] = first if first.dtype == np.int16 else np.rint(first)
        num_measured += first.size
    return num_measured


def _move(hu_SS: Slices, shift: Floats, shape: tuple[int, ...]) -> _Plane:
    """Sample one slice at the pixels of the new grid that lie between its pixel centres."""
    y, x = (_run(float(s), size) for s, size in zip(shift, hu_SS.shape, strict=True))
    assert y.first + y.num <= shape[0]
    assert x.first + x.num <= shape[1]
    moved: NDArray[np.int16] | Floats = hu_SS
    if y.fraction:
        moved = moved[:-1] * (1.0 - y.fraction) + moved[1:] * y.fraction
    if x.fraction:
        moved = moved[:, :-1] * (1.0 - x.fraction) + moved[:, 1:] * x.fraction
    return _Plane(y.first, x.first, moved)


def _run(shift: float, size: int) -> _Run:
    first = math.ceil(shift - _TOLERANCE)
    fraction = first - shift
    if fraction <= _TOLERANCE:
        return _Run(first, 0.0, size)
    return _Run(first, fraction, size - 1)


def _overlap(planes: list[_Plane]) -> tuple[slice, slice]:
    """Return the rows and columns that all the planes cover."""
    top = max(plane.y for plane in planes)
    left = max(plane.x for plane in planes)
    bottom = min(plane.y + plane.hu_SS.shape[0] for plane in planes)
    right = min(plane.x + plane.hu_SS.shape[1] for plane in planes)
    return slice(top, max(top, bottom)), slice(left, max(left, right))

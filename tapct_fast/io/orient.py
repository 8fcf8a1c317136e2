"""Geometry shared by all readers: checks of an affine, and the turn into canonical LPS.

Affines map the voxel index (x, y, z, 1) to RAS+ world millimetres. Arrays are indexed [z, y, x].
Shape suffixes: Z Y X voxels.
"""

import itertools
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tapct_fast import _native
from tapct_fast.errors import FormatError

Scalar = TypeVar("Scalar", bound=np.generic)
Affine = NDArray[np.float64]

MAX_SHEAR_DEG = 0.1  # 0.5 mm over 30 cm; rounding of direction cosines to 4 digits stays below
# Outside this range a unit is wrong (metres, micrometres) or a header is damaged.
SPACING_RANGE_MM = (0.01, 100.0)


class StoredGrid(NamedTuple):
    """The voxel grid of a file before its axes were turned: what overlays the file has this one.

    Attributes:
        shape_zyx: Voxels along the file's own axes, slowest first.
        affine: (4, 4); maps the file's voxel index (x, y, z, 1) to RAS+ millimetres.
    """

    shape_zyx: tuple[int, ...]
    affine: Affine


# RAS direction of growing index after the turn: x to Left, y to Posterior, z to Superior.
_LPS_SIGNS_XYZ = (-1.0, -1.0, 1.0)


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Return the voxel spacing in millimetres, in z, y, x order."""
    x, y, z = (float(norm) for norm in np.linalg.norm(affine[:3, :3], axis=0))
    return z, y, x


def shear_deg(affine: Affine) -> float:
    """Return the largest departure from a right angle between two voxel axes, in degrees."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = [axes[:, i] @ axes[:, j] for i, j in itertools.combinations(range(3), 2)]
    return float(np.degrees(np.arcsin(np.clip(np.abs(cosines).max(), 0.0, 1.0))))


def check_affine(affine: Affine, *, field: str = "affine") -> None:
    """Refuse an affine that no regular voxel grid of a CT can have.

    Args:
        affine: Maps (x, y, z, 1) indices to RAS+ millimetres.
        field: Name for the error message, e.g. ``sform``.

    Raises:
        FormatError: Wrong shape, NaN, singular, sheared by more than 0.1 degrees, or a spacing
            outside 0.01..100 mm.
    """
    if affine.shape != (4, 4):
        raise FormatError(field, f"shape {affine.shape} is not (4, 4)", "orientation")
    if not np.isfinite(affine).all():
        raise FormatError(field, "holds NaN or infinite values", "orientation")
    if not np.array_equal(affine[3], (0.0, 0.0, 0.0, 1.0)):
        raise FormatError(field, "the last row is not (0, 0, 0, 1)", "orientation")
    spacing_mm = spacing_of(affine)
    low, high = SPACING_RANGE_MM
    if min(spacing_mm) == 0.0:
        raise FormatError(field, "singular: a voxel axis has no length", "orientation")
    if not (low <= min(spacing_mm) and max(spacing_mm) <= high):
        text = " x ".join(f"{value:g}" for value in spacing_mm)
        raise FormatError(
            field,
            f"a z, y, x spacing of {text} mm is not that of a CT ({low:g}..{high:g} mm)",
            "spacing",
        )
    shear = shear_deg(affine)
    if shear > MAX_SHEAR_DEG:
        determinant = np.linalg.det(affine[:3, :3]) / np.prod(spacing_mm)
        if abs(determinant) < 1e-6:
            raise FormatError(field, "singular: the voxel axes lie in one plane", "orientation")
        raise FormatError(
            field,
            f"sheared by {shear:.2f} degrees (gantry tilt or a registration); "
            "resample the scan to a rectangular grid first",
            "shear",
        )


def nearest_orthogonal(affine: Affine, shape_zyx: tuple[int, ...]) -> tuple[Affine, float]:
    """Turn sheared axes to the nearest orthogonal ones; spacings and the volume's centre stay.

    Source: the orthogonal factor of the polar decomposition is the nearest orthogonal matrix
    (Higham 1986, Computing the polar decomposition).

    Returns:
        The affine, and how far it moves the voxel that it moves most, in millimetres.
    """
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / norms)
    turned = affine.copy()
    turned[:3, :3] = left @ right * norms
    last_xyz = np.array(shape_zyx[::-1]) - 1
    change = affine[:3, :3] - turned[:3, :3]
    turned[:3, 3] += change @ (last_xyz / 2)
    corners = np.array(list(itertools.product((-0.5, 0.5), repeat=3))) * last_xyz
    return turned, float(np.linalg.norm(corners @ change.T, axis=1).max())


def _order_of(affine: Affine) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Return the voxel axis nearest to each world axis, and the cosines [world, voxel]."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    order = max(
        itertools.permutations(range(3)),
        key=lambda axes: sum(abs(cosines[world, axes[world]]) for world in range(3)),
    )
    return order, cosines


def axes_of(affine: Affine) -> str:
    """Name where x, y, z indices grow to by the nearest directions of the patient, e.g. ``RAS``."""
    order, cosines = _order_of(affine)
    names = [""] * 3
    for world, old in enumerate(order):
        names[old] = ("LR", "PA", "IS")[world][int(cosines[world, old] > 0)]
    return "".join(names)


def to_lps(
    array_zyx: NDArray[Scalar], affine: Affine, *, in_place: bool = False
) -> tuple[NDArray[Scalar], Affine]:
    """Turn a volume into canonical LPS by permuting and flipping axes; no voxel is resampled.

    Each voxel axis goes to the world axis nearest to it, so that for an oblique scan the directions
    hold approximately and the affine still places every voxel exactly.

    Args:
        array_zyx: Voxels of three axes, [z, y, x] in file order.
        affine: Maps the file's (x, y, z, 1) index to RAS+ millimetres; must pass ``check_affine``.
        in_place: The array may be overwritten: an int16 volume whose axes only run the other way,
            as most public CT (RAS), is turned without a second one.

    Returns:
        The C-contiguous array whose x, y, z indices grow to Left, Posterior, Superior, and the
        affine of its indices.
    """
    check_affine(affine)
    order, cosines = _order_of(affine)
    size_xyz = array_zyx.shape[::-1]
    turn = np.zeros((4, 4))  # new index -> old index
    turn[3, 3] = 1.0
    for world, old in enumerate(order):
        if cosines[world, old] * _LPS_SIGNS_XYZ[world] > 0:
            turn[old, world] = 1.0
        else:
            turn[old, world] = -1.0
            turn[old, 3] = size_xyz[old] - 1

    if in_place and order == (0, 1, 2) and array_zyx.dtype == np.int16:
        array_zyx = np.ascontiguousarray(array_zyx)
        _native.flip(array_zyx.view(np.int16), [turn[axis, axis] < 0 for axis in (2, 1, 0)])
        return array_zyx, affine @ turn

    array_xyz = array_zyx.transpose(2, 1, 0).transpose(order)
    flips = tuple(slice(None, None, int(turn[old, world])) for world, old in enumerate(order))
    return np.ascontiguousarray(array_xyz[flips].transpose(2, 1, 0)), affine @ turn


def lps_affine(stored: StoredGrid) -> Affine:
    """Return the affine that ``to_lps`` gives an array of this grid."""
    turn = _lps_turn(stored.affine)
    back = np.eye(4)
    back[:3, :3] = turn
    back[:3, 3] = np.where(turn.sum(axis=1) < 0, np.array(stored.shape_zyx[::-1]) - 1.0, 0.0)
    return stored.affine @ back


def from_lps(
    array_ZYX: NDArray[Scalar], affine: Affine, stored_affine: Affine
) -> tuple[NDArray[Scalar], Affine]:
    """Turn an array in canonical LPS into the axes of a file; the inverse of ``to_lps``.

    Args:
        array_ZYX: Voxels on any grid along the axes of the turned file; more axes may come first.
        affine: Of ``array_ZYX``.
        stored_affine: Of the file: only the directions of its axes count.

    Returns:
        A view whose last three axes are the file's z, y, x, and the affine of its indices.
    """
    turn = _lps_turn(stored_affine)
    turned = np.moveaxis(array_ZYX, (-1, -2, -3), (0, 1, 2))  # x, y, z first
    size_xyz = turned.shape[:3]
    order = np.abs(turn).argmax(axis=1)  # of each stored axis, the LPS axis
    signs = turn.sum(axis=1)
    flips = tuple(slice(None, None, -1 if sign < 0 else None) for sign in signs)
    turned = turned.transpose(*order, *range(3, turned.ndim))[flips]
    back = np.eye(4)
    back[:3, :3] = turn.T  # stored index -> LPS index
    for axis, sign in zip(order, signs, strict=True):
        if sign < 0:
            back[axis, 3] = size_xyz[axis] - 1.0
    return np.moveaxis(turned, (0, 1, 2), (-1, -2, -3)), affine @ back


def _lps_turn(stored_affine: Affine) -> NDArray[np.float64]:
    """Return the (3, 3) signed permutation from steps along LPS axes to steps along stored ones."""
    # Asked of to_lps itself, so that both agree where an oblique axis lies between two others.
    _, turned = to_lps(np.zeros((1, 1, 1), np.int8), stored_affine)
    turn: NDArray[np.float64] = np.rint(np.linalg.solve(stored_affine[:3, :3], turned[:3, :3]))
    return turn


def apart_mm(one: Affine, other: Affine, shape_zyx: tuple[int, ...]) -> float:
    """Return the largest distance between the places two affines give to one voxel of a grid."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape_zyx[::-1]])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.linalg.norm(((one - other) @ corners)[:3], axis=0).max())

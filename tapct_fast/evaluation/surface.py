"""Surface Dice and Hausdorff distance of label maps, in mm, per label.

A surface element stands where a 2 x 2 x 2 neighbourhood of voxels is mixed, at its centre, with the
area that the marching cubes of its code have at this spacing: DeepMind's definition, whose table
comes from MONAI, which keeps it (the package surface-distance fails on an empty mask under
NumPy 2). Distances go from element to element by a k-d tree in place of MONAI's distance map of the
whole box: equal values, and a scan with false positives all over needs seconds, not a minute.

Shape suffixes: Z Y X voxels, K classes, N surface elements.
Source: Nikolov et al., arXiv:1809.04430.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import InputError

Floats = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]

_PERCENTILE = 0.95
_ROUNDING_MM = 1e-6  # a shift by the tolerance itself agrees, whatever 3 * 0.7 - 2 * 0.7 is


class SurfaceScores(NamedTuple):
    """Of one scan; NaN where truth lacks the class, and for class 0, the background."""

    nsd_K: Floats  # share of both surfaces within the tolerance of the other one, 0 to 1
    hd95_mm_K: Floats  # the larger of both directions; the scan's diagonal where a class is missed


class _Surface(NamedTuple):
    place_N3: Floats  # mm, z y x
    area_N: Floats  # mm^2


def surface_scores(
    truth_ZYX: Labels,
    predicted_ZYX: Labels,
    spacing_mm: Sequence[float],
    num_classes: int,
    *,
    tolerance_mm: float = 2.0,
) -> SurfaceScores:
    """Compare the surface of every label with the predicted one.

    Args:
        truth_ZYX: Class numbers, 0 for background.
        predicted_ZYX: On the same grid.
        spacing_mm: Of z, y, x.
        num_classes: Including background.
        tolerance_mm: How far apart surfaces may be and still agree.

    Raises:
        InputError: Shapes, spacing, tolerance or classes do not fit, or MONAI or SciPy is missing.
    """
    _check(truth_ZYX, predicted_ZYX, spacing_mm, num_classes, tolerance_mm)
    area_of_code = _area_table(spacing_mm)
    nsd_K, hd95_mm_K = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    extents_mm = [n * s for n, s in zip(truth_ZYX.shape, spacing_mm, strict=True)]
    truth_boxes, predicted_boxes = _boxes(truth_ZYX), _boxes(predicted_ZYX)
    for k in range(1, num_classes):
        if k not in truth_boxes:
            continue
        if k not in predicted_boxes:
            nsd_K[k], hd95_mm_K[k] = 0.0, float(np.linalg.norm(extents_mm))
            continue
        truth = _surface(truth_ZYX, k, truth_boxes[k], spacing_mm, area_of_code)
        predicted = _surface(predicted_ZYX, k, predicted_boxes[k], spacing_mm, area_of_code)
        nsd_K[k], hd95_mm_K[k] = _compare(truth, predicted, tolerance_mm)
    return SurfaceScores(nsd_K, hd95_mm_K)


def _check(
    truth_ZYX: Labels,
    predicted_ZYX: Labels,
    spacing_mm: Sequence[float],
    num_classes: int,
    tolerance_mm: float,
) -> None:
    if truth_ZYX.ndim != 3 or truth_ZYX.shape != predicted_ZYX.shape:
        raise InputError(
            f"label maps of shapes {truth_ZYX.shape} and {predicted_ZYX.shape} are not two volumes "
            "on one grid; resample the prediction to the truth"
        )
    if len(spacing_mm) != 3 or not all(0 < s < np.inf for s in spacing_mm):
        raise InputError(f"spacing_mm={tuple(spacing_mm)} is not three positive lengths")
    if not 0 <= tolerance_mm < np.inf:
        raise InputError(f"tolerance_mm={tolerance_mm} is not a length")
    for name, labels_ZYX in (("truth", truth_ZYX), ("prediction", predicted_ZYX)):
        low, high = int(labels_ZYX.min(initial=0)), int(labels_ZYX.max(initial=0))
        if low < 0 or high >= num_classes:
            raise InputError(
                f"{name} holds labels {low} to {high}; num_classes={num_classes} allows 0 to "
                f"{num_classes - 1}"
            )


def _area_table(spacing_mm: Sequence[float]) -> Floats:
    """Return the area in mm^2 of a surface element for each of the 256 neighbourhood codes."""
    try:
        from monai.metrics.utils import get_code_to_measure_table
    except ImportError as error:
        raise InputError(
            f"surface scores need MONAI: pip install 'tapct-fast[probe]' ({error})"
        ) from None
    table, kernel = get_code_to_measure_table(tuple(map(float, spacing_mm)))
    # _surface builds codes in this order of the bits.
    assert kernel.flatten().tolist() == [128, 64, 32, 16, 8, 4, 2, 1]
    areas: Floats = table.numpy().astype(np.float64)
    return areas


def _boxes(labels_ZYX: Labels) -> dict[int, tuple[slice, ...]]:
    try:
        from scipy.ndimage import find_objects
    except ImportError as error:
        raise InputError(
            f"surface scores need SciPy: pip install 'tapct-fast[probe]' ({error})"
        ) from None
    found = find_objects(labels_ZYX)
    return {k: box for k, box in enumerate(found, start=1) if box is not None}


def _surface(
    labels_ZYX: Labels,
    k: int,
    box: tuple[slice, ...],
    spacing_mm: Sequence[float],
    area_of_code: Floats,
) -> _Surface:
    mask_ZYX = np.pad((labels_ZYX[box] == k).view(np.uint8), 1)
    z, y, x = mask_ZYX.shape
    code_ZYX = np.zeros((z - 1, y - 1, x - 1), np.uint8)
    for bit, (dz, dy, dx) in enumerate(itertools.product((0, 1), repeat=3)):
        corner_ZYX = mask_ZYX[dz : z - 1 + dz, dy : y - 1 + dy, dx : x - 1 + dx]
        code_ZYX |= corner_ZYX << (7 - bit)
    at_N = np.flatnonzero((code_ZYX != 0) & (code_ZYX != 255))
    index_N3 = np.stack(np.unravel_index(at_N, code_ZYX.shape), axis=1)
    first_3 = np.array([side.start for side in box])
    return _Surface(
        (index_N3 + first_3) * np.asarray(spacing_mm), area_of_code[code_ZYX.flat[at_N]]
    )


def _compare(truth: _Surface, predicted: _Surface, tolerance_mm: float) -> tuple[float, float]:
    """Return surface Dice and the 95 % Hausdorff distance in mm."""
    ways = [
        (truth.area_N, _distances_mm(truth, predicted)),
        (predicted.area_N, _distances_mm(predicted, truth)),
    ]
    within = sum(area_N[mm_N <= tolerance_mm + _ROUNDING_MM].sum() for area_N, mm_N in ways)
    total = sum(area_N.sum() for area_N, _ in ways)
    return float(within / total), max(_percentile(area_N, mm_N) for area_N, mm_N in ways)


def _distances_mm(from_: _Surface, to: _Surface) -> Floats:
    from scipy.spatial import KDTree

    # A balanced tree of raster-ordered points takes longer to build and to ask.
    tree = KDTree(to.place_N3, leafsize=32, balanced_tree=False)
    distances_mm_N: Floats = tree.query(from_.place_N3)[0]
    return distances_mm_N


def _percentile(area_N: Floats, mm_N: Floats) -> float:
    """Return the distance below which 95 % of the area lies."""
    order_N = np.argsort(mm_N, kind="stable")
    share_N = np.cumsum(area_N[order_N]) / area_N.sum()
    at = min(int(np.searchsorted(share_N, _PERCENTILE)), len(mm_N) - 1)
    return float(mm_N[order_N[at]])

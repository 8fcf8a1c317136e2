import math
import resource
import time

import numpy as np
import pytest
import torch

from tapct_fast.errors import InputError
from tapct_fast.evaluation.surface import SurfaceScores, surface_scores

SPACING = (3.0, 0.7, 0.9)


def blob(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Labels 0..3 with ragged surfaces, some of which touch the border of the volume."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).uniform(0, 1, size=(4, 3)) * shape
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distances = np.linalg.norm(places[..., None, :] - centres, axis=-1)
    return (distances + rng.normal(0, 0.4, size=distances.shape)).argmin(-1)


def by_monai(truth: np.ndarray, predicted: np.ndarray, k: int, tolerance_mm: float) -> float:
    from monai.metrics import compute_surface_dice

    masks = [torch.from_numpy(labels == k)[None, None] for labels in (predicted, truth)]
    setting = {"include_background": True, "spacing": SPACING, "use_subvoxels": True}
    return float(compute_surface_dice(*masks, [tolerance_mm], **setting))


@pytest.mark.parametrize("tolerance_mm", [0.0, 1.0, 3.0])
def test_surface_dice_is_monais(tolerance_mm: float) -> None:
    truth, predicted = blob((9, 14, 12), 0), blob((9, 14, 12), 1)
    got = surface_scores(truth, predicted, SPACING, 4, tolerance_mm=tolerance_mm)
    assert math.isnan(got.nsd_K[0])
    for k in (1, 2, 3):
        # MONAI adds areas and measures distances in float32.
        expected = by_monai(truth, predicted, k, tolerance_mm)
        assert got.nsd_K[k] == pytest.approx(expected, abs=1e-5)
        assert 0.3 < got.nsd_K[k] < 1 or tolerance_mm == 3.0


def test_both_scores_are_those_of_deepminds_package() -> None:
    surface_distance = pytest.importorskip("surface_distance")
    truth, predicted = blob((8, 13, 15), 2), blob((8, 13, 15), 3)
    got = surface_scores(truth, predicted, SPACING, 4)
    for k in (1, 2, 3):
        parts = surface_distance.compute_surface_distances(truth == k, predicted == k, SPACING)
        nsd = surface_distance.compute_surface_dice_at_tolerance(parts, 2.0)
        assert got.nsd_K[k] == pytest.approx(nsd, abs=1e-6)
        hd95 = surface_distance.compute_robust_hausdorff(parts, 95)
        assert got.hd95_mm_K[k] == pytest.approx(hd95, abs=1e-6)


def elements(mask: np.ndarray) -> np.ndarray:
    """Centres in mm of the mixed neighbourhoods, one by one; the grid is padded by one voxel."""
    padded = np.pad(mask, 1)
    found = []
    for z, y, x in np.ndindex(*(n - 1 for n in padded.shape)):
        corner = padded[z : z + 2, y : y + 2, x : x + 2]
        if corner.any() and not corner.all():
            found.append(np.array([z, y, x]) * SPACING)
    return np.array(found)


def test_distances_are_those_of_brute_force() -> None:
    truth, predicted = np.zeros((7, 9, 9), int), np.zeros((7, 9, 9), int)
    truth[3, 4, 4] = predicted[1, 1, 6] = 1
    a, b = elements(truth == 1), elements(predicted == 1)
    assert len(a) == len(b) == 8  # of one voxel: eight corners of equal area
    between = np.linalg.norm(a[:, None] - b, axis=-1)
    nearest = np.concatenate([between.min(1), between.min(0)])
    for tolerance_mm in (nearest.min() - 0.01, np.median(nearest), nearest.max() + 0.01):
        got = surface_scores(truth, predicted, SPACING, 2, tolerance_mm=float(tolerance_mm))
        assert got.nsd_K[1] == pytest.approx((nearest <= tolerance_mm).mean())
        # Of eight equal areas the last one holds the 95th percentile: the plain Hausdorff distance.
        assert got.hd95_mm_K[1] == pytest.approx(max(between.min(1).max(), between.min(0).max()))


def test_a_shift_by_two_slices_is_as_many_mm() -> None:
    truth, predicted = np.zeros((12, 20, 20), np.int16), np.zeros((12, 20, 20), np.int16)
    truth[2:6, 4:16, 4:16] = 1
    predicted[4:8, 4:16, 4:16] = 1
    got = surface_scores(truth, predicted, SPACING, 2, tolerance_mm=6.0)
    assert got.hd95_mm_K[1] == pytest.approx(6.0)
    assert got.nsd_K[1] == 1.0
    predicted = np.roll(truth, 1, axis=1)  # by 0.7 mm, which binary fractions cannot say
    assert surface_scores(truth, predicted, SPACING, 2, tolerance_mm=0.7).nsd_K[1] == 1.0


def test_equal_maps_agree_and_what_truth_lacks_is_not_scored() -> None:
    truth = blob((6, 8, 8), 0)
    got = surface_scores(truth, truth, SPACING, 6, tolerance_mm=0.0)
    np.testing.assert_array_equal(got.nsd_K, [np.nan, 1, 1, 1, np.nan, np.nan])
    np.testing.assert_array_equal(got.hd95_mm_K, [np.nan, 0, 0, 0, np.nan, np.nan])
    predicted = np.where(truth == 1, 4, truth)  # 1 is missed, 4 is made up
    got = surface_scores(truth, predicted, SPACING, 6)
    assert got.nsd_K[1] == 0
    assert got.hd95_mm_K[1] == pytest.approx(np.linalg.norm(np.array([6, 8, 8]) * SPACING))
    assert math.isnan(got.nsd_K[4])


def test_a_label_that_fills_the_volume_has_the_border_as_its_surface() -> None:
    full = np.ones((4, 5, 6), np.uint8)
    got = surface_scores(full, full, SPACING, 2, tolerance_mm=0.0)
    assert (got.nsd_K[1], got.hd95_mm_K[1]) == (1.0, 0.0)


def test_a_chest_with_ten_labels_and_false_positives_takes_seconds() -> None:
    shape = (40, 512, 512)
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    truth, predicted = np.zeros(shape, np.int16), np.zeros(shape, np.int16)
    for k in range(1, 11):
        cz, cy, cx = 20, 60 + 80 * (k % 5), 130 + 200 * (k % 2)
        truth[((z - cz) / 12) ** 2 + ((y - cy) / 35) ** 2 + ((x - cx) / 70) ** 2 < 1] = k
        predicted[((z - cz) / 12) ** 2 + ((y - cy - 3) / 35) ** 2 + ((x - cx) / 70) ** 2 < 1] = k
    for corner in rng.integers((0, 0, 0), np.array(shape) - 6, size=(100, 3)):
        a, b, c = corner
        predicted[a : a + 3, b : b + 6, c : c + 6] = rng.integers(1, 11)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    got = surface_scores(truth, predicted, (3.0, 0.8, 0.8), 11)
    assert time.process_time() - start < 10  # 2.4 s where it was written
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert np.isfinite(got.nsd_K[1:]).all()
    assert (got.nsd_K[1:] > 0.2).all()


def test_what_does_not_fit_is_refused() -> None:
    labels = np.zeros((3, 3, 3), int)

    def call(*args: object, **setting: float) -> SurfaceScores:
        return surface_scores(*args, **setting)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="one grid"):
        call(labels, labels[1:], SPACING, 2)
    with pytest.raises(InputError, match="spacing_mm"):
        call(labels, labels, (1.0, 0.0, 1.0), 2)
    with pytest.raises(InputError, match="tolerance_mm"):
        call(labels, labels, SPACING, 2, tolerance_mm=-1.0)
    with pytest.raises(InputError, match="prediction holds labels 0 to 5"):
        call(labels, labels + 5 * np.eye(3, dtype=int), SPACING, 5)

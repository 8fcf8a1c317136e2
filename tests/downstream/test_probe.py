import math
import time

import numpy as np
import pytest
import torch

from tapct_fast.downstream.features import Features
from tapct_fast.downstream.probe import (
    knn,
    knn_segmentation,
    linear_segmentation,
    probe_scans,
)
from tapct_fast.errors import InputError
from tapct_fast.io.volume import Volume

GRID = (4, 6, 5)


def brute_force_knn(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int, temp: float
) -> list[int]:
    predictions = []
    for row in test.astype(np.float64):
        similarity = [row @ t / np.linalg.norm(row) / np.linalg.norm(t) for t in train]
        nearest = np.argsort(similarity)[::-1][:k]
        votes: dict[int, float] = {}
        for i in nearest:
            votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(similarity[i] / temp)
        predictions.append(max(sorted(votes), key=votes.__getitem__))
    return predictions


@pytest.mark.parametrize("k", [1, 5, 20, 500])  # 500: more than there are
@pytest.mark.parametrize("temp", [0.07, 1.0])
def test_knn_matches_brute_force(k: int, temp: float) -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(200, 8)), rng.normal(size=(60, 8))
    labels = rng.choice([-3, 4, 17], size=200)
    got = knn(
        torch.from_numpy(train).float(),
        torch.from_numpy(labels),
        torch.from_numpy(test).float(),
        k=k,
        temp=temp,
    )
    assert got.tolist() == brute_force_knn(train, labels, test, k, temp)


def test_knn_refuses_what_does_not_fit() -> None:
    x_ND, labels_N = torch.randn(5, 3), torch.arange(5)
    for args, setting in (
        ((x_ND, labels_N, torch.randn(2, 4)), {}),
        ((x_ND, labels_N[:4], x_ND), {}),
        ((x_ND[:0], labels_N[:0], x_ND), {}),
        ((x_ND, labels_N, x_ND), {"k": 0}),
        ((x_ND, labels_N, x_ND), {"temp": 0.0}),
    ):
        with pytest.raises(InputError, match="knn"):
            knn(*args, **setting)


def toy(seed: int, *, num_classes: int = 4, informed: bool = True) -> tuple[Features, Volume]:
    """A scan whose tokens code their class linearly in noise of 16 channels, or do not at all."""
    rng = np.random.default_rng(seed)
    classes_ZYX = rng.integers(0, num_classes, GRID)
    code_KD = np.random.default_rng(99).normal(size=(num_classes, 16)) * 3
    tokens = rng.normal(size=(*GRID, 16)) * 0.3
    if informed:
        tokens = tokens + code_KD[classes_ZYX]
    token_affine = np.diag([-8.0, -8.0, 12.0, 1.0])
    voxel_affine = np.diag([-2.0, -2.0, 4.0, 1.0])
    voxel_affine[:3, 3] = [3.0, 3.0, -4.0]  # centres of 3 x 4 x 4 voxels fall on token centres
    labels = classes_ZYX.repeat(3, 0).repeat(4, 1).repeat(4, 2).astype(np.int16)
    features = Features(
        torch.from_numpy(tokens).float(),
        token_affine,
        (12.0, 8.0, 8.0),
        torch.zeros(1, 16),
        torch.zeros(16),
    )
    return features, Volume(np.ascontiguousarray(labels), (4.0, 2.0, 2.0), voxel_affine)


def centre_voxels(scan: tuple[Features, Volume]) -> tuple[Features, Volume]:
    """Keep the label voxels at the token centres: there interpolation mixes no neighbours."""
    features, labels = scan
    centre = Volume(
        np.ascontiguousarray(labels.hu_ZYX[1::3, 1::4, 1::4]), (12.0, 8.0, 8.0), features.affine
    )
    return features, centre


@pytest.mark.parametrize("probe", [linear_segmentation, knn_segmentation])
def test_a_separable_toy_is_solved_and_noise_is_not(probe: type(linear_segmentation)) -> None:
    train = [toy(seed) for seed in range(6)]
    test = [centre_voxels(toy(seed)) for seed in range(10, 14)]
    result = probe(train, test, num_classes=4, seed=0, label_names=["air", "a", "b", "c"])
    assert result.mean_dice > 0.99
    assert result.interval[0] > 0.98
    assert "c" in str(result)

    noise = [toy(seed, informed=False) for seed in range(6)]
    unseen = [centre_voxels(toy(seed, informed=False)) for seed in range(10, 14)]
    chance = probe(noise, unseen, num_classes=4, seed=0)
    # Of 4 equal classes a guess hits a quarter; the standard error over 480 voxels is 0.02.
    assert 0.15 < chance.mean_dice < 0.35
    assert chance.interval[1] < 0.4


def test_block_borders_cost_dice_but_blocks_are_found() -> None:
    result = linear_segmentation([toy(s) for s in range(6)], [toy(10)], num_classes=4)
    assert 0.6 < result.mean_dice < 0.95  # scores of random neighbours mix between token centres


def test_the_linear_probe_repeats_itself_to_the_bit() -> None:
    train, test = [toy(seed) for seed in range(3)], [toy(seed) for seed in range(3, 6)]
    first, second = (linear_segmentation(train, test, num_classes=4, seed=1) for _ in range(2))
    assert np.array_equal(first.confusion_KK, second.confusion_KK)
    assert first.interval == second.interval


def test_a_rare_class_is_not_drowned() -> None:
    def rare(seed: int) -> tuple[Features, Volume]:
        """Class 1 fills 2 of 120 tokens and overlaps its neighbour class in the only channel."""
        rng = np.random.default_rng(seed)
        features, labels = toy(seed, num_classes=2, informed=False)
        classes_ZYX = np.zeros(GRID, np.int64)
        classes_ZYX.reshape(-1)[rng.choice(120, 2, replace=False)] = 1
        features.patches_ZYXC[..., 0] += torch.from_numpy(classes_ZYX) * 1.2
        voxels = classes_ZYX.repeat(3, 0).repeat(4, 1).repeat(4, 2).astype(np.int16)
        return features, Volume(voxels, labels.spacing_mm, labels.affine)

    train = [rare(seed) for seed in range(20)]
    test = [centre_voxels(rare(seed)) for seed in range(20, 40)]
    assert linear_segmentation(train, test, num_classes=2).mean_dice > 0.6


def test_a_class_without_training_tokens_is_never_predicted() -> None:
    train = [toy(seed, num_classes=3) for seed in range(3)]
    test = [toy(5, num_classes=4)]
    for probe in (linear_segmentation, knn_segmentation):
        result = probe(train, test, num_classes=5)
        assert result.confusion_KK[:, 3:].sum() == 0
        assert result.dice_K[3] == 0.0  # there, and missed
        assert np.isnan(result.dice_K[4])  # not there


def test_more_tokens_than_the_limit_are_drawn_with_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tapct_fast.downstream.probe.LINEAR_TOKENS", 60)
    train, test = [toy(seed) for seed in range(3)], [centre_voxels(toy(9))]
    first = linear_segmentation(train, test, num_classes=4, seed=1)
    assert np.array_equal(
        first.confusion_KK, linear_segmentation(train, test, num_classes=4, seed=1).confusion_KK
    )
    assert first.mean_dice > 0.9  # 60 rows of a separable problem are enough


def test_probes_refuse_bad_scans_by_number() -> None:
    scans = [toy(0), toy(1)]
    for train, test in ((scans, []), ([], scans)):
        with pytest.raises(InputError, match="training and test scans"):
            linear_segmentation(train, test, num_classes=4)
    with pytest.raises(InputError, match="training label map 1: it has values"):
        linear_segmentation(scans, scans, num_classes=3)
    features, labels = toy(2)
    far = labels.affine + np.array([[0, 0, 0, 5000.0], [0] * 4, [0] * 4, [0] * 4])
    moved = (features, Volume(labels.hu_ZYX, labels.spacing_mm, far))
    with pytest.raises(InputError, match="training label map 2: it lies outside"):
        linear_segmentation([scans[0], moved], scans, num_classes=4)
    with pytest.raises(InputError, match="names"):
        linear_segmentation(scans, scans, num_classes=4, label_names=["a"])


def test_a_fit_of_full_size_takes_seconds() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 10, (16, 32, 32))
    tokens = torch.from_numpy(rng.normal(size=(16, 32, 32, 384))).float()
    tokens[..., 0] += torch.from_numpy(classes)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    scan = (
        Features(tokens, affine, (1.0, 1.0, 1.0), torch.zeros(1, 384), torch.zeros(384)),
        Volume(classes.astype(np.int16), (1.0, 1.0, 1.0), affine),
    )
    start = time.process_time()
    linear_segmentation([scan], [scan], num_classes=10)
    assert time.process_time() - start < 20  # CPU seconds; about 2 for 16384 tokens


def test_folds_over_scans_test_each_once_with_its_own_label_values() -> None:
    scans = []
    for seed in range(4):
        features, labels = centre_voxels(toy(seed, num_classes=2))
        values = np.where(labels.hu_ZYX > 0, 7, 0).astype(np.int16)
        scans.append((features, Volume(values, labels.spacing_mm, labels.affine)))
    result = probe_scans(scans, folds=8, seed=0)
    assert result.num_folds == 4
    assert result.linear.num_scans == result.knn.num_scans == 4
    assert result.linear.label_names == ("0", "7")
    assert min(result.linear.mean_dice, result.knn.mean_dice) > 0.95
    text = str(result)
    assert "kNN" in text
    assert "linear head" in text
    assert "4-fold" in text
    assert str(probe_scans(scans, folds=8, seed=0)) == text
    for few, folds in ((scans[:1], 2), (scans, 1)):
        with pytest.raises(InputError, match="cross-validation"):
            probe_scans(few, folds=folds)

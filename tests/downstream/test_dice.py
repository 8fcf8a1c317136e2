import warnings

import numpy as np
import pytest

from tapct_fast.downstream.dice import confusion_matrix, dice_of, summarise


def test_confusion_and_dice_match_counting() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (2, 5, 6, 7))
    confusion = confusion_matrix(truth, predicted, 4)
    dice_K = dice_of(confusion)
    for k in range(4):
        for j in range(4):
            assert confusion[k, j] == np.sum((truth == k) & (predicted == j))
        a, b = truth == k, predicted == k
        assert dice_K[k] == pytest.approx(2 * np.sum(a & b) / (a.sum() + b.sum()))


def test_an_absent_label_is_neither_a_hit_nor_a_miss() -> None:
    truth = np.array([0, 0, 1, 1])
    assert np.isnan(dice_of(confusion_matrix(truth, truth, 3))[2])
    wrong = np.array([0, 2, 1, 1])  # the absent label is predicted: still NaN, but counted
    confusion = confusion_matrix(truth, wrong, 3)
    assert np.isnan(dice_of(confusion)[2])
    assert confusion[0, 2] == 1
    missed = dice_of(confusion_matrix(np.array([0, 2]), np.array([0, 0]), 3))
    assert missed[2] == 0.0


def test_the_interval_is_the_bootstrap_over_scans() -> None:
    rng = np.random.default_rng(0)
    confusions = rng.integers(1, 50, (6, 3, 3))
    confusions[:4, 2, :] = 0  # label 2 occurs in two scans only
    result = summarise("probe", ("background", "a", "b"), confusions, seed=7)
    dice_SK = np.stack([dice_of(c) for c in confusions])
    pick = np.random.default_rng(7).integers(6, size=(2000, 6))
    means, overall = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some draws hold no scan with label 2
        for row in pick:
            draw = np.nanmean(dice_SK[row], axis=0)
            means.append(draw)
            overall.append(np.nanmean(draw[1:]))
        expected = np.nanpercentile(np.array(means), [2.5, 97.5], axis=0).T
    np.testing.assert_allclose(result.interval_K2, expected)
    assert result.interval == pytest.approx(np.percentile(overall, [2.5, 97.5]))
    np.testing.assert_allclose(result.dice_K, np.nanmean(dice_SK, axis=0))
    assert result.mean_dice == pytest.approx(result.dice_K[1:].mean())
    assert result.interval[0] < result.mean_dice < result.interval[1]
    again = summarise("probe", ("background", "a", "b"), confusions, seed=7)
    assert again.interval == result.interval
    assert summarise("probe", ("0", "a", "b"), confusions, seed=8).interval != result.interval


def test_one_scan_has_no_interval_and_a_label_of_no_scan_no_dice() -> None:
    confusions = np.array([[[5, 1, 0], [2, 4, 0], [0, 0, 0]]])
    result = summarise("probe", ("background", "liver", "spleen"), confusions, seed=0)
    assert np.isnan(result.interval_K2).all()
    assert np.isnan(result.dice_K[2])
    assert result.mean_dice == pytest.approx(8 / 11)
    lines = str(result).splitlines()
    assert "1 scans" in lines[0]
    assert lines[2].split() == ["liver", "1", "0.727", "-"]
    assert lines[3].split() == ["spleen", "0", "-", "-"]
    assert lines[4].split() == ["mean", "1", "0.727", "-"]

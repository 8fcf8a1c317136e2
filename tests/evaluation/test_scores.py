import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from tapct_fast.errors import InputError
from tapct_fast.evaluation import scores


def drawn(seed: int, num_classes: int, num: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth_N = rng.integers(num_classes, size=num)
    truth_N[:num_classes] = np.arange(num_classes)
    score_NK = rng.normal(size=(num, num_classes)).round(1)  # rounded: ties
    score_NK[np.arange(num), truth_N] += 0.5
    return truth_N, score_NK


@pytest.mark.parametrize("seed", range(5))
def test_auroc_of_two_classes_is_scikit_learns(seed: int) -> None:
    truth_N, score_NK = drawn(seed, 2)
    expected = metrics.roc_auc_score(truth_N, score_NK[:, 1])
    assert scores.auroc(truth_N, score_NK) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_classes", [3, 7])
def test_auroc_of_many_classes_is_scikit_learns_macro_one_vs_rest(num_classes: int) -> None:
    truth_N, score_NK = drawn(0, num_classes)
    p_NK = np.exp(score_NK) / np.exp(score_NK).sum(1, keepdims=True)
    expected = metrics.roc_auc_score(truth_N, p_NK, multi_class="ovr", average="macro")
    assert scores.auroc(truth_N, p_NK) == pytest.approx(expected, abs=1e-12)


def test_auroc_of_a_class_that_is_absent_is_the_mean_over_the_others() -> None:
    truth_N, score_NK = drawn(0, 3)
    keep = truth_N != 2
    areas = [metrics.roc_auc_score(truth_N[keep] == k, score_NK[keep, k]) for k in (0, 1)]
    assert scores.auroc(truth_N[keep], score_NK[keep]) == pytest.approx(np.mean(areas))


def test_auroc_of_one_class_is_not_defined() -> None:
    for num_classes in (2, 3):
        score_NK = np.random.default_rng(0).normal(size=(5, num_classes))
        assert math.isnan(scores.auroc(np.ones(5, dtype=int), score_NK))
        assert math.isnan(scores.auroc(np.zeros(0, dtype=int), score_NK[:0]))


@pytest.mark.parametrize("num_classes", [2, 5])
def test_classification_scores_are_scikit_learns(num_classes: int) -> None:
    truth_N, score_NK = drawn(1, num_classes)
    predicted_N = score_NK.argmax(1)
    assert scores.balanced_accuracy(truth_N, predicted_N) == pytest.approx(
        metrics.balanced_accuracy_score(truth_N, predicted_N)
    )
    assert scores.macro_f1(truth_N, predicted_N) == pytest.approx(
        metrics.f1_score(truth_N, predicted_N, average="macro")
    )


def test_f1_counts_a_class_that_is_only_predicted() -> None:
    truth_N, predicted_N = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 2])
    expected = metrics.f1_score(truth_N, predicted_N, average="macro")
    assert scores.macro_f1(truth_N, predicted_N) == pytest.approx(expected)


def test_regression_scores_are_scikit_learns_and_scipys() -> None:
    rng = np.random.default_rng(2)
    truth_N = rng.normal(50, 10, size=40).round()  # ties
    predicted_N = truth_N + rng.normal(0, 8, size=40).round()
    assert scores.r2(truth_N, predicted_N) == pytest.approx(metrics.r2_score(truth_N, predicted_N))
    assert scores.mae(truth_N, predicted_N) == pytest.approx(
        metrics.mean_absolute_error(truth_N, predicted_N)
    )
    assert scores.spearman(truth_N, predicted_N) == pytest.approx(
        stats.spearmanr(truth_N, predicted_N).statistic
    )


def test_regression_scores_of_constants_and_of_nothing_are_not_defined() -> None:
    varied, constant, nothing = np.arange(4.0), np.ones(4), np.zeros(0)
    assert math.isnan(scores.r2(constant, varied))
    assert scores.r2(varied, np.full(4, varied.mean())) == 0
    assert math.isnan(scores.spearman(varied, constant))
    assert math.isnan(scores.spearman(constant, varied))
    for metric in (scores.r2, scores.mae, scores.spearman):
        assert math.isnan(metric(nothing, nothing))


def test_ranks_are_scipys() -> None:
    values = np.random.default_rng(0).integers(10, size=50).astype(float)
    np.testing.assert_array_equal(scores.ranks(values), stats.rankdata(values))


def mean_of(values_N: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda rows: float(values_N[rows].mean())


def test_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values_N = np.random.default_rng(0).normal(size=400)
    low, high = scores.bootstrap(mean_of(values_N), [str(i) for i in range(400)], seed=1)
    half = 1.96 * values_N.std() / 20
    # 2000 draws: the percentiles themselves have a standard error of about 5 % of the half-width
    assert low == pytest.approx(values_N.mean() - half, abs=0.2 * half)
    assert high == pytest.approx(values_N.mean() + half, abs=0.2 * half)


def test_two_patients_give_the_interval_of_three_outcomes() -> None:
    # Means of 0, .5 and 1 with chances 1/4, 1/2, 1/4: both tails are longer than 2.5 %.
    assert scores.bootstrap(mean_of(np.array([0.0, 1.0])), ["a", "b"], seed=0) == (0.0, 1.0)


def test_scans_of_one_patient_are_drawn_together() -> None:
    values_N = np.repeat(np.random.default_rng(0).normal(size=20), 5)
    one_each = scores.bootstrap(mean_of(values_N[::5]), [str(i) for i in range(20)], seed=3)
    patients = [str(i // 5) for i in range(100)]
    five_each = scores.bootstrap(mean_of(values_N), patients, seed=3)
    assert five_each == pytest.approx(one_each)
    narrow = scores.bootstrap(mean_of(values_N), [str(i) for i in range(100)], seed=3)
    assert narrow[1] - narrow[0] < 0.6 * (five_each[1] - five_each[0])


def test_draws_are_whole_patients_as_many_as_there_are() -> None:
    patients = ["a", "b", "a", "c", "c", "c"]
    seen = []

    def statistic(rows: np.ndarray) -> float:
        counts = np.bincount(rows, minlength=6)
        assert counts[0] == counts[2]
        assert counts[3] == counts[4] == counts[5]
        seen.append(counts[0] + counts[1] + counts[3])
        return 0.0

    assert scores.bootstrap(statistic, patients, seed=0, resamples=50) == (0.0, 0.0)
    assert seen == [3] * 50


def test_draws_that_are_not_defined_are_left_out() -> None:
    truth_N, score_NK = np.array([0, 0, 0, 1]), np.array([[0.0, x] for x in (1, 2, 3, 9)])

    def area(rows: np.ndarray) -> float:
        return scores.auroc(truth_N[rows], score_NK[rows])

    result = scores.score("auroc", area, list("abcd"), seed=0)  # a third of the draws lack class 1
    assert result == ("auroc", 1.0, 1.0, 1.0)
    never = scores.bootstrap(lambda _: math.nan, list("abcd"), seed=0)
    assert all(map(math.isnan, never))


@pytest.mark.parametrize("patients", [[], ["a"], ["a", "a", "a"]])
def test_fewer_than_two_patients_have_no_interval(patients: list[str]) -> None:
    assert all(map(math.isnan, scores.bootstrap(lambda _: 1.0, patients, seed=0)))


def test_the_seed_decides_and_names_do_not() -> None:
    values_N = np.random.default_rng(0).normal(size=30)
    names, others = [str(i) for i in range(30)], [str(99 - i) for i in range(30)]
    first = scores.bootstrap(mean_of(values_N), names, seed=5)
    assert first == scores.bootstrap(mean_of(values_N), others, seed=5)
    assert first != scores.bootstrap(mean_of(values_N), names, seed=6)


def test_no_resamples_are_refused() -> None:
    with pytest.raises(InputError, match="resamples=0"):
        scores.bootstrap(lambda _: 1.0, ["a", "b"], seed=0, resamples=0)

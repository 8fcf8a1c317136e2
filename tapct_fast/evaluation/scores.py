"""Scores of predictions, each with an interval that says how far the patients at hand carry it.

The definitions are scikit-learn's, and tests hold them to it. They stand here because an interval
takes 2000 of each, and scikit-learn checks its input for a millisecond every time.

Shape suffixes: N scans, K classes, P patients, R resamples.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.downstream.dice import INTERVAL_PERCENT, NUM_RESAMPLES
from tapct_fast.errors import InputError

Floats = NDArray[np.floating[Any]]
Classes = NDArray[np.integer[Any]]

NAN = float("nan")


class Score(NamedTuple):
    """One number with its 95 % interval, by the percentiles of a bootstrap over patients."""

    name: str  # "auroc", "balanced accuracy", "dice", "nsd 2 mm", "r2", "recall@1"
    value: float
    low: float  # NaN, as is ``high``, where an interval cannot be had
    high: float


def score(
    name: str, statistic: Callable[[NDArray[np.intp]], float], patients: Sequence[str], *, seed: int
) -> Score:
    """Return a statistic of all rows with its interval; arguments as ``bootstrap``."""
    value = float(statistic(np.arange(len(patients))))
    return Score(name, value, *bootstrap(statistic, patients, seed=seed))


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    patients: Sequence[str],
    *,
    seed: int,
    resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """Draw patients with replacement and return the 2.5 and 97.5 percentiles of a statistic.

    Scans of one patient are no independent evidence: they are drawn together or not at all.

    Args:
        statistic: Gets row numbers, some of them repeated. NaN says that it is not defined on
            these rows, such as an AUROC of one class; such draws are left out.
        patients: One per row.
        seed: Draws the patients. Their names do not matter, only which rows share one.
        resamples: How many draws.

    Returns:
        Low and high; NaN with fewer than two patients, or where no draw is defined.

    Raises:
        InputError: ``resamples`` is not positive.
    """
    if resamples < 1:
        raise InputError(f"resamples={resamples} is not positive")
    number_of = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    num_patients = len(number_of)
    if num_patients < 2:
        return NAN, NAN
    patient_N = np.array([number_of[patient] for patient in patients])
    rows_P = [np.flatnonzero(patient_N == number) for number in range(num_patients)]
    pick_RP = np.random.default_rng(seed).integers(num_patients, size=(resamples, num_patients))
    draws_R = np.array(
        [statistic(np.concatenate([rows_P[p] for p in pick_P])) for pick_P in pick_RP],
        dtype=np.float64,
    )
    draws_R = draws_R[~np.isnan(draws_R)]
    if draws_R.size == 0:
        return NAN, NAN
    low, high = np.percentile(draws_R, INTERVAL_PERCENT)
    return float(low), float(high)


def auroc(truth_N: Classes, score_NK: Floats) -> float:
    """Return the area under the ROC curve; ties count half.

    Of two classes that of class 1, of more the plain mean of one class against the rest, over the
    classes that occur.

    Args:
        truth_N: Class numbers below K.
        score_NK: Larger is more likely.

    Returns:
        0.5 is chance; NaN where only one class occurs.
    """
    num_classes = score_NK.shape[1]
    classes = [1] if num_classes == 2 else range(num_classes)
    areas = [_binary_auroc(truth_N == k, score_NK[:, k]) for k in classes]
    return _mean([area for area in areas if not np.isnan(area)])


def _binary_auroc(is_true_N: NDArray[np.bool_], score_N: Floats) -> float:
    num_true = int(is_true_N.sum())
    num_false = len(is_true_N) - num_true
    if num_true == 0 or num_false == 0:
        return NAN
    # Mann and Whitney's U: how many pairs stand in the right order.
    above = ranks(score_N)[is_true_N].sum() - num_true * (num_true + 1) / 2
    return float(above / (num_true * num_false))


def ranks(values_N: Floats) -> NDArray[np.float64]:
    """Return ranks from 1; equal values share the mean of theirs."""
    _, group_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    shared: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[group_N]
    return shared


def balanced_accuracy(truth_N: Classes, predicted_N: Classes) -> float:
    """Return the mean recall over the classes that occur; NaN without rows."""
    is_right_N = truth_N == predicted_N
    return _mean([float(is_right_N[truth_N == k].mean()) for k in np.unique(truth_N)])


def r2(truth_N: Floats, predicted_N: Floats) -> float:
    """Return the share of variance explained: 1 at best, 0 for the mean of these very rows.

    NaN where all true values are equal.
    """
    total = np.square(truth_N - truth_N.mean()).sum() if len(truth_N) else 0.0
    return float(1 - np.square(truth_N - predicted_N).sum() / total) if total > 0 else NAN


def mae(truth_N: Floats, predicted_N: Floats) -> float:
    """Return the mean absolute error, in the unit of the target; NaN without rows."""
    return float(np.abs(truth_N - predicted_N).mean()) if len(truth_N) else NAN


def spearman(truth_N: Floats, predicted_N: Floats) -> float:
    """Return Spearman's rank correlation; NaN where one side is constant."""
    x_N, y_N = (r - r.mean() if len(r) else r for r in (ranks(truth_N), ranks(predicted_N)))
    spread = np.sqrt(np.square(x_N).sum() * np.square(y_N).sum())
    return float((x_N * y_N).sum() / spread) if spread > 0 else NAN


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else NAN

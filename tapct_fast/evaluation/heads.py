"""Heads on one vector per scan: logistic and ridge regression, and kNN.

The strength of a penalty is chosen inside the training scans, by folds of their patients; features
are standardised by the scans that a fit sees. Grid and folds are the same for every backbone.

Shape suffixes: N training scans, M others, D width, K classes or one column of values.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tapct_fast.downstream.neighbours import vote
from tapct_fast.downstream.probe import NUM_NEIGHBOURS, TEMP
from tapct_fast.errors import InputError
from tapct_fast.evaluation.splits import Fold, patient_folds

Floats = NDArray[np.floating[Any]]
Rows = NDArray[np.intp]
Predict = Callable[[Floats], Floats]  # x_MD -> scores_MK

INNER_FOLDS = 5
# From strong to weak, so that of equal losses the stronger penalty wins; of the sums over scans.
PENALTIES = tuple(10.0**power for power in range(5, -2, -1))
DEFAULT_PENALTY = 1.0  # scikit-learn's, where there are too few patients to choose one
MAX_ITERATIONS = 1000


class Training(NamedTuple):
    """What a head may see."""

    x_ND: Floats
    target_NK: Floats  # one-hot for two classes or more; one column of values
    weight_N: Floats  # mean 1; those of each class have the same sum
    patients: Sequence[str]

    @property
    def class_N(self) -> NDArray[np.intp] | None:
        """Class numbers; None for values."""
        return self.target_NK.argmax(1) if self.target_NK.shape[1] > 1 else None


def inner_folds(
    patients: Sequence[str], class_N: NDArray[np.intp] | None, *, seed: int
) -> list[Fold]:
    """Divide training scans by patient, without folds whose training part has one class only."""
    if len(set(patients)) < 2:
        return []
    stratify = None if class_N is None else class_N.tolist()
    folds = patient_folds(patients, folds=INNER_FOLDS, seed=seed, stratify=stratify)
    return [f for f in folds if class_N is None or len(set(class_N[list(f.train)])) > 1]


def fit_logistic(train: Training, *, seed: int) -> Predict:
    """Fit multinomial logistic regression; scores are probabilities, 0 for a class never seen.

    Raises:
        InputError: The scans hold one class, or scikit-learn is missing.
    """
    linear_model = _linear_model()
    class_N = train.class_N
    if class_N is None or len(set(class_N)) < 2:
        raise InputError("logistic regression needs training scans of two classes")
    num_classes = train.target_NK.shape[1]

    def fit(penalty: float, rows: Rows) -> Predict:
        standard = _standardise(train.x_ND[rows])
        model = linear_model.LogisticRegression(C=1 / penalty, max_iter=MAX_ITERATIONS)
        model.fit(standard(train.x_ND[rows]), class_N[rows], sample_weight=train.weight_N[rows])

        def predict(x_MD: Floats) -> Floats:
            p_MK = np.zeros((len(x_MD), num_classes))
            p_MK[:, model.classes_] = model.predict_proba(standard(x_MD))
            return p_MK

        return predict

    def loss(p_MK: Floats, rows: Rows) -> float:
        p_M = p_MK[np.arange(len(rows)), class_N[rows]]
        return float(-(train.weight_N[rows] * np.log(p_M.clip(1e-12))).sum())

    return _tuned(fit, loss, train, seed)


def fit_ridge(train: Training, *, seed: int) -> Predict:
    """Fit ridge regression: of values, or of -1 and 1 per class, whose largest score wins.

    Raises:
        InputError: scikit-learn is missing.
    """
    linear_model = _linear_model()
    y_NK = train.target_NK if train.class_N is None else 2 * train.target_NK - 1

    def fit(penalty: float, rows: Rows) -> Predict:
        standard = _standardise(train.x_ND[rows])
        model = linear_model.Ridge(alpha=penalty)
        model.fit(standard(train.x_ND[rows]), y_NK[rows], sample_weight=train.weight_N[rows])

        def predict(x_MD: Floats) -> Floats:
            scores_MK: Floats = model.predict(standard(x_MD)).reshape(len(x_MD), -1)
            return scores_MK

        return predict

    def loss(scores_MK: Floats, rows: Rows) -> float:
        errors_M = np.square(scores_MK - y_NK[rows]).sum(1)
        return float((train.weight_N[rows] * errors_M).sum())

    return _tuned(fit, loss, train, seed)


def fit_knn(train: Training) -> Predict:
    """Keep the scans; a score is the mean target of the nearest, as in ``downstream.probe``."""
    x_ND = torch.from_numpy(train.x_ND)
    target_NK = torch.from_numpy(train.target_NK).float()

    def predict(x_MD: Floats) -> Floats:
        votes_MK = vote(x_ND, target_NK, torch.from_numpy(x_MD), k=NUM_NEIGHBOURS, temp=TEMP)
        return votes_MK.double().numpy()

    return predict


def _tuned(
    fit: Callable[[float, Rows], Predict],
    loss: Callable[[Floats, Rows], float],
    train: Training,
    seed: int,
) -> Predict:
    """Fit all scans with the penalty that loses least on inner folds."""
    folds = inner_folds(train.patients, train.class_N, seed=seed)

    def total(penalty: float) -> float:
        parts = [(np.array(fold.train), np.array(fold.test)) for fold in folds]
        return sum(loss(fit(penalty, kept)(train.x_ND[out]), out) for kept, out in parts)

    penalty = min(PENALTIES, key=total) if folds else DEFAULT_PENALTY
    return fit(penalty, np.arange(len(train.x_ND)))


def _standardise(x_ND: Floats) -> Callable[[Floats], Floats]:
    """Return what maps these rows to mean 0 and deviation 1; a constant column becomes 0."""
    mean_D, std_D = x_ND.mean(0), x_ND.std(0)
    std_D = np.where(std_D > 1e-6 * np.abs(mean_D), std_D, np.inf)
    return lambda x_MD: (x_MD - mean_D) / std_D


def _linear_model() -> Any:
    try:
        from sklearn import linear_model
    except ImportError as error:
        raise InputError(
            f"this head needs scikit-learn: pip install 'tapct-fast[probe]' ({error})"
        ) from None
    return linear_model

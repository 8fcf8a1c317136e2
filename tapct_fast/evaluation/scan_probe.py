"""What frozen features know about whole scans: a head on pooled cls bags, scored on held-out scans.

Shape suffixes: S scans, N windows or training scans, M held-out scans, D width, K classes or one
column of values.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.downstream.encode import pool_bag
from tapct_fast.errors import InputError
from tapct_fast.evaluation.abmil import fit_abmil
from tapct_fast.evaluation.heads import Floats, Training, fit_knn, fit_logistic, fit_ridge
from tapct_fast.evaluation.splits import Fold, check_leakage

Task = Literal["classification", "regression"]
Pooling = Literal["mean", "mean+std", "max", "mean+std+max", "abmil"]
Head = Literal["logistic", "ridge", "knn"]
Rows = NDArray[np.intp]


class ScanPredictions(NamedTuple):
    """What heads say about scans they were not fitted on."""

    chance: tuple[float, ...]  # auroc, balanced accuracy (or r2, mae, spearman) of no features
    scans: tuple[int, ...]  # that were held out, ascending
    predictions_MK: Floats  # per held-out scan: a score per class, or one value
    classes: tuple[str, ...]  # columns of the predictions; none for regression
    attention: tuple[Floats, ...]  # per held-out scan (N,), which window decided; abmil only


class _Targets(NamedTuple):
    target_SK: Floats
    classes: tuple[str, ...]

    @property
    def class_S(self) -> Rows:
        class_S: Rows = self.target_SK.argmax(1)
        return class_S


def probe_scans_level(
    bags: Sequence[Tensor],
    targets: NDArray[Any],
    patients: Sequence[str],
    *,
    task: Task,
    pooling: Pooling,
    head: Head,
    folds: Sequence[Fold],
    seed: int,
) -> ScanPredictions:
    """Fit a head on the training scans of each fold, and return what it says about the others.

    Every choice but the weights is fixed or made inside the training scans, so that every backbone
    has the same budget. Classes weigh equally in a fit (but in kNN, where neighbours vote).

    Args:
        bags: One (N, D) float32 cls bag per scan.
        targets: One per scan: classes of any type, or finite values.
        patients: One per scan.
        task: ``classification`` or ``regression``.
        pooling: How a bag becomes one vector; ``abmil`` learns it together with its linear head.
        head: ``logistic`` classifies only, ``ridge`` and ``knn`` do both. With ``abmil`` it names
            the loss: ``logistic`` for classes, ``ridge`` for values.
        folds: From ``splits``; a scan is tested once at most.
        seed: Draws inner folds and ABMIL's weights.

    Raises:
        InputError: Arguments do not fit each other, a fold leaks or trains on one class, or an
            extra is missing.
    """
    _check(bags, targets, patients, task, pooling, head)
    check_leakage(patients, folds)
    truth = _classes(targets) if task == "classification" else _values(targets)
    vectors_SD = None
    if pooling != "abmil":
        pooled = [pool_bag(bag_ND).pooled(pooling) for bag_ND in bags]
        vectors_SD = torch.stack(pooled).double().numpy()
    predictions_SK = np.full(truth.target_SK.shape, np.nan)
    attention: dict[int, Floats] = {}
    for number, fold in enumerate(folds, start=1):
        rows, test = np.array(fold.train), np.array(fold.test)
        target_NK = truth.target_SK[rows]
        if truth.classes and (target_NK.sum(0) > 0).sum() < 2:
            raise InputError(f"fold {number} trains on one class; stratify the folds or add scans")
        weight_N, owners = _weights(target_NK), [patients[i] for i in rows]
        if vectors_SD is None:
            predict = fit_abmil([bags[i] for i in rows], target_NK, weight_N, owners, seed=seed)
            for i in fold.test:
                predictions_SK[i], attention[i] = predict(bags[i])
            continue
        train = Training(vectors_SD[rows], target_NK, weight_N, owners)
        predictions_SK[test] = _fit(head, train, seed)(vectors_SD[test])
    scans = np.array(sorted(i for fold in folds for i in fold.test))
    return ScanPredictions(
        _chance(truth, scans, folds),
        tuple(scans.tolist()),
        predictions_SK[scans],
        truth.classes,
        tuple(attention[i] for i in scans) if attention else (),
    )


def _fit(head: Head, train: Training, seed: int) -> Callable[[Floats], Floats]:
    if head == "knn":
        return fit_knn(train)
    return (fit_logistic if head == "logistic" else fit_ridge)(train, seed=seed)


def _chance(truth: _Targets, scans: Rows, folds: Sequence[Fold]) -> tuple[float, ...]:
    if truth.classes:
        return 0.5, 1 / len(set(truth.class_S[scans].tolist()))
    value_S = truth.target_SK[:, 0]
    errors = [
        np.abs(value_S[list(fold.test)] - np.median(value_S[list(fold.train)])) for fold in folds
    ]
    return 0.0, float(np.concatenate(errors).mean()), 0.0


def _weights(target_NK: Floats) -> Floats:
    """Return weights of mean 1 that give each class the same sum; all 1 for values."""
    if target_NK.shape[1] == 1:
        return np.ones(len(target_NK))
    count_K = target_NK.sum(0)
    weights: Floats = len(target_NK) / (count_K > 0).sum() / count_K[target_NK.argmax(1)]
    return weights


def _classes(targets: NDArray[Any]) -> _Targets:
    if targets.dtype.kind == "f" and not np.array_equal(targets, np.round(targets)):
        raise InputError("targets hold fractions or NaN, which are no classes; task=regression?")
    values, class_S = np.unique(targets, return_inverse=True)
    if len(values) < 2:
        raise InputError("targets hold one class; classification needs two or more")
    return _Targets(np.eye(len(values))[class_S], tuple(str(value) for value in values))


def _values(targets: NDArray[Any]) -> _Targets:
    if targets.dtype.kind not in "fiub" or not np.isfinite(targets).all():
        raise InputError("targets of a regression are finite numbers; leave out unlabelled scans")
    return _Targets(targets.astype(np.float64)[:, None], ())


def check_head(task: str, pooling: str, head: str) -> None:
    """Refuse a head that does not fit the task or the pooling.

    Raises:
        InputError: One is unknown, or they do not go together.
    """
    for name, value, known in (
        ("task", task, Task),
        ("pooling", pooling, Pooling),
        ("head", head, Head),
    ):
        if value not in get_args(known):
            raise InputError(f"{name}={value!r} is not one of {', '.join(get_args(known))}")
    if task == "regression" and head == "logistic":
        raise InputError("head 'logistic' classifies; for a regression take ridge or knn")
    if pooling == "abmil" and head != ("logistic" if task == "classification" else "ridge"):
        raise InputError(
            f"pooling 'abmil' trains a linear head of its own, not {head}; take head logistic for "
            "classification and ridge for regression"
        )


def _check(
    bags: Sequence[Tensor],
    targets: NDArray[Any],
    patients: Sequence[str],
    task: Task,
    pooling: Pooling,
    head: Head,
) -> None:
    check_head(task, pooling, head)
    if targets.ndim != 1 or not len(bags) == len(targets) == len(patients) > 0:
        raise InputError(
            f"{len(bags)} bags, targets of shape {targets.shape} and {len(patients)} patients do "
            "not fit; give one of each per scan"
        )
    width = bags[0].shape[-1]
    for number, bag_ND in enumerate(bags, start=1):
        if bag_ND.ndim != 2 or len(bag_ND) == 0 or bag_ND.shape[1] != width:
            raise InputError(
                f"bag {number} has shape {tuple(bag_ND.shape)}, not (windows, {width})"
            )
        if not bag_ND.isfinite().all():
            raise InputError(f"bag {number} holds values that are not finite; embed it again")

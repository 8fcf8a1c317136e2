"""Dice per label over scans, with an interval that says how far the scans at hand can be trusted.

Shape suffixes: S scans, K labels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_RESAMPLES = 2000
INTERVAL_PERCENT = (2.5, 97.5)


@dataclass(frozen=True, slots=True, eq=False)
class ProbeResult:
    """Dice of one probe on held-out scans; prints as a table.

    Attributes:
        name: What was probed.
        label_names: One per class; class 0 is background.
        dice_SK: Per scan and class. NaN where the true label map lacks the class: there is nothing
            to hit. What was predicted there in error stands in ``confusion_KK``.
        dice_K: Mean over the scans that have the class; NaN where none has.
        interval_K2: 95 % bootstrap over scans; NaN below two scans.
        mean_dice: Mean of ``dice_K`` over the classes above 0 that occur.
        interval: 95 % bootstrap of ``mean_dice`` over scans.
        confusion_KK: Voxels by true class (rows) and predicted class (columns), summed over scans.
    """

    name: str
    label_names: tuple[str, ...]
    dice_SK: Floats
    dice_K: Floats
    interval_K2: Floats
    mean_dice: float
    interval: tuple[float, float]
    confusion_KK: NDArray[np.int64]

    @property
    def num_scans(self) -> int:
        """Scans scored."""
        return len(self.dice_SK)

    def __str__(self) -> str:
        width = max(14, *(len(name) for name in self.label_names))
        lines = [
            f"{self.name}: {self.num_scans} scans, Dice with 95 % interval over scans",
            f"{'label':<{width}}  scans   Dice   interval",
        ]
        num_K = (~np.isnan(self.dice_SK)).sum(0)
        for k in range(1, len(self.label_names)):
            low, high = self.interval_K2[k]
            lines.append(_row(self.label_names[k], width, num_K[k], self.dice_K[k], low, high))
        lines.append(_row("mean", width, self.num_scans, self.mean_dice, *self.interval))
        return "\n".join(lines)


def _row(name: str, width: int, num: Any, dice: float, low: float, high: float) -> str:
    if np.isnan(dice):
        return f"{name:<{width}}  {num:5d}      -   -"
    spread = "-" if np.isnan(low) else f"{low:.3f}..{high:.3f}"
    return f"{name:<{width}}  {num:5d}  {dice:.3f}   {spread}"


def confusion_matrix(
    truth: NDArray[np.integer[Any]], predicted: NDArray[np.integer[Any]], num_classes: int
) -> NDArray[np.int64]:
    """Count voxels by true class (rows) and predicted class (columns)."""
    pairs = truth.astype(np.int64).ravel() * num_classes + predicted.ravel()
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def dice_of(confusion: NDArray[np.int64]) -> Floats:
    """Return dice_K, 2 |A and B| / (|A| + |B|) of truth A, prediction B; NaN where A is empty."""
    true_K, predicted_K = confusion.sum(1), confusion.sum(0)
    dice_K = 2 * confusion.diagonal() / np.maximum(true_K + predicted_K, 1)
    return np.where(true_K > 0, dice_K, np.nan)


def summarise(
    name: str, label_names: tuple[str, ...], confusions_SKK: NDArray[np.int64], *, seed: int
) -> ProbeResult:
    """Turn one confusion matrix per scan into Dice with bootstrap intervals."""
    dice_SK = np.stack([dice_of(confusion) for confusion in confusions_SKK])
    num_scans = len(dice_SK)
    pick_RS = np.random.default_rng(seed).integers(num_scans, size=(NUM_RESAMPLES, num_scans))
    draws_RK = _mean(dice_SK[pick_RS], axis=1)
    dice_K = _mean(dice_SK, axis=0)
    enough = num_scans > 1
    interval_K2 = np.array([_interval(draws, enough=enough) for draws in draws_RK.T])
    return ProbeResult(
        name=name,
        label_names=label_names,
        dice_SK=dice_SK,
        dice_K=dice_K,
        interval_K2=interval_K2,
        mean_dice=float(_mean(dice_K[1:], axis=0)),
        interval=_interval(_mean(draws_RK[:, 1:], axis=1), enough=enough),
        confusion_KK=confusions_SKK.sum(0),
    )


def _mean(values: Floats, *, axis: int) -> Floats:
    """Mean without the NaN, and NaN (without numpy's warning) where nothing is left."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis)
    count = known.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _interval(draws: Floats, *, enough: bool) -> tuple[float, float]:
    draws = draws[~np.isnan(draws)]  # a resample without any scan of the class says nothing
    if not enough or draws.size == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(draws, INTERVAL_PERCENT)
    return float(low), float(high)

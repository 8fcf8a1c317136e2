"""What a task measures, as statistics of the held-out scans, so that backbones can be paired.

A statistic takes row numbers, some of them repeated, and returns a number: of all rows it is the
score, of patients drawn with replacement its interval, and the difference of two backbones' on the
same draws is what one is better by.

Shape suffixes: S rows (held-out scans), K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tapct_fast.evaluation.retrieval import MEASURES, RetrievalScores
from tapct_fast.evaluation.scan_probe import ScanPredictions
from tapct_fast.evaluation.scores import Score, auroc, balanced_accuracy, mae, r2, score, spearman
from tapct_fast.evaluation.segmentation import TOLERANCE_MM, SegmentationScores

Statistic = Callable[[NDArray[np.intp]], float]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One backbone on the held-out scans.

    Attributes:
        cases: The case of each row.
        statistics: By name, in the order of a table.
        rows: What is written of each row.
        chance: What a head that knows nothing of the scan would reach, where that is known.
    """

    cases: tuple[int, ...]
    statistics: Mapping[str, Statistic]
    rows: Sequence[Mapping[str, Any]]
    chance: Mapping[str, float] = field(default_factory=dict)

    def scores(self, patients: Sequence[str], *, seed: int) -> tuple[Score, ...]:
        """Return every statistic with its interval over the patients of the rows."""
        return tuple(
            score(name, statistic, patients, seed=seed)
            for name, statistic in self.statistics.items()
        )

    def minus(self, rival: "Measured", patients: Sequence[str], *, seed: int) -> tuple[Score, ...]:
        """Return the difference to a rival on the same rows, paired over patients."""
        assert self.cases == rival.cases

        def difference(name: str) -> Statistic:
            mine, other = self.statistics[name], rival.statistics[name]
            return lambda rows: mine(rows) - other(rows)

        return tuple(score(name, difference(name), patients, seed=seed) for name in self.statistics)


def of_segmentation(found: SegmentationScores, label_names: Sequence[str]) -> Measured:
    """Return Dice, surface Dice and 95 % Hausdorff distance: means of all labels, then each label.

    A label's mean is over the scans that have it; the mean of all is over labels.
    """
    kinds = {
        "dice": found.dice_SK,
        f"nsd {TOLERANCE_MM:g} mm": found.nsd_SK,
        "hd95 mm": found.hd95_mm_SK,
    }
    statistics: dict[str, Statistic] = {
        kind: _mean_over_labels(values_SK[:, 1:]) for kind, values_SK in kinds.items()
    }
    for kind, values_SK in kinds.items():
        for k, name in enumerate(label_names[1:], start=1):
            statistics[f"{kind}, {name}"] = _mean_over_labels(values_SK[:, k : k + 1])
    rows = [
        {kind: [_number(v) for v in values_SK[row, 1:]] for kind, values_SK in kinds.items()}
        for row in range(len(found.cases))
    ]
    return Measured(found.cases, statistics, rows)


def of_classes(
    found: ScanPredictions, class_of: Mapping[int, int], cases: Sequence[int]
) -> Measured:
    """Return AUROC and balanced accuracy of held-out scans.

    Args:
        found: What heads predicted; its scans are places in ``cases``.
        class_of: Class number of each case.
        cases: Those that took part, ascending.
    """
    held = tuple(cases[i] for i in found.scans)
    truth_S = np.array([class_of[i] for i in held])
    predicted_SK = np.asarray(found.predictions_MK, dtype=np.float64)
    best_S = predicted_SK.argmax(1)
    statistics: dict[str, Statistic] = {
        "auroc": lambda rows: auroc(truth_S[rows], predicted_SK[rows]),
        "balanced accuracy": lambda rows: balanced_accuracy(truth_S[rows], best_S[rows]),
    }
    rows = [
        {"class": int(truth), "predicted": [_number(v) for v in row]}
        for truth, row in zip(truth_S, predicted_SK, strict=True)
    ]
    return Measured(held, statistics, rows, dict(zip(statistics, found.chance, strict=True)))


def of_values(
    found: ScanPredictions, value_of: Mapping[int, float], cases: Sequence[int]
) -> Measured:
    """Return R2, mean absolute error and rank correlation of held-out scans; see ``of_classes``."""
    held = tuple(cases[i] for i in found.scans)
    truth_S = np.array([value_of[i] for i in held])
    predicted_S = np.asarray(found.predictions_MK, dtype=np.float64)[:, 0]
    statistics: dict[str, Statistic] = {
        "r2": lambda rows: r2(truth_S[rows], predicted_S[rows]),
        "mae": lambda rows: mae(truth_S[rows], predicted_S[rows]),
        "spearman": lambda rows: spearman(truth_S[rows], predicted_S[rows]),
    }
    rows = [
        {"value": float(truth), "predicted": _number(value)}
        for truth, value in zip(truth_S, predicted_S, strict=True)
    ]
    return Measured(held, statistics, rows, dict(zip(statistics, found.chance, strict=True)))


def of_retrieval(found: RetrievalScores, cases: Sequence[int]) -> Measured:
    """Return recall and mean average precision of the scans that have something to find."""
    values_QM = np.asarray(found.values_QM, dtype=np.float64)

    def mean_of(column: int) -> Statistic:
        return lambda rows: float(values_QM[rows, column].mean())

    statistics = {name: mean_of(column) for column, name in enumerate(MEASURES)}
    rows = [dict(zip(MEASURES, map(float, row), strict=True)) for row in values_QM]
    held = tuple(cases[i] for i in found.queries)
    return Measured(held, statistics, rows, dict(zip(MEASURES, found.chance, strict=True)))


def _mean_over_labels(values_SK: Floats) -> Statistic:
    known_SK = ~np.isnan(values_SK)
    filled_SK = np.where(known_SK, values_SK, 0.0)

    def statistic(rows: NDArray[np.intp]) -> float:
        count_K = known_SK[rows].sum(0)
        present_K = count_K > 0
        if not present_K.any():
            return float("nan")
        total_K = filled_SK[rows].sum(0)
        return float((total_K[present_K] / count_K[present_K]).mean())

    return statistic


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

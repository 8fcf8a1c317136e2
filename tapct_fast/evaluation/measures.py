"""What a task measures, as statistics of the held-out scans, so that backbones can be paired.

A statistic takes row numbers, some of them repeated, and returns a number: of all rows it is the
score, of patients drawn with replacement its interval, and the difference of two backbones' on the
same draws is what one is better by.

Shape suffixes: S rows (held-out scans), K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tapct_fast.evaluation.scores import Score, score
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
    """

    cases: tuple[int, ...]
    statistics: Mapping[str, Statistic]
    rows: Sequence[Mapping[str, Any]]

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

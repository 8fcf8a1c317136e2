"""Whether the scans most similar to a scan share its class: retrieval by pooled vectors.

Shape suffixes: S scans, D width, C candidates, Q queries, M measures.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.errors import InputError

Bools = NDArray[np.bool_]

RANKS = (1, 5, 10)
MEASURES = (*(f"recall@{k}" for k in RANKS), "map")


class RetrievalScores(NamedTuple):
    """What the queries that have something to find did find."""

    chance: tuple[float, ...]  # per measure, the expectation of a random order
    queries: tuple[int, ...]  # scans of a class that another patient has too
    values_QM: NDArray[np.float64]  # whose means over queries are the scores


def retrieval(
    vectors_SD: Tensor, targets: NDArray[Any], patients: Sequence[str]
) -> RetrievalScores:
    """Rank the scans of all other patients by cosine similarity to each scan.

    Recall@k is the share of queries with a scan of their class among the first k; map is the mean
    over queries of average precision over the whole order. Nothing is fitted. A query's own patient
    is never among the candidates; equally similar candidates stand in the order given.

    Args:
        vectors_SD: One pooled vector per scan.
        targets: One class per scan, of any type.
        patients: One per scan.

    Raises:
        InputError: Arguments do not fit each other, or no class is shared by two patients.
    """
    if vectors_SD.ndim != 2 or targets.ndim != 1:
        raise InputError(
            f"retrieval: vectors of shape {tuple(vectors_SD.shape)} and targets of shape "
            f"{targets.shape}; give (scans, width) and (scans,)"
        )
    if not len(vectors_SD) == len(targets) == len(patients):
        raise InputError(
            f"retrieval: {len(vectors_SD)} vectors, {len(targets)} targets and {len(patients)} "
            "patients; give one of each per scan"
        )
    if not vectors_SD.isfinite().all():
        raise InputError("retrieval: vectors hold values that are not finite; embed again")
    _, class_S = np.unique(targets, return_inverse=True)
    _, patient_S = np.unique(np.array(patients, dtype=object), return_inverse=True)
    unit_SD = F.normalize(vectors_SD.double(), dim=1)
    queries, values, expected = [], [], []
    for query in range(len(unit_SD)):
        is_candidate_S = patient_S != patient_S[query]
        similarity_C = (unit_SD @ unit_SD[query]).numpy()[is_candidate_S]
        is_right_C = class_S[is_candidate_S] == class_S[query]
        if not is_right_C.any():
            continue
        queries.append(query)
        values.append(_measures(is_right_C[np.argsort(-similarity_C, kind="stable")]))
        expected.append(_expectation(len(is_right_C), int(is_right_C.sum())))
    if not queries:
        raise InputError("retrieval: no class is shared by scans of two patients")
    return RetrievalScores(
        tuple(np.mean(expected, axis=0).tolist()), tuple(queries), np.array(values)
    )


def _measures(is_right_C: Bools) -> list[float]:
    """Return the ``MEASURES`` of one order."""
    place = np.flatnonzero(is_right_C)
    precision = np.arange(1, len(place) + 1) / (place + 1)
    return [*(float(place[0] < k) for k in RANKS), float(precision.mean())]


def _expectation(num: int, num_right: int) -> list[float]:
    """Return what ``_measures`` is on average over all orders."""
    wrong = num - num_right
    recalls = []
    for k in RANKS:
        drawn = np.arange(min(k, num))
        recalls.append(1 - float(np.prod((wrong - drawn).clip(0) / (num - drawn))))
    # A right one at rank i follows (i - 1) * (R - 1) / (C - 1) others on average.
    rank = np.arange(1, num + 1)
    before = (rank - 1) * (num_right - 1) / max(num - 1, 1)
    return [*recalls, float(((1 + before) / rank).mean())]

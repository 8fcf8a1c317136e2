import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from tapct_fast.errors import InputError
from tapct_fast.evaluation import retrieval as module
from tapct_fast.evaluation.measures import of_retrieval
from tapct_fast.evaluation.retrieval import RetrievalScores, retrieval
from tapct_fast.evaluation.scores import Score


def toy(seed: int, *, gap: float) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    """30 patients of three classes with one to three scans each, close to their patient's own."""
    rng = np.random.default_rng(seed)
    vectors, targets, patients = [], [], []
    code = np.random.default_rng(9).normal(size=(3, 12)) * gap
    for patient in range(30):
        own = rng.normal(size=12) + code[patient % 3]
        for _ in range(1 + patient % 3):
            vectors.append(own + 0.01 * rng.normal(size=12))
            targets.append("abc"[patient % 3])
            patients.append(f"p{patient}")
    return torch.from_numpy(np.array(vectors)).float(), np.array(targets), patients


def scores_of(got: RetrievalScores, patients: list[str]) -> tuple[Score, ...]:
    measured = of_retrieval(got, range(len(patients)))
    return measured.scores([patients[i] for i in got.queries], seed=0)


def test_scores_are_those_of_a_plain_loop_and_scikit_learn() -> None:
    vectors, targets, patients = toy(0, gap=0.6)
    scores = scores_of(retrieval(vectors, targets, patients), patients)
    unit = vectors.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    hits: dict[int, list[float]] = {1: [], 5: [], 10: []}
    precisions = []
    for q in range(len(unit)):
        others = [i for i in range(len(unit)) if patients[i] != patients[q]]
        similarity = np.array([unit[i] @ unit[q] for i in others])
        right = np.array([targets[i] == targets[q] for i in others])
        order = np.argsort(-similarity)
        for k, values in hits.items():
            values.append(float(right[order[:k]].any()))
        precisions.append(average_precision_score(right, similarity))
    expected = [*(np.mean(hits[k]) for k in (1, 5, 10)), np.mean(precisions)]
    assert [s.name for s in scores] == ["recall@1", "recall@5", "recall@10", "map"]
    assert [s.value for s in scores] == pytest.approx(expected)
    assert 0.4 < scores[3].value < 0.95
    assert all(s.low <= s.value <= s.high for s in scores)


def test_scans_of_the_same_patient_are_no_candidates() -> None:
    """Noise, but for each patient's own scans, which would make every recall 1."""
    vectors, targets, patients = toy(1, gap=0.0)
    got = retrieval(vectors, targets, patients)
    scores = scores_of(got, patients)
    assert scores[0].low < got.chance[0] < scores[0].high < 0.8
    assert scores[3].low < got.chance[3] < scores[3].high


def test_classes_far_apart_are_found() -> None:
    got = retrieval(*toy(2, gap=20.0))
    assert (got.values_QM == 1).all()


def test_chance_is_the_mean_over_random_orders() -> None:
    rng = np.random.default_rng(0)
    is_right = np.arange(30) < 4
    draws = [module._measures(rng.permutation(is_right)) for _ in range(20_000)]
    # standard error of the mean below 0.004
    assert module._expectation(30, 4) == pytest.approx(np.mean(draws, axis=0), abs=0.015)
    assert module._expectation(3, 3) == [1.0] * 4


def test_a_class_of_one_patient_asks_nothing() -> None:
    vectors, targets, patients = toy(3, gap=1.0)
    alone = np.where(np.array(patients) == "p2", "z", targets)
    got = retrieval(vectors, alone, patients)
    assert set(got.queries) == {i for i, p in enumerate(patients) if p != "p2"}
    with pytest.raises(InputError, match="shared by scans of two patients"):
        retrieval(vectors, np.array(patients), patients)


def test_two_patients_have_an_interval_and_few_candidates_no_error() -> None:
    scores = scores_of(retrieval(torch.eye(2), np.array([1, 1]), ["a", "b"]), ["a", "b"])
    assert [s.value for s in scores] == [1.0] * 4
    assert not any(math.isnan(s.low) for s in scores)


def test_what_does_not_fit_is_refused() -> None:
    vectors, targets, patients = toy(0, gap=1.0)
    with pytest.raises(InputError, match="one of each"):
        retrieval(vectors, targets[1:], patients)
    with pytest.raises(InputError, match="shape"):
        retrieval(vectors[0], targets, patients)
    with pytest.raises(InputError, match="not finite"):
        retrieval(vectors * torch.inf, targets, patients)

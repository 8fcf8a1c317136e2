import itertools
import sys

import numpy as np
import pytest
import torch
from sklearn import metrics

from tapct_fast.errors import InputError
from tapct_fast.evaluation import scores
from tapct_fast.evaluation.measures import of_classes, of_values
from tapct_fast.evaluation.scan_probe import ScanPredictions, probe_scans_level
from tapct_fast.evaluation.scores import Score
from tapct_fast.evaluation.splits import Fold, patient_folds

WIDTH = 12
Bags = list[torch.Tensor]
WAYS = [
    *itertools.product(["mean", "mean+std", "max", "mean+std+max"], ["logistic"]),
    *(("mean", "ridge"), ("mean", "knn"), ("abmil", "logistic")),
]


@pytest.fixture(autouse=True)
def _fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores.bootstrap, "__kwdefaults__", {"resamples": 300})


def toy(num: int, *, classes: int, signal: float, seed: int = 0) -> tuple[Bags, np.ndarray, list]:
    """Two scans a patient of one class; windows of 3 to 6 whose mean tells the class."""
    rng = np.random.default_rng(seed)
    code = np.random.default_rng(7).normal(size=(classes, WIDTH))
    bags, targets = [], []
    for scan in range(num):
        target = scan // 2 % classes
        bag = rng.normal(size=(rng.integers(3, 7), WIDTH)) + signal * code[target]
        bags.append(torch.from_numpy(bag).float())
        targets.append(target)
    return bags, np.array(targets), [f"p{scan // 2}" for scan in range(num)]


def probe(
    bags: Bags, targets: np.ndarray, patients: list[str], **setting: object
) -> ScanPredictions:
    folds = patient_folds(patients, folds=3, seed=0)
    arguments = {"task": "classification", "pooling": "mean", "head": "logistic", "folds": folds}
    return probe_scans_level(bags, targets, patients, **{**arguments, "seed": 0, **setting})


def scores_of(got: ScanPredictions, targets: np.ndarray, patients: list[str]) -> tuple[Score, ...]:
    of = of_classes if got.classes else of_values
    measured = of(got, dict(enumerate(targets)), range(len(targets)))
    return measured.scores([patients[i] for i in got.scans], seed=0)


@pytest.mark.parametrize(("pooling", "head"), WAYS)
def test_a_planted_signal_is_found(pooling: str, head: str) -> None:
    bags, targets, patients = toy(48, classes=2, signal=3.0)
    got = probe(bags, targets, patients, pooling=pooling, head=head)
    scores = scores_of(got, targets, patients)
    assert [s.name for s in scores] == ["auroc", "balanced accuracy"]
    assert scores[0].value > 0.95
    assert scores[1].value > 0.85
    assert got.chance == (0.5, 0.5)
    assert all(s.low <= s.value <= s.high for s in scores)


@pytest.mark.parametrize(("pooling", "head"), [*WAYS[-3:], WAYS[3]])
def test_noise_is_chance(pooling: str, head: str) -> None:
    """Of three draws, since one 95 % interval in twenty misses what it is an interval of."""
    results = []
    for seed in range(3):
        bags, targets, patients = toy(60, classes=2, signal=0.0, seed=seed)
        got = probe(bags, targets, patients, pooling=pooling, head=head)
        results.append((scores_of(got, targets, patients), got.chance))
    for column in range(2):
        scores = [(score[column], chance[column]) for score, chance in results]
        assert sum(score.low < chance < score.high for score, chance in scores) >= 2
        assert abs(np.mean([score.value - chance for score, chance in scores])) < 0.12


@pytest.mark.parametrize(("pooling", "head"), [("mean", "logistic"), ("abmil", "logistic")])
def test_three_classes_are_scored_by_scikit_learns_definitions(pooling: str, head: str) -> None:
    bags, targets, patients = toy(60, classes=3, signal=0.7)
    names = np.array(["x", "y", "z"])[targets]
    got = probe(bags, names, patients, pooling=pooling, head=head)
    assert got.classes == ("x", "y", "z")
    assert got.scans == tuple(range(60))
    assert got.chance == (0.5, pytest.approx(1 / 3))
    area = metrics.roc_auc_score(targets, got.predictions_MK, multi_class="ovr")
    accuracy = metrics.balanced_accuracy_score(targets, got.predictions_MK.argmax(1))
    scores = scores_of(got, targets, patients)
    assert [s.value for s in scores] == pytest.approx([area, accuracy])


@pytest.mark.parametrize(
    ("pooling", "head"), [("mean", "ridge"), ("mean", "knn"), ("abmil", "ridge")]
)
def test_values_are_found_and_noise_is_not(pooling: str, head: str) -> None:
    rng = np.random.default_rng(0)
    patients = [str(i) for i in range(90)]
    age = rng.uniform(20, 80, size=90)
    bags = [
        torch.from_numpy(rng.normal(size=(4, 3)) * 0.1 + [year / 60, 1.0, 2 - year / 60]).float()
        for year in age
    ]
    setting = {"task": "regression", "pooling": pooling, "head": head}
    got = probe(bags, age, patients, **setting)
    r2, mae, spearman = scores = scores_of(got, age, patients)
    assert [s.name for s in scores] == ["r2", "mae", "spearman"]
    assert r2.value == pytest.approx(metrics.r2_score(age, got.predictions_MK[:, 0]))
    assert r2.value > 0.6
    assert spearman.value > 0.9
    assert mae.value < 0.6 * got.chance[1]
    medians = [np.median(age[list(f.train)]) for f in patient_folds(patients, folds=3, seed=0)]
    tests = [age[list(f.test)] for f in patient_folds(patients, folds=3, seed=0)]
    errors = [np.abs(t - m) for t, m in zip(tests, medians, strict=True)]
    assert got.chance == (0.0, pytest.approx(np.concatenate(errors).mean()), 0.0)
    shuffled = rng.permutation(age)
    noise = scores_of(probe(bags, shuffled, patients, **setting), shuffled, patients)
    assert noise[0].low < 0.1
    assert noise[2].low < 0 < noise[2].high


@pytest.mark.parametrize(("pooling", "head"), WAYS[-4:])
def test_targets_of_the_test_scans_never_change_a_fit(pooling: str, head: str) -> None:
    bags, targets, patients = toy(36, classes=2, signal=0.5)
    fold = patient_folds(patients, folds=3, seed=0, stratify=targets)[0]
    shuffled = targets.copy()
    rows = np.array(fold.test)
    shuffled[rows] = np.random.default_rng(1).permutation(targets[rows])
    assert (shuffled != targets).any()
    setting = {"pooling": pooling, "head": head, "folds": (fold,)}
    got, other = (probe(bags, t, patients, **setting) for t in (targets, shuffled))
    np.testing.assert_array_equal(got.predictions_MK, other.predictions_MK)


def test_features_of_other_test_scans_never_change_a_prediction() -> None:
    bags, targets, patients = toy(36, classes=2, signal=0.5)
    fold = patient_folds(patients, folds=3, seed=0, stratify=targets)[0]
    first, *rest = fold.test
    changed = [bag * 100 if i in rest else bag for i, bag in enumerate(bags)]
    got, other = (probe(b, targets, patients, folds=(fold,)) for b in (bags, changed))
    np.testing.assert_allclose(got.predictions_MK[0], other.predictions_MK[0], rtol=1e-12)
    assert got.scans[0] == first


def test_the_seed_decides_and_not_the_threads() -> None:
    """Those of ABMIL are tested where it is."""
    case = toy(36, classes=2, signal=0.5)
    first = probe(*case, pooling="mean+std+max")
    again = probe(*case, pooling="mean+std+max")
    np.testing.assert_array_equal(first.predictions_MK, again.predictions_MK)
    other = probe(*case, pooling="mean+std+max", seed=2)  # other inner folds, another C
    assert (first.predictions_MK != other.predictions_MK).any()
    try:
        torch.set_num_threads(2)
        two = probe(*case, pooling="mean+std+max")
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(first.predictions_MK, two.predictions_MK, atol=1e-6)


def test_attention_says_which_window_decided() -> None:
    bags, targets, patients = toy(24, classes=2, signal=1.0)
    got = probe(bags, targets, patients, pooling="abmil")
    assert len(got.attention) == 24
    for weights, scan in zip(got.attention, got.scans, strict=True):
        assert weights.shape == (len(bags[scan]),)
        assert weights.sum() == pytest.approx(1)
    assert probe(bags, targets, patients).attention == ()


def test_one_class_in_each_test_part_has_an_auroc_in_all() -> None:
    bags, targets, patients = toy(24, classes=2, signal=3.0)
    ones = [i for i in range(24) if targets[i] == 1]
    zeros = [i for i in range(24) if targets[i] == 0]
    rest = tuple(zeros[4:] + ones[4:])
    folds = (Fold(rest, tuple(zeros[:4])), Fold(rest, tuple(ones[:4])))
    got = probe(bags, targets, patients, folds=folds)
    assert scores_of(got, targets, patients)[0].value > 0.9


def test_what_does_not_fit_is_refused() -> None:
    bags, targets, patients = toy(12, classes=2, signal=1.0)
    broken = [*bags[:4], bags[4] * torch.inf, *bags[5:]]
    fold = patient_folds(patients, folds=3, seed=0)[0]
    leak = (Fold((*fold.train, fold.test[0]), fold.test[1:]),)
    one = tuple(i for i in fold.train if targets[i] == 0)
    for arguments, setting, message in (
        ((bags, targets[1:], patients), {}, "one of each"),
        ((bags, targets, patients), {"task": "ranking"}, "task='ranking'"),
        ((bags, targets, patients), {"pooling": "median"}, "pooling='median'"),
        ((bags, targets, patients), {"task": "regression"}, "take ridge or knn"),
        ((bags, targets, patients), {"pooling": "abmil", "head": "knn"}, "of its own"),
        ((broken, targets, patients), {}, "bag 5 holds"),
        (([bags[0][:, 1:], *bags[1:]], targets, patients), {}, "bag 2 has shape"),
        ((bags, targets * 0, patients), {}, "one class"),
        ((bags, targets + 0.5, patients), {}, "task=regression"),
        (
            (bags, np.where(targets, np.nan, 1.0), patients),
            {"task": "regression", "head": "ridge"},
            "finite numbers",
        ),
        ((bags, targets, patients), {"folds": leak}, "leaks"),
        ((bags, targets, patients), {"folds": (Fold(one, fold.test),)}, "fold 1 trains on one"),
    ):
        with pytest.raises(InputError, match=message):
            probe(*arguments, **setting)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"tapct-fast\[probe\]"):
        probe(*toy(12, classes=2, signal=1.0))

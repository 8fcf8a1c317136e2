"""Splits by patient: what every fold holds, and what is refused as leakage."""

from collections import Counter

import pytest

from tapct_fast.errors import InputError
from tapct_fast.evaluation.splits import (
    Fold,
    check_duplicates,
    check_leakage,
    few_shot,
    patient_folds,
)

PATIENTS = [f"p{i // 2}" for i in range(20)]  # ten patients with two scans each
CLASSES = [i // 2 % 2 for i in range(20)]


def test_folds_keep_patients_together_and_test_every_case_once() -> None:
    folds = patient_folds(PATIENTS, folds=4, seed=3)
    check_leakage(PATIENTS, folds)
    assert sorted(i for fold in folds for i in fold.test) == list(range(20))
    for fold in folds:
        assert sorted(fold.train + fold.test) == list(range(20))
        assert len({PATIENTS[i] for i in fold.test}) in (2, 3)


def test_folds_depend_on_the_seed_only() -> None:
    assert patient_folds(PATIENTS, folds=4, seed=0) == patient_folds(PATIENTS, folds=4, seed=0)
    assert patient_folds(PATIENTS, folds=4, seed=0) != patient_folds(PATIENTS, folds=4, seed=1)


def test_stratified_folds_hold_each_class_alike() -> None:
    for fold in patient_folds(PATIENTS, folds=5, seed=0, stratify=CLASSES):
        assert Counter(CLASSES[i] for i in fold.test) == {0: 2, 1: 2}


def test_few_patients_are_left_out_once_each() -> None:
    folds = patient_folds(["a", "b", "b", "c"], folds=5, seed=0)
    assert sorted(fold.test for fold in folds) == [(0,), (1, 2), (3,)]


@pytest.mark.parametrize(("patients", "folds"), [(["a", "a"], 2), (PATIENTS, 1)])
def test_too_few_patients_or_folds_are_refused(patients: list[str], folds: int) -> None:
    with pytest.raises(InputError, match="cross-validation needs 2 of each"):
        patient_folds(patients, folds=folds, seed=0)


def test_shots_are_drawn_per_class_from_different_patients() -> None:
    folds = patient_folds(PATIENTS, folds=2, seed=0, stratify=CLASSES)
    few = few_shot(PATIENTS, CLASSES, shots=2, folds=folds, seed=1)
    for fold, full in zip(few, folds, strict=True):
        assert fold.test == full.test
        assert set(fold.train) <= set(full.train)
        assert Counter(CLASSES[i] for i in fold.train) == {0: 2, 1: 2}
        assert len({PATIENTS[i] for i in fold.train}) == 4
    assert few != few_shot(PATIENTS, CLASSES, shots=2, folds=folds, seed=2)
    assert [len(f.train) for f in few_shot(PATIENTS, None, shots=3, folds=folds, seed=0)] == [3, 3]


def test_more_shots_than_scans_are_refused() -> None:
    folds = patient_folds(PATIENTS, folds=2, seed=0, stratify=CLASSES)
    with pytest.raises(InputError, match=r"fold 1 has .* training scans of class 0"):
        few_shot(PATIENTS, CLASSES, shots=7, folds=folds, seed=0)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([Fold((0, 2), (1,))], "patients of scan 2 are in its training and its test"),
        ([Fold((0, 1), (0, 2))], "patients of scan 1"),
        ([Fold((0,), (2,)), Fold((0,), (2, 3))], "fold 2 tests scan 3 a second time"),
        ([Fold((0,), (2, 2))], "tests scan 3 a second time"),
        ([Fold((0,), ())], "fold 1 has 1 training and 0 test scans"),
        ([Fold((0,), (20,))], "names case 20 of 20"),
        ([], "at least one fold"),
    ],
)
def test_leakage_is_refused(folds: list[Fold], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_leakage(PATIENTS, folds)


def test_one_volume_under_two_patients_is_refused_by_position() -> None:
    check_duplicates(["a", "a", "b"], ["x", "x", "y"])
    with pytest.raises(InputError, match=r"^scans 1, 3 hold the same voxels") as error:
        check_duplicates(["anna", "b", "carl"], ["x", "y", "x"])
    assert "anna" not in str(error.value)

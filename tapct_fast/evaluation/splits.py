"""Who trains and who is tested: splits by patient, and what must not stand on both sides.

Cases are named by their index, in messages by their position from 1; patients are never named.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tapct_fast.errors import InputError

_NAMED = 6  # positions that a message names; a thousand would hide the way out


class Fold(NamedTuple):
    """One division of the cases; a case in neither part is left out of this fold."""

    train: tuple[int, ...]
    test: tuple[int, ...]


def patient_folds(
    patients: Sequence[str], *, folds: int, seed: int, stratify: Sequence[int] | None = None
) -> tuple[Fold, ...]:
    """Divide cases for cross-validation so that a patient's cases stay together.

    Args:
        patients: One id per case.
        folds: At most; with fewer patients, each is left out once.
        seed: Draws the order in which patients are dealt.
        stratify: One class per case. Patients are dealt class by class, so that every fold gets
            its share; a patient counts as the class of most of its cases, the smallest among
            equals.

    Returns:
        Folds whose test parts are disjoint and together hold every case; sizes differ by at most
        one patient. Indices ascend.

    Raises:
        InputError: Fewer than two folds or patients, or ``stratify`` does not fit.
    """
    names = sorted(set(patients))
    if folds < 2 or len(names) < 2:
        raise InputError(
            f"{folds} folds of {len(names)} patients: cross-validation needs 2 of each; add scans "
            "of other patients"
        )
    if stratify is not None and len(stratify) != len(patients):
        raise InputError(f"stratify has {len(stratify)} classes for {len(patients)} cases")
    order = np.random.default_rng(seed).permutation(len(names))
    dealt = [names[i] for i in order]
    if stratify is not None:
        classes: dict[str, list[int]] = {name: [] for name in names}
        for patient, value in zip(patients, stratify, strict=True):
            classes[patient].append(value)
        dealt.sort(key=lambda name: _commonest(classes[name]))  # stable: the drawn order stays
    num_folds = min(folds, len(names))
    fold_of = {name: i % num_folds for i, name in enumerate(dealt)}
    return tuple(
        Fold(
            tuple(i for i, patient in enumerate(patients) if fold_of[patient] != fold),
            tuple(i for i, patient in enumerate(patients) if fold_of[patient] == fold),
        )
        for fold in range(num_folds)
    )


def _commonest(values: Sequence[int]) -> int:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def few_shot(
    patients: Sequence[str],
    targets: Sequence[int] | None,
    *,
    shots: int,
    folds: Sequence[Fold],
    seed: int,
) -> tuple[Fold, ...]:
    """Keep only a few labelled cases in the training part of each fold; the same test parts.

    Args:
        patients: One id per case. Cases of different patients are taken first.
        targets: One class per case; ``shots`` cases are kept of each class that the training part
            holds. ``None``: ``shots`` cases in all.
        shots: Labelled cases to keep.
        folds: From ``patient_folds`` or given by the data set.
        seed: Draws the cases, for each fold anew.

    Raises:
        InputError: ``shots`` is not positive, or a training part has fewer cases of a class.
    """
    if shots < 1:
        raise InputError(f"shots={shots} must be at least 1")
    kept = []
    for number, fold in enumerate(folds, start=1):
        order = np.random.default_rng([seed, number]).permutation(len(fold.train))
        train: list[int] = []
        groups: dict[int, list[int]] = {}
        for i in (fold.train[j] for j in order):
            groups.setdefault(0 if targets is None else targets[i], []).append(i)
        for value, cases in sorted(groups.items()):
            if len(cases) < shots:
                of_class = "" if targets is None else f" of class {value}"
                raise InputError(
                    f"shots={shots}: fold {number} has {len(cases)} training scans{of_class}; "
                    "take fewer shots or add scans"
                )
            train += _other_patients_first(cases, patients)[:shots]
        kept.append(Fold(tuple(sorted(train)), fold.test))
    return tuple(kept)


def _other_patients_first(cases: Sequence[int], patients: Sequence[str]) -> list[int]:
    seen: Counter[str] = Counter()
    rank = {}
    for i in cases:
        rank[i] = seen[patients[i]]
        seen[patients[i]] += 1
    return sorted(cases, key=rank.__getitem__)


def check_leakage(patients: Sequence[str], folds: Sequence[Fold]) -> None:
    """Refuse folds in which a patient is trained on and tested, or a case is tested twice.

    Raises:
        InputError: That; or a part is empty, or an index is none of the cases.
    """
    if not folds:
        raise InputError("a split needs at least one fold")
    tested: set[int] = set()
    for number, (train, test) in enumerate(folds, start=1):
        if not train or not test:
            raise InputError(
                f"fold {number} has {len(train)} training and {len(test)} test scans; give it both"
            )
        wrong = [i for i in (*train, *test) if not 0 <= i < len(patients)]
        if wrong:
            raise InputError(f"fold {number} names case {wrong[0]} of {len(patients)}")
        trained = {patients[i] for i in train}
        leaked = [i for i in test if patients[i] in trained]
        if leaked:
            raise InputError(
                f"fold {number} leaks: the patients of {_positions(leaked)} are in its training "
                "and its test part; put all scans of a patient into one part"
            )
        twice = sorted(tested.intersection(test)) + [i for i, n in Counter(test).items() if n > 1]
        if twice:
            raise InputError(
                f"fold {number} tests {_positions(twice)} a second time; test every scan once"
            )
        tested.update(test)


def check_duplicates(patients: Sequence[str], contents: Sequence[str]) -> None:
    """Refuse cases with the same voxels under two patients: a copy would be trained and tested.

    Args:
        patients: One id per case.
        contents: One hash of the voxels per case.

    Raises:
        InputError: Names the positions of the first such cases.
    """
    cases: dict[str, list[int]] = {}
    for i, content in enumerate(contents):
        cases.setdefault(content, []).append(i)
    for same in cases.values():
        if len({patients[i] for i in same}) > 1:
            raise InputError(
                f"{_positions(same)} hold the same voxels under different patients, so a split "
                "leaks; remove the copies or give them one patient"
            )


def _positions(cases: Sequence[int]) -> str:
    numbers = [str(i + 1) for i in cases]
    rest = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"scan{'s' * (len(numbers) > 1)} {', '.join(numbers[:_NAMED])}{rest}"

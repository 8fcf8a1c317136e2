"""Before anything is encoded: what can be read, what is a copy, who trains and who is tested.

Cases are named by their position in the data set throughout, whatever is left out.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from tapct_fast.errors import FormatError, InputError
from tapct_fast.evaluation.cache import CachedScan, FeatureCache, content_of
from tapct_fast.evaluation.cases import Dataset
from tapct_fast.evaluation.splits import (
    Fold,
    check_duplicates,
    check_leakage,
    few_shot,
    patient_folds,
)
from tapct_fast.io.case_id import case_id
from tapct_fast.io.quarantine import Refusal, write_quarantine
from tapct_fast.io.read import read_labels
from tapct_fast.io.volume import Volume

Task = Literal["segmentation", "classification", "regression", "retrieval"]
TASKS: tuple[Task, ...] = ("segmentation", "classification", "regression", "retrieval")


class Survey(NamedTuple):
    """The cases that take part, by position."""

    scans: dict[int, CachedScan]
    labels: dict[int, Path]  # of segmentation
    values: tuple[int, ...]  # label values in the order of classes
    label_names: tuple[str, ...]
    targets: dict[int, str]  # of the other tasks
    num_left_out: int
    data: str  # keyed hash of all that takes part

    def labels_of(self, case: int) -> Volume:
        """Read a label map as class numbers."""
        volume = read_labels(self.labels[case])
        classes_ZYX = np.searchsorted(self.values, volume.hu_ZYX).astype(np.int16)
        return Volume(classes_ZYX, volume.spacing_mm, volume.affine)


def make_survey(dataset: Dataset, task: Task, store: FeatureCache, out: Path) -> Survey:
    """Read every scan and label map once; what cannot be read is left out for everyone.

    Raises:
        InputError: The data set's split leaks, a copy stands under two patients, or a case lacks
            what the task needs.
        FormatError: Fewer than two scans can be read.
    """
    if dataset.folds is not None:
        check_leakage(dataset.patients, dataset.folds)
    key = store.key
    scans: dict[int, CachedScan] = {}
    labels: dict[int, Path] = {}
    targets: dict[int, str] = {}
    given = list((dataset.label_names or {}).values())
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise InputError(f"DATASET gives the label name {twice[0]!r} twice; tell them apart")
    values: dict[int, None] = dict.fromkeys(dataset.label_names or {0: ""})
    refused: list[Refusal] = []
    digest = hashlib.blake2b(key=key, digest_size=32)
    ids = [case_id(case.scan, key) for case in dataset.cases]
    for position, (case, name) in enumerate(zip(dataset.cases, ids, strict=True)):
        if task == "segmentation":
            if case.labels is None:
                raise InputError(f"scan {position + 1} has no label map; give one, or drop it")
            read = _label_map(case.labels, name)
            if isinstance(read, Refusal):
                refused.append(read)
                continue
            found = [int(value) for value in np.unique(read.hu_ZYX)]
            unknown = sorted(set(found) - set(values)) if dataset.label_names else []
            if unknown:
                raise InputError(
                    f"label map of scan {position + 1} has the value {unknown[0]}, which "
                    "DATASET's labels do not name"
                )
            values.update(dict.fromkeys(found))
            truth = "".join(content_of(read, key))
            labels[position] = case.labels
        elif case.target is None:
            raise InputError(f"scan {position + 1} has no target; give one, or drop it")
        else:
            truth = targets[position] = case.target
        content = store.content(case.scan, name)
        if isinstance(content, Refusal):
            refused.append(content)
            continue
        scans[position] = CachedScan(position, case.scan, name, content)
        digest.update(f"{content.grid} {truth}\n".encode())
    write_quarantine(out, ids, refused)
    if len(scans) < 2:
        reason = refused[0].reason if refused else "DATASET lists no more"
        raise FormatError("scans", f"{len(scans)} can be used, 2 are needed; {reason}")
    _refuse_copies(dataset, scans)
    order = tuple(sorted(values))
    if task == "segmentation" and len(order) < 2:
        raise InputError("the label maps hold background (0) only")
    names = dataset.label_names or {value: str(value) for value in order}
    return Survey(
        scans,
        labels,
        order,
        tuple(names[value] for value in order),
        targets,
        len(refused),
        digest.hexdigest(),
    )


def _label_map(path: Path, case: str) -> Volume | Refusal:
    try:
        labels = read_labels(path)
    except FormatError as error:
        return Refusal(case, f"label map, {error.field}", error.reason, error.code or "header")
    except InputError as error:
        return Refusal(case, "label map", str(error), "input")
    if labels.hu_ZYX.min() < 0:
        return Refusal(case, "label map", "it has a value below 0", "header")
    return labels


def _refuse_copies(dataset: Dataset, scans: dict[int, CachedScan]) -> None:
    """Refuse copies by their positions in the data set, whatever was left out between them."""
    patients = dataset.patients
    contents = [
        scans[i].content.voxels if i in scans else f"left out {i}" for i in range(len(patients))
    ]
    check_duplicates(patients, contents)


class Plan(NamedTuple):
    """Who trains, who is tested, and on what."""

    folds: tuple[Fold, ...]  # none in retrieval
    patients: tuple[str, ...]  # of every case
    classes: tuple[str, ...]  # of classification and retrieval
    targets: dict[int, float]  # class numbers, or values
    remarks: tuple[str, ...]


def make_plan(
    dataset: Dataset,
    survey: Survey,
    task: Task,
    *,
    folds: int,
    shots: int | None,
    seed: int,
) -> Plan:
    """Divide the cases that take part; indices are positions in the data set.

    Raises:
        InputError: There are too few patients, shots or classes, or a target is no number.
    """
    kept, patients = sorted(survey.scans), dataset.patients
    classes, targets = _targets(survey, task, kept)
    left_out = (
        f"{survey.num_left_out} scans could not be read and are left out for every backbone; "
        "see quarantine.jsonl."
    )
    if task == "retrieval":
        if shots is not None:
            raise InputError("retrieval fits nothing; shots is for the other tasks")
        remarks = ["Each scan is looked for among those of other patients.", *dataset.remarks]
        remarks += [left_out] * (survey.num_left_out > 0)
        return Plan((), patients, classes, targets, tuple(remarks))
    strata = [int(targets[i]) for i in kept] if classes else None
    if dataset.folds is not None:
        parts = tuple(
            Fold(*(tuple(i for i in part if i in survey.scans) for part in fold))
            for fold in dataset.folds
        )
        remark = "The split is the data set's own."
    else:
        dealt = patient_folds([patients[i] for i in kept], folds=folds, seed=seed, stratify=strata)
        parts = tuple(Fold(*(tuple(kept[i] for i in part) for part in fold)) for fold in dealt)
        remark = f"{len(parts)} folds over patients."
    remarks = [remark, *dataset.remarks]
    if shots is not None:
        all_classes = [int(targets.get(i, 0)) for i in range(len(patients))] if classes else None
        parts = few_shot(patients, all_classes, shots=shots, folds=parts, seed=seed)
        each = " of each class" if classes else ""
        remarks.append(f"Heads are fitted on {shots} scans{each}.")
    check_leakage(patients, parts)
    if survey.num_left_out:
        remarks.append(left_out)
    return Plan(parts, patients, classes, targets, tuple(remarks))


def _targets(
    survey: Survey, task: Task, kept: Sequence[int]
) -> tuple[tuple[str, ...], dict[int, float]]:
    if task == "segmentation":
        return (), {}
    if task == "regression":
        values = {}
        for i in kept:
            try:
                values[i] = float(survey.targets[i])
            except ValueError:
                values[i] = float("nan")
            if not np.isfinite(values[i]):
                raise InputError(f"the target of scan {i + 1} is not a finite number")
        return (), values
    names = {survey.targets[i] for i in kept}
    order = sorted(
        names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
    )
    if len(order) < 2:
        raise InputError(f"{task} needs two classes or more among the targets")
    return tuple(order), {i: float(order.index(survey.targets[i])) for i in kept}

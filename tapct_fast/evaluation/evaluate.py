"""The path from a data set to a table: survey, split, encode once, the same heads for everyone.

    read_dataset -> contents and label maps of every scan (survey)
                 -> folds by patient, checked for leakage
                 -> features of every scan by every encoder (cache)
                 -> one head per fold and encoder, scored on the held-out scans
                 -> scores with intervals, differences paired over patients

Shape suffixes: N vectors of a bag, D width, Z Y X voxels.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tapct_fast.downstream.encode import pool_bag
from tapct_fast.downstream.features import Features
from tapct_fast.errors import InputError, Policy
from tapct_fast.evaluation.cache import FeatureCache, Reading
from tapct_fast.evaluation.cases import Dataset, patient_id, read_dataset
from tapct_fast.evaluation.encoders import Encoder, Spec, open_encoder
from tapct_fast.evaluation.measures import (
    Measured,
    of_classes,
    of_retrieval,
    of_segmentation,
    of_values,
)
from tapct_fast.evaluation.probe_report import RESULTS_FILE, table_text, write_probe_report
from tapct_fast.evaluation.retrieval import retrieval
from tapct_fast.evaluation.scan_probe import Head, Pooling, check_head, probe_scans_level
from tapct_fast.evaluation.scores import Score
from tapct_fast.evaluation.segmentation import (
    DECODERS,
    Decoder,
    SegmentationHead,
    one_thread,
    save_head,
    score_segmentation,
)
from tapct_fast.evaluation.splits import Fold
from tapct_fast.evaluation.survey import TASKS, Plan, Survey, Task, make_plan, make_survey
from tapct_fast.io.case_id import ensure_key
from tapct_fast.report import Interval, Table

CACHE_FOLDER, HEADS_FOLDER = "cache", "heads"


class Result(NamedTuple):
    """What one encoder reached."""

    name: str
    fingerprint: str  # empty where it is not known
    width: int  # of its tokens
    scores: tuple[Score, ...]
    rows: Sequence[Any]  # of ``Evaluation.cases``


class Difference(NamedTuple):
    """The first encoder's scores minus a rival's, paired over patients."""

    rival: str
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """Scores of all encoders on the same held-out scans; prints as tables in Markdown.

    Attributes:
        task: What was asked of the features.
        settings: Everything that the scores depend on beside scans and weights.
        results: One per encoder, in the order given.
        labels: Of segmentation, in the order of the rows' values; background is not scored.
        classes: Of classification and retrieval, in the order of class numbers.
        chance: By score, what is reached without the scan, where that is known.
        differences: One per rival of the first encoder.
        cases: Per held-out scan, in the order of every result's ``rows``: its id, that of its
            patient, its fold.
        num_scans: Scored.
        num_patients: Of these.
        num_left_out: Scans that could not be read, for all encoders alike.
        num_encoded: Scans times encoders that were not in the cache.
        data: Keyed hash of all scans and label maps that took part.
        remarks: What a reader of the scores has to know.
    """

    task: Task
    settings: dict[str, Any]
    results: tuple[Result, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    chance: dict[str, float]
    differences: tuple[Difference, ...]
    cases: Sequence[dict[str, Any]]
    num_scans: int
    num_patients: int
    num_left_out: int
    num_encoded: int
    data: str
    remarks: tuple[str, ...]

    def tables(self) -> tuple[Table, ...]:
        """Return the scores of all encoders, and the differences where there are rivals."""
        names = [result.name for result in self.results]
        rows = _rows([_brief(result.scores) for result in self.results])
        if self.chance:
            rows = [[*row, self.chance.get(str(row[0]))] for row in rows]
        scores = Table(
            f"{self.task}: {self.num_scans} held-out scans of {self.num_patients} patients",
            ["score", *names, *(["chance"] if self.chance else [])],
            rows,
            " ".join(self.remarks),
        )
        if not self.differences:
            return (scores,)
        return (
            scores,
            Table(
                f"{names[0]} minus rival, paired over patients",
                ["score", *(difference.rival for difference in self.differences)],
                _rows([_brief(difference.scores) for difference in self.differences]),
                "An interval that holds 0 shows no difference.",
            ),
        )

    def rest(self) -> Table:
        """Return the scores that ``tables`` leaves out."""
        names = [result.name for result in self.results]
        left = [[s for s in r.scores if s not in _brief(r.scores)] for r in self.results]
        return Table("", ["score", *names], _rows(left))

    def __str__(self) -> str:
        return "\n\n".join(map(table_text, self.tables()))


def _brief(scores: Sequence[Score]) -> list[Score]:
    """Return what a first look needs: of single labels, Dice alone."""
    return [s for s in scores if ", " not in s.name or s.name.startswith("dice, ")]


def _rows(columns: Sequence[Sequence[Score]]) -> list[list[str | Interval | float | int | None]]:
    return [
        [line[0].name, *(Interval(score.value, score.low, score.high) for score in line)]
        for line in zip(*columns, strict=True)
    ]


def evaluate(
    dataset: Dataset | Path | str,
    encoders: Sequence[Spec],
    *,
    out: Path | str,
    task: Task | None = None,
    decoder: Decoder = "linear",
    pooling: Pooling = "mean",
    head: Head | None = None,
    folds: int = 5,
    shots: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: Path | str | None = None,
    check_hu: bool = True,
    policy: Policy = "error",
    progress: bool = False,
    notify: Callable[[str], None] | None = None,
) -> Evaluation:
    """Say what frozen features are worth on labelled scans, beside rivals on equal terms.

    Writes to ``out``: ``probe.json``, ``report.html``, ``quarantine.jsonl`` (scans that could not
    be read, left out for every encoder), ``heads/`` (of the linear decoder, fitted on all scans)
    and ``cache/``. Run again, it encodes only what is missing.

    Args:
        dataset: From ``read_dataset``, or what that takes.
        encoders: What ``open_encoder`` takes; the first is compared with each of the others.
        out: Folder, made if it is missing.
        task: By default segmentation where there are label maps, else classification.
        decoder: Of segmentation: ``linear``, or ``conv`` (two 3x3x3 convolutions).
        pooling: Of the other tasks, from the bag of a scan to its vector: ``mean``, ``mean+std``,
            ``max``, ``mean+std+max``, or ``abmil``, which learns to.
        head: Of classification ``logistic`` (default) or ``knn``; of regression ``ridge``
            (default) or ``knn``.
        folds: Of the cross-validation over patients, where the data set has no split of its own.
        shots: Train on so many scans only (of each class, in classification).
        seed: Draws folds, shots, tokens, untrained weights and the bootstrap.
        device: Where encoders run; heads are fitted on the CPU.
        cache: Folder of the features, to be shared between calls; by default in ``out``.
        check_hu: See ``read_volume``.
        policy: See ``read_volume``.
        progress: Show a progress bar on stderr.
        notify: Gets a sentence about what is computed again or left out.

    Raises:
        InputError: A setting or the data set is wrong, a patient would be trained on and tested,
            or ``out`` cannot be written.
        FormatError: Too few scans can be read.
    """
    _check_settings(task, decoder, folds, shots)
    if not isinstance(dataset, Dataset):
        dataset = read_dataset(dataset)
    opened = _open_all(encoders, device, seed)
    chosen = task or _task_of(dataset)
    head_settings = _head_settings(chosen, decoder, pooling, head)
    out = Path(out)
    home = Path(cache) if cache is not None else out / CACHE_FOLDER
    say = notify or _say_nothing
    try:
        _claim(out)
        home.mkdir(parents=True, exist_ok=True)
        store = FeatureCache(home, ensure_key(home), Reading(check_hu, policy), say)
        survey = make_survey(dataset, chosen, store, out)
        plan = make_plan(dataset, survey, chosen, folds=folds, shots=shots, seed=seed)
        settings = {
            "task": chosen,
            **head_settings,
            "folds": len(plan.folds) or None,
            "folds_by": "data set" if dataset.folds is not None else "patient",
            "shots": shots,
            "seed": seed,
        }
        with store.for_one_run():
            store.encode_missing(opened, list(survey.scans.values()), progress=progress)
            shutil.rmtree(out / HEADS_FOLDER, ignore_errors=True)  # of another run
            measured = [_measure(e, survey, plan, settings, store, out) for e in opened]
            found = _compare(opened, measured, dataset, survey, plan, settings, store)
        write_probe_report(out, found)
    except OSError as error:
        raise InputError(f"OUT or the cache cannot be written: {error.strerror}") from None
    return found


def _say_nothing(line: str) -> None:
    del line


def _check_settings(task: str | None, decoder: str, folds: int, shots: int | None) -> None:
    for name, value, known in (("task", task, TASKS), ("decoder", decoder, DECODERS)):
        if value is not None and value not in known:
            raise InputError(f"{name}={value!r} is not one of {', '.join(known)}")
    if folds < 2:
        raise InputError(f"folds={folds} must be at least 2")
    if shots is not None and shots < 1:
        raise InputError(f"shots={shots} must be at least 1")


def _open_all(specs: Sequence[Spec], device: str | torch.device, seed: int) -> list[Encoder]:
    if not specs:
        raise InputError("an evaluation needs an encoder, such as a backbone or intensity")
    opened = [open_encoder(spec, device, seed=seed) for spec in specs]
    slugs = [head_name(encoder.name) for encoder in opened]
    for number, slug in enumerate(slugs):
        if slug in slugs[:number]:
            raise InputError(
                f"two encoders are called {opened[number].name!r}; name them apart: NAME=BACKBONE"
            )
    return opened


def head_name(encoder_name: str) -> str:
    """Return the name of the file, below ``heads``, of an encoder's head, without its ending."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", encoder_name).strip("-.")


def _task_of(dataset: Dataset) -> Task:
    has_labels = any(case.labels is not None for case in dataset.cases)
    return "segmentation" if has_labels else "classification"


def _claim(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError("OUT is a file; give a folder")
    if out.is_dir():
        names = {path.name for path in out.iterdir()}
        if names and not names & {RESULTS_FILE, CACHE_FOLDER, "quarantine.jsonl"}:
            raise InputError("OUT holds other files; give a new folder, or that of this probe")
    out.mkdir(parents=True, exist_ok=True)


def _head_settings(task: Task, decoder: str, pooling: str, head: str | None) -> dict[str, str]:
    """Return what heads depend on, refused before anything is encoded if it does not fit."""
    if task in ("segmentation", "retrieval"):
        if head is not None:
            raise InputError(f"head={head!r} is for classification and regression, not for {task}")
        if task == "segmentation":
            return {"decoder": decoder}
        check_head("classification", pooling, "logistic")
        if pooling == "abmil":
            raise InputError("retrieval fits nothing; abmil is for classification and regression")
        return {"pooling": pooling}
    chosen = head or ("logistic" if task == "classification" else "ridge")
    check_head(task, pooling, chosen)
    return {"pooling": pooling, "head": chosen}


def _measure(
    encoder: Encoder,
    survey: Survey,
    plan: Plan,
    settings: dict[str, Any],
    store: FeatureCache,
    out: Path,
) -> Measured:
    def features_of(case: int) -> Features:
        return store.features(encoder, survey.scans[case])

    if settings["task"] != "segmentation":
        return _measure_scans(features_of, survey, plan, settings)
    found = score_segmentation(
        features_of,
        survey.labels_of,
        plan.folds,
        num_classes=len(survey.values),
        decoder=settings["decoder"],
        seed=settings["seed"],
    )
    if found.everything is not None:
        head = SegmentationHead(
            linear=found.everything,
            label_names=survey.label_names,
            label_values=survey.values,
            encoder=encoder.name,
            fingerprint=store.fingerprint(encoder),
        )
        (out / HEADS_FOLDER).mkdir(exist_ok=True)
        save_head(head, out / HEADS_FOLDER / f"{head_name(encoder.name)}.safetensors")
    return of_segmentation(found, survey.label_names)


def _measure_scans(
    features_of: Callable[[int], Features], survey: Survey, plan: Plan, settings: dict[str, Any]
) -> Measured:
    """Score one vector per scan; heads count the scans that take part from 0."""
    cases = sorted(survey.scans)
    place = {case: i for i, case in enumerate(cases)}
    bags = [features_of(case).cls_ND.float() for case in cases]
    patients = [plan.patients[case] for case in cases]
    task, seed = settings["task"], settings["seed"]
    with one_thread():
        if task == "retrieval":
            vectors_SD = torch.stack([pool_bag(bag).pooled(settings["pooling"]) for bag in bags])
            classes_S = np.array([int(plan.targets[case]) for case in cases])
            return of_retrieval(retrieval(vectors_SD, classes_S, patients), cases)
        is_class = task == "classification"
        targets_S = np.array([plan.targets[case] for case in cases])
        found = probe_scans_level(
            bags,
            targets_S.astype(np.int64) if is_class else targets_S,
            patients,
            task=task,
            pooling=settings["pooling"],
            head=settings["head"],
            folds=[Fold(*(tuple(place[i] for i in part) for part in f)) for f in plan.folds],
            seed=seed,
        )
    if is_class:
        return of_classes(found, {i: int(value) for i, value in plan.targets.items()}, cases)
    return of_values(found, plan.targets, cases)


def _compare(
    encoders: Sequence[Encoder],
    measured: Sequence[Measured],
    dataset: Dataset,
    survey: Survey,
    plan: Plan,
    settings: dict[str, Any],
    store: FeatureCache,
) -> Evaluation:
    cases, all_patients = measured[0].cases, dataset.patients
    patients, seed = [all_patients[i] for i in cases], settings["seed"]
    fold_of = {i: number for number, fold in enumerate(plan.folds, start=1) for i in fold.test}
    some = survey.scans[cases[0]]
    results = tuple(
        Result(
            encoder.name,
            store.fingerprint(encoder),
            store.features(encoder, some).patches_ZYXC.shape[-1],
            found.scores(patients, seed=seed),
            found.rows,
        )
        for encoder, found in zip(encoders, measured, strict=True)
    )
    return Evaluation(
        task=settings["task"],
        settings=settings,
        results=results,
        labels=survey.label_names[1:] if settings["task"] == "segmentation" else (),
        classes=plan.classes,
        chance=dict(measured[0].chance),
        differences=tuple(
            Difference(encoder.name, measured[0].minus(found, patients, seed=seed))
            for encoder, found in zip(encoders[1:], measured[1:], strict=True)
        ),
        cases=[
            {
                "case": survey.scans[i].case,
                "patient": patient_id(dataset.cases[i].patient, store.key),
                "fold": fold_of.get(i),  # of retrieval none
            }
            for i in cases
        ],
        num_scans=len(cases),
        num_patients=len(set(patients)),
        num_left_out=survey.num_left_out,
        num_encoded=store.num_encoded,
        data=survey.data,
        remarks=plan.remarks,
    )

"""What is evaluated on: an nnU-Net folder, a MONAI decathlon JSON or a CSV, as one list of cases.

Each is read strictly and within a size. Paths and patients stay inside: messages name cases by
their position from 1, columns and keys by theirs, and outputs name both by keyed hashes.
"""

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tapct_fast.errors import FormatError, InputError
from tapct_fast.evaluation.splits import Fold, check_leakage
from tapct_fast.io.atomic import parse_json, read_limited

MAX_BYTES = 1 << 26  # a list of 200,000 cases is half of this
MAX_LABEL = 2**15 - 1  # label maps are read as int16
COLUMNS = ("scan", "labels", "patient", "target", "split", "fold")
_ITEM_KEYS = ("image", "label", "patient", "target", "fold")
_PARTS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "validation"
)
_NO_PATIENTS = "No patients are given: every scan counts as a patient of its own."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One labelled scan; what could name a person is not printed."""

    scan: Path = field(repr=False)
    labels: Path | None = field(default=None, repr=False)
    patient: str = field(repr=False)
    target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """Labelled scans.

    Attributes:
        cases: In the order of the source: their position is their name in messages.
        label_names: Label value -> name, 0 being background; None where the source names none, and
            the values that the label maps hold are the labels.
        folds: The source's own split, checked for leakage; None where it has none.
        remarks: Sentences that a reader of the scores has to know.
    """

    cases: tuple[Case, ...]
    label_names: Mapping[int, str] | None = None
    folds: tuple[Fold, ...] | None = None
    remarks: tuple[str, ...] = ()

    @property
    def patients(self) -> tuple[str, ...]:
        """Return a name per case that says only who is the same, numbered as they appear."""
        number_of: dict[str, int] = {}
        for case in self.cases:
            number_of.setdefault(case.patient, len(number_of))
        return tuple(f"patient {number_of[case.patient]:08d}" for case in self.cases)


def patient_id(patient: str, key: bytes) -> str:
    """Return the id of a patient in outputs: ``patient-`` and 16 hex digits of a keyed hash."""
    return "patient-" + hashlib.blake2b(patient.encode(), key=key, digest_size=8).hexdigest()


def read_dataset(path: Path | str, *, splits: Path | str | None = None) -> Dataset:
    """Read what names scans and their labels; the scans themselves are not opened.

    Args:
        path: An nnU-Net v2 raw folder (``dataset.json``, ``imagesTr``, ``labelsTr``); a MONAI
            decathlon JSON, or the folder that holds it as ``dataset.json``; or a CSV with the
            column ``scan`` and any of ``labels``, ``patient``, ``target``, ``split``, ``fold``.
        splits: Of an nnU-Net folder: a ``splits_final.json``; by default the one in the folder.

    Raises:
        InputError: It is none of these, has several channels or regions for labels, names files
            that are missing or lie outside, or its split leaks.
        FormatError: A file is damaged or too large.
    """
    path = Path(path)
    described = path if path.is_file() else path / "dataset.json"
    if not described.is_file() or described.suffix.lower() not in (".csv", ".json"):
        raise InputError(
            "DATASET is neither a folder with dataset.json (nnU-Net, decathlon), a .json nor a "
            ".csv; see docs/probe.md"
        )
    is_csv = described.suffix.lower() == ".csv"
    data = {} if is_csv else _json(described)
    is_nnunet = "channel_names" in data
    if splits is not None and not is_nnunet:
        raise InputError("splits goes with an nnU-Net folder; elsewhere give split or fold")
    if is_nnunet:
        dataset = _nnunet(described.parent, data, splits)
    elif is_csv:
        dataset = _csv(described)
    else:
        dataset = _decathlon(described.parent, data)
    _check_files(dataset)
    if dataset.folds is not None:
        check_leakage(dataset.patients, dataset.folds)
    return dataset


def _read(path: Path, name: str) -> bytes:
    """Return a file's content; ``name`` is what messages call it."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FormatError(name, f"it is larger than {MAX_BYTES >> 20} MiB")
        return read_limited(path, name, limit=MAX_BYTES)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None


def _json(path: Path) -> dict[str, Any]:
    name = path.name if path.name == "dataset.json" else "DATASET"
    data = parse_json(_read(path, name), Path(name), name)
    if not isinstance(data, dict):
        raise FormatError(name, "it is not a JSON object")
    return data


def _check_files(dataset: Dataset) -> None:
    if not dataset.cases:
        raise InputError("DATASET holds no labelled scans")
    first: dict[str, int] = {}
    for number, case in enumerate(dataset.cases, start=1):
        for path, what in ((case.scan, "scan"), (case.labels, "label map of scan")):
            if path is not None and not path.exists():
                raise InputError(f"{what} {number} does not exist; check its path in DATASET")
        other = first.setdefault(os.path.realpath(case.scan), number)
        if other != number:
            raise InputError(f"scans {other} and {number} are one file; list it once")


def _nearest(name: str, known: Collection[str]) -> str:
    return get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]


def _nnunet(folder: Path, data: dict[str, Any], splits: Path | str | None) -> Dataset:
    channels, ending = data["channel_names"], data.get("file_ending")
    if not isinstance(channels, dict) or not isinstance(ending, str):
        raise FormatError("dataset.json", "channel_names or file_ending are not nnU-Net's")
    if not re.fullmatch(r"(\.[A-Za-z0-9]+)+", ending):
        raise FormatError("dataset.json", "file_ending is not that of a file, such as .nii.gz")
    if len(channels) != 1:
        raise InputError(
            f"the nnU-Net folder has {len(channels)} channels, and a CT backbone takes one: copy "
            "the CT channel to a folder of its own, with one entry in channel_names"
        )
    suffix = f"_0000{ending}"
    found = sorted((folder / "imagesTr").glob("*" + ending))
    scans = [p for p in found if p.name.endswith(suffix) and not p.name.startswith(".")]
    if len(scans) < sum(not p.name.startswith(".") for p in found):
        raise InputError(f"imagesTr holds files that do not end in {suffix}; move them away")
    names = [scan.name.removesuffix(suffix) for scan in scans]
    cases = tuple(
        Case(scan=scan, labels=folder / "labelsTr" / (name + ending), patient=name)
        for scan, name in zip(scans, names, strict=True)
    )
    place = Path(splits) if splits is not None else folder / "splits_final.json"
    has_folds = splits is not None or place.is_file()
    return Dataset(
        cases=cases,
        label_names=_label_names(data.get("labels")),
        folds=_nnunet_folds(place, names) if has_folds else None,
        remarks=(_NO_PATIENTS,),
    )


def _nnunet_folds(path: Path, names: Sequence[str]) -> tuple[Fold, ...]:
    where = "splits_final.json"
    data = parse_json(_read(path, where), Path(where), where)
    index = {name: i for i, name in enumerate(names)}
    folds = []
    for number, item in enumerate(data if isinstance(data, list) else [None], start=1):
        if not isinstance(item, dict) or not all(
            isinstance(item.get(part), list) for part in ("train", "val")
        ):
            raise FormatError(where, f"fold {number} has no lists train and val")
        try:
            parts = [tuple(sorted(index[name] for name in item[p])) for p in ("train", "val")]
        except (KeyError, TypeError):
            raise InputError(f"{where}: fold {number} names a case not in imagesTr") from None
        folds.append(Fold(*parts))
    return tuple(folds)


def _label_names(labels: Any) -> dict[int, str] | None:
    """Read name -> value (nnU-Net) or value -> name (decathlon)."""
    if labels is None:
        return None
    if not isinstance(labels, dict):
        raise FormatError("dataset.json", "labels is not an object")
    named: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value, list):
            raise InputError(
                "dataset.json: labels are regions, lists of values that overlap, and a scan's "
                "voxels have one class each here; give one value per label"
            )
        name, number = (value, key) if key.isdecimal() else (key, value)
        if isinstance(number, str) and number.isdecimal():
            number = int(number)
        if not (isinstance(name, str) and type(number) is int and 0 <= number <= MAX_LABEL):
            raise FormatError("dataset.json", f"labels is not names and values 0..{MAX_LABEL}")
        if name.lower() == "ignore":
            raise InputError(
                "dataset.json: the label 'ignore' marks voxels without truth, which scores would "
                "count; give label maps without it"
            )
        if number in named:
            raise FormatError("dataset.json", f"labels gives the value {number} twice")
        named[number] = name
    if 0 not in named or len(named) < 2:
        raise FormatError("dataset.json", "labels needs 0 for background, and one more")
    return dict(sorted(named.items()))


def _decathlon(folder: Path, data: dict[str, Any]) -> Dataset:
    if not isinstance(data.get("training"), list):
        raise InputError("DATASET has neither nnU-Net's channel_names nor a list 'training'")
    if isinstance(data.get("modality"), dict) and len(data["modality"]) > 1:
        raise InputError(
            f"DATASET has {len(data['modality'])} modalities, and a CT backbone takes one; write a "
            "list of the CT images alone"
        )
    rows: list[dict[str, Any]] = []
    parts: list[str] = []
    num_unlabelled = 0
    for part in ("training", "validation", "test"):
        items = data.get(part, [])
        if not isinstance(items, list):
            raise FormatError("DATASET", f"'{part}' is not a list")
        for number, item in enumerate(items, start=1):
            if isinstance(item, str) or (
                isinstance(item, dict) and not {"label", "target"} & set(item)
            ):
                num_unlabelled += 1
                continue
            rows.append(_item(item, f"'{part}' entry {number}"))
            parts.append(_PARTS[part])
    cases = []
    has_patients = any("patient" in row for row in rows)
    for number, row in enumerate(rows, start=1):
        if has_patients and not isinstance(row.get("patient"), str | int):
            raise InputError(f"scan {number} has no patient, others do; give all or none")
        label = row.get("label")
        target = row.get("target", label if isinstance(label, int | float) else None)
        cases.append(
            Case(
                scan=_inside(folder, row["image"], number),
                labels=_inside(folder, label, number) if isinstance(label, str) else None,
                patient=str(row["patient"]) if has_patients else f"scan {number}",
                target=None if target is None else str(target),
            )
        )
    remarks = [] if has_patients else [_NO_PATIENTS]
    if num_unlabelled:
        remarks.append(f"{num_unlabelled} images without a label are not used.")
    folds = _folds_of(parts, [row.get("fold") for row in rows], remarks)
    return Dataset(
        cases=tuple(cases),
        label_names=_label_names(data.get("labels")),
        folds=folds,
        remarks=tuple(remarks),
    )


def _item(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise FormatError("DATASET", f"{where} is not an object")
    for key in item:
        if key not in _ITEM_KEYS:
            raise InputError(f"{where} has an unknown key; nearest is {_nearest(key, _ITEM_KEYS)}")
    if isinstance(item.get("image"), list):
        raise InputError(f"{where} has several images, and a CT backbone takes one; name the CT")
    if not isinstance(item.get("image"), str):
        raise FormatError("DATASET", f"{where} has no image")
    return item


def _inside(folder: Path, name: str, number: int) -> Path:
    path = folder / name
    place, home = Path(os.path.realpath(path)), os.path.realpath(folder)
    if Path(name).is_absolute() or not place.is_relative_to(home):
        raise InputError(
            f"scan {number}: a path leaves the folder of the JSON; copy the files into it, or "
            "list them in a .csv"
        )
    return path


def _csv(path: Path) -> Dataset:
    data = _read(path, "DATASET")
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header, *lines = [[cell.strip() for cell in row] for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error, ValueError):
        raise FormatError("DATASET", "it is not a CSV in UTF-8 with a line of names") from None
    for column, name in enumerate(header, start=1):
        if name not in COLUMNS:
            raise InputError(
                f"column {column} of DATASET is not one of {', '.join(COLUMNS)}; nearest is "
                f"{_nearest(name, COLUMNS)}"
            )
    if "scan" not in header or len(set(header)) < len(header):
        raise InputError("DATASET needs one column 'scan', and no column twice")
    for number, line in enumerate(lines, start=1):
        if len(line) != len(header):
            raise FormatError("DATASET", f"row {number} has {len(line)} cells, not {len(header)}")
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    for name in ("scan", "patient", "split", "fold"):
        empty = [n for n, row in enumerate(rows, start=1) if row.get(name) == ""]
        if empty:
            raise InputError(f"scan {empty[0]} has an empty cell {name}; fill it, or drop the row")
    cases = tuple(
        Case(
            scan=path.parent / row["scan"],
            labels=path.parent / row["labels"] if row.get("labels") else None,
            patient=row.get("patient", f"scan {number}"),
            target=row.get("target") or None,
        )
        for number, row in enumerate(rows, start=1)
    )
    remarks = [] if "patient" in header else [_NO_PATIENTS]
    for number, row in enumerate(rows, start=1):
        if row.get("split", "train").lower() not in _PARTS:
            raise InputError(f"scan {number}: split is not one of train, validation, test")
    parts = [_PARTS[row.get("split", "train").lower()] for row in rows]
    if "split" in header and set(parts) == {"train"}:
        raise InputError("column split has training scans only; name those to test as test")
    folds = _folds_of(parts, [row.get("fold") for row in rows], remarks)
    return Dataset(cases=cases, folds=folds, remarks=tuple(remarks))


def _folds_of(
    parts: Sequence[str], numbers: Sequence[Any], remarks: list[str]
) -> tuple[Fold, ...] | None:
    """Return the folds that parts or fold numbers give, and remark on what they leave out."""
    counts = Counter(parts)
    has_parts, has_numbers = len(counts) > 1, any(n is not None for n in numbers)
    if has_parts and has_numbers:
        raise InputError("DATASET has both a split and folds; give one of them")
    if has_parts:
        test = "test" if counts["test"] else "validation"
        if test == "test" and counts["validation"]:
            remarks.append(f"{counts['validation']} validation scans are not used.")
        train = tuple(i for i, part in enumerate(parts) if part == "train")
        return (Fold(train, tuple(i for i, part in enumerate(parts) if part == test)),)
    if not has_numbers:
        return None
    texts = [str(number) for number in numbers]
    wrong = [n for n, text in enumerate(texts, start=1) if not text.isdecimal()]
    if wrong:
        raise InputError(f"scan {wrong[0]}: fold is not a whole number from 0")
    values = sorted({int(text) for text in texts})
    if len(values) < 2:
        raise InputError("all scans have one fold number; cross-validation needs two or more")
    return tuple(
        Fold(
            tuple(i for i, text in enumerate(texts) if int(text) != value),
            tuple(i for i, text in enumerate(texts) if int(text) == value),
        )
        for value in values
    )

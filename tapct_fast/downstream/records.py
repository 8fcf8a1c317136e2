"""What is known about each scan of an output folder: one small file per scan, written last.

``cases/<id>.json`` says that the scan's features are whole and of what they were made;
``refused/<id>.json`` says why there are none. Both are written atomically when the scan is done, so
that a run that was killed loses only the scans it was at. A source is told from another by its
stamp, a hash over sizes and modification times of its files; content is hashed only where that
differs. Nothing here holds a path.
"""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tapct_fast import __version__
from tapct_fast.downstream.features import FORMAT, SUFFIXES
from tapct_fast.errors import FormatError
from tapct_fast.io.atomic import read_json, remove_folder, write_json
from tapct_fast.io.quarantine import Refusal
from tapct_fast.io.source import SourceStamp

CASES, REFUSED = "cases", "refused"
FeatureFormat = Literal["safetensors", "zarr"]
# What may be otherwise the next time though the files of the scan have not changed.
PASSING = frozenset({"input", "timeout", "memory"})


class Records(NamedTuple):
    """The records of an output folder, as one set of settings makes them."""

    out: Path
    format: FeatureFormat
    check_hu: bool

    def features(self, case: str) -> Path:
        """Return where the features of a scan lie."""
        return self.out / CASES / f"{case}{SUFFIXES[self.format]}"

    def read(self, case: str) -> dict[str, Any] | None:
        """Return the record of a scan whose features are there, else None."""
        path = self.features(case)
        record = _read(path.with_suffix(".json"))
        if record is None or record.get("format") != FORMAT or "source" not in record:
            return None
        try:  # a group of Zarr is renamed into place as a whole, a file too: size is a second look
            is_whole = path.is_dir() or path.stat().st_size == record["bytes"]
        except OSError:
            return None
        return record if is_whole else None

    def source(self, digest: bytes, stamp: SourceStamp) -> dict[str, Any]:
        """Return what a record says about the files it was made of."""
        return {"sha256": digest.hex(), "bytes": stamp.num_bytes, "stamp": stamp.times}

    def touch(self, case: str, record: dict[str, Any], stamp: SourceStamp) -> None:
        """Note that the files of a scan have another time, and the same content."""
        source = record["source"] | {"stamp": stamp.times}
        write_json(self.features(case).with_suffix(".json"), record | {"source": source})

    def accept(self, case: str) -> None:
        """Forget an earlier refusal."""
        (self.out / REFUSED / f"{case}.json").unlink(missing_ok=True)

    def refuse(self, refusal: Refusal, stamp: SourceStamp | None) -> None:
        """Write why a scan has no features; ``stamp`` says of which content this is known.

        Features of an earlier content go: they are not those of the scan as it is.
        """
        features = self.features(refusal.case)
        record = features.with_suffix(".json")
        known = _read(record) or {}
        if stamp and known.get("source", {}).get("stamp") != stamp.times:
            record.unlink(missing_ok=True)
            if features.is_dir():
                remove_folder(features)
            features.unlink(missing_ok=True)
        line = {**refusal._asdict(), "stamp": stamp.times if stamp else "", "reader": self._reader}
        write_json(self.out / REFUSED / f"{refusal.case}.json", line)

    def known_refusal(self, case: str, stamp: SourceStamp) -> Refusal | None:
        """Return why a scan was refused, if its files and what reads them are the same as then."""
        line = _read(self.out / REFUSED / f"{case}.json")
        if line is None or (line.pop("stamp", ""), line.pop("reader", "")) != (
            stamp.times,
            self._reader,
        ):
            return None
        refusal = _refusal(line)
        return None if refusal is None or refusal.code in PASSING else refusal

    def refusal(self, case: str) -> Refusal | None:
        """Return why a scan has no features, None if it has."""
        line = _read(self.out / REFUSED / f"{case}.json") or {}
        return _refusal({name: line.get(name) for name in Refusal._fields})

    @property
    def _reader(self) -> str:
        return f"{__version__}, check_hu={self.check_hu}"


def refused_cases(out: Path) -> list[str]:
    """Return the ids of all refused scans, sorted."""
    with os.scandir(out / REFUSED) as entries:
        names = [entry.name for entry in entries]
    return sorted(name.removesuffix(".json") for name in names if name.startswith("case-"))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = read_json(path, "record")
    except FormatError:  # absent, or damaged: the scan is embedded again
        return None
    return record if isinstance(record, dict) else None


def _refusal(line: dict[str, Any]) -> Refusal | None:
    try:
        refusal = Refusal(**line)
    except TypeError:
        return None
    return refusal if all(isinstance(text, str) for text in refusal) else None

"""What a run folder says about its run, read while the run may still write.

A row is one line of ``metrics.jsonl`` (see ``train.log``), ``probe.jsonl`` (``monitor.probe``),
``incidents.jsonl`` (``train.incident``) or ``sessions.jsonl`` (``train.sessions``).
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.config import Config, from_json
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.atomic import read_json, sha256_file
from tapct_fast.io.quarantine import QUARANTINE_FILE
from tapct_fast.train.checkpoint import folders, step_of
from tapct_fast.train.incident import INCIDENTS
from tapct_fast.train.log import METRICS
from tapct_fast.train.sessions import SESSIONS

PROBES = "probe.jsonl"

Row = Mapping[str, Any]


class Checkpoint(NamedTuple):
    """The hashes of one checkpoint, which was read back before it took its name."""

    step: int
    teacher_sha256: str
    manifest_sha256: str  # of the file that holds the hashes of all others


class Record(NamedTuple):
    """A run so far; ``idle_seconds`` have passed since it wrote its last row."""

    config: Config
    rows: Sequence[Row]
    probes: Sequence[Row] = ()
    idle_seconds: float = 0.0
    incidents: Sequence[Row] = ()
    sessions: Sequence[Row] = ()
    checkpoints: Sequence[Checkpoint] = ()  # oldest first
    num_damaged: int = 0  # cases of the store that could not be read

    @property
    def step(self) -> int:
        """Steps done, as far as they are logged."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def is_finished(self) -> bool:
        """Whether the last step is logged."""
        return self.step >= self.config.train.num_steps

    @property
    def eta_seconds(self) -> float | None:
        """Time the remaining steps take at the latest speed; None while that is unknown."""
        rate = latest(self.rows, "samples_per_s")
        if not rate:
            return None
        return (self.config.train.num_steps - self.step) * self.config.train.batch_size / rate


def read_record(directory: Path) -> Record:
    """Read the record of the run in ``directory``.

    Raises:
        InputError: There is no run.
        ConfigError: Its config is that of another version.
    """
    try:
        config = from_json(Config, (directory / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            "DIR holds no run (no config.json); name what tapct-fast train was given as --out"
        ) from None
    except OSError as error:
        raise InputError(f"DIR cannot be read: {error.strerror}") from None
    metrics = directory / METRICS
    rows = read_rows(metrics)
    idle = time.time() - metrics.stat().st_mtime if rows else 0.0
    return record_beside(directory, config, rows)._replace(idle_seconds=max(0.0, idle))


def record_beside(directory: Path, config: Config, rows: Sequence[Row]) -> Record:
    """Return a record of rows that are at hand and of all else that the run's folder holds."""
    return Record(
        config,
        rows,
        read_probes(directory),
        incidents=read_rows(directory / INCIDENTS),
        sessions=read_rows(directory / SESSIONS),
        checkpoints=read_checkpoints(directory),
        num_damaged=_num_lines(directory / QUARANTINE_FILE),
    )


def read_checkpoints(directory: Path) -> list[Checkpoint]:
    """Read the hashes that the checkpoints of a run state, oldest first.

    One that the run removes meanwhile is passed over.
    """
    found = []
    for folder in folders(directory):
        path = folder / "manifest.json"
        try:
            files = read_json(path, "manifest")["files"]
            digest = files["teacher.safetensors"]["sha256"]
            found.append(Checkpoint(step_of(folder), str(digest), sha256_file(path)))
        except (FormatError, OSError, KeyError, TypeError):
            continue
    return found


def _num_lines(path: Path) -> int:
    try:
        return len(path.read_bytes().splitlines())
    except OSError:
        return 0


def read_probes(directory: Path) -> list[Row]:
    """Read the rows of the online probe, by step: they are written as the probes end."""
    return sorted(read_rows(directory / PROBES), key=lambda row: int(row["step"]))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file that another process appends to; none where there is no file.

    A line that is cut short, as the one being written may be, is passed over.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [row for row in map(_parse, lines) if row is not None]


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def column(rows: Sequence[Row], name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the steps and values of the rows that have a finite number called ``name``."""
    # None counts as NaN for numpy; a long run has 12,500 rows, and this is called for every curve.
    value_N = np.array([row.get(name) for row in rows], np.float64)
    step_N = np.array([row["step"] for row in rows], np.int64)
    is_number_N = np.isfinite(value_N)
    return step_N[is_number_N], value_N[is_number_N]


def latest(rows: Sequence[Row], name: str, *, num: int = 10) -> float | None:
    """Return the median of the last ``num`` values; None where there is none."""
    _, value_N = column(rows[-num:], name)
    return float(np.median(value_N)) if value_N.size else None

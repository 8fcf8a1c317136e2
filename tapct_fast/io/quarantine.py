"""Scans that could not be used: listed with field and reason, never by path."""

import contextlib
import errno
import fcntl
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tapct_fast.errors import FormatError, InputError, Policy
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.findings import code_of
from tapct_fast.io.read import read_volume
from tapct_fast.io.volume import Volume

QUARANTINE_FILE = "quarantine.jsonl"
_LOCK_FILE = ".quarantine.lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Refusal(NamedTuple):
    """One line of ``quarantine.jsonl``: which input was refused, where, and why."""

    case: str
    field: str
    reason: str
    code: str = "header"  # a reason code of io.findings


def read_or_refuse(
    scan: Path,
    case: str,
    *,
    series: str | None,
    check_hu: bool,
    policy: Policy = "error",
) -> Volume | Refusal:
    """Read one scan of many, see ``read_volume``; what is wrong with it comes back as a value."""
    try:
        return read_volume(scan, series=series, check_hu=check_hu, policy=policy)
    except FormatError as error:
        return Refusal(case, error.field, error.reason, code_of(error))
    except InputError as error:
        return Refusal(case, "input", str(error), "input")


def write_quarantine(directory: Path, tried: Iterable[str], refused: Sequence[Refusal]) -> None:
    """Replace the entries of the cases that were tried; entries of other cases stay.

    Processes that share ``directory`` take turns.
    """
    path = directory / QUARANTINE_FILE
    with _locked(directory / _LOCK_FILE):
        try:
            rows = [Refusal(**json.loads(line)) for line in path.read_text().splitlines()]
        except (FileNotFoundError, ValueError, TypeError):
            rows = []  # a damaged list is no loss: what it named is tried again with its source
        tried = set(tried)
        rows = [*(row for row in rows if row.case not in tried), *refused]
        write_atomic(path, "".join(json.dumps(row._asdict()) + "\n" for row in rows).encode())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, which the system takes back from one that dies."""
    with path.open("w") as file:  # not the folder: NFS locks only what is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some cluster file systems are mounted without locks: two processes may then lose a
            # line of each other's, which the next one to read that case writes again.
            if error.errno not in _NO_LOCKS:
                raise
        yield


def last_refusal(directory: Path) -> FormatError:
    """Return the newest entry as an error, for a run in which no input could be used."""
    line = (directory / QUARANTINE_FILE).read_text().splitlines()[-1]
    refusal = Refusal(**json.loads(line))
    return FormatError(refusal.field, f"{refusal.reason} (no input could be used)", refusal.code)

"""Check every scan of an archive on all cores: what is damaged, doubtful or could be repaired.

Layout of the output folder::

    verify.jsonl    one line per checked source, appended as it is done: a killed run goes on there
    report.json     all rows and their counts, written at the end
    .key            random key behind the case ids; ``locate`` finds a source again from its id

A source is a file, a DICOM folder or a zip archive; a folder with several CT series gives a row for
each. Nothing written here holds a path, a name or a tag of a scan.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tapct_fast.errors import FormatError, InputError, Policy, StoreError
from tapct_fast.io.atomic import write_json
from tapct_fast.io.case_id import case_id, ensure_key
from tapct_fast.io.dicom.read import list_series
from tapct_fast.io.findings import Report
from tapct_fast.io.read import check_volume, find_scans, is_series

VERIFY_FORMAT = "tapct-verify"
VERIFY_VERSION = 1


class Row(NamedTuple):
    """One scan of the archive.

    Attributes:
        case: Id that reveals nothing about the source; see ``io.case_id``.
        is_accepted: Whether ``read_volume`` with the run's policy returns it.
        code: Reason code of the first finding that the policy does not accept; empty if accepted.
        report: The findings and facts as JSON values; see ``io.findings.Report``.
        seconds: Time to read and check it.
    """

    case: str
    is_accepted: bool
    code: str
    report: dict[str, Any]
    seconds: float


class Verification(NamedTuple):
    """The outcome of one run over an archive."""

    policy: Policy
    rows: tuple[Row, ...]
    num_resumed: int  # sources that an earlier run had checked and that have not changed

    @property
    def num_refused(self) -> int:
        """Scans that the policy does not accept."""
        return sum(not row.is_accepted for row in self.rows)


def verify(
    sources: Sequence[Path],
    out: Path,
    *,
    policy: Policy = "error",
    check_hu: bool = True,
    threads: int | None = None,
    progress: bool = False,
) -> Verification:
    """Read every scan to its end and write what is wrong with it.

    Run again with the same arguments, it checks only what is new or has changed.

    Args:
        sources: Scan files, DICOM folders, zip archives, or folders searched recursively.
        out: Folder of the results; made if it is missing.
        policy: What counts as accepted; see ``io.findings``.
        check_hu: Doubt values which cannot be HU.
        threads: Scans checked at a time; by default one per core. Each holds one volume in memory.
        progress: Show a progress bar on stderr.

    Raises:
        InputError: A source does not exist or holds no scan.
        StoreError: The folder cannot be written.
    """
    scans = find_scans(sources)
    try:
        return _verify(scans, out, policy, check_hu, threads or os.cpu_count() or 1, progress)
    except OSError as error:
        raise StoreError(
            f"the results cannot be written: {error.strerror}; free space or choose another folder"
        ) from None


def _verify(
    scans: Sequence[Path],
    out: Path,
    policy: Policy,
    check_hu: bool,
    threads: int,
    progress: bool,
) -> Verification:
    out.mkdir(parents=True, exist_ok=True)
    key = ensure_key(out)
    log = out / "verify.jsonl"
    done = _read_log(log)
    rows: list[Row] = []
    num_resumed = 0
    with log.open("a") as file, ThreadPoolExecutor(threads, "verify") as pool:
        futures = [pool.submit(_check_source, s, key, policy, check_hu, done) for s in scans]
        try:
            for future in tqdm(
                as_completed(futures), "verify", len(scans), unit="scan", disable=not progress
            ):
                signature, found = future.result()
                rows += found
                if signature in done:
                    num_resumed += 1
                elif all(row.code != "input" for row in found):
                    line = {"signature": signature, "rows": [row._asdict() for row in found]}
                    # The line break in front ends a line that a kill has torn.
                    file.write("\n" + json.dumps(line))
                    file.flush()  # a killed process loses nothing that was done
        finally:
            pool.shutdown(cancel_futures=True)
    rows.sort(key=lambda row: row.case)
    verification = Verification(policy, tuple(rows), num_resumed)
    write_json(out / "report.json", to_json(verification))
    return verification


def to_json(verification: Verification) -> dict[str, Any]:
    """Return an outcome as JSON values, with its counts."""
    rows = verification.rows
    findings = Counter(f["code"] for row in rows for f in row.report["findings"])
    return {
        "format": VERIFY_FORMAT,
        "version": VERIFY_VERSION,
        "policy": verification.policy,
        "num_scans": len(rows),
        "num_accepted": len(rows) - verification.num_refused,
        "num_refused": verification.num_refused,
        "refused_by_code": dict(sorted(Counter(r.code for r in rows if r.code).items())),
        "findings_by_code": dict(sorted(findings.items())),
        "scans": [row._asdict() for row in rows],
    }


def _check_source(
    scan: Path, key: bytes, policy: Policy, check_hu: bool, done: Mapping[str, list[Row]]
) -> tuple[str, list[Row]]:
    """Return the signature of a source and the row of every CT series in it."""
    signature = ""
    try:
        signature = _signature(scan, key, policy, check_hu)
        if signature in done:
            return signature, done[signature]
        return signature, [
            _check_scan(scan, series, key, policy, check_hu) for series in _series_of(scan)
        ]
    except FormatError as error:  # not even the headers could be listed
        report = Report.of_error(error)
    except InputError as error:
        report = Report.of_error(FormatError("input", str(error), "input"))
    except OSError as error:  # gone or out of reach since the archive was listed
        report = Report.of_error(FormatError("input", f"cannot be read: {error.strerror}", "input"))
    return signature, [
        Row(case_id(scan, key), False, report.findings[0].code, report.to_json(), 0.0)
    ]


def _series_of(scan: Path) -> list[str | None]:
    """Return the keys of the CT series of a source; a lone scan needs no key."""
    if not is_series(scan):
        return [None]
    keys = [info.key for info in list_series(scan) if info.modality == "CT"]
    # No CT at all: the reader says so, naming the modalities that are there.
    return list(keys) if len(keys) > 1 else [None]


def _check_scan(scan: Path, series: str | None, key: bytes, policy: Policy, check_hu: bool) -> Row:
    began = time.perf_counter()
    report = check_volume(scan, series=series, check_hu=check_hu)
    seconds = round(time.perf_counter() - began, 4)
    refusal = report.refusal(policy)
    code = "" if refusal is None else refusal.code
    return Row(case_id(scan, key, series), refusal is None, code, report.to_json(), seconds)


def _signature(scan: Path, key: bytes, policy: Policy, check_hu: bool) -> str:
    """Return a keyed hash that changes when a file of the source or a setting does."""
    digest = hashlib.blake2b(key=key, digest_size=16)
    digest.update(f"{VERIFY_VERSION} {policy} {check_hu}\0".encode())
    digest.update(os.fsencode(os.path.realpath(scan)))
    for path in _files_of(scan):
        status = path.stat()
        digest.update(b"\0" + os.fsencode(path.name))
        digest.update(f"\0{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _files_of(scan: Path) -> Iterator[Path]:
    if scan.is_dir():
        yield from sorted(path for path in scan.iterdir() if path.is_file())
    else:
        yield scan


def _read_log(path: Path) -> dict[str, list[Row]]:
    """Return the rows of earlier runs; a line torn by a kill is checked again."""
    done: dict[str, list[Row]] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            raw = json.loads(line)
            done[raw["signature"]] = [Row(**row) for row in raw["rows"]]
        except (ValueError, TypeError, KeyError):
            continue
    return done

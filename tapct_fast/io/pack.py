"""Packing scans into the training store of ``io.store``; only what is missing or has changed."""

import contextlib
import fcntl
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tapct_fast import _native
from tapct_fast.errors import FormatError, InputError, Policy, StoreError
from tapct_fast.io.atomic import atomic_file, read_json
from tapct_fast.io.body import body_box
from tapct_fast.io.case_id import case_id, ensure_key, read_key
from tapct_fast.io.quarantine import Refusal, read_or_refuse, write_quarantine
from tapct_fast.io.read import find_scans
from tapct_fast.io.source import SourceStamp, sha256_source, stamp_source
from tapct_fast.io.store import BLOCK_ZYX
from tapct_fast.io.store_index import (
    CaseRecord,
    Codec,
    check_version,
    read_sealed,
    record_of,
    versioned,
    write_sealed,
)
from tapct_fast.io.volume import Volume

HU_RANGE = (-1024, 3071)  # 12 bits: air to dense bone; scanners pad with values below
CHUNK_ZYX = (16, 128, 128)  # voxels; what one index entry covers
CLEVEL = {"lz4hc": 5, "zstd": 3}


class PackReport(NamedTuple):
    """How many inputs of one ``pack`` call were packed, were there before, and were refused."""

    packed: int
    skipped: int
    quarantined: int


def pack(
    sources: Sequence[Path],
    directory: Path,
    *,
    codec: Codec = "lz4hc",
    series: str | None = None,
    check_hu: bool = True,
    policy: Policy = "error",
    threads: int | None = None,
    progress: bool = False,
) -> PackReport:
    """Pack scans into a store; run again, it packs only what is missing or has changed.

    An input that cannot be read goes to ``quarantine.jsonl`` with its reason and is tried again in
    the next run; the rest goes on. A source whose size or time has changed since is hashed, and
    packed again where its content differs.

    Args:
        sources: Scan files, DICOM series folders, or folders searched recursively.
        directory: The store; made if it is missing.
        codec: ``lz4hc`` decodes fastest, ``zstd`` is about 15 % smaller.
        series: See ``read_volume``; for sources that are all DICOM folders.
        check_hu: Doubt volumes whose values cannot be HU.
        policy: See ``read_volume``; what was found is kept in the case's record.
        threads: Scans packed at once, each in about one volume of memory; default: all cores.
            The store does not depend on it.
        progress: Show a progress bar on stderr.

    Raises:
        InputError: A source does not exist or holds no scan.
        StoreError: The folder cannot be written, is being written by another ``pack``, or holds a
            store of another version or codec.
    """
    if codec not in CLEVEL:
        raise InputError(f"codec={codec!r} is not one of {', '.join(CLEVEL)}")
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads} is not positive")
    scans = find_scans(sources)
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    job = _Job(directory, codec, series, check_hu, policy)
    try:
        (directory / "cases").mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            return _pack(scans, job, threads, progress)
    except OSError as error:
        raise StoreError(
            f"the store cannot be written: {error.strerror}; free space or choose another folder"
        ) from None


def locate(
    directory: Path, case: str, sources: Sequence[Path], *, series: str | None = None
) -> Path:
    """Find which of ``sources``, read with ``series``, became ``case``: ids alone do not tell.

    Raises:
        InputError: None of the sources did.
        StoreError: The store has no key.
    """
    key = read_key(directory)
    scans: list[Path] = find_scans(sources)
    for scan in scans:
        if case_id(scan, key, series) == case:
            return scan
    raise InputError(f"none of these sources is {case}; name the folders that were given to pack")


class _Job(NamedTuple):
    """What is the same for all scans of one ``pack``."""

    directory: Path
    codec: Codec
    series: str | None
    check_hu: bool
    policy: Policy


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the store's lock; the system releases it when the process ends, however it ends."""
    with (directory / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                "another pack is writing this store; wait for its end or choose another folder"
            ) from None
        yield


def _pack(scans: Sequence[Path], job: _Job, threads: int, progress: bool) -> PackReport:
    directory = job.directory
    _check_codec(directory, job.codec)
    key = ensure_key(directory)
    for left_over in (directory / "cases").glob(".*.tmp"):
        left_over.unlink()  # of a pack that was killed: the lock says that none is running
    ids = {case_id(scan, key, job.series): scan for scan in scans}
    results: list[Refusal | bool] = []
    bar = tqdm(total=len(ids), desc="pack", unit="scan", disable=not progress)
    with bar, ThreadPoolExecutor(threads, "pack") as pool:
        pending: deque[Future[Refusal | bool]] = deque()
        try:
            for case, scan in ids.items():
                pending.append(pool.submit(_pack_one, case, scan, job))
                if len(pending) > 2 * threads:  # an archive of a million scans needs no queue
                    results.append(pending.popleft().result())
                    bar.update()
            while pending:
                results.append(pending.popleft().result())
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    refused = [result for result in results if isinstance(result, Refusal)]
    write_quarantine(directory, ids, refused)
    _write_index(directory, job.codec)
    return PackReport(results.count(True), results.count(False), len(refused))


def _pack_one(case: str, scan: Path, job: _Job) -> Refusal | bool:
    """Pack one scan; return whether it had to be packed, or why it could not."""
    sidecar = _sidecar(job.directory, case)
    try:
        stamp = stamp_source(scan)
        known = _read_sidecar(sidecar) if sidecar.exists() else None
        if known and known["source_stamp"] == stamp.times:
            return False
        digest = sha256_source(scan)
    except OSError as error:
        return Refusal(case, "input", f"cannot be read: {error.strerror}", "input")
    if known and known["source_sha256"] == digest.hex():
        write_sealed(sidecar, known | {"source_stamp": stamp.times})  # touched, not changed
        return False
    volume = read_or_refuse(scan, case, series=job.series, check_hu=job.check_hu, policy=job.policy)
    if isinstance(volume, Refusal):
        # Its earlier content is no longer what the source says.
        sidecar.unlink(missing_ok=True)
        return volume
    if stamp_source(scan) != stamp:
        return Refusal(case, "file", "changed while it was read; pack again", "integrity")
    _write_case(job, case, volume, digest, stamp)
    return True


def _write_case(job: _Job, case: str, volume: Volume, digest: bytes, stamp: SourceStamp) -> None:
    hu_ZYX = volume.hu_ZYX
    hu_ZYX = np.clip(hu_ZYX, *HU_RANGE, out=hu_ZYX if hu_ZYX.flags.writeable else None)
    affine = tuple(float(a) for a in volume.affine.ravel())
    file = f"cases/{case}.b2nd"
    # Without its record a case counts as not packed: a kill between the two files is no harm.
    _sidecar(job.directory, case).unlink(missing_ok=True)
    with atomic_file(job.directory / file) as temporary:
        crc32s = _native.write_b2nd(
            os.fsencode(temporary),
            hu_ZYX,
            affine,
            volume.spacing_mm,
            HU_RANGE,
            digest,
            job.codec,
            CLEVEL[job.codec],
            CHUNK_ZYX,
            BLOCK_ZYX,
        )
    z, y, x = hu_ZYX.shape
    record = CaseRecord(
        case=case,
        file=file,
        shape_zyx=(z, y, x),
        spacing_mm=volume.spacing_mm,
        body_zyx=body_box(hu_ZYX),
        affine=affine,
        crc32s=np.array(crc32s, dtype=">u4").tobytes(),
        source_sha256=digest.hex(),
        source_bytes=stamp.num_bytes,
    )
    report = volume.report.to_json() if volume.report else None
    extra = {"source_stamp": stamp.times, "policy": job.policy, "report": report}
    write_sealed(_sidecar(job.directory, case), versioned(job.codec) | record.to_json() | extra)


def _write_index(directory: Path, codec: Codec) -> None:
    """List every packed case: those of this run and of earlier ones."""
    cases = []
    for sidecar in sorted((directory / "cases").glob("case-*.json")):
        raw = _read_sidecar(sidecar)
        if raw["codec"] != codec:
            raise StoreError(
                f"{sidecar.stem} is {raw['codec']}, not {codec}; {_repack(sidecar.stem)}"
            )
        cases.append(record_of(raw).to_json())
    write_sealed(directory / "index.json", versioned(codec) | {"cases": cases})


def _check_codec(directory: Path, codec: Codec) -> None:
    """Refuse to add to a store of another version or codec before hours of packing."""
    try:
        raw = read_json(directory / "index.json", "store index")
    except FormatError:
        return  # missing or damaged: it is rebuilt from the records of the cases
    check_version(raw)
    if raw.get("codec") != codec:
        raise StoreError(f"the store is packed as {raw.get('codec')}; use that or a new folder")


def _read_sidecar(path: Path) -> dict[str, object]:
    return read_sealed(path, f"record of {path.stem}", _repack(path.stem))


def _repack(case: str) -> str:
    return f"delete cases/{case}.json and pack again"


def _sidecar(directory: Path, case: str) -> Path:
    return directory / "cases" / f"{case}.json"

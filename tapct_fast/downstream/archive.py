"""Scans of an archive through a backbone into an output folder: what the worker of an engine does.

Each scan ends as features and their record, or as a refusal, both written before the next one is
encoded. A scan whose record fits its files is passed over, so doing the same scans again costs
little and changes nothing.
"""

import errno
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.downstream.encode import embed_volume, is_out_of_memory
from tapct_fast.downstream.features import Features, save_features
from tapct_fast.downstream.read_ahead import ReadAhead, Reading
from tapct_fast.downstream.records import FeatureFormat, Records
from tapct_fast.errors import BackboneError, FormatError, InputError
from tapct_fast.io.findings import code_of
from tapct_fast.io.quarantine import Refusal
from tapct_fast.io.read import read_volume
from tapct_fast.io.size import reading_bytes
from tapct_fast.io.source import SourceStamp, sha256_source, stamp_source
from tapct_fast.io.volume import Volume

TRIES = 3
PAUSES_S = (0.5, 2.0)  # behind the first and the second try
# A server that is busy or was started anew answers so, and better the next time.
_PASSING_ERRORS = frozenset(
    {
        *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)


class Item(NamedTuple):
    """One scan and its id."""

    case: str
    scan: Path


class Job(NamedTuple):
    """What is the same for all scans of one call."""

    out: Path
    backbone: str  # its fingerprint
    format: FeatureFormat
    overlap: float
    batch_size: int
    series: str | None
    check_hu: bool
    timeout_s: float
    readers: int
    memory_bytes: int  # for scans that are read ahead

    @property
    def records(self) -> Records:
        """The records of the output folder."""
        return Records(self.out, self.format, self.check_hu)


class Done(NamedTuple):
    """One scan is finished. Seconds are of the worker since the scan before."""

    case: str
    status: Literal["embedded", "skipped", "quarantined"]
    code: str = ""  # of the refusal
    waited_s: float = 0.0  # for data
    encoded_s: float = 0.0  # on CUDA by events, from the first kernel to the last
    written_s: float = 0.0


class _Loaded(NamedTuple):
    volume: Volume
    source: dict[str, Any]  # of the record
    stamp: SourceStamp


class _Refused(NamedTuple):
    refusal: Refusal
    stamp: SourceStamp | None  # None: not even that could be taken
    is_known: bool = False  # from an earlier run


class _Touched(NamedTuple):
    record: dict[str, Any]
    stamp: SourceStamp  # another one than the record's, of the same content


_Found = _Loaded | _Refused | _Touched | None  # None: the features are there


def embed_items(backbone: Backbone, job: Job, items: Iterable[Item]) -> Iterator[Done]:
    """Embed scans in the order in which they have been read, and yield what became of each.

    Raises:
        StoppedError: The storage does not answer.
        OSError: The output folder cannot be written.
    """

    def read(item: Item, reading: Reading) -> _Found:
        return _read_patiently(job, item, reading)

    def late(item: Item) -> _Found:
        reason = f"not read within {job.timeout_s:g} s; look at the storage, or give --timeout more"
        return _Refused(Refusal(item.case, "read", reason, "timeout"), None)

    with ReadAhead(
        items,
        read,
        late,
        threads=job.readers,
        budget_bytes=job.memory_bytes,
        timeout_s=job.timeout_s,
    ) as ahead:
        waited_s = 0.0
        for item, found in ahead:
            done = _finish(backbone, job, item.case, found)
            del found  # its memory is given back before the next one is waited for
            yield done._replace(waited_s=ahead.waited_s - waited_s)
            waited_s = ahead.waited_s


def _finish(backbone: Backbone, job: Job, case: str, found: _Found) -> Done:
    """Encode and write what was read, or write why it was not."""
    if isinstance(found, _Touched):
        job.records.touch(case, found.record, found.stamp)
    if found is None or isinstance(found, _Touched):
        job.records.accept(case)
        return Done(case, "skipped")
    if isinstance(found, _Refused):
        if not found.is_known:
            job.records.refuse(found.refusal, found.stamp)
        return Done(case, "quarantined", found.refusal.code)
    seconds = _Stopwatch(backbone.device)
    try:
        with seconds:
            features = embed_volume(
                backbone, found.volume, overlap=job.overlap, batch_size=job.batch_size
            )
        began = time.perf_counter()
        _write(job, case, features, found.source)
    except BackboneError as error:
        refusal = Refusal(case, "features", str(error), "non_finite")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        reason = "encoding it takes more memory than there is; use a machine with more"
        refusal = Refusal(case, "memory", reason, "memory")
    else:
        written_s = time.perf_counter() - began
        return Done(case, "embedded", "", 0.0, seconds.elapsed_s, written_s)
    job.records.refuse(refusal, found.stamp)
    return Done(case, "quarantined", refusal.code)


def _write(job: Job, case: str, features: Features, source: dict[str, Any]) -> None:
    known = {"backbone": job.backbone, "source": source}
    save_features(features, job.records.features(case), known=known)
    job.records.accept(case)


def _read_patiently(job: Job, item: Item, reading: Reading) -> _Found:
    """Read a scan, again where the system refused in a way that may pass."""
    for attempt in range(TRIES):
        try:
            return _read(job, item, reading)
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            if attempt + 1 == TRIES or error.errno not in _PASSING_ERRORS:
                break
            time.sleep(PAUSES_S[attempt])
        except MemoryError:
            reason = "reading it takes more memory than there is; use a machine with more"
            return _Refused(Refusal(item.case, "memory", reason, "memory"), None)
    return _Refused(Refusal(item.case, "input", reason, "input"), None)


def _read(job: Job, item: Item, reading: Reading) -> _Found:
    stamp = stamp_source(item.scan)
    record = job.records.read(item.case)
    if record is not None and record["source"]["stamp"] == stamp.times:
        return None
    refusal = job.records.known_refusal(item.case, stamp)
    if refusal is not None:
        return _Refused(refusal, stamp, is_known=True)
    reading.hold(reading_bytes(item.scan))
    digest = sha256_source(item.scan)
    if record is not None and record["source"]["sha256"] == digest.hex():
        return _Touched(record, stamp)
    try:
        volume = read_volume(item.scan, series=job.series, check_hu=job.check_hu)
    except (FormatError, InputError) as error:
        system = error.__cause__ or error.__context__  # what the reader met, if it was the system
        if isinstance(system, OSError) and system.errno in _PASSING_ERRORS:
            raise system from None
        if isinstance(error, FormatError):
            refusal = Refusal(item.case, error.field, error.reason, code_of(error))
        else:
            refusal = Refusal(item.case, "input", str(error), "input")
        return _Refused(refusal, stamp)
    if stamp_source(item.scan) != stamp:
        reason = "changed while it was read; embed again"
        return _Refused(Refusal(item.case, "file", reason, "integrity"), None)
    return _Loaded(volume, job.records.source(digest, stamp), stamp)


class _Stopwatch:
    """Measures work on a device; a context manager."""

    def __init__(self, device: torch.device) -> None:
        self._events = []
        if device.type == "cuda":
            self._events = [
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            ]
        self.elapsed_s = 0.0

    def __enter__(self) -> "_Stopwatch":
        if self._events:
            self._events[0].record()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.elapsed_s = time.perf_counter() - self._began
        if self._events:
            self._events[1].record()
            self._events[1].synchronize()
            self.elapsed_s = self._events[0].elapsed_time(self._events[1]) / 1000

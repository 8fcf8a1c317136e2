"""Decode many compressed DICOM frames, in processes of our own.

Why processes: the decoders hold the interpreter's lock, so threads gain nothing, and one that
crashes on hostile bytes would take the caller with it. Why not ``multiprocessing``: to spawn runs
the caller's main module once more, and to fork with threads running may hang.

A series below ``MIN_PARALLEL_BYTES`` is decoded in this process, unless it is JPEG lossless, whose
damage only a process of its own can tell.
"""

import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

import numpy as np

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom.codec import (
    LENIENT_SYNTAXES,
    FrameJob,
    Pixels,
    check_decoder,
    decode_frame,
)
from tapct_fast.io.dicom.errors import silence_pydicom
from tapct_fast.io.dicom.worker import read_message, write_message

# A worker starts in 0.4 s, in which one core decodes 10 MB of JPEG 2000 (25 MB/s) or 24 MB of
# JPEG-LS (60 MB/s): two workers begin to win at about twice that.
MIN_PARALLEL_BYTES = 2**25
_START_TIMEOUT_S = 60.0  # numpy and pydicom from a cold network disk
_TIMEOUT_S = 15.0  # of any frame: seconds of a loaded machine
_TIMEOUT_BYTES_PER_S = 2e6  # a tenth of the slowest rate measured (JPEG 2000, one core)
_MAX_AHEAD = 2  # frames per worker decoded before they are asked for

# The child finds the package as this process does, also where PYTHONPATH says nothing of it.
_CHILD = (
    "import sys; sys.path[:] = sys.argv[1:]; from tapct_fast.io.dicom.worker import main; main()"
)


def decode_frames(jobs: Sequence[FrameJob], *, workers: int | None = None) -> Iterator[Pixels]:
    """Decode frames in order, a few ahead of the caller.

    Args:
        jobs: All the frames of a series.
        workers: Processes; None chooses by the size and syntax of the series. 0 decodes in this
            process, where a damaged JPEG lossless stream may pass as a wrong picture.

    Yields:
        Each frame as (rows, columns) of int16 where signed, else uint16, before slope and
        intercept.

    Raises:
        InputError: pydicom or a decoder is not installed.
        FormatError: A frame is damaged, not of the size its header says, or its decoder died or
            hung; the message names its place.
    """
    with silence_pydicom():
        for syntax, place in {job.syntax: job.place for job in reversed(jobs)}.items():
            check_decoder(syntax, place)
    if workers is None:
        is_small = sum(job.num_bytes for job in jobs) < MIN_PARALLEL_BYTES
        is_lenient = any(job.syntax in LENIENT_SYNTAXES for job in jobs)
        workers = (1 if is_lenient else 0) if is_small else min(_num_cores(), len(jobs))
    if workers == 0:
        for job in jobs:
            yield decode_frame(job)
        return
    with DecoderPool(workers) as pool:
        yield from pool.decode(jobs)


class DecoderPool:
    """Worker processes that decode frames for any thread of this process; a context manager.

    Worth keeping where many small series are read, or where bytes are not trusted. Workers start
    with the first frame they get, and end when the pool is closed or this process dies.

    Args:
        workers: How many processes.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise InputError(f"workers={workers} is not positive")
        if not sys.executable:
            raise InputError("this program cannot start another Python; decode with workers=0")
        self._num_ahead = _MAX_AHEAD * workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="dicom-decoder")
        self._lock = threading.Lock()
        self._running: set[_Worker] = set()
        self._is_closed = False
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)  # started when needed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, also those that are decoding."""
        with self._lock:
            self._is_closed = True
            workers = list(self._running)
        for worker in workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)

    def decode(self, jobs: Iterable[FrameJob]) -> Iterator[Pixels]:
        """Decode frames in order; see ``decode_frames``. Few are in memory at any time."""
        pending: deque[Future[Pixels]] = deque()
        try:
            for job in jobs:
                pending.append(self._threads.submit(self._decode, job))
                if len(pending) > self._num_ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _decode(self, job: FrameJob) -> Pixels:
        stream = job.read()
        worker = self._idle.get()  # never waits: as many threads as places
        try:
            for is_last in (False, True):
                worker = worker or self._start()
                try:
                    return worker.decode(job, stream)
                except _WorkerDiedError:
                    self._discard(worker)
                    is_hung, worker = worker.is_expired, None
                # One that died between frames, or was killed from outside, is no fault of these.
                if is_hung or is_last or self._is_closed:
                    break
        finally:
            if worker and worker.is_expired:
                self._discard(worker)
                worker = None
            self._idle.put(worker)
        verb = "did not end" if is_hung else "died"
        raise FormatError(
            "PixelData", f"the decoder of {job.place} {verb}; the file is damaged", "integrity"
        )

    def _start(self) -> "_Worker":
        with self._lock:
            if self._is_closed:
                raise InputError("the pool is closed")
            worker = _Worker()
            self._running.add(worker)
        try:
            worker.await_start()
        except _WorkerDiedError:
            self._discard(worker)
            raise InputError(
                "a decoder process could not start; decode in this one with workers=0"
            ) from None
        return worker

    def _discard(self, worker: "_Worker") -> None:
        worker.end()
        with self._lock:
            self._running.discard(worker)


class _WorkerDiedError(Exception):
    """A worker ended, was ended because it took too long, or speaks no protocol."""


class _Worker:
    """One child process, used by one thread at a time."""

    def __init__(self) -> None:
        self.is_expired = False
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # decoders print what they find
            )
        except OSError as error:
            raise InputError(
                f"a decoder process could not start ({error.strerror}); decode in this one with "
                "workers=0"
            ) from None

    def await_start(self) -> None:
        """Wait until the child has imported what it needs."""
        self._talk(None, b"", 0, _START_TIMEOUT_S)

    def decode(self, job: FrameJob, stream: bytes) -> Pixels:
        """Have one frame decoded."""
        timeout_s = _TIMEOUT_S + job.num_bytes / _TIMEOUT_BYTES_PER_S
        request = {**job._asdict(), "stream": None, "timeout_s": timeout_s}
        reply, content = self._talk(request, stream, job.num_bytes, timeout_s)
        if "input" in reply:
            raise InputError(str(reply["input"]))
        if "field" in reply:
            field, reason, code = (str(reply.get(key)) for key in ("field", "reason", "code"))
            raise FormatError(field, reason, code)
        if len(content) != job.num_bytes:
            raise _WorkerDiedError
        return np.frombuffer(content, job.dtype).reshape(job.rows, job.columns)

    def _talk(
        self, request: dict[str, object] | None, stream: bytes, max_bytes: int, timeout_s: float
    ) -> tuple[dict[str, object], bytearray]:
        """Send a request, if there is one, and receive the reply, or end the child in time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(timeout_s, self._expire)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                write_message(self.process.stdin, request, stream)
            return read_message(self.process.stdout, max_bytes)
        except (OSError, EOFError, ValueError, RecursionError):
            raise _WorkerDiedError from None
        finally:
            timer.cancel()
            timer.join()  # so that ``is_expired`` is final

    def _expire(self) -> None:
        self.is_expired = True
        self.process.kill()

    def end(self) -> None:
        """Kill the child, which holds nothing worth keeping, and collect it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # unsent bytes of a dead child
                if pipe is not None:
                    pipe.close()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

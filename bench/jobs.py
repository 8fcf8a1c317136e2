"""Benches side by side: they compile at the same time, and each is timed alone.

On a GPU that is lent for minutes most of the time goes into compilers, which leave it idle. Every
bench is a process group with a file in one folder; while one of them times, it holds the lock in
that folder and the other groups are stopped.
"""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "TAPCT_BENCH_JOBS"  # names the folder
LOCK = "lock"  # holds the group that is timing
DRAIN_S = 0.4  # in which the device finishes what stopped benches have enqueued


@contextmanager
def alone() -> Iterator[None]:
    """Stop the benches beside this one, if there are any, until the block ends."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        yield
        return
    with _locked(Path(folder), os.getpgid(0)):
        others = [group for group in _groups(Path(folder)) if group != os.getpgid(0)]
        try:
            _send(signal.SIGSTOP, others)
            time.sleep(DRAIN_S if others else 0)
            yield
        finally:
            _send(signal.SIGCONT, others)


class Jobs:
    """Benches that run at once, from any thread.

    Args:
        folder: Empty; where they find each other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._live: set[subprocess.Popen[str]] = set()
        self._is_over = False

    def start(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """Start a bench whose output can be read; none begins while another is timed."""
        with _locked(self._folder, os.getpgid(0)):
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**environment, VARIABLE: str(self._folder)},
                process_group=0,
            )
            (self._folder / str(process.pid)).touch()
        self._live.add(process)
        if self._is_over:
            self.stop(process)
        return process

    def stop(self, process: subprocess.Popen[str]) -> None:
        """End a bench and what it has started; those that it had stopped go on."""
        _send(signal.SIGCONT, [process.pid])
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        _send(signal.SIGKILL, [process.pid])
        process.wait()
        (self._folder / str(process.pid)).unlink(missing_ok=True)
        if (self._folder / LOCK).read_text() == str(process.pid):
            _send(signal.SIGCONT, _groups(self._folder))
        self._live.discard(process)

    def stop_all(self) -> None:
        """End all that run, and what another thread is about to start."""
        self._is_over = True
        for process in list(self._live):
            self.stop(process)


def _groups(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def _send(number: signal.Signals, groups: Sequence[int]) -> None:
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, number)


@contextmanager
def _locked(folder: Path, holder: int) -> Iterator[None]:
    with (folder / LOCK).open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(holder))
        lock.flush()
        yield
        lock.truncate(0)

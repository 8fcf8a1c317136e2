"""The signals by which a cluster asks a run to stop: after this step, behind a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_ASKING = (signal.SIGTERM, signal.SIGUSR1)  # the end of a job; Slurm's warning before it


class StopSignals:
    """Notes SIGTERM and SIGUSR1 while it is entered; a second one acts as without it.

    Python handles signals in the main thread only: elsewhere it notes nothing.
    """

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {which: signal.signal(which, self._note) for which in _ASKING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)
        self._before = {}

"""Read scans on threads ahead of the one that uses them, within a budget of memory and of time.

Results come in the order in which they are ready, so a slow scan holds nobody up.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from tapct_fast.errors import StoppedError

MOST_READY = 64  # results that take no memory, such as scans that were there before
LAST_WAIT_S = 10.0  # for reads under way, where the work ends before them
MOST_STALLED = 16  # reads that never ended, each with its thread; more means that storage is gone

Item = TypeVar("Item")
Result = TypeVar("Result")


def stalled_text(num_reads: int, timeout_s: float) -> str:
    """Return what is told where so many reads never ended that the storage must be gone."""
    return (
        f"{num_reads} reads did not end within {timeout_s:g} s each; when the storage answers "
        "again, the same command goes on"
    )


class _GivenUp(Exception):
    """Nobody waits for this read any more."""


class Reading:
    """One read under way."""

    def __init__(self, room: "_Room") -> None:
        self._room = room
        self.began: float | None = time.monotonic()  # None while it waits for memory
        self.num_bytes = 0
        self.is_late = False

    def hold(self, num_bytes: int) -> None:
        """Wait until so many bytes of the budget are free, and take them.

        One read alone may take more than the budget: a scan larger than it is read by itself. A
        second call, by a read that begins anew, takes no more.
        """
        if self.num_bytes:
            return
        room = self._room
        with room.changed:
            self.began = None
            room.changed.wait_for(
                lambda: room.is_closed or not room.held or room.held + num_bytes <= room.budget
            )
            if room.is_closed or self.is_late:
                raise _GivenUp
            self.began = time.monotonic()
            self.num_bytes = num_bytes
            room.held += num_bytes


class _Room:
    """The memory that all reads share."""

    def __init__(self, budget_bytes: int) -> None:
        self.changed = threading.Condition()
        self.budget = budget_bytes
        self.held = 0
        self.is_closed = False

    def release(self, reading: Reading) -> None:
        self.held -= reading.num_bytes
        reading.num_bytes = 0
        self.changed.notify_all()


class ReadAhead(Generic[Item, Result]):
    """Iterate over pairs of item and what ``read`` made of it; a context manager.

    The memory of a result counts as in use until the next one is asked for.

    Args:
        items: What to read; taken one by one as threads become free.
        read: Called on a thread; calls ``hold`` before it takes memory. What it raises is raised
            where the result would have come.
        late: Makes the result of a read that did not end in time. Its thread cannot be stopped: it
            is left behind, and another one takes its place.
        threads: Reads at a time.
        budget_bytes: For results that are ready or being read.
        timeout_s: For one read, without the wait for memory.

    Raises:
        StoppedError: So many reads never ended that the storage must be gone.
    """

    def __init__(
        self,
        items: Iterable[Item],
        read: Callable[[Item, Reading], Result],
        late: Callable[[Item], Result],
        *,
        threads: int,
        budget_bytes: int,
        timeout_s: float,
    ) -> None:
        self._items, self._read, self._late = iter(items), read, late
        self._timeout_s = timeout_s
        self._room = _Room(budget_bytes)
        self._changed = self._room.changed
        self._active: dict[Reading, Item] = {}
        self._ready: deque[tuple[Reading, Item, Result | BaseException]] = deque()
        self._num_stalled = 0
        self._is_exhausted = False
        self.waited_s = 0.0  # for results, by the one that uses them
        for _ in range(threads):
            self._start()

    def __enter__(self) -> "ReadAhead[Item, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._room.is_closed = True
            self._ready.clear()
            self._changed.notify_all()
            # A process that ends while a thread is inside native code may be aborted by it.
            self._changed.wait_for(lambda: not self._active, min(LAST_WAIT_S, self._timeout_s))

    def __iter__(self) -> Iterator[tuple[Item, Result]]:
        while True:
            began = time.monotonic()
            with self._changed:
                found = self._next()
            self.waited_s += time.monotonic() - began
            if found is None:
                return
            reading, item, result = found
            if isinstance(result, BaseException):
                raise result
            yield item, result
            del found, result
            with self._changed:
                self._room.release(reading)

    def _next(self) -> tuple[Reading, Item, Result | BaseException] | None:
        self._give_up_late()
        while not self._ready:
            if self._is_exhausted and not self._active:
                return None
            self._changed.wait(min(0.5, self._timeout_s / 4))
            self._give_up_late()
        self._changed.notify_all()
        return self._ready.popleft()

    def _give_up_late(self) -> None:
        now = time.monotonic()
        for reading, item in list(self._active.items()):
            if reading.began is None or now - reading.began < self._timeout_s:
                continue
            reading.is_late = True
            del self._active[reading]
            self._room.release(reading)
            self._num_stalled += 1
            if self._num_stalled > MOST_STALLED:
                raise StoppedError(stalled_text(self._num_stalled, self._timeout_s))
            self._ready.append((reading, item, self._late(item)))
            self._start()

    def _start(self) -> None:
        # A daemon: one that is stuck in the system must not keep the process from ending.
        threading.Thread(target=self._work, name="embed-read", daemon=True).start()

    def _work(self) -> None:
        room = self._room
        while True:
            with self._changed:
                self._changed.wait_for(lambda: room.is_closed or len(self._ready) < MOST_READY)
                if room.is_closed:
                    return
                try:
                    item = next(self._items)
                except StopIteration:
                    self._is_exhausted = True
                    self._changed.notify_all()
                    return
                reading = Reading(room)
                self._active[reading] = item
            result: Result | BaseException
            try:
                result = self._read(item, reading)
            except BaseException as error:  # raised again where the result is asked for
                result = error
            with self._changed:
                if reading.is_late:
                    self._num_stalled -= 1
                    room.release(reading)
                    return
                del self._active[reading]
                self._changed.notify_all()
                if room.is_closed:
                    return
                self._ready.append((reading, item, result))
            del item, result, reading

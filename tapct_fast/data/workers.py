"""Threads that do independent work in order and give up on what hangs.

Threads, not processes: what takes time here is native code that holds no lock of Python's, and a
thread cannot be killed from outside. A read that never returns (a lost network share) is left to
itself and done again in a new thread.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch

from tapct_fast.errors import StoreReadError

_TRIES = 3
_TICK = 0.5  # seconds between looks at whether the work is still wanted
_LAST_SECONDS = 5.0  # for what is at work when all is closed

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Task(Generic[Item, Result]):
    def __init__(self, function: Callable[[Item], Result], item: Item) -> None:
        self.function, self.item = function, item
        self.future: Future[Result] = Future()
        self.started: float | None = None

    def run(self) -> None:
        self.started = time.monotonic()
        try:
            self.future.set_result(self.function(self.item))
        except BaseException as error:  # the thread that asked raises it
            self.future.set_exception(error)


class Workers:
    """A fixed number of threads, to be closed at the end.

    Args:
        num: Threads.
        timeout: Seconds after which one piece of work counts as hung.
    """

    def __init__(self, num: int, *, timeout: float) -> None:
        self._tasks: queue.SimpleQueue[_Task[Any, Any] | None] = queue.SimpleQueue()
        self._timeout = timeout
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        for _ in range(num):
            self._start_thread()

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return ``function`` of every item, in their order.

        Raises:
            StoreReadError: One piece of work hung three times, or another thread called ``close``.
        """
        tasks = [self._submit(function, item) for item in items]
        return [self._result_of(task) for task in tasks]

    def close(self) -> None:
        """End the threads; one that hangs is left behind and does not keep the process."""
        self._is_closed = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _LAST_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        self._threads.clear()

    def _start_thread(self) -> None:
        name = f"views-read-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread's own work
        while (task := self._tasks.get()) is not None and not self._is_closed:
            task.run()

    def _submit(self, function: Callable[[Item], Result], item: Item) -> _Task[Item, Result]:
        task = _Task(function, item)
        self._tasks.put(task)
        return task

    def _result_of(self, task: _Task[Item, Result]) -> Result:
        for _ in range(_TRIES):
            if self._is_done(task):
                return task.future.result()
            self._start_thread()  # in place of the one that hangs
            task = self._submit(task.function, task.item)
        raise StoreReadError(
            f"a read hung for {self._timeout:g} s, {_TRIES} times; check the disk or the network "
            "share, then give the same command again"
        )

    def _is_done(self, task: _Task[Item, Result]) -> bool:
        """Wait for a task from when a thread took it; what waits in the queue is not hung."""
        while True:
            left = self._timeout
            if task.started is not None:
                left -= time.monotonic() - task.started
            if left <= 0:
                return task.future.done()
            if self._is_closed:
                raise StoreReadError("the reads were given up")
            try:
                task.future.exception(timeout=min(left, _TICK))
            except TimeoutError:
                continue
            return True

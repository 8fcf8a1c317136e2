import threading
import time

import pytest

from tapct_fast.data.workers import Workers
from tapct_fast.errors import StoreReadError


def num_threads() -> int:
    return sum(thread.name.startswith("views-read") for thread in threading.enumerate())


def test_results_come_in_order_whatever_ends_first() -> None:
    def work(item: int) -> int:
        time.sleep(0.001 * (10 - item))
        return item * item

    workers = Workers(4, timeout=10)
    assert workers.map(work, range(10)) == [i * i for i in range(10)]
    assert workers.map(work, []) == []
    assert num_threads() == 4
    workers.close()
    assert num_threads() == 0


def test_what_waits_in_the_queue_is_not_hung() -> None:
    calls: list[int] = []

    def work(item: int) -> int:
        calls.append(item)
        time.sleep(0.2)
        return item

    workers = Workers(1, timeout=0.5)
    assert workers.map(work, range(5)) == list(range(5))  # the last waits for 0.8 s
    assert calls == list(range(5))
    workers.close()


def test_a_hang_is_noticed_and_done_again_in_a_new_thread() -> None:
    hang, first = threading.Event(), threading.Semaphore(1)

    def work(item: int) -> int:
        if item == 2 and first.acquire(blocking=False):
            hang.wait()
        return -item

    workers = Workers(1, timeout=0.3)
    start = time.monotonic()
    assert workers.map(work, range(4)) == [0, -1, -2, -3]
    assert time.monotonic() - start < 3
    assert workers.map(work, [7]) == [-7]
    hang.set()
    workers.close()
    assert num_threads() == 0


def test_what_hangs_at_every_try_is_an_error_with_the_way_out() -> None:
    hang = threading.Event()
    workers = Workers(2, timeout=0.1)
    try:
        with pytest.raises(StoreReadError, match=r"hung for 0.1 s, 3 times; check the disk"):
            workers.map(lambda _: hang.wait(), [0])
    finally:
        hang.set()
        workers.close()
    assert num_threads() == 0


def test_an_exception_reaches_who_asked_and_the_thread_lives_on() -> None:
    workers = Workers(1, timeout=10)
    with pytest.raises(ZeroDivisionError):
        workers.map(lambda item: 1 // item, [1, 0])
    assert workers.map(lambda item: 1 // item, [1]) == [1]
    workers.close()

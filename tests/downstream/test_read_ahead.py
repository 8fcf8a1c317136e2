"""Back-pressure: what is read ahead stays within its budget, and nobody waits for the slowest."""

import threading
import time
from collections.abc import Callable

import pytest

from tapct_fast.downstream import read_ahead
from tapct_fast.downstream.read_ahead import ReadAhead, Reading
from tapct_fast.errors import StoppedError


def ahead_of(
    items: list[int],
    read: Callable[[int, Reading], int],
    *,
    threads: int = 3,
    budget_bytes: int = 100,
    timeout_s: float = 60.0,
) -> ReadAhead[int, int]:
    return ReadAhead(
        items,
        read,
        lambda item: -item,
        threads=threads,
        budget_bytes=budget_bytes,
        timeout_s=timeout_s,
    )


def test_no_more_is_held_than_the_budget_and_everything_arrives_once() -> None:
    lock, held, most = threading.Lock(), 0, 0

    def read(item: int, reading: Reading) -> int:
        nonlocal held, most
        reading.hold(30)
        with lock:
            held += 30
            most = max(most, held)
        return item

    got = []
    with ahead_of(list(range(1, 41)), read) as ahead:
        for item, result in ahead:
            assert item == result
            time.sleep(0.001)  # the encoder is slower than the readers
            got.append(item)
            with lock:
                held -= 30
    assert sorted(got) == list(range(1, 41))
    assert most == 90  # three fit, four do not


def test_a_scan_larger_than_the_budget_is_read_by_itself() -> None:
    sizes = {1: 10, 2: 500, 3: 10}
    lock, held, most = threading.Lock(), 0, 0

    def read(item: int, reading: Reading) -> int:
        nonlocal held, most
        reading.hold(sizes[item])
        with lock:
            held += sizes[item]
            most = max(most, held)
        return item

    got = []
    with ahead_of([1, 2, 3], read, threads=3) as ahead:
        for item, _ in ahead:
            got.append(item)
            with lock:
                held -= sizes[item]
    assert sorted(got) == [1, 2, 3]
    assert most == 500


def test_results_come_as_they_are_ready() -> None:
    others = threading.Event()

    def read(item: int, reading: Reading) -> int:
        del reading
        if item == 1:
            assert others.wait(30)
        return item

    got = []
    with ahead_of([1, 2, 3, 4], read, threads=2) as ahead:
        for item, _ in ahead:
            got.append(item)
            if len(got) == 3:
                others.set()
    assert got == [2, 3, 4, 1]


def test_a_late_read_is_replaced_and_time_for_memory_does_not_count() -> None:
    stuck = threading.Event()

    def read(item: int, reading: Reading) -> int:
        reading.hold(60)  # one at a time: the others wait longer than the timeout
        if item == 2:
            stuck.wait(30)
        return item

    got = {}
    with ahead_of([1, 2, 3, 4], read, timeout_s=0.2) as ahead:
        for item, result in ahead:
            got[item] = result
            time.sleep(0.15)
    stuck.set()
    assert got == {1: 1, 2: -2, 3: 3, 4: 4}


def test_storage_that_is_gone_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MOST_STALLED", 3)
    never = threading.Event()

    def read(item: int, reading: Reading) -> int:
        del reading
        never.wait(30)
        return item

    stops = pytest.raises(StoppedError, match="4 reads did not end within")
    with ahead_of(list(range(1, 20)), read, timeout_s=0.05) as ahead, stops:
        list(ahead)
    never.set()


def test_an_error_of_the_reader_is_raised_where_it_is_used() -> None:
    def read(item: int, reading: Reading) -> int:
        del reading
        raise ZeroDivisionError(item)

    with ahead_of([1], read) as ahead, pytest.raises(ZeroDivisionError):
        next(iter(ahead))


def test_leaving_early_ends_the_threads() -> None:
    under_way = []

    def read(item: int, reading: Reading) -> int:
        reading.hold(30)
        if item > 1:
            under_way.append(item)
            time.sleep(0.2)
            under_way.pop()
        return item

    before = set(threading.enumerate())
    with ahead_of(list(range(1, 100)), read) as ahead:
        rows = iter(ahead)
        next(rows)
        rows.close()
        time.sleep(0.05)
        assert under_way
    assert under_way == []  # it was waited for
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before

"""Each variant of each case as one benchmark; the variants of a case form a group."""

import gc
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.catalogue import chosen
from bench.harness import Case, OpBench, Work, floor_ms, relative_errors, this_device


class Prepared:
    """The operands of the last case that was asked for: memory holds one case at a time."""

    def __init__(self) -> None:
        self._of: tuple[str, str] | None = None
        self._work: Work | None = None
        self._errors: dict[str, float] = {}

    def verified(self, op: str, case: Case) -> tuple[Work, dict[str, float]]:
        """Return a case whose results have been compared with float64, and their errors."""
        if self._of != (op, case.name) or self._work is None:
            self._of = self._work = None
            gc.collect()
            torch._dynamo.reset()
            work = case.make()
            calls = {**work.variants, **work.checks}
            self._errors = relative_errors(calls, work.expected, tolerance=work.tolerance)
            self._of, self._work = (op, case.name), work
        return self._work, self._errors


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    """Share operands between the variants of a case."""
    return Prepared()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Ask each op's bench for its cases, and each case for its variants."""
    device, is_tiny = this_device(), not metafunc.config.getoption("--full")
    found = []
    for subject in chosen(metafunc.config.getoption("--op")):
        main = importlib.import_module(f"bench.{subject.name}").main if subject.is_op else None
        if not isinstance(main, OpBench):
            continue
        for case in main.cases(device, is_tiny):
            # Only its variants are read here; the operands are freed before the next case.
            for variant in case.make().variants:
                name = f"{subject.name}, {case.name}, {variant}"
                found.append(pytest.param(subject.name, case, variant, id=name))
    metafunc.parametrize(("op", "case", "variant"), found)


def test_time(op: str, case: Case, variant: str, prepared: Prepared, benchmark: Any) -> None:
    """Time one variant, after all of its case were verified."""
    work, errors = prepared.verified(op, case)
    device = this_device()
    benchmark.group = f"{op}, {case.name}"
    benchmark.extra_info.update(
        {
            "device": device,
            "dtype": str(work.dtype).removeprefix("torch."),
            "bytes": work.bytes,
            "flops": work.flops,
            "floor_ms": floor_ms(device, work),
            "relative_error": errors[variant],
        }
    )
    call = work.variants[variant]
    if device == "cuda":
        call = _synchronized(call)
    benchmark(call)


def _synchronized(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run

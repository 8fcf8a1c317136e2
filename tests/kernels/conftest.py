"""What every kernel is held to, on a GPU and in the interpreter."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tapct_kernels import tuning

Call = Callable[[list[Any]], Sequence[Tensor]]


def largest(t: Tensor) -> float:
    """Return the largest magnitude; an op leaves empty what it was not asked for."""
    return float(t.abs().max()) if t.numel() else 0.0


@pytest.fixture
def hold_to_eager() -> Callable[..., None]:
    """Return a check of kernels against the eager definition, both measured from float64.

    ``draw(seed)`` makes the operands; ``kernels``, ``eager`` and ``exact`` return the same tensors.
    Over 20 draws no output of any configuration may be further from float64 than twice eager's, and
    the first draw's are bit-equal 100 times. ``TAPCT_DRAWS=1`` makes that 1 and 5, for a sanitizer.
    """
    num_draws = int(os.environ.get("TAPCT_DRAWS", "20"))

    def check(draw: Callable[[int], list[Any]], kernels: Call, eager: Call, exact: Call) -> None:
        for seed in range(num_draws):
            inputs = draw(seed)
            wanted = exact(inputs)
            allowed = [
                2 * largest(found.double() - want) + 1e-7 * largest(want)
                for found, want in zip(eager(inputs), wanted, strict=True)
            ]
            for kernel, config, outputs in tuning.each_config(lambda i=inputs: kernels(i)):
                for found, want, limit in zip(outputs, wanted, allowed, strict=True):
                    error = largest(found.double() - want)
                    assert error <= limit, (seed, kernel, config, error, limit)  # NaN fails
        inputs = draw(0)
        first = kernels(inputs)
        for _ in range(5 * num_draws):
            assert all(map(torch.equal, kernels(inputs), first))

    return check

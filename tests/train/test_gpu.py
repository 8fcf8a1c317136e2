"""Training on a CUDA device: the compiled step against the eager one, refusals, and a resume."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from training_case import (
    VALUES,
    do_step,
    fail_at,
    hashes,
    losses_of_steps,
    moved,
    random_batches,
    rows,
    run_of,
    snapshot,
)

from tapct_fast.config import Config
from tapct_fast.errors import StoreError
from tapct_fast.train.loop import train

pytestmark = pytest.mark.gpu


losses_on_cuda = partial(losses_of_steps, device="cuda")


@pytest.mark.parametrize("compile", ["on", "cuda-graphs"])
def test_a_hundred_compiled_steps_give_the_losses_of_the_eager_ones(
    tiny_config: Config, compile: str
) -> None:
    if compile == "cuda-graphs":  # one micro-batch
        settings = dataclasses.replace(tiny_config.train, accumulate=1)
        tiny_config = dataclasses.replace(tiny_config, train=settings)
    eager = losses_on_cuda(tiny_config, 100, compile="off")
    compiled = losses_on_cuda(tiny_config, 100, compile=compile)
    torch.testing.assert_close(compiled, eager, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(compiled[:3], eager[:3], rtol=1e-4, atol=1e-5)
    assert (eager[-1, 0] - eager[0, 0]).abs() > 0.1  # the losses do move


def test_bfloat16_steps_give_the_losses_of_float32_up_to_rounding(tiny_config: Config) -> None:
    exact = losses_on_cuda(tiny_config, 3, compile="off")
    rounded = losses_on_cuda(tiny_config, 3, compile="on", dtype=torch.bfloat16)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_a_step_that_is_refused_changes_no_weight_and_no_moment(tiny_config: Config) -> None:
    run = run_of(tiny_config, device="cuda")
    batches = moved(random_batches(tiny_config), "cuda")
    assert do_step(run, batches, VALUES, waits=False).is_sound
    before = snapshot(run)
    batches[0].views.global_VBZYX[0, 0, 0, 0, 0] = torch.nan
    metrics = do_step(run, batches, VALUES, waits=False)
    assert not metrics.is_sound
    assert metrics.verdict == (1, 1)
    assert all(map(torch.equal, snapshot(run), before))


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    tiny_config: Config, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config, tiny_store, tmp_path / "whole", device="cuda")
    with monkeypatch.context() as patch:
        fail_at(patch, 4)
        with pytest.raises(StoreError, match="the disk went away"):
            train(tiny_config, tiny_store, tmp_path / "resumed", device="cuda")
    train(tiny_config, tiny_store, tmp_path / "resumed", device="cuda")
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "whole")

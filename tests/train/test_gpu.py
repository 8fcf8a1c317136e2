"""Training on a CUDA device: the compiled step against the eager one, refusals, and a resume."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_case import VALUES, fail_at, random_batches, rows, run_of, snapshot

from tapct_fast.config import Config
from tapct_fast.errors import StoreError
from tapct_fast.ssl.method import Losses
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import step_values
from tapct_fast.train.checkpoint import Run
from tapct_fast.train.guard import start_guard
from tapct_fast.train.loop import train
from tapct_fast.train.processes import Processes
from tapct_fast.train.step import Engine, MicroBatch, build_engine, train_step

pytestmark = pytest.mark.gpu


def cuda_run(config: Config, *, compile: str, dtype: torch.dtype) -> tuple[Run, Engine]:
    """Return a run from the weights of ``run_of``, moved before its optimizer is built."""
    run = run_of(config)
    run.method.to("cuda")
    groups = param_groups(run.method.student, depth=config.vit.depth, config=config.optim)
    guard = start_guard(len(list(run.method.student.children())), "cuda")
    run = run._replace(optimizer=build_optimizer(groups, config.optim), guard=guard)
    settings = dataclasses.replace(config.train, compile=compile)
    return run, build_engine(run.method, settings, dtype=dtype, processes=Processes())


def on_cuda(batches: list[MicroBatch]) -> list[MicroBatch]:
    return [torch.utils._pytree.tree_map_only(Tensor, Tensor.cuda, batch) for batch in batches]


def losses_of_steps(
    config: Config, num: int, *, compile: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    run, engine = cuda_run(config, compile=compile, dtype=dtype)
    found = []
    for step in range(num):
        values = step_values(config.schedule, step, num_steps=num, batch_size=4)
        batches = on_cuda(random_batches(config, config.train.accumulate, first=1 + 2 * step))
        metrics = train_step(run, batches, values, engine).read()
        found.append([metrics.losses[name] for name in Losses._fields])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("compile", ["on", "cuda-graphs"])
def test_a_hundred_compiled_steps_give_the_losses_of_the_eager_ones(
    tiny_config: Config, compile: str
) -> None:
    if compile == "cuda-graphs":  # one micro-batch
        settings = dataclasses.replace(tiny_config.train, accumulate=1)
        tiny_config = dataclasses.replace(tiny_config, train=settings)
    eager = losses_of_steps(tiny_config, 100, compile="off")
    compiled = losses_of_steps(tiny_config, 100, compile=compile)
    torch.testing.assert_close(compiled, eager, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(compiled[:3], eager[:3], rtol=1e-4, atol=1e-5)
    assert (eager[-1, 0] - eager[0, 0]).abs() > 0.1  # the losses do move


def test_bfloat16_steps_give_the_losses_of_float32_up_to_rounding(tiny_config: Config) -> None:
    exact = losses_of_steps(tiny_config, 3, compile="off")
    rounded = losses_of_steps(tiny_config, 3, compile="on", dtype=torch.bfloat16)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_a_step_that_is_refused_changes_no_weight_and_no_moment(tiny_config: Config) -> None:
    run, engine = cuda_run(tiny_config, compile="off", dtype=torch.float32)
    assert train_step(run, on_cuda(random_batches(tiny_config)), VALUES, engine).read().is_sound
    before = snapshot(run)
    batches = on_cuda(random_batches(tiny_config, first=3))
    batches[0].views.global_VBZYX[0, 0, 0, 0, 0] = torch.nan
    metrics = train_step(run, batches, VALUES, engine).read()
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

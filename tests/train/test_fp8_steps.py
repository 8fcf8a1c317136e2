"""Steps with float8 linears: their losses, checkpointing, compilation, the guard, the refusal."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_case import VALUES, do_step, engine_of, random_batches, run_of, snapshot

from tapct_fast.config import Config
from tapct_fast.errors import ConfigError, InputError
from tapct_fast.model.fp8 import product_ref, use_fp8
from tapct_fast.ssl.method import Losses
from tapct_fast.ssl.schedules import step_values
from tapct_fast.train.checkpoint import Run
from tapct_fast.train.loop import choose_backend
from tapct_fast.train.step import Engine, train_step

multiplies = pytest.mark.usefixtures("fp8_on_cpu")


def with_train(config: Config, **changes: object) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def emulate(run: Run) -> None:
    for networks in (run.method.student, run.method.teacher):
        use_fp8(networks.backbone.blocks, product_ref)


def losses_of_steps(run: Run, num: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return losses_of(engine_of(run, dtype=dtype), run, num)


def losses_of(engine: Engine, run: Run, num: int) -> Tensor:
    rows, config = [], run.config
    for step in range(num):
        values = step_values(config.schedule, step, num_steps=30, batch_size=4)
        metrics = train_step(run, random_batches(config, first=1 + 2 * step), values, engine).read()
        assert metrics.is_sound
        rows.append([metrics.losses[name] for name in Losses._fields])
    return torch.tensor(rows, dtype=torch.float64)


def test_thirty_emulated_steps_stay_beside_those_of_bfloat16(tiny_config: Config) -> None:
    rounded, other = run_of(tiny_config), run_of(tiny_config)
    emulate(other)
    expected, losses = losses_of_steps(rounded, 30), losses_of_steps(other, 30)
    # 0.023 nats were seen in 30 steps, and 0.037 between bfloat16 and float32: the band is thrice
    # that for other machines, whose roundings part two runs in another way.
    torch.testing.assert_close(losses, expected, rtol=0, atol=0.1)
    assert (losses != expected).any()
    assert losses[-1, 0] < losses[0, 0] - 4  # the losses do move


@multiplies
def test_an_engine_of_fp8_runs_the_definition(tiny_config: Config) -> None:
    emulated, run = run_of(tiny_config), run_of(with_train(tiny_config, precision="fp8"))
    names = list(run.method.state_dict())
    emulate(emulated)
    expected, losses = losses_of_steps(emulated, 3), losses_of_steps(run, 3)
    assert (expected != losses_of_steps(run_of(tiny_config), 3)).any()  # it is not bfloat16
    # Sums in another order before a rounding to 2^-8, twice per layer.
    torch.testing.assert_close(losses, expected, rtol=2**-7, atol=2**-7)
    assert list(run.method.state_dict()) == names
    assert {p.dtype for p in run.method.parameters()} == {torch.float32}


@multiplies
def test_both_halves_of_a_step_are_one_graph(tiny_config: Config) -> None:
    losses = []
    for is_compiled in (False, True):
        run = run_of(with_train(tiny_config, precision="fp8"))
        engine = engine_of(run, dtype=torch.bfloat16)
        if is_compiled:  # without code for the CPU, which takes minutes
            engine = engine._replace(
                encode_teacher=torch.compile(
                    engine.encode_teacher, fullgraph=True, backend="aot_eager"
                ),
                student_losses=torch.compile(
                    engine.student_losses, fullgraph=True, backend="aot_eager"
                ),
            )
        losses.append(losses_of(engine, run, 2))
    torch.testing.assert_close(*losses, rtol=2**-8, atol=2**-8)


@multiplies
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_no_bit_of_a_step(tiny_config: Config, checkpointing: str) -> None:
    snapshots = []
    for how in ("none", checkpointing):
        run = run_of(with_train(tiny_config, precision="fp8", checkpointing=how))
        do_step(run, random_batches(tiny_config), VALUES, dtype=torch.bfloat16)
        snapshots.append(snapshot(run))
    assert all(map(torch.equal, *snapshots))


class CountProducts(TorchDispatchMode):
    """Entered outside of checkpoints, so that it does not see what they have kept."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._scaled_mm.default
        return func(*args, **(kwargs or {}))


@multiplies
@pytest.mark.parametrize(("checkpointing", "again"), [("none", 0), ("selective", 0), ("full", 8)])
def test_selective_checkpointing_keeps_the_products(
    tiny_config: Config, checkpointing: str, again: int
) -> None:
    run = run_of(with_train(tiny_config, precision="fp8", checkpointing=checkpointing))
    with CountProducts() as products:
        do_step(run, random_batches(tiny_config, 1), VALUES, dtype=torch.bfloat16)
    # Two blocks of four layers: the teacher's, and of the student's two sizes of views the outputs
    # and the gradients. The last block, of which few rows are read, is never computed anew.
    assert products.count == 2 * 4 * (1 + 2 * 2) + again


@multiplies
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_stops_the_step(tiny_config: Config, value: float) -> None:
    run = run_of(with_train(tiny_config, precision="fp8"))
    do_step(run, random_batches(tiny_config), VALUES, dtype=torch.bfloat16)
    run.method.student.backbone.blocks[1].mlp.fc1.weight.data[3, 5] = value
    before = snapshot(run)
    assert not do_step(run, random_batches(tiny_config), VALUES, dtype=torch.bfloat16).is_sound
    for old, new in zip(before, snapshot(run), strict=True):
        assert torch.equal(old.nan_to_num(123.0), new.nan_to_num(123.0))


def test_a_cpu_is_refused_with_the_way_out(tiny_config: Config) -> None:
    with pytest.raises(InputError, match=r"fp8 does not run on cpu.*use train.precision=bf16"):
        choose_backend(with_train(tiny_config, precision="fp8"), "cpu")


@pytest.mark.parametrize("vit", [{"head_dim": 24, "dim": 72}, {"mlp_ratio": 3.9}])
def test_widths_that_do_not_fit_are_refused(tiny_config: Config, vit: dict[str, int]) -> None:
    config = dataclasses.replace(tiny_config, vit=dataclasses.replace(tiny_config.vit, **vit))
    with pytest.raises(ConfigError, match=r"multiples of 16.*use train.precision=bf16"):
        with_train(config, precision="fp8")

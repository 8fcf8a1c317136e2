"""A plan against what is built and run: parameters, FLOPs, bytes, and the step without numbers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from counted_flops import COUNTED
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training_case import do_step, run_of

from tapct_fast import recipes
from tapct_fast.config import Config, GramConfig, VitConfig
from tapct_fast.data.pipeline import ViewPipeline
from tapct_fast.errors import ConfigError
from tapct_fast.io.store import Store
from tapct_fast.ssl.schedules import StepValues
from tapct_fast.train.loop import micro_batch
from tapct_fast.train.plan import (
    count_flops,
    count_parameters,
    legal_worlds,
    plan,
    render,
    saved_bytes,
    to_json,
)
from tapct_fast.train.step import MicroBatch

VALUES = StepValues(0.01, 0.01, 0.04, 0.9, 0.05)
MICRO = 4


def with_vit(config: Config, **changes: Any) -> Config:
    """One micro-batch of two groups."""
    config = with_train(config, batch_size=MICRO, accumulate=1, precision="fp32")
    return dataclasses.replace(config, vit=dataclasses.replace(config.vit, **changes))


def with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def first_batch(config: Config, store: Path) -> MicroBatch:
    pipeline = ViewPipeline(Store.open(store), config, device="cpu")
    return micro_batch(config, 0, pipeline.groups(0), pipeline.batch_at(0, 0))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config,
        lambda config: dataclasses.replace(
            config, heads=dataclasses.replace(config.heads, ibot=None)
        ),
        lambda config: with_vit(config, ffn="swiglu", layer_scale=None, num_registers=0),
    ],
)
def test_parameters_are_those_of_a_network_that_is_built(
    tiny_config: Config, change: Callable[[Config], Config]
) -> None:
    config = change(tiny_config)
    student = run_of(config).method.student
    counted = count_parameters(config)
    assert counted.backbone == sum(p.numel() for p in student.backbone.parameters())
    assert counted.total == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_flops_are_those_of_a_real_step(
    tiny_config: Config, tiny_store: Path, ffn: str, drop_path: float
) -> None:
    config = with_vit(tiny_config, ffn=ffn, drop_path=drop_path)
    run, batch = run_of(config, group_size=config.train.group_size), first_batch(config, tiny_store)
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with counter:
        do_step(run, [batch], VALUES)
    flops = count_flops(config)
    # 0.1 %: the counter also sees KoLeo's products of 2 rows.
    assert counter.get_total_flops() == pytest.approx(MICRO * flops.computed, rel=1e-3)
    assert flops.total - flops.computed == flops.dropped + flops.unread
    assert flops.unread > 0.05 * flops.total
    assert (flops.dropped > 0) == (drop_path > 0)


def test_masked_rows_are_those_of_the_pipeline(tiny_config: Config, tiny_store: Path) -> None:
    config = with_vit(tiny_config)
    assert first_batch(config, tiny_store).views.masked_index_M.shape == (12,)
    assert plan(config).masked_rows_per_step == 12


@pytest.mark.parametrize(("name", "teraflops"), [("vit-s", 2.15), ("vit-b", 6.79)])
def test_flops_of_the_backbones_are_those_worked_out_by_hand(name: str, teraflops: float) -> None:
    # By hand: 24 N d^2 and 4 N^2 d per block, teacher 2 views, student 2 and 8, times 3.
    flops = count_flops(recipes.recipe(name))
    assert (flops.student + flops.teacher) / 1e12 == pytest.approx(teraflops, rel=2e-3)


def test_bytes_are_those_of_a_real_step(tiny_config: Config, tiny_store: Path) -> None:
    config = with_vit(tiny_config)
    memory = plan(config).memory
    run, batch = run_of(config, group_size=config.train.group_size), first_batch(config, tiny_store)
    method, views = run.method, [t for t in batch.views if isinstance(t, Tensor)]
    assert batch.kept is not None
    with torch.no_grad():
        encoded = method.teacher.encode_teacher(batch.views)
    (targets,) = method.targets([encoded], VALUES.teacher_temp).of_micro_batches
    assert targets.ibot is not None
    there = [*method.parameters(), *views, *batch.kept, *targets.dino, *targets.ibot]
    known = {t.untyped_storage()._cdata for t in there if isinstance(t, Tensor)}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses, _ = method.student_losses(batch.views, targets, batch.kept)
    saved = sum(s.nbytes() for key, s in kept.items() if key not in known)
    do_step(run, [batch], VALUES)

    def size(tensors: Any) -> int:
        return sum(t.nbytes for t in tensors)

    student = list(method.student.parameters())
    assert memory.weights == size(student)
    assert memory.gradients == size(p.grad for p in student)
    assert memory.teacher == size(method.teacher.parameters())
    state = [t for s in run.optimizer.state.values() for t in s.values()]
    assert size(state) - memory.adam == 4 * len(student)  # a count of steps for each
    assert memory.views == 3 * size(views[:2])  # one at work, two ahead
    assert memory.logits == size([targets.dino.rows_NX, targets.ibot.rows_NX])
    assert memory.saved == saved + size(losses)
    assert memory.total == sum(memory)


def test_checkpointing_of_activations_leaves_less_for_the_backward_pass(
    tiny_config: Config,
) -> None:
    config = with_vit(tiny_config, depth=6)
    none, selective, full = (
        saved_bytes(with_train(config, checkpointing=how), world=1)
        for how in ("none", "selective", "full")
    )
    assert full < selective < none


def test_a_step_runs_among_any_legal_number_of_ranks_and_leaves_no_group(
    tiny_config: Config,
) -> None:
    config = with_train(tiny_config, group_size=1)
    assert legal_worlds(config) == [1, 2]
    made = [plan(config, world=world) for world in (1, 2)]
    assert [(p.samples_per_rank, p.micro_batch) for p in made] == [(4, 2), (2, 1)]
    assert made[0].memory.weights == made[1].memory.weights
    assert made[0].memory.saved > made[1].memory.saved
    assert made[0].masked_rows_per_step == made[1].masked_rows_per_step
    assert made[0].tokens_per_step == made[1].tokens_per_step == 4 * (4 * 13 + 2 * 6)
    assert not dist.is_initialized()


def test_shards_divide_what_belongs_to_the_networks_and_nothing_else(tiny_config: Config) -> None:
    config = with_train(tiny_config, group_size=1)
    copies, shards = (
        plan(with_train(config, parallel=parallel), world=2) for parallel in ("ddp", "fsdp")
    )
    for name, whole in copies.memory._asdict().items():
        divisor = 2 if name in ("weights", "gradients", "adam", "teacher") else 1
        assert getattr(shards.memory, name) == -(-whole // divisor), name
    assert "whole networks on each" in render(copies)
    assert "1/2 of the networks on each" in render(shards)
    assert not plan(with_train(config, parallel="fsdp")).is_sharded


def test_a_plan_names_what_it_leaves_out(tiny_config: Config) -> None:
    assert plan(tiny_config).not_planned == []
    made = plan(dataclasses.replace(tiny_config, gram=GramConfig()))
    assert made._replace(not_planned=[]) == plan(tiny_config)
    assert "not planned          gram" in render(made)


def test_a_batch_that_cannot_be_divided_is_refused_with_the_numbers_that_can() -> None:
    message = r"^3 processes cannot share train.batch_size=64 .* that can: 1, 2, 4$"
    with pytest.raises(ConfigError, match=message):
        plan(recipes.vit_b(), world=3)
    assert not dist.is_initialized()


def test_a_model_larger_than_this_machine_is_planned_without_its_memory() -> None:
    config = recipes.vit_b()
    config = dataclasses.replace(
        config,
        vit=VitConfig(dim=16384, depth=2),
        train=dataclasses.replace(config.train, batch_size=4096, accumulate=1),
    )
    made = plan(config, world=512)
    assert made.memory.total > 100 * 2**30
    assert made.micro_batch == 8
    assert "512" in render(made)


def test_rates_are_arithmetic_and_say_so(tiny_config: Config) -> None:
    made = plan(tiny_config)
    content = to_json(made)
    rate = content["samples_per_s_by_arithmetic"]["50% of 989.5 TFLOP/s"]
    assert rate == pytest.approx(0.5 * 989.5e12 / made.flops.total, rel=1e-3)
    assert "not measured; by arithmetic" in render(made)

"""A plan against what is built and run: parameters, FLOPs, bytes, and the step without numbers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tapct_fast import recipes
from tapct_fast.config import Config, VitConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.errors import ConfigError
from tapct_fast.ssl.method import DinoMethod
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import StepValues
from tapct_fast.train.plan import (
    count_flops,
    count_parameters,
    legal_worlds,
    plan,
    render,
    to_json,
)
from tapct_fast.train.step import train_step

VALUES = StepValues(0.01, 0.01, 0.04, 0.9, 0.05)
MICRO = 4


def with_vit(config: Config, **changes: Any) -> Config:
    train = dataclasses.replace(config.train, batch_size=MICRO, accumulate=1, precision="fp32")
    return dataclasses.replace(config, vit=dataclasses.replace(config.vit, **changes), train=train)


def build(config: Config) -> tuple[DinoMethod, torch.optim.AdamW]:
    method = DinoMethod(config.vit, config.heads, config.losses, hu=config.hu, seed=2)
    groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
    return method, build_optimizer(groups, config.optim)


def real_batch(config: Config) -> ViewBatch:
    """Two of the eight global views are masked at each of two shares, as the config has it."""
    views = config.views
    num = [
        math.prod(s // p for s, p in zip(group.size_zyx, config.vit.patch_zyx, strict=True))
        for group in (views.global_views, views.local_views)
    ]
    counts = [int(num[0] * share) for share in (0.2, 0.3, 0.4, 0.5)]  # upper edges of 0.1 .. 0.5
    mask_NL = torch.zeros(2 * MICRO, num[0], dtype=torch.bool)
    for view, count in enumerate(counts):
        mask_NL[2 * view, :count] = True
    weights = [torch.full((count,), 1 / count) for count in counts]
    return ViewBatch(
        torch.randn(2, MICRO, *views.global_views.size_zyx),
        torch.randn(views.local_views.num, MICRO, *views.local_views.size_zyx),
        mask_NL,
        mask_NL.flatten().nonzero().squeeze(1),
        torch.cat(weights),
        MICRO,
    )


def one_step(config: Config) -> tuple[DinoMethod, torch.optim.AdamW]:
    method, optimizer = build(config)
    batch = real_batch(config)
    train_step(method, optimizer, [(batch, 3)], VALUES, accumulate=1, clip_norm=3.0)
    return method, optimizer


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
    student = build(config)[0].student
    counted = count_parameters(config)
    assert counted.backbone == sum(p.numel() for p in student.backbone.parameters())
    assert counted.total == sum(p.numel() for p in student.parameters())


# What torch's counter does not know: shapes come from the calls, so rows and tokens are counted.
def _embed(voxels: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return int(2 * math.prod(voxels) * weight[0])


def _embed_backward(
    _: Any, voxels: Sequence[int], weight: Sequence[int], *__: Any, **___: Any
) -> int:
    return int(2 * math.prod(voxels) * weight[0])  # of the weight alone


def _entropy(features: Sequence[int], prototypes: Sequence[int], *_: Any, **__: Any) -> int:
    return int(2 * features[0] * math.prod(prototypes))


def _entropy_backward(
    _: Any, __: Any, features: Sequence[int], prototypes: Sequence[int], *___: Any, **____: Any
) -> int:
    return int(4 * features[0] * math.prod(prototypes))  # the logits made anew are not counted


def _attention(query: Sequence[int], *_: Any, **__: Any) -> int:
    n, heads, tokens, width = query
    return n * heads * 4 * tokens * tokens * width


def _attention_backward(_: Any, query: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * _attention(query)


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTED = {
    torch.ops.tapct.patch_embed: _embed,
    torch.ops.tapct.patch_embed_backward: _embed_backward,
    torch.ops.tapct.prototype_cross_entropy: _entropy,
    torch.ops.tapct.prototype_cross_entropy_backward: _entropy_backward,
    CPU_ATTENTION: _attention,
    CPU_ATTENTION_BACKWARD: _attention_backward,
}


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_flops_are_those_of_a_real_step(tiny_config: Config, ffn: str, drop_path: float) -> None:
    config = with_vit(tiny_config, ffn=ffn, drop_path=drop_path)
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with counter:
        one_step(config)
    flops = count_flops(config, MICRO)
    # 0.1 %: the counter also sees KoLeo's products of 4 rows.
    expected = MICRO * (flops.total - flops.dropped)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert (flops.dropped > 0) == (drop_path > 0)


@pytest.mark.parametrize(("name", "teraflops"), [("vit-s", 2.15), ("vit-b", 6.79)])
def test_flops_of_the_backbones_are_those_worked_out_by_hand(name: str, teraflops: float) -> None:
    # By hand: 24 N d^2 and 4 N^2 d per block, teacher 2 views, student 2 and 8, times 3.
    flops = count_flops(recipes.recipe(name), 32)
    assert (flops.student + flops.teacher) / 1e12 == pytest.approx(teraflops, rel=2e-3)


def test_bytes_are_those_of_a_real_step(tiny_config: Config) -> None:
    config = with_vit(tiny_config)
    memory = plan(config).memory
    batch, (method, optimizer) = real_batch(config), build(config)
    known = {p.untyped_storage()._cdata for p in method.parameters()}
    known |= {t.untyped_storage()._cdata for t in batch[:-1] if isinstance(t, Tensor)}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    targets = method.targets(batch, 0.05)
    assert targets.ibot is not None
    logits = [targets.dino.logits_NP, targets.ibot.logits_NP]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        train_step(method, optimizer, [(batch, 3)], VALUES, accumulate=1, clip_norm=3.0)
    saved = sum(s.nbytes() for key, s in kept.items() if key not in known)

    def size(tensors: Any) -> int:
        return sum(t.nbytes for t in tensors)

    student = list(method.student.parameters())
    assert memory.weights == size(student)
    assert memory.gradients == size(p.grad for p in student)
    assert memory.teacher == size(method.teacher.parameters())
    state = [t for s in optimizer.state.values() for t in s.values()]
    assert size(state) - memory.adam == 4 * len(student)  # a count of steps for each
    assert memory.views == 3 * size(batch[:2])  # one at work, two ahead
    assert memory.logits == size(logits)
    assert memory.saved + memory.logits == saved
    assert memory.total == sum(memory)


def test_a_step_runs_among_any_legal_number_of_ranks_and_leaves_no_group(
    tiny_config: Config,
) -> None:
    assert legal_worlds(tiny_config) == [1, 2]
    made = [plan(tiny_config, world=world) for world in (1, 2)]
    assert [(p.samples_per_rank, p.micro_batch) for p in made] == [(4, 2), (2, 1)]
    assert made[0].memory.weights == made[1].memory.weights
    assert made[0].memory.saved > made[1].memory.saved
    assert made[0].tokens_per_step == made[1].tokens_per_step == 4 * (4 * 13 + 2 * 6)
    assert not dist.is_initialized()


def test_a_batch_that_cannot_be_divided_is_refused_with_the_numbers_that_can() -> None:
    message = r"64 in train.accumulate=2 .* among 3 ranks; it can among 1, 2, 4, 8, 16, 32$"
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
    assert content["samples_per_s_measured"] is None
    rate = content["samples_per_s_by_arithmetic"]["50% of 989.5 TFLOP/s"]
    assert rate == pytest.approx(0.5 * 989.5e12 / made.flops.total, rel=1e-3)
    assert "not measured; by arithmetic" in render(made)

"""One optimizer step: the mean over micro-batches, the clip, the teacher, and what stops it."""

import copy
from collections.abc import Callable
from inspect import signature

import pytest
import torch
from torch import Tensor

from tapct_fast.config import Config, HeadsConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.errors import TrainError
from tapct_fast.ssl.method import DinoMethod
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import StepValues
from tapct_fast.train.step import train_step

VALUES = StepValues(0.01, 0.01, 0.04, 0.9, 0.05)


def build(config: Config) -> tuple[DinoMethod, torch.optim.AdamW]:
    method = DinoMethod(config.vit, config.heads, config.losses, hu=config.hu, seed=2)
    groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
    return method, build_optimizer(groups, config.optim)


def random_batch(seed: int) -> ViewBatch:
    generator = torch.Generator().manual_seed(seed)
    mask_NL = torch.zeros(4, 8, dtype=torch.bool)
    mask_NL[1, :3] = mask_NL[2, 2:7] = True
    return ViewBatch(
        torch.randn(2, 2, 8, 16, 16, generator=generator),
        torch.randn(2, 2, 4, 8, 8, generator=generator),
        mask_NL,
        mask_NL.flatten().nonzero().squeeze(1),
        torch.tensor([1 / 3] * 3 + [1 / 5] * 5),
        2,
    )


def snapshot(method: DinoMethod, optimizer: torch.optim.AdamW) -> list[Tensor]:
    state = [t for s in optimizer.state.values() for t in s.values()]
    return [t.detach().clone() for t in (*method.state_dict().values(), *state)]


def test_gradients_are_the_mean_over_micro_batches(tiny_config: Config) -> None:
    batches = [(random_batch(seed), seed) for seed in (1, 2)]
    method, optimizer = build(tiny_config)
    expected: dict[str, Tensor] = {}
    totals = []
    for batch, seed in batches:
        method.zero_grad()
        losses = method.losses(batch, teacher_temp=0.05, drop_seed=seed)
        losses.total.backward()
        totals.append(losses.total.item())
        for name, parameter in method.student.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad / 2
    metrics = train_step(method, optimizer, batches, VALUES, accumulate=2, clip_norm=1e9)
    assert metrics.losses["total"] == pytest.approx(sum(totals) / 2, rel=1e-6)
    for name, parameter in method.student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_each_sub_module_is_clipped_by_itself(tiny_config: Config) -> None:
    method, optimizer = build(tiny_config)
    batches = [(random_batch(1), 1)]
    metrics = train_step(method, optimizer, batches, VALUES, accumulate=1, clip_norm=0.5)
    assert set(metrics.grad_norms) == {"backbone", "dino_head", "ibot_head"}
    assert max(metrics.grad_norms.values()) > 0.5
    for name, module in method.student.named_children():
        grads = torch.cat([p.grad.flatten() for p in module.parameters()])
        expected = min(0.5, metrics.grad_norms[name])
        assert grads.norm().item() == pytest.approx(expected, rel=1e-4)


def test_the_teacher_follows_the_new_student(tiny_config: Config) -> None:
    method, optimizer = build(tiny_config)
    before = [p.detach().double() for p in method.teacher.parameters()]
    start = [p.detach().clone() for p in method.student.parameters()]
    train_step(method, optimizer, [(random_batch(1), 1)], VALUES, accumulate=1, clip_norm=3.0)
    assert not any(map(torch.equal, start, method.student.parameters()))
    pairs = zip(before, method.student.parameters(), strict=True)
    for teacher, (old, new) in zip(method.teacher.parameters(), pairs, strict=True):
        expected = 0.9 * old + 0.1 * new.detach().double()
        torch.testing.assert_close(teacher.double(), expected, rtol=1e-6, atol=1e-7)


def test_bfloat16_products_keep_weights_and_losses_in_float32(tiny_config: Config) -> None:
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        method, optimizer = build(tiny_config)
        batches = [(random_batch(1), 1)]
        results[dtype] = train_step(
            method, optimizer, batches, VALUES, accumulate=1, clip_norm=3.0, dtype=dtype
        )
        assert {p.dtype for p in method.parameters()} == {torch.float32}
    exact, rounded = (r.losses["total"] for r in results.values())
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)  # bfloat16 keeps 8 bits


def poison_view(batch: ViewBatch) -> None:
    batch.local_VBZYX[1, 0, 2, 3, 4] = torch.nan


def poison_weight_of_token(batch: ViewBatch) -> None:
    batch.masked_weight_M[2] = torch.inf


def poison_student(method: DinoMethod) -> None:
    method.student.backbone.blocks[1].mlp.fc1.weight.data[3, 5] = torch.inf


def poison_teacher(method: DinoMethod) -> None:
    method.teacher.dino_head.last_layer.weight_v.data[0, 0] = torch.nan


def poison_activation(method: DinoMethod) -> None:
    mlp = method.student.backbone.blocks[0].mlp
    mlp.register_forward_hook(lambda *inout: inout[2] * torch.inf)


def poison_gradient(method: DinoMethod) -> None:
    weight = method.student.ibot_head.mlp[0].weight
    weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), torch.nan))


@pytest.mark.parametrize(
    ("poison", "names"),
    [
        (poison_view, "Nothing was updated. the views hold"),
        (poison_student, "loss total.* weights of student are damaged"),
        (poison_teacher, "loss total.* weights of teacher are damaged"),
        (poison_activation, "loss dino_global.* overflowed"),
        (poison_gradient, "gradient of the ibot_head.* overflowed"),
        (poison_weight_of_token, "loss total, loss ibot.* Nothing was updated"),
    ],
)
@pytest.mark.parametrize("at", [0, 1])
def test_a_number_that_is_not_finite_stops_the_step_before_any_write(
    tiny_config: Config, poison: Callable[..., None], names: str, at: int
) -> None:
    method, optimizer = build(tiny_config)
    batches = [(random_batch(seed), seed) for seed in (1, 2)]
    train_step(method, optimizer, copy.deepcopy(batches), VALUES, accumulate=2, clip_norm=3.0)
    poison(batches[at][0] if "batch" in signature(poison).parameters else method)
    before = snapshot(method, optimizer)
    with pytest.raises(TrainError, match=names) as caught:
        train_step(method, optimizer, batches, VALUES, accumulate=2, clip_norm=3.0)
    assert caught.value.exit_code == 70
    after = snapshot(method, optimizer)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(123.0), new.nan_to_num(123.0))


def test_a_shared_head_trains_on_both_losses(tiny_config: Config) -> None:
    method = DinoMethod(
        tiny_config.vit,
        HeadsConfig(dino=tiny_config.heads.dino, ibot=None),
        tiny_config.losses,
        hu=tiny_config.hu,
        seed=2,
    )
    groups = param_groups(method.student, depth=2, config=tiny_config.optim)
    optimizer = build_optimizer(groups, tiny_config.optim)
    batches = [(random_batch(1), 1)]
    metrics = train_step(method, optimizer, batches, VALUES, accumulate=1, clip_norm=3.0)
    assert set(metrics.grad_norms) == {"backbone", "dino_head"}
    assert metrics.losses["ibot"] > 0

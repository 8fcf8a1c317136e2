"""One optimizer step: the mean over micro-batches, the clip, the teacher, and what stops it."""

import copy
import ctypes
import dataclasses
import re
import resource
from collections.abc import Callable
from inspect import signature

import pytest
import torch
from torch import Tensor
from training_case import (
    VALUES,
    clipped_at,
    do_step,
    engine_of,
    explained,
    losses_of_steps,
    random_batches,
    run_of,
    snapshot,
)

from tapct_fast.config import Config, HeadsConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.ssl.method import DinoMethod
from tapct_fast.train.step import train_step
from tapct_kernels.soft_targets import PRODUCTS


def test_gradients_are_the_mean_over_micro_batches_under_targets_of_the_whole_step(
    tiny_config: Config,
) -> None:
    batches = random_batches(tiny_config)
    run = run_of(clipped_at(tiny_config, 1e9))
    method = run.method
    with torch.no_grad():
        encoded = [method.teacher.encode_teacher(views) for views, _ in batches]
    targets = method.targets(encoded, 0.05).of_micro_batches
    expected: dict[str, Tensor] = {}
    totals = []
    for (views, kept), wanted in zip(batches, targets, strict=True):
        method.zero_grad()
        losses, _ = method.student_losses(views, wanted, kept)
        losses.total.backward()
        totals.append(losses.total.item())
        for name, parameter in method.student.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad / 2
    metrics = do_step(run, batches, VALUES)
    assert metrics.losses["total"] == pytest.approx(sum(totals) / 2, rel=1e-6)
    for name, parameter in method.student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_each_sub_module_is_clipped_by_itself(tiny_config: Config) -> None:
    run = run_of(clipped_at(tiny_config, 0.5))
    metrics = do_step(run, random_batches(tiny_config, 1), VALUES)
    assert set(metrics.grad_norms) == {"backbone", "dino_head", "ibot_head"}
    assert max(metrics.grad_norms.values()) > 0.5
    for name, module in run.method.student.named_children():
        grads = torch.cat([p.grad.flatten() for p in module.parameters()])
        expected = min(0.5, metrics.grad_norms[name])
        assert grads.norm().item() == pytest.approx(expected, rel=1e-4)


def test_the_teacher_follows_the_new_student(tiny_config: Config) -> None:
    run = run_of(tiny_config)
    before = [p.detach().double() for p in run.method.teacher.parameters()]
    start = [p.detach().clone() for p in run.method.student.parameters()]
    assert do_step(run, random_batches(tiny_config, 1), VALUES).is_sound
    assert not any(map(torch.equal, start, run.method.student.parameters()))
    pairs = zip(before, run.method.student.parameters(), strict=True)
    for teacher, (old, new) in zip(run.method.teacher.parameters(), pairs, strict=True):
        expected = 0.9 * old + 0.1 * new.detach().double()
        torch.testing.assert_close(teacher.double(), expected, rtol=1e-6, atol=1e-7)


def test_bfloat16_products_keep_weights_and_losses_in_float32(tiny_config: Config) -> None:
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        run = run_of(tiny_config)
        results[dtype] = do_step(run, random_batches(tiny_config, 1), VALUES, dtype=dtype)
        assert {p.dtype for p in run.method.parameters()} == {torch.float32}
    exact, rounded = (r.losses["total"] for r in results.values())
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)  # bfloat16 keeps 8 bits


def test_a_hundred_compiled_steps_give_the_losses_of_the_eager_ones(tiny_config: Config) -> None:
    eager = losses_of_steps(tiny_config, 100, compile="off")
    compiled = losses_of_steps(tiny_config, 100, compile="on")
    # Sums in another order part two runs slowly; 2e-3 per step is the bound of a default-mode run.
    torch.testing.assert_close(compiled, eager, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(compiled[:3], eager[:3], rtol=1e-5, atol=1e-6)
    assert (eager[-1, 0] - eager[0, 0]).abs() > 0.1  # the losses do move


def test_the_host_need_not_wait_for_the_verdict(tiny_config: Config) -> None:
    snapshots = []
    for waits in (True, False):
        run = run_of(tiny_config)
        for first in (1, 3):
            do_step(run, random_batches(tiny_config, first=first), VALUES, waits=waits)
        snapshots.append(snapshot(run))
    for one, other in zip(*snapshots, strict=True):
        # The same formula, in another kernel for the teacher.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("compile", ["off", "on"])
def test_logits_computed_anew_give_the_losses_of_stored_ones(
    tiny_config: Config, compile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = losses_of_steps(tiny_config, 10, compile=compile)
    losses = dataclasses.replace(tiny_config.losses, recompute_ibot_logits=True)
    # several parts
    monkeypatch.setitem(PRODUCTS, "cpu", 7 * tiny_config.heads.dino.num_prototypes)
    again = losses_of_steps(dataclasses.replace(tiny_config, losses=losses), 10, compile=compile)
    assert not torch.equal(again, stored)
    torch.testing.assert_close(again, stored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_bit_of_a_step(
    tiny_config: Config, checkpointing: str, dtype: torch.dtype
) -> None:
    snapshots = []
    for how in ("none", checkpointing):
        train = dataclasses.replace(tiny_config.train, checkpointing=how)
        run = run_of(dataclasses.replace(tiny_config, train=train))
        start = snapshot(run)
        do_step(run, random_batches(tiny_config), VALUES, dtype=dtype)
        snapshots.append(snapshot(run))
    if dtype == torch.float32 or checkpointing == "full":
        assert all(map(torch.equal, *snapshots))
    else:  # gradients of global and local views are added after they are rounded to 8 bits
        apart, moved = (
            torch.stack([(a - b).norm() for a, b in zip(snapshots[0], other, strict=False)]).norm()
            for other in (snapshots[1], start)
        )
        assert apart < 0.1 * moved


def test_the_step_tells_that_it_was_asked_to_stop(tiny_config: Config) -> None:
    run = run_of(tiny_config)
    engine = engine_of(run)
    batches = random_batches(tiny_config)
    told = [
        train_step(run, batches, VALUES, engine, is_asked=asked).read().is_asked
        for asked in (False, True)
    ]
    assert told == [False, True]


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
@pytest.mark.parametrize(
    ("centering", "waits"), [("sinkhorn", True), ("sinkhorn", False), ("softmax", False)]
)
def test_a_number_that_is_not_finite_stops_the_step_before_any_write(
    tiny_config: Config,
    poison: Callable[..., None],
    names: str,
    at: int,
    centering: str,
    waits: bool,
) -> None:
    losses = dataclasses.replace(tiny_config.losses, centering=centering)
    run = run_of(dataclasses.replace(tiny_config, losses=losses))
    batches = random_batches(tiny_config)
    do_step(run, copy.deepcopy(batches), VALUES)
    if "batch" in signature(poison).parameters:
        poison(batches[at].views)
    else:
        poison(run.method)
    before = snapshot(run)
    metrics = do_step(run, batches, VALUES, waits=waits)
    assert not metrics.is_sound
    assert (metrics.verdict.skipped, metrics.verdict.in_a_row) == (1, 1)
    assert re.search(names, explained(run, metrics))
    for old, new in zip(before, snapshot(run), strict=True):
        assert torch.equal(old.nan_to_num(123.0), new.nan_to_num(123.0))


def test_a_shared_head_trains_on_both_losses(tiny_config: Config) -> None:
    heads = HeadsConfig(dino=tiny_config.heads.dino, ibot=None)
    run = run_of(dataclasses.replace(tiny_config, heads=heads))
    metrics = do_step(run, random_batches(tiny_config, 1), VALUES)
    assert set(metrics.grad_norms) == {"backbone", "dino_head"}
    assert metrics.losses["ibot"] > 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's malloc")
def test_on_a_cpu_a_step_gets_the_memory_that_the_one_before_freed(tiny_config: Config) -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**22) for _ in range(10)]  # 160 MB, 40,960 pages
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        del tensors
        return after - before

    engine_of(run_of(tiny_config))
    counts = [faults() for _ in range(3)]
    assert counts[-1] < 1000, counts

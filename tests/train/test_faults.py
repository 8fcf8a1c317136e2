"""Bad numbers stop a step before it writes; poor but honest data does not."""

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from training_case import do_step, explained, kept_rows, run_of, tensors

from tapct_fast.config import Config, LossConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.ssl.schedules import StepValues
from tapct_fast.train.checkpoint import Run
from tapct_fast.train.step import MicroBatch

VALUES = StepValues(0.01, 0.01, 0.04, 0.9, 0.05)
NUM_LOCAL = 2


def make_batch(seed: int, num_samples: int = 2, *, is_masked: bool = True) -> ViewBatch:
    generator = torch.Generator().manual_seed(seed)
    mask_NL = torch.zeros(2 * num_samples, 8, dtype=torch.bool)
    if is_masked:
        mask_NL[0, :3] = mask_NL[-1, 2:7] = True
    count_N1 = mask_NL.sum(1, keepdim=True).clamp(min=1)
    return ViewBatch(
        torch.randn(2, num_samples, 8, 16, 16, generator=generator),
        torch.randn(NUM_LOCAL, num_samples, 4, 8, 8, generator=generator),
        mask_NL,
        mask_NL.flatten().nonzero().squeeze(1),
        (1 / count_N1).expand_as(mask_NL)[mask_NL],
        num_samples,
    )


def attempt(run: Run, batches: list[ViewBatch]) -> str:
    """Try one step; return why it was refused, empty if it was done."""
    kept = [kept_rows(run.config, views, seed) for seed, views in enumerate(batches)]
    metrics = do_step(run, list(map(MicroBatch, batches, kept)), VALUES, waits=False)
    return "" if metrics.is_sound else explained(run, metrics)


class Fault:
    """A bad number at a place that a seed draws."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.value = self.draw.choice([torch.nan, torch.inf, -torch.inf])

    def hit(self, tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.view(-1)[self.draw.randrange(tensor.numel())] = self.value

    def input(self, _: Run, batches: list[ViewBatch]) -> None:
        batch = self.draw.choice(batches)
        self.hit(self.draw.choice([batch.global_VBZYX, batch.local_VBZYX]))

    def activation(self, run: Run, _: list[ViewBatch]) -> None:
        layers = [m for m in run.method.student.modules() if isinstance(m, nn.Linear)]

        def spoil(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            output = output.clone()
            self.hit(output)
            return output

        called = [layer for layer in layers if is_called(layer, run)]
        self.draw.choice(called).register_forward_hook(spoil)

    def loss(self, _: Run, batches: list[ViewBatch]) -> None:
        self.hit(self.draw.choice(batches).masked_weight_M)

    def gradient(self, run: Run, _: list[ViewBatch]) -> None:
        parameter = self.draw.choice(list(run.optimizer.state))

        def spoil(grad: Tensor) -> Tensor:
            grad = grad.clone()
            self.hit(grad)
            return grad

        parameter.register_hook(spoil)

    def teacher(self, run: Run, _: list[ViewBatch]) -> None:
        names = [n for n, _ in run.method.teacher.named_parameters() if "mask_token" not in n]
        self.hit(run.method.teacher.get_parameter(self.draw.choice(names)))

    def moments(self, run: Run, _: list[ViewBatch]) -> None:
        state = run.optimizer.state[self.draw.choice(list(run.optimizer.state))]
        self.hit(state[self.draw.choice(["exp_avg", "exp_avg_sq"])])


def is_called(module: nn.Module, run: Run) -> bool:
    """Say whether a module is called as such; fused ops take only its weights."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        run.method.student.encode_student(make_batch(0))
    handle.remove()
    return bool(calls)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "place",
    [Fault.input, Fault.activation, Fault.loss, Fault.gradient, Fault.teacher, Fault.moments],
)
def test_a_number_that_is_not_finite_skips_the_step_and_changes_no_bit_but_the_counts(
    tiny_config: Config, place: Callable[[Fault, Run, list[ViewBatch]], None], seed: int
) -> None:
    run = run_of(tiny_config, seed=2)
    assert attempt(run, [make_batch(1), make_batch(2)]) == ""
    batches = [make_batch(3), make_batch(4)]
    place(Fault(seed), run, batches)
    before = tensors(run)
    assert "not finite" in attempt(run, batches)
    after = tensors(run)
    for name in ("skipped", "in_a_row"):
        assert after.pop(name) == before.pop(name) + 1
    for name, tensor in before.items():
        assert torch.equal(tensor.nan_to_num(123.0), after[name].nan_to_num(123.0)), name


def one_sample() -> list[ViewBatch]:
    return [make_batch(1, num_samples=1)]


def equal_crops() -> list[ViewBatch]:
    batch = make_batch(1, num_samples=4)
    for views in (batch.global_VBZYX, batch.local_VBZYX):
        views.copy_(views[:1, :1].clone())
    return [batch]


def no_masked_token() -> list[ViewBatch]:
    return [make_batch(1, is_masked=False)]


def air() -> list[ViewBatch]:
    batch = make_batch(1, num_samples=4)
    batch.global_VBZYX.fill_(-2.857)  # -1008 HU, z-scored
    batch.local_VBZYX.fill_(-2.857)
    return [batch]


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
@pytest.mark.parametrize("data", [one_sample, equal_crops, no_masked_token, air])
def test_poor_data_gives_finite_losses_and_updates(
    tiny_config: Config, data: Callable[[], list[ViewBatch]], centering: str
) -> None:
    losses = dataclasses.replace(LossConfig(koleo_weight=0.1), centering=centering)
    run = run_of(dataclasses.replace(tiny_config, losses=losses), seed=2)
    before = tensors(run)
    for _ in range(3):
        assert attempt(run, data()) == ""
    after = tensors(run)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    name = "student.backbone.patch_embed.proj.weight"
    assert not torch.equal(before[name], after[name])

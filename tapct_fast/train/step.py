"""One optimizer step: gradients of all micro-batches, the check, the clip, AdamW, the teacher.

Nothing is written to the weights of student and teacher or to the optimizer before every loss and
gradient is known to be finite. The clip is per sub-module, as in DINOv2.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.errors import TrainError
from tapct_fast.ssl.ema import update_teacher
from tapct_fast.ssl.method import DinoMethod, Losses
from tapct_fast.ssl.param_groups import set_step_values
from tapct_fast.ssl.schedules import StepValues


class StepMetrics(NamedTuple):
    """Host numbers of one step: losses averaged over the micro-batches, norms before the clip."""

    losses: dict[str, float]
    grad_norms: dict[str, float]


def train_step(
    method: DinoMethod,
    optimizer: torch.optim.AdamW,
    batches: Iterable[tuple[ViewBatch, int]],
    values: StepValues,
    *,
    accumulate: int,
    clip_norm: float,
    dtype: torch.dtype = torch.float32,
) -> StepMetrics:
    """Do one step in place.

    Args:
        method: Student and teacher.
        optimizer: Over the student's parameters, from ``build_optimizer``.
        batches: ``accumulate`` micro-batches, each with its drop-path seed; each is done with
            before the next is asked for.
        values: The schedules at this step.
        accumulate: Micro-batches; every loss is divided by it.
        clip_norm: Largest gradient norm of each of backbone, DINO head and iBOT head.
        dtype: What matrix products are rounded to; losses and weights stay float32.

    Raises:
        TrainError: A loss or gradient is not finite. Weights, optimizer and teacher are unchanged.
    """
    student = method.student
    optimizer.zero_grad(set_to_none=True)
    sums: list[Tensor] | None = None
    num_batches = 0
    for batch, drop_seed in batches:
        device_type = batch.global_VBZYX.device.type
        with torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32):
            losses = method.losses(batch, teacher_temp=values.teacher_temp, drop_seed=drop_seed)
        (losses.total / accumulate).backward()  # type: ignore[no-untyped-call]
        # A sum is finite only if every voxel is; the next micro-batch may replace this one.
        voxels = batch.global_VBZYX.sum() + batch.local_VBZYX.sum()
        parts = [*(loss.detach() / accumulate for loss in losses), voxels]
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
        num_batches += 1
    assert sums is not None
    assert num_batches == accumulate, f"{num_batches} micro-batches, not {accumulate}"

    names = [name for name, _ in student.named_children()]
    norms = [
        nn.utils.clip_grad_norm_(module.parameters(), clip_norm, foreach=True)
        for module in student.children()
    ]
    numbers = torch.stack([*sums, *norms]).tolist()  # the one host sync of a step
    num_losses = len(Losses._fields)
    metrics = StepMetrics(
        losses=dict(zip(Losses._fields, numbers[:num_losses], strict=True)),
        grad_norms=dict(zip(names, numbers[num_losses + 1 :], strict=True)),
    )
    _check_finite(metrics, numbers[num_losses], method)

    set_step_values(optimizer, values)
    optimizer.step()
    update_teacher(method.teacher, student, values.momentum)
    return metrics


def _check_finite(metrics: StepMetrics, voxels: float, method: DinoMethod) -> None:
    named = {f"loss {name}": value for name, value in metrics.losses.items()}
    named |= {f"gradient of the {name}": value for name, value in metrics.grad_norms.items()}
    bad = [name for name, value in named.items() if not math.isfinite(value)]
    if not bad and math.isfinite(voxels):
        return
    damaged = [
        name
        for name, module in (("student", method.student), ("teacher", method.teacher))
        if not all(bool(p.isfinite().all()) for p in module.parameters())
    ]
    if not math.isfinite(voxels):
        cause = "the views hold NaN or infinity; check the settings under hu and views"
    elif damaged:
        cause = f"weights of {' and '.join(damaged)} are damaged; resume from a checkpoint"
    else:
        cause = (
            "views and weights are finite, so the numbers overflowed on the way; "
            "lower schedule.base_lr or use train.precision=fp32"
        )
    raise TrainError(f"not finite: {', '.join(bad or ['views'])}. Nothing was updated. {cause}")

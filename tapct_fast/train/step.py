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
from tapct_fast.ssl.ema import update_teacher
from tapct_fast.ssl.method import DinoMethod, Losses
from tapct_fast.ssl.param_groups import set_step_values
from tapct_fast.ssl.schedules import StepValues
from tapct_fast.train.guard import RefusedError, explain, moments_finite


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
        RefusedError: A loss, gradient or moment is not finite. Weights, optimizer and teacher are
            unchanged.
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
    verdict = moments_finite(optimizer).float()
    numbers = torch.stack([*sums, verdict, *norms]).tolist()  # the one host sync of a step
    num_losses = len(Losses._fields)
    losses_by_name = dict(zip(Losses._fields, numbers[:num_losses], strict=True))
    norms_by_name = dict(zip(names, numbers[num_losses + 2 :], strict=True))
    if not (all(map(math.isfinite, numbers)) and numbers[num_losses + 1]):
        cause = explain(
            losses_by_name,
            norms_by_name,
            voxels=numbers[num_losses],
            networks={"student": student, "teacher": method.teacher},
            optimizer=optimizer,
        )
        raise RefusedError(cause, losses_by_name, norms_by_name)

    set_step_values(optimizer, values)
    optimizer.step()
    update_teacher(method.teacher, student, values.momentum)
    return StepMetrics(losses_by_name, norms_by_name)

"""One optimizer step: teacher, targets, student, gradients; then verdict, AdamW, moving average.

Nothing waits for the device: losses, norms and the guard's verdict stay tensors, and a step that is
refused changes no weight and no moment. The clip is per sub-module, as in DINOv2.

What is compiled, as one graph each, are the two halves that hold nearly all of the work: the
teacher's encoding, and the student's losses with their gradients. Between them Sinkhorn-Knopp is
two kernels, and after them clip, AdamW and moving average are a few multi-tensor kernels each.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tapct_fast.config import TrainConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.model.fp8 import use_fp8
from tapct_fast.ssl.ema import update_teacher
from tapct_fast.ssl.health import Evidence
from tapct_fast.ssl.method import DinoMethod, Encoded, Kept, Losses, StepTargets, Targets
from tapct_fast.ssl.param_groups import set_step_values
from tapct_fast.ssl.schedules import StepValues
from tapct_fast.ssl.shards import whole
from tapct_fast.train.checkpoint import Run
from tapct_fast.train.guard import Verdict, judge, moments_finite
from tapct_fast.train.processes import Processes

_EVIDENCE_VIEWS = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class MicroBatch(NamedTuple):
    """Views, masks, and the rows that drop path keeps; None drops nothing."""

    views: ViewBatch
    kept: Kept | None


class Engine(NamedTuple):
    """How the steps of a run are done; see ``build_engine``."""

    encode_teacher: Callable[[ViewBatch], Encoded]
    student_losses: Callable[..., tuple[Losses, Tensor]]
    dtype: torch.dtype  # what matrix products are rounded to; losses and weights stay float32
    processes: Processes
    waits: bool  # whether the host may read the verdict before it updates: where that costs nothing


class StepMetrics(NamedTuple):
    """Host numbers of one step: means over micro-batches and processes, norms before the clip."""

    losses: dict[str, float]
    grad_norms: dict[str, float]
    voxels: float  # finite if and only if every voxel of the views is
    is_asked: bool  # whether a process was asked to stop
    is_sound: bool  # whether the step updated
    verdict: Verdict


class StepResult(NamedTuple):
    """What the device may still be computing.

    Attributes:
        numbers: In one tensor on the host, so that it waits once.
        copied: From this event on they are there; None where they are.
        names: Of the gradient norms.
        views: The first micro-batch.
        teacher_cls_ND: Of its global views.
        student_cls_ND: The same of the student.
        targets: Of the first micro-batch.
    """

    numbers: Tensor
    copied: torch.cuda.Event | None
    names: Sequence[str]
    views: ViewBatch
    teacher_cls_ND: Tensor
    student_cls_ND: Tensor
    targets: Targets

    def read(self) -> StepMetrics:
        """Wait for the device, for this step and none behind it."""
        if self.copied is not None:
            self.copied.synchronize()
        numbers = self.numbers.tolist()
        losses, rest = numbers[: len(Losses._fields)], numbers[len(Losses._fields) :]
        voxels, asked, is_sound, skipped, in_a_row, *norms = rest
        return StepMetrics(
            dict(zip(Losses._fields, losses, strict=True)),
            dict(zip(self.names, norms, strict=True)),
            voxels,
            asked > 0,
            bool(is_sound),
            Verdict(int(skipped), int(in_a_row)),
        )


def gather_evidence(run: Run, result: StepResult, engine: Engine) -> Evidence:
    """Return what the health of a run is judged by; a few views go through the teacher again.

    With shards, all processes call this together.
    """
    views_NCZYX = result.views.global_VBZYX.flatten(0, 1)[:_EVIDENCE_VIEWS, None]
    with torch.no_grad(), _rounded(run, engine):
        patches_NLD = run.method.teacher.encode_patches(views_NCZYX)
    return Evidence(result.teacher_cls_ND, result.student_cls_ND, patches_NLD, *result.targets)


def build_engine(
    method: DinoMethod, config: TrainConfig, *, dtype: torch.dtype, processes: Processes
) -> Engine:
    """Choose how steps are done: compiled or eager, on copies or on shards.

    The eager step is the definition; tests hold the compiled one to its losses.

    Args:
        method: Student and teacher, on the device of the run.
        config: ``compile``, ``checkpointing`` and ``precision`` are used, the last for ``fp8``
            only; then the method's networks stay so.
        dtype: What matrix products are rounded to.
        processes: Those that share a step.
    """
    device = next(method.parameters()).device
    if device.type == "cpu":
        _keep_freed_memory()
    blocks: Any = [*method.student.backbone.blocks]  # Any: a ModuleList forgets its type
    for block in blocks:
        block.checkpointing = config.checkpointing
    if config.precision == "fp8":
        use_fp8([*blocks, *method.teacher.backbone.blocks])
    is_compiled = config.compile in ("on", "cuda-graphs") or (
        config.compile == "auto" and device.type == "cuda"
    )
    encode, losses = method.target_networks.encode_teacher, method.student_losses
    if processes.is_sharded:
        # Hooks gather the weights of a part before it runs, so the parts are compiled.
        for block in [*blocks, *method.teacher.backbone.blocks] if is_compiled else ():
            block.attn.compile(dynamic=False)
            block.mlp.compile(dynamic=False)
    elif is_compiled:
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        if config.compile == "cuda-graphs":
            options["mode"] = "reduce-overhead"
        encode, losses = torch.compile(encode, **options), torch.compile(losses, **options)
    return Engine(encode, losses, dtype, processes, waits=device.type == "cpu")


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, not give it to the system and ask again.

    Pages from the system are cleared, one fault each: 10,000 in a step of ``debug``. What is of 32
    MB or more, the most that glibc takes for this, still comes from the system.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, -1)


def train_step(
    run: Run,
    batches: Sequence[MicroBatch],
    values: StepValues,
    engine: Engine,
    *,
    is_anchored: bool = False,
    is_asked: bool = False,
) -> StepResult:
    """Do one step in place.

    Args:
        run: Student, teacher, optimizer and guard.
        batches: The micro-batches of this process.
        values: The schedules at this step.
        engine: From ``build_engine``.
        is_anchored: Add the Gram loss.
        is_asked: This process was asked to stop; all of them learn it from the step.
    """
    method, optimizer, processes = run.method, run.optimizer, engine.processes
    student = method.student
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad(), _rounded(run, engine):
        encoded = [engine.encode_teacher(batch.views) for batch in batches]
        targets = method.targets(encoded, values.teacher_temp, group=processes.group)
    sums: list[Tensor] = []
    student_cls = []
    for (views, kept), wanted in zip(batches, targets.of_micro_batches, strict=True):
        with _rounded(run, engine):
            losses, cls_ND = engine.student_losses(views, wanted, kept, is_anchored=is_anchored)
        student_cls.append(cls_ND)
        (losses.total / len(batches)).backward()  # type: ignore[no-untyped-call]
        # A sum is finite only if every voxel is.
        voxels = views.global_VBZYX.sum() + views.local_VBZYX.sum()
        parts = [*(loss.detach() / len(batches) for loss in losses), voxels]
        sums = parts if not sums else [a + b for a, b in zip(sums, parts, strict=True)]

    asked = torch.full_like(sums[0], float(is_asked))
    moments = moments_finite(optimizer).to(asked.dtype)
    *parts, moments = processes.mean(torch.stack([*sums, asked, moments]))
    means = torch.stack(parts)
    processes.reduce_gradients(student.parameters())
    norms = torch.stack(
        [
            # Without a gradient, as an iBOT head has where no token is masked, it is on the host.
            whole(nn.utils.clip_grad_norm_(part.parameters(), run.config.optim.clip_norm)).to(
                means.device
            )
            for part in student.children()
        ]
    )
    # Views and moments too: what is not finite there need not show in a loss.
    is_sound, state = judge(
        run.guard,
        means[: len(Losses._fields)],
        norms,
        run.config.guard,
        is_sound=means.isfinite().all() & (moments == 1),
    )
    for old, new in zip(run.guard, state, strict=True):
        old.copy_(new)
    _update(run, values, is_sound, targets, waits=engine.waits)
    verdict = torch.stack([is_sound, run.guard.skipped, run.guard.in_a_row])
    return StepResult(
        *_on_its_way(torch.cat([means, verdict.to(means.dtype), norms])),
        [name for name, _ in student.named_children()],
        batches[0].views,
        encoded[0].cls_ND,
        student_cls[0],
        targets.of_micro_batches[0],
    )


def _on_its_way(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Send numbers to the host; a copy asked for later would wait for the steps behind this one."""
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    return host, torch.cuda.current_stream(numbers.device).record_event()


def _update(
    run: Run, values: StepValues, is_sound: Tensor, targets: StepTargets, *, waits: bool
) -> None:
    """Update student, teacher and centers; nothing changes where ``is_sound`` holds False."""
    method, optimizer = run.method, run.optimizer
    set_step_values(optimizer, values)
    if waits:
        if not is_sound:
            return
    else:
        # What a gradient scaler sets: where it holds 1 the fused kernel writes nothing.
        optimizer.found_inf = (~is_sound).float()  # type: ignore[attr-defined]
    optimizer.step()
    update_teacher(method.teacher, method.student, values.momentum, None if waits else is_sound)
    for center, mean_P in zip(method.centers, targets.mean_logits, strict=False):
        center.move(mean_P, is_sound)


def _rounded(run: Run, engine: Engine) -> AbstractContextManager[object]:
    device_type = run.guard.accepted.device.type
    return torch.autocast(
        device_type,
        dtype=engine.dtype,
        enabled=engine.dtype != torch.float32,
        # In the cache, a weight cast for the global views also serves the local ones; selective
        # checkpointing requires equal operations when a block is computed again.
        cache_enabled=run.config.train.checkpointing != "selective",
    )

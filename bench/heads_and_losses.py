"""Heads and losses of a training step, and their peak of memory: everything behind the backbones.

Both heads of both networks, Sinkhorn-Knopp, the cross-entropies of DINO and iBOT and the backward
to weights and tokens, of rows drawn at random. Rivals as in ``bench.train``: D holds all logits,
balances them in place and is compiled head by head on CUDA; E is our eager step. All losses are
held to D's, to 1e-4 in float32 and 5 % in bfloat16, where D rounds its weights and rows. The second
variant of ours is losses.recompute_ibot_logits.
``extra_bytes`` is the peak beyond weights and rows, gradients included; ``memory_to_dinov3`` is its
ratio to D's.
Shape suffixes: N rows of cls tokens, M masked tokens, V views, B samples, K bottleneck width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import ROUNDS, Device, Run, peak_extra_bytes, start, this_device, time_ms
from bench.train_eager import EAGER
from bench.train_rivals import DINOV3, Rival, Rows
from bench.train_runs import (
    LOSS_ERROR,
    OURS,
    VALUES,
    D,
    E,
    Library,
    dtype_name,
    every_graph_compiles,
    method_of,
    run_config,
)
from bench.train_runs import SOURCES as SOURCES
from tapct_fast.ssl.dino import dino_loss
from tapct_fast.ssl.ibot import ibot_loss
from tapct_fast.ssl.method import DinoMethod, Encoded, Networks

NUM_VIEWS = 10  # of a sample, two of them global


class Setting(NamedTuple):
    """One row: rows that reach the heads, and the heads."""

    num_masked: int
    batch: int
    num_prototypes: int
    dtype: torch.dtype
    dim: int
    hidden_dim: int = 2048

    @property
    def case(self) -> str:
        """Name of the row."""
        rows = f"{self.num_masked} masked and {NUM_VIEWS * self.batch} cls rows"
        return f"{rows} x {self.num_prototypes}, {dtype_name(self.dtype)}"


def settings(device: Device, is_tiny: bool) -> Iterator[Setting]:
    """Yield the rows of a device."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if is_tiny:
        yield Setting(24, 2, 300, fp32, dim=64, hidden_dim=32)
    elif device == "cpu":
        yield Setting(8192, 32, 65_536, fp32, dim=384)
        yield Setting(8192, 32, 65_536, bf16, dim=384)
    else:
        yield Setting(22_579, 32, 65_536, bf16, dim=768)


def our_head_losses(
    method: DinoMethod, teacher: Rows, student: Rows, weight_M: Tensor, temp: Tensor
) -> dict[str, Tensor]:
    """Return this library's losses of rows that reach the heads; see ``Rival.head_losses``."""
    student_temp, batch = method.config.student_temp, teacher.cls_ND.shape[0] // 2
    with torch.no_grad():
        encoded = _encode(method.teacher, teacher)
        (targets,) = method.targets([encoded], temp).of_micro_batches
    _, dino, ibot, _ = _encode(method.student, student)
    assert ibot is not None
    assert targets.ibot is not None
    features_VBK = dino.features_NK.unflatten(0, (-1, batch))  # type: ignore[no-untyped-call]
    parts = dino_loss(targets.dino, features_VBK, dino.prototypes_PK, student_temp=student_temp)
    loss = ibot_loss(targets.ibot, *ibot, weight_M, num_views=1, student_temp=student_temp)
    return {"dino_global": parts.global_views, "dino_local": parts.local_views, "ibot": loss}


def _encode(networks: Networks, rows: Rows) -> Encoded:
    assert rows.masked_MD is not None
    return networks.project(rows.cls_ND, rows.cls_ND, rows.masked_MD)


class Backward:
    """Losses and gradients of one variant on the same rows."""

    def __init__(
        self,
        losses: Callable[[Rows, Rows], dict[str, Tensor]],
        parameters: Sequence[Tensor],
        rows: tuple[Rows, Rows],
    ) -> None:
        self._losses, self._rows = losses, rows
        self._leaves = [*parameters, *(t for r in rows for t in r if t is not None)]

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self._leaves:
            leaf.grad = None

    def __call__(self) -> dict[str, float]:
        """Run once, with new gradients."""
        self.clear()
        losses = self._losses(*self._rows)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        return {name: loss.item() for name, loss in losses.items()}


def _variants(setting: Setting, device: Device, *, is_tiny: bool) -> dict[str, Backward]:
    batch, dtype = setting.batch, setting.dtype
    sizes = ((4, 8, 8), (4, 8, 8))  # of no interest: the backbones do not run
    config = run_config(
        setting.dim,
        depth=1,
        sizes=sizes,
        num_prototypes=setting.num_prototypes,
        hidden_dim=setting.hidden_dim,
        batch=batch,
    )
    state = method_of(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    weight_M = torch.full((setting.num_masked,), 1 / setting.num_masked, device=device)
    temp = torch.full((), VALUES.teacher_temp, device=device)
    counts = [(num_views * batch, setting.num_masked) for num_views in (2, NUM_VIEWS)]
    drawn = [[torch.randn(n, setting.dim, generator=generator) for n in pair] for pair in counts]

    def rows(row_dtype: torch.dtype) -> tuple[Rows, Rows]:
        teacher, student = (
            Rows(*(x.to(device, row_dtype, copy=True) for x in pair)) for pair in drawn
        )
        for tensor in student:
            assert tensor is not None
            tensor.requires_grad_()
        return teacher, student

    def rounded(call: Callable[..., dict[str, Tensor]], *args: Rows) -> dict[str, Tensor]:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return call(*args, weight_M, temp)

    library = Library(config, state, device=device, dtype=dtype)
    recomputing = replace(config, losses=replace(config.losses, recompute_ibot_logits=True))
    lean = Library(recomputing, state, device=device, dtype=dtype)
    eager = Rival(config, state, EAGER, device=device, dtype=dtype)
    plain = Rival(
        config,
        state,
        DINOV3,
        device=device,
        dtype=dtype,
        compiled="blocks" if device == "cuda" and not is_tiny else "no",
    )

    def ours(library: Library) -> Backward:
        losses = partial(rounded, partial(our_head_losses, library.method))
        return Backward(losses, list(library.student.parameters()), rows(torch.float32))

    return {
        OURS: ours(library),
        f"{OURS}, logits recomputed": ours(lean),
        E: Backward(
            partial(rounded, eager.head_losses),
            list(eager.student.parameters()),
            rows(torch.float32),
        ),
        D: Backward(
            partial(plain.head_losses, weight_M=weight_M, temp=temp),
            list(plain.computing.parameters()),
            rows(dtype),
        ),
    }


def _measure(run: Run, setting: Setting, device: Device) -> None:
    calls = _variants(setting, device, is_tiny=run.is_tiny)
    found = {name: call() for name, call in calls.items()}
    errors = {
        name: max(abs(loss / found[D][key] - 1) for key, loss in losses.items())
        for name, losses in found.items()
    }
    if not all(error <= LOSS_ERROR[setting.dtype] for error in errors.values()):
        raise ValueError(f"losses are off D's by {errors}; not timed")
    memory, times = {}, {}
    for name, call in calls.items():
        call.clear()  # or those of the call before would be there already, and not count
        began = time.perf_counter()
        memory[name] = peak_extra_bytes(call, device)
        times[name] = [round((time.perf_counter() - began) * 1e3, 4)] * 3
    # On a CPU a call takes half a minute: one is all.
    rounds = 3 if run.is_tiny else ROUNDS if device == "cuda" else 0
    if rounds:
        times = time_ms(calls, device=device, rounds=rounds)
    rows = (2 + NUM_VIEWS) * setting.batch + 2 * setting.num_masked
    run.write(
        setting.case,
        device,
        times,
        dtype=dtype_name(setting.dtype),
        # Prototypes of four heads read, width 256, gradients of two written, rows read.
        bytes=4 * (6 * 256 * setting.num_prototypes + setting.dim * rows),
        extra_bytes=memory,
        memory_to_dinov3={name: round(memory[name] / memory[D], 4) for name in calls},
        relative_error={name: float(f"{error:.2g}") for name, error in errors.items()},
        verified="losses against D's",
        calls=rounds or 1,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on CUDA where there is a device, else on the CPU."""
    run = start(__file__, SOURCES, argv)
    device = this_device()
    for setting in settings(device, run.is_tiny):
        if run.wants(setting.case, device):
            torch._dynamo.reset()
            with every_graph_compiles():
                _measure(run, setting, device)


if __name__ == "__main__":
    main()

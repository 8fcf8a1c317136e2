"""From dinov3's training step to ours, technique by technique: each one's worth in time and loss.

The first variant is D of ``bench.train``; every next one replaces one part more of its arrangement
by an op of this library, the last is the library's own step. Each technique has a row: its time
beside that of the variant without it and of D, all variants interleaved in one process, and
``loss_difference``: how far its total loss is from D's after 20 steps on the same views from the
same weights, with the largest distance on the way. A technique that computes the same thing may
only be off by rounding, which AdamW magnifies from step to step. Drop path is off.
On a CPU all is float32; with bfloat16 the first technique is the residual stream in float32, under
autocast, where D rounds its weights.

Shape suffixes: T all tokens of all views end to end, D width, K head width, N rows, P prototypes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Device, Run, peak_extra_bytes, start, this_device, time_ms
from bench.train_eager import (
    average_in_one,
    factored_head,
    fused_dino,
    fused_ibot,
    op_embed,
    product_dtype,
    read_together,
    select_then_norm,
    two_vector_targets,
)
from bench.train_rivals import (
    DINOV3,
    EPS,
    Arrangement,
    Compiled,
    Encoder,
    HeadCall,
    MicroBatches,
    Rival,
    Stepper,
    dense_dino,
    dense_ibot,
)
from bench.train_runs import (
    OURS,
    VALUES,
    D,
    Library,
    dtype_name,
    every_graph_compiles,
    least_bytes,
    method_of,
    random_batch,
    run_config,
    tiny_run,
)
from bench.train_runs import SOURCES as SOURCES
from tapct_fast.config import Config
from tapct_fast.model.vit import Vit
from tapct_fast.recipes import debug
from tapct_kernels import (
    SoftTargets,
    attention_varlen,
    layer_norm,
    residual,
    residual_norm,
    sinkhorn,
)

NUM_BATCHES = 4
LEARNING = VALUES._replace(lr=1e-3, last_layer_lr=1e-3)


class Setting(NamedTuple):
    """One waterfall."""

    name: str
    config: Config
    dtype: torch.dtype
    rounds: int
    steps: int = 20  # on which losses are compared


class Technique(NamedTuple):
    """One variant: the arrangement up to and with this technique."""

    name: str
    arrangement: Arrangement
    compiled: Compiled


def settings(device: Device, is_tiny: bool) -> Iterator[Setting]:
    """Yield the waterfalls of a device."""
    if is_tiny:
        yield Setting("tiny", tiny_run(), torch.float32, 3, steps=3)
    elif device == "cuda":
        full = run_config(384, sizes=((12, 224, 224), (12, 96, 96)), batch=32)
        words = "ViT-S, 2x12x224x224 + 8x12x96x96, batch 32"
        yield Setting(words, full, torch.bfloat16, 10)
    else:
        small = run_config(
            384, sizes=((8, 96, 96), (8, 48, 48)), num_local=4, num_prototypes=4096, batch=4
        )
        yield Setting("debug, batch 16", debug(), torch.float32, 10)
        yield Setting("ViT-S, 2x8x96x96 + 4x8x48x48, batch 4", small, torch.float32, 5)


def techniques(dtype: torch.dtype, by_block: Compiled) -> list[Technique]:
    """Return D and what follows it, each with all before it.

    Args:
        dtype: Of the matrix products.
        by_block: Whether blocks and heads are compiled one by one, before the whole step is.
    """
    parts: list[tuple[str, dict[str, Any]]] = [
        ("+ tokens assembled in one op", {"embed": op_embed}),
        ("+ packed tokens", {"encoder": packed_encoder}),
        ("+ norm of used tokens only", {"select": select_then_norm}),
        (
            "+ two-vector Sinkhorn",
            {"center": targets_of_logits, "dino": dino_of_dense, "ibot": ibot_of_dense},
        ),
        (
            "+ fused cross-entropy",
            {
                "head": compilable_head,
                "center": targets_of_features,
                "dino": fused_dino,
                "ibot": fused_ibot,
            },
        ),
        ("+ fused residual and norm", {"encoder": fused_packed_encoder}),
        ("+ average in one pass", {"average": average_in_one}),
        ("+ one read of the device", {"read": read_together}),
    ]
    if dtype != torch.float32:
        parts.insert(0, ("+ residual stream in float32", {"precision": "autocast"}))
    found = [Technique(D, DINOV3, by_block)]
    for name, replaced in parts:
        found.append(Technique(name, found[-1].arrangement._replace(**replaced), by_block))
    if by_block == "blocks":
        found.append(Technique("+ forward compiled as one", found[-1].arrangement, "step"))
    return found


def _pack(x: list[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Return the tokens of every resolution end to end as x_1TD, and the length of each view."""
    lengths = [length for x_NTD in x for length in [x_NTD.shape[1]] * x_NTD.shape[0]]
    return torch.cat([x_NTD.flatten(0, 1) for x_NTD in x]).unsqueeze(0), tuple(lengths)


def _unpack(x_1TD: Tensor, like: list[Tensor]) -> list[Tensor]:
    counts = [x_NTD.shape[0] * x_NTD.shape[1] for x_NTD in like]
    parts = torch.split(x_1TD[0], counts)
    return [part.view(x_NTD.shape) for part, x_NTD in zip(parts, like, strict=True)]


class _PackedBlock(nn.Module):
    """DINOv2's block on packed tokens."""

    def __init__(self, block: Any, head_dim: int) -> None:
        super().__init__()
        self.block, self.head_dim = block, head_dim

    def attend(self, x_1TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        qkv_T3HK = self.block.attn.qkv(x_1TD[0]).unflatten(1, (3, -1, self.head_dim))
        out_THK = attention_varlen(qkv_T3HK, lengths)
        out_TD: Tensor = self.block.attn.proj(out_THK.flatten(1))
        return out_TD.unsqueeze(0)

    def feed(self, x_1TD: Tensor) -> Tensor:
        out_1TD: Tensor = self.block.mlp.fc2(F.gelu(self.block.mlp.fc1(x_1TD)))
        return out_1TD

    def forward(self, x_1TD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        block = self.block
        x_1TD = x_1TD + self.attend(block.norm1(x_1TD), lengths) * block.ls1.gamma
        out_1TD: Tensor = x_1TD + self.feed(block.norm2(x_1TD)) * block.ls2.gamma
        return out_1TD


class _FusedBlock(nn.Module):
    """The same, each branch ending in one pass that also norms for the next one."""

    def __init__(self, block: Any, head_dim: int, next_norm: nn.Module | None) -> None:
        super().__init__()
        self.plain, self.next_norm = _PackedBlock(block, head_dim), next_norm

    def forward(
        self, x_1TD: Tensor, normed_1TD: Tensor, lengths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        block = self.plain.block
        branch_1TD = self.plain.attend(normed_1TD, lengths)
        x_1TD, normed_1TD = _add(x_1TD, branch_1TD, block.ls1.gamma, block.norm2)
        branch_1TD = self.plain.feed(normed_1TD)
        if self.next_norm is None:
            return residual(x_1TD, branch_1TD, block.ls2.gamma), normed_1TD
        return _add(x_1TD, branch_1TD, block.ls2.gamma, self.next_norm)


def _add(
    x_1TD: Tensor, branch_1TD: Tensor, gamma_D: Tensor | None, norm: Any
) -> tuple[Tensor, Tensor]:
    operands = (x_1TD, branch_1TD, gamma_D, norm.weight, norm.bias)
    return residual_norm(*operands, eps=EPS, dtype=product_dtype(x_1TD))


def packed_encoder(vit: Vit, drop_path: float, compiles: bool) -> Encoder:
    """Run DINOv2's blocks on all resolutions at once."""
    assert not drop_path
    blocks = [_PackedBlock(block, vit.config.head_dim) for block in vit.blocks]
    _compile_each(blocks, compiles)

    def encode(x: list[Tensor], drop_seed: int | None) -> list[Tensor]:
        assert drop_seed is None
        x_1TD, lengths = _pack(x)
        for block in blocks:
            x_1TD = block(x_1TD, lengths)
        return _unpack(x_1TD, x)

    return encode


def fused_packed_encoder(vit: Vit, drop_path: float, compiles: bool) -> Encoder:
    """Run blocks of fused ops on all resolutions at once."""
    assert not drop_path
    norms: list[Any] = [block.norm1 for block in vit.blocks]
    blocks = [
        _FusedBlock(block, vit.config.head_dim, following)
        for block, following in zip(vit.blocks, [*norms[1:], None], strict=True)
    ]
    _compile_each(blocks, compiles)

    def encode(x: list[Tensor], drop_seed: int | None) -> list[Tensor]:
        assert drop_seed is None
        x_1TD, lengths = _pack(x)
        first, dtype = norms[0], product_dtype(x_1TD)
        normed_1TD = layer_norm(x_1TD, first.weight, first.bias, eps=EPS, dtype=dtype)
        for block in blocks:
            x_1TD, normed_1TD = block(x_1TD, normed_1TD, lengths)
        return _unpack(x_1TD, x)

    return encode


def _compile_each(blocks: Sequence[nn.Module], compiles: bool) -> None:
    if compiles:
        for block in blocks:
            block.compile(dynamic=False)


def targets_of_logits(outs: list[Any], temp: Tensor, compiles: bool) -> list[Any]:
    """Balance stored logits without writing to them."""
    del compiles  # an op
    return list(sinkhorn(outs, temp))


def targets_of_features(outs: list[Any], temp: Tensor, compiles: bool) -> list[Any]:
    """Balance the logits of features and prototypes."""
    del compiles  # an op
    return two_vector_targets(outs, temp, False)


def dino_of_dense(
    targets: SoftTargets, logits_SP: Tensor, num_views: int, temp: float
) -> tuple[Tensor, Tensor]:
    """Return D's DINO loss, of targets made dense."""
    return dense_dino(targets.dense(), logits_SP, num_views, temp)


def ibot_of_dense(targets: SoftTargets, logits_MP: Tensor, weight_M: Tensor, temp: float) -> Tensor:
    """Return D's iBOT loss, of targets made dense."""
    return dense_ibot(targets.dense(), logits_MP, weight_M, temp)


class _FactoredHead(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self._call = factored_head(head, False)

    def forward(self, x_ND: Tensor) -> Any:
        return self._call(x_ND)


def compilable_head(head: nn.Module, compiles: bool) -> HeadCall:
    """Return a head to features and prototypes."""
    module = _FactoredHead(head)
    _compile_each([module], compiles)
    return module


class Curve:
    """A variant's next step on the same views in turn, and the total losses so far."""

    def __init__(self, stepper: Stepper, batches: Sequence[MicroBatches]) -> None:
        self.stepper = stepper
        self.totals: list[float] = []
        self._batches = cycle(batches)

    def __call__(self) -> None:
        """Do one step."""
        self.totals.append(self.stepper.step(next(self._batches), LEARNING)["total"])


def _difference(curve: Curve, reference: Curve, steps: int) -> dict[str, float]:
    apart = [a - b for a, b in zip(curve.totals, reference.totals, strict=False)][:steps]
    largest = max(map(abs, apart))
    return {"last": float(f"{apart[-1]:.2g}"), "largest": float(f"{largest:.2g}")}


def _measure(run: Run, setting: Setting, device: Device) -> None:
    config = replace(setting.config, vit=replace(setting.config.vit, drop_path=0.0))
    found = techniques(setting.dtype, "no" if run.is_tiny else "blocks")
    cases = {name: f"{name}, {setting.name}" for name in [*(t.name for t in found[1:]), OURS]}
    wanted = [name for name, case in cases.items() if run.wants(case, device)]
    if not wanted:
        return
    state = method_of(config).state_dict()
    batches = [[(random_batch(config, seed, device), seed)] for seed in range(NUM_BATCHES)]
    build: dict[str, Callable[[], Stepper]] = {
        t.name: partial(
            Rival, config, state, t.arrangement, device=device, dtype=setting.dtype,
            compiled=t.compiled,
        )
        for t in found
    }  # fmt: skip
    build[OURS] = partial(Library, config, state, device=device, dtype=setting.dtype)
    curves = {}
    for name, make in build.items():
        curves[name] = Curve(make(), batches)
        for _ in range(setting.steps):
            curves[name]()
    times = time_ms(curves, device=device, rounds=setting.rounds)
    memory = {name: peak_extra_bytes(curve, device) for name, curve in curves.items()}
    names = list(build)
    moved = least_bytes(batches[0][0][0], curves[OURS].stepper)
    for name in wanted:
        before = names[names.index(name) - 1]
        shown = dict.fromkeys((name, before, D))
        run.write(
            cases[name],
            device,
            {variant: times[variant] for variant in shown},
            dtype=dtype_name(setting.dtype),
            bytes=moved,
            speed_up={
                "over the one before": round(times[before][1] / times[name][1], 3),
                "over D": round(times[D][1] / times[name][1], 3),
            },
            extra_bytes={variant: memory[variant] for variant in shown},
            loss_difference=_difference(curves[name], curves[D], setting.steps),
            loss_of_D=round(curves[D].totals[setting.steps - 1], 4),
            steps=setting.steps,
            verified="total losses against D's, see loss_difference",
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on CUDA where there is a device, else on the CPU."""
    run = start(__file__, SOURCES, argv)
    device = this_device()
    for setting in settings(device, run.is_tiny):
        torch._dynamo.reset()
        with every_graph_compiles():
            _measure(run, setting, device)


if __name__ == "__main__":
    main()

"""Whole forward passes of the backbone, beside the released behaviour and the best made by hand.

Rivals by formula (``bench.backbone_rivals``), with the same weights on the same input: R attends
explicitly in float32; S is the fused operator in bfloat16, weights and activations, compiled with
max-autotune, on a CPU also with frozen weights. Ours is ``Backbone`` in the default precision of
the device and, on a CPU, in float32. LayerScale is drawn near one, so that every branch counts.

All tokens of the first volume are held to float64 before a row is written: ours to 1e-5 relative
in float32 and to a cosine of 0.9995 per token in bfloat16; ``agreement`` holds every variant's
relative error and smallest cosine. A whole pass over 64 slices is held to our float32, and 100,000
tokens to float64 on 64 rows of the last block.

One block has the peak memory of twelve: each frees what it needed. R is measured in one at 64
slices. On CUDA ``mfu`` is of 989.5 TFLOP/s nominal (H100, H200), and ``extra_bytes`` leaves out
what the CUDA graphs of S keep. On a CPU ``cpu_ms`` is the median CPU time of a call, over threads.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backbone_rivals import Forward, chunked, compiled, explicit, fused, plain_vit
from bench.harness import (
    WARM_UP,
    Device,
    Run,
    Work,
    floor_ms,
    peak_extra_bytes,
    start,
    this_device,
    time_ms,
)
from tapct_fast.backbone.backbone import Backbone, BackboneOutput, Precision, best_precision
from tapct_fast.backbone.load import default_preprocess
from tapct_fast.config import VitConfig, Zyx
from tapct_fast.model.presets import DIM_B, DIM_S
from tapct_fast.model.vit import Vit
from tapct_kernels import choose_backend

SOURCES = [
    *("csrc/vit_ops.cpp", "csrc/attention_avx.cpp", "csrc/team.cpp", "bench/backbone_rivals.py"),
    *(f"tapct_fast/model/{name}.py" for name in ("frozen", "cpu_ops", "vit", "block")),
    "kernels/tapct_kernels/attention.py",
]
NOMINAL_TFLOPS = 989.5  # bfloat16, dense: NVIDIA's sheets of H100 SXM and H200
FP32_ERROR, BF16_COSINE = 1e-5, 0.9995  # ours
RIVAL_COSINE = 0.99  # below, a rival computes something else
PLANE = (224, 224)


class Clocked:
    """A call that notes the CPU time of the process, which other programs disturb less."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.cpu_ms: list[float] = []

    def __call__(self) -> None:
        """Run."""
        began = time.process_time()
        self._call()
        self.cpu_ms.append((time.process_time() - began) * 1e3)

    def median(self) -> float:
        """Return the median over all but the first rounds."""
        return round(median(self.cpu_ms[WARM_UP:]), 2)


class Setting(NamedTuple):
    """One row.

    Attributes:
        name: Of the model.
        dim: Width.
        size_zyx: Of a volume, in voxels.
        batch: Volumes.
        depth: Blocks.
        threads: On a CPU.
        rivals: Which of R and S run.
        reference: float64 on all rows or on some, or our float32.
        rounds: 0 for a single call.
    """

    name: str
    dim: int
    size_zyx: Zyx
    batch: int = 1
    depth: int = 12
    threads: int = 2
    rivals: str = "RS"
    reference: Literal["all rows", "some rows", "our float32"] = "all rows"
    rounds: int = 5

    @property
    def case(self) -> str:
        """Name of the row."""
        blocks = "" if self.depth > 1 else ", one block"
        return f"{self.name}{blocks}, {self.batch}x{'x'.join(map(str, self.size_zyx))}"


CPU = [
    Setting("B-3D", DIM_B, (12, *PLANE)),
    Setting("B-3D", DIM_B, (12, *PLANE), threads=1, rounds=3),
    Setting("S-3D", DIM_S, (12, *PLANE)),
    Setting("B-3D", DIM_B, (64, *PLANE), depth=1, rounds=3),
    Setting("B-3D", DIM_B, (64, *PLANE), rivals="S", reference="our float32", rounds=3),
    Setting(*("B-3D", DIM_B, (512, *PLANE)), depth=1, rivals="S", reference="some rows", rounds=0),
]
CUDA = [
    Setting("B-3D", DIM_B, (12, *PLANE), batch=32, rounds=20),
    Setting("S-3D", DIM_S, (12, *PLANE), batch=64, rounds=20),
    Setting("B-3D", DIM_B, (180, *PLANE), rounds=10),
]


def tiny(setting: Setting) -> Setting:
    """Return a setting of the same paths for tests."""
    z, _, _ = setting.size_zyx
    return setting._replace(
        dim=setting.dim // 6,
        size_zyx=(8 if z == 12 else 4, 16, z // 2 // 8 * 8 or 16),
        batch=min(2, setting.batch),
        depth=min(2, setting.depth),
        rounds=min(3, setting.rounds),
    )


@torch.no_grad()
def drawn_vit(config: VitConfig, device: Device) -> Vit:
    """Return a Vit no parameter of which is at a value that hides a mistake."""
    vit = Vit(config)
    vit.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in vit.named_parameters():
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            nn.init.normal_(weight, 1.0, 0.2, generator=generator)
        elif weight.std() < 0.01:  # zeros, and tokens that a norm would magnify
            nn.init.normal_(weight, 0.0, 0.02, generator=generator)
    return vit.eval().to(device)


def tokens_of(out: Any) -> Tensor:
    """Return tokens_TD of the first volume in float64."""
    if isinstance(out, BackboneOutput):
        parts = (out.pooler_output[:1, None], out.registers[:1], out.last_hidden_state[:1])
        return torch.cat(parts, dim=1)[0].double()
    tokens_BTD: Tensor = out
    return tokens_BTD[0].double()


def agreement(
    calls: Mapping[str, Callable[[], Any]], expected_QD: Tensor, rows_Q: Tensor | None
) -> dict[str, dict[str, float]]:
    """Return relative error and smallest cosine per token of every variant.

    Raises:
        ValueError: One is further away than its kind may be: nothing to time.
    """
    found = {}
    for name, call in calls.items():
        tokens_QD = tokens_of(call())
        if rows_Q is not None:
            tokens_QD = tokens_QD[rows_Q]
        error = float((tokens_QD - expected_QD).norm() / expected_QD.norm())
        cosine = float(F.cosine_similarity(tokens_QD, expected_QD, dim=-1).min())
        if name == "tapct fp32":
            is_right = error <= FP32_ERROR
        else:
            is_right = cosine >= (BF16_COSINE if name.startswith("tapct") else RIVAL_COSINE)
        if not is_right:  # so that NaN fails
            raise ValueError(f"{name} is off by {error:.2g}, cosine {cosine:.6f}; not timed")
        found[name] = {
            "relative_error": float(f"{error:.2g}"),
            "smallest_cosine": round(cosine, 6),
        }
    return found


def _ours(vit: Vit, device: Device, *, is_tiny: bool) -> dict[str, Forward]:
    best = best_precision(torch.device(device))
    preprocess = default_preprocess(vit.config)

    def backbone(precision: Precision, *, compile: bool = False) -> Forward:
        return Backbone(vit, preprocess, precision=precision, compile=compile).eval()

    ours: dict[str, Forward] = {f"tapct {best}": backbone(best)}
    if device == "cpu":
        ours.setdefault("tapct fp32", backbone("fp32"))
    elif not is_tiny:
        ours[f"tapct {best}, compiled"] = backbone(best, compile=True)
    return ours


def _obstacle_to_explicit(setting: Setting, num_tokens: int, device: Device) -> str | None:
    """Say why R does not run here, or None: scores and weights are in memory at once."""
    if device == "cpu":
        return None
    scores = 4 * setting.batch * setting.dim // 64 * num_tokens**2
    free, _ = torch.cuda.mem_get_info()
    if 2.2 * scores < free:
        return None
    return f"scores and weights of {2 * scores / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def _expected(
    setting: Setting, vit: Vit, x_BCZYX: Tensor, ours_fp32: Forward | None
) -> tuple[Tensor, Tensor | None]:
    """Return the first volume's tokens, and which rows they are where not all."""
    if setting.reference == "our float32":
        assert ours_fp32 is not None
        return tokens_of(ours_fp32(x_BCZYX[:1])), None
    exact = plain_vit(vit.config, vit.state_dict(), chunked, torch.float64)
    rows_Q = None
    if setting.reference == "some rows":
        num_tokens = _num_tokens(vit.config, setting.size_zyx)
        rows_Q = torch.linspace(0, num_tokens - 1, 64, device=x_BCZYX.device).long()
    return tokens_of(exact(x_BCZYX[:1].double(), rows_Q)), rows_Q


def _num_tokens(config: VitConfig, size_zyx: Zyx) -> int:
    sizes = zip(size_zyx, config.patch_zyx, strict=True)
    return 1 + config.num_registers + math.prod(size // patch for size, patch in sizes)


def _flops(config: VitConfig, num_tokens: int) -> int:
    """Return those of the matrix products of one volume."""
    tokens, dim = num_tokens, config.dim
    block = 24 * tokens * dim**2 + 4 * tokens**2 * dim
    patches = tokens - 1 - config.num_registers
    return config.depth * block + 2 * patches * math.prod(config.patch_zyx) * dim


@torch.no_grad()
def _measure(run: Run, setting: Setting, device: Device) -> None:
    words = f", {setting.threads} thread{'s' * (setting.threads > 1)}" if device == "cpu" else ""
    case = setting.case + words
    if not run.wants(case, device):
        return
    if device == "cpu":
        torch.set_num_threads(setting.threads)
    torch._dynamo.reset()
    config = VitConfig(dim=setting.dim, depth=setting.depth, drop_path=0.0)
    vit = drawn_vit(config, device)
    num_tokens = _num_tokens(config, setting.size_zyx)
    generator = torch.Generator().manual_seed(2)
    shape = (setting.batch, 1, *setting.size_zyx)
    x_BCZYX = torch.randn(shape, generator=generator).clamp(-2.5, 2.5).to(device)
    ours = _ours(vit, device, is_tiny=run.is_tiny)
    expected_QD, rows_Q = _expected(setting, vit, x_BCZYX, ours.get("tapct fp32"))

    calls: dict[str, Callable[[], Any]] = {
        name: partial(forward, x_BCZYX)
        for name, forward in ours.items()
        # Where R does not run, a call takes minutes, and its error is known from other rows.
        if name != "tapct fp32" or "R" in setting.rivals or len(ours) == 1
    }
    absent = {}
    if "R" not in setting.rivals:
        absent["R"] = "measured in one block of 64 slices"
    elif reason := _obstacle_to_explicit(setting, num_tokens, device):
        absent["R"] = reason
    else:
        released = plain_vit(config, vit.state_dict(), explicit, torch.float32)
        calls["R"] = partial(released, x_BCZYX)
    by_hand = plain_vit(config, vit.state_dict(), fused, torch.bfloat16)
    forms: Mapping[str, Forward] = {"S, not compiled": by_hand}
    if not run.is_tiny and setting.rounds:
        forms = compiled(by_hand, device, setting.threads)
    calls |= {name: partial(form, x_BCZYX.bfloat16()) for name, form in forms.items()}

    values: dict[str, Any] = {}
    if setting.rounds:
        errors = agreement(calls, expected_QD, rows_Q)
        clocked = {name: Clocked(call) for name, call in calls.items()}
        times = time_ms(clocked, device=device, rounds=setting.rounds)
        if device == "cpu":
            values["cpu_ms"] = {name: call.median() for name, call in clocked.items()}
        memory = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
    else:
        times, memory, errors = _once(calls, device, expected_QD, rows_Q)
    flops = setting.batch * _flops(config, num_tokens)
    weights = sum(2 * weight.numel() for weight in vit.parameters())
    moved = x_BCZYX.nbytes + weights + 4 * setting.batch * num_tokens * config.dim
    dtype = torch.bfloat16 if next(iter(ours)) == "tapct bf16" else torch.float32
    floor = floor_ms(device, Work({}, [], 0.0, moved, dtype, flops))
    if floor and setting.threads == 2:
        values["floor_ms"] = floor
    if device == "cuda":
        values["nominal_tflops"] = NOMINAL_TFLOPS
        values["mfu"] = {
            name: round(flops / p50 / 1e9 / NOMINAL_TFLOPS, 4)
            for name, (_, p50, _) in times.items()
        }
    first = next(iter(times))
    run.write(
        case,
        device,
        times,
        dtype=str(dtype).removeprefix("torch."),
        bytes=moved,
        flops=flops,
        tokens=num_tokens,
        volumes_per_s={
            name: round(setting.batch / p50 * 1e3, 3) for name, (_, p50, _) in times.items()
        },
        ratio_to_ours={
            name: round(p50 / times[first][1], 3) for name, (_, p50, _) in times.items()
        },
        extra_bytes=memory,
        agreement=errors,
        verified=f"tokens of the first volume against {_words(setting)}",
        backend=str(choose_backend(device, dtype, config.head_dim, needs_grad=False)),
        absent=absent,
        calls=setting.rounds or 1,
        **values,
    )


def _words(setting: Setting) -> str:
    return setting.reference if "our" in setting.reference else f"float64, {setting.reference}"


def _once(
    calls: Mapping[str, Callable[[], Any]],
    device: Device,
    expected_QD: Tensor,
    rows_Q: Tensor | None,
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, dict[str, float]]]:
    """Take time, peak of memory and agreement from one call of each, half a minute long."""
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    errors: dict[str, dict[str, float]] = {}
    for name, call in calls.items():
        outs: list[Any] = []

        def keep(call: Callable[[], Any] = call, outs: list[Any] = outs) -> None:
            outs.append(call())

        began = time.perf_counter()
        memory[name] = peak_extra_bytes(keep, device)
        times[name] = [round((time.perf_counter() - began) * 1e3, 4)] * 3
        errors |= agreement({name: outs.pop}, expected_QD, rows_Q)
    return times, memory, errors


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on CUDA where there is a device, else on two cores and on one."""
    run = start(__file__, SOURCES, argv)
    device = this_device()
    num_threads = torch.get_num_threads()
    for setting in CUDA if device == "cuda" else CPU:
        _measure(run, tiny(setting) if run.is_tiny else setting, device)
    torch.set_num_threads(num_threads)


if __name__ == "__main__":
    main()

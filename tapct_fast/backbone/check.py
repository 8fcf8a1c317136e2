"""Hold a backbone to its definition on this machine: every precision, every attention backend.

``define_tokens`` is the definition: DINOv2's forward pass written out in plain PyTorch, with an
explicit softmax, from the same weights. It shares no code with ``Vit`` and ``FrozenVit``, which are
compared with it on a synthetic scan. The report holds no path and no patient's data, so that it can
be shown to others.

Shape suffixes: B batch, C channels (one), Z Y X voxels or tokens, P voxels of a patch, L patch
tokens in z, y, x order, T = 1 + R + L tokens in the order cls, registers, patches, D width, H
heads, K head width, S some of the T.
"""

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tapct_fast.backbone.backbone import DTYPES, Backbone, Precision, best_precision
from tapct_fast.backbone.describe import describe, sizes_text
from tapct_fast.backbone.load import find_files, load_backbone
from tapct_fast.config import VitConfig
from tapct_fast.data.phantom import make_phantom
from tapct_fast.errors import BackboneError, InputError
from tapct_fast.io.atomic import write_json
from tapct_kernels import try_backends
from tapct_kernels.attention import BackendName

MAX_FP32_ERROR = 1e-5  # Frobenius norm of the difference, relative
MIN_COSINE = 0.9995  # of each token, bf16 and fp16

_PHANTOM_MM_ZYX = (240.0, 264.0, 352.0)  # the body of a phantom fits
_MAX_VOXELS, _MAX_TOKENS = 1 << 27, 1 << 16  # 0.5 GB of float32; the definition takes T**2 time
_MAX_SCORES = 1 << 25  # of the definition at a time: 128 MiB of float32
_MAX_MATH_BYTES = 4 << 30  # of "sdpa math", whose memory grows with T**2
_PATH = re.compile(r"\S*[/\\]\S*")  # an installation's folders can name its user
_TIMED_RUNS, _TIMED_MS = 5, 2000.0  # whichever is reached first, one run at least


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One way to compute the features, compared with the definition; rounded as it is shown.

    Attributes:
        precision: Of the matrix products.
        attention: Its backend.
        version: Of the backend.
        is_default: Whether this is what ``load_backbone`` takes on this device.
        verdict: ``holds``, ``FAILS: why`` or ``not measured: why``.
        relative_error: Frobenius norm of the difference of all tokens over the definition's norm;
            None where it is not finite or not measured, as all that follow.
        min_cosine: Smallest cosine between a token and its definition.
        mean_cosine: Mean of the cosines.
        forward_ms: Median time of a forward pass.
        extra_mib: Most memory that a forward pass takes beyond the weights; None on the CPU.
    """

    precision: Precision
    attention: BackendName
    version: str
    is_default: bool
    verdict: str
    relative_error: float | None = None
    min_cosine: float | None = None
    mean_cosine: float | None = None
    forward_ms: float | None = None
    extra_mib: float | None = None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found.

    Attributes:
        facts: Architecture, hashes, licence, versions, device and input, by name.
        rows: The parity table.
        not_run: Backends that do not run here, with the reason.
    """

    facts: dict[str, str]
    rows: tuple[ParityRow, ...]
    not_run: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """Precision and attention of the rows that break a bound."""
        failed = [row for row in self.rows if row.verdict.startswith("FAILS")]
        return [f"{row.precision} {row.attention}" for row in failed]

    @property
    def holds(self) -> bool:
        """Whether a row was measured and none breaks a bound."""
        return not self.failures and any(row.verdict == "holds" for row in self.rows)


def check_backbone(
    path_or_repo: str | Path,
    *,
    device: str | torch.device = "cpu",
    num_slices: int | None = None,
    revision: str | None = None,
) -> CheckReport:
    """Load a backbone and compare every way to run it with the definition.

    Args:
        path_or_repo: A folder, a ``.safetensors`` file or a hub id; see ``load_backbone``.
        device: Where to run.
        num_slices: Depth of the synthetic scan; None takes the backbone's own.
        revision: Branch, tag or commit of a hub id.

    Raises:
        InputError: Nothing is there, the device does not exist or the scan would be too large.
        BackboneError: The weights or their config are damaged or fit no known architecture.
    """
    files = find_files(path_or_repo, revision)
    backbone = load_backbone(path_or_repo, device=device, precision="fp32", revision=revision)
    pixels_BCZYX = fixed_input(backbone, num_slices)
    facts = {**describe(backbone, files), "input": _input_fact(backbone, pixels_BCZYX)}
    rows, not_run = parity(backbone, pixels_BCZYX)
    return CheckReport(facts, tuple(rows), tuple(not_run))


def fixed_input(backbone: Backbone, num_slices: int | None = None) -> Tensor:
    """Return pixel_values_BCZYX of a phantom in the backbone's own plane, on its device.

    Raises:
        InputError: ``num_slices`` is not positive, or too large for the definition.
    """
    config, preprocess = backbone.vit.config, backbone.preprocess
    if num_slices is not None and num_slices < 1:
        raise InputError(f"--slices {num_slices} is not positive; leave it out for the default")
    plane_yx = preprocess.resize_yx or config.image_zyx[1:]
    size_zyx = (num_slices or config.image_zyx[0], *plane_yx)
    padded_zyx = preprocess.padded_zyx(size_zyx)
    tokens = math.prod(padded_zyx) // math.prod(config.patch_zyx)
    if math.prod(padded_zyx) > _MAX_VOXELS or tokens > _MAX_TOKENS:
        raise InputError(
            f"a scan of {sizes_text(padded_zyx)} voxels ({tokens} tokens) is too large to compare "
            f"with the definition, which takes {_MAX_TOKENS} tokens; give a smaller --slices"
        )
    z, y, x = (mm / size for mm, size in zip(_PHANTOM_MM_ZYX, size_zyx, strict=True))
    phantom = make_phantom(0, shape_zyx=size_zyx, spacing_mm=(z, y, x))
    return preprocess.apply(phantom.volume).to(backbone.device)


def define_tokens(
    state: Mapping[str, Tensor],
    config: VitConfig,
    pixels_BCZYX: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the normed tokens_BTD: the definition of what a backbone computes.

    Args:
        state: Weights under ``Vit``'s names.
        config: Sizes that the weights alone do not tell.
        pixels_BCZYX: Normalised, whole patches along each axis.
        dtype: Of everything; float64 where the definition itself is tested.

    Source: DINOv2 with registers, arXiv:2304.07193 and arXiv:2309.16588.
    """
    w = {name: tensor.detach().to(dtype) for name, tensor in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(x_BTD: Tensor, name: str) -> Tensor:
        qkv_BT3HK = torch.unflatten(linear(f"{name}.qkv", x_BTD), -1, (3, -1, config.head_dim))
        q_BHTK, k_BHTK, v_BHTK = qkv_BT3HK.permute(2, 0, 3, 1, 4)
        # Rows of the softmax are independent: some at a time bound the memory, not the result.
        rows = max(1, _MAX_SCORES // math.prod(k_BHTK.shape[:3]))
        outs = [
            (q_BHSK @ k_BHTK.mT / config.head_dim**0.5).softmax(-1) @ v_BHTK
            for q_BHSK in q_BHTK.split(rows, dim=2)
        ]
        return linear(f"{name}.proj", torch.cat(outs, dim=2).transpose(1, 2).flatten(2))

    def feed(x_BTD: Tensor, name: str) -> Tensor:
        if config.ffn == "swiglu":
            gate, value = linear(f"{name}.w12", x_BTD).chunk(2, dim=-1)
            return linear(f"{name}.w3", gate * gate.sigmoid() * value)
        inner = linear(f"{name}.fc1", x_BTD)
        return linear(f"{name}.fc2", inner * (1 + torch.erf(inner / 2**0.5)) / 2)

    x_BTD = _embed_patches(w, config, pixels_BCZYX.to(dtype))
    for i in range(config.depth):
        block = f"blocks.{i}"
        branch_BTD = attend(norm(f"{block}.norm1", x_BTD), f"{block}.attn")
        x_BTD = x_BTD + branch_BTD * w.get(f"{block}.ls1.gamma", 1.0)
        branch_BTD = feed(norm(f"{block}.norm2", x_BTD), f"{block}.mlp")
        x_BTD = x_BTD + branch_BTD * w.get(f"{block}.ls2.gamma", 1.0)
    return norm("norm", x_BTD)


def _embed_patches(w: Mapping[str, Tensor], config: VitConfig, pixels_BCZYX: Tensor) -> Tensor:
    """Return tokens_BTD before the first block."""
    pz, py, px = config.patch_zyx
    volume_BZYX = pixels_BCZYX[:, 0]
    blocks = volume_BZYX.unfold(1, pz, pz).unfold(2, py, py).unfold(3, px, px)
    grid_zyx = blocks.shape[1:4]
    patches_BLP = blocks.flatten(4).flatten(1, 3)
    patches_BLD = patches_BLP @ w["patch_embed.proj.weight"].flatten(1).T
    position_LD = w["pos_embed"][0, 1:]
    if grid_zyx != config.grid_zyx:
        learned_DZYX = position_LD.T.reshape(-1, *config.grid_zyx)
        resized_DZYX = F.interpolate(learned_DZYX[None], size=grid_zyx, mode="trilinear")[0]
        position_LD = resized_DZYX.flatten(1).T
    patches_BLD = patches_BLD + w["patch_embed.proj.bias"] + position_LD
    prefix = [w["cls_token"] + w["pos_embed"][:, :1]]
    if config.num_registers:
        prefix.append(w["register_tokens"])
    batch = len(pixels_BCZYX)
    return torch.cat([*(part.expand(batch, -1, -1) for part in prefix), patches_BLD], dim=1)


@torch.no_grad()
def parity(backbone: Backbone, pixels_BCZYX: Tensor) -> tuple[list[ParityRow], list[str]]:
    """Compare every precision and attention backend that runs here with the definition.

    Args:
        backbone: Its weights and device count, its precision and attention do not.
        pixels_BCZYX: Normalised, whole patches along each axis, on the backbone's device.

    Returns:
        The rows, and a line for each backend that does not run.
    """
    device, head_dim = backbone.device, backbone.vit.config.head_dim
    expected_BTD = define_tokens(backbone.vit.state_dict(), backbone.vit.config, pixels_BCZYX)
    rows: list[ParityRow] = []
    refused: dict[tuple[str, str], list[str]] = {}
    for precision, dtype in DTYPES.items():
        is_default = precision == best_precision(device)
        for name, version, refusal in try_backends(device.type, dtype, head_dim, False):
            if refusal is not None:
                refused.setdefault((name, refusal), []).append(precision)
                continue
            row = ParityRow(precision, name, version, is_default, "holds")
            rows.append(_held(row, backbone, pixels_BCZYX, expected_BTD))
            is_default = False  # the first that runs is the one that is chosen
    not_run = [
        f"{name} ({', '.join(precisions)}): {reason}"
        for (name, reason), precisions in refused.items()
    ]
    return rows, not_run


def _held(
    row: ParityRow, backbone: Backbone, pixels_BCZYX: Tensor, expected_BTD: Tensor
) -> ParityRow:
    """Return the row with what was measured."""
    tokens, heads = expected_BTD.shape[1], backbone.vit.config.num_heads
    math_bytes = 2 * 4 * heads * tokens**2  # scores and weights, float32
    if row.attention == "sdpa math" and math_bytes > _MAX_MATH_BYTES:
        why = f"its scores take {math_bytes / 1e9:.0f} GB; give a smaller --slices"
        return dataclasses.replace(row, verdict=f"not measured: {why}")
    candidate = Backbone(
        backbone.vit, backbone.preprocess, precision=row.precision, attention=row.attention
    ).eval()
    try:
        start = time.perf_counter()
        out = candidate(pixels_BCZYX)
        first_ms = 1e3 * (time.perf_counter() - start)
        forward_ms, extra_mib = _cost(candidate, pixels_BCZYX, first_ms)
    except BackboneError as error:  # not finite; it says where and why
        return dataclasses.replace(row, verdict=f"FAILS: {error}")
    except torch.OutOfMemoryError:
        why = "out of memory; give a smaller --slices"
        return dataclasses.replace(row, verdict=f"not measured: {why}")
    except RuntimeError as error:  # a kernel that took the trial's size and not this one
        reason = _PATH.sub("...", (str(error).splitlines() or ["nothing said"])[0])
        return dataclasses.replace(row, verdict=f"FAILS: {type(error).__name__}: {reason[:120]}")
    found = [out.pooler_output[:, None], out.registers, out.last_hidden_state]
    found_BTD, wanted_BTD = torch.cat(found, dim=1).double(), expected_BTD.double()
    distance = float((found_BTD - wanted_BTD).norm() / wanted_BTD.norm())
    cosine_BT = F.cosine_similarity(found_BTD, wanted_BTD, dim=-1)
    least, mean = float(cosine_BT.min()), float(cosine_BT.mean())
    if not math.isfinite(distance):
        verdict = "FAILS: a token is not finite, or the definition's"
    elif row.precision == "fp32":
        bound = f"relative error above {MAX_FP32_ERROR:g}"
        verdict = "holds" if distance <= MAX_FP32_ERROR else f"FAILS: {bound}"
    else:
        bound = f"a token's cosine below {MIN_COSINE:g}"
        verdict = "holds" if least >= MIN_COSINE else f"FAILS: {bound}"
    return dataclasses.replace(
        row,
        verdict=verdict,
        relative_error=float(f"{distance:.2g}") if math.isfinite(distance) else None,
        min_cosine=round(least, 6) if math.isfinite(least) else None,
        mean_cosine=round(mean, 6) if math.isfinite(mean) else None,
        forward_ms=float(f"{forward_ms:.3g}"),
        extra_mib=None if extra_mib is None else float(f"{extra_mib:.3g}"),
    )


def _cost(candidate: Backbone, pixels_BCZYX: Tensor, first_ms: float) -> tuple[float, float | None]:
    """Return the median milliseconds and, on CUDA, the most extra MiB of a warm forward pass."""
    device = pixels_BCZYX.device
    if device.type != "cuda":
        # A slow first run is not repeated: beside it, casting the weights takes no time.
        spent_ms = [first_ms] if first_ms > _TIMED_MS else _times_ms(candidate, pixels_BCZYX)
        return statistics.median(spent_ms), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    spent_ms = _times_ms(candidate, pixels_BCZYX)
    extra = torch.cuda.max_memory_allocated(device) - before
    return statistics.median(spent_ms), extra / 2**20


def _times_ms(candidate: Backbone, pixels_BCZYX: Tensor) -> list[float]:
    spent_ms: list[float] = []
    while not spent_ms or (len(spent_ms) < _TIMED_RUNS and sum(spent_ms) < _TIMED_MS):
        start = time.perf_counter()
        candidate(pixels_BCZYX)
        if pixels_BCZYX.is_cuda:
            torch.cuda.synchronize(pixels_BCZYX.device)
        spent_ms.append(1e3 * (time.perf_counter() - start))
    return spent_ms


def _input_fact(backbone: Backbone, pixels_BCZYX: Tensor) -> str:
    size_zyx = pixels_BCZYX.shape[2:]
    patches = math.prod(size_zyx) // math.prod(backbone.vit.config.patch_zyx)
    tokens = backbone.vit.num_prefix + patches
    return f"synthetic phantom, seed 0, {sizes_text(size_zyx)} voxels, {tokens} tokens"


def render(report: CheckReport) -> str:
    """Lay the report out as Markdown that also reads well in a terminal."""
    cells = [["precision", "attention", "relative error", "min cosine", "mean cosine"]]
    cells[0] += ["ms", "extra MiB", "verdict"]
    for row in report.rows:
        attention = f"{row.attention} (default)" if row.is_default else row.attention
        numbers = [
            "-" if value is None else form.format(value)
            for value, form in (
                (row.relative_error, "{:.2g}"),
                (row.min_cosine, "{:.6f}"),
                (row.mean_cosine, "{:.6f}"),
                (row.forward_ms, "{:g}"),
                (row.extra_mib, "{:g}"),
            )
        ]
        cells.append([row.precision, attention, *numbers, row.verdict])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| "
        + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    versions = dict.fromkeys(f"{row.attention} ({row.version})" for row in report.rows)
    return "\n".join(
        [
            *(f"- {name}: {value}" for name, value in report.facts.items()),
            "",
            *lines,
            "",
            "- compared with: the eager float32 definition, explicit softmax, on this device",
            f"- bounds: fp32 relative error <= {MAX_FP32_ERROR:g}; "
            f"bf16, fp16 cosine of every token >= {MIN_COSINE:g}",
            f"- attention: {', '.join(versions)}",
            *(f"- not run: {line}" for line in report.not_run),
            f"- result: {_result(report)}",
        ]
    )


def _result(report: CheckReport) -> str:
    if report.failures:
        return (
            f"FAILS: {', '.join(report.failures)}; choose a row that holds with precision= and "
            "attention=, and report this table"
        )
    return "every bound holds" if report.holds else "nothing was measured"


def write_report(path: Path, report: CheckReport) -> None:
    """Write the report as JSON.

    Raises:
        InputError: The file cannot be written.
    """
    content = {
        "format": "tapct-check",
        "version": 1,
        **dataclasses.asdict(report),
        "holds": report.holds,
    }
    try:
        write_json(path, content)
    except OSError as error:
        raise InputError(f"--json FILE cannot be written: {error.strerror}") from None

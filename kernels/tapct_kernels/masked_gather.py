"""Gather listed patch tokens into a dense buffer of constant size, LayerNorm fused in if wanted.

    row[m] = (x[i] - mean(x[i])) / sqrt(var(x[i]) + eps) * weight + bias,   i = index[m]
    row[m] = x[i]                                                           without weight and bias

index counts patch tokens only, flat over views: n * L + l addresses x[n, R + l].
Shape suffixes: N views, R prefix rows, L patch tokens, T = R + L, D width, M listed tokens,
S partial sums.
Statistics and gradients are float32 (float64 for float64 tokens); rows have x's dtype.
Each token is listed at most once: the backward stores rows where an addition would need atomics or
a sort, so it is deterministic.
Source: LayerNorm, arXiv:1607.06450; the constant number of listed tokens, DINOv3, arXiv:2508.10104.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tapct_kernels.operator import operator
from tapct_kernels.tuning import Config, config_for

# Several rows per program keep several 16-byte loads in flight.
FORWARD_CONFIGS: tuple[Config, ...] = (
    {"BLOCK_M": 4, "num_warps": 4},
    {"BLOCK_M": 2, "num_warps": 4},
    {"BLOCK_M": 1, "num_warps": 1},
)
BACKWARD_CONFIGS: tuple[Config, ...] = (
    {"BLOCK_M": 4, "num_warps": 4},
    {"BLOCK_M": 2, "num_warps": 4},
    {"BLOCK_M": 4, "num_warps": 8},
)


def _check(
    x_NTD: Tensor, index_M: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, num_prefix: int
) -> None:
    if (weight_D is None) != (bias_D is None):
        raise ValueError("masked_gather: weight and bias come together or not at all")
    norm = [t for t in (weight_D, bias_D) if t is not None]
    if x_NTD.ndim != 3 or any(t.shape != x_NTD.shape[-1:] for t in norm):
        shapes = [tuple(t.shape) for t in (x_NTD, *norm)]
        raise ValueError(f"masked_gather: x, weight and bias have shapes {shapes}")
    if index_M.ndim != 1 or index_M.dtype != torch.int64:
        kind = f"{index_M.dtype} of {index_M.ndim} dimensions"
        raise ValueError(f"masked_gather: index is {kind}, not int64 of 1")
    if not 0 <= num_prefix < x_NTD.shape[1]:
        rows = x_NTD.shape[1]
        raise ValueError(f"masked_gather: num_prefix={num_prefix} leaves no patch of {rows} rows")


def _listed_rows(x_NTD: Tensor, index_M: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Return the flat row numbers and the rows."""
    T = x_NTD.shape[1]
    L = T - num_prefix
    row_M = index_M // L * T + num_prefix + index_M % L
    return row_M, x_NTD.reshape(-1, x_NTD.shape[2]).index_select(0, row_M)


def _sum_dtype(x_NTD: Tensor) -> torch.dtype:
    return torch.promote_types(x_NTD.dtype, torch.float32)


def masked_gather_ref(
    x_NTD: Tensor, index_M: Tensor, weight_D: Tensor | None, bias_D: Tensor | None,
    num_prefix: int, eps: float,
) -> Tensor:  # fmt: skip
    """Eager definition; tests hold the kernel to it and benches compare with it."""
    _, x_MD = _listed_rows(x_NTD, index_M, num_prefix)
    if weight_D is None or bias_D is None:
        return x_MD
    x_MD = x_MD.to(_sum_dtype(x_NTD))
    weight_D, bias_D = weight_D.to(x_MD.dtype), bias_D.to(x_MD.dtype)
    return F.layer_norm(x_MD, weight_D.shape, weight_D, bias_D, eps).to(x_NTD.dtype)


@triton.jit
def _forward_kernel(
    x_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr,
    M, L, D, R, eps, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (m < M) & (d < D)
    i = tl.load(index_ptr + m, mask=m < M, other=0).to(tl.int32)  # 64-bit divisions are calls
    row = (i // L * (R + L) + R + i % L).to(tl.int64)
    x = tl.load(x_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        centred = tl.where(d < D, x - tl.sum(x, axis=1)[:, None] / D, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / D + eps)
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        x = centred * rstd * weight + bias
    tl.store(out_ptr + m * D + d, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, index_ptr, weight_ptr, grad_x_ptr, weight_SD_ptr, bias_SD_ptr,
    M, L, D, R, eps, num_tiles, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        weight_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        bias_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in range(split, num_tiles, tl.num_programs(0)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
        inside = (m < M) & (d < D)
        i = tl.load(index_ptr + m, mask=m < M, other=0).to(tl.int32)
        row = (i // L * (R + L) + R + i % L).to(tl.int64)
        g = tl.load(grad_ptr + m * D + d, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            x = tl.load(x_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
            # The statistics are recomputed: the row is read anyway, and nothing has to be saved.
            centred = tl.where(d < D, x - tl.sum(x, axis=1)[:, None] / D, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / D + eps)
            normed = centred * rstd
            scaled = g * weight
            mean = tl.sum(scaled, axis=1)[:, None] / D
            along = tl.sum(scaled * normed, axis=1)[:, None] / D
            weight_sum += g * normed
            bias_sum += g
            g = (scaled - mean - normed * along) * rstd
        tl.store(grad_x_ptr + row * D + d, g.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is not None:
        at = split * D + d
        tl.store(weight_SD_ptr + at, tl.sum(weight_sum, axis=0)[None, :], mask=d < D)
        tl.store(bias_SD_ptr + at, tl.sum(bias_sum, axis=0)[None, :], mask=d < D)


def _compact(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _forward_triton(
    x_NTD: Tensor, index_M: Tensor, weight_D: Tensor | None, bias_D: Tensor | None,
    num_prefix: int, eps: float,
) -> Tensor:  # fmt: skip
    _check(x_NTD, index_M, weight_D, bias_D, num_prefix)
    if x_NTD.dtype == torch.float64:  # for verification only: the kernels sum in float32
        return masked_gather_ref(x_NTD, index_M, weight_D, bias_D, num_prefix, eps)
    (M,), (_, T, D) = index_M.shape, x_NTD.shape
    out_MD = x_NTD.new_empty(M, D)
    if M == 0:
        return out_MD
    config = config_for("masked_gather.forward", D, FORWARD_CONFIGS)
    _forward_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
        *_compact(x_NTD, index_M, weight_D, bias_D),
        *(out_MD, M, T - num_prefix, D, num_prefix, eps),
        BLOCK_D=triton.next_power_of_2(D),
        **config,
    )
    return out_MD


def _backward_triton(
    grad_MD: Tensor, x_NTD: Tensor, index_M: Tensor, weight_D: Tensor | None, num_prefix: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if x_NTD.dtype == torch.float64:  # as in the forward
        return _backward_ref(grad_MD, x_NTD, index_M, weight_D, num_prefix, eps)
    (M,), (_, T, D) = index_M.shape, x_NTD.shape
    config = config_for("masked_gather.backward", D, BACKWARD_CONFIGS)
    num_tiles = triton.cdiv(M, config["BLOCK_M"])
    splits = max(1, min(num_tiles, 256))  # two programs per multiprocessor of an H200
    grad_x_NTD = torch.zeros_like(x_NTD, memory_format=torch.contiguous_format)
    weight_SD = x_NTD.new_empty(splits if weight_D is not None else 0, D, dtype=torch.float32)
    bias_SD = torch.empty_like(weight_SD)
    _backward_kernel[(splits,)](
        *_compact(grad_MD, x_NTD, index_M, weight_D),
        *(grad_x_NTD, weight_SD, bias_SD, M, T - num_prefix, D, num_prefix, eps, num_tiles),
        BLOCK_D=triton.next_power_of_2(D),
        **config,
    )
    return grad_x_NTD, weight_SD.sum(0), bias_SD.sum(0)


@operator("tapct::masked_gather")
def masked_gather(
    x_NTD: Tensor, index_M: Tensor, weight_D: Tensor | None, bias_D: Tensor | None,
    num_prefix: int, eps: float,
) -> Tensor:  # fmt: skip
    """Return the listed patch tokens or their LayerNorm; Triton on CUDA, eager elsewhere.

    Args:
        x_NTD: Tokens before the final norm, ``num_prefix`` rows (cls, registers) first.
        index_M: int64, flat into N * L patch tokens, each at most once.
        weight_D: LayerNorm weight; None for the tokens as they are.
        bias_D: LayerNorm bias; None with ``weight_D``.
        num_prefix: Rows of ``x_NTD`` in front of the patches.
        eps: Added to the variance.

    Returns:
        rows_MD in the order of ``index_M``.

    Raises:
        ValueError: A shape or dtype does not fit the others.
    """
    _check(x_NTD, index_M, weight_D, bias_D, num_prefix)
    return masked_gather_ref(x_NTD, index_M, weight_D, bias_D, num_prefix, eps)


masked_gather.register_kernel("cuda")(_forward_triton)


@masked_gather.register_fake
def _(
    x_NTD: Tensor, index_M: Tensor, weight_D: Tensor | None, bias_D: Tensor | None,
    num_prefix: int, eps: float,
) -> Tensor:  # fmt: skip
    _check(x_NTD, index_M, weight_D, bias_D, num_prefix)
    return x_NTD.new_empty(index_M.shape[0], x_NTD.shape[2])


def _backward_ref(
    grad_MD: Tensor, x_NTD: Tensor, index_M: Tensor, weight_D: Tensor | None, num_prefix: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    row_M, x_MD = _listed_rows(x_NTD, index_M, num_prefix)
    grad_x_NTD = torch.zeros_like(x_NTD, memory_format=torch.contiguous_format)
    if weight_D is None:
        grad_x_NTD.flatten(0, 1).index_copy_(0, row_M, grad_MD)
        nothing_D = x_NTD.new_zeros(x_NTD.shape[2], dtype=_sum_dtype(x_NTD))
        return grad_x_NTD, nothing_D, nothing_D.clone()
    x_MD = x_MD.to(_sum_dtype(x_NTD))
    centred_MD = x_MD - x_MD.mean(1, keepdim=True)
    rstd_M1 = (centred_MD.square().mean(1, keepdim=True) + eps).rsqrt()
    normed_MD = centred_MD * rstd_M1
    grad_MD = grad_MD.to(x_MD.dtype)
    scaled_MD = grad_MD * weight_D.to(x_MD.dtype)
    along_M1 = (scaled_MD * normed_MD).mean(1, keepdim=True)
    grad_x_MD = (scaled_MD - scaled_MD.mean(1, keepdim=True) - normed_MD * along_M1) * rstd_M1
    grad_x_NTD.flatten(0, 1).index_copy_(0, row_M, grad_x_MD.to(x_NTD.dtype))
    return grad_x_NTD, (grad_MD * normed_MD).sum(0), grad_MD.sum(0)


@operator("tapct::masked_gather_backward")
def masked_gather_backward(
    grad_MD: Tensor, x_NTD: Tensor, index_M: Tensor, weight_D: Tensor | None, num_prefix: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x_NTD in its dtype and of weight_D and bias_D in the sum dtype."""
    return _backward_ref(grad_MD, x_NTD, index_M, weight_D, num_prefix, eps)


masked_gather_backward.register_kernel("cuda")(_backward_triton)


@masked_gather_backward.register_fake
def _(
    grad_MD: Tensor, x_NTD: Tensor, index_M: Tensor, weight_D: Tensor | None, num_prefix: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weight_like_D = x_NTD.new_empty(x_NTD.shape[2], dtype=_sum_dtype(x_NTD))
    grad_x_NTD = torch.empty_like(x_NTD, memory_format=torch.contiguous_format)
    return grad_x_NTD, weight_like_D, torch.empty_like(weight_like_D)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_NTD, index_M, weight_D, bias_D, num_prefix, eps = inputs
    ctx.save_for_backward(x_NTD, index_M, weight_D)
    ctx.num_prefix, ctx.eps = num_prefix, eps
    ctx.bias_dtype = None if bias_D is None else bias_D.dtype


def _backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
    x_NTD, index_M, weight_D = ctx.saved_tensors
    grad_x_NTD, weight, bias = masked_gather_backward(
        grad_MD, x_NTD, index_M, weight_D, ctx.num_prefix, ctx.eps
    )
    if weight_D is None:
        return grad_x_NTD, None, None, None, None, None
    return grad_x_NTD, None, weight.to(weight_D.dtype), bias.to(ctx.bias_dtype), None, None


masked_gather.register_autograd(_backward, setup_context=_save_for_backward)

"""Residual branch, LayerScale, drop path's rows and the next LayerNorm in one pass over the tokens.

    out[n]    = x[n] + scale * gamma * branch[k]   where index[k] = n; samples not listed are copied
    normed[j] = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias,   y = out[next_index[j]]

Three public functions, one op: ``residual_norm`` does both lines, ``residual`` the first,
``layer_norm`` the second. A sample is one row of the batch with all its tokens; an index lists
samples, each at most once, and None lists all in order.
Shape suffixes: N samples, T tokens of a sample, D width, K samples with a branch, J samples whose
norm is wanted, S partial sums, 3 gradients (gamma, weight, bias).
Sums, statistics and gradients of parameters are float32 (float64 for float64 tokens); out has x's
dtype, normed the one asked for. The backward keeps out, branch and the parameters, recomputes mean
and deviation (the row is read anyway), and adds up parameters' gradients per program, then over
programs, always in the same order. On the CPU, float32 tokens and parameters take the kernels of
whoever has called ``provide_cpu``, whatever the layout, with branch and norm in float32 or
bfloat16; all else is the eager definition.
Source: LayerNorm, arXiv:1607.06450; LayerScale, arXiv:2103.17239; drop path on a subset, DINOv2,
arXiv:2304.07193 section 5.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tapct_kernels.operator import operator
from tapct_kernels.tuning import Config, config_for

# Several tokens per program keep 16-byte loads in flight; one warp per token needs no barrier.
FORWARD_CONFIGS: tuple[Config, ...] = (
    {"BLOCK_T": 4, "num_warps": 4},
    {"BLOCK_T": 2, "num_warps": 2},
    {"BLOCK_T": 1, "num_warps": 1},
    {"BLOCK_T": 2, "num_warps": 4},
)
# One token at a time: with two, sums over tokens cross warps and some forms spill. STAGES fetch the
# next tokens while one is summed up: on an H200, 64 x 2357 tokens, float32 stream, that takes 0.47
# to 0.26 ms at width 384 (floor 0.25) and 0.65 to 0.51 at 768 (0.49). SPLITS is 8 programs for each
# of its multiprocessors; 6 and 16 were slower.
BACKWARD_CONFIGS: tuple[Config, ...] = (
    {"BLOCK_T": 1, "SPLITS": 1056, "STAGES": 3, "num_warps": 2},
    {"BLOCK_T": 1, "SPLITS": 1056, "STAGES": 3, "num_warps": 4},
)
# The norm alone is one call of a pass; with three stages it spills on some devices.
NORM_BACKWARD_CONFIGS: tuple[Config, ...] = (
    {"BLOCK_T": 1, "SPLITS": 792, "STAGES": 1, "num_warps": 2},
    {"BLOCK_T": 1, "SPLITS": 1056, "STAGES": 1, "num_warps": 1},
    {"BLOCK_T": 1, "SPLITS": 528, "STAGES": 1, "num_warps": 4},
)


def _check(
    x_NTD: Tensor, branch_KTD: Tensor | None, gamma_D: Tensor | None, weight_D: Tensor | None,
    bias_D: Tensor | None, index_K: Tensor | None, next_index_J: Tensor | None,
) -> None:  # fmt: skip
    if x_NTD.ndim != 3:
        raise ValueError(f"residual_norm: x of shape {tuple(x_NTD.shape)} is not (N, T, D)")
    N, T, D = x_NTD.shape
    listed = N if index_K is None else index_K.numel()
    for name, tensor, wanted in (
        ("branch", branch_KTD, (listed, T, D)),
        ("gamma", gamma_D, (D,)),
        ("weight", weight_D, (D,)),
        ("bias", bias_D, (D,)),
    ):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(
                f"residual_norm: {name} has shape {tuple(tensor.shape)}, not {wanted}, "
                f"for x of shape {(N, T, D)}"
            )
    for name, index in (("index", index_K), ("next_index", next_index_J)):
        if index is not None and (index.ndim != 1 or index.dtype != torch.int64):
            kind = f"{index.dtype} of {index.ndim} dimensions"
            raise ValueError(f"residual_norm: {name} is {kind}, not int64 of 1")


def _rows(x_NTD: Tensor, index_K: Tensor | None) -> Tensor:
    return x_NTD if index_K is None else x_NTD.index_select(0, index_K)


def residual_norm_ref(
    x_NTD: Tensor, branch_KTD: Tensor | None, gamma_D: Tensor | None, weight_D: Tensor | None,
    bias_D: Tensor | None, index_K: Tensor | None, next_index_J: Tensor | None,
    scale: float, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eager definition; tests hold the kernel to it and benches compare with it.

    Without branch the norm is x's and out is empty; without weight normed is empty.
    """
    sum_dtype = torch.promote_types(x_NTD.dtype, torch.float32)
    out_NTD, read_NTD = x_NTD.new_empty(0), x_NTD
    if branch_KTD is not None:
        x_NTD = x_NTD.to(sum_dtype)
        if index_K is not None:
            branch_KTD = branch_KTD if gamma_D is None else branch_KTD * gamma_D.to(sum_dtype)
            out_NTD = x_NTD.index_add(0, index_K, branch_KTD.to(sum_dtype), alpha=scale)
        elif gamma_D is None:
            out_NTD = x_NTD.add(branch_KTD, alpha=scale)
        else:
            out_NTD = x_NTD.addcmul(branch_KTD, gamma_D.to(sum_dtype), value=scale)
        out_NTD = read_NTD = out_NTD.to(read_NTD.dtype, memory_format=torch.contiguous_format)
    if weight_D is None or bias_D is None:
        return out_NTD, x_NTD.new_empty(0, dtype=dtype)
    read_JTD = _rows(read_NTD, next_index_J).to(sum_dtype)
    weight_D, bias_D = weight_D.to(sum_dtype), bias_D.to(sum_dtype)
    normed_JTD = F.layer_norm(read_JTD, weight_D.shape, weight_D, bias_D, eps)
    return out_NTD, normed_JTD.to(dtype, memory_format=torch.contiguous_format)


@triton.jit
def _place(index_ptr, n, count, BLOCK: tl.constexpr):
    """Return where the index lists sample n, or -1; an inverse index would cost three launches."""
    place = n
    if index_ptr is not None:
        i = tl.arange(0, BLOCK)
        listed = tl.load(index_ptr + i, mask=i < count, other=-1).to(tl.int32)
        place = tl.max(tl.where(listed == n, i, -1), axis=0)
    return place


@triton.jit
def _normalise(x, d, D, eps):
    """Return the normalised rows and the reciprocal deviation of each."""
    centred = tl.where(d < D, x - tl.sum(x, axis=1)[:, None] / D, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / D + eps)
    return centred * rstd, rstd


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _load_row(ptr, d, D):
    return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x_ptr, branch_ptr, gamma_ptr, weight_ptr, bias_ptr, index_ptr, next_index_ptr,
    out_ptr, normed_ptr, T, D, K, J, scale, eps, num_tiles,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // num_tiles
    t = tl.program_id(0) % num_tiles * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (t < T) & (d < D)
    at = (n.to(tl.int64) * T + t) * D + d
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        k = _place(index_ptr, n, K, BLOCK_K)
        at_k = (k.to(tl.int64) * T + t) * D + d
        branch = tl.load(branch_ptr + at_k, mask=inside & (k >= 0), other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            branch *= _load_row(gamma_ptr, d, D)
        rounded = (x + scale * branch).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)  # the backward finds what was stored
    if weight_ptr is not None:
        j = _place(next_index_ptr, n, J, BLOCK_J)
        at_j = (j.to(tl.int64) * T + t) * D + d
        normed, _ = _normalise(x, d, D, eps)
        normed = normed * _load_row(weight_ptr, d, D) + _load_row(bias_ptr, d, D)
        normed = normed.to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + at_j, normed, mask=inside & (j >= 0))


@triton.jit
def _backward_kernel(
    grad_out_ptr, grad_normed_ptr, read_ptr, branch_ptr, gamma_ptr, weight_ptr, index_ptr,
    next_index_ptr, grad_x_ptr, grad_branch_ptr, sums_S3D_ptr, T, D, K, J, scale, eps, num_tiles,
    total, SPLITS: tl.constexpr, STAGES: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)[None, :]
    gamma_sum = tl.zeros((1, BLOCK_D), tl.float32)
    weight_sum = tl.zeros((1, BLOCK_D), tl.float32)
    bias_sum = tl.zeros((1, BLOCK_D), tl.float32)
    for tile in tl.range(split, total, SPLITS, num_stages=STAGES):
        n = tile // num_tiles
        t = tile % num_tiles * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
        inside = (t < T) & (d < D)
        at = (n.to(tl.int64) * T + t) * D + d
        grad = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if branch_ptr is not None:
            grad = tl.load(grad_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            j = _place(next_index_ptr, n, J, BLOCK_J)
            listed = inside & (j >= 0)
            at_j = (j.to(tl.int64) * T + t) * D + d
            y = tl.load(read_ptr + at, mask=listed, other=0.0).to(tl.float32)
            g = tl.load(grad_normed_ptr + at_j, mask=listed, other=0.0).to(tl.float32)
            normed, rstd = _normalise(y, d, D, eps)
            scaled = g * _load_row(weight_ptr, d, D)
            # In one reduction: each costs barriers where several warps share a row.
            sums = tl.reduce((scaled, scaled * normed), 1, _add_both)
            grad += (scaled - (sums[0][:, None] + normed * sums[1][:, None]) / D) * rstd
            weight_sum += tl.sum(g * normed, axis=0)[None, :]
            bias_sum += tl.sum(g, axis=0)[None, :]
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if branch_ptr is not None:
            k = _place(index_ptr, n, K, BLOCK_K)
            kept = inside & (k >= 0)
            at_k = (k.to(tl.int64) * T + t) * D + d
            grad *= scale
            if gamma_ptr is not None:
                branch = tl.load(branch_ptr + at_k, mask=kept, other=0.0).to(tl.float32)
                gamma_sum += tl.sum(grad * branch, axis=0)[None, :]
                grad *= _load_row(gamma_ptr, d, D)
            tl.store(grad_branch_ptr + at_k, grad.to(grad_branch_ptr.dtype.element_ty), mask=kept)
    at_S = sums_S3D_ptr + split.to(tl.int64) * 3 * D + d
    tl.store(at_S, gamma_sum, mask=d < D)
    tl.store(at_S + D, weight_sum, mask=d < D)
    tl.store(at_S + 2 * D, bias_sum, mask=d < D)


def _count(index_K: Tensor | None, num_samples: int) -> int:
    return num_samples if index_K is None else index_K.numel()


def _empty_outputs(
    x_NTD: Tensor, branch_KTD: Tensor | None, weight_D: Tensor | None,
    next_index_J: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N, T, D = x_NTD.shape
    out_NTD = x_NTD.new_empty((0,) if branch_KTD is None else (N, T, D))
    shape = (0,) if weight_D is None else (_count(next_index_J, N), T, D)
    return out_NTD, x_NTD.new_empty(shape, dtype=dtype)


def _compact(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _blocks(index_K: Tensor | None, next_index_J: Tensor | None, width: int) -> dict[str, int]:
    counts = {"BLOCK_K": _count(index_K, 1), "BLOCK_J": _count(next_index_J, 1), "BLOCK_D": width}
    return {name: triton.next_power_of_2(max(1, count)) for name, count in counts.items()}


def _forward_triton(
    x_NTD: Tensor, branch_KTD: Tensor | None, gamma_D: Tensor | None, weight_D: Tensor | None,
    bias_D: Tensor | None, index_K: Tensor | None, next_index_J: Tensor | None,
    scale: float, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operands = (x_NTD, branch_KTD, gamma_D, weight_D, bias_D, index_K, next_index_J)
    _check(*operands)
    if x_NTD.dtype == torch.float64:  # for verification only: the kernels sum in float32
        return residual_norm_ref(*operands, scale, eps, dtype)
    out_NTD, normed_JTD = _empty_outputs(x_NTD, branch_KTD, weight_D, next_index_J, dtype)
    if x_NTD.numel() == 0:
        return out_NTD, normed_JTD
    N, T, D = x_NTD.shape
    op = "layer_norm" if branch_KTD is None else "residual_norm"
    config = config_for(f"{op}.forward", D, FORWARD_CONFIGS)
    num_tiles = triton.cdiv(T, config["BLOCK_T"])
    _forward_kernel[(N * num_tiles,)](
        *_compact(*operands),
        *(out_NTD, normed_JTD, T, D, _count(index_K, N), _count(next_index_J, N)),
        *(scale, eps, num_tiles),
        **_blocks(index_K, next_index_J, D),
        **config,
    )
    return out_NTD, normed_JTD


def _backward_triton(
    grad_out_NTD: Tensor, grad_normed_JTD: Tensor, read_NTD: Tensor, branch_KTD: Tensor | None,
    gamma_D: Tensor | None, weight_D: Tensor | None, index_K: Tensor | None,
    next_index_J: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    operands = (grad_out_NTD, grad_normed_JTD, read_NTD, branch_KTD, gamma_D, weight_D)
    indices = (index_K, next_index_J)
    if read_NTD.dtype == torch.float64:  # as in the forward
        return _backward_ref(*operands, *indices, scale, eps)
    N, T, D = read_NTD.shape
    grad_x_NTD, grad_branch_KTD, _ = _empty_gradients(read_NTD, branch_KTD)
    if read_NTD.numel() == 0:
        return grad_x_NTD, grad_branch_KTD, read_NTD.new_zeros(3, D, dtype=torch.float32)
    if branch_KTD is None:
        config = config_for("layer_norm.backward", D, NORM_BACKWARD_CONFIGS)
    else:
        config = config_for("residual_norm.backward", D, BACKWARD_CONFIGS)
    num_tiles = triton.cdiv(T, config["BLOCK_T"])
    splits = min(N * num_tiles, config["SPLITS"])
    sums_S3D = read_NTD.new_empty(splits, 3, D, dtype=torch.float32)
    _backward_kernel[(splits,)](
        *_compact(*operands, *indices),
        *(grad_x_NTD, grad_branch_KTD, sums_S3D, T, D, _count(index_K, N)),
        *(_count(next_index_J, N), scale, eps, num_tiles, N * num_tiles),
        **_blocks(index_K, next_index_J, D),
        **config,
    )
    return grad_x_NTD, grad_branch_KTD, sums_S3D.sum(0)


_cpu_kernels: list[tuple[Callable[..., None], Callable[..., None]]] = []


def provide_cpu(forward: Callable[..., None], backward: Callable[..., None]) -> None:
    """Offer kernels for the CPU that fill tensors. tapct_fast calls this.

    Args:
        forward: Takes the op's operands up to ``eps``, contiguous, then out and normed.
        backward: Takes the backward's, contiguous, then the gradients of x, branch and the
            parameters. What an absent operand leaves empty is None for both.
    """
    _cpu_kernels[:] = [(forward, backward)]


def _goes_native(
    stream: Sequence[Tensor | None], branch_KTD: Tensor | None, dtype: torch.dtype
) -> bool:
    """Say whether the CPU's kernels take tokens and parameters, a branch, and a norm of a dtype."""
    products = [dtype] if branch_KTD is None else [dtype, branch_KTD.dtype]
    return (
        bool(_cpu_kernels)
        and all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in stream)
        and all(product in (torch.float32, torch.bfloat16) for product in products)
    )


def _unless(is_absent: bool, tensor: Tensor) -> Tensor | None:
    return None if is_absent else tensor


def _forward_cpu(
    x_NTD: Tensor, branch_KTD: Tensor | None, gamma_D: Tensor | None, weight_D: Tensor | None,
    bias_D: Tensor | None, index_K: Tensor | None, next_index_J: Tensor | None,
    scale: float, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    operands = (x_NTD, branch_KTD, gamma_D, weight_D, bias_D, index_K, next_index_J)
    out_NTD, normed_JTD = _empty_outputs(x_NTD, branch_KTD, weight_D, next_index_J, dtype)
    outputs = (_unless(branch_KTD is None, out_NTD), _unless(weight_D is None, normed_JTD))
    _cpu_kernels[0][0](*_compact(*operands), scale, eps, *outputs)
    return out_NTD, normed_JTD


def _backward_cpu(
    grad_out_NTD: Tensor, grad_normed_JTD: Tensor, read_NTD: Tensor, branch_KTD: Tensor | None,
    gamma_D: Tensor | None, weight_D: Tensor | None, index_K: Tensor | None,
    next_index_J: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    operands = (
        *(_unless(branch_KTD is None, grad_out_NTD), _unless(weight_D is None, grad_normed_JTD)),
        *(read_NTD, branch_KTD, gamma_D, weight_D, index_K, next_index_J),
    )
    grad_x_NTD, grad_branch_KTD, grads_3D = _empty_gradients(read_NTD, branch_KTD)
    outputs = (grad_x_NTD, _unless(branch_KTD is None, grad_branch_KTD), grads_3D)
    _cpu_kernels[0][1](*_compact(*operands), scale, eps, *outputs)
    return grad_x_NTD, grad_branch_KTD, grads_3D


@operator("tapct::residual_norm")
def _op(
    x_NTD: Tensor, branch_KTD: Tensor | None, gamma_D: Tensor | None, weight_D: Tensor | None,
    bias_D: Tensor | None, index_K: Tensor | None, next_index_J: Tensor | None,
    scale: float, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out and normed; Triton on CUDA, on the CPU a kernel where one fits, else eager."""
    operands = (x_NTD, branch_KTD, gamma_D, weight_D, bias_D, index_K, next_index_J)
    _check(*operands)
    if _goes_native((x_NTD, gamma_D, weight_D, bias_D), branch_KTD, dtype):
        return _forward_cpu(*operands, scale, eps, dtype)
    return residual_norm_ref(*operands, scale, eps, dtype)


_op.register_kernel("cuda")(_forward_triton)


@_op.register_fake
def _(
    x_NTD: Tensor, branch_KTD: Tensor | None, gamma_D: Tensor | None, weight_D: Tensor | None,
    bias_D: Tensor | None, index_K: Tensor | None, next_index_J: Tensor | None,
    scale: float, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(x_NTD, branch_KTD, gamma_D, weight_D, bias_D, index_K, next_index_J)
    return _empty_outputs(x_NTD, branch_KTD, weight_D, next_index_J, dtype)


def _empty_gradients(read_NTD: Tensor, branch_KTD: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    sum_dtype = torch.promote_types(read_NTD.dtype, torch.float32)
    grad_x_NTD = torch.empty_like(read_NTD, memory_format=torch.contiguous_format)
    if branch_KTD is None:
        grad_branch_KTD = read_NTD.new_empty(0)
    else:
        grad_branch_KTD = torch.empty_like(branch_KTD, memory_format=torch.contiguous_format)
    return grad_x_NTD, grad_branch_KTD, read_NTD.new_empty(3, read_NTD.shape[2], dtype=sum_dtype)


def _backward_ref(
    grad_out_NTD: Tensor, grad_normed_JTD: Tensor, read_NTD: Tensor, branch_KTD: Tensor | None,
    gamma_D: Tensor | None, weight_D: Tensor | None, index_K: Tensor | None,
    next_index_J: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sum_dtype, D = torch.promote_types(read_NTD.dtype, torch.float32), read_NTD.shape[2]
    compact = torch.contiguous_format
    grads_3D = read_NTD.new_zeros(3, D, dtype=sum_dtype)
    grad_NTD = None
    if branch_KTD is not None:
        grad_NTD = grad_out_NTD.to(sum_dtype, copy=True, memory_format=compact)
    elif next_index_J is not None or read_NTD.numel() == 0:
        grad_NTD = torch.zeros_like(read_NTD, dtype=sum_dtype, memory_format=compact)
    if weight_D is not None and grad_normed_JTD.numel() > 0:
        y_JTD = _rows(read_NTD, next_index_J).to(sum_dtype)
        weight_D = weight_D.to(sum_dtype)
        _, mean_JT1, rstd_JT1 = torch.native_layer_norm(y_JTD, [D], None, None, eps)
        through_JTD, grads_3D[1], grads_3D[2] = torch.ops.aten.native_layer_norm_backward(
            *(grad_normed_JTD.to(sum_dtype), y_JTD, [D], mean_JT1, rstd_JT1, weight_D, weight_D),
            [True, True, True],
        )
        if grad_NTD is None:
            grad_NTD = through_JTD
        elif next_index_J is None:
            grad_NTD += through_JTD
        else:
            grad_NTD.index_add_(0, next_index_J, through_JTD)
    assert grad_NTD is not None
    grad_x_NTD = grad_NTD.to(read_NTD.dtype, memory_format=compact)
    if branch_KTD is None:
        return grad_x_NTD, read_NTD.new_empty(0), grads_3D
    grad_KTD = _rows(grad_NTD, index_K) * scale
    if gamma_D is not None:
        grads_3D[0] = (grad_KTD * branch_KTD).sum((0, 1))
        grad_KTD *= gamma_D
    return grad_x_NTD, grad_KTD.to(branch_KTD.dtype, memory_format=compact), grads_3D


@operator("tapct::residual_norm_backward")
def _backward_op(
    grad_out_NTD: Tensor, grad_normed_JTD: Tensor, read_NTD: Tensor, branch_KTD: Tensor | None,
    gamma_D: Tensor | None, weight_D: Tensor | None, index_K: Tensor | None,
    next_index_J: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x_NTD and branch_KTD, and of the parameters in the sum dtype.

    ``read_NTD`` is what was normed: out, or x where there is no branch.
    """
    operands = (grad_out_NTD, grad_normed_JTD, read_NTD, branch_KTD, gamma_D, weight_D)
    stream = (grad_out_NTD, read_NTD, gamma_D, weight_D)
    is_native = _goes_native(stream, branch_KTD, grad_normed_JTD.dtype)
    backward = _backward_cpu if is_native else _backward_ref
    return backward(*operands, index_K, next_index_J, scale, eps)


_backward_op.register_kernel("cuda")(_backward_triton)


@_backward_op.register_fake
def _(
    grad_out_NTD: Tensor, grad_normed_JTD: Tensor, read_NTD: Tensor, branch_KTD: Tensor | None,
    gamma_D: Tensor | None, weight_D: Tensor | None, index_K: Tensor | None,
    next_index_J: Tensor | None, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(read_NTD, branch_KTD)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_NTD, branch_KTD, gamma_D, weight_D, bias_D, index_K, next_index_J, ctx.scale, ctx.eps, _ = (
        inputs
    )
    read_NTD = x_NTD if branch_KTD is None else output[0]
    ctx.save_for_backward(read_NTD, branch_KTD, gamma_D, weight_D, index_K, next_index_J)
    ctx.dtypes = [None if t is None else t.dtype for t in (gamma_D, weight_D, bias_D)]


def _backward(ctx: Any, grad_out_NTD: Tensor, grad_normed_JTD: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
    grad_x_NTD, grad_branch_KTD, grads_3D = _backward_op(
        grad_out_NTD, grad_normed_JTD, *saved, ctx.scale, ctx.eps
    )
    parameters = [
        None if dtype is None else grad_D.to(dtype)
        for grad_D, dtype in zip(grads_3D.unbind(0), ctx.dtypes, strict=True)
    ]
    has_branch = saved[1] is not None
    branch = grad_branch_KTD if has_branch else None
    return grad_x_NTD, branch, *parameters, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_save_for_backward)


def residual_norm(
    x_NTD: Tensor,
    branch_KTD: Tensor,
    gamma_D: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    index_K: Tensor | None = None,
    next_index_J: Tensor | None = None,
    scale: float = 1.0,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the tokens after a branch and the norm that the next branch reads.

    Args:
        x_NTD: Residual stream; its dtype is out's.
        branch_KTD: Result of the branch for the listed samples.
        gamma_D: LayerScale, or None.
        weight_D: Weight of the norm.
        bias_D: Bias of the norm.
        index_K: int64, the sample of each row of ``branch_KTD``, each at most once; None is all.
        next_index_J: int64, the samples whose norm is wanted, each at most once; None is all.
        scale: Factor on the branch: N / K under drop path.
        eps: Added to the variance.
        dtype: Of the norm: what the next product takes.

    Returns:
        out_NTD and normed_JTD.

    Raises:
        ValueError: A shape or dtype does not fit the others.
    """
    out_NTD, normed_JTD = _op(
        x_NTD, branch_KTD, gamma_D, weight_D, bias_D, index_K, next_index_J, scale, eps, dtype
    )
    return out_NTD, normed_JTD


def residual(
    x_NTD: Tensor,
    branch_KTD: Tensor,
    gamma_D: Tensor | None,
    *,
    index_K: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return the tokens after a branch; see ``residual_norm`` for the arguments."""
    out_NTD: Tensor = _op(
        x_NTD, branch_KTD, gamma_D, None, None, index_K, None, scale, 0.0, x_NTD.dtype
    )[0]
    return out_NTD


def layer_norm(
    x_NTD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    index_J: Tensor | None = None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the norm of the listed samples; see ``residual_norm`` for the arguments."""
    normed_JTD: Tensor = _op(x_NTD, None, None, weight_D, bias_D, None, index_J, 1.0, eps, dtype)[1]
    return normed_JTD

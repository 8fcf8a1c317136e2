"""Cross-entropy of features against prototypes and soft targets; student logits are never stored.

    logit[s, p] = features[s] . prototypes[p] / temp
    loss[s] = sum_j weight[s, j] * (logsumexp_p logit[s] - sum_p target[i, p] * logit[s, p])

with i = target_row[s, j]; because the targets of a row sum to 1, this is the cross-entropy. Both
sums stream over the prototypes, and the targets are computed from ``SoftTargets`` on the way, of
products a tile or chunk of rows at a time. The backward computes the logits again and holds the
gradient of one chunk of them at a time.

Shape suffixes: S student rows, K bottleneck width, P prototypes, N target rows, J pairs of a
student row (1 or 2), T parts of the prototypes, C student rows of a chunk.
Products have the features' dtype; sums, loss and the gradient of the prototypes are float32
(float64 for float64 features). Every sum has a fixed order: the results are deterministic.
Source: DINO, arXiv:2104.14294 equation 3, and iBOT, arXiv:2111.07832 equation 2; streaming
softmax, arXiv:1805.02867.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tapct_kernels.operator import Operator
from tapct_kernels.soft_targets import SoftTargets
from tapct_kernels.tuning import Config, config_for

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# 176 KiB of shared memory hold 128 rows and three tiles of prototypes; 128 x 128 would need 224 KiB
# and 255 registers (sm_90). The others leave room for a second program on the multiprocessor, so
# that the exponentials of one run beside the product of the other.
CONFIGS: tuple[Config, ...] = (
    {"BLOCK_S": 128, "BLOCK_P": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_S": 128, "BLOCK_P": 32, "num_warps": 4, "num_stages": 2},
    {"BLOCK_S": 64, "BLOCK_P": 64, "num_warps": 4, "num_stages": 2},
)
CHUNK = 2**27  # logits of a chunk of the Triton backward: 2,048 rows, 256 MiB in 16 bits
TILE_SP = (512, 2048)  # logits of a tile on the CPU: 4 MiB, in cache, and work for several threads


def _check(
    features_SK: Tensor,
    prototypes_PK: Tensor,
    targets: SoftTargets,
    target_row_SJ: Tensor,
    weight_SJ: Tensor,
) -> None:
    if features_SK.ndim != 2 or prototypes_PK.shape[1:] != features_SK.shape[1:]:
        shapes = [tuple(t.shape) for t in (features_SK, prototypes_PK)]
        raise ValueError(f"prototype_cross_entropy: features and prototypes have shapes {shapes}")
    (S, _), P = features_SK.shape, prototypes_PK.shape[0]
    N, weights_PK = targets.row_N.shape[0], targets.weights_PK
    rows = (
        [(N, P)] if weights_PK is None else [(N, weights_PK.shape[-1]), (P, weights_PK.shape[-1])]
    )
    shapes = [tuple(t.shape) for t in targets if t is not None]
    if shapes != [*rows, (P,), (N,), ()]:
        raise ValueError(
            f"prototype_cross_entropy: targets have shapes {shapes} for {P} prototypes"
        )
    if target_row_SJ.shape not in ((S, 1), (S, 2)) or weight_SJ.shape != target_row_SJ.shape:
        shapes = [tuple(t.shape) for t in (target_row_SJ, weight_SJ)]
        raise ValueError(
            f"prototype_cross_entropy: target_row and weight have shapes {shapes}, "
            f"not ({S}, 1) or ({S}, 2)"
        )
    if target_row_SJ.dtype != torch.int64:
        raise ValueError(f"prototype_cross_entropy: target_row is {target_row_SJ.dtype}, not int64")
    if S and not N:
        raise ValueError(f"prototype_cross_entropy: {S} rows, but no targets")


def _sum_dtype(features_SK: Tensor) -> torch.dtype:
    return torch.promote_types(features_SK.dtype, torch.float32)


def prototype_cross_entropy_ref(
    features_SK: Tensor,
    prototypes_PK: Tensor,
    targets: SoftTargets,
    *,
    temp: float,
    target_row_SJ: Tensor,
    weight_SJ: Tensor,
) -> Tensor:
    """Eager definition; tests hold the kernels to it and benches compare with it."""
    _check(features_SK, prototypes_PK, targets, target_row_SJ, weight_SJ)
    dtype = _sum_dtype(features_SK)
    logits_SP = F.linear(features_SK, prototypes_PK.to(features_SK.dtype)).to(dtype)
    log_q_SP = torch.log_softmax(logits_SP / temp, dim=1)
    target_NP = targets.dense()
    loss_S = log_q_SP.new_zeros(features_SK.shape[0])
    for row_S, weight_S in zip(target_row_SJ.unbind(1), weight_SJ.to(dtype).unbind(1), strict=True):
        target_SP = target_NP[torch.where(weight_S != 0, row_S, 0)]
        pair_S = -weight_S * torch.linalg.vecdot(target_SP, log_q_SP)
        loss_S = loss_S + torch.where(weight_S != 0, pair_S, 0)
    return loss_S


@triton.jit
def _pair(target_row_ptr, weight_ptr, row_ptr, s, S, j: tl.constexpr, J: tl.constexpr):
    """Return weight, target row and base-2 logarithm of its factor, (BLOCK_S, 1)."""
    weight = tl.load(weight_ptr + s * J + j, mask=s < S, other=0.0).to(tl.float32)
    n = tl.load(target_row_ptr + s * J + j, mask=(s < S) & (weight != 0), other=0)
    row = tl.load(row_ptr + n, mask=weight != 0, other=0.0).to(tl.float32) * LOG2_E
    return weight, n, row


@triton.jit
def _weighted(logits, factor, weight, row, scale):
    """Return weight * target; what a weight of 0 belongs to was never loaded."""
    target = tl.exp2(logits.to(tl.float32) * scale + factor + row)
    return tl.where(weight != 0, weight * target, 0.0)


@triton.jit
def _tile(
    x, weight_0, n_0, row_0, weight_1, n_1, row_1, scale, p, k,
    prototypes_ptr, logits_ptr, factor_ptr, P, K, inv_temp, J: tl.constexpr,
):  # fmt: skip
    """Return base-2 student logits and weighted targets of some rows and prototypes."""
    inside = p[None, :] < P
    # Before the product, which then hides their latency.
    factor = tl.load(factor_ptr + p, mask=p < P, other=float("-inf")).to(tl.float32) * LOG2_E
    at = logits_ptr + p[None, :]
    logits_0 = tl.load(at + n_0 * P, mask=inside & (weight_0 != 0), other=0.0)
    if J == 2:
        logits_1 = tl.load(at + n_1 * P, mask=inside & (weight_1 != 0), other=0.0)
    prototypes = tl.load(
        prototypes_ptr + p.to(tl.int64)[None, :] * K + k[:, None],
        mask=inside & (k[:, None] < K),
        other=0.0,
    )
    student = tl.dot(x, prototypes, input_precision="ieee") * (inv_temp * LOG2_E)
    target = _weighted(logits_0, factor[None, :], weight_0, row_0, scale)
    if J == 2:
        target += _weighted(logits_1, factor[None, :], weight_1, row_1, scale)
    return student, target


@triton.jit
def _forward_kernel(
    x_ptr, prototypes_ptr, logits_ptr, factor_ptr, row_ptr, target_temp_ptr, target_row_ptr,
    weight_ptr, lse_TS_ptr, dot_TS_ptr, S, P, K, inv_temp, tiles_per_part,
    J: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + s * K + k[None, :], mask=(s < S) & (k[None, :] < K), other=0.0)
    scale = LOG2_E / tl.load(target_temp_ptr).to(tl.float32)
    weight_0, n_0, row_0 = _pair(target_row_ptr, weight_ptr, row_ptr, s, S, 0, J)
    weight_1, n_1, row_1 = _pair(target_row_ptr, weight_ptr, row_ptr, s, S, J - 1, J)
    largest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    dot = tl.zeros((BLOCK_S,), tl.float32)
    first = part * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tl.cdiv(P, BLOCK_P))):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        student, target = _tile(
            x, weight_0, n_0, row_0, weight_1, n_1, row_1, scale, p, k,
            prototypes_ptr, logits_ptr, factor_ptr, P, K, inv_temp, J,
        )  # fmt: skip
        dot += tl.sum(target * student, axis=1)
        student = tl.where(p[None, :] < P, student, float("-inf"))
        new = tl.maximum(largest, tl.max(student, axis=1))
        total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(student - new[:, None]), axis=1)
        largest = new
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    at = part.to(tl.int64) * S + s
    tl.store(lse_TS_ptr + at, (largest + tl.log2(total)) / LOG2_E, mask=s < S)
    tl.store(dot_TS_ptr + at, dot / LOG2_E, mask=s < S)


@triton.jit(do_not_specialize=["S"])  # the last chunk is as long as it happens to be
def _grad_logits_kernel(
    x_ptr, prototypes_ptr, logits_ptr, factor_ptr, row_ptr, target_temp_ptr, target_row_ptr,
    weight_ptr, grad_ptr, lse_ptr, out_SP_ptr, S, P, K, inv_temp, tiles_per_part,
    J: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + s * K + k[None, :], mask=(s < S) & (k[None, :] < K), other=0.0)
    scale = LOG2_E / tl.load(target_temp_ptr).to(tl.float32)
    weight_0, n_0, row_0 = _pair(target_row_ptr, weight_ptr, row_ptr, s, S, 0, J)
    weight_1, n_1, row_1 = _pair(target_row_ptr, weight_ptr, row_ptr, s, S, J - 1, J)
    weight = weight_0 + weight_1 if J == 2 else weight_0
    lse = tl.load(lse_ptr + s, mask=s < S, other=0.0).to(tl.float32) * LOG2_E
    grad = tl.load(grad_ptr + s, mask=s < S, other=0.0).to(tl.float32) * inv_temp
    first = tl.program_id(1) * tiles_per_part
    for tile in range(first, tl.minimum(first + tiles_per_part, tl.cdiv(P, BLOCK_P))):
        p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        student, target = _tile(
            x, weight_0, n_0, row_0, weight_1, n_1, row_1, scale, p, k,
            prototypes_ptr, logits_ptr, factor_ptr, P, K, inv_temp, J,
        )  # fmt: skip
        out = grad * (weight * tl.exp2(student - lse) - target)
        out = out.to(out_SP_ptr.dtype.element_ty)
        tl.store(out_SP_ptr + s * P + p[None, :], out, mask=(s < S) & (p[None, :] < P))


def _block(size: int, largest: int) -> int:
    block: int = triton.next_power_of_2(size)
    return min(largest, max(16, block))  # 16: the smallest side of a dot


def _candidates(device: torch.device) -> tuple[Config, ...]:
    """Return the configurations that fit: the first takes 147 KiB, a consumer GPU has 99."""
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        if properties.shared_memory_per_block_optin < 150 * 1024:
            return CONFIGS[2:]
    return CONFIGS


def _launch_options(
    kernel: str, features_SK: Tensor, num_rows: int, num_prototypes: int
) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Return the grid, tiles of a program, and blocks for some student rows."""
    K = features_SK.shape[1]
    config = config_for(f"prototype_cross_entropy.{kernel}", K, _candidates(features_SK.device))
    block_K: int = max(16, triton.next_power_of_2(K))
    # Configurations are for rows of 256 values of 16 bits; a block of wider ones has fewer.
    shrink = triton.cdiv(block_K * features_SK.element_size(), 512)
    blocks = {
        "BLOCK_S": _block(num_rows, config["BLOCK_S"] // shrink),
        "BLOCK_P": _block(num_prototypes, config["BLOCK_P"] // shrink),
        "BLOCK_K": block_K,
    }
    row_tiles = triton.cdiv(num_rows, blocks["BLOCK_S"])
    tiles = triton.cdiv(num_prototypes, blocks["BLOCK_P"])
    # About a thousand programs, so that the last wave is short, of 8 or more tiles each. Row tiles
    # vary fastest in the grid: programs side by side read the same prototypes.
    tiles_per_part = triton.cdiv(tiles, max(1, min(1024 // row_tiles, tiles // 8)))
    grid = (row_tiles, triton.cdiv(tiles, tiles_per_part))
    return grid, tiles_per_part, {**config, **blocks}


def _merge(lse_TS: Tensor, dot_TS: Tensor, weight_SJ: Tensor) -> tuple[Tensor, Tensor]:
    lse_S = torch.logsumexp(lse_TS, 0)
    return weight_SJ.to(lse_S.dtype).sum(1) * lse_S - dot_TS.sum(0), lse_S


def _forward_triton(
    features_SK: Tensor,
    prototypes_PK: Tensor,
    rows_NX: Tensor,
    weights_PK: Tensor | None,
    prototype_P: Tensor,
    row_N: Tensor,
    target_temp: Tensor,
    target_row_SJ: Tensor,
    weight_SJ: Tensor,
    temp: float,
) -> tuple[Tensor, Tensor]:
    targets = SoftTargets(rows_NX, weights_PK, prototype_P, row_N, target_temp)
    if features_SK.dtype == torch.float64:  # for verification only: the kernels sum in float32
        return _forward_tiled(features_SK, prototypes_PK, *targets, target_row_SJ, weight_SJ, temp)
    _check(features_SK, prototypes_PK, targets, target_row_SJ, weight_SJ)
    (S, K), P = features_SK.shape, prototypes_PK.shape[0]
    if S == 0:
        return _empty(features_SK)
    if weights_PK is not None:
        parts = [
            _forward_triton(
                features_SK[s],
                prototypes_PK,
                *_stored(targets, target_row_SJ[s], weight_SJ[s]),
                weight_SJ[s],
                temp,
            )
            for s in _tiles(S, _chunk_rows(S, P))
        ]
        loss_S, lse_S = (torch.cat(outputs) for outputs in zip(*parts, strict=True))
        return loss_S, lse_S
    grid, tiles_per_part, options = _launch_options("forward", features_SK, S, P)
    lse_TS = features_SK.new_empty(grid[1], S, dtype=torch.float32)
    dot_TS = torch.empty_like(lse_TS)
    _forward_kernel[grid](
        *(features_SK.contiguous(), prototypes_PK.to(features_SK.dtype).contiguous()),
        *(t.contiguous() for t in (*targets, target_row_SJ, weight_SJ) if t is not None),
        *(lse_TS, dot_TS, S, P, K, 1 / temp, tiles_per_part),
        J=weight_SJ.shape[1],
        **options,
    )
    return _merge(lse_TS, dot_TS, weight_SJ)


def _backward_triton(
    grad_S: Tensor,
    lse_S: Tensor,
    features_SK: Tensor,
    prototypes_PK: Tensor,
    rows_NX: Tensor,
    weights_PK: Tensor | None,
    prototype_P: Tensor,
    row_N: Tensor,
    target_temp: Tensor,
    target_row_SJ: Tensor,
    weight_SJ: Tensor,
    temp: float,
) -> tuple[Tensor, Tensor]:
    targets = SoftTargets(rows_NX, weights_PK, prototype_P, row_N, target_temp)
    pairs = (target_row_SJ, weight_SJ)
    if features_SK.dtype == torch.float64:  # as in the forward
        return _backward_tiled(grad_S, lse_S, features_SK, prototypes_PK, *targets, *pairs, temp)
    (S, K), P = features_SK.shape, prototypes_PK.shape[0]
    if S == 0:
        return torch.empty_like(features_SK), prototypes_PK.new_zeros(P, K, dtype=torch.float32)
    x_SK, w_PK = features_SK.contiguous(), prototypes_PK.to(features_SK.dtype).contiguous()
    per_row = [t.contiguous() for t in (*pairs, grad_S, lse_S)]
    grad_x_SK = torch.empty_like(x_SK)
    grad_w_PK = x_SK.new_zeros(P, K, dtype=torch.float32)
    rows = _chunk_rows(S, P)
    chunk_CP = x_SK.new_empty(rows, P)
    grid, tiles_per_part, options = _launch_options("backward", x_SK, rows, P)
    for s in _tiles(S, rows):
        x_CK = x_SK[s]
        grad_CP = chunk_CP[: x_CK.shape[0]]
        row_CJ, *of_chunk = (t[s] for t in per_row)
        of_targets = (*targets, row_CJ)
        if weights_PK is not None:
            of_targets = _stored(targets, row_CJ, of_chunk[0])
        shared = [t.contiguous() for t in of_targets if t is not None]
        _grad_logits_kernel[grid](
            *(x_CK, w_PK, *shared, *of_chunk, grad_CP),
            *(x_CK.shape[0], P, K, 1 / temp, tiles_per_part),
            J=weight_SJ.shape[1],
            **options,
        )
        torch.mm(grad_CP, w_PK, out=grad_x_SK[s])
        grad_w_PK += _mm_float32(grad_CP.T, x_CK)
    return grad_x_SK, grad_w_PK


def _chunk_rows(num_rows: int, num_prototypes: int) -> int:
    """Return the rows of a chunk: chunks of about one size, whole blocks of rows each."""
    num_chunks = triton.cdiv(num_rows, max(1, CHUNK // num_prototypes))
    rows: int = triton.cdiv(num_rows, 128 * num_chunks) * 128
    return min(num_rows, rows)


def _stored(
    targets: SoftTargets, row_CJ: Tensor, weight_CJ: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Return targets with the logits that a chunk of student rows meets, and their new numbers."""
    row_M = torch.where(weight_CJ != 0, row_CJ, 0).flatten()
    number_M = torch.arange(row_M.shape[0], device=row_M.device)
    row_of_M = targets.row_N.index_select(0, row_M)
    logits_MP = targets.logits.of(row_M)
    numbers_CJ = number_M.reshape(row_CJ.shape)
    return logits_MP, None, targets.prototype_P, row_of_M, targets.temp, numbers_CJ


def _mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return the product, never rounded to 16 bits."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":  # the interpreter: mm with out_dtype is for CUDA
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _target_tile(
    targets: SoftTargets, row_SJ: Tensor, weight_SJ: Tensor, prototypes: slice
) -> Tensor:
    """Return sum_j weight * target of a tile; a pair of weight 0 counts nothing."""
    total_SP: Tensor | None = None
    for row_S, weight_S1 in zip(row_SJ.unbind(1), weight_SJ.unsqueeze(2).unbind(1), strict=True):
        dtype = targets.row_N.dtype
        logits_SP = targets.logits.of(row_S, prototypes).to(dtype, copy=True)
        tile_SP = logits_SP.mul_(1 / targets.temp).add_(targets.prototype_P[prototypes])
        tile_SP.add_(targets.row_N[row_S, None]).exp_().mul_(weight_S1)
        tile_SP.masked_fill_(weight_S1 == 0, 0)
        total_SP = tile_SP if total_SP is None else total_SP.add_(tile_SP)
    assert total_SP is not None
    return total_SP


def _tiles(size: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def _pairs(targets: SoftTargets, target_row_SJ: Tensor, weight_SJ: Tensor) -> tuple[Tensor, Tensor]:
    weight_SJ = weight_SJ.to(targets.row_N.dtype)
    return torch.where(weight_SJ != 0, target_row_SJ, 0), weight_SJ


def _student_tile(x_SK: Tensor, w_PK: Tensor, temp: float) -> Tensor:
    """Return logits / temp in the sum dtype; the product is rounded to the features' dtype."""
    product_SP = x_SK @ w_PK.T
    return product_SP.to(_sum_dtype(x_SK)).mul_(1 / temp)


def _add_product(total_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    if a_MK.dtype == total_MN.dtype:
        total_MN.addmm_(a_MK, b_KN)
    else:
        total_MN.add_(a_MK @ b_KN)


def _empty(features_SK: Tensor) -> tuple[Tensor, Tensor]:
    S, dtype = features_SK.shape[0], _sum_dtype(features_SK)
    return features_SK.new_empty(S, dtype=dtype), features_SK.new_empty(S, dtype=dtype)


def _forward_tiled(
    features_SK: Tensor,
    prototypes_PK: Tensor,
    rows_NX: Tensor,
    weights_PK: Tensor | None,
    prototype_P: Tensor,
    row_N: Tensor,
    target_temp: Tensor,
    target_row_SJ: Tensor,
    weight_SJ: Tensor,
    temp: float,
) -> tuple[Tensor, Tensor]:
    """Return loss_S and, for the backward, logsumexp_S; plain torch, a tile of logits at a time."""
    targets = SoftTargets(rows_NX, weights_PK, prototype_P, row_N, target_temp)
    _check(features_SK, prototypes_PK, targets, target_row_SJ, weight_SJ)
    S, P = features_SK.shape[0], prototypes_PK.shape[0]
    if S == 0:
        return _empty(features_SK)
    w_PK = prototypes_PK.to(features_SK.dtype)
    row_SJ, weight_SJ = _pairs(targets, target_row_SJ, weight_SJ)
    parts = _tiles(P, TILE_SP[1])
    lse_TS = features_SK.new_empty(len(parts), S, dtype=_sum_dtype(features_SK))
    dot_TS = torch.empty_like(lse_TS)
    for part, p in enumerate(parts):
        for s in _tiles(S, TILE_SP[0]):
            student_SP = _student_tile(features_SK[s], w_PK[p], temp)
            target_SP = _target_tile(targets, row_SJ[s], weight_SJ[s], p)
            dot_TS[part, s] = torch.linalg.vecdot(target_SP, student_SP)
            largest_S1 = student_SP.amax(1, keepdim=True)
            total_S = student_SP.sub_(largest_S1).exp_().sum(1)
            lse_TS[part, s] = total_S.log_().add_(largest_S1[:, 0])
    return _merge(lse_TS, dot_TS, weight_SJ)


def _backward_tiled(
    grad_S: Tensor,
    lse_S: Tensor,
    features_SK: Tensor,
    prototypes_PK: Tensor,
    rows_NX: Tensor,
    weights_PK: Tensor | None,
    prototype_P: Tensor,
    row_N: Tensor,
    target_temp: Tensor,
    target_row_SJ: Tensor,
    weight_SJ: Tensor,
    temp: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the features, in their dtype, and of the prototypes, in the sums'."""
    targets = SoftTargets(rows_NX, weights_PK, prototype_P, row_N, target_temp)
    (S, K), P = features_SK.shape, prototypes_PK.shape[0]
    w_PK = prototypes_PK.to(features_SK.dtype)
    row_SJ, weight_SJ = _pairs(targets, target_row_SJ, weight_SJ)
    weight_SJ = weight_SJ * (grad_S.to(weight_SJ.dtype) / temp)[:, None]
    total_S1 = weight_SJ.sum(1, keepdim=True)
    grad_x_SK = features_SK.new_zeros(S, K, dtype=_sum_dtype(features_SK))
    grad_w_PK = features_SK.new_zeros(P, K, dtype=_sum_dtype(features_SK))
    for p in _tiles(P, TILE_SP[1]):
        for s in _tiles(S, TILE_SP[0]):
            grad_SP = _student_tile(features_SK[s], w_PK[p], temp).sub_(lse_S[s, None])
            grad_SP.exp_().mul_(total_S1[s])
            grad_SP.sub_(_target_tile(targets, row_SJ[s], weight_SJ[s], p))
            grad_SP = grad_SP.to(features_SK.dtype)
            _add_product(grad_x_SK[s], grad_SP, w_PK[p])
            _add_product(grad_w_PK[p], grad_SP.T, features_SK[s])
    return grad_x_SK.to(features_SK.dtype), grad_w_PK


_op = Operator("tapct::prototype_cross_entropy", _forward_tiled)
_op.register_kernel("cuda")(_forward_triton)
_backward_op = Operator("tapct::prototype_cross_entropy_backward", _backward_tiled)
_backward_op.register_kernel("cuda")(_backward_triton)


@_op.register_fake
def _(features_SK: Tensor, prototypes_PK: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *targets, target_row_SJ, weight_SJ, _ = rest
    _check(features_SK, prototypes_PK, SoftTargets(*targets), target_row_SJ, weight_SJ)
    return _empty(features_SK)


@_backward_op.register_fake
def _(
    grad_S: Tensor, lse_S: Tensor, features_SK: Tensor, prototypes_PK: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    grad_w_PK = prototypes_PK.new_empty(prototypes_PK.shape, dtype=_sum_dtype(features_SK))
    return features_SK.new_empty(features_SK.shape), grad_w_PK


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.temp = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_S: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x_SK, grad_w_PK = _backward_op(grad_S, *ctx.saved_tensors, ctx.temp)
    prototypes_PK = ctx.saved_tensors[2]
    return grad_x_SK, grad_w_PK.to(prototypes_PK.dtype), *(None,) * 8


_op.register_autograd(_backward, setup_context=_save_for_backward)


def prototype_cross_entropy(
    features_SK: Tensor,
    prototypes_PK: Tensor,
    targets: SoftTargets,
    *,
    temp: float,
    target_row_SJ: Tensor,
    weight_SJ: Tensor,
) -> Tensor:
    """Return each student row's weighted cross-entropies; Triton on CUDA, tiled torch elsewhere.

    Under autocast the features are rounded to its dtype, and the prototypes inside the op, so that
    their gradient stays float32.

    Args:
        features_SK: What the student's prototypes see.
        prototypes_PK: Their effective weights.
        targets: Rows of sum 1; they get no gradient.
        temp: Student temperature.
        target_row_SJ: int64; the rows of ``targets`` that a student row meets, J is 1 or 2.
        weight_SJ: Weights of these pairs, without gradient. A pair of weight 0 counts nothing,
            whatever its row number and the targets there.

    Returns:
        loss_S float32 (float64 for float64 features).

    Raises:
        ValueError: A shape or dtype does not fit the others.
    """
    device_type = features_SK.device.type
    if torch.is_autocast_enabled(device_type):
        features_SK = features_SK.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):
        loss_S: Tensor
        loss_S, _ = _op(features_SK, prototypes_PK, *targets, target_row_SJ, weight_SJ, float(temp))
    return loss_S

"""Soft teacher targets as two diagonal scalings of exp(logits / temp): Sinkhorn-Knopp, softmax.

    prototype[p] = -log sum_n exp(logits[n, p] / temp + row[n])           every prototype to 1
    row[n]       = -log sum_p exp(logits[n, p] / temp + prototype[p])     every row to 1

Sinkhorn-Knopp repeats both lines. It asks for prototypes of N / P, but a constant factor in one
line is undone by the next, so no count enters, and none has to be summed over processes.
Stored logits are read, 16 bits each, and never written: six passes and 12 bytes per logit for
three rounds. Products are computed four times, some rows at a time: the row pass of one round and
the column pass of the next share them. Sums carry their maximum along, so un-normalised logits
neither overflow nor vanish, and a prototype that no row wants keeps a finite factor.
Shape suffixes: N rows, P prototypes, S slabs of rows.
Sums and factors are float32 (float64 for float64 logits). Nothing is differentiated.
Source: SwAV, arXiv:2006.09882 listing 1; DINOv2, arXiv:2304.07193 section 4; the center, DINO,
arXiv:2104.14294 equation 4.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from tapct_kernels.operator import operator
from tapct_kernels.soft_targets import Logits, SoftTargets
from tapct_kernels.tuning import Config, config_for

# 16 logits per thread and turn, as two 16-byte loads. Tall tiles in the row pass share the
# prototype factors, which come from the L2 and cost 4 / BLOCK_N bytes per logit beside its own 2.
PROTOTYPE_CONFIGS: tuple[Config, ...] = (
    {"BLOCK_N": 8, "BLOCK_P": 256, "num_warps": 4},
    {"BLOCK_N": 8, "BLOCK_P": 512, "num_warps": 8},
    {"BLOCK_N": 16, "BLOCK_P": 256, "num_warps": 8},
    {"BLOCK_N": 32, "BLOCK_P": 256, "num_warps": 8},
)
ROW_CONFIGS: tuple[Config, ...] = (
    {"BLOCK_N": 8, "BLOCK_P": 512, "num_warps": 8},
    {"BLOCK_N": 16, "BLOCK_P": 256, "num_warps": 8},
    {"BLOCK_N": 8, "BLOCK_P": 256, "num_warps": 4},
    {"BLOCK_N": 8, "BLOCK_P": 1024, "num_warps": 8},
)
_PROGRAMS = 2112  # 16 for each of an H200's 132 multiprocessors: full waves, few partial results
_CHUNK = 2**18  # logits, 1 MiB in float32: the CPU's passes over a chunk stay in its cache
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.0e38)  # finite, so that its distance to -inf is not a NaN


def _check(logits_NP: Tensor, factor: Tensor | None, temp: Tensor, axis: int) -> None:
    if logits_NP.ndim != 2 or not logits_NP.is_floating_point():
        kind = f"{logits_NP.dtype} of {logits_NP.ndim} dimensions"
        raise ValueError(f"sinkhorn: logits are {kind}, not floats of 2")
    dtype = _sum_dtype(logits_NP)
    if factor is not None and (factor.shape, factor.dtype) != (logits_NP.shape[axis:][:1], dtype):
        kind = f"{factor.dtype} of shape {tuple(factor.shape)}"
        raise ValueError(
            f"sinkhorn: log factors are {kind}, not {dtype}, one for each along axis {axis} of "
            f"logits of shape {tuple(logits_NP.shape)}"
        )
    if temp.ndim or temp.dtype != dtype:
        kind = f"{temp.dtype} of {temp.ndim} dimensions"
        raise ValueError(f"sinkhorn: temp is {kind}, not {dtype} of 0")


def _sum_dtype(logits_NP: Tensor) -> torch.dtype:
    return torch.promote_types(logits_NP.dtype, torch.float32)


def sinkhorn_ref(logits_NP: Tensor, temp: float, num_iter: int = 3) -> Tensor:
    """Eager definition of ``sinkhorn``, the dense targets_NP, divided in place as DINOv2 does.

    DINOv2 takes no maximum; without it exp overflows where logits / temp pass 88.
    """
    scaled_NP = logits_NP.to(_sum_dtype(logits_NP)) / temp
    q_PN = torch.exp(scaled_NP - scaled_NP.max()).t()
    num_prototypes, num_rows = q_PN.shape
    q_PN /= q_PN.sum()
    for _ in range(num_iter):
        q_PN /= q_PN.sum(1, keepdim=True)
        q_PN /= num_prototypes
        q_PN /= q_PN.sum(0, keepdim=True)
        q_PN /= num_rows
    q_PN *= num_rows
    return q_PN.t()


def prototype_logsumexp_ref(logits_NP: Tensor, row_N: Tensor | None, temp: Tensor) -> Tensor:
    """Eager definition of ``prototype_logsumexp``."""
    scaled_NP = logits_NP.to(_sum_dtype(logits_NP)) / temp
    return torch.logsumexp(scaled_NP if row_N is None else scaled_NP + row_N[:, None], 0)


def row_logsumexp_ref(logits_NP: Tensor, prototype_P: Tensor | None, temp: Tensor) -> Tensor:
    """Eager definition of ``row_logsumexp``."""
    scaled_NP = logits_NP.to(_sum_dtype(logits_NP)) / temp
    return torch.logsumexp(scaled_NP if prototype_P is None else scaled_NP + prototype_P, 1)


def _prototype_chunks(logits_NP: Tensor, row_N: Tensor | None, temp: Tensor) -> Tensor:
    """``prototype_logsumexp_ref`` with memory for one chunk; five passes over it in cache."""
    lse_P = logits_NP.new_full(logits_NP.shape[1:], -torch.inf, dtype=temp.dtype)
    size = max(1, _CHUNK // max(1, logits_NP.shape[1]))
    for first in range(0, logits_NP.shape[0], size):
        scaled_NP = logits_NP[first : first + size].to(temp.dtype, copy=True).div_(temp)
        if row_N is not None:
            scaled_NP += row_N[first : first + size, None]
        largest_P = torch.maximum(lse_P, scaled_NP.amax(0)).clamp_(min=_LOWEST.value)
        total_P = scaled_NP.sub_(largest_P).exp_().sum(0)
        lse_P = lse_P.sub_(largest_P).exp_().add_(total_P).log_().add_(largest_P)
    return lse_P


def _row_chunks(logits_NP: Tensor, prototype_P: Tensor | None, temp: Tensor) -> Tensor:
    """``row_logsumexp_ref`` with memory for one chunk."""
    lse_N = logits_NP.new_empty(logits_NP.shape[0], dtype=temp.dtype)
    size = max(1, _CHUNK // max(1, logits_NP.shape[1]))
    for first in range(0, logits_NP.shape[0], size):
        scaled_NP = logits_NP[first : first + size].to(temp.dtype, copy=True).div_(temp)
        if prototype_P is not None:
            scaled_NP += prototype_P
        largest_N1 = scaled_NP.amax(1, keepdim=True).clamp_(min=_LOWEST.value)
        total_N1 = scaled_NP.sub_(largest_N1).exp_().sum(1, keepdim=True)
        lse_N[first : first + size] = total_N1.log_().add_(largest_N1)[:, 0]
    return lse_N


@triton.jit
def _add_exp2(largest, total, x):
    """Take x into a running maximum and sum of exp2(seen - maximum), for one exp2 per value."""
    shrink = tl.exp2(-tl.abs(x - largest))
    total = tl.where(x > largest, total * shrink + 1.0, total + shrink)
    return tl.maximum(largest, x), total


@triton.jit
def _natural_log(largest, total, axis: tl.constexpr):
    """Merge the running sums along one axis into natural logarithms."""
    overall = tl.max(largest, axis=axis, keep_dims=True)
    total = tl.sum(total * tl.exp2(largest - overall), axis=axis, keep_dims=True)
    return (overall + tl.log2(total)) * _LN_2


@triton.jit(do_not_specialize=["N", "rows_per_slab"])
def _prototype_kernel(
    logits_ptr, row_ptr, temp_ptr, lse_SP_ptr, N, P, rows_per_slab,
    HAS_ROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # Prototypes vary fastest, so that programs running side by side read whole rows together.
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    slab = tl.program_id(1)
    last = tl.minimum(N, (slab + 1) * rows_per_slab)
    scale = _LOG2_E / tl.load(temp_ptr)
    largest = tl.full((BLOCK_N, BLOCK_P), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for first in range(slab * rows_per_slab, last, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[:, None]
        at = n.to(tl.int64) * P + p
        x = tl.load(logits_ptr + at, mask=(n < last) & (p < P), other=float("-inf"))
        x = x.to(tl.float32) * scale
        if HAS_ROW:
            x += tl.load(row_ptr + n, mask=n < last, other=0.0) * _LOG2_E
        # One running pair per element of the tile: threads meet once, after the loop.
        largest, total = _add_exp2(largest, total, x)
    tl.store(lse_SP_ptr + slab.to(tl.int64) * P + p, _natural_log(largest, total, 0), mask=p < P)


@triton.jit(do_not_specialize=["S"])
def _merge_kernel(lse_SP_ptr, lse_ptr, S, P, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    s = tl.arange(0, BLOCK_S)[:, None]
    inside = (s < S) & (p < P)
    x = tl.load(lse_SP_ptr + s.to(tl.int64) * P + p, mask=inside, other=float("-inf")) * _LOG2_E
    largest = tl.maximum(x, _LOWEST)
    lse = _natural_log(largest, tl.exp2(x - largest), 0)
    tl.store(lse_ptr + p, lse, mask=p < P)


@triton.jit(do_not_specialize=["N"])
def _row_kernel(
    logits_ptr, prototype_ptr, temp_ptr, lse_ptr, N, P,
    HAS_PROTOTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    scale = _LOG2_E / tl.load(temp_ptr)
    largest = tl.full((BLOCK_N, BLOCK_P), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)[None, :]
        at = n.to(tl.int64) * P + p
        x = tl.load(logits_ptr + at, mask=(n < N) & (p < P), other=float("-inf"))
        x = x.to(tl.float32) * scale
        if HAS_PROTOTYPE:
            x += tl.load(prototype_ptr + p, mask=p < P, other=0.0) * _LOG2_E
        largest, total = _add_exp2(largest, total, x)
    tl.store(lse_ptr + n, _natural_log(largest, total, 1), mask=n < N)


def _fit(config: Config, rows: int, num_prototypes: int) -> dict[str, int]:
    """Shrink a tile to fewer rows, at the same logits per thread, and to the prototypes."""
    columns = config["BLOCK_N"] // rows * config["BLOCK_P"]
    columns = min(columns, max(16, triton.next_power_of_2(num_prototypes)))
    return {**config, "BLOCK_N": rows, "BLOCK_P": columns}


def _prototype_triton(logits_NP: Tensor, row_N: Tensor | None, temp: Tensor) -> Tensor:
    _check(logits_NP, row_N, temp, 0)
    if logits_NP.dtype == torch.float64:  # for verification only: the kernels sum in float32
        return _prototype_chunks(logits_NP, row_N, temp)
    N, P = logits_NP.shape
    lse_P = logits_NP.new_empty(P, dtype=torch.float32)
    if P == 0:
        return lse_P
    config = config_for("sinkhorn.prototype", P, PROTOTYPE_CONFIGS)
    config = _fit(config, min(config["BLOCK_N"], triton.next_power_of_2(max(N, 1))), P)
    tiles_N, tiles_P = (triton.cdiv(i, config[b]) for i, b in ((N, "BLOCK_N"), (P, "BLOCK_P")))
    num_slabs = max(1, min(tiles_N, _PROGRAMS // tiles_P, 64))
    tiles_per_slab = max(1, triton.cdiv(tiles_N, num_slabs))
    num_slabs = max(1, triton.cdiv(tiles_N, tiles_per_slab))  # no slab without rows
    lse_SP = lse_P[None] if num_slabs == 1 else lse_P.new_empty(num_slabs, P)
    logits_NP, row_N = logits_NP.contiguous(), None if row_N is None else row_N.contiguous()
    _prototype_kernel[(tiles_P, num_slabs)](
        *(logits_NP, row_N, temp, lse_SP, N, P, tiles_per_slab * config["BLOCK_N"]),
        HAS_ROW=row_N is not None,
        **config,
    )
    if num_slabs > 1:
        _merge_kernel[(triton.cdiv(P, 128),)](
            *(lse_SP, lse_P, num_slabs, P),
            BLOCK_S=max(4, triton.next_power_of_2(num_slabs)),  # 16 bytes per thread
            BLOCK_P=128,
            num_warps=4,
        )
    return lse_P


def _row_triton(logits_NP: Tensor, prototype_P: Tensor | None, temp: Tensor) -> Tensor:
    _check(logits_NP, prototype_P, temp, 1)
    if logits_NP.dtype == torch.float64:  # as above
        return _row_chunks(logits_NP, prototype_P, temp)
    N, P = logits_NP.shape
    lse_N = logits_NP.new_empty(N, dtype=torch.float32)
    if N == 0:
        return lse_N
    config = config_for("sinkhorn.row", P, ROW_CONFIGS)
    # The DINO loss has some 64 rows: one a program then, or most multiprocessors idle.
    rows = min(config["BLOCK_N"], triton.next_power_of_2(triton.cdiv(N, 528)))
    config = _fit(config, rows, P)
    logits_NP = logits_NP.contiguous()
    prototype_P = None if prototype_P is None else prototype_P.contiguous()
    _row_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
        *(logits_NP, prototype_P, temp, lse_N, N, P),
        HAS_PROTOTYPE=prototype_P is not None,
        **config,
    )
    return lse_N


@operator("tapct::prototype_logsumexp")
def prototype_logsumexp(logits_NP: Tensor, row_N: Tensor | None, temp: Tensor) -> Tensor:
    """Return log sum_n exp(logits[n, p] / temp + row[n]); Triton on CUDA, in chunks elsewhere.

    Args:
        logits_NP: Teacher logits.
        row_N: Logarithm of each row's factor in the sum dtype; None for factors of 1.
        temp: Temperature above 0, in the sum dtype, without dimensions.

    Returns:
        lse_P in the sum dtype; -inf without rows.

    Raises:
        ValueError: A shape or dtype does not fit the others.
    """
    _check(logits_NP, row_N, temp, 0)
    return _prototype_chunks(logits_NP, row_N, temp)


prototype_logsumexp.register_kernel("cuda")(_prototype_triton)


@prototype_logsumexp.register_fake
def _(logits_NP: Tensor, row_N: Tensor | None, temp: Tensor) -> Tensor:
    _check(logits_NP, row_N, temp, 0)
    return logits_NP.new_empty(logits_NP.shape[1], dtype=temp.dtype)


@operator("tapct::row_logsumexp")
def row_logsumexp(logits_NP: Tensor, prototype_P: Tensor | None, temp: Tensor) -> Tensor:
    """Return log sum_p exp(logits[n, p] / temp + prototype[p]); Triton on CUDA, else in chunks.

    Args:
        logits_NP: Teacher logits.
        prototype_P: Logarithm of each prototype's factor in the sum dtype; None for factors of 1.
        temp: Temperature above 0, in the sum dtype, without dimensions.

    Returns:
        lse_N in the sum dtype.

    Raises:
        ValueError: A shape or dtype does not fit the others.
    """
    _check(logits_NP, prototype_P, temp, 1)
    return _row_chunks(logits_NP, prototype_P, temp)


row_logsumexp.register_kernel("cuda")(_row_triton)


@row_logsumexp.register_fake
def _(logits_NP: Tensor, prototype_P: Tensor | None, temp: Tensor) -> Tensor:
    _check(logits_NP, prototype_P, temp, 1)
    return logits_NP.new_empty(logits_NP.shape[0], dtype=temp.dtype)


@torch.no_grad()
def sinkhorn(
    logits: Sequence[Tensor | Logits],
    temp: float | Tensor,
    *,
    num_iter: int = 3,
    group: dist.ProcessGroup | None = None,
) -> list[SoftTargets]:
    """Balance the rows of each tensor over its prototypes; each is balanced by itself.

    Args:
        logits: Teacher logits (rows, prototypes): of the cls tokens, of the masked tokens. Products
            are computed anew in every pass, so that their memory is that of some rows.
        temp: Teacher temperature above 0; in a compiled step a tensor, as a float recompiles it.
        num_iter: Rounds, at least 1.
        group: Processes whose rows are balanced together; None for the rows at hand. All
            tensors share each of its collectives.

    Returns:
        Targets of each tensor, whose rows sum to 1; they keep the logits, not a copy.

    Raises:
        ValueError: A tensor is not a matrix of floats, or there is no round.
    """
    if num_iter < 1:
        raise ValueError(f"sinkhorn: num_iter={num_iter}; one round is the least")
    sources = [_as_logits(source) for source in logits]
    temps = [_as_temp(temp, source.rows_NX) for source in sources]
    prototypes: list[Tensor | None] = [None] * len(temps)
    for _ in range(num_iter):
        operands = zip(sources, prototypes, temps, strict=True)
        lses = [_columns(*o) for o in operands]
        if group is not None:
            lses = _merge_processes(lses, group)
        prototypes = [-lse_P for lse_P in lses]
    return [
        SoftTargets(*source, prototype_P, _rows(source, prototype_P, t), t)
        for source, prototype_P, t in zip(sources, prototypes, temps, strict=True)
        if prototype_P is not None
    ]


def _as_logits(logits: Tensor | Logits) -> Logits:
    rows_NX, weights_PK = Logits(logits) if isinstance(logits, Tensor) else logits
    return Logits(rows_NX.detach(), None if weights_PK is None else weights_PK.detach())


def _columns(logits: Logits, prototype_P: Tensor | None, temp: Tensor) -> Tensor:
    """Return the log sums of the prototypes, over rows that are first balanced by the factors."""

    def of_part(part: slice) -> Tensor:
        logits_MP = logits.of(part)
        row_M = None if prototype_P is None else -row_logsumexp(logits_MP, prototype_P, temp)
        part_P: Tensor = prototype_logsumexp(logits_MP, row_M, temp)
        return part_P

    lse_P: Tensor = reduce(torch.logaddexp, map(of_part, logits.parts()))
    return lse_P


def _rows(logits: Logits, prototype_P: Tensor, temp: Tensor) -> Tensor:
    rows = [-row_logsumexp(logits.of(part), prototype_P, temp) for part in logits.parts()]
    return torch.cat(rows)


@torch.no_grad()
def softmax_targets(logits: Tensor | Logits, center_P: Tensor, temp: float | Tensor) -> SoftTargets:
    """Return softmax((logits - center) / temp) as targets, for one pass over the logits.

    Args:
        logits: Teacher logits, as for ``sinkhorn``.
        center_P: Subtracted from every row.
        temp: Teacher temperature above 0; in a compiled step a tensor.

    Returns:
        Targets whose rows sum to 1; they keep the logits, not a copy.

    Raises:
        ValueError: A shape or dtype does not fit the others.
    """
    source = _as_logits(logits)
    temp = _as_temp(temp, source.rows_NX)
    prototype_P = -center_P.to(temp.dtype) / temp
    return SoftTargets(*source, prototype_P, _rows(source, prototype_P, temp), temp)


def _as_temp(temp: float | Tensor, rows_NX: Tensor) -> Tensor:
    dtype = _sum_dtype(rows_NX)
    if isinstance(temp, Tensor):
        return temp.to(rows_NX.device, dtype)
    return rows_NX.new_full((), temp, dtype=dtype)  # filled on the device, not copied there


def _merge_processes(lses: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Return logarithms of the sums over all processes.

    Two collectives, since exponentials can be added only relative to a maximum that all processes
    know, and there is no all-reduce of pairs. All tensors travel in one buffer.
    """
    lse_Q = torch.cat(lses)
    largest_Q = lse_Q.clamp(min=_LOWEST.value)
    dist.all_reduce(largest_Q, dist.ReduceOp.MAX, group)
    total_Q = torch.exp(lse_Q - largest_Q)
    dist.all_reduce(total_Q, dist.ReduceOp.SUM, group)
    return list((total_Q.log() + largest_Q).split([lse_P.numel() for lse_P in lses]))

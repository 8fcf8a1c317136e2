"""3D block masks with exact counts for all views of a batch, in one launch, from one seed.

Which view gets which count is shuffled; a view then places blocks until its count is reached or ten
in a row do not fit, and tops up token by token:

    depth  uniform in 1 .. grid depth
    area   uniform in min_block .. min(missing / depth, plane / 2), in 1 / 65536 tokens
    height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect)), aspect log-uniform
    corner uniform; a block that spans the plane, or masks more than is missing, is not placed

Every draw is a word of Philox4x32-10 at counter (index, view, purpose, 0), and all arithmetic is in
integers (a root is rounded by counting the halves below it, aspects come from a table), so the
eager definition and the kernel agree bit for bit. The seed is a tensor and every size a constant:
nothing is read back.
Shape suffixes: N views, L tokens of a view (z slowest), Z Y X tokens, M masked tokens of all views,
A aspects.
Source: DINOv2 masking (facebookresearch/dinov2 b8931f7, Apache-2.0), which is 2D; Philox, Salmon et
al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from tapct_kernels.tuning import Config, config_for

# A view is one program, and its chain of reductions over the tokens sets the time.
MASKS_CONFIGS: tuple[Config, ...] = ({"num_warps": 8}, {"num_warps": 4}, {"num_warps": 16})
_TRIES = tl.constexpr(10)  # blocks in a row that do not fit
_SHUFFLE, _PLACE, _SHAPE, _TOP_UP = (tl.constexpr(i) for i in range(4))  # purposes of draws
_ASPECTS = 4096  # log-uniform steps of 0.06 % for DINOv2's range


class BlockLaw(NamedTuple):
    """What is constant during a run, on the device that draws.

    Attributes:
        count_N: Masked tokens of each view before shuffling, int32.
        weight_N: 1 / count, float32; 1 for an unmasked view.
        aspect_2A: Aspects and their inverses in 1 / 65536, int64.
        grid_zyx: Tokens of a view along each axis.
        min_block: Least in-plane area of a block in tokens.
        num_masked: M, the sum of the counts.
    """

    count_N: Tensor
    weight_N: Tensor
    aspect_2A: Tensor
    grid_zyx: tuple[int, int, int]
    min_block: int
    num_masked: int


class BlockMasks(NamedTuple):
    """Masks of one batch.

    Attributes:
        mask_NL: bool, True where masked.
        masked_index_M: int64 into N * L, ascending.
        masked_weight_M: float32, 1 / masked tokens of the same view.
    """

    mask_NL: Tensor
    masked_index_M: Tensor
    masked_weight_M: Tensor


def block_law(
    counts: Sequence[int],
    grid_zyx: tuple[int, int, int],
    *,
    min_block: int,
    aspect: tuple[float, float],
    device: torch.device | str = "cpu",
) -> BlockLaw:
    """Prepare the constants of a run.

    Args:
        counts: Masked tokens of each view before shuffling.
        grid_zyx: Tokens of a view along each axis.
        min_block: Least in-plane area of a block in tokens.
        aspect: Smallest and largest ratio of height to width.
        device: Where masks are drawn.

    Raises:
        ValueError: A count does not fit the grid, or the grid exceeds 65,536 tokens.
    """
    num_tokens = math.prod(grid_zyx)
    if not 0 < num_tokens <= 2**16 or min(grid_zyx) < 1:
        raise ValueError(f"block_masks: a grid of {grid_zyx} has not 1 .. 65536 tokens")
    if not counts or not all(0 <= count <= num_tokens for count in counts):
        raise ValueError(f"block_masks: counts {list(counts)} are not within 0 .. {num_tokens}")
    if min_block < 1 or not 0.01 <= aspect[0] <= aspect[1] <= 100:
        raise ValueError(f"block_masks: no blocks with {min_block=} and {aspect=}")
    low, high = np.log(aspect)
    steps_A = low + (np.arange(_ASPECTS) + 0.5) / _ASPECTS * (high - low)
    aspect_2A = np.round(np.exp([steps_A, -steps_A]) * 2**16).astype(np.int64)
    count_N = torch.tensor(counts, dtype=torch.int32)
    return BlockLaw(
        count_N.to(device),
        count_N.clamp(min=1).float().reciprocal().to(device),
        torch.from_numpy(aspect_2A).to(device),
        grid_zyx,
        min_block,
        sum(counts),
    )


def _check(
    seed: Tensor, count_N: Tensor, weight_N: Tensor, aspect_2A: Tensor, grid_zyx: Sequence[int]
) -> None:
    if seed.ndim or seed.dtype != torch.int64:
        kind = f"{seed.dtype} of {seed.ndim} dimensions"
        raise ValueError(f"block_masks: seed is {kind}, not int64 of 0")
    if count_N.ndim != 1 or weight_N.shape != count_N.shape or len(grid_zyx) != 3:
        shapes = [tuple(count_N.shape), tuple(weight_N.shape), tuple(grid_zyx)]
        raise ValueError(f"block_masks: counts, weights and the grid have shapes {shapes}")
    if aspect_2A.shape != (2, _ASPECTS):
        shape = tuple(aspect_2A.shape)
        raise ValueError(f"block_masks: aspects have shape {shape}, not (2, {_ASPECTS})")


Word = TypeVar("Word", int, NDArray[np.uint64])


def philox_words(seed: int, index: Word, view: int, purpose: int) -> list[Word]:
    """Return the four 32-bit words of Philox4x32-10 at counters (index, view, purpose, 0)."""
    low = 0xFFFFFFFF
    words: list[Any] = [index, index * 0 + view, index * 0 + purpose, index * 0]
    keys = [seed & low, seed >> 32 & low]
    for _ in range(10):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            second >> 32 ^ words[1] ^ keys[0],
            second & low,
            first >> 32 ^ words[3] ^ keys[1],
            first & low,
        ]
        keys = [keys[0] + 0x9E3779B9 & low, keys[1] + 0xBB67AE85 & low]
    return words


def _rounded_root(square: int) -> int:
    """Return the rounded root of ``square`` / 2**32: how many odd numbers its double reaches."""
    return (math.isqrt(square >> 30) + 1) // 2


def _shuffled(seed: int, num_views: int) -> NDArray[np.intp]:
    """Return the place of each view in the list of counts."""
    views = np.arange(num_views, dtype=np.uint64)
    key_N = philox_words(seed, views, 0, _SHUFFLE.value)[0]
    return np.argsort(np.argsort(key_N, kind="stable"), kind="stable")


class _Law(NamedTuple):
    aspect_2A: NDArray[np.int64]
    grid_zyx: Sequence[int]
    min_block: int


def _draw_block(
    seed: int, draw: int, view: int, missing: int, law: _Law
) -> tuple[slice, slice, slice] | None:
    grid_z, grid_y, grid_x = law.grid_zyx
    place, shape = (philox_words(seed, draw, view, purpose.value) for purpose in (_PLACE, _SHAPE))
    depth = 1 + (place[0] * grid_z >> 32)
    low, high = law.min_block << 16, min((missing << 16) // depth, grid_y * grid_x << 15)
    if high < low:
        return None
    area = low + (shape[0] * (high - low) >> 32)
    aspect, inverse = law.aspect_2A[:, shape[1] * _ASPECTS >> 32].tolist()
    height, width = _rounded_root(area * aspect), _rounded_root(area * inverse)
    if not (0 < height <= grid_y and 0 < width <= grid_x) or (height, width) == (grid_y, grid_x):
        return None
    sizes = (depth, height, width)
    bounds = (grid - size + 1 for grid, size in zip(law.grid_zyx, sizes, strict=True))
    z, y, x = (word * bound >> 32 for word, bound in zip(place[1:], bounds, strict=True))
    return slice(z, z + depth), slice(y, y + height), slice(x, x + width)


def _draw_mask(seed: int, view: int, count: int, law: _Law) -> NDArray[np.bool_]:
    mask_ZYX = np.zeros(law.grid_zyx, np.bool_)
    missing, failures, draw = count, 0, 0
    while missing and failures < _TRIES.value:
        block = _draw_block(seed, draw, view, missing, law)
        added = 0 if block is None else mask_ZYX[block].size - int(mask_ZYX[block].sum())
        draw, failures = draw + 1, failures + 1
        if block is not None and 0 < added <= missing:
            mask_ZYX[block] = True
            missing, failures = missing - added, 0
    mask_L = mask_ZYX.reshape(-1)
    token_L = np.arange(mask_L.size, dtype=np.uint64)
    word_L = philox_words(seed, token_L, view, _TOP_UP.value)[0]
    # 14 random bits or more above the token's number: unique, so that the count comes out exactly
    key_L = (word_L >> np.uint64(2) & ~np.uint64(_block(mask_L.size) - 1)) | token_L
    free = np.flatnonzero(~mask_L)
    mask_L[free[np.argsort(key_L[free])[:missing]]] = True
    return mask_L


def _block(num_tokens: int) -> int:
    return max(16, 1 << (num_tokens - 1).bit_length())


def _block_masks_ref(
    seed: Tensor,
    count_N: Tensor,
    weight_N: Tensor,
    aspect_2A: Tensor,
    grid_zyx: Sequence[int],
    min_block: int,
    num_masked: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eager definition, on the CPU; the kernel agrees with every bit of it."""
    _check(seed, count_N, weight_N, aspect_2A, grid_zyx)
    key, counts = int(seed), count_N.tolist()
    law = _Law(aspect_2A.numpy(), grid_zyx, min_block)
    place_N = _shuffled(key, len(counts))
    masks = [_draw_mask(key, view, counts[place], law) for view, place in enumerate(place_N)]
    mask_NL = torch.from_numpy(np.stack(masks))
    index_M = mask_NL.flatten().nonzero()[:, 0]
    assert index_M.numel() == num_masked
    view_M = index_M // mask_NL.shape[1]
    return mask_NL, index_M, weight_N[torch.from_numpy(place_N)][view_M]


@triton.jit
def _rounded_root_at(square, limit, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK).to(tl.int64) + 1
    halves = 2 * k - 1
    return tl.sum(((halves * halves << 30) <= square) & (k <= limit + 1), axis=0)


@triton.jit
def _below(word, bound):
    """Scale a random word to 0 .. bound - 1."""
    return ((word.to(tl.uint64) * bound.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit(do_not_specialize=["N", "min_block"])
def _masks_kernel(
    seed_ptr, count_ptr, weight_ptr, aspect_ptr, mask_ptr, index_ptr, weight_M_ptr,
    N, min_block, GZ: tl.constexpr, GY: tl.constexpr, GX: tl.constexpr, ASPECTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0)
    seed = tl.load(seed_ptr)
    L: tl.constexpr = GZ * GY * GX

    # Every program deals the counts out to all views, for its own and for its first listed token.
    v = tl.arange(0, BLOCK_N)
    word, _, _, _ = tl.philox(seed, v, v * 0, v * 0 + _SHUFFLE, v * 0)
    key = tl.where(v < N, (word.to(tl.int64) << 16) | v, 1 << 60)
    own = tl.sum(tl.where(v == view, key, 0), axis=0)
    smaller = key[None, :] < key[:, None]
    place = tl.sum(smaller.to(tl.int32), axis=1)
    count = tl.load(count_ptr + place, mask=v < N, other=0)
    first = tl.sum(tl.where(v < view, count, 0), axis=0)
    missing = tl.sum(tl.where(v == view, count, 0), axis=0).to(tl.int64)
    own_place = tl.sum((key < own).to(tl.int32), axis=0)

    i = tl.arange(0, BLOCK_L)
    z, y, x = i // (GY * GX), i // GX % GY, i % GX
    masked = i < 0
    failures = tl.program_id(0) * 0
    draw = failures
    while (missing > 0) & (failures < _TRIES):
        depth_word, z_word, y_word, x_word = tl.philox(
            seed, draw, view, draw * 0 + _PLACE, draw * 0
        )
        area_word, aspect_word, _z, _w = tl.philox(seed, draw, view, draw * 0 + _SHAPE, draw * 0)
        depth = 1 + _below(depth_word, missing * 0 + GZ)
        low = min_block.to(tl.int64) << 16
        high = tl.minimum((missing << 16) // depth, GY * GX << 15)
        area = low + _below(area_word, tl.maximum(high - low, 0))
        a = _below(aspect_word, missing * 0 + ASPECTS)
        height = _rounded_root_at(area * tl.load(aspect_ptr + a), GY, BLOCK_G)
        width = _rounded_root_at(area * tl.load(aspect_ptr + ASPECTS + a), GX, BLOCK_G)
        fits = (high >= low) & (height > 0) & (height <= GY) & (width > 0) & (width <= GX)
        fits = fits & ((height < GY) | (width < GX))
        z0 = _below(z_word, GZ - depth + 1)
        y0 = _below(y_word, tl.maximum(GY - height + 1, 1).to(tl.int64))
        x0 = _below(x_word, tl.maximum(GX - width + 1, 1).to(tl.int64))
        block = (z >= z0) & (z < z0 + depth) & (y >= y0) & (y < y0 + height)
        block = block & (x >= x0) & (x < x0 + width) & (i < L)
        added = tl.sum((block & ~masked).to(tl.int32), axis=0)
        fits = fits & (added > 0) & (added <= missing)
        masked = masked | (block & fits)
        missing = tl.where(fits, missing - added, missing)
        failures = tl.where(fits, 0, failures + 1)
        draw += 1

    # Top up: the largest bound below which no more than the missing keys lie; keys are unique.
    word, _, _, _ = tl.philox(seed, i, i * 0 + view, i * 0 + _TOP_UP, i * 0)
    top_up = ((word >> 2).to(tl.int32) & -BLOCK_L) | i
    free = ~masked & (i < L)
    bound = tl.program_id(0) * 0
    for bit in range(30, -1, -1):
        raised = bound | (1 << bit)
        num_below = tl.sum((free & (top_up < raised)).to(tl.int32), axis=0)
        bound = tl.where(num_below <= missing, raised, bound)
    masked = masked | (free & (top_up < bound))

    tl.store(mask_ptr + view.to(tl.int64) * L + i, masked, mask=i < L)
    at = first + tl.cumsum(masked.to(tl.int32), axis=0) - 1
    tl.store(index_ptr + at, view.to(tl.int64) * L + i, mask=masked)
    weight = tl.load(weight_ptr + own_place)
    tl.store(weight_M_ptr + at, i * 0.0 + weight, mask=masked)


def _masks_triton(
    seed: Tensor,
    count_N: Tensor,
    weight_N: Tensor,
    aspect_2A: Tensor,
    grid_zyx: Sequence[int],
    min_block: int,
    num_masked: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(seed, count_N, weight_N, aspect_2A, grid_zyx)
    N, L = count_N.numel(), math.prod(grid_zyx)
    mask_NL = count_N.new_empty(N, L, dtype=torch.bool)
    index_M = count_N.new_empty(num_masked, dtype=torch.int64)
    weight_M = weight_N.new_empty(num_masked)
    block_L, (grid_z, grid_y, grid_x) = _block(L), grid_zyx
    _masks_kernel[(N,)](
        *(seed, count_N.contiguous(), weight_N.contiguous(), aspect_2A.contiguous()),
        *(mask_NL, index_M, weight_M, N, min_block),
        GZ=grid_z,
        GY=grid_y,
        GX=grid_x,
        ASPECTS=_ASPECTS,
        BLOCK_N=triton.next_power_of_2(max(N, 2)),
        BLOCK_L=block_L,
        BLOCK_G=triton.next_power_of_2(max(grid_y, grid_x) + 1),
        **config_for("block_masks.masks", L, MASKS_CONFIGS),
    )
    return mask_NL, index_M, weight_M


@torch.library.custom_op("tapct::block_masks", mutates_args=())
def _block_masks(
    seed: Tensor,
    count_N: Tensor,
    weight_N: Tensor,
    aspect_2A: Tensor,
    grid_zyx: Sequence[int],
    min_block: int,
    num_masked: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _block_masks_ref(seed, count_N, weight_N, aspect_2A, grid_zyx, min_block, num_masked)


_block_masks.register_kernel("cuda")(_masks_triton)


@_block_masks.register_fake
def _(
    seed: Tensor,
    count_N: Tensor,
    weight_N: Tensor,
    aspect_2A: Tensor,
    grid_zyx: Sequence[int],
    min_block: int,
    num_masked: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(seed, count_N, weight_N, aspect_2A, grid_zyx)
    return (
        count_N.new_empty(count_N.shape[0], math.prod(grid_zyx), dtype=torch.bool),
        count_N.new_empty(num_masked, dtype=torch.int64),
        weight_N.new_empty(num_masked),
    )


def block_masks(law: BlockLaw, seed: Tensor) -> BlockMasks:
    """Draw the masks of one batch; one Triton launch on CUDA, the eager definition elsewhere.

    Args:
        law: Constants of the run, on the device that draws.
        seed: int64 without dimensions, on the same device; another one for every batch.

    Raises:
        ValueError: A shape or dtype does not fit the others.
    """
    return BlockMasks(*_block_masks(seed, *law))


def block_masks_ref(law: BlockLaw, seed: Tensor) -> BlockMasks:
    """Eager definition of ``block_masks``, on the CPU."""
    return BlockMasks(*_block_masks_ref(seed, *law))

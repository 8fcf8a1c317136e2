"""3D block masks for iBOT with a number of masked tokens that never changes during a run.

Shape suffixes: N global views of one batch, L tokens of one view (z slowest), Z Y X tokens.
Counts: of N views int(N * prob) are masked. The ratio range is cut into as many equal bins; the
i-th of these views masks int(L * upper edge of bin i) tokens. Which views they are is shuffled per
batch; the sum is a constant.

One block: its in-plane area and aspect follow DINOv2 (area uniform from min_block to half the
plane or to what is still missing, aspect log-uniform); its depth is uniform in 1 .. grid depth. So
a block may span the full depth, as an organ does in a thin slab, but never the whole in-plane
grid: no block hides a slice by itself. A block that would mask more than is missing is not placed;
after ten failures in a row the rest is topped up by single tokens at random.

Source: DINOv2 masking (facebookresearch/dinov2 b8931f7, Apache-2.0), which is 2D and may miss its
target; counts as in DINOv3.
"""

import math

import numpy as np
from numpy.typing import NDArray

from tapct_fast.config import MaskConfig, Zyx

_TRIES = 10  # DINOv2: attempts before it gives up on placing another block


def masked_counts(config: MaskConfig, num_images: int, num_tokens: int) -> tuple[int, ...]:
    """Return how many tokens are masked in each of ``num_images`` views, before shuffling.

    The unmasked views come first with 0; the rest ascends through the ratio bins.
    """
    num_masked = int(num_images * config.prob)
    upper_edges = np.linspace(*config.ratio, num_masked + 1)[1:]
    return (0,) * (num_images - num_masked) + tuple(int(num_tokens * edge) for edge in upper_edges)


def draw_masks(
    config: MaskConfig, grid_zyx: Zyx, num_images: int, *, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw one batch of masks.

    Args:
        config: Shares and the law of a block.
        grid_zyx: Tokens of a view along each axis.
        num_images: Views in the batch.
        rng: Generator of this batch; see ``rng.generator``.

    Returns:
        bool (N, L), True where masked; row sums are a permutation of ``masked_counts``.
    """
    counts = masked_counts(config, num_images, math.prod(grid_zyx))
    return np.stack(
        [_draw_mask(config, grid_zyx, counts[i], rng) for i in rng.permutation(num_images)]
    )


def _draw_mask(
    config: MaskConfig, grid_zyx: Zyx, count: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    mask_ZYX = np.zeros(grid_zyx, dtype=np.bool_)
    missing, failures = count, 0
    while missing and failures < _TRIES:
        block = _draw_block(config, grid_zyx, missing, rng)
        added = 0 if block is None else mask_ZYX[block].size - int(mask_ZYX[block].sum())
        if block is None or not 0 < added <= missing:
            failures += 1
            continue
        mask_ZYX[block] = True
        missing, failures = missing - added, 0
    mask_L = mask_ZYX.reshape(-1)
    mask_L[rng.choice(np.flatnonzero(~mask_L), size=missing, replace=False)] = True
    return mask_L


def _draw_block(
    config: MaskConfig, grid_zyx: Zyx, missing: int, rng: np.random.Generator
) -> tuple[slice, slice, slice] | None:
    grid_z, grid_y, grid_x = grid_zyx
    depth = int(rng.integers(1, grid_z + 1))
    largest = min(missing / depth, grid_y * grid_x / 2)
    if largest < config.min_block:
        return None
    area = rng.uniform(config.min_block, largest)
    aspect = math.exp(rng.uniform(math.log(config.aspect[0]), math.log(config.aspect[1])))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if not (0 < height <= grid_y and 0 < width <= grid_x) or (height, width) == (grid_y, grid_x):
        return None
    z, y, x = map(int, rng.integers((grid_z - depth + 1, grid_y - height + 1, grid_x - width + 1)))
    return slice(z, z + depth), slice(y, y + height), slice(x, x + width)

"""Block masks by a host loop in NumPy: rival and oracle of ``tapct_kernels.block_masks``.

DINOv2's loop in 3D, floating point and another generator: the same law, other bits.
Shape suffixes: N views, L tokens of a view (z slowest), Z Y X tokens.
Source: DINOv2 masking (facebookresearch/dinov2 b8931f7, Apache-2.0), which is 2D and may miss its
target; counts as in DINOv3.
"""

import math

import numpy as np
from numpy.typing import NDArray

from tapct_fast.config import MaskConfig, Zyx
from tapct_fast.data.masks import masked_counts

_TRIES = 10  # DINOv2: attempts before it gives up on placing another block


def draw_masks(
    config: MaskConfig, grid_zyx: Zyx, num_images: int, *, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Return mask_NL; its row sums are a permutation of ``masked_counts``."""
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
        block = draw_block(config, grid_zyx, missing, rng)
        added = 0 if block is None else mask_ZYX[block].size - int(mask_ZYX[block].sum())
        if block is None or not 0 < added <= missing:
            failures += 1
            continue
        mask_ZYX[block] = True
        missing, failures = missing - added, 0
    mask_L = mask_ZYX.reshape(-1)
    mask_L[rng.choice(np.flatnonzero(~mask_L), size=missing, replace=False)] = True
    return mask_L


def draw_block(
    config: MaskConfig, grid_zyx: Zyx, missing: int, rng: np.random.Generator
) -> tuple[slice, slice, slice] | None:
    """Draw one block, or None where it would not fit."""
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

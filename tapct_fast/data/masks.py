"""3D block masks for iBOT with a number of masked tokens that never changes during a run.

Counts: of N views int(N * prob) are masked. The ratio range is cut into as many equal bins; the
i-th of these views masks int(L * upper edge of bin i) tokens. Which views they are is shuffled per
batch; the sum is a constant.

Blocks: ``tapct_kernels.block_masks``. Their in-plane area and aspect follow DINOv2 (area uniform
from min_block to half the plane or to what is still missing, aspect log-uniform); their depth is
uniform in 1 .. grid depth. So a block may span the full depth, as an organ does in a thin slab, but
never the whole in-plane grid: no block hides a slice by itself. After ten failures in a row the
rest is topped up by single tokens at random.

Source: DINOv2 masking (facebookresearch/dinov2 b8931f7, Apache-2.0), which is 2D and may miss its
target; counts as in DINOv3.
"""

import math

import numpy as np
import torch

from tapct_fast.config import MaskConfig, Zyx
from tapct_fast.errors import ConfigError
from tapct_kernels import BlockLaw, block_law

_MOST_TOKENS = 2**16  # the draws of block_masks


def masked_counts(config: MaskConfig, num_images: int, num_tokens: int) -> tuple[int, ...]:
    """Return how many tokens are masked in each of ``num_images`` views, before shuffling.

    The unmasked views come first with 0; the rest ascends through the ratio bins.
    """
    num_masked = int(num_images * config.prob)
    upper_edges = np.linspace(*config.ratio, num_masked + 1)[1:]
    return (0,) * (num_images - num_masked) + tuple(int(num_tokens * edge) for edge in upper_edges)


def mask_law(
    config: MaskConfig, grid_zyx: Zyx, num_images: int, *, device: torch.device | str
) -> BlockLaw:
    """Return what ``block_masks`` draws every micro-batch of a run from.

    Args:
        config: Shares and the law of a block.
        grid_zyx: Tokens of a view along each axis.
        num_images: Views in a micro-batch.
        device: Where masks are drawn and used.

    Raises:
        ConfigError: A view has too many tokens.
    """
    num_tokens = math.prod(grid_zyx)
    if num_tokens > _MOST_TOKENS:
        raise ConfigError(
            f"views.global_views.size_zyx gives {num_tokens} tokens; masks are drawn for at most "
            f"{_MOST_TOKENS}"
        )
    return block_law(
        masked_counts(config, num_images, num_tokens),
        grid_zyx,
        min_block=config.min_block,
        aspect=config.aspect,
        device=device,
    )

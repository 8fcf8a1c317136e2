"""Masks of a batch in one launch against drawing them on the host and copying them over.

The rival is DINOv2's way in 3D: a loop in NumPy, then the index and the weights from the mask, then
copies to the device. On a CPU ours is the eager definition, in Python integers.
Results are held to their counts, whatever the generator: row sums in order, one sum of the index.
Bytes are those written: mask, index and weights.
Shape: 64 global views of 3 x 28 x 28 tokens, the counts of the default recipe.
Shape suffixes: N views, L tokens, M masked tokens.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.harness import Case, Device, Work, op_bench
from bench.host_masks import draw_masks
from tapct_fast.config import MaskConfig
from tapct_fast.data.masks import mask_law, masked_counts
from tapct_kernels import block_masks

CONFIG = MaskConfig()


def host_masks(
    grid_zyx: tuple[int, int, int], num_views: int, rng: np.random.Generator, device: Device
) -> Sequence[Tensor]:
    """Draw, list and weigh on the host, then copy."""
    mask_NL = torch.from_numpy(draw_masks(CONFIG, grid_zyx, num_views, rng=rng))
    weight_N1 = mask_NL.sum(1, keepdim=True).clamp(min=1).float().reciprocal()
    index_M = mask_NL.flatten().nonzero().squeeze(1)
    weight_M = weight_N1.expand_as(mask_NL)[mask_NL]
    return [t.to(device) for t in (mask_NL, index_M, weight_M)]


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield the batch of the default recipe."""
    grid_zyx, num_views = ((1, 4, 4), 4) if is_tiny else ((3, 28, 28), 64)
    name = f"{num_views} x {'x'.join(map(str, grid_zyx))}"
    yield Case(name, partial(_work, grid_zyx, num_views, device))


def _work(grid_zyx: tuple[int, int, int], num_views: int, device: Device) -> Work:
    counts = masked_counts(CONFIG, num_views, math.prod(grid_zyx))
    law = mask_law(CONFIG, grid_zyx, num_views, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    rng = np.random.default_rng(0)

    def ours() -> Sequence[Tensor]:
        return block_masks(law, seed.add_(1))

    def theirs() -> Sequence[Tensor]:
        return host_masks(grid_zyx, num_views, rng, device)

    outputs = ours()
    return Work(
        {"tapct block_masks": ours, "host loop and copies": theirs},
        [torch.tensor(counts, dtype=torch.float64, device=device).sort().values],
        tolerance=0.0,
        bytes=sum(t.nbytes for t in outputs),
        dtype=torch.bool,
        backend="Triton kernel" if device == "cuda" else "eager definition",
        checks={
            "tapct block_masks": lambda: [_counts(*ours())],
            "host loop and copies": lambda: [_counts(*theirs())],
        },
    )


def _counts(mask_NL: Tensor, index_M: Tensor, weight_M: Tensor) -> Tensor:
    """Count by the index, and by the weights too: they are 1 / count."""
    views_M = index_M // mask_NL.shape[1]
    count_N = torch.bincount(views_M, minlength=mask_NL.shape[0])
    assert torch.equal(count_N, mask_NL.sum(1))
    assert torch.equal(weight_M, count_N.float().reciprocal()[views_M])
    return count_N.sort().values


main = op_bench(__file__, ["kernels/tapct_kernels/block_masks.py", "bench/host_masks.py"], cases)

if __name__ == "__main__":
    main()

"""What training launches: 64 global views of 3 x 28 x 28 tokens, half of them masked."""

import torch

from tapct_kernels.block_masks import _ASPECTS, _masks_triton


def _launch() -> object:
    count_N = torch.empty(64, dtype=torch.int32, device="meta")
    aspect_2A = torch.empty(2, _ASPECTS, dtype=torch.int64, device="meta")
    seed = aspect_2A.new_empty(())
    weight_N = count_N.new_empty(64, dtype=torch.float32)
    return _masks_triton(seed, count_N, weight_N, aspect_2A, [3, 28, 28], 4, 22_579)


LAUNCHES = {"64 x 3x28x28": _launch}

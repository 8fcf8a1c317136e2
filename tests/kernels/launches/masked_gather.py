"""What training launches: the listed tokens of 64 global views, bfloat16, ViT-S and ViT-B.

Training gathers tokens as they are; with a norm the op serves whoever wants normed ones.
"""

from functools import partial

import torch

from tapct_kernels.masked_gather import _backward_triton, _forward_triton

NUM_PREFIX, EPS, LISTED = 5, 1e-6, 22_579


def _launch(width: int, *, backward: bool, has_norm: bool) -> object:
    tokens_NTD = torch.empty(64, 2357, width, dtype=torch.bfloat16, device="meta")
    index_M = torch.empty(LISTED, dtype=torch.int64, device="meta")
    weight_D = torch.empty(width, device="meta") if has_norm else None
    if backward:
        grad_MD = tokens_NTD.new_empty(LISTED, width)
        return _backward_triton(grad_MD, tokens_NTD, index_M, weight_D, NUM_PREFIX, EPS)
    return _forward_triton(tokens_NTD, index_M, weight_D, weight_D, NUM_PREFIX, EPS)


LAUNCHES = {
    f"{kind} D={width}{'' if has_norm else ', as they are'}": partial(
        _launch, width, backward=kind == "backward", has_norm=has_norm
    )
    for width in (384, 768)
    for kind in ("forward", "backward")
    for has_norm in (True, False)
}

"""What training launches: 64 global views of int16 HU, bfloat16 products, float32 tokens."""

from functools import partial

import torch

from tapct_kernels.patch_embed import _backward_triton, _forward_triton

PATCH_ZYX, HU = (4, 8, 8), (-1008.0, 822.0, -86.8086, 322.6347)


def _launch(width: int, *, backward: bool) -> object:
    x_BZYX = torch.empty(64, 12, 224, 224, dtype=torch.int16, device="meta")
    weight_DK = torch.empty(width, 256, dtype=torch.bfloat16, device="meta")
    mask_BL = torch.empty(64, 2352, dtype=torch.bool, device="meta")
    row_D, pos_LD, prefix_RD = (torch.empty(*s, width, device="meta") for s in ((), (2352,), (5,)))
    if backward:
        grad_BTD = torch.empty(64, 2357, width, device="meta")
        return _backward_triton(grad_BTD, x_BZYX, weight_DK, mask_BL, PATCH_ZYX, HU)
    return _forward_triton(
        x_BZYX, weight_DK, row_D, pos_LD, row_D, mask_BL, prefix_RD, PATCH_ZYX, HU
    )


LAUNCHES = {
    f"{kind} D={width}": partial(_launch, width, backward=kind == "backward")
    for width in (384, 768)
    for kind in ("forward", "backward")
}

"""What training launches: masked tokens (J = 1) and views (J = 2) of 32 samples, 65,536 prototypes.

Operands are bfloat16 with the teacher's logits in float16, or all float32 without autocast.
"""

from functools import partial

import torch

from tapct_kernels.prototype_cross_entropy import _backward_triton, _forward_triton

P, K, TEMP = 65_536, 256, 0.1
ROWS = {"ibot": (22_579, 22_579, 1), "dino": (320, 64, 2)}  # student rows, targets, pairs


def _launch(head: str, dtype: torch.dtype, *, backward: bool) -> object:
    S, N, J = ROWS[head]
    vector_S = torch.empty(S, device="meta")
    inputs = (
        vector_S.new_empty(S, K, dtype=dtype),
        vector_S.new_empty(P, K),
        vector_S.new_empty(N, P, dtype=torch.float32 if dtype == torch.float32 else torch.float16),
        None,
        *(vector_S.new_empty(shape) for shape in ((P,), (N,), ())),
        vector_S.new_empty(S, J, dtype=torch.int64),
        vector_S.new_empty(S, J),
    )
    if backward:
        return _backward_triton(vector_S, vector_S, *inputs, TEMP)
    return _forward_triton(*inputs, TEMP)


LAUNCHES = {
    f"{kind} {head} {str(dtype).removeprefix('torch.')}": partial(
        _launch, head, dtype, backward=kind == "backward"
    )
    for dtype in (torch.bfloat16, torch.float32)
    for head in ROWS
    for kind in ("forward", "backward")
}

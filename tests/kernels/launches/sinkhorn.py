"""What training launches: DINO's 64 rows and iBOT's 22,579, 65,536 prototypes, 16-bit logits."""

from functools import partial

import torch

from tapct_kernels.sinkhorn import _prototype_triton, _row_triton

P = 65_536


def _launch(dtype: torch.dtype, rows: int, *, along_rows: bool, has_factor: bool) -> object:
    logits_NP = torch.empty(rows, P, dtype=dtype, device="meta")
    factor = logits_NP.new_empty(P if along_rows else rows, dtype=torch.float32)
    temp = factor.new_empty(())
    call = _row_triton if along_rows else _prototype_triton
    return call(logits_NP, factor if has_factor else None, temp)


LAUNCHES = {
    f"{name} N={rows} {str(dtype).removeprefix('torch.')}": partial(
        _launch, dtype, rows, along_rows=name == "row", has_factor=name != "first prototype"
    )
    for dtype, rows in (
        (torch.bfloat16, 22_579),
        (torch.bfloat16, 64),
        (torch.float16, 22_579),
    )
    for name in ("first prototype", "prototype", "row")
}

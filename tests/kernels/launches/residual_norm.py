"""What training launches: 64 global views, ViT-S and ViT-B; a float32 and a bfloat16 stream.

Under autocast the stream is float32, branches and norms are bfloat16. Drop path .3 keeps 44 views.
"""

from functools import partial

import torch

from tapct_kernels.residual_norm import _backward_triton, _forward_triton

SAMPLES, TOKENS, KEPT, EPS = 64, 2357, 44, 1e-6


def _launch(
    width: int, *, backward: bool, stream: torch.dtype, branch: bool, norm: bool, kept: int | None
) -> object:
    samples = SAMPLES if kept is None else kept
    index_K = None if kept is None else torch.empty(kept, dtype=torch.int64, device="meta")
    x_NTD = torch.empty(SAMPLES, TOKENS, width, dtype=stream, device="meta")
    branch_KTD = x_NTD.new_empty(samples, TOKENS, width, dtype=torch.bfloat16)
    row_D = torch.empty(width, device="meta")
    gamma_D, weight_D = row_D if branch else None, row_D if norm else None
    first, second = branch_KTD if branch else None, index_K if branch else None
    if backward:
        grad_out = x_NTD if branch else x_NTD.new_empty(0)
        grad_normed = branch_KTD if norm else branch_KTD.new_empty(0)
        return _backward_triton(
            *(grad_out, grad_normed, x_NTD, first, gamma_D, weight_D, second, index_K, 1.45, EPS)
        )
    bias_D = weight_D
    return _forward_triton(
        *(x_NTD, first, gamma_D, weight_D, bias_D, second, index_K, 1.45, EPS, torch.bfloat16)
    )


FORMS = {
    "residual_norm": {"branch": True, "norm": True, "kept": None, "stream": torch.float32},
    "residual_norm bf16": {"branch": True, "norm": True, "kept": None, "stream": torch.bfloat16},
    "residual_norm drop path": {
        "branch": True, "norm": True, "kept": KEPT, "stream": torch.float32,
    },
    "residual": {"branch": True, "norm": False, "kept": KEPT, "stream": torch.float32},
    "layer_norm": {"branch": False, "norm": True, "kept": KEPT, "stream": torch.float32},
}  # fmt: skip
LAUNCHES = {
    f"{name} {kind} D={width}": partial(_launch, width, backward=kind == "backward", **form)
    for name, form in FORMS.items()
    for width in (384, 768)
    for kind in ("forward", "backward")
}

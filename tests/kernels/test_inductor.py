"""Our operators are known to the compiler before it meets them."""

import subprocess
import sys

CODE = """
import torch, tapct_kernels
from tapct_kernels import inductor
inductor._register()
from torch._inductor.lowering import lowerings, maybe_layout_constraints
for name in ("masked_gather", "patch_embed_backward", "residual_norm", "prototype_cross_entropy"):
    op = getattr(torch.ops.tapct, name).default
    assert op in lowerings and maybe_layout_constraints(op) is not None, name
"""


def test_every_operator_is_registered_with_the_layout_it_was_traced_with() -> None:
    # In a process of its own: what is registered stays.
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)

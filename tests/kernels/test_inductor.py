"""Our operators are known to the compiler before it meets them."""

import subprocess
import sys

CODE = """
import torch, torch._inductor
torch.__version__ = torch.torch_version.TorchVersion("2.11.0")
import tapct_kernels
torch.compile(tapct_kernels.attention, backend="eager", fullgraph=True)(torch.ones(1, 2, 3, 1, 64))
from torch._inductor.lowering import lowerings, maybe_layout_constraints
for name in ("masked_gather", "patch_embed_backward", "residual_norm", "prototype_cross_entropy"):
    op = getattr(torch.ops.tapct, name).default
    assert op in lowerings and maybe_layout_constraints(op) is not None, name
"""


def test_before_torch_2_13_tracing_a_model_registers_them_with_the_layout_they_get() -> None:
    # In a process of its own: what is registered stays.
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)

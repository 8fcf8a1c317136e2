"""What a block needs on a CPU beside matrix products, in bfloat16, natively.

For inference: PyTorch takes the branch, its sum, the norm and the cast in a pass each; these take
one. All run on PyTorch's own threads. Custom operators, so that a graph can hold them.

Shape suffixes: N volumes or rows, T tokens, D width, I input width, O output width.
"""

import torch
from torch import Tensor

from tapct_fast import _native
from tapct_fast.model.cpu_attention import as_array


def runs_here(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Say whether ``add_norm`` and ``gelu`` can take tokens of this width."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and width % 16 == 0
        and _native.has_avx512_bf16()
    )


@torch.library.custom_op("tapct::add_norm", mutates_args=("x_NTD",))
def add_norm(
    x_NTD: Tensor, branch_NTD: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> Tensor:
    """Add a branch to the tokens in place and return their LayerNorm.

    Args:
        x_NTD: float32, contiguous.
        branch_NTD: bfloat16, or None to add nothing.
        weight_D: float32.
        bias_D: float32.
        eps: Added to the variance.

    Returns:
        normed_NTD bfloat16.
    """
    out_NTD = torch.empty_like(x_NTD, dtype=torch.bfloat16)
    _native.add_norm(
        x_NTD.flatten(0, -2).numpy(),
        None if branch_NTD is None else as_array(branch_NTD.contiguous().flatten(0, -2)),
        weight_D.numpy(),
        bias_D.numpy(),
        eps,
        as_array(out_NTD.flatten(0, -2)),
        torch.get_num_threads(),
    )
    return out_NTD


@add_norm.register_fake
def _(x_NTD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_NTD, dtype=torch.bfloat16)


@torch.library.custom_op("tapct::gelu_", mutates_args=("x",))
def gelu_(x: Tensor) -> None:
    """Apply the exact GELU to bfloat16 in place."""
    _native.gelu(as_array(x), torch.get_num_threads())


def pack(weight_OI: Tensor, bias_O: Tensor) -> Tensor | None:
    """Return a weight in the layout that oneDNN multiplies by, for ``packed_linear``.

    PyTorch turns a weight into it anew in each product, and copies the bias over the result first:
    a fifth of the time of the products. The operators are those of its own compiler and no public
    interface, so they are tried here.

    Returns:
        An opaque tensor; None where this PyTorch has no such operators or they compute otherwise.
    """
    x_NI = weight_OI[:7] + 1
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
        found = packed_linear(x_NI, packed, bias_O)
    except (AttributeError, RuntimeError, TypeError):
        return None
    expected = torch.nn.functional.linear(x_NI, weight_OI, bias_O)
    return packed if torch.allclose(found, expected, rtol=2**-6, atol=1e-3) else None


def packed_linear(x: Tensor, packed: Tensor, bias_O: Tensor) -> Tensor:
    """Return ``x W^T + b`` for a weight that ``pack`` returned."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, "none", [], "")
    return out

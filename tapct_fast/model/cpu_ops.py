"""What a block needs on a CPU beside matrix products, in bfloat16, natively.

For inference: PyTorch takes the branch, its sum, the norm and the cast in a pass each; these take
one. Attention on AMX tiles, which has a gradient too, is offered to ``tapct_kernels.attention``,
which tries it before it chooses it. All run on PyTorch's own threads. Custom operators, so that a
graph can hold them.

Shape suffixes: N volumes or rows, T tokens, H heads, K head width, D width.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast import _native
from tapct_kernels.attention import provide_amx


def runs_here(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Say whether ``add_norm`` and ``gelu`` can take tokens of this width."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and width % 16 == 0
        and _native.has_avx512_bf16()
    )


@torch.library.custom_op("tapct::attention_amx", mutates_args=())
def _attention_amx(qkv_NT3HK: Tensor) -> tuple[Tensor, Tensor]:
    """Return out_NTHK and the level_NHT, base 2, that the backward needs."""
    qkv_NT3HK = qkv_NT3HK.contiguous()
    out_NTHK, level_NHT = _attention_outputs(qkv_NT3HK)
    _native.attention_amx(
        _bits(qkv_NT3HK), _bits(out_NTHK), level_NHT.numpy(), torch.get_num_threads()
    )
    return out_NTHK, level_NHT


@_attention_amx.register_fake
def _attention_outputs(qkv_NT3HK: Tensor) -> tuple[Tensor, Tensor]:
    volumes, tokens, _, heads, width = qkv_NT3HK.shape
    level_NHT = qkv_NT3HK.new_empty(volumes, heads, tokens, dtype=torch.float32)
    return qkv_NT3HK.new_empty(volumes, tokens, heads, width), level_NHT


@torch.library.custom_op("tapct::attention_amx_backward", mutates_args=())
def _attention_amx_backward(
    grad_out_NTHK: Tensor, qkv_NT3HK: Tensor, out_NTHK: Tensor, level_NHT: Tensor
) -> Tensor:
    grad_out_NTHK, qkv_NT3HK = grad_out_NTHK.contiguous(), qkv_NT3HK.contiguous()
    grad_qkv_NT3HK = torch.empty_like(qkv_NT3HK)
    _native.attention_amx_backward(
        *(_bits(grad_out_NTHK), _bits(qkv_NT3HK), _bits(out_NTHK), level_NHT.numpy()),
        *(_bits(grad_qkv_NT3HK), torch.get_num_threads()),
    )
    return grad_qkv_NT3HK


@_attention_amx_backward.register_fake
def _(_grad_out_NTHK: Tensor, qkv_NT3HK: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(qkv_NT3HK, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out_NTHK: Tensor, _: Tensor) -> Tensor:
    grad_qkv_NT3HK: Tensor = _attention_amx_backward(grad_out_NTHK, *ctx.saved_tensors)
    return grad_qkv_NT3HK


_attention_amx.register_autograd(_backward, setup_context=_save_for_backward)


def attention_amx(qkv_NT3HK: Tensor) -> Tensor:
    """Return out_NTHK; see ``tapct_kernels.attention``. bfloat16 of head width 64."""
    out_NTHK: Tensor = _attention_amx(qkv_NT3HK)[0]
    return out_NTHK


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
        None if branch_NTD is None else _bits(branch_NTD.contiguous().flatten(0, -2)),
        weight_D.numpy(),
        bias_D.numpy(),
        eps,
        _bits(out_NTD.flatten(0, -2)),
        torch.get_num_threads(),
    )
    return out_NTD


@add_norm.register_fake
def _(x_NTD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_NTD, dtype=torch.bfloat16)


@torch.library.custom_op("tapct::gelu_", mutates_args=("x",))
def gelu_(x: Tensor) -> None:
    """Apply the exact GELU to bfloat16 in place."""
    _native.gelu(_bits(x), torch.get_num_threads())


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


def _bits(x: Tensor) -> NDArray[np.uint16]:
    bits: NDArray[np.uint16] = x.detach().view(torch.uint16).numpy()
    return bits


if _native.has_amx():
    provide_amx(attention_amx, "tapct_fast")

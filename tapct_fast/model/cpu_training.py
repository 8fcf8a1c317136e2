"""What a block needs on a CPU beside matrix products, for training in float32, natively.

PyTorch takes a pass each for the bias of a linear layer, the GELU behind it, their gradients and
the sum over rows that is the bias's; these take one forward and one backward. ``residual_norm`` of
``tapct_kernels`` gets its kernels for the CPU from here, which take branch and norm in bfloat16
too, as they are under autocast. All run on PyTorch's own threads and give the same bits for any
number of them.

Shape suffixes: N samples or rows, T tokens, D width, K J listed samples.
"""

from typing import Any

import torch
from torch import Tensor

from tapct_fast import _native
from tapct_fast.model.cpu_attention import as_array, read_array
from tapct_kernels.operator import operator
from tapct_kernels.residual_norm import provide_cpu


@operator("tapct::bias_gelu")
def bias_gelu(x_ND: Tensor, bias_D: Tensor) -> Tensor:
    """Return the exact GELU of ``x + bias``, float32 on the CPU of any leading shape."""
    x_ND = x_ND.contiguous()
    out_ND = torch.empty_like(x_ND)
    rows = [as_array(t.flatten(0, -2)) for t in (x_ND, out_ND)]
    _native.bias_gelu(rows[0], read_array(bias_D), rows[1], torch.get_num_threads())
    return out_ND


@bias_gelu.register_fake
def _(x_ND: Tensor, _bias_D: Tensor) -> Tensor:
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format)


@operator("tapct::bias_gelu_backward")
def _bias_gelu_backward(grad_ND: Tensor, x_ND: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
    grad_ND, x_ND = grad_ND.contiguous(), x_ND.contiguous()
    grad_x_ND, grad_bias_D = torch.empty_like(x_ND), bias_D.new_empty(bias_D.shape)
    rows = [as_array(t.flatten(0, -2)) for t in (grad_ND, x_ND, grad_x_ND)]
    parameters = [read_array(bias_D), as_array(grad_bias_D)]
    _native.bias_gelu_backward(
        *(rows[0], rows[1], parameters[0], rows[2], parameters[1]), torch.get_num_threads()
    )
    return grad_x_ND, grad_bias_D


@_bias_gelu_backward.register_fake
def _(_grad_ND: Tensor, x_ND: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
    grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    return grad_x_ND, bias_D.new_empty(bias_D.shape)


def _save_for_backward(
    ctx: Any,
    inputs: tuple[Tensor, Tensor],
    output: Tensor,  # noqa: ARG001 - PyTorch gives it by name
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor]:
    grad_x_ND, grad_bias_D = _bias_gelu_backward(grad_ND, *ctx.saved_tensors)
    return grad_x_ND, grad_bias_D


bias_gelu.register_autograd(_backward, setup_context=_save_for_backward)


def _residual_norm(*arguments: Any) -> None:
    _native.residual_norm(*_as_arrays(arguments))


def _residual_norm_backward(*arguments: Any) -> None:
    _native.residual_norm_backward(*_as_arrays(arguments))


def _as_arrays(arguments: tuple[Any, ...]) -> list[Any]:
    """Return the arguments with arrays for tensors, and the number of threads behind them.

    Vectors are parameters and indices, which are only read.
    """
    arrays = [
        a if not isinstance(a, Tensor) else (read_array if a.ndim == 1 else as_array)(a)
        for a in arguments
    ]
    return [*arrays, torch.get_num_threads()]


provide_cpu(_residual_norm, _residual_norm_backward)

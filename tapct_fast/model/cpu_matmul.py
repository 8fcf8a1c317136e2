"""Matrix products of float32 on the AMX tiles of a CPU, which multiply bfloat16 and sum in float32.

A number is split into bfloat16 pieces, each the nearest to what the ones before leave, and the last
cut off. Three hold its 24 bits; of their nine products six count beside the last of these:

    a b = a0 b0 + (a0 b1 + a1 b0) + (a0 b2 + a1 b1 + a2 b0),    a = a0 + a1 + a2

so the errors are of the size of oneMKL's. After ``torch.set_float32_matmul_precision("high")`` two
pieces and three products do, as PyTorch describes it, with 16 bits. ``bench.matmul`` measures both.

Shape suffixes: M rows, K elements of a sum, N columns; D input width, E output width.
Source: arXiv:1904.06376.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast import _native
from tapct_fast.model.cpu_attention import as_array, read_array
from tapct_kernels.operator import operator

_HAS_AMX = _native.has_amx()


def fits(x_ND: Tensor, weight_ED: Tensor) -> bool:
    """Say whether ``linear`` is for this input and weight: whether it is faster than oneMKL.

    An export must hold no operator of ours, and any size of batch.
    """
    return (
        _HAS_AMX
        and x_ND.device.type == "cpu"
        and x_ND.dtype == weight_ED.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and _is_faster(x_ND.shape[:-1].numel(), weight_ED.shape[1], weight_ED.shape[0])
    )


def _is_faster(rows: int, inner: int, columns: int, *, is_turned: bool = False) -> bool:
    """Say whether enough products share the packing of the factors, a pass over either.

    A left factor whose columns are contiguous is turned, which more of them must pay for. The
    limits were fitted on a Xeon to more shapes than ``bench.matmul`` has.
    """
    left, right = (200, 200) if is_turned else (90, 150)
    return inner >= 128 and left * rows + right * columns <= rows * columns


@operator("tapct::addmm_amx")
def addmm(bias_N: Tensor | None, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Return ``bias + a b`` for float32 matrices on the CPU of any strides.

    By PyTorch where that is faster; the gradients are such products too.
    """
    (rows, inner), columns, is_turned = a_MK.shape, b_KN.shape[1], a_MK.stride(1) != 1
    if not (_HAS_AMX and _is_faster(rows, inner, columns, is_turned=is_turned)):
        return a_MK @ b_KN if bias_N is None else torch.addmm(bias_N, a_MK, b_KN)
    out_MN = a_MK.new_empty(rows, columns)
    _native.matmul_amx(
        *(_matrix(a_MK), _matrix(b_KN), None if bias_N is None else read_array(bias_N)),
        as_array(out_MN),
        pieces=3 if torch.get_float32_matmul_precision() == "highest" else 2,
        num_threads=torch.get_num_threads(),
    )
    return out_MN


@addmm.register_fake
def _(_bias_N: Tensor | None, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    return a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])


def _save_for_backward(
    ctx: Any,
    inputs: tuple[Tensor | None, Tensor, Tensor],
    output: Tensor,  # noqa: ARG001 - PyTorch gives it by name
) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    a_MK, b_KN = ctx.saved_tensors
    needs_bias, needs_a, needs_b = ctx.needs_input_grad
    grad_N = grad_MN.sum(0) if needs_bias else None
    grad_MK = addmm(None, grad_MN, b_KN.t()) if needs_a else None
    if not needs_b:
        return grad_N, grad_MK, None
    if b_KN.stride(1) == 1:
        return grad_N, grad_MK, addmm(None, a_MK.t(), grad_MN)
    # Of a weight's transpose, laid out as the weight is: else a copy would follow.
    return grad_N, grad_MK, addmm(None, grad_MN.t(), a_MK).t()


addmm.register_autograd(_backward, setup_context=_save_for_backward)


def linear(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """Return ``x W^T + b`` by ``addmm``, for x of any leading shape."""
    out_NE: Tensor = addmm(bias_E, x_ND.flatten(0, -2), weight_ED.t())
    return out_NE.view(*x_ND.shape[:-1], -1)


def _matrix(x_MN: Tensor) -> NDArray[Any]:
    """Return an array to read a matrix by, of which one axis is contiguous."""
    is_plain = x_MN.is_contiguous() or x_MN.t().is_contiguous()
    return read_array(x_MN if is_plain else x_MN.contiguous())

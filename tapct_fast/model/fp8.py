"""Linear layers whose products take float8 operands, for training; weights stay as they are.

Every row of an operand, along the sum, is scaled to the range of e4m3 by its own largest magnitude:

    q(x)_nd = e4m3(x_nd / s_n),    s_n = max_d |x_nd| / 448
    y_ne = s_n t_e sum_d q(x)_nd q(w)_ed + b_e

t being the scales of the weight's rows. The gradient of x is the same product of the gradient of y
and the transposed weight, scaled anew: e4m3 there too, since a row needs precision more than range.
The gradient of the weight is a product in bfloat16, because it sums over all tokens and outliers
among them would coarsen the others; that of the bias is a sum. What comes out is bfloat16.
A row that holds something not finite has a scale that is not finite, and gives NaN.

Shape suffixes: N rows (tokens), D input width, E output width.
Source: the choice of rows and formats, DINOv3, arXiv:2508.10104 (its code, layers/fp8_linear.py).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
_TINY = 2.0**-100  # magnitude below which a row counts as zero; products of two scales stay normal

Product = Callable[[Tensor, Tensor], Tensor]  # (x_ND, w_ED) -> bfloat16 x_ND @ w_ED.T


class Rows(NamedTuple):
    """A matrix in e4m3 and the float32 factor of each row."""

    q_ND: Tensor
    scale_N1: Tensor


def quantise(x_ND: Tensor) -> Rows:
    """Scale every row to the range of e4m3 and round."""
    x_ND = x_ND.float()
    scale_N1 = x_ND.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / _MAX
    # Contiguous: a transposed weight is turned when it has one byte.
    return Rows((x_ND / scale_N1).to(torch.float8_e4m3fn).contiguous(), scale_N1)


def product_ref(x_ND: Tensor, w_ED: Tensor) -> Tensor:
    """Eager definition: quantise, dequantise, multiply in float32."""
    (x_q, x_scale), (w_q, w_scale) = quantise(x_ND), quantise(w_ED)
    with torch.autocast(x_ND.device.type, enabled=False):
        out_NE = (x_q.float() * x_scale) @ (w_q.float() * w_scale).t()
    return out_NE.to(torch.bfloat16)


def product(x_ND: Tensor, w_ED: Tensor) -> Tensor:
    """Multiply on float8 units where the device has them; PyTorch emulates this on the CPU."""
    (x_q, x_scale), (w_q, w_scale) = quantise(x_ND), quantise(w_ED)
    with torch.autocast(x_ND.device.type, enabled=False):  # it would round the emulation's sums
        # Not use_fast_accum: over all of D, Hopper then sums in 14 bits (arXiv:2412.19437, 3.3.2).
        return torch._scaled_mm(x_q, w_q.t(), x_scale, w_scale.t(), out_dtype=torch.bfloat16)


def refusal(device: torch.device) -> str:
    """Return why ``product`` is not for training on a device; empty text if it is.

    It is tried: cuBLAS may refuse scales of rows on a device with float8 units (pytorch#192707).
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return "it has no float8 units; those are on CUDA devices of compute capability 8.9 or more"
    x_ND = torch.linspace(-3, 3, 64 * 128, device=device).reshape(64, 128)
    try:
        out_NE, expected_NE = product(x_ND, x_ND).float(), product_ref(x_ND, x_ND).float()
    except RuntimeError as error:
        return f"torch._scaled_mm failed: {str(error).splitlines()[0]}"
    is_right = (out_NE - expected_NE).norm() <= 2**-7 * expected_NE.norm()  # twice the rounding
    return "" if is_right else "torch._scaled_mm gives other numbers than the definition"


class _Linear(torch.autograd.Function):
    """``product`` with its gradients; see above for their formats."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_ED: Tensor, multiply: Product) -> Tensor:
        ctx.save_for_backward(x_ND.to(torch.bfloat16), w_ED)
        ctx.multiply, ctx.dtype = multiply, x_ND.dtype
        return multiply(x_ND, w_ED)

    @staticmethod
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, w_ED = ctx.saved_tensors
        grad_ND = grad_ED = None
        if ctx.needs_input_grad[0]:
            grad_ND = ctx.multiply(grad_NE, w_ED.t()).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_ED = (grad_NE.t() @ x_ND).to(w_ED.dtype)
        return grad_ND, grad_ED, None


def fp8_linear(x: Tensor, *, linear: nn.Linear, multiply: Product = product) -> Tensor:
    """Return ``linear(x)`` in bfloat16, of any leading shape."""
    out_NE: Tensor = _Linear.apply(x.flatten(0, -2), linear.weight, multiply)  # type: ignore[no-untyped-call]
    out: Tensor = out_NE.unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call]
    return out if linear.bias is None else out + linear.bias.to(out.dtype)


def use_fp8(blocks: Iterable[nn.Module], multiply: Product = product) -> None:
    """Let the linear layers of blocks compute in float8 from now on.

    Parameters, their names, hooks and shards are untouched: only what ``forward`` is changes.

    Args:
        blocks: Of a backbone; the widths of their layers are multiples of 16.
        multiply: ``product``, or ``product_ref`` to emulate it.
    """
    for block in blocks:
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                linear.forward = partial(fp8_linear, linear=linear, multiply=multiply)  # type: ignore[method-assign]

"""A linear layer with the GELU behind it, by the kernel that fits the device and the dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.model.cpu_training import bias_gelu


def linear_gelu(x_ND: Tensor, linear: nn.Linear) -> Tensor:
    """Return ``gelu(linear(x))``, exact.

    In float32 on the CPU the bias joins the GELU: with bias and GELU in one pass the product needs
    none. Elsewhere, under autocast, and in an export, which must hold no operator of ours, these
    are the layer and ``F.gelu``; so they are for a layer that is not as built, since an adapter or
    a hook must be called.
    """
    if _fuses(x_ND, linear):
        out_ND: Tensor = bias_gelu(F.linear(x_ND, linear.weight), linear.bias)
        return out_ND
    return F.gelu(linear(x_ND))


def _fuses(x_ND: Tensor, linear: nn.Linear) -> bool:
    return (
        x_ND.device.type == "cpu"
        and x_ND.dtype == linear.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and type(linear) is nn.Linear
        and "forward" not in vars(linear)  # float8
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
    )

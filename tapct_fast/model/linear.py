"""Linear layers, alone or with the GELU behind them, by what fits the device and the dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.model import cpu_matmul
from tapct_fast.model.cpu_training import bias_gelu


def product(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b`` by ``F.linear``, or on AMX tiles in float32 where that is faster."""
    if cpu_matmul.fits(x_ND, weight_ED):
        return cpu_matmul.linear(x_ND, weight_ED, bias_E)
    return F.linear(x_ND, weight_ED, bias_E)


def linear(x_ND: Tensor, layer: nn.Linear) -> Tensor:
    """Return ``layer(x)``, by ``product`` unless the layer is not as built: see ``_is_plain``."""
    out_NE: Tensor = product(x_ND, layer.weight, layer.bias) if _is_plain(layer) else layer(x_ND)
    return out_NE


def linear_gelu(x_ND: Tensor, layer: nn.Linear) -> Tensor:
    """Return ``gelu(layer(x))``, exact.

    In float32 on the CPU the bias joins the GELU: with bias and GELU in one pass the product needs
    none. Elsewhere, under autocast, and in an export, which must hold no operator of ours, these
    are the layer and ``F.gelu``.
    """
    if _fuses(x_ND, layer):
        out_NE: Tensor = bias_gelu(product(x_ND, layer.weight), layer.bias)
        return out_NE
    return F.gelu(layer(x_ND))


def _fuses(x_ND: Tensor, layer: nn.Linear) -> bool:
    return (
        x_ND.device.type == "cpu"
        and x_ND.dtype == layer.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and _is_plain(layer)
    )


def _is_plain(layer: nn.Linear) -> bool:
    """Say whether a layer is as built: an adapter in its place, or a hook, must be called."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)  # float8
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )

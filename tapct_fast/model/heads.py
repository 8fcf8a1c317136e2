"""The prototype head of DINO and iBOT.

Shape suffixes: N rows, D input width, K bottleneck width, P prototypes.
Source: DINOv2's dino_head.py (Apache-2.0) for the layers, names and initialisation.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.config import HeadConfig
from tapct_fast.model.linear import linear, linear_gelu
from tapct_kernels import Logits


class Projection(NamedTuple):
    """What a head makes of its rows; their logits are many times larger and often need not exist.

    Attributes:
        features_NK: Bottleneck features of unit length.
        prototypes_PK: Effective weights of the prototypes.
    """

    features_NK: Tensor
    prototypes_PK: Tensor

    def product(self) -> Logits:
        """Return the logits as a product, to be computed wherever they are read."""
        features_NK, prototypes_PK = self
        device_type = features_NK.device.type
        if torch.is_autocast_enabled(device_type):
            # Few CPUs multiply in float16; one that does not takes six times as long as in float32.
            dtype = torch.float32 if device_type == "cpu" else torch.float16
            features_NK, prototypes_PK = features_NK.to(dtype), prototypes_PK.to(dtype)
        return Logits(features_NK, prototypes_PK)

    def logits(self) -> Tensor:
        """Return logits_NP, under autocast in float16 whatever its dtype.

        They are at most the gain, so float16 holds them with 8 times the precision of bfloat16,
        which at a teacher temperature of 0.04 would be wrong by 5 % in the exponential.
        """
        is_rounded = torch.is_autocast_enabled(self.features_NK.device.type)
        product = self.product()
        return product.stored(torch.float16 if is_rounded else product.rows_NX.dtype)


class Prototypes(nn.Module):
    """Weights of a bias-free linear map, ``weight_g * weight_v / |weight_v|`` per row."""

    def __init__(self, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.zeros(num_prototypes, bottleneck_dim))

    def forward(self) -> Tensor:
        """Return prototypes_PK."""
        norm_P1 = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        prototypes_PK: Tensor = self.weight_v * (self.weight_g / norm_P1)
        return prototypes_PK


class PrototypeHead(nn.Module):
    """MLP to an L2-normalised bottleneck, then prototypes.

    Call ``init_weights`` before training, or load weights.
    """

    def __init__(self, in_dim: int, config: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[config.hidden_dim] * (config.num_layers - 1), config.bottleneck_dim]
        layers: list[nn.Module] = []
        for wide_in, wide_out in pairwise(widths):
            layers += [nn.Linear(wide_in, wide_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(config.bottleneck_dim, config.num_prototypes)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise every parameter as DINOv2 does, as a pure function of ``seed``."""
        generator = torch.Generator(self.last_layer.weight_v.device).manual_seed(seed)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
                nn.init.zeros_(layer.bias)
        bound = self.last_layer.weight_v.shape[1] ** -0.5  # nn.Linear's default
        nn.init.uniform_(self.last_layer.weight_v, -bound, bound, generator=generator)
        nn.init.ones_(self.last_layer.weight_g)

    def bottleneck(self, x_ND: Tensor) -> Tensor:
        """Return the features the prototypes see, of unit length."""
        *hidden, last = (layer for layer in self.mlp if isinstance(layer, nn.Linear))
        for layer in hidden:
            x_ND = linear_gelu(x_ND, layer)
        x_NK = linear(x_ND, last)
        return F.normalize(x_NK, dim=-1, eps=1e-6 if x_NK.dtype == torch.float16 else 1e-12)

    def forward(self, x_ND: Tensor) -> Projection:
        """Return the rows' features and the prototypes."""
        return Projection(self.bottleneck(x_ND), self.last_layer())

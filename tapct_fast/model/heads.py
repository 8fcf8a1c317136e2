"""The prototype head of DINO and iBOT.

Shape suffixes: N rows, D input width, K bottleneck width, P prototypes.
Source: DINOv2's dino_head.py (Apache-2.0) for the layers, names and initialisation.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.config import HeadConfig


class Prototypes(nn.Module):
    """A bias-free linear map whose rows are ``weight_g * weight_v / |weight_v|``."""

    def __init__(self, bottleneck_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.zeros(num_prototypes, bottleneck_dim))

    def weight_PK(self) -> Tensor:
        """Return the effective weight."""
        norm_P1 = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        weight_PK: Tensor = self.weight_v * (self.weight_g / norm_P1)
        return weight_PK

    def forward(self, x_NK: Tensor) -> Tensor:
        """Return logits_NP."""
        return F.linear(x_NK, self.weight_PK())


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
        x_NK = self.mlp(x_ND)
        return F.normalize(x_NK, dim=-1, eps=1e-6 if x_NK.dtype == torch.float16 else 1e-12)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return logits_NP."""
        logits_NP: Tensor = self.last_layer(self.bottleneck(x_ND))
        return logits_NP

"""Voxels to tokens: the learned projection and the shapes it accepts.

Shape suffixes: B batch, C channels (one), Z Y X voxels, L patch tokens, D width, R prefix rows
(cls and registers), T = R + L.
"""

import math

import torch
from torch import Tensor, nn

from tapct_fast.config import HuConfig, Zyx
from tapct_fast.errors import InputError
from tapct_kernels import patch_embed


class PatchProjection(nn.Module):
    """Weight and bias of a convolution whose stride is its kernel, under a convolution's names.

    No convolution module: a strided 3D convolution falls to slow kernels in several cuDNN versions.
    """

    def __init__(self, dim: int, patch_zyx: Zyx) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 1, *patch_zyx))
        self.bias = nn.Parameter(torch.zeros(dim))


class PatchEmbed(nn.Module):
    """Project patches and assemble the token buffer around them."""

    def __init__(self, dim: int, patch_zyx: Zyx, hu: HuConfig) -> None:
        super().__init__()
        self.patch_zyx = patch_zyx
        self.hu = hu
        self.proj = PatchProjection(dim, patch_zyx)

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise as the convolution would be: uniform within 1 / sqrt(fan in)."""
        bound = 1 / math.sqrt(math.prod(self.patch_zyx))
        nn.init.uniform_(self.proj.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.proj.bias, -bound, bound, generator=generator)

    def grid_zyx(self, x_BCZYX: Tensor) -> Zyx:
        """Return the tokens along each axis of ``x_BCZYX``.

        Raises:
            InputError: The volume is not one channel of whole patches.
        """
        if x_BCZYX.ndim != 5 or x_BCZYX.shape[1] != 1:
            raise InputError(f"x of shape {tuple(x_BCZYX.shape)} is not (B, 1, Z, Y, X)")
        size_zyx = x_BCZYX.shape[2:]
        if any(s == 0 or s % p for s, p in zip(size_zyx, self.patch_zyx, strict=True)):
            raise InputError(
                f"x of {tuple(size_zyx)} voxels is not a multiple of the patch {self.patch_zyx}; "
                "pad it at the end with air (-1024 HU) before it is normalised"
            )
        z, y, x = (s // p for s, p in zip(size_zyx, self.patch_zyx, strict=True))
        return z, y, x

    def forward(
        self,
        x_BCZYX: Tensor,
        pos_LD: Tensor,
        prefix_RD: Tensor,
        mask_token_D: Tensor,
        mask_BL: Tensor | None,
    ) -> Tensor:
        """Return tokens_BTD; int16 input is HU, clipped and z-scored on the way."""
        weight_DK = self.proj.weight.flatten(1)
        device_type = x_BCZYX.device.type
        if torch.is_autocast_enabled(device_type):
            # Only the product is rounded: bias, position and the residual stream stay as they are.
            weight_DK = weight_DK.to(torch.get_autocast_dtype(device_type))
        tokens_BTD: Tensor = patch_embed(
            x_BCZYX.squeeze(1),
            weight_DK,
            self.proj.bias,
            pos_LD,
            mask_token_D,
            mask_BL,
            prefix_RD,
            self.patch_zyx,
            (*self.hu.clip, self.hu.mean, self.hu.std),
        )
        return tokens_BTD

"""The 3D vision transformer, under DINOv2's parameter names.

Shape suffixes: B batch, C channels (one), Z Y X voxels, L patch tokens in z, y, x order,
R registers, T = 1 + R + L tokens in the order cls, registers, patches, D width, S block,
N kept rows of the batch.
Source: DINOv2 with registers, arXiv:2304.07193 and arXiv:2309.16588; volumetric as in TAP-CT,
arXiv:2512.00872.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.config import HuConfig, VitConfig, Zyx
from tapct_fast.errors import InputError
from tapct_fast.model.block import NORM_EPS, Block, LayerScale, draw_kept_rows, start_stream
from tapct_fast.model.patch_embed import PatchEmbed


class VitOutput(NamedTuple):
    """Normed tokens by name; ``hidden`` holds the patch tokens after each block, if asked for."""

    cls_BD: Tensor
    registers_BRD: Tensor
    patches_BLD: Tensor
    grid_zyx: Zyx
    hidden: tuple[Tensor, ...] = ()


class Vit(nn.Module):
    """A plain ViT on volumes; call ``init_weights`` before training, or load weights.

    Args:
        config: Architecture.
        hu: Clip and z-score of int16 input; the released processor's constants by default.
    """

    def __init__(self, config: VitConfig, hu: HuConfig | None = None) -> None:
        super().__init__()
        self.config = config
        dim, (z, y, x) = config.dim, config.grid_zyx
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + z * y * x, dim))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(dim, config.patch_zyx, hu or HuConfig())
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    @property
    def num_prefix(self) -> int:
        """Rows in front of the patches: the cls token and the registers."""
        return 1 + self.config.num_registers

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise every parameter as DINOv2 does, as a pure function of ``seed``."""
        generator = torch.Generator(self.cls_token.device).manual_seed(seed)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        if self.config.num_registers:
            nn.init.normal_(self.register_tokens, std=1e-6, generator=generator)
        nn.init.zeros_(self.mask_token)
        self.patch_embed.init_weights(generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale) and module.gamma is not None:
                nn.init.constant_(module.gamma, self.config.layer_scale or 0.0)

    def _kept_rows(self, x_BTD: Tensor, seed: int | None) -> list[Tensor | None]:
        """Return rows_N of each branch in order, None where every row runs, and None at the end."""
        depth, drop_path = self.config.depth, self.config.drop_path
        if seed is None or drop_path == 0:
            return [None] * (2 * depth + 1)
        keep_S2N = draw_kept_rows(seed, depth=depth, batch=x_BTD.shape[0], drop_path=drop_path)
        rows = keep_S2N.to(x_BTD.device, non_blocking=True).flatten(0, 1).unbind(0)
        return [*rows, None]

    def _run_blocks(
        self, x_BTD: Tensor, num_blocks: int, drop_seed: int | None, taps: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the tokens after the last block, and after each of the blocks in ``taps``."""
        blocks, rows = self.blocks[:num_blocks], self._kept_rows(x_BTD, drop_seed)
        tapped: list[Tensor] = []
        norms: list[Any] = [block.norm1 for block in blocks]  # Any: a ModuleList forgets its type
        x_BTD, normed_KTD = start_stream(x_BTD, norms[0], rows[0])
        for i, (block, next_norm) in enumerate(zip(blocks, [*norms[1:], None], strict=True)):
            x_BTD, normed_KTD = block(x_BTD, normed_KTD, rows[2 * i : 2 * i + 3], next_norm)
            if i in taps:
                tapped.append(x_BTD)
        return x_BTD, tapped

    def position_rows(self, grid_zyx: Zyx) -> Tensor:
        """Return pos_LD of a grid: the learned rows, interpolated trilinearly to any other grid."""
        learned_LD = self.pos_embed[0, 1:]
        if grid_zyx == self.config.grid_zyx:
            return learned_LD
        # An explicit size: DINOv2's offset of 0.1 only mends the rounding of its scale-factor form.
        sum_dtype = torch.promote_types(learned_LD.dtype, torch.float32)
        volume_DZYX = learned_LD.T.reshape(-1, *self.config.grid_zyx).to(sum_dtype)
        resized_DZYX = F.interpolate(volume_DZYX[None], size=grid_zyx, mode="trilinear")[0]
        return resized_DZYX.flatten(1).T.to(learned_LD.dtype)

    def embed(self, x_BCZYX: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Return tokens_BTD before the first block; see ``forward`` for the arguments."""
        grid_zyx = self.patch_embed.grid_zyx(x_BCZYX)
        num_patches = grid_zyx[0] * grid_zyx[1] * grid_zyx[2]
        if mask_BL is not None and mask_BL.shape != (x_BCZYX.shape[0], num_patches):
            raise InputError(
                f"mask of shape {tuple(mask_BL.shape)} does not cover {x_BCZYX.shape[0]} volumes "
                f"of {num_patches} tokens"
            )
        prefix_RD = self.cls_token[0] + self.pos_embed[0, :1]
        if self.config.num_registers:
            prefix_RD = torch.cat([prefix_RD, self.register_tokens[0]])
        tokens_BTD: Tensor = self.patch_embed(
            x_BCZYX, self.position_rows(grid_zyx), prefix_RD, self.mask_token[0], mask_BL
        )
        return tokens_BTD

    def forward_tokens(
        self,
        x_BCZYX: Tensor,
        mask_BL: Tensor | None = None,
        *,
        drop_seed: int | None = None,
    ) -> Tensor:
        """Return tokens_BTD after the last block, before the final norm.

        Training norms only the rows it uses: the cls token with ``norm``, masked patches with
        ``tapct_kernels.masked_gather``.
        """
        return self._run_blocks(self.embed(x_BCZYX, mask_BL), self.config.depth, drop_seed)[0]

    def tapped_tokens(
        self, x_BCZYX: Tensor, taps: Collection[int], *, mask_BL: Tensor | None = None
    ) -> list[Tensor]:
        """Return tokens_BTD after each of some blocks, before any norm, in the blocks' order.

        Args:
            x_BCZYX: See ``forward``.
            taps: Positions of blocks, from 0; those after the last cost nothing.
            mask_BL: See ``forward``.
        """
        return self._run_blocks(self.embed(x_BCZYX, mask_BL), max(taps) + 1, None, taps)[1]

    def forward(
        self,
        x_BCZYX: Tensor,
        *,
        mask_BL: Tensor | None = None,
        num_blocks: int | None = None,
        return_hidden: bool = False,
        drop_seed: int | None = None,
    ) -> VitOutput:
        """Encode volumes.

        Args:
            x_BCZYX: Normalised float, or int16 HU; whole patches along each axis.
            mask_BL: Patches replaced by the mask token where true.
            num_blocks: Stop after this many blocks; the rest costs nothing.
            return_hidden: Also return the patch tokens after each block, normed like the last ones.
            drop_seed: Draws the rows that drop path keeps; None runs every branch on every row,
                whatever ``train()`` says.

        Raises:
            InputError: The volume or mask has the wrong shape, or ``num_blocks`` is out of range.
        """
        num_blocks = self.checked_num_blocks(num_blocks)
        taps = range(num_blocks) if return_hidden else ()
        x_BTD, tapped = self._run_blocks(self.embed(x_BCZYX, mask_BL), num_blocks, drop_seed, taps)
        return self.output_of(x_BTD, tapped, self.patch_embed.grid_zyx(x_BCZYX))

    def checked_num_blocks(self, num_blocks: int | None) -> int:
        """Return how many blocks to run; None is all.

        Raises:
            InputError: It is out of range.
        """
        if num_blocks is None:
            return self.config.depth
        if not 1 <= num_blocks <= self.config.depth:
            raise InputError(f"num_blocks={num_blocks} is not in 1..{self.config.depth}")
        return num_blocks

    def output_of(self, x_BTD: Tensor, tapped: Sequence[Tensor], grid_zyx: Zyx) -> VitOutput:
        """Norm tokens and name them."""
        x_BTD = self.norm(x_BTD)
        return VitOutput(
            x_BTD[:, 0],
            x_BTD[:, 1 : self.num_prefix],
            x_BTD[:, self.num_prefix :],
            grid_zyx,
            tuple(self.norm(tokens_BTD[:, self.num_prefix :]) for tokens_BTD in tapped),
        )

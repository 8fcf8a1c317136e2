"""The 3D vision transformer, under DINOv2's parameter names.

Shape suffixes: B batch, C channels (one), Z Y X voxels, L patch tokens in z, y, x order,
R registers, T = 1 + R + L tokens in the order cls, registers, patches, D width, S block,
N kept rows of the batch, M listed patch tokens, Q = B + M read rows: every cls token, then these.
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
from tapct_fast.model.block import NORM_EPS, Block, LayerScale, Stream, start_stream
from tapct_fast.model.patch_embed import PatchEmbed
from tapct_kernels import masked_gather


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

    def _run_blocks(
        self,
        x_BTD: Tensor,
        num_blocks: int,
        kept_S2N: Tensor | None = None,
        *,
        taps: Collection[int] = (),
        next_norm: nn.LayerNorm | None = None,
    ) -> tuple[Stream, list[Tensor]]:
        """Return the tokens after some blocks, with ``next_norm``, and after those in ``taps``."""
        blocks: list[Any] = list(self.blocks[:num_blocks])  # Any: a ModuleList forgets its type
        norms = [*(block.norm1 for block in blocks), next_norm]
        rows: list[Tensor | None] = [None] * (2 * num_blocks + 1)
        if kept_S2N is not None:  # behind the last branch all rows go on
            rows[:-1] = kept_S2N[:num_blocks].flatten(0, 1).unbind(0)
        tapped: list[Tensor] = []
        stream = start_stream(x_BTD, norms[0], rows[0])
        for i, block in enumerate(blocks):
            stream = block(*stream, rows[2 * i : 2 * i + 3], norms[i + 1])
            if i in taps:
                tapped.append(stream.x_BTD)
        return stream, tapped

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
        kept_S2N: Tensor | None = None,
    ) -> Tensor:
        """Return tokens_BTD after the last block, before the final norm; see ``forward``."""
        x_BTD = self.embed(x_BCZYX, mask_BL)
        return self._run_blocks(x_BTD, self.config.depth, kept_S2N)[0].x_BTD

    def read_rows(
        self,
        x_BCZYX: Tensor,
        index_M: Tensor,
        mask_BL: Tensor | None = None,
        *,
        kept_S2N: Tensor | None = None,
    ) -> Tensor:
        """Return rows_QD, normed: every cls token, then the patch tokens listed by ``index_M``.

        This is all that training looks at, so the last block projects, adds and feeds forward no
        other row: about 0.7 of a block is saved. There, drop path is a factor on the branch.

        Args:
            x_BCZYX: See ``forward``.
            index_M: int64, flat into B * L patch tokens, each at most once.
            mask_BL: See ``forward``.
            kept_S2N: See ``forward``.
        """
        x_BTD, last = self.embed(x_BCZYX, mask_BL), self.config.depth - 1
        num_views, num_patches = x_BTD.shape[0], x_BTD.shape[1] - self.num_prefix

        def pick(tokens_BTD: Tensor) -> Tensor:
            rows_MD = masked_gather(tokens_BTD, index_M, None, None, self.num_prefix, 0.0)
            return torch.cat([tokens_BTD[:, 0], rows_MD])

        factors = None
        if kept_S2N is not None:
            view_B = torch.arange(num_views, device=x_BTD.device)
            view_Q = torch.cat([view_B, index_M // num_patches])
            scale = num_views / kept_S2N.shape[2]
            factors = [
                x_BTD.new_zeros(num_views, 1).index_fill(0, rows_N, scale)[view_Q]
                for rows_N in kept_S2N[last]
            ]
        block: Any = self.blocks[last]
        stream, _ = self._run_blocks(x_BTD, last, kept_S2N, next_norm=block.norm1)
        rows_QD: Tensor = block.read_rows(*stream, pick, factors, self.norm)
        return rows_QD

    def tapped_tokens(
        self, x_BCZYX: Tensor, taps: Collection[int], *, mask_BL: Tensor | None = None
    ) -> list[Tensor]:
        """Return tokens_BTD after each of some blocks, before any norm, in the blocks' order.

        Args:
            x_BCZYX: See ``forward``.
            taps: Positions of blocks, from 0; those after the last cost nothing.
            mask_BL: See ``forward``.
        """
        return self._run_blocks(self.embed(x_BCZYX, mask_BL), max(taps) + 1, taps=taps)[1]

    def forward(
        self,
        x_BCZYX: Tensor,
        *,
        mask_BL: Tensor | None = None,
        num_blocks: int | None = None,
        return_hidden: bool = False,
        kept_S2N: Tensor | None = None,
    ) -> VitOutput:
        """Encode volumes.

        Args:
            x_BCZYX: Normalised float, or int16 HU; whole patches along each axis.
            mask_BL: Patches replaced by the mask token where true.
            num_blocks: Stop after this many blocks; the rest costs nothing.
            return_hidden: Also return the patch tokens after each block, normed like the last ones.
            kept_S2N: The rows of the batch that drop path keeps, from ``draw_kept_rows``; None runs
                every branch on every row, whatever ``train()`` says.

        Raises:
            InputError: The volume or mask has the wrong shape, or ``num_blocks`` is out of range.
        """
        num_blocks = self.checked_num_blocks(num_blocks)
        taps = range(num_blocks) if return_hidden else ()
        x_BTD = self.embed(x_BCZYX, mask_BL)
        stream, tapped = self._run_blocks(x_BTD, num_blocks, kept_S2N, taps=taps)
        return self.output_of(stream.x_BTD, tapped, self.patch_embed.grid_zyx(x_BCZYX))

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

"""A Vit for inference: weights in the precision of the products, LayerScale inside them.

The same function as ``Vit`` up to rounding, without what only training needs: no autocast, which
casts every weight anew in each forward pass, no drop path, no gradient. The residual stream and the
norms stay float32.

Shape suffixes: B batch, C channels (one), Z Y X voxels, T tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.errors import InputError
from tapct_fast.model import cpu_ops
from tapct_fast.model.block import Block, LayerScale, Mlp
from tapct_fast.model.vit import Vit, VitOutput
from tapct_kernels import attention, layer_norm, residual_norm
from tapct_kernels.attention import BackendName


class _Linear:
    """A linear layer in one precision, times a LayerScale where one follows it."""

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, scale: LayerScale | None = None
    ) -> None:
        weight_OI, bias_O = linear.weight.detach(), linear.bias.detach()
        if scale is not None and scale.gamma is not None:
            gamma_O = scale.gamma.detach()
            weight_OI, bias_O = weight_OI * gamma_O[:, None], bias_O * gamma_O
        self.weight_OI, self.bias_O = weight_OI.to(dtype), bias_O.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_OI, self.bias_O)


class _Norm:
    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight_D, self.bias_D, self.eps = norm.weight.detach(), norm.bias.detach(), norm.eps


class _Block:
    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.norm1, self.norm2 = _Norm(block.norm1), _Norm(block.norm2)
        self.qkv = _Linear(block.attn.qkv, dtype)
        self.proj = _Linear(block.attn.proj, dtype, block.ls1)
        self.head_dim = block.attn.head_dim
        self.is_gated = not isinstance(block.mlp, Mlp)
        first, last = (
            (block.mlp.fc1, block.mlp.fc2)
            if isinstance(block.mlp, Mlp)
            else (block.mlp.w12, block.mlp.w3)
        )
        self.first, self.last = _Linear(first, dtype), _Linear(last, dtype, block.ls2)


class FrozenVit:
    """A Vit as it is now; later changes of its weights are not seen.

    Args:
        vit: Where the weights come from; those that need no change are shared, not copied.
        dtype: Of the matrix products and attention: float32, bfloat16 or float16.
        backend: Of attention; None chooses.
    """

    def __init__(self, vit: Vit, dtype: torch.dtype, backend: BackendName | None = None) -> None:
        self._vit, self._dtype, self._backend = vit, dtype, backend
        blocks: list[Block] = [block for block in vit.blocks if isinstance(block, Block)]
        self._blocks = [_Block(block, dtype) for block in blocks]
        self._is_native = cpu_ops.runs_here(vit.cls_token.device, dtype, vit.config.dim)

    @torch.no_grad()
    def __call__(
        self, x_BCZYX: Tensor, *, num_blocks: int | None = None, return_hidden: bool = False
    ) -> VitOutput:
        """Encode volumes; see ``Vit.forward``."""
        vit = self._vit
        num_blocks = len(self._blocks) if num_blocks is None else num_blocks
        if not 1 <= num_blocks <= len(self._blocks):
            raise InputError(f"num_blocks={num_blocks} is not in 1..{len(self._blocks)}")
        x_BTD = vit.embed(x_BCZYX).float().contiguous()
        blocks, hidden = self._blocks[:num_blocks], []
        normed_BTD = self._add_norm(x_BTD, None, blocks[0].norm1)[1]
        for i, block in enumerate(blocks):
            branch_BTD = self._attend(block, normed_BTD)
            x_BTD, normed_BTD = self._add_norm(x_BTD, branch_BTD, block.norm2)
            branch_BTD = self._feed(block, normed_BTD)
            if i + 1 < num_blocks and not return_hidden:
                x_BTD, normed_BTD = self._add_norm(x_BTD, branch_BTD, blocks[i + 1].norm1)
                continue
            x_BTD = x_BTD + branch_BTD
            if return_hidden:
                hidden.append(vit.norm(x_BTD[:, vit.num_prefix :]))
            if i + 1 < num_blocks:
                normed_BTD = self._add_norm(x_BTD, None, blocks[i + 1].norm1)[1]
        x_BTD = vit.norm(x_BTD)
        return VitOutput(
            x_BTD[:, 0],
            x_BTD[:, 1 : vit.num_prefix],
            x_BTD[:, vit.num_prefix :],
            vit.patch_embed.grid_zyx(x_BCZYX),
            tuple(hidden),
        )

    def _attend(self, block: _Block, normed_BTD: Tensor) -> Tensor:
        batch, tokens, _ = normed_BTD.shape
        qkv_BT3HK = block.qkv(normed_BTD).view(batch, tokens, 3, -1, block.head_dim)
        return block.proj(attention(qkv_BT3HK, backend=self._backend).flatten(2))

    def _feed(self, block: _Block, normed_BTD: Tensor) -> Tensor:
        inner = block.first(normed_BTD)
        if block.is_gated:
            gate, value = inner.chunk(2, dim=-1)
            return block.last(F.silu(gate) * value)
        if self._is_native:
            cpu_ops.gelu_(inner)
            return block.last(inner)
        return block.last(F.gelu(inner))

    def _add_norm(
        self, x_BTD: Tensor, branch_BTD: Tensor | None, norm: _Norm
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens with the branch added, in place where that is native, and normed."""
        if self._is_native:
            return x_BTD, cpu_ops.add_norm(x_BTD, branch_BTD, norm.weight_D, norm.bias_D, norm.eps)
        if branch_BTD is None:
            normed_BTD = layer_norm(
                x_BTD, norm.weight_D, norm.bias_D, eps=norm.eps, dtype=self._dtype
            )
            return x_BTD, normed_BTD
        x_BTD, normed_BTD = residual_norm(
            *(x_BTD, branch_BTD, None, norm.weight_D, norm.bias_D),
            eps=norm.eps,
            dtype=self._dtype,
        )
        return x_BTD, normed_BTD

"""A Vit for inference: weights in the precision of the products, LayerScale inside them.

The same function as ``Vit`` up to rounding, without what only training needs: no autocast, which
casts every weight anew in each forward pass, no drop path, no gradient. The residual stream and the
norms stay float32.

Shape suffixes: B batch, C channels (one), Z Y X voxels, T tokens, D width.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.model import cpu_ops
from tapct_fast.model.block import Block, LayerScale, SwiGlu
from tapct_fast.model.linear import product
from tapct_fast.model.vit import Vit, VitOutput
from tapct_kernels import attention, layer_norm, residual, residual_norm
from tapct_kernels.attention import BackendName

# float16 ends at 65504, which branches of large models pass: their last layers are scaled down, and
# the branch up again where it joins the float32 stream.
_FP16_SCALE = 16.0
# It begins at 6e-8, which weights times a small LayerScale fall below (1e-5 at the start of
# training): only this much of a smaller one goes into the weights, the rest joins the scale.
_FP16_GAMMA = 0.125


class _Linear(nn.Module):
    """A linear layer in one precision, times a LayerScale where one follows it."""

    weight_OI: Tensor | None
    bias_O: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        dtype: torch.dtype,
        layer_scale: LayerScale | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        weight_OI, bias_O = linear.weight.detach(), linear.bias.detach()
        self.rest_O: Tensor | None
        self.register_buffer("rest_O", None)  # of LayerScale, for whoever adds the branch
        if layer_scale is not None and layer_scale.gamma is not None:
            gamma_O = layer_scale.gamma.detach()
            if dtype == torch.float16:
                self.rest_O = (gamma_O.abs() / _FP16_GAMMA).clamp(max=1)
                gamma_O = gamma_O.sign() * gamma_O.abs().clamp(min=_FP16_GAMMA)
            weight_OI, bias_O = weight_OI * gamma_O[:, None], bias_O * gamma_O
        if scale != 1:
            weight_OI, bias_O = weight_OI / scale, bias_O / scale
        self.register_buffer("weight_OI", weight_OI.to(dtype))
        self.register_buffer("bias_O", bias_O.to(dtype))
        self._packed: Tensor | None = None

    def pack(self) -> None:
        """Hold the weight in oneDNN's layout instead, where that works."""
        assert self.weight_OI is not None
        self._packed = cpu_ops.pack(self.weight_OI, self.bias_O)
        if self._packed is not None:
            self.weight_OI = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        if self._packed is not None:
            return cpu_ops.packed_linear(x, self._packed, self.bias_O)
        assert self.weight_OI is not None
        return product(x, self.weight_OI, self.bias_O)


class _Block(nn.Module):
    def __init__(self, block: Block, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv = _Linear(block.attn.qkv, dtype)
        self.proj = _Linear(block.attn.proj, dtype, block.ls1, scale)
        self.head_dim = block.attn.head_dim
        self.is_gated = isinstance(block.mlp, SwiGlu)
        first, last = (
            (block.mlp.w12, block.mlp.w3)
            if isinstance(block.mlp, SwiGlu)
            else (block.mlp.fc1, block.mlp.fc2)
        )
        self.first, self.last = _Linear(first, dtype), _Linear(last, dtype, block.ls2, scale)


class FrozenVit(nn.Module):
    """A Vit as it is now; later changes of its weights are not seen.

    Args:
        vit: Where the weights come from; those that need no change are shared, not copied.
        dtype: Of the matrix products and attention: float32, bfloat16 or float16.
        backend: Of attention; None chooses.
        is_compiled: Hold weights in no layout that a compiler does not know.
    """

    def __init__(
        self,
        vit: Vit,
        dtype: torch.dtype,
        backend: BackendName | None = None,
        *,
        is_compiled: bool = False,
    ) -> None:
        super().__init__()
        self._vit, self._dtype, self._backend = vit, dtype, backend
        self._scale = _FP16_SCALE if dtype == torch.float16 else 1.0
        self._blocks = nn.ModuleList(
            _Block(block, dtype, self._scale) for block in vit.blocks if isinstance(block, Block)
        )
        self._is_native = cpu_ops.runs_here(vit.cls_token.device, dtype, vit.config.dim)
        if self._is_native and not is_compiled:
            for module in self._blocks.modules():
                if isinstance(module, _Linear):
                    module.pack()

    @torch.no_grad()
    def forward(
        self, x_BCZYX: Tensor, *, num_blocks: int | None = None, return_hidden: bool = False
    ) -> VitOutput:
        """Encode volumes; see ``Vit.forward``."""
        num_blocks = self._vit.checked_num_blocks(num_blocks)
        taps = range(num_blocks) if return_hidden else ()
        x_BTD, tapped = self._run_blocks(x_BCZYX, num_blocks, taps)
        return self._vit.output_of(x_BTD, tapped, self._vit.patch_embed.grid_zyx(x_BCZYX))

    @torch.no_grad()
    def tapped_tokens(
        self, x_BCZYX: Tensor, taps: Collection[int], *, mask_BL: Tensor | None = None
    ) -> list[Tensor]:
        """Return tokens_BTD after some blocks; see ``Vit.tapped_tokens``."""
        return self._run_blocks(x_BCZYX, max(taps) + 1, taps, mask_BL)[1]

    def _run_blocks(
        self,
        x_BCZYX: Tensor,
        num_blocks: int,
        taps: Collection[int],
        mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        x_BTD = self._vit.embed(x_BCZYX, mask_BL).float().contiguous()
        tapped: list[Tensor] = []
        blocks: list[Any] = list(self._blocks)[:num_blocks]  # Any: a ModuleList forgets its type
        normed_BTD = self._norm(x_BTD, blocks[0].norm1)
        for i, block in enumerate(blocks):
            branch_BTD = self._attend(block, normed_BTD)
            x_BTD, normed_BTD = self._add_norm(x_BTD, branch_BTD, block.proj, block.norm2)
            branch_BTD = self._feed(block, normed_BTD)
            if i + 1 < num_blocks:
                next_norm = blocks[i + 1].norm1
                x_BTD, normed_BTD = self._add_norm(x_BTD, branch_BTD, block.last, next_norm)
            else:
                x_BTD = residual(x_BTD, branch_BTD, block.last.rest_O, scale=self._scale)
            if i in taps:
                tapped.append(x_BTD.clone() if self._is_native else x_BTD)
        return x_BTD, tapped

    def _attend(self, block: Any, normed_BTD: Tensor) -> Tensor:
        batch, tokens, _ = normed_BTD.shape
        qkv_BT3HK = block.qkv(normed_BTD).view(batch, tokens, 3, -1, block.head_dim)
        branch_BTD: Tensor = block.proj(attention(qkv_BT3HK, backend=self._backend).flatten(2))
        return branch_BTD

    def _feed(self, block: Any, normed_BTD: Tensor) -> Tensor:
        inner = block.first(normed_BTD)
        if block.is_gated:
            gate, value = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * value
        elif self._is_native:
            cpu_ops.gelu_(inner)
        else:
            inner = F.gelu(inner)
        branch_BTD: Tensor = block.last(inner)
        return branch_BTD

    def _norm(self, x_BTD: Tensor, norm: nn.LayerNorm) -> Tensor:
        normed_BTD: Tensor
        if self._is_native:
            normed_BTD = cpu_ops.add_norm(x_BTD, None, norm.weight, norm.bias, norm.eps)
            return normed_BTD
        normed_BTD = layer_norm(x_BTD, norm.weight, norm.bias, eps=norm.eps, dtype=self._dtype)
        return normed_BTD

    def _add_norm(
        self, x_BTD: Tensor, branch_BTD: Tensor, linear: _Linear, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens with a layer's branch added, in place where native, and normed."""
        if self._is_native:
            return x_BTD, cpu_ops.add_norm(x_BTD, branch_BTD, norm.weight, norm.bias, norm.eps)
        x_BTD, normed_BTD = residual_norm(
            *(x_BTD, branch_BTD, linear.rest_O, norm.weight, norm.bias),
            scale=self._scale,
            eps=norm.eps,
            dtype=self._dtype,
        )
        return x_BTD, normed_BTD

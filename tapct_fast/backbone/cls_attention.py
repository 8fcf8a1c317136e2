"""What the cls token attends to in the last block, beside the usual outputs and in the same pass.

Only the row of the cls token is computed, so memory and time grow with the tokens and not with
their square. Shape suffixes: B batch, C channels (one), Z Y X voxels, L patch tokens, R registers,
T = 1 + R + L tokens, D width, H heads, K head width.
"""

from typing import Any

import torch
from torch import Tensor

from tapct_fast.backbone.backbone import Backbone, BackboneOutput
from tapct_fast.backbone.preprocess import pad_end


@torch.no_grad()
def forward_with_attention(
    backbone: Backbone, pixel_values: Tensor
) -> tuple[BackboneOutput, Tensor]:
    """Encode volumes and return the attention of cls in the last block.

    Args:
        backbone: From ``load_backbone``.
        pixel_values: See ``Backbone.forward``.

    Returns:
        The output of ``backbone(pixel_values)``, and attention_BHL float32: the softmax weights of
        the patch tokens, from float32 queries and keys whatever the backbone's precision. A row
        sums to 1 less what cls gives to itself and to the registers.
    """
    config, preprocess = backbone.vit.config, backbone.preprocess
    air = preprocess.pad_hu if pixel_values.dtype == torch.int16 else preprocess.air
    x_BCZYX = pad_end(pixel_values, config.patch_zyx, air)
    before = [config.depth - 2] if config.depth > 1 else []
    tokens_BTD, tapped = backbone.forward_intermediates(
        x_BCZYX, [*before, config.depth - 1], return_prefix_tokens=True, output_fmt="NLC"
    )
    if before:
        patches_BLD, prefix_BND = tapped[0]
        x_BTD = torch.cat([prefix_BND, patches_BLD], dim=1)
    else:
        x_BTD = backbone.vit.embed(x_BCZYX).float()
    prefix = backbone.vit.num_prefix
    output = BackboneOutput(
        last_hidden_state=tokens_BTD[:, prefix:],
        pooler_output=tokens_BTD[:, 0],
        registers=tokens_BTD[:, 1:prefix],
        grid=backbone.vit.patch_embed.grid_zyx(x_BCZYX),
    )
    return output, _cls_row(backbone.vit.blocks[-1], x_BTD)[:, :, prefix:]


def _cls_row(block: Any, x_BTD: Tensor) -> Tensor:
    """Return attention_BHT of the first token; ``block`` is a ``Block`` (a ModuleList forgets)."""
    # The whole layer and not its rows for q and k: an adapter may stand in its place.
    qkv_BT3HK = block.attn.qkv(block.norm1(x_BTD)).unflatten(2, (3, -1, block.attn.head_dim))
    q_BHK, k_BTHK = qkv_BT3HK[:, 0, 0], qkv_BT3HK[:, :, 1]
    logits_BHT = torch.einsum("bhk,bthk->bht", q_BHK, k_BTHK) * block.attn.head_dim**-0.5
    attention_BHT: Tensor = logits_BHT.softmax(dim=-1)
    return attention_BHT

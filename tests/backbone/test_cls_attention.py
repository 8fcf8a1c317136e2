"""The cls row beside a full attention matrix in float64."""

import pytest
import torch
from torch import Tensor

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.cls_attention import forward_with_attention
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import VitConfig
from tapct_fast.model.vit import Vit


def make_backbone(depth: int, num_registers: int, precision: str = "fp32") -> Backbone:
    config = VitConfig(
        dim=128,
        depth=depth,
        image_zyx=(8, 32, 32),
        num_registers=num_registers,
        layer_scale=1.0,
        drop_path=0.0,
    )
    vit = Vit(config)
    vit.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        vit.pos_embed.normal_(std=0.5, generator=generator)
        for block in vit.blocks:
            block.attn.qkv.weight.normal_(std=0.2, generator=generator)
            block.attn.qkv.bias.normal_(std=0.5, generator=generator)
    return Backbone(vit.eval(), Preprocess(resize_yx=None), precision=precision)


def full_matrix(backbone: Backbone, x_BCZYX: Tensor) -> Tensor:
    """The last block's attention_BHTT, from the eager Vit in float64."""
    vit = backbone.vit.double()
    with torch.no_grad():
        x_BTD = vit.embed(x_BCZYX.double())
        for block in vit.blocks:
            last = block
            normed = block.norm1(x_BTD)
            batch, tokens, dim = normed.shape
            qkv = block.attn.qkv(normed).reshape(batch, tokens, 3, 2, 64)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            matrix = (q @ k.transpose(-1, -2) / 8).softmax(-1)
            x_BTD = x_BTD + last.ls1.gamma * block.attn.proj(
                (matrix @ v).transpose(1, 2).reshape(batch, tokens, dim)
            )
            x_BTD = x_BTD + last.ls2.gamma * block.mlp(block.norm2(x_BTD))
    backbone.vit.float()
    return matrix


@pytest.mark.parametrize(("depth", "num_registers"), [(1, 0), (1, 3), (3, 0), (3, 3)])
def test_the_row_of_cls_is_that_of_the_full_matrix(depth: int, num_registers: int) -> None:
    backbone = make_backbone(depth, num_registers)
    x_BCZYX = torch.randn(2, 1, 8, 24, 40, generator=torch.Generator().manual_seed(2))
    output, attention_BHL = forward_with_attention(backbone, x_BCZYX)
    matrix = full_matrix(backbone, x_BCZYX)
    assert matrix[:, :, 0].max() > 10 / matrix.shape[-1]  # far from even
    expected = matrix[:, :, 0, 1 + num_registers :]
    assert attention_BHL.dtype == torch.float32
    torch.testing.assert_close(attention_BHL.double(), expected, rtol=2e-4, atol=1e-7)

    with torch.no_grad():
        plain = backbone(x_BCZYX)
    torch.testing.assert_close(output.last_hidden_state, plain.last_hidden_state)
    torch.testing.assert_close(output.pooler_output, plain.pooler_output)
    torch.testing.assert_close(output.registers, plain.registers)
    assert output.grid == plain.grid


def test_hu_are_taken_and_padded_as_by_the_backbone() -> None:
    backbone = make_backbone(2, 1)
    generator = torch.Generator().manual_seed(3)
    hu = torch.randint(-1000, 800, (1, 1, 7, 30, 33), generator=generator, dtype=torch.int16)
    output, attention_BHL = forward_with_attention(backbone, hu)
    padded = torch.full((1, 1, 8, 32, 40), -1024, dtype=torch.int16)
    padded[:, :, :7, :30, :33] = hu
    whole, whole_BHL = forward_with_attention(backbone, padded)
    assert output.grid == (2, 4, 5)
    assert attention_BHL.shape == (1, 2, 40)
    torch.testing.assert_close(output.last_hidden_state, whole.last_hidden_state)
    torch.testing.assert_close(attention_BHL, whole_BHL)


def test_in_half_precision_the_weights_stay_near_and_are_float32() -> None:
    x_BCZYX = torch.randn(1, 1, 8, 32, 32, generator=torch.Generator().manual_seed(4))
    _, exact = forward_with_attention(make_backbone(3, 2), x_BCZYX)
    _, rounded = forward_with_attention(make_backbone(3, 2, "bf16"), x_BCZYX)
    assert rounded.dtype == torch.float32
    # bfloat16 keeps 8 bits of the tokens in front of the last block; logits here reach 10.
    assert (rounded - exact).abs().sum(-1).max() < 0.25

"""The vision transformer: names, tokens, positions, masks, early exit and determinism."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tapct_fast.config import HuConfig, VitConfig
from tapct_fast.errors import InputError
from tapct_fast.model.block import draw_kept_rows
from tapct_fast.model.presets import vit_b_3d
from tapct_fast.model.vit import Vit

TINY = VitConfig(
    dim=16, head_dim=8, depth=3, patch_zyx=(2, 4, 4), image_zyx=(4, 12, 16), layer_scale=0.5
)


def tiny_vit(config: VitConfig = TINY) -> Vit:
    vit = Vit(config)
    vit.init_weights(0)
    return vit


def sample_hu(batch: int = 2, size_zyx: tuple[int, int, int] = (4, 12, 16)) -> Tensor:
    hu = torch.randint(-1200, 1200, (batch, 1, *size_zyx))
    return hu.to(torch.int16)


def test_parameters_of_b_3d_have_dinov2_names_and_shapes() -> None:
    with torch.device("meta"):
        vit = Vit(vit_b_3d())
    C = 768
    expected = {
        "cls_token": (1, 1, C),
        "pos_embed": (1, 2353, C),
        "register_tokens": (1, 4, C),
        "mask_token": (1, C),
        "patch_embed.proj.weight": (C, 1, 4, 8, 8),
        "patch_embed.proj.bias": (C,),
        "norm.weight": (C,),
        "norm.bias": (C,),
    }
    for i in range(12):
        block = {
            "norm1.weight": (C,),
            "norm1.bias": (C,),
            "attn.qkv.weight": (3 * C, C),
            "attn.qkv.bias": (3 * C,),
            "attn.proj.weight": (C, C),
            "attn.proj.bias": (C,),
            "ls1.gamma": (C,),
            "norm2.weight": (C,),
            "norm2.bias": (C,),
            "mlp.fc1.weight": (4 * C, C),
            "mlp.fc1.bias": (4 * C,),
            "mlp.fc2.weight": (C, 4 * C),
            "mlp.fc2.bias": (C,),
            "ls2.gamma": (C,),
        }
        expected |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    assert {name: tuple(t.shape) for name, t in vit.state_dict().items()} == expected


def test_optional_parts_have_dinov2_names_or_none() -> None:
    config = VitConfig(dim=16, head_dim=8, depth=1, num_registers=0, layer_scale=None, ffn="swiglu")
    names = set(Vit(config).state_dict())
    # h = int(4 * 16 * 2 / 3) rounded up to 8
    assert Vit(config).blocks[0].mlp.w12.weight.shape == (2 * 48, 16)
    assert {"blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.bias"} <= names
    assert not any("register" in n or "gamma" in n or "fc" in n for n in names)
    output = Vit(config)(torch.zeros(1, 1, 12, 224, 224)[..., :32, :32])
    assert output.registers_BRD.shape == (1, 0, 16)


def test_forward_follows_the_definition_block_by_block() -> None:
    vit = tiny_vit().double()
    x_BCZYX = torch.randn(2, 1, 4, 12, 16, dtype=torch.float64)
    kernel, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    x_BTD = torch.nn.functional.conv3d(x_BCZYX, kernel, bias, stride=(2, 4, 4)).flatten(2).mT
    x_BTD = torch.cat([vit.cls_token.expand(2, -1, -1), x_BTD], dim=1) + vit.pos_embed
    registers = vit.register_tokens.expand(2, -1, -1)
    x_BTD = torch.cat([x_BTD[:, :1], registers, x_BTD[:, 1:]], dim=1)
    for block in vit.blocks:
        x_BTD = x_BTD + 0.5 * block.attn(block.norm1(x_BTD))
        x_BTD = x_BTD + 0.5 * block.mlp(block.norm2(x_BTD))
    torch.testing.assert_close(vit.forward_tokens(x_BCZYX), x_BTD, rtol=1e-12, atol=1e-12)

    mean, var = x_BTD.mean(-1, keepdim=True), x_BTD.var(-1, keepdim=True, correction=0)
    normed = (x_BTD - mean) / (var + 1e-6).sqrt()
    output = vit(x_BCZYX)
    assert output.grid_zyx == (2, 3, 4)
    torch.testing.assert_close(output.cls_BD, normed[:, 0])
    torch.testing.assert_close(output.registers_BRD, normed[:, 1:5])
    torch.testing.assert_close(output.patches_BLD, normed[:, 5:])


def test_int16_hu_equals_the_preprocessed_volume() -> None:
    hu = HuConfig(clip=(-900.0, 700.0), mean=-50.0, std=250.0)
    vit = Vit(TINY, hu)
    vit.init_weights(0)
    x_BCZYX = sample_hu()
    normalised = (x_BCZYX.float().clip(-900, 700) + 50) / 250
    assert torch.equal(vit(x_BCZYX).patches_BLD, vit(normalised).patches_BLD)


def test_positions_of_the_learned_grid_are_the_parameter_itself() -> None:
    vit = tiny_vit()
    assert torch.equal(vit.position_rows((2, 3, 4)), vit.pos_embed[0, 1:])


def triangle_weights(size: int, learned: int) -> Tensor:
    """Linear interpolation along one axis by its definition: pixel centres at (i + 1/2) / size."""
    weights = torch.zeros(size, learned, dtype=torch.float64)
    for i in range(size):
        at = min(max((i + 0.5) * learned / size - 0.5, 0), learned - 1)
        low = math.floor(at)
        weights[i, low] += 1 - (at - low)
        weights[i, min(low + 1, learned - 1)] += at - low
    return weights


@pytest.mark.parametrize("grid_zyx", [(1, 2, 2), (5, 3, 4), (3, 6, 7)])
def test_positions_of_other_grids_are_interpolated_trilinearly(
    grid_zyx: tuple[int, int, int],
) -> None:
    vit = tiny_vit().double()
    learned = vit.pos_embed[0, 1:].reshape(2, 3, 4, 16)
    z, y, x = (triangle_weights(s, n) for s, n in zip(grid_zyx, (2, 3, 4), strict=True))
    expected = torch.einsum("az,by,cx,zyxd->abcd", z, y, x, learned).reshape(-1, 16)
    torch.testing.assert_close(vit.position_rows(grid_zyx), expected, rtol=1e-12, atol=1e-14)


def test_masked_patches_become_the_mask_token_at_their_position() -> None:
    vit = tiny_vit()
    torch.nn.init.normal_(vit.mask_token)
    mask_BL = torch.rand(2, 24) < 0.4
    tokens = vit.embed(sample_hu(), mask_BL)[:, vit.num_prefix :]
    expected = (vit.mask_token + vit.pos_embed[0, 1:]).expand(2, -1, -1)
    assert torch.equal(tokens[mask_BL], expected[mask_BL])
    assert not torch.isclose(tokens[~mask_BL], expected[~mask_BL]).all(dim=-1).any()


def test_voxels_of_masked_patches_reach_no_token() -> None:
    vit = tiny_vit()
    mask_BL = torch.zeros(1, 24, dtype=torch.bool)
    mask_BL[0, 0] = True  # voxels [0:2, 0:4, 0:4]
    x_BCZYX = sample_hu(1)
    changed = x_BCZYX.clone()
    changed[..., :2, :4, :4] = 500
    before, after = (vit(x, mask_BL=mask_BL).patches_BLD for x in (x_BCZYX, changed))
    assert torch.equal(before, after)
    assert not torch.equal(vit(x_BCZYX).patches_BLD, vit(changed).patches_BLD)


def test_early_exit_runs_the_first_blocks_only() -> None:
    vit = tiny_vit()
    runs: list[int] = []
    for i, block in enumerate(vit.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    x_BCZYX = sample_hu()
    early = vit(x_BCZYX, num_blocks=2, return_hidden=True)
    assert runs == [0, 1]
    full = vit(x_BCZYX, return_hidden=True)
    assert runs == [0, 1, 0, 1, 2]
    assert len(early.hidden) == 2
    assert torch.equal(early.patches_BLD, full.hidden[1])
    assert torch.equal(full.patches_BLD, full.hidden[2])


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_early_exit_out_of_range_is_refused(num_blocks: int) -> None:
    with pytest.raises(InputError, match=r"num_blocks=\d is not in 1\.\.3"):
        tiny_vit()(sample_hu(), num_blocks=num_blocks)


def test_mask_of_another_grid_is_refused() -> None:
    with pytest.raises(InputError, match="does not cover 2 volumes of 24 tokens"):
        tiny_vit()(sample_hu(), mask_BL=torch.zeros(2, 23, dtype=torch.bool))


def kept_rows(seed: int, batch: int = 6) -> Tensor:
    return draw_kept_rows([seed], depth=3, num_views=1, group_size=batch, drop_path=0.3)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("listed", [[], [3, 17, 40, 100]])
def test_the_rows_that_training_reads_are_those_of_the_full_forward_with_equal_gradients(
    listed: list[int], depth: int, drops: bool
) -> None:
    vit = tiny_vit(dataclasses.replace(TINY, depth=depth)).double()
    x_BCZYX, mask_BL = sample_hu(6).double() / 300, torch.rand(6, 24) < 0.3
    index_M = torch.tensor(listed, dtype=torch.int64)
    kept_S2N = kept_rows(1)[:depth] if drops else None
    grads = []
    for full in (True, False):
        vit.zero_grad()
        if full:
            output = vit(x_BCZYX, mask_BL=mask_BL, kept_S2N=kept_S2N)
            rows_QD = torch.cat([output.cls_BD, output.patches_BLD.flatten(0, 1)[index_M]])
            expected = rows_QD.detach()
        else:
            rows_QD = vit.read_rows(x_BCZYX, index_M, mask_BL, kept_S2N=kept_S2N)
            torch.testing.assert_close(rows_QD, expected, rtol=1e-12, atol=1e-12)
        (rows_QD * torch.linspace(-1, 1, 16)).square().sum().backward()
        grads.append({name: p.grad for name, p in vit.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-9, atol=1e-11, msg=name)


def test_drop_path_is_a_function_of_its_seed_and_off_without_one() -> None:
    vit = tiny_vit()
    x_BCZYX = sample_hu(6)
    plain = vit(x_BCZYX).cls_BD
    assert torch.equal(vit.eval()(x_BCZYX).cls_BD, plain)
    first = vit(x_BCZYX, kept_S2N=kept_rows(1)).cls_BD
    torch.rand(5)
    assert torch.equal(vit(x_BCZYX, kept_S2N=kept_rows(1)).cls_BD, first)
    assert torch.equal(vit.norm(vit.forward_tokens(x_BCZYX, kept_S2N=kept_rows(1)))[:, 0], first)
    assert not torch.equal(vit(x_BCZYX, kept_S2N=kept_rows(2)).cls_BD, first)
    assert not torch.equal(plain, first)


def test_weights_depend_on_the_seed_alone() -> None:
    first, second, third = Vit(TINY), Vit(TINY), Vit(TINY)
    for vit, seed in ((first, 4), (second, 4), (third, 5)):
        vit.init_weights(seed)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), third.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        # biases, norms, gamma and the mask token start as constants
        is_constant = name == "mask_token" or "norm" in name or "gamma" in name
        is_constant |= name.endswith("bias") and "patch_embed" not in name
        assert torch.equal(a, c) == is_constant, name


def test_initial_weights_have_dinov2_scales() -> None:
    vit = tiny_vit(VitConfig(dim=64, depth=1, image_zyx=(8, 64, 64), layer_scale=1e-5))
    block = vit.blocks[0]
    # 5 %: standard error of a standard deviation from 8192 draws is 0.8 %
    for tensor in (vit.pos_embed, block.attn.qkv.weight, block.mlp.fc1.weight):
        torch.testing.assert_close(tensor.std().item(), 0.02, rtol=0.05, atol=0)
    assert 0 < vit.cls_token.abs().max() < 1e-5
    assert 0 < vit.register_tokens.abs().max() < 1e-5
    assert (block.ls1.gamma == 1e-5).all()
    assert (vit.norm.weight == 1).all()


def test_forward_compiles_to_one_graph() -> None:
    vit = tiny_vit()
    x_BCZYX, mask_BL = sample_hu(), torch.rand(2, 24) < 0.3
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    expected = vit(x_BCZYX, mask_BL=mask_BL)
    found = compiled(x_BCZYX, mask_BL=mask_BL)
    torch.testing.assert_close(found.patches_BLD, expected.patches_BLD)
    torch.testing.assert_close(found.cls_BD, expected.cls_BD)


def test_bfloat16_model_and_autocast_stay_near_float32() -> None:
    vit = tiny_vit()
    x_BCZYX = sample_hu(size_zyx=(2, 16, 8))
    exact = vit(x_BCZYX).patches_BLD
    with torch.autocast("cpu", torch.bfloat16):
        autocast = vit(x_BCZYX).patches_BLD
        vit(x_BCZYX, kept_S2N=kept_rows(1, 2)).patches_BLD.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in vit.parameters() if p.grad is not None)
    low = vit.to(torch.bfloat16)(x_BCZYX).patches_BLD
    assert low.dtype == torch.bfloat16
    for rounded in (autocast, low):
        cosine = torch.cosine_similarity(rounded.float(), exact, dim=-1)
        assert cosine.min() > 0.999

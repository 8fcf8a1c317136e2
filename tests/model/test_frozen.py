"""Shape suffixes: B batch, C channel, Z Y X voxels, D width."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tapct_fast.config import VitConfig
from tapct_fast.errors import InputError
from tapct_fast.model.frozen import FrozenVit
from tapct_fast.model.vit import Vit

CONFIG = VitConfig(dim=128, depth=3, image_zyx=(8, 32, 32), layer_scale=1.0)


def make_vit(**changes: object) -> Vit:
    vit = Vit(dataclasses.replace(CONFIG, **changes))
    vit.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # weights that matter: at the start all branches are nearly zero
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return vit.eval()


def volumes(depth: int = 8) -> torch.Tensor:
    return torch.randn(2, 1, depth, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "changes", [{}, {"ffn": "swiglu"}, {"layer_scale": None}, {"num_registers": 0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_vit_up_to_rounding(changes: dict[str, object], dtype: torch.dtype) -> None:
    vit = make_vit(**changes)
    for depth in (8, 12):
        with torch.no_grad():
            expected = vit(volumes(depth), return_hidden=True)
        ours = FrozenVit(vit, dtype)(volumes(depth), return_hidden=True)
        assert ours.grid_zyx == expected.grid_zyx
        assert len(ours.hidden) == 3
        pairs = [(ours.cls_BD, expected.cls_BD), (ours.patches_BLD, expected.patches_BLD)]
        pairs += zip(ours.hidden, expected.hidden, strict=True)
        if vit.config.num_registers:
            pairs.append((ours.registers_BRD, expected.registers_BRD))
        for left, right in pairs:
            assert left.dtype == torch.float32
            if dtype == torch.float32:
                assert (left - right).norm() <= 1e-5 * right.norm()
            else:
                assert F.cosine_similarity(left, right, dim=-1).min() > 0.9995


def test_float16_keeps_branches_of_a_small_layer_scale() -> None:
    vit = Vit(CONFIG).eval()
    vit.init_weights(0)  # registers start at 1e-6: branches are all they hold
    gamma_D = torch.tensor([1e-5, -1e-5, 0.0, 1e-4]).repeat(CONFIG.dim // 4)
    with torch.no_grad():
        for block in vit.blocks:
            block.ls1.gamma.copy_(gamma_D)
            block.ls2.gamma.copy_(gamma_D.flip(0))
        expected_BRD = vit(volumes()).registers_BRD
    found_BRD = FrozenVit(vit, torch.float16)(volumes()).registers_BRD
    # Ten roundings of float16; with branches that became zero it was off by 0.2.
    assert (found_BRD - expected_BRD).norm() <= 5e-3 * expected_BRD.norm()


def test_stopping_early_gives_the_tokens_there() -> None:
    vit = make_vit()
    frozen = FrozenVit(vit, torch.float32)
    with torch.no_grad():
        expected = vit(volumes(), num_blocks=2)
    torch.testing.assert_close(
        frozen(volumes(), num_blocks=2).patches_BLD, expected.patches_BLD, atol=1e-4, rtol=1e-4
    )
    hidden = frozen(volumes(), return_hidden=True).hidden
    torch.testing.assert_close(hidden[1], expected.patches_BLD, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="num_blocks=4"):
        frozen(volumes(), num_blocks=4)


def test_the_input_and_the_weights_stay_as_they_are() -> None:
    vit = make_vit()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    x = volumes()
    for dtype in (torch.float32, torch.bfloat16):
        frozen = FrozenVit(vit, dtype)
        first = frozen(x).patches_BLD
        assert torch.equal(frozen(x).patches_BLD, first)
    assert torch.equal(x, volumes())
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, before[name])

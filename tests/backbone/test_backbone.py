from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.load import load_backbone
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import HuConfig, VitConfig
from tapct_fast.errors import BackboneError, InputError
from tapct_fast.model.vit import Vit


@pytest.fixture
def backbone(tmp_path: Path, released: Callable[..., dict[str, Tensor]]) -> Backbone:
    save_file(released(), tmp_path / "model.safetensors")
    return load_backbone(tmp_path, precision="fp32")


def hu(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-1100, 1000, shape, generator=generator, dtype=torch.int16)


@torch.no_grad()
def test_outputs_have_names_keys_and_maps(backbone: Backbone) -> None:
    x_BCZYX = backbone.preprocess.apply(hu(2, 1, 8, 64, 64))
    out = backbone(pixel_values=x_BCZYX, output_hidden_states=True)
    maps = backbone(x_BCZYX, reshape=True, output_hidden_states=True)
    assert out.grid == (2, 8, 8)
    assert out["grid"] is out.grid
    assert out["last_hidden_state"] is out.last_hidden_state
    assert out.last_hidden_state.shape == (2, 128, 64)
    assert out.registers.shape == (2, 4, 64)
    assert maps.last_hidden_state.shape == (2, 64, 2, 8, 8)
    token = 1 * 64 + 3 * 8 + 5  # row-major in z, y, x
    assert torch.equal(maps.last_hidden_state[1, :, 1, 3, 5], out.last_hidden_state[1, token])
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.equal(maps.hidden_states[0][0, :, 1, 3, 5], out.hidden_states[0][0, token])
    assert backbone(x_BCZYX).hidden_states is None
    with pytest.raises(KeyError, match="pooler_output"):
        out["pooled"]


@torch.no_grad()
def test_stopping_early_gives_that_blocks_features(backbone: Backbone) -> None:
    x_BCZYX = backbone.preprocess.apply(hu(1, 1, 8, 64, 64))
    hidden = backbone(x_BCZYX, output_hidden_states=True).hidden_states
    assert torch.equal(backbone(x_BCZYX, num_blocks=2).last_hidden_state, hidden[1])


@torch.no_grad()
def test_int16_hu_and_preprocessed_floats_agree(backbone: Backbone) -> None:
    native = Backbone(backbone.vit, Preprocess(resize_yx=None))
    hu_BCZYX = hu(1, 1, 6, 40, 44)  # none a multiple of the patch
    from_hu = native(hu_BCZYX)
    from_pixels = native(native.preprocess.apply(hu_BCZYX))
    assert from_hu.grid == (2, 5, 6)
    torch.testing.assert_close(from_hu.last_hidden_state, from_pixels.last_hidden_state)
    # Normalised floats are padded with the same air.
    cut = native.preprocess.apply(hu_BCZYX)[:, :, :6, :40, :44]
    torch.testing.assert_close(native(cut).last_hidden_state, from_hu.last_hidden_state)


def test_the_path_to_the_pixels_is_differentiable(backbone: Backbone) -> None:
    x_BCZYX = backbone.preprocess.apply(hu(1, 1, 8, 64, 64)).requires_grad_()
    backbone(x_BCZYX).pooler_output.sum().backward()
    assert x_BCZYX.grad.abs().sum() > 0
    assert backbone.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_bfloat16_stays_close_and_keeps_float32_weights(backbone: Backbone) -> None:
    x_BCZYX = backbone.preprocess.apply(hu(1, 1, 8, 64, 64))
    half = Backbone(backbone.vit, backbone.preprocess, precision="bf16")
    expected, out = backbone(x_BCZYX), half(x_BCZYX)
    assert out.last_hidden_state.dtype == torch.float32
    assert not torch.equal(out.last_hidden_state, expected.last_hidden_state)
    cosine = torch.cosine_similarity(out.last_hidden_state, expected.last_hidden_state, dim=-1)
    assert cosine.min() > 0.999  # facts: the check for the released weights
    assert half.vit.norm.weight.dtype == torch.float32
    with pytest.raises(InputError, match="precision='fp64' is not one of fp32, bf16, fp16"):
        Backbone(backbone.vit, backbone.preprocess, precision="fp64")


def test_non_finite_features_are_an_error_with_the_cause(backbone: Backbone) -> None:
    x_BCZYX = torch.zeros(1, 1, 8, 64, 64)
    with pytest.raises(BackboneError, match="pixel_values hold NaN"):
        backbone(x_BCZYX.index_fill(2, torch.tensor(3), torch.nan))
    with torch.no_grad():
        backbone.vit.blocks[0].mlp.fc2.weight.mul_(1e6)
    half = Backbone(backbone.vit, backbone.preprocess, precision="fp16")
    with pytest.raises(BackboneError, match=r"block 0 overflowed in float16.*precision='bf16'"):
        half(x_BCZYX)
    with torch.no_grad():
        backbone.vit.norm.bias[0] = torch.inf
    with pytest.raises(BackboneError, match="a weight"):
        backbone(x_BCZYX)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(8, 64, 64), "not \\(B, 1"),
        (torch.zeros(1, 3, 8, 64, 64), "not \\(B, 1"),
        (torch.zeros(1, 1, 0, 64, 64), "not \\(B, 1"),
        (torch.zeros(1, 1, 8, 64, 64, dtype=torch.uint8), "int16 HU or normalised"),
        (torch.full((1, 1, 8, 64, 64), -1000.0), "look like HU"),
    ],
)
def test_wrong_input_is_refused(backbone: Backbone, x: Tensor, match: str) -> None:
    with pytest.raises(InputError, match=match):
        backbone(x)


def test_compiles_without_a_graph_break(backbone: Backbone) -> None:
    x_BCZYX = backbone.preprocess.apply(hu(1, 1, 8, 64, 64))
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, out = backbone(x_BCZYX, reshape=True), compiled(x_BCZYX, reshape=True)
    torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state)
    assert out.grid == expected.grid


def test_preprocessing_that_contradicts_the_vit_is_refused() -> None:
    vit = Vit(VitConfig(dim=64, depth=1, image_zyx=(8, 64, 64)))
    with pytest.raises(BackboneError, match="patch"):
        Backbone(vit, Preprocess(depth_multiple=6))
    with pytest.raises(BackboneError, match="HU constants"):
        Backbone(vit, Preprocess(hu=HuConfig(std=300.0)))


def test_the_fingerprint_sees_weights_and_preprocessing(backbone: Backbone) -> None:
    before = backbone.fingerprint()
    assert backbone.fingerprint() == before
    native = Backbone(backbone.vit, Preprocess(resize_yx=None))
    assert native.fingerprint() != before
    with torch.no_grad():
        backbone.vit.norm.bias[0] += 1e-6
    assert backbone.fingerprint() != before

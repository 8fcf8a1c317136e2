"""The methods of DINOv2 and timm, held to timm itself; precision and compile.

Shape suffixes: B batch, C channel, Z Y X voxels, D width.
"""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from with_timm import import_timm

import tapct_fast
from tapct_fast.backbone.backbone import Backbone, best_precision
from tapct_fast.backbone.load import default_preprocess
from tapct_fast.config import VitConfig
from tapct_fast.errors import InputError
from tapct_fast.model.vit import Vit

# One slice: then a plain image model is the same function.
CONFIG = VitConfig(
    dim=64, depth=3, head_dim=32, patch_zyx=(1, 8, 8), image_zyx=(1, 32, 32), layer_scale=1.0
)


def make_backbone(config: VitConfig = CONFIG, **settings: Any) -> Backbone:
    vit = Vit(config)
    vit.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return Backbone(vit, default_preprocess(config), **settings).eval()


def pixels(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, 1, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def timm_vit() -> Any:
    timm = import_timm()
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, in_chans=1, num_classes=0, embed_dim=64, depth=3, num_heads=2,
        reg_tokens=4, init_values=1.0, no_embed_class=True, global_pool="token",
    )  # fmt: skip
    ours = make_backbone().vit.state_dict()
    position_1TD = ours.pop("pos_embed")
    state = {
        "cls_token": ours.pop("cls_token") + position_1TD[:, :1],
        "pos_embed": position_1TD[:, 1:],
        "reg_token": ours.pop("register_tokens"),
        "patch_embed.proj.weight": ours.pop("patch_embed.proj.weight")[:, :, 0],
    }
    ours.pop("mask_token")
    model.load_state_dict(state | ours)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("indices", [None, 2, [0, 2], [-3, -1], [1]])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates_are_timms(timm_vit: Any, indices: Any, norm: bool, stop_early: bool) -> None:
    backbone, x = make_backbone(), pixels()
    for prefix, form in ((False, "NCHW"), (True, "NLC")):
        words = {
            "indices": indices,
            "norm": norm,
            "stop_early": stop_early,
            "return_prefix_tokens": prefix,
            "output_fmt": form,
        }
        last, outs = backbone.forward_intermediates(x, **words)
        their_last, their_outs = timm_vit.forward_intermediates(x[:, :, 0], **words)
        torch.testing.assert_close(last, their_last, atol=1e-4, rtol=1e-4)
        assert len(outs) == len(their_outs)
        for ours, theirs in zip(outs, their_outs, strict=True):
            if prefix:
                torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(ours[1], theirs[1], atol=1e-4, rtol=1e-4)
            else:
                torch.testing.assert_close(ours[:, :, 0], theirs, atol=1e-4, rtol=1e-4)
    only = backbone.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert isinstance(only, list)
    assert len(only) == len(their_outs)


@torch.no_grad()
def test_the_default_norm_is_that_of_each_library(timm_vit: Any) -> None:
    """DINOv2's get_intermediate_layers norms, timm's does not; both are ours under their names."""
    backbone, x = make_backbone(), pixels()
    raw = timm_vit.get_intermediate_layers(x[:, :, 0], n=2)
    normed = timm_vit.get_intermediate_layers(x[:, :, 0], n=2, norm=True)
    for ours, expected in zip(backbone.get_intermediate_layers(x, n=2), normed, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    for ours, expected in zip(
        backbone.get_intermediate_layers(x, n=2, norm=False), raw, strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    ((maps, cls_BD),) = backbone.get_intermediate_layers(
        x, n=[1], reshape=True, return_class_token=True
    )
    assert maps.shape == (2, 64, 1, 4, 4)
    assert cls_BD.shape == (2, 64)
    assert [len(info) for info in backbone.feature_info] == [3, 3, 3]
    assert backbone.feature_info[2]["num_chs"] == timm_vit.feature_info[2]["num_chs"]


@torch.no_grad()
def test_forward_features_are_the_tokens_by_dinov2s_names(timm_vit: Any) -> None:
    backbone, x = make_backbone(), pixels()
    out = backbone.forward_features(x)
    tokens = torch.cat(
        [
            out["x_norm_clstoken"][:, None],
            out["x_norm_regtokens"],
            out["x_norm_patchtokens"],
        ],
        dim=1,
    )
    torch.testing.assert_close(tokens, timm_vit.forward_features(x[:, :, 0]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(backbone.vit.norm(out["x_prenorm"]), tokens)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 3] = True
    masked = backbone.forward_features(x, masks)
    assert masked["masks"] is masks
    changed = (masked["x_norm_patchtokens"] != out["x_norm_patchtokens"]).flatten(1).any(1)
    assert changed.tolist() == [True, False]


@pytest.mark.parametrize("indices", [[3], [-4], []])
def test_a_block_that_is_not_there_is_named(indices: list[int]) -> None:
    with pytest.raises(InputError, match=r"not positions in 0\.\.2"):
        make_backbone().forward_intermediates(pixels(), indices=indices)
    with pytest.raises(InputError, match="output_fmt"):
        make_backbone().forward_intermediates(pixels(), output_fmt="NHWC")  # type: ignore[arg-type]


@torch.no_grad()
def test_the_copy_for_inference_follows_the_weights_and_steps_aside() -> None:
    backbone, x = make_backbone(precision="bf16"), pixels()
    first = backbone(x).pooler_output
    assert torch.equal(backbone(x).pooler_output, first)
    before = backbone._frozen[0][1]
    backbone.vit.blocks[1].mlp.fc2.weight.mul_(1.5)
    second = backbone(x).pooler_output
    assert backbone._frozen[0][1] is not before
    assert not torch.equal(second, first)
    names = set(backbone.state_dict())
    assert all(name.startswith("vit.") for name in names)
    seen: list[str] = []
    hook = backbone.vit.blocks[0].register_forward_hook(lambda *_: seen.append("block"))
    torch.testing.assert_close(backbone(x).pooler_output, second, atol=0.05, rtol=0.05)
    assert seen == ["block"]  # a hook is called: the modules themselves run
    hook.remove()
    with torch.inference_mode():
        assert torch.equal(backbone(x).pooler_output, second)


@torch.no_grad()
def test_float16_survives_what_overflows_it() -> None:
    backbone, x = make_backbone(), pixels()
    backbone.vit.blocks[1].mlp.fc2.bias[5] = 2e5  # as one channel of large models does
    expected = backbone(x).last_hidden_state
    half = Backbone(backbone.vit, backbone.preprocess, precision="fp16").eval()
    cosine = torch.cosine_similarity(half(x).last_hidden_state, expected, dim=-1)
    assert cosine.min() > 0.999


# In bf16 with heads of 64, where the CPU has them, by our native kernels.
WIDE = dataclasses.replace(CONFIG, dim=128, head_dim=64)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_inference_is_one_graph_for_all_batch_sizes(precision: str) -> None:
    eager = make_backbone(WIDE, precision=precision)
    compiled = make_backbone(WIDE, precision=precision, compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for batch in (2, 3, 5):
        ours, expected = (b(pixels(batch)).last_hidden_state for b in (compiled, eager))
        if precision == "fp32":
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        assert torch.cosine_similarity(ours, expected, dim=-1).min() > 0.9995
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_results_outlive_the_next_replay() -> None:
    """Where there is no CUDA the graph is compiled all the same, and not replayed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    eager = make_backbone(WIDE).to(device)
    replayed = make_backbone(WIDE, compile="cuda-graphs").to(device)
    inputs = [pixels(2).to(device) * scale for scale in (1.0, 0.5, 0.25, 0.1)]
    outs = [replayed(x) for x in inputs]
    for x, out in zip(inputs, outs, strict=True):
        torch.testing.assert_close(
            out.last_hidden_state, eager(x).last_hidden_state, atol=1e-4, rtol=1e-4
        )
    with pytest.raises(InputError, match="compile='max' is not one of"):
        make_backbone(compile="max")


@torch.no_grad()
def test_a_backbone_is_copied_without_its_copy_for_inference() -> None:
    backbone = make_backbone(WIDE, precision="bf16")
    expected = backbone(pixels()).pooler_output
    twin = copy.deepcopy(backbone)
    assert not twin._frozen
    assert torch.equal(twin(pixels()).pooler_output, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_threads_may_share_a_backbone(precision: str) -> None:
    backbone = make_backbone(WIDE, precision=precision)

    def run(_: int) -> Tensor:
        with torch.no_grad():  # of each thread
            return backbone(pixels()).last_hidden_state

    with ThreadPoolExecutor(6) as pool:
        first, *others = pool.map(run, range(12))
    assert all(torch.equal(other, first) for other in others)


def test_the_default_precision_is_that_of_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_amx, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("tapct_fast._native.has_amx", lambda has_amx=has_amx: has_amx)
        assert best_precision(torch.device("cpu")) == precision


def test_the_attention_is_switched_by_argument() -> None:
    backbone = make_backbone(attention="sdpa math")
    with torch.no_grad():
        torch.testing.assert_close(
            backbone(pixels()).pooler_output,
            make_backbone()(pixels()).pooler_output,
            atol=1e-4,
            rtol=1e-4,
        )
        with pytest.raises(ValueError, match="cannot run here"):
            make_backbone(attention="flash-attn 3")(pixels())


def test_the_released_names_are_ours(tmp_path: Any) -> None:
    backbone = make_backbone()
    assert isinstance(backbone, tapct_fast.TAPCTModel)
    backbone.save_pretrained(tmp_path / "saved")
    again = tapct_fast.TAPCTModel.from_pretrained(tmp_path / "saved", precision="fp32")
    with torch.no_grad():
        assert torch.equal(again(pixels()).pooler_output, backbone(pixels()).pooler_output)

"""Everyone who takes part: what tokens they give, where these lie, and who is refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from with_timm import import_timm

from tapct_fast import recipes
from tapct_fast.backbone.export import preprocess_of, save_backbone
from tapct_fast.backbone.load import load_backbone
from tapct_fast.data.phantom import make_phantom
from tapct_fast.downstream.encode import embed_volume
from tapct_fast.errors import FormatError, InputError
from tapct_fast.evaluation.encoders import Encoder, grid_features, open_encoder
from tapct_fast.io.volume import Volume

PHANTOM = make_phantom(3, 0, shape_zyx=(14, 60, 72), spacing_mm=(10.0, 5.5, 5.5)).volume
CANARY = "DOE_JANE"


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    module: ModuleType = import_timm()
    return module


def block(value: int, shape: tuple[int, int, int] = (16, 224, 224)) -> Volume:
    """Air with one block of 4 x 8 x 8 voxels from (8, 40, 80)."""
    hu_ZYX = np.full(shape, -1000, np.int16)
    hu_ZYX[8:12, 40:48, 80:88] = value
    return Volume(hu_ZYX, (5.0, 1.0, 1.0), np.diag([-1.0, -1.0, 5.0, 1.0]))


def landmark_mm(encoder: Encoder, volume: Volume) -> np.ndarray:
    """World place of the token that differs most from the median token."""
    features = encoder.encode(volume)
    tokens = features.patches_ZYXC
    distance = (tokens - tokens.flatten(0, 2).median(0).values).norm(dim=-1)
    z, y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return np.asarray(features.affine @ [x, y, z, 1])[:3]


BLOCK_MM = np.array([-83.5, -43.5, 47.5])  # centre of the block


def test_intensity_is_what_the_voxels_of_a_patch_are() -> None:
    encoder = open_encoder("intensity")
    rng = np.random.default_rng(0)
    hu_ZYX = rng.integers(-1000, 1000, (10, 224, 224)).astype(np.int16)
    volume = Volume(hu_ZYX, (5.0, 1.0, 1.0), np.diag([-1.0, -1.0, 5.0, 1.0]))
    features = encoder.encode(volume)
    assert features.patches_ZYXC.shape == (3, 28, 28, 4)
    for z, y, x in ((0, 0, 0), (1, 5, 9), (2, 27, 27)):  # the last plane has two slices of four
        patch = hu_ZYX[4 * z : 4 * z + 4, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].astype(np.float64)
        expected = [patch.mean(), patch.std(), patch.min(), patch.max()]
        np.testing.assert_allclose(features.patches_ZYXC[z, y, x], expected, rtol=1e-6)
    assert features.cls_ND.shape == (1, 4)
    torch.testing.assert_close(features.cls_ND[0], features.patches_ZYXC.flatten(0, 2).mean(0))
    np.testing.assert_allclose(landmark_mm(encoder, block(500)), BLOCK_MM, atol=1e-6)


def test_a_plane_of_another_size_is_resized_to_the_released_grid() -> None:
    features = open_encoder("intensity").encode(PHANTOM)
    assert features.patches_ZYXC.shape == (4, 28, 28, 4)
    assert features.spacing_mm == pytest.approx((40.0, 60 * 5.5 / 28, 72 * 5.5 / 28))


def test_ours_is_embedded_as_embed_volume_does_and_named_without_its_path(tmp_path: Path) -> None:
    encoder = open_encoder("random:debug", seed=3)
    assert encoder.name == "random debug"
    folder = tmp_path / CANARY
    backbone = encoder.backbone  # type: ignore[attr-defined]
    save_backbone(backbone, folder)
    loaded = open_encoder(folder)
    assert CANARY not in loaded.name
    assert loaded.name.startswith("vit 128x4 ")
    assert open_encoder(f"mine 2={folder}").name == "mine 2"
    assert open_encoder(backbone).fingerprint() == encoder.fingerprint()
    features, expected = loaded.encode(PHANTOM), embed_volume(load_backbone(folder), PHANTOM)
    torch.testing.assert_close(features.patches_ZYXC, expected.patches_ZYXC)
    torch.testing.assert_close(features.cls_ND, expected.cls_ND)

    again = open_encoder(f"random:{folder}", seed=3)
    assert again.name == "random vit 128x4"
    assert again.fingerprint() == encoder.fingerprint()
    assert open_encoder("random:debug", seed=4).fingerprint() != encoder.fingerprint()
    config = recipes.debug()
    assert backbone.preprocess == preprocess_of(config)
    assert open_encoder(encoder) is encoder


def encode_twice(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Halve the resolution and give two channels."""
    hu_ZYX = volume.hu_ZYX[::2, ::2, ::2].astype(np.float64)
    return np.stack([hu_ZYX, 2 * hu_ZYX]), volume.affine @ np.diag([2.0, 2.0, 2.0, 1.0])


def test_a_users_function_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_encoder(encode_twice)
    assert encoder.name == "encode_twice"
    assert encoder.fingerprint() == ""  # what it depends on is not known
    features = encoder.encode(PHANTOM)
    assert features.patches_ZYXC.shape == (7, 30, 36, 2)
    assert features.patches_ZYXC[2, 3, 4].tolist() == [
        PHANTOM.hu_ZYX[4, 6, 8],
        2 * PHANTOM.hu_ZYX[4, 6, 8],
    ]
    assert features.cls_ND.shape == (3, 2)  # planes 3 + 3 + 1
    np.testing.assert_allclose(landmark_mm(encoder, block(500)), BLOCK_MM, atol=8)

    (tmp_path / "my_net.py").write_text(
        "def encode(volume):\n    return volume.hu_ZYX[None], volume.affine\n"
        "encode.fingerprint = 'weights 7'\nwrong = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    named = open_encoder("my_net:encode")
    assert named.name == "my_net:encode"
    assert len(named.fingerprint()) == 64
    assert named.encode(block(500, (12, 48, 88))).patches_ZYXC.shape == (12, 48, 88, 1)
    before = named.fingerprint()
    assert open_encoder("my_net:encode").fingerprint() == before
    sys.modules["my_net"].encode.fingerprint = "weights 8"
    assert open_encoder("my_net:encode").fingerprint() != before
    for spec, message in (
        ("my_net:none", "has no none"),
        ("my_net:wrong", "is not a function"),
        ("no_such_module:encode", "there is no module no_such_module"),
    ):
        with pytest.raises(InputError, match=message):
            open_encoder(spec)


@pytest.mark.parametrize(
    ("result", "message", "kind"),
    [
        (lambda v: v.hu_ZYX, "neither Features nor", InputError),
        (lambda v: (v.hu_ZYX, v.affine), "array of shape", InputError),
        (lambda v: (v.hu_ZYX[None], np.eye(3)), "affine of shape", InputError),
        (lambda v: (v.hu_ZYX[None] * np.nan, v.affine), "not finite", InputError),
        (lambda v: (v.hu_ZYX[None], np.zeros((4, 4))), "affine", FormatError),
    ],
)
def test_what_a_function_returns_is_checked(
    result: Callable[[Volume], Any], message: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=message):
        open_encoder(result).encode(PHANTOM)


@pytest.mark.parametrize(
    ("name", "grid_yx", "width"),
    [
        ("vit_tiny_patch16_224", 14, 192),
        ("resnet18", 7, 512),
        ("swin_tiny_patch4_window7_224", 7, 768),
    ],
)
def test_timm_sees_three_slices_at_a_time(
    timm: ModuleType, name: str, grid_yx: int, width: int
) -> None:
    encoder = open_encoder(f"timm:{name}@random", seed=1)
    features = encoder.encode(PHANTOM)
    assert features.patches_ZYXC.shape == (5, grid_yx, grid_yx, width)  # 14 slices
    assert features.cls_ND.shape == (5, width)
    assert encoder.name == f"timm:{name}@random"

    # The same by hand: the second image is slices 3, 4 and 5.
    net = encoder.net  # type: ignore[attr-defined]
    data = timm.data.resolve_model_data_config(net)
    x = torch.from_numpy(PHANTOM.hu_ZYX[3:6])[None].float()
    x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
    x = x.clamp(-1000, 1000).add(1000).div(2000)
    x = (x - torch.tensor(data["mean"])[:, None, None]) / torch.tensor(data["std"])[:, None, None]
    maps = net.forward_intermediates(
        x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
    )[0]
    torch.testing.assert_close(
        features.patches_ZYXC[1], maps[0].movedim(0, -1), rtol=1e-4, atol=1e-4
    )
    pooled = net.forward_head(net.forward_features(x), pre_logits=True)[0]
    torch.testing.assert_close(features.cls_ND[1], pooled, rtol=1e-4, atol=1e-4)
    assert features.spacing_mm == pytest.approx((30.0, 60 * 5.5 / grid_yx, 72 * 5.5 / grid_yx))
    place_mm = features.affine @ [0, 0, 1, 1]
    first, last = (PHANTOM.affine @ [i, j, 4, 1] for i, j in ((-0.5, -0.5), (71.5, 59.5)))
    np.testing.assert_allclose(place_mm, first + (last - first) * [1, 1, 1, 1] / (2 * grid_yx))

    assert open_encoder(f"timm:{name}@random", seed=1).fingerprint() == encoder.fingerprint()
    assert open_encoder(f"timm:{name}@random", seed=2).fingerprint() != encoder.fingerprint()


def test_timms_weights_come_from_this_machine_only(
    timm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"resnet18 are not on this machine.*resnet18@random"):
        open_encoder("timm:resnet18")
    weights = timm.create_model("resnet18")  # as the hub has it, with its classifier
    hub_id = timm.get_pretrained_cfg("resnet18").hf_hub_id
    folder = tmp_path / f"models--{hub_id.replace('/', '--')}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(weights.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    encoder = open_encoder("timm:resnet18")
    assert encoder.name == "timm:resnet18"
    loaded = encoder.net.state_dict()  # type: ignore[attr-defined]
    assert torch.equal(loaded["layer4.1.conv2.weight"], weights.layer4[1].conv2.weight)


@pytest.mark.parametrize(
    ("spec", "grid", "width", "num_windows"),
    [
        ("SwinUNETR@random", (1, 2, 3), 768, 6),
        ("SwinUNETR/2@random", (2, 8, 9), 192, 9),
        ("SegResNet@random", (2, 8, 9), 128, 9),
        ("ViT@random", (1, 4, 5), 768, 12),
    ],
)
def test_monais_feature_maps_lie_on_the_scan(
    spec: str,
    grid: tuple[int, int, int],
    width: int,
    num_windows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tapct_fast.evaluation.rivals.WINDOW", 32)  # for speed
    encoder = open_encoder(f"monai:{spec}", seed=1)
    features = encoder.encode(PHANTOM)
    assert features.patches_ZYXC.shape == (*grid, width)
    assert features.cls_ND.shape == (num_windows, width)
    stride = 32 // 2 ** (2 if "/2" in spec or "Seg" in spec else 1 if "ViT" in spec else 0)
    np.testing.assert_allclose(
        features.affine @ [1, 0, 0, 1],
        PHANTOM.affine @ [stride * 1.5 - 0.5, stride / 2 - 0.5, stride / 2 - 0.5, 1],
    )
    assert CANARY not in encoder.name


def test_one_window_of_monai_is_its_networks_own_map() -> None:
    encoder = open_encoder("monai:SegResNet@random", seed=1)
    features = encoder.encode(PHANTOM)
    x = torch.full((1, 1, 96, 96, 96), -1024.0)
    x[0, 0, :14, :60, :72] = torch.from_numpy(PHANTOM.hu_ZYX).float()
    with torch.no_grad():
        maps = encoder.net.encode(x.clamp(-1000, 1000).add(1000).div(2000))[1]  # type: ignore[attr-defined]
    expected = maps[-1][0].movedim(0, -1)
    torch.testing.assert_close(features.patches_ZYXC, expected[:2, :8, :9].contiguous())
    torch.testing.assert_close(features.cls_ND[0], expected.flatten(0, 2).mean(0))


def test_monais_weights_are_safetensors_of_the_encoder_or_the_whole(tmp_path: Path) -> None:
    from monai.networks.nets import SwinUNETR

    torch.manual_seed(5)
    whole = SwinUNETR(1, 3, feature_size=12)
    path = tmp_path / CANARY / "weights.safetensors"
    path.parent.mkdir()
    save_file({f"module.{n}": t.contiguous() for n, t in whole.state_dict().items()}, path)
    first = open_encoder(f"monai:SwinUNETR@{path}")
    assert first.name == "monai:SwinUNETR"
    assert torch.equal(
        first.net.patch_embed.proj.weight,  # type: ignore[attr-defined]
        whole.swinViT.patch_embed.proj.weight,
    )
    save_file({n: t.contiguous() for n, t in whole.swinViT.state_dict().items()}, path)
    assert open_encoder(f"monai:SwinUNETR@{path}").fingerprint() == first.fingerprint()

    state = {n: t.contiguous() for n, t in whole.swinViT.state_dict().items()}
    for changed, message in (
        ({n: t for n, t in state.items() if "layers4" not in n}, "lack .* tensors"),
        ({**state, "layers1.0.blocks.0.norm1.weight": torch.ones(7)}, "do not fit it"),
        ({"a": torch.ones(1)}, r"have no swinViT\.patch_embed"),
    ):
        save_file(changed, path)
        with pytest.raises(InputError, match=message) as error:
            open_encoder(f"monai:SwinUNETR@{path}")
        assert CANARY not in str(error.value)
    with pytest.raises(InputError, match=r"no \.safetensors file") as error:
        open_encoder(f"monai:SwinUNETR@{path.with_suffix('.pt')}")
    assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:no_such_net", "timm has no network"),
        ("timm:resnet18@imagenet", "timm:NAME or timm:NAME@random"),
        ("monai:UNet9@random", "NAME one of SwinUNETR, ViT, SegResNet"),
        ("monai:SwinUNETR", "NAME one of"),
        ("monai:SegResNet/9@random", "has 4 feature maps"),
        ("random:vit-x", "neither a folder"),
        ("nowhere", "neither a folder"),
    ],
)
def test_a_wrong_spec_is_refused(timm: ModuleType, spec: str, message: str) -> None:
    del timm
    with pytest.raises(InputError, match=message):
        open_encoder(spec)


def test_bags_are_means_of_three_planes() -> None:
    tokens = torch.randn(7, 2, 3, 5)
    features = grid_features(tokens, np.diag([-1.0, -1.0, 2.0, 1.0]))
    expected = [tokens[:3].mean((0, 1, 2)), tokens[3:6].mean((0, 1, 2)), tokens[6].mean((0, 1))]
    torch.testing.assert_close(features.cls_ND, torch.stack(expected))
    torch.testing.assert_close(features.pooled_D, torch.stack(expected).mean(0))


def test_real_ct_is_encoded_by_everyone(real_ct: Path, timm: ModuleType) -> None:
    from tapct_fast.io.read import read_volume

    del timm
    volume = read_volume(real_ct / "nifti" / "ts_ct_sm_int16.nii.gz")
    for spec in ("intensity", "random:debug", "timm:resnet18@random", "monai:SegResNet@random"):
        features = open_encoder(spec).encode(volume)
        assert features.patches_ZYXC.isfinite().all()
        assert features.patches_ZYXC.std() > 0
        grid_zyx = np.array(features.patches_ZYXC.shape[:3])
        # The grid's middle is that of the scan, but for the padding of the last patch.
        middle = features.affine @ [*(grid_zyx[::-1] - 1) / 2, 1]
        centre = volume.affine @ [*(np.array(volume.hu_ZYX.shape[::-1]) - 1) / 2, 1]
        assert (np.abs(middle - centre)[:3] <= np.array(features.spacing_mm)[::-1] / 2 + 1e-6).all()

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.errors import FormatError, InputError

pytest.importorskip("monai", reason="MONAI is not installed")
pytest.importorskip("nibabel", reason="nibabel is not installed")

import nibabel
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.blocks import UnetOutBlock, UnetrPrUpBlock
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    ResampleToMatch,
    SaveImage,
)

from tapct_fast.adapters.monai import TapctPreprocessd, place_features

# Directions of x, y, z indices, as the columns of an affine.
FRAMES = {
    "RAS": [[0.8, 0, 0], [0, 0.7, 0], [0, 0, 2.0]],
    "LPS": [[-0.8, 0, 0], [0, -0.7, 0], [0, 0, 2.0]],
    "SRP": [[0, 0.7, 0], [0, 0, -0.8], [2.0, 0, 0]],
    "AIL": [[0, 0, -0.7], [0.8, 0, 0], [0, -2.0, 0]],
}
SLOPE = np.array([1.5, -2.0, 3.0])  # HU per millimetre along R, A, S


def ramp(frame: str, shape_xyz: tuple[int, int, int] = (42, 50, 46)) -> MetaTensor:
    """Return an image whose HU are a linear function of the place in the patient."""
    affine = np.eye(4)
    affine[:3, :3] = FRAMES[frame]
    affine[:3, 3] = (11.0, -7.0, 30.0)
    index = np.stack(np.meshgrid(*map(np.arange, shape_xyz), indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    hu = np.rint(world @ SLOPE - 200).astype(np.float32)
    return MetaTensor(hu[None], affine=torch.from_numpy(affine), meta={"space": "RAS"})


def hu_at(affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return (index @ affine[:3, :3].T + affine[:3, 3]) @ SLOPE - 200


PREPROCESSES = {
    "native": Preprocess(resize_yx=None),
    "resized": Preprocess(resize_yx=(96, 64), antialias=False),
}


@pytest.mark.parametrize("steps", PREPROCESSES)
@pytest.mark.parametrize("frame", FRAMES)
def test_pixels_lie_where_their_affine_says(frame: str, steps: str) -> None:
    preprocess = PREPROCESSES[steps]
    out = TapctPreprocessd("image", preprocess)({"image": ramp(frame), "label": 3})
    assert out["label"] == 3
    pixels = out["image"]
    assert pixels.dtype == torch.float32
    assert all(s % m == 0 for s, m in zip(pixels.shape[1:], (4, 8, 8), strict=True))
    affine = pixels.affine.numpy()
    # Axial first: indices grow to Superior, Posterior, Left.
    assert affine[2, 0] > 0
    assert affine[1, 1] < 0
    assert affine[0, 2] < 0
    z, y, x = pixels.meta["pixels_zyx"]
    hu = pixels.as_tensor()[0, :z, :y, :x].numpy() * preprocess.hu.std + preprocess.hu.mean
    expected = hu_at(affine, (z, y, x))
    inner = np.s_[:, 2:-2, 2:-2]  # interpolation clamps at the border
    assert np.abs(hu[inner] - expected[inner]).max() < 0.51  # HU of the ramp were rounded


@pytest.mark.parametrize("steps", PREPROCESSES)
@pytest.mark.parametrize("frame", FRAMES)
def test_features_are_placed_at_the_centres_of_their_patches(frame: str, steps: str) -> None:
    preprocess = PREPROCESSES[steps]
    image = ramp(frame)
    pixels = TapctPreprocessd("image", preprocess)({"image": image})["image"]
    # The mean of a patch of a linear function is its value at the centre.
    means = nn.functional.avg_pool3d(pixels.as_tensor(), (4, 8, 8), (4, 8, 8))
    features = place_features(means * preprocess.hu.std + preprocess.hu.mean, pixels)
    shape = tuple(features.shape[1:])
    whole = tuple(
        n // p for n, p in zip(pixels.meta["pixels_zyx"], (4, 8, 8), strict=True)
    )  # without patches that hold padding
    expected = hu_at(features.affine.numpy(), shape)
    inside = tuple(slice(1, n - 1) for n in whole)
    assert np.abs(features.numpy()[0] - expected)[inside].max() < 0.2  # mean of rounded HU
    # MONAI itself brings it back onto the image.
    back = ResampleToMatch(padding_mode="border")(features, image)
    assert back.shape == image.shape
    lps = np.linalg.norm(image.affine.numpy()[:3, :3], axis=0)
    margin = [int(np.ceil(2 * 8 * 0.8 / mm)) + 1 for mm in lps]
    inner = tuple(slice(m, n - m) for m, n in zip(margin, image.shape[1:], strict=True))
    assert np.abs((back - image).numpy()[0][inner]).max() < 1.0


def test_padding_is_cut_off_and_what_does_not_fit_is_refused() -> None:
    pixels = TapctPreprocessd("image", Preprocess(resize_yx=None, depth_multiple=12))(
        {"image": ramp("RAS", (40, 40, 13))}
    )["image"]
    assert pixels.shape == (1, 24, 40, 40)
    assert place_features(torch.zeros(5, 6, 5, 5), pixels).shape == (5, 4, 5, 5)
    with pytest.raises(InputError, match=r"not \(D, Z, Y, X\) on patches"):
        place_features(torch.zeros(5, 7, 5, 5), pixels)
    with pytest.raises(InputError, match="not what TapctPreprocessd made"):
        place_features(torch.zeros(5, 6, 5, 5), pixels.as_tensor())


def test_bad_images_are_errors_and_missing_keys_can_be_allowed() -> None:
    preprocess = Preprocess(resize_yx=None)
    with pytest.raises(InputError, match="is not a MetaTensor"):
        TapctPreprocessd("image", preprocess)({"image": torch.zeros(1, 8, 8, 8)})
    with pytest.raises(KeyError):
        TapctPreprocessd("image", preprocess)({})
    assert TapctPreprocessd("image", preprocess, allow_missing_keys=True)({}) == {}
    normalised = ramp("RAS")
    normalised = (normalised - normalised.mean()) / normalised.std()
    with pytest.raises(FormatError):
        TapctPreprocessd("image", preprocess)({"image": normalised})


@torch.no_grad()
def test_files_go_through_compose_and_collate_and_features_are_written(
    tmp_path: Path, backbone: Backbone
) -> None:
    image = ramp("SRP")
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(image.numpy()[0], image.affine.numpy()), path)
    steps = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            TapctPreprocessd("image", backbone.preprocess),
        ]
    )
    sample = steps({"image": str(path)})
    batch = list_data_collate([sample, sample])["image"]
    maps = backbone(batch, reshape=True).last_hidden_state
    one = decollate_batch(batch)[1]
    features = place_features(maps[1], one)
    assert features.shape[0] == 64
    SaveImage(tmp_path / "out", output_postfix="features", separate_folder=False, print_log=False)(
        features
    )
    again = LoadImaged("image")({"image": str(next((tmp_path / "out").glob("*.nii.gz")))})["image"]
    torch.testing.assert_close(torch.as_tensor(again.affine), features.affine, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(again.as_tensor().movedim(-1, 0), features.as_tensor())


def feature_map(backbone: Backbone) -> object:
    return lambda pixels: backbone(pixels, reshape=True).last_hidden_state


@torch.no_grad()
def test_sliding_windows_predict_what_single_windows_do(backbone: Backbone) -> None:
    x_BCZYX = torch.randn(1, 1, 16, 64, 64, generator=torch.Generator().manual_seed(3))
    inferer = SlidingWindowInferer((8, 32, 32), sw_batch_size=3, overlap=0.0)
    out = inferer(x_BCZYX, feature_map(backbone))
    assert out.shape == (1, 64, 4, 8, 8)
    for z, y, x in itertools.product(range(2), repeat=3):
        window = x_BCZYX[:, :, 8 * z : 8 * z + 8, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32]
        expected = backbone(window, reshape=True).last_hidden_state
        part = out[:, :, 2 * z : 2 * z + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)  # batches sum otherwise


@torch.no_grad()
def test_the_model_cards_overlap_agrees_with_our_own_windows(backbone: Backbone) -> None:
    from tapct_fast.downstream.windows import Blend, tile

    x_BCZYX = torch.randn(1, 1, 16, 32, 32, generator=torch.Generator().manual_seed(4))
    inferer = SlidingWindowInferer((8, 32, 32), overlap=0.5, mode="gaussian", sigma_scale=0.125)
    out = inferer(x_BCZYX, feature_map(backbone))[0]
    assert out.shape == (64, 4, 4, 4)
    blend = Blend((4, 4, 4), (2, 4, 4), "gaussian", torch.device("cpu"))
    for start in tile((4, 4, 4), (2, 4, 4), 0.5):
        window = x_BCZYX[:, :, 4 * start[0] : 4 * start[0] + 8]
        with torch.no_grad():
            out_window = backbone(window, reshape=True).last_hidden_state[0]
        blend.add(start, out_window.movedim(0, -1))
    # Both weigh windows by a Gaussian, MONAI's sampled on voxels and ours on tokens.
    cosine = torch.cosine_similarity(out.movedim(0, -1), blend.mean_ZYXC(), dim=-1)
    assert cosine.min() > 0.99


def test_an_inferer_takes_the_transforms_output(backbone: Backbone) -> None:
    pixels = TapctPreprocessd("image", Preprocess(resize_yx=None))({"image": ramp("LPS")})["image"]
    with torch.no_grad():
        out = SlidingWindowInferer((8, 32, 32), overlap=0.25)(pixels[None], feature_map(backbone))
    placed = place_features(out[0], pixels)
    assert placed.shape == (64, 12, 7, 6)


class Segmenter(nn.Module):
    """A decoder of MONAI's blocks on the backbone's maps."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.encoder = backbone
        self.up = UnetrPrUpBlock(3, 128, 16, 1, 3, 1, (2, 2, 2), "instance")
        self.head = UnetOutBlock(3, 16, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.encoder(pixels, reshape=True, output_hidden_states=True)
        logits = self.head(self.up(torch.cat(out.hidden_states, dim=1)))
        return nn.functional.interpolate(logits, size=pixels.shape[2:], mode="trilinear")


def test_as_an_encoder_under_monai_blocks_it_learns(backbone: Backbone) -> None:
    torch.manual_seed(0)
    net = Segmenter(backbone).train()
    pixels = torch.randn(2, 1, 8, 32, 32)
    label = (pixels.mean(dim=2, keepdim=True) > 0).expand(-1, -1, 8, -1, -1).long()
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = criterion(net(pixels), label)
        optimizer.zero_grad()
        loss.backward()
        assert net.encoder.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

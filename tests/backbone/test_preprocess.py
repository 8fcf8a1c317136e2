import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import HuConfig
from tapct_fast.errors import ConfigError, InputError
from tapct_fast.io.volume import Volume


def bilinear_matrix(size: int, pixels: int) -> NDArray[np.float64]:
    """Rows of weights: pixel i samples (i + 0.5) size / pixels - 0.5, edges held."""
    matrix = np.zeros((pixels, size))
    for i in range(pixels):
        place = np.clip((i + 0.5) * size / pixels - 0.5, 0, size - 1)
        low = int(np.floor(place))
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (place - low)
        matrix[i, high] += place - low
    return matrix


def oracle(
    hu_ZYX: NDArray[np.int16], resize_yx: tuple[int, int] | None, multiples: tuple[int, int, int]
) -> NDArray[np.float64]:
    """Resize in plane, pad at the end with -1024, clip, subtract, divide; in float64."""
    x = hu_ZYX.astype(np.float64)
    if resize_yx:
        rows, columns = (
            bilinear_matrix(s, p) for s, p in zip(hu_ZYX.shape[1:], resize_yx, strict=True)
        )
        x = rows @ x @ columns.T
    pads = [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)]
    x = np.pad(x, pads, constant_values=-1024)
    return (np.clip(x, -1008, 822) - (-86.8086)) / 322.6347


@pytest.mark.parametrize(
    ("shape", "resize_yx"),
    [
        ((5, 17, 30), (24, 16)),  # shrink, and grow
        ((4, 16, 16), (16, 16)),  # nothing to do
        ((1, 40, 9), None),
        ((13, 512, 40), (224, 224)),
    ],
)
def test_preprocess_matches_a_float64_formula(
    shape: tuple[int, int, int], resize_yx: tuple[int, int] | None
) -> None:
    hu_ZYX = np.random.default_rng(0).integers(-3024, 3071, shape).astype(np.int16)
    preprocess = Preprocess(resize_yx=resize_yx)
    pixels = preprocess.apply(torch.from_numpy(hu_ZYX)[None, None])
    expected = oracle(hu_ZYX, resize_yx, (4, 8, 8))
    # Source places in float32 are off by 1e-7 of 512 pixels, times steps of 6000 HU, over the std.
    np.testing.assert_allclose(pixels[0, 0].numpy(), expected, atol=2e-3 if resize_yx else 1e-6)


def test_resizing_comes_before_clipping() -> None:
    hu_ZYX = np.array([[[3000, -1000], [3000, -1000]]], dtype=np.int16)
    x = Preprocess(resize_yx=(1, 1), plane_multiple=1, depth_multiple=1).apply(
        torch.from_numpy(hu_ZYX)[None, None]
    )
    # The mean of 3000 and -1000 is 1000, clipped to 822; clipping first would give -89.
    assert x.item() == pytest.approx((822 + 86.8086) / 322.6347, rel=1e-6)


def test_padding_is_air_at_the_end_and_not_soft_tissue() -> None:
    hu = torch.zeros(1, 1, 5, 8, 8, dtype=torch.int16)
    x = Preprocess(resize_yx=None).apply(hu)
    assert x.shape[2] == 8
    air = (-1008 + 86.8086) / 322.6347
    torch.testing.assert_close(x[:, :, 5:], torch.full((1, 1, 3, 8, 8), air))
    torch.testing.assert_close(x[:, :, :5], torch.full((1, 1, 5, 8, 8), 86.8086 / 322.6347))


def test_a_volume_and_its_tensor_give_the_same_pixels() -> None:
    hu_ZYX = np.random.default_rng(0).integers(-1000, 1000, (3, 20, 20)).astype(np.int16)
    volume = Volume(hu_ZYX, (1.0, 1.0, 1.0), np.diag([-1.0, -1.0, 1.0, 1.0]))
    preprocess = Preprocess(resize_yx=(16, 16), antialias=True)
    tensor = torch.from_numpy(hu_ZYX)[None, None]
    assert torch.equal(preprocess.apply(volume), preprocess.apply(tensor))
    assert torch.equal(preprocess.apply(volume), preprocess.apply(tensor.float()))


def test_antialias_averages_noise_that_plain_bilinear_keeps() -> None:
    noise = torch.randn(1, 1, 4, 256, 256, generator=torch.Generator().manual_seed(0)) * 100
    plain = Preprocess(resize_yx=(64, 64)).apply(noise).std()
    smooth = Preprocess(resize_yx=(64, 64), antialias=True).apply(noise).std()
    assert smooth < 0.6 * plain  # 8 x 8 voxels count instead of 2 x 2


def test_pixel_affine_follows_a_ramp() -> None:
    shape = (2, 40, 60)
    preprocess = Preprocess(resize_yx=(24, 16), hu=HuConfig(clip=(-5000, 5000), mean=0.0, std=1.0))
    z, y, x = np.meshgrid(*map(np.arange, shape), indexing="ij")
    ramp = torch.from_numpy(100.5 * y + 7.25 * x)[None, None].float()
    pixels = preprocess.apply(ramp)[0, 0]
    affine = preprocess.pixel_affine(shape)
    for j, i in ((3, 4), (12, 8), (22, 14)):  # inside, where no edge is held
        voxel = affine @ [i, j, 0, 1]
        assert pixels[0, j, i].item() == pytest.approx(100.5 * voxel[1] + 7.25 * voxel[0], rel=1e-4)
    np.testing.assert_array_equal(z[:, 0, 0], [0, 1])  # depth is not resized
    assert affine[2].tolist() == [0, 0, 1, 0]


def test_values_that_are_not_hu_are_refused() -> None:
    preprocess = Preprocess()
    with pytest.raises(InputError, match="already normalised"):
        preprocess.apply(torch.randn(1, 1, 4, 8, 8))
    with pytest.raises(InputError, match="NaN"):
        preprocess.apply(torch.full((1, 1, 4, 8, 8), torch.nan))
    with pytest.raises(InputError, match="neither int16 nor float"):
        preprocess.apply(torch.zeros(1, 1, 4, 8, 8, dtype=torch.uint8))
    for shape in ((4, 8, 8), (1, 2, 4, 8, 8), (1, 1, 0, 8, 8)):
        with pytest.raises(InputError, match="not \\(B, 1, Z, Y, X\\)"):
            preprocess.apply(torch.zeros(shape))


def test_a_plane_that_does_not_fit_the_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="plane_multiple"):
        Preprocess(resize_yx=(224, 220))

"""2D to 3D: kernels against numpy's pseudo-inverse of the whole map, tokens against the slice's."""

import numpy as np
import pytest
import torch

from tapct_fast.backbone.inflate import KERNEL, inflate, inflate_kernel, resize_kernel
from tapct_fast.errors import BackboneError


def triangle(num_in: int, num_out: int) -> np.ndarray:
    """Resize one axis: a triangle as wide as the larger pixel, half-pixel centres."""
    scale = num_in / num_out
    width = max(scale, 1.0)
    centers = (np.arange(num_out) + 0.5) * scale
    distance = np.abs(np.arange(num_in) + 0.5 - centers[:, None]) / width
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size_in", [(14, 14), (16, 16), (4, 6)])
def test_a_resized_kernel_is_the_least_squares_one_over_all_patches(
    size_in: tuple[int, int],
) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, *size_in))
    resize = np.kron(triangle(size_in[0], 8), triangle(size_in[1], 8))  # (64, in): new = B old
    # <new, B x> = <old, x> for every patch x of the units: one equation per pixel of the old patch.
    expected = np.linalg.lstsq(resize.T, kernel.reshape(3, -1).T, rcond=None)[0].T
    got = resize_kernel(torch.from_numpy(kernel), (8, 8))
    np.testing.assert_allclose(got.numpy().reshape(3, -1), expected, atol=1e-9)


def test_a_kernel_that_grows_answers_the_grown_patch_as_before() -> None:
    rng = np.random.default_rng(1)
    kernel, patch = rng.normal(size=(1, 4, 4)), rng.normal(size=(4, 4))
    grown = triangle(4, 8) @ patch @ triangle(4, 8).T
    got = resize_kernel(torch.from_numpy(kernel), (8, 8)).numpy()
    assert (got[0] * grown).sum() == pytest.approx((kernel[0] * patch).sum(), abs=1e-10)


def test_a_kernel_of_equal_size_keeps_its_bits() -> None:
    kernel_DYX = torch.randn(2, 8, 8)
    assert torch.equal(resize_kernel(kernel_DYX, (8, 8)), kernel_DYX)


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 1, 8, 8), (5, 1, 1, 8, 8)])
def test_a_volume_constant_along_z_projects_to_what_the_grey_slice_does(
    shape: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(2)
    kernel, slice_YX = rng.normal(size=shape), rng.normal(size=(8, 8))
    flat = kernel.reshape(5, -1, 8, 8)
    expected = [sum((w * slice_YX).sum() for w in flat[d]) for d in range(5)]  # every channel grey
    inflated = inflate_kernel(torch.from_numpy(kernel), (4, 8, 8))
    assert inflated.shape == (5, 1, 4, 8, 8)
    volume_ZYX = np.stack([slice_YX] * 4)
    got = (inflated.double().numpy() * volume_ZYX).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)  # float32 weights


def flat_state(positions: int) -> dict[str, torch.Tensor]:
    return {
        KERNEL: torch.randn(8, 3, 16, 16),
        "pos_embed": torch.randn(1, positions, 8),
        "reg_token": torch.randn(1, 4, 8),
        "head.weight": torch.zeros(10, 8),
        "head.bias": torch.zeros(10),
        "cls_token": torch.randn(1, 1, 8),
    }


def test_names_of_timm_are_taken_and_a_classifier_is_left_out() -> None:
    named = flat_state(1 + 9)
    tensors, image_zyx = inflate(named, (4, 8, 8))
    assert image_zyx == (4, 24, 24)
    assert sorted(tensors) == ["cls_token", KERNEL, "pos_embed", "register_tokens"]
    assert torch.equal(tensors["register_tokens"], named["reg_token"])
    assert torch.equal(tensors["pos_embed"], named["pos_embed"])


def test_a_grid_without_a_position_for_the_cls_token_gets_one_of_zeros() -> None:
    named = flat_state(9)
    tensors, image_zyx = inflate(named, (4, 8, 8))
    assert image_zyx == (4, 24, 24)
    assert torch.equal(tensors["pos_embed"][:, 1:], named["pos_embed"])
    assert torch.equal(tensors["pos_embed"][:, 0], torch.zeros(1, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": None}, "rotary positions, such as DINOv3"),
        ({"pos_embed": torch.zeros(1, 12, 8)}, "12 positions are no square grid"),
        ({"pos_embed": torch.zeros(10, 8)}, r"expected \(1, positions, D\)"),
        ({KERNEL: torch.zeros(8, 48)}, r"expected \(D, C, Y, X\)"),
        ({KERNEL: torch.zeros(8, 1, 2, 8, 8)}, r"expected \(D, C, Y, X\)"),
        ({KERNEL: torch.zeros(8, 3, 0, 8)}, r"expected \(D, C, Y, X\)"),
        ({KERNEL: torch.zeros(8, 3, 8, 8, dtype=torch.int64)}, "expected a float type"),
    ],
)
def test_what_is_no_2d_network_is_refused_by_key(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    named = {k: t for k, t in (flat_state(10) | change).items() if t is not None}
    with pytest.raises(BackboneError, match=message):
        inflate(named, (4, 8, 8))

import numpy as np
import pytest
import torch

from tapct_fast.downstream.features import Features
from tapct_fast.figures import Shown, fit_colors, paint_ct, paint_labels, scan_figure
from tapct_fast.io.volume import Volume

PATCH_ZYX = (2, 4, 4)


def make_scan(hu_ZYX: np.ndarray, tokens_ZYXC: np.ndarray) -> Shown:
    """A scan off the origin whose token centres lie where patches of PATCH_ZYX put them."""
    affine = np.diag([-2.0, -2.0, 5.0, 1.0])
    affine[:3, 3] = (30, 20, -100)
    pz, py, px = PATCH_ZYX
    to_voxel = np.diag([px, py, pz, 1.0])
    to_voxel[:3, 3] = ((px - 1) / 2, (py - 1) / 2, (pz - 1) / 2)
    patches = torch.from_numpy(tokens_ZYXC.astype(np.float32))
    nothing = torch.zeros(1, patches.shape[-1])
    features = Features(patches, affine @ to_voxel, (10.0, 8.0, 8.0), nothing, nothing[0])
    return Shown(Volume(hu_ZYX.astype(np.int16), (5.0, 2.0, 2.0), affine), features)


@pytest.fixture
def scan() -> Shown:
    """8 x 16 x 24 voxels, 4 x 4 x 6 tokens; the last column of tokens is air."""
    rng = np.random.default_rng(0)
    hu_ZYX = rng.integers(-100, 100, (8, 16, 24))
    hu_ZYX[:, :, 20:] = -1000
    basis = np.linalg.qr(rng.standard_normal((7, 7)))[0]
    scale = np.array([9.0, 4.0, 2.0, 0.1, 0.1, 0.1, 0.1])
    tokens = (rng.standard_normal((4, 4, 6, 7)) * scale) @ basis.T
    tokens[:, :, 5] += 1000  # whatever air looks like, it must not bend the colours
    return make_scan(hu_ZYX, tokens)


def test_colors_are_the_three_largest_components_of_tokens_outside_air(scan: Shown) -> None:
    colors = fit_colors([scan])
    tokens = scan.features.patches_ZYXC[:, :, :5].reshape(-1, 7).double()
    _, _, directions = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    cosine = np.abs((directions[:3].numpy() * colors.axes_C3.T).sum(1))
    assert np.allclose(cosine, 1, atol=1e-4)
    assert np.allclose(colors.mean_C, tokens.mean(0), atol=1e-4)


def test_air_is_black_and_nothing_else_is(scan: Shown) -> None:
    painted = fit_colors([scan]).paint(scan)
    assert painted.shape == (4, 4, 6, 3)
    assert not painted[:, :, 5].any()
    assert painted[:, :, :5].min() == 40
    assert painted.max() == 255


def test_like_tokens_have_like_colors_across_scans(scan: Shown) -> None:
    other = make_scan(scan.volume.hu_ZYX, scan.features.patches_ZYXC.numpy()[::-1].copy())
    colors = fit_colors([scan, other])
    assert np.array_equal(colors.paint(scan), colors.paint(other)[::-1])


def test_each_voxel_shows_the_token_it_belongs_to(scan: Shown) -> None:
    labels = np.zeros(scan.volume.hu_ZYX.shape, np.int16)
    labels[0, 0, 0] = 1
    shown = scan._replace(labels_ZYX=labels, predicted_ZYX=labels)
    colors = fit_colors([scan])
    figure = scan_figure("scan 1", shown, colors, [(0, 0, 0), (255, 0, 0)])
    assert [panel.caption for panel in figure.rows[0]] == [
        "axial, CT",
        "axial, features",
        "axial, labels",
        "axial, probe",
    ]
    tokens = colors.paint(shown).repeat(2, 0).repeat(4, 1).repeat(4, 2)
    for row, cut in zip(figure.rows, (2, 4, None), strict=True):
        # 0.27 and 0.62 of slices 0..7, and 0.52 of rows 0..15 with the head on top.
        expected = tokens[cut] if cut is not None else tokens[::-1, 8]
        assert np.array_equal(row[1].rgb_YXC, expected)
    assert figure.rows[0][0].size_mm == (32.0, 48.0)
    assert figure.rows[2][0].size_mm == (40.0, 48.0)


def test_a_scan_without_labels_has_two_pictures_per_cut(scan: Shown) -> None:
    figure = scan_figure("scan 1", scan, fit_colors([scan]), [(0, 0, 0)])
    assert [len(row) for row in figure.rows] == [4, 2]


def test_a_window_maps_its_ends_to_black_and_white() -> None:
    grey = paint_ct(np.array([[-2000, -160, 40, 240, 3000]], np.int16), center=40, width=400)
    assert grey[0, :, 0].tolist() == [0, 0, 127, 255, 255]
    assert np.array_equal(grey[..., 0], grey[..., 2])


def test_label_zero_leaves_the_picture_clear() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    labels = np.zeros(picture.shape[:2], np.int16)
    labels[0, 0] = 1
    painted = paint_labels(picture, labels, [(0, 0, 0), (100, 200, 0)])
    assert np.array_equal(painted[1:], picture[1:])
    expected = 0.35 * picture[0, 0] + 0.65 * np.array([100, 200, 0])
    assert np.abs(painted[0, 0] - expected).max() <= 1

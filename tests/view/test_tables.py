"""What the page carries, unpacked here by other means."""

import zlib

import numpy as np
import pytest

from tapct_fast.io.volume import Volume
from tapct_fast.view import tables


def make_volume(shape_zyx: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Volume:
    hu_ZYX = np.random.default_rng(0).integers(-1024, 3071, shape_zyx).astype(np.int16)
    z, y, x = spacing_mm
    return Volume(hu_ZYX, spacing_mm, np.diag([-x, -y, z, 1.0]))


def test_packed_hu_come_back_voxel_by_voxel() -> None:
    hu_ZYX = np.random.default_rng(1).integers(-1024, 3072, (3, 5, 7)).astype(np.int16)
    hu_ZYX[0, 0, :4] = (-1024, 3071, -1024, 3071)  # the largest steps
    raw = zlib.decompress(tables.pack_hu(hu_ZYX))
    low, high = raw[:105], raw[105:]
    found = []
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        code = a + 256 * b
        step = code // 2 if code % 2 == 0 else -(code + 1) // 2
        found.append(step + (found[-1] if i % 7 else 0))
    assert found == hu_ZYX.ravel().tolist()


@pytest.mark.parametrize(
    ("shape", "spacing", "most", "factor"),
    [
        ((10, 20, 20), (5.0, 1.0, 1.0), 4000, (1, 1, 1)),
        ((10, 20, 20), (5.0, 1.0, 1.0), 3999, (1, 2, 1)),
        ((10, 20, 20), (5.0, 1.0, 1.0), 1000, (1, 2, 2)),
        ((100, 20, 20), (0.5, 1.0, 1.0), 20000, (2, 1, 1)),
        ((4, 2, 2), (1.0, 1.0, 1.0), 1, (4, 2, 2)),
    ],
)
def test_the_finest_axis_is_thinned_first(shape, spacing, most, factor) -> None:
    assert tables.thin_factor(shape, spacing, most) == factor


def test_thinned_voxels_are_means_of_their_boxes_also_at_the_far_edges() -> None:
    volume = make_volume((7, 10, 9), (1.0, 1.0, 1.0))
    thinned = tables.thin(volume, 40)
    fz, fy, fx = thinned.factor_zyx
    assert max(thinned.factor_zyx) > 1
    for (z, y, x), found in np.ndenumerate(thinned.hu_ZYX):
        box = volume.hu_ZYX[z * fz : (z + 1) * fz, y * fy : (y + 1) * fy, x * fx : (x + 1) * fx]
        assert abs(found - box.mean()) <= 0.51


def test_a_scan_that_fits_keeps_its_voxels_clipped_to_twelve_bits() -> None:
    volume = make_volume((4, 5, 6), (1.0, 1.0, 1.0))
    volume.hu_ZYX[0, 0, :2] = (-3024, 9000)
    thinned = tables.thin(volume, 120)
    assert thinned.factor_zyx == (1, 1, 1)
    assert np.array_equal(thinned.hu_ZYX, volume.hu_ZYX.clip(-1024, 3071))


def test_thinned_labels_are_labels_of_the_middle_voxel() -> None:
    labels_ZYX = np.arange(7 * 6 * 5, dtype=np.int16).reshape(7, 6, 5)
    thinned = tables.thin_labels(labels_ZYX, (3, 2, 1))
    assert thinned.shape == (3, 3, 5)
    assert thinned[0, 0, 0] == labels_ZYX[1, 1, 0]
    assert thinned[2, 2, 4] == labels_ZYX[6, 5, 4]  # a smaller box: the last voxel


@pytest.mark.parametrize("width", [12, 200])
def test_the_stated_error_of_similarity_is_the_largest_found(width: int) -> None:
    rng = np.random.default_rng(2)
    falling = np.exp(-np.arange(width) / 20)
    tokens_ND = (rng.standard_normal((500, width)) * falling + 0.3).astype(np.float32)
    table = tables.similarity_table(tokens_ND, 500 * 64)  # 64 components
    assert table.code_KN.shape == (min(width, 64), 500)
    unit = tokens_ND / np.linalg.norm(tokens_ND, axis=1, keepdims=True)
    shown = (table.code_KN.astype(np.float64) * table.scale_K[:, None]).T
    shown /= np.linalg.norm(shown, axis=1, keepdims=True)
    asked = np.unique(np.linspace(0, 499, 256).astype(int))
    error = np.abs(shown[asked] @ shown.T - unit[asked] @ unit.T)
    assert table.largest_error == pytest.approx(error.max(), rel=1e-3)
    assert table.num_pairs == error.size
    assert table.largest_error < 0.03


def test_many_tokens_get_fewer_components() -> None:
    tokens_ND = np.random.default_rng(3).standard_normal((1000, 96)).astype(np.float32)
    assert len(tables.similarity_table(tokens_ND, 20_000).code_KN) == 20
    assert len(tables.similarity_table(tokens_ND, 10).code_KN) == tables.LEAST_COMPONENTS

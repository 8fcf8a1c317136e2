import time

import numpy as np
import pytest
from numpy.typing import NDArray

from tapct_fast.data.phantom import (
    GRAIN_HU,
    HU_TWINS,
    LABEL,
    LABEL_NAMES,
    MEAN_HU,
    NOISE_HU,
    Phantom,
    make_phantom,
    write_phantoms,
)
from tapct_fast.io.nifti import read_nifti, read_nifti_labels


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(0, index) for index in range(3)]


def hu_of(phantoms: list[Phantom], label: str) -> NDArray[np.float64]:
    return np.concatenate([p.volume.hu_ZYX[p.labels_ZYX == LABEL[label]] for p in phantoms]).astype(
        float
    )


def auc(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Probability that ``first`` exceeds ``second``, ties counted half (Mann-Whitney)."""
    below = np.searchsorted(np.sort(second), first, "left")
    not_above = np.searchsorted(np.sort(second), first, "right")
    return float((below + not_above).mean() / (2 * second.size))


def grain_energy(phantom: Phantom, label: str) -> NDArray[np.float64]:
    """Mean absolute difference of neighbours along x in every 4 x 8 x 8 patch of one label."""

    def patches(array_ZYX: NDArray[np.float64]) -> NDArray[np.float64]:
        z, y, x = (n // p for n, p in zip(array_ZYX.shape, (4, 8, 8), strict=True))
        return (
            array_ZYX.reshape(z, 4, y, 8, x, 8).transpose(0, 2, 4, 1, 3, 5).reshape(z * y * x, -1)
        )

    hu_ZYX = phantom.volume.hu_ZYX.astype(float)
    step_ZYX = np.abs(hu_ZYX - np.roll(hu_ZYX, 1, axis=2))
    is_within = patches((phantom.labels_ZYX == LABEL[label]).astype(float)).min(1) == 1
    return patches(step_ZYX)[is_within].mean(1)


def test_a_phantom_is_a_pure_function_of_seed_and_index(phantoms: list[Phantom]) -> None:
    again = make_phantom(0, 1)
    assert np.array_equal(again.volume.hu_ZYX, phantoms[1].volume.hu_ZYX)
    assert np.array_equal(again.labels_ZYX, phantoms[1].labels_ZYX)
    for other in (phantoms[0], phantoms[2], make_phantom(1, 1)):
        assert not np.array_equal(other.labels_ZYX, again.labels_ZYX)
        assert not np.array_equal(other.volume.hu_ZYX, again.volume.hu_ZYX)


def test_every_label_is_present_at_its_hu(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        assert set(np.unique(phantom.labels_ZYX)) == set(range(len(LABEL_NAMES)))
    for name, mean in zip(LABEL_NAMES, MEAN_HU, strict=True):
        if name == "bone":
            low, high = np.percentile(hu_of(phantoms, name), [10, 90])
            assert 150 < low < high < 900
        else:
            assert abs(np.median(hu_of(phantoms, name)) - mean) < 5


def test_hu_alone_cannot_tell_twins_apart(phantoms: list[Phantom]) -> None:
    for group in HU_TWINS:
        for other in group[1:]:
            separation = auc(hu_of(phantoms, group[0]), hu_of(phantoms, other))
            # 0.02 is far above the sampling error of 1e4 correlated voxels and far below any use.
            assert abs(separation - 0.5) < 0.02, (group[0], other, separation)


def test_liver_and_spleen_share_one_hu_law(phantoms: list[Phantom]) -> None:
    edges = np.arange(-60, 171, 10)
    shares = []
    for name in ("liver", "spleen"):
        hu = hu_of(phantoms, name)
        # Independent sources of variance add; 1/12 is the rounding to whole HU.
        assert hu.std() == pytest.approx(np.sqrt(GRAIN_HU**2 + NOISE_HU**2 + 1 / 12), rel=0.03)
        shares.append(np.histogram(hu, edges)[0] / hu.size)
    assert np.minimum(*shares).sum() > 0.97  # histogram overlap; 1 is the same law


def test_grain_alone_tells_liver_from_spleen(phantoms: list[Phantom]) -> None:
    liver = np.concatenate([grain_energy(p, "liver") for p in phantoms])
    spleen = np.concatenate([grain_energy(p, "spleen") for p in phantoms])
    assert min(liver.size, spleen.size) >= 20
    assert auc(liver, spleen) > 0.98


def world_centre(phantom: Phantom, label: str) -> NDArray[np.float64]:
    """Centre of a label in RAS mm: x to the right is +, y to anterior is +."""
    zyx = np.argwhere(phantom.labels_ZYX == LABEL[label]).mean(0)
    centre: NDArray[np.float64] = phantom.volume.affine @ [*zyx[::-1], 1.0]
    return centre[:3]


def test_organs_lie_where_lps_puts_them(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        affine = phantom.volume.affine
        at_xyz = {name: world_centre(phantom, name) for name in LABEL_NAMES}
        assert at_xyz["left lung"][0] < at_xyz["heart"][0] < at_xyz["right lung"][0]
        assert at_xyz["left kidney"][0] < 0 < at_xyz["right kidney"][0]
        assert at_xyz["spleen"][0] < at_xyz["liver"][0]
        assert at_xyz["heart"][1] > at_xyz["bone"][1]
        assert at_xyz["right kidney"][2] < at_xyz["liver"][2] < at_xyz["right lung"][2]
        assert np.allclose(np.diag(affine), (-2.2, -2.2, 5.0, 1.0))
        middle_xyz = [(n - 1) / 2 for n in reversed(phantom.labels_ZYX.shape)]
        assert np.allclose(affine @ [*middle_xyz, 1.0], (0, 0, 0, 1))


def test_a_coarse_grid_shows_the_same_organs() -> None:
    coarse = make_phantom(0, 0, shape_zyx=(24, 60, 80), spacing_mm=(10.0, 4.4, 4.4))
    assert coarse.volume.hu_ZYX.shape == coarse.labels_ZYX.shape == (24, 60, 80)
    assert set(np.unique(coarse.labels_ZYX)) == set(range(len(LABEL_NAMES)))
    litres = (coarse.labels_ZYX == LABEL["liver"]).sum() * 10 * 4.4 * 4.4 / 1e6
    assert 0.5 < litres < 2.5


def test_a_default_phantom_takes_under_a_second(phantoms: list[Phantom]) -> None:
    assert phantoms  # BLAS is warm
    times = []
    for index in range(3):
        begin = time.process_time()
        make_phantom(2, index)
        times.append(time.process_time() - begin)
    assert min(times) < 0.7


def test_written_phantoms_read_back_voxel_for_voxel(tmp_path) -> None:
    pairs = write_phantoms(tmp_path, 2, seed=3)
    assert len(pairs) == 2
    for index, (scan, labels) in enumerate(pairs):
        phantom = make_phantom(3, index)
        volume = read_nifti(scan)
        assert np.array_equal(volume.hu_ZYX, phantom.volume.hu_ZYX)
        assert np.allclose(volume.affine, phantom.volume.affine, atol=1e-4)  # float32 in the header
        assert np.array_equal(read_nifti_labels(labels).hu_ZYX, phantom.labels_ZYX)

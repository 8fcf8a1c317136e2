"""Shape suffixes: B batch, C channels, Z Y X voxels or tokens."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import tapct_fast
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.backbone.processor import TAPCTProcessor
from tapct_fast.errors import InputError
from tapct_fast.io.convert import save_nifti
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.orient import to_lps
from tapct_fast.io.read import read_volume

NATIVE = Preprocess(resize_yx=None)
LPS = np.diag([-1.5, -2.0, 4.0, 1.0])


def hu(*shape: int) -> np.ndarray:
    values = np.random.default_rng(0).integers(-1000, 800, shape).astype(np.int16)
    values[..., 0] = -1000
    return values


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A scan stored with its axes along R, A, S."""
    affine = np.diag([1.5, 2.0, 4.0, 1.0])
    affine[:3, 3] = [-30, -40, 100]
    write_nifti(tmp_path / "scan.nii.gz", hu(9, 40, 30), affine)
    return tmp_path / "scan.nii.gz"


def test_path_volume_and_array_give_the_same_pixels(scan: Path) -> None:
    processor = TAPCTProcessor(NATIVE)
    from_path = processor(str(scan))
    volume = read_volume(scan)
    expected = NATIVE.apply(volume)
    image = nibabel.load(scan)
    array_zyx = np.asarray(image.dataobj).T
    for out in (
        from_path,
        processor(volume),
        processor(array_zyx, affine=image.affine),
        processor(torch.from_numpy(array_zyx.astype(np.float32)), affine=image.affine),
        processor(volume.hu_ZYX[None, None]),  # as the released processor takes it
        processor(torch.from_numpy(volume.hu_ZYX)[None, None].int(), return_tensors="pt"),
    ):
        assert torch.equal(out["pixel_values"], expected)
        assert dict(out).keys() == {"pixel_values"}
        assert out.pixel_values.dtype == torch.float32
    with pytest.raises(KeyError, match="pixel_values"):
        from_path["pixels"]


def test_scans_of_different_size_are_padded_with_air(scan: Path, tmp_path: Path) -> None:
    write_nifti(tmp_path / "other.nii.gz", hu(14, 24, 50), LPS)
    out = TAPCTProcessor(NATIVE)([scan, tmp_path / "other.nii.gz"])
    assert out.pixel_values.shape == (2, 1, 16, 40, 56)
    alone = TAPCTProcessor(NATIVE)(scan).pixel_values
    assert torch.equal(out.pixel_values[:1, :, :12, :40, :32], alone)
    assert (out.pixel_values[0, 0, 12:] == np.float32(NATIVE.air)).all()
    resized = TAPCTProcessor(Preprocess(resize_yx=(32, 32)))([scan, tmp_path / "other.nii.gz"])
    assert resized.pixel_values.shape == (2, 1, 16, 32, 32)


def test_hu_go_to_patch_embedding_as_they_are(scan: Path) -> None:
    out = TAPCTProcessor(NATIVE)(scan, as_hu=True)
    assert out.pixel_values.dtype == torch.int16
    low, high = NATIVE.hu.clip
    z_scores = (out.pixel_values.float().clamp(low, high) - NATIVE.hu.mean) / NATIVE.hu.std
    torch.testing.assert_close(z_scores, TAPCTProcessor(NATIVE)(scan).pixel_values)
    with pytest.raises(InputError, match="native resolution"):
        TAPCTProcessor()(scan, as_hu=True)


@pytest.mark.parametrize("preprocess", [NATIVE, Preprocess(resize_yx=(32, 32))])
def test_features_find_their_way_back_to_the_scans_own_axes(
    scan: Path, tmp_path: Path, preprocess: Preprocess
) -> None:
    out = TAPCTProcessor(preprocess)(scan)
    z, y, x = (
        size // patch for size, patch in zip(out["pixel_values"].shape[2:], (4, 8, 8), strict=True)
    )
    # Each token knows its place in the patient, in mm: it must still be there afterwards.
    volume = read_volume(scan)
    lps = out.restore(torch.zeros(1, z, y, x), frame="lps")
    kept = lps.array_CZYX.shape[1:]
    index = np.stack(np.meshgrid(*map(np.arange, (z, y, x)), indexing="ij")[::-1], axis=-1)
    place = index @ lps.affine[:3, :3].T + lps.affine[:3, 3]
    restored = out.restore(torch.from_numpy(np.moveaxis(place, -1, 0)))
    own = np.stack(
        np.meshgrid(*map(np.arange, restored.array_CZYX.shape[1:]), indexing="ij")[::-1], axis=-1
    )
    expected = own @ restored.affine[:3, :3].T + restored.affine[:3, 3]
    np.testing.assert_allclose(np.moveaxis(restored.array_CZYX, 0, -1), expected, atol=1e-9)
    # And the centre of all tokens is near that of the scan.
    assert kept[0] == 3
    centre = volume.affine @ [14.5, 19.5, 4, 1]
    assert np.abs(place[:3, : kept[1], : kept[2]].mean((0, 1, 2)) - centre[:3]).max() < 16
    # The file's own axes: R, A, S grow with the index.
    assert (np.diag(restored.affine)[:3] > 0).all()
    assert (np.sign(np.diag(lps.affine)[:3]) == [-1, -1, 1]).all()
    save_nifti(tmp_path / "map.nii", lps.array_CZYX, volume, affine=lps.affine)
    written = nibabel.load(tmp_path / "map.nii")
    np.testing.assert_allclose(written.affine, restored.affine, atol=1e-4)


def test_an_array_in_the_callers_axes_gets_its_maps_in_them() -> None:
    array_zyx = hu(8, 16, 24)
    affine = np.diag([2.0, -2.0, 3.0, 1.0])  # x to the right, y to the back
    out = TAPCTProcessor(NATIVE)(array_zyx, affine=affine)
    expected, _ = to_lps(array_zyx, affine)[:2]
    assert torch.equal(
        out["pixel_values"],
        NATIVE.apply(torch.from_numpy(np.ascontiguousarray(expected))[None, None]),
    )
    restored = out.restore(torch.arange(2 * 2 * 3.0).reshape(1, 2, 2, 3))
    assert np.array_equal(restored.array_CZYX[0, 0, 0], [2, 1, 0])  # x was turned round
    assert np.sign(np.diag(restored.affine)[:3]).tolist() == [1, -1, 1]


def test_what_does_not_look_like_hu_is_told() -> None:
    processor = TAPCTProcessor(NATIVE)
    stored = hu(1, 1, 4, 8, 8).astype(np.int32) + 1024
    with pytest.warns(UserWarning, match="no voxel holds air.*rescale slope"):
        processor(stored)
    with pytest.raises(InputError, match="look already normalised"):
        processor(np.random.default_rng(0).normal(size=(1, 1, 4, 8, 8)))
    with pytest.raises(InputError, match="no affine"):
        processor(hu(4, 8, 8))
    with pytest.raises(InputError, match="no scan"):
        processor([])
    with pytest.raises(InputError, match="only pt"):
        processor(hu(1, 1, 4, 8, 8), return_tensors="np")  # type: ignore[arg-type]
    out = processor(hu(1, 1, 4, 8, 8))
    with pytest.raises(InputError, match="without an affine"):
        out.restore(torch.zeros(1, 1, 1, 1))


def test_maps_that_do_not_fit_are_named(scan: Path) -> None:
    out = TAPCTProcessor(NATIVE)(scan)
    for shape in ((1, 5, 5, 4), (3, 5, 4)):
        with pytest.raises(InputError, match=r"not \(C, Z, Y, X\)"):
            out.restore(torch.zeros(shape))


def test_it_is_saved_and_loaded_by_the_released_names(tmp_path: Path) -> None:
    saved = tapct_fast.TAPCTProcessor(Preprocess(resize_yx=(96, 96), pad_hu=-1000.0))
    saved.save_pretrained(tmp_path / "folder")
    loaded = tapct_fast.TAPCTProcessor.from_pretrained(tmp_path / "folder")
    assert loaded.preprocess == saved.preprocess
    with pytest.raises(InputError):
        tapct_fast.TAPCTProcessor.from_pretrained(tmp_path / "none")

import gzip
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.findings import Inspection
from tapct_fast.io.read import check_is_hu, find_scans, read_labels, read_volume

RNG = np.random.default_rng(0)
CANARY = "CANARY"
HU_ZYX = RNG.integers(-1024, 1500, (4, 5, 6)).astype(np.int16)


def write(path: Path, array_ZYX: np.ndarray = HU_ZYX) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    image = sitk.GetImageFromArray(array_ZYX)
    image.SetSpacing((0.75, 0.875, 2.5))
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize(
    "name", ["a.nii", "a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd", "A.NII.GZ", "A.MHA"]
)
def test_every_format_gives_the_same_volume(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name.lower()).rename(tmp_path / name)
    for given in (path, str(path)):
        volume = read_volume(given)
        np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX)
        np.testing.assert_allclose(volume.affine, np.diag([-0.75, -0.875, 2.5, 1]), atol=1e-6)
        assert volume.spacing_mm == pytest.approx((2.5, 0.875, 0.75))
    np.testing.assert_array_equal(read_labels(path).hu_ZYX, HU_ZYX)


def test_content_decides_where_the_name_is_silent(tmp_path: Path) -> None:
    for suffix in (".nii", ".nii.gz", ".nrrd", ".mha"):
        bare = write(tmp_path / f"a{suffix}").rename(tmp_path / "bare")
        np.testing.assert_array_equal(read_volume(bare).hu_ZYX, HU_ZYX)
    text = tmp_path / f"{CANARY}.csv"
    text.write_text("no scan")
    with pytest.raises(FormatError, match="not NIfTI, NRRD or MetaImage") as caught:
        read_volume(text)
    assert (caught.value.field, caught.value.code) == ("file", "unsupported")
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "ts_ct_3mm_int32",
        "ts_ct_sm_int16",
        "sts003_ct_f32_qform",
        "lidc0314_chest_native_z120-139_int16",
        "crlm1004_abdomen_native_slope1_inter-1024_int16",
    ],
)
def test_real_nifti_agree_with_nibabel_and_simpleitk(real_ct: Path, name: str) -> None:
    path = real_ct / "nifti" / f"{name}.nii.gz"
    volume = read_volume(path)
    canonical = nib.as_closest_canonical(nib.load(path))  # RAS: x and y run the other way
    hu_ZYX = canonical.get_fdata().transpose(2, 1, 0)[:, ::-1, ::-1]
    np.testing.assert_array_equal(volume.hu_ZYX, np.rint(hu_ZYX))
    size_z, size_y, size_x = volume.hu_ZYX.shape
    corner = canonical.affine @ [size_x - 1, size_y - 1, 0, 1]
    np.testing.assert_allclose(volume.affine[:, 3], corner, atol=1e-3)

    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    np.testing.assert_array_equal(volume.hu_ZYX, np.rint(sitk.GetArrayFromImage(image)))
    lps = np.array(image.TransformIndexToPhysicalPoint((size_x - 1, size_y - 1, size_z - 1)))
    ras = volume.affine @ [size_x - 1, size_y - 1, size_z - 1, 1]
    np.testing.assert_allclose(ras[:3], lps * (-1, -1, 1), atol=1e-3)


def test_a_real_oblique_scan_keeps_every_corner_in_place(real_ct: Path) -> None:
    path = real_ct / "nifti" / "ct_pitch_oblique_uint8.nii.gz"
    with pytest.raises(FormatError, match=r"8-bit image.*--no-check-hu"):
        read_volume(path)
    volume = read_volume(path, check_hu=False)
    image = nib.load(path)
    voxels = np.asanyarray(image.dataobj)
    draw = np.random.default_rng(1)
    for z, y, x in draw.integers(0, volume.hu_ZYX.shape, (50, 3)):
        there = np.linalg.inv(image.affine) @ volume.affine @ [x, y, z, 1]
        np.testing.assert_allclose(there[:3], np.rint(there[:3]), atol=1e-3)
        assert volume.hu_ZYX[z, y, x] == voxels[tuple(np.rint(there[:3]).astype(int))]


def test_a_label_map_lies_on_its_scan_and_is_no_scan(real_ct: Path) -> None:
    folder = real_ct / "nifti"
    scan = read_volume(folder / "ts_ct_sm_int16.nii.gz")
    labels = read_labels(folder / "ts_ct_sm_seg42.nii.gz")
    np.testing.assert_allclose(labels.affine, scan.affine, atol=1e-4)
    assert labels.hu_ZYX.shape == scan.hu_ZYX.shape
    assert len(np.unique(labels.hu_ZYX)) == 42
    with pytest.raises(FormatError, match="label map"):
        read_volume(folder / "ts_ct_sm_seg42.nii.gz")
    with pytest.raises(InputError, match="a folder is not a label map"):
        read_labels(folder)


BODY = np.where(np.indices((8, 16, 16)).sum(0) % 3 == 0, -1000, 40).astype(np.int16)


@pytest.mark.parametrize(
    ("hu", "words"),
    [
        (np.full((4, 4, 4), -1000), "every voxel is -1000"),
        (BODY.clip(0, 255), "8-bit"),
        (BODY + 1024, "rescale intercept was never applied"),
        (BODY - 1024, "intercept applied twice"),
        (RNG.normal(size=(8, 8, 8)).round(), "normalised"),
        (np.rint(RNG.uniform(0, 1500, (8, 8, 8))), "not CT"),
        (BODY.byteswap(), "scrambled|not CT"),
    ],
)
def test_values_that_cannot_be_hu_are_refused_with_the_way_out(hu: np.ndarray, words: str) -> None:
    with pytest.raises(FormatError, match=f"({words}).*check_hu=False") as caught:
        check_is_hu(hu.astype(np.int16), Inspection())
    assert caught.value.field == "HU"


def test_plain_padded_and_clipped_scans_pass_as_hu() -> None:
    padded = BODY.copy()
    padded[:, :3] = -3024
    metal = BODY.copy()
    metal[2, 2, 2] = 30710
    for hu in (BODY, padded, metal, BODY.clip(-160, 240)):
        check_is_hu(hu, Inspection())


def test_scans_are_found_in_files_folders_and_series(tmp_path: Path) -> None:
    nifti = write(tmp_path / "b" / "scan.nii.gz")
    detached = write(tmp_path / "b" / "other.mhd")
    nrrd = write(tmp_path / "a" / "deep" / "scan.nrrd")
    series = tmp_path / "c" / "series"
    series.mkdir(parents=True)
    (series / "IM0001").write_bytes(bytes(128) + b"DICM")
    dcm = tmp_path / "c" / "dcm"
    dcm.mkdir()
    (dcm / "1.dcm").write_bytes(b"damaged")
    (tmp_path / "c" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "a" / "notes.txt").write_text("x")
    write(tmp_path / ".cache" / "hidden.nii")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)

    assert find_scans([tmp_path]) == [nrrd, detached, nifti, dcm, series]
    # In the given order, each once, named files as they are.
    odd = tmp_path / "a" / "notes.txt"
    assert find_scans([nifti, odd, tmp_path / "b", series]) == [nifti, odd, detached, series]


def test_inputs_without_scans_are_named_by_position(tmp_path: Path) -> None:
    good = write(tmp_path / "a.nii")
    empty = tmp_path / CANARY
    empty.mkdir()
    for bad, words in [(empty, "input 2 is a folder without scans"), (empty / "x", "input 2 does")]:
        with pytest.raises(InputError, match=words) as caught:
            find_scans([good, bad])
        assert CANARY not in str(caught.value)


def test_what_is_no_volume_names_the_way_out(tmp_path: Path) -> None:
    lone = tmp_path / f"{CANARY}.dcm"
    lone.write_bytes(bytes(128) + b"DICM")
    nifti = write(tmp_path / "a.nii")
    for call, words in [
        (lambda: read_volume(lone), "give the folder that holds its series"),
        (lambda: read_volume(lone.rename(tmp_path / "IM1")), "give the folder"),
        (lambda: read_volume(tmp_path / CANARY), "cannot be opened: No such file"),
        (lambda: read_volume(nifti, series="1"), "series= is for DICOM folders"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert CANARY not in str(caught.value)


def test_a_missing_reader_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.mha")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(InputError, match=r"pip install 'tapct-fast\[itk\]'"):
        read_volume(path)


def test_a_real_series_is_read_through_the_same_door(real_ct: Path, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    shutil.copytree(real_ct / "dicom" / "crlm1004_syntaxes" / "explicit", folder)
    volume = read_volume(folder)
    same = real_ct / "dicom" / "crlm1004_syntaxes" / "rle"
    np.testing.assert_array_equal(volume.hu_ZYX, read_volume(same, series="1").hu_ZYX)


def test_a_damaged_gzip_is_refused_through_the_same_door(tmp_path: Path) -> None:
    path = write(tmp_path / f"{CANARY}.nii")
    packed = tmp_path / f"{CANARY}.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes())[:-40])
    with pytest.raises(FormatError) as caught:
        read_volume(packed)
    assert CANARY not in str(caught.value)

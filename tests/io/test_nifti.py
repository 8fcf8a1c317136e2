"""nibabel is the oracle for geometry and voxels, SimpleITK for whether other tools open our files.

Shape suffixes: C channels, Z Y X voxels.
"""

import gzip
import itertools
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.findings import Inspection
from tapct_fast.io.nifti import read_nifti, read_nifti_labels, write_nifti

Array = npt.NDArray[np.generic]

SHAPE_XYZ = (5, 4, 3)
LPS = np.diag([-0.8, -0.7, 2.5, 1.0])


def hu_xyz(shape: tuple[int, ...] = SHAPE_XYZ) -> npt.NDArray[np.int16]:
    return np.random.default_rng(0).integers(-1000, 1500, shape).astype(np.int16)


def rotation(seed: int) -> npt.NDArray[np.float64]:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q if np.linalg.det(q) > 0 else -q


def save(
    path: Path,
    array_xyz: Array,
    affine: Array,
    *,
    sform_code: int = 1,
    qform_code: int = 1,
    units: str = "mm",
    kind: type = nib.Nifti1Image,
) -> Path:
    image = kind(array_xyz, affine)
    image.header.set_xyzt_units(units)
    image.set_sform(affine, code=sform_code)
    image.set_qform(affine, code=qform_code)
    nib.save(image, path)
    return path


def lps_of(image: nib.Nifti1Image) -> npt.NDArray[np.int16]:
    """The oracle's voxels in [z, y, x], x to Left, y to Posterior, z to Superior."""
    ras_xyz = np.asarray(nib.as_closest_canonical(image).dataobj)
    return np.rint(ras_xyz[::-1, ::-1]).astype(np.int16).transpose(2, 1, 0)


@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 1)])
@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_every_axis_order_and_flip_becomes_lps(
    tmp_path: Path, axes: tuple[int, ...], codes: tuple[int, int]
) -> None:
    for signs in itertools.product((-1, 1), repeat=3):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, axes] * (0.8, 0.7, 2.5) * signs
        affine[:3, 3] = (-120.5, 33.0, 900.25)
        path = save(
            tmp_path / "scan.nii", hu_xyz(), affine, sform_code=codes[0], qform_code=codes[1]
        )
        volume = read_nifti(path)
        np.testing.assert_array_equal(volume.hu_ZYX, lps_of(nib.load(path)))
        # The affine places the same values at the same points as nibabel's does.
        canonical = nib.as_closest_canonical(nib.load(path)).affine
        last_xy = np.array(volume.hu_ZYX.shape[:0:-1]) - 1
        np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], canonical @ [*last_xy, 0, 1])
        np.testing.assert_array_equal(np.sign(np.diag(volume.affine)), (-1, -1, 1, 1))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 1)])
def test_an_oblique_scan_is_placed_as_nibabel_places_it(
    tmp_path: Path, seed: int, codes: tuple[int, int]
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(seed) * (0.8, 0.7, -2.5)  # left-handed: qfac is -1
    affine[:3, 3] = (-120.5, 33.0, 900.25)
    path = save(tmp_path / "scan.nii", hu_xyz(), affine, sform_code=codes[0], qform_code=codes[1])
    volume = read_nifti(path)
    image = nib.load(path)
    array_xyz, volume_xyz = np.asarray(image.dataobj), volume.hu_ZYX.transpose(2, 1, 0)
    to_volume = np.linalg.inv(volume.affine) @ image.affine
    for index in itertools.product(*[(0, n - 1) for n in SHAPE_XYZ]):
        there = (to_volume @ [*index, 1])[:3]
        # 1e-3 voxels: quaternions are float32 and worst near half turns
        np.testing.assert_allclose(there, np.rint(there), atol=1e-3)
        assert volume_xyz[tuple(np.rint(there).astype(int))] == array_xyz[index]
    assert sorted(volume.spacing_mm) == pytest.approx([0.7, 0.8, 2.5], rel=1e-6)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("name", ["uint8", "int16", "int32", "float32", "float64", "uint16"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_type_and_version_reads_as_nibabel_reads_it(
    tmp_path: Path, kind: type, byte_order: str, name: str, suffix: str
) -> None:
    array = np.random.default_rng(1).integers(0, 200, SHAPE_XYZ).astype(name)
    image = kind(array, LPS, header=kind.header_class(endianness=byte_order))
    image.set_data_dtype(name)
    image.header.set_slope_inter(1, 0)
    path = tmp_path / f"scan{suffix}"
    nib.save(image, path)
    np.testing.assert_array_equal(read_nifti(path).hu_ZYX, lps_of(nib.load(path)))


def test_slope_and_intercept_are_applied_and_rounded_once(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii", hu_xyz(), LPS)
    data = bytearray(path.read_bytes())
    struct.pack_into("<2f", data, 112, 0.37, -24.6)
    path.write_bytes(data)
    expected = np.rint(hu_xyz() * np.float64(np.float32(0.37)) + np.float64(np.float32(-24.6)))
    np.testing.assert_array_equal(read_nifti(path).hu_ZYX, expected.transpose(2, 1, 0))


def test_slope_zero_means_no_scaling(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii", hu_xyz(), LPS)
    data = bytearray(path.read_bytes())
    struct.pack_into("<2f", data, 112, 0.0, 5.0)  # ITK would add the 5
    path.write_bytes(data)
    volume = read_nifti(path, Inspection("warn"))
    np.testing.assert_array_equal(volume.hu_ZYX, hu_xyz().transpose(2, 1, 0))
    with pytest.raises(FormatError, match="slope is 0 beside an intercept") as caught:
        read_nifti(path)
    assert (caught.value.field, caught.value.code) == ("scl_slope, scl_inter", "rescale")


@pytest.mark.parametrize(("units", "per_mm"), [("meter", 1e-3), ("mm", 1), ("micron", 1e3)])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 1)])
def test_units_become_millimetres(
    tmp_path: Path, units: str, per_mm: float, codes: tuple[int, int]
) -> None:
    affine = LPS.copy()
    affine[:3, 3] = (100.0, -50.0, 25.0)
    stored = affine.copy()
    stored[:3] *= per_mm
    path = save(
        tmp_path / "scan.nii",
        hu_xyz(),
        stored,
        sform_code=codes[0],
        qform_code=codes[1],
        units=units,
    )
    volume = read_nifti(path)
    np.testing.assert_allclose(volume.affine, affine, rtol=1e-6, atol=1e-5)  # float32 header
    assert volume.spacing_mm == pytest.approx((2.5, 0.7, 0.8), rel=1e-6)


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    plain = save(tmp_path / "scan.nii", hu_xyz(), LPS).read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "zipped.nii").write_bytes(gzip.compress(plain))
    for name in ("plain.nii.gz", "zipped.nii"):
        np.testing.assert_array_equal(
            read_nifti(tmp_path / name).hu_ZYX, hu_xyz().transpose(2, 1, 0)
        )


def test_members_of_a_gzip_file_are_joined(tmp_path: Path) -> None:
    plain = save(tmp_path / "scan.nii", hu_xyz(), LPS).read_bytes()
    parts = [plain[:100], plain[100:360], b"", plain[360:]]
    path = tmp_path / "members.nii.gz"
    path.write_bytes(b"".join(gzip.compress(part) for part in parts))
    np.testing.assert_array_equal(read_nifti(path).hu_ZYX, hu_xyz().transpose(2, 1, 0))


def test_a_fourth_axis_of_one_is_dropped_and_of_two_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "one.nii", hu_xyz((*SHAPE_XYZ, 1)), LPS)
    assert read_nifti(path).hu_ZYX.shape == SHAPE_XYZ[::-1]
    path = save(tmp_path / "two.nii", hu_xyz((*SHAPE_XYZ, 2)), LPS)
    with pytest.raises(FormatError, match=r"dim\[4\].*2 volumes"):
        read_nifti(path)


def test_labels_keep_their_numbers_and_must_be_whole(tmp_path: Path) -> None:
    labels = np.random.default_rng(2).integers(0, 118, SHAPE_XYZ)
    for name in ("uint8", "int64", "float32", "float64"):
        image = nib.Nifti1Image(labels.astype(name), LPS, dtype=name)
        nib.save(image, tmp_path / "labels.nii.gz")
        volume = read_nifti_labels(tmp_path / "labels.nii.gz")
        np.testing.assert_array_equal(volume.hu_ZYX, labels.transpose(2, 1, 0))
    path = save(tmp_path / "soft.nii", (labels / 2).astype(np.float32), LPS)
    with pytest.raises(FormatError, match="labels are not whole") as caught:
        read_nifti_labels(path)
    assert (caught.value.field, caught.value.code) == ("voxels", "dtype")


def test_a_missing_file_is_an_input_error_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file") as caught:
        read_nifti(tmp_path / "DOE^JOHN.nii.gz")
    assert "DOE" not in str(caught.value)
    with pytest.raises(InputError, match="directory"):
        read_nifti(tmp_path)


@pytest.mark.parametrize("name", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_written_volumes_open_everywhere(tmp_path: Path, name: str, suffix: str) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="needs the itk extra")
    array_ZYX = np.random.default_rng(3).integers(0, 200, SHAPE_XYZ[::-1]).astype(name)
    affine = np.eye(4)
    affine[:3, :3] = rotation(5) * (0.8, 0.7, 2.5)
    affine[:3, 3] = (-120.5, 33.0, 900.25)
    path = tmp_path / f"out{suffix}"
    write_nifti(path, array_ZYX, affine)
    image = nib.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), array_ZYX.transpose(2, 1, 0))
    assert image.get_data_dtype() == np.dtype(name)
    np.testing.assert_allclose(image.affine, affine, rtol=1e-6, atol=1e-6)  # float32 header
    itk = sitk.ReadImage(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk), array_ZYX)
    origin_lps = affine[:3, 3] * (-1, -1, 1)
    np.testing.assert_allclose(itk.GetOrigin(), origin_lps, rtol=1e-6)
    np.testing.assert_allclose(itk.GetSpacing(), (0.8, 0.7, 2.5), rtol=1e-5)


def test_a_written_volume_reads_back_equal(tmp_path: Path) -> None:
    array_ZYX = np.ascontiguousarray(hu_xyz().transpose(2, 1, 0))
    write_nifti(tmp_path / "out.nii.gz", array_ZYX, LPS)
    volume = read_nifti(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(volume.hu_ZYX, array_ZYX)
    np.testing.assert_allclose(volume.affine, LPS, rtol=1e-7)
    first = (tmp_path / "out.nii.gz").read_bytes()
    write_nifti(tmp_path / "out.nii.gz", array_ZYX, LPS)
    assert (tmp_path / "out.nii.gz").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["out.nii.gz"]


def test_features_are_written_with_channels_last_in_the_file(tmp_path: Path) -> None:
    features_CZYX = np.random.default_rng(4).normal(size=(6, 2, 3, 4)).astype(np.float32)
    write_nifti(tmp_path / "features.nii.gz", features_CZYX, LPS)
    image = nib.load(tmp_path / "features.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), features_CZYX.transpose(3, 2, 1, 0))
    np.testing.assert_allclose(image.header.get_zooms()[:3], (0.8, 0.7, 2.5), rtol=1e-6)


def test_what_nifti_cannot_hold_is_an_input_error(tmp_path: Path) -> None:
    good = np.zeros((2, 3, 4), np.int16)
    for path, array, message in [
        (tmp_path / "a.img", good, "must end in"),
        (tmp_path / "a.nii", good.astype(np.float16), "not float16"),
        (tmp_path / "a.nii", good[0], "3 or 4 axes"),
        (tmp_path / "a.nii", np.zeros((1, 1, 40000), np.uint8), "32767"),
        (tmp_path / "a.nii", good[:0], "3 or 4 axes"),
    ]:
        with pytest.raises(InputError, match=message):
            write_nifti(path, array, LPS)
    assert list(tmp_path.iterdir()) == []


REAL = [
    "ts_ct_sm_int16",
    "ts_ct_3mm_int32",
    "sts003_ct_f32_qform",
    "crlm1004_abdomen_native_slope1_inter-1024_int16",
    "ct_pitch_oblique_uint8",
]


@pytest.mark.parametrize("name", REAL)
def test_real_scans_read_as_nibabel_reads_them(real_ct: Path, name: str) -> None:
    path = real_ct / "nifti" / f"{name}.nii.gz"
    volume = read_nifti(path)
    image = nib.load(path)
    np.testing.assert_array_equal(volume.hu_ZYX, lps_of(image))
    zooms = nib.as_closest_canonical(image).header.get_zooms()
    assert volume.spacing_mm == pytest.approx(zooms[::-1], rel=1e-6)


def test_real_scans_that_readers_disagree_on_are_refused(real_ct: Path) -> None:
    folder = real_ct / "nifti"
    with pytest.raises(FormatError, match="sform, qform"):
        read_nifti(folder / "philips_phantom_sheared_sform_tilt-18.5_int16.nii.gz")
    with pytest.raises(FormatError, match=r"dim\[4\]"):
        read_nifti(folder / "philips_phantom_4d_2kernels_int16.nii.gz")

"""Real series against two other readers; the broken ones are in hostile/test_dicom_hostile.py."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread

from tapct_fast.io.dicom.read import list_series, read_series

SYNTAXES = ("explicit", "deflate", "rle", "jpegls", "j2k", "jpll")


def read_with_simpleitk(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def read_with_pydicom(folder: Path) -> np.ndarray:
    slices = sorted(
        (dcmread(path) for path in folder.iterdir()),
        key=lambda dataset: dataset.ImagePositionPatient[2],
    )
    return np.stack(
        [d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in slices]
    )


@pytest.mark.parametrize(
    "name",
    ["sts004_implicit_40slices", "ts_j2k_20slices"]
    + [f"crlm1004_syntaxes/{syntax}" for syntax in SYNTAXES],
)
def test_real_axial_series_agree_with_pydicom_and_simpleitk(real_ct: Path, name: str) -> None:
    folder = real_ct / "dicom" / name
    volume = read_series(folder)
    np.testing.assert_array_equal(volume.hu_ZYX, read_with_pydicom(folder))

    image = read_with_simpleitk(folder)
    np.testing.assert_array_equal(volume.hu_ZYX, sitk.GetArrayFromImage(image))
    # SimpleITK's spacing of two decimals is rounded; 1e-3 mm is far below a voxel.
    assert volume.spacing_mm[::-1] == pytest.approx(image.GetSpacing(), abs=1e-3)
    last = [size - 1 for size in image.GetSize()]
    for index_xyz in ([0, 0, 0], last, [3, 1, 1]):
        lps = np.array(image.TransformIndexToPhysicalPoint(index_xyz))
        ras = (volume.affine @ [*index_xyz, 1])[:3]
        np.testing.assert_allclose(ras, lps * (-1, -1, 1), atol=1e-2)


def test_all_syntaxes_of_one_scan_decode_to_the_same_voxels(real_ct: Path) -> None:
    volumes = [read_series(real_ct / "dicom" / "crlm1004_syntaxes" / name) for name in SYNTAXES]
    for volume in volumes[1:]:
        np.testing.assert_array_equal(volume.hu_ZYX, volumes[0].hu_ZYX)
        np.testing.assert_array_equal(volume.affine, volumes[0].affine)


def test_a_real_folder_is_described_without_reading_its_pixels(real_ct: Path) -> None:
    (info,) = list_series(real_ct / "dicom" / "sts004_implicit_40slices")
    assert (info.key, info.modality, info.num_slices) == ("1", "CT", 40)
    assert info.matrix_yx == (183, 173)
    assert info.spacing_mm == pytest.approx((3.27, 0.976562, 0.976562))
    assert str(info) == "1 (CT, 40 slices of 183x173, spacing 3.27 x 0.977 x 0.977 mm)"


@pytest.mark.parametrize("orientation", ["LPS", "ASL", "PIR"])  # axial, coronal, sagittal slices
def test_a_series_written_by_another_library_comes_back(tmp_path: Path, orientation: str) -> None:
    hu_ZYX = np.fromfunction(lambda z, y, x: 90 * z + 9 * y - 4 * x - 1000, (6, 7, 8))
    image = sitk.GetImageFromArray(hu_ZYX.astype(np.int16))
    image.SetSpacing((0.75, 0.5, 2.5))
    image.SetOrigin((-30.0, 20.0, 110.0))
    write_series(sitk.DICOMOrient(image, orientation), tmp_path)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu_ZYX, hu_ZYX)
    expected = np.array([[-0.75, 0, 0, 30], [0, -0.5, 0, -20], [0, 0, 2.5, 110], [0, 0, 0, 1]])
    np.testing.assert_allclose(volume.affine, expected, atol=1e-6)


def test_slices_turned_with_their_normal_keep_their_place(tmp_path: Path) -> None:
    hu_ZYX = np.fromfunction(lambda z, y, x: 90 * z + 9 * y - 4 * x - 1000, (6, 7, 8))
    image = sitk.GetImageFromArray(hu_ZYX.astype(np.int16))
    image.SetSpacing((0.75, 0.5, 2.5))
    cosine, sine = np.cos(np.radians(25.0)), np.sin(np.radians(25.0))
    image.SetDirection((1, 0, 0, 0, cosine, -sine, 0, sine, cosine))
    write_series(image, tmp_path)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.hu_ZYX, hu_ZYX)
    lps = np.array(image.TransformIndexToPhysicalPoint((7, 6, 5)))
    np.testing.assert_allclose((volume.affine @ [7, 6, 5, 1])[:3], lps * (-1, -1, 1), atol=1e-4)


def write_series(image: sitk.Image, folder: Path) -> None:
    """Write one file per slice through GDCM."""
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    cosines = np.reshape(image.GetDirection(), (3, 3))
    for z in range(image.GetDepth()):
        part = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        for tag, value in {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0060": "CT",
            "0008|0008": "DERIVED\\SECONDARY\\AXIAL",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0008|0018": f"1.2.3.4.{z + 1}",
            "0020|0037": "\\".join(f"{v:.9f}" for v in (*cosines[:, 0], *cosines[:, 1])),
            "0020|0032": "\\".join(f"{v:.9f}" for v in position),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }.items():
            part.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z}.dcm"))
        writer.Execute(part)

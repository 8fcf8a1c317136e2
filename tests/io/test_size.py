"""Memory is shared out by headers: the estimate holds for every kind of scan."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.size import reading_bytes

MIB = 2**20
SHAPE_ZYX = (40, 96, 80)
VOXELS = 40 * 96 * 80


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_nifti(tmp_path: Path, name: str) -> None:
    write_nifti(tmp_path / name, np.zeros(SHAPE_ZYX, np.int16), np.eye(4))
    assert reading_bytes(tmp_path / name) == MIB + 4 * VOXELS


def test_nifti_2_and_big_endian(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    data_XYZ = np.zeros(SHAPE_ZYX[::-1], np.int16)
    nibabel.save(nibabel.Nifti2Image(data_XYZ, np.eye(4)), tmp_path / "two.nii.gz")
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nibabel.save(nibabel.Nifti1Image(data_XYZ, np.eye(4), header), tmp_path / "big.nii")
    for name in ("two.nii.gz", "big.nii"):
        assert reading_bytes(tmp_path / name) == MIB + 4 * VOXELS


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.mha"])
def test_itk_formats(tmp_path: Path, name: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(np.zeros(SHAPE_ZYX, np.int16))
    sitk.WriteImage(image, str(tmp_path / name), useCompression=True)
    assert reading_bytes(tmp_path / name) == MIB + 4 * VOXELS


def test_dicom_folder_and_archive(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from dicom_series import COLUMNS, NUM, ROWS, write_series

    folder = tmp_path / "series"
    folder.mkdir()
    write_series(folder)
    files = sorted(folder.iterdir())
    held = sum(path.stat().st_size for path in files)
    assert held > 4 * NUM * ROWS * COLUMNS  # tiny slices: headers are the larger part
    assert reading_bytes(folder) == MIB + held
    with zipfile.ZipFile(tmp_path / "series.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files:
            packed.write(path, path.name)
    assert abs(reading_bytes(tmp_path / "series.zip") - MIB - 2 * held) < 8


def test_what_is_no_scan_counts_as_its_file(tmp_path: Path) -> None:
    for name, content in (("a.nii", b""), ("b.nii.gz", b"\x1f\x8b" + bytes(50)), ("c.nrrd", b"x")):
        (tmp_path / name).write_bytes(content)
        assert reading_bytes(tmp_path / name) == MIB + len(content)

"""A small sound CT series of which the hostile DICOM tests break something.

Its HU are linear in millimetres, so that linear interpolation in a repair is exact too; its text
fields hold the canary, which no message may repeat.

Shape suffixes: Z Y X voxels.
"""

import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tapct_fast.errors import FormatError
from tapct_fast.io.dicom.read import read_series
from tapct_fast.io.findings import Inspection, Report
from tapct_fast.io.volume import Volume

CANARY = "CANARY"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
NUM, ROWS, COLUMNS = 8, 14, 12
SPACING = (2.5, 0.75, 0.5)  # z, y, x mm
ORIGIN = (-40.0, -90.0, -120.0)  # z, y, x mm in LPS
Z_MM = [SPACING[0] * z for z in range(NUM)]
AFFINE = np.array([[-0.5, 0, 0, 120.0], [0, -0.75, 0, 90.0], [0, 0, 2.5, -40.0], [0, 0, 0, 1.0]])

Edit = Callable[[int, Dataset], None]


def linear_hu(x: np.ndarray, y: np.ndarray, z: np.ndarray | float) -> np.ndarray:
    """Return HU linear in LPS millimetres, far from air."""
    return -300.0 + 9.0 * z + 4.0 * y - 6.0 * x


def _slice_hu(z_mm: float, y_mm: float = 0.0) -> np.ndarray:
    y, x = np.mgrid[:ROWS, :COLUMNS]
    x_mm, first_y_mm = ORIGIN[2] + SPACING[2] * x, ORIGIN[1] + y_mm
    return np.rint(linear_hu(x_mm, first_y_mm + SPACING[1] * y, ORIGIN[0] + z_mm))


HU_ZYX = np.stack([_slice_hu(z_mm) for z_mm in Z_MM])


def make_slice(z_mm: float, *, y_mm: float = 0.0, number: int = 1) -> Dataset:
    """Return the slice that lies that far from the first one."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CT_IMAGE
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
    dataset = Dataset()
    dataset.file_meta, dataset.SOPClassUID = meta, CT_IMAGE
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.4", "1.2.5"
    dataset.FrameOfReferenceUID = "1.2.6"
    dataset.PatientName, dataset.PatientID = f"{CANARY}^NAME", f"{CANARY}-ID"
    dataset.SeriesDescription = dataset.StudyDescription = f"{CANARY} TEXT"
    dataset.ConvolutionKernel = f"{CANARY}K"
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber, dataset.SeriesNumber = number, 3
    dataset.Rows, dataset.Columns = ROWS, COLUMNS
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "1", "-1024", "HU"
    dataset.PixelSpacing = list(SPACING[1:])
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [ORIGIN[2], ORIGIN[1] + y_mm, ORIGIN[0] + z_mm]
    dataset.PixelData = (_slice_hu(z_mm, y_mm) + 1024).astype("<i2").tobytes()
    return dataset


def save(dataset: Dataset, path: Path) -> None:
    dataset.save_as(path, enforce_file_format=True)


def write_series(folder: Path, places: list[tuple[float, float]] | None = None) -> list[Path]:
    """Write slices at (z, y) places; name order is not slice order."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, (z_mm, y_mm) in enumerate(places or [(z, 0.0) for z in Z_MM]):
        path = folder / f"{CANARY}_{(number * 5) % 97:03d}.dcm"
        save(make_slice(z_mm, y_mm=y_mm, number=number + 1), path)
        paths.append(path)
    return paths


def change(path: Path, **values: object) -> None:
    """Set fields of a written slice; None removes one."""
    dataset = dcmread(path)
    for name, value in values.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


def repaired(folder: Path) -> tuple[Volume, Report]:
    inspection = Inspection("repair")
    return read_series(folder, inspection=inspection), inspection.report()


def found(report: Report) -> set[tuple[str, str]]:
    return {(finding.severity, finding.code) for finding in report.findings}


def assert_linear(volume: Volume) -> float:
    """Hold every voxel that is not air to the formula at its place; return how many are."""
    z, y, x = np.indices(volume.hu_ZYX.shape)
    ras = np.stack([x, y, z, np.ones_like(x)], axis=-1) @ volume.affine.T
    expected = linear_hu(-ras[..., 0], -ras[..., 1], ras[..., 2])
    is_measured = volume.hu_ZYX != -1024
    # Two roundings to int16: of the slices and of the blend.
    assert np.abs(volume.hu_ZYX - expected)[is_measured].max() <= 1.0
    return float(is_measured.mean())


def assert_refused(folder: Path, field: str, reason: str) -> None:
    with pytest.raises(FormatError, match=reason) as caught:
        read_series(folder)
    assert caught.value.field == field
    assert_keeps_the_secret(caught.value)


def assert_keeps_the_secret(error: BaseException) -> None:
    assert CANARY not in "".join(traceback.format_exception_only(error))
    assert error.__suppress_context__ or error.__context__ is None


def assert_right(folder: Path, hu_ZYX: np.ndarray = HU_ZYX, series: str | None = None) -> None:
    volume = read_series(folder, series=series)
    np.testing.assert_array_equal(volume.hu_ZYX, hu_ZYX)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-9)
    assert volume.spacing_mm == pytest.approx(SPACING)


def assert_upright(volume: Volume) -> None:
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)

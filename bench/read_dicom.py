"""Reading one uncompressed DICOM series of real size into HU against other readers, cache warm.

The series is 275 slices of 512 x 512 (144 MB of pixels), explicit little endian, made of the real
chest of ``bench.chest``. Rivals: dcm2niix (a program that writes a file), pydicom
with sorting and rescaling, SimpleITK. None of them checks what ours checks: that every slice is
there once, in its place, of one scan, and whole; ours is ``read_volume`` with all its checks.
"""

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import dcm2niix
import numpy as np
import SimpleITK
from nibabel.nifti1 import Nifti1Image
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from bench.chest import tiled_chest
from bench.harness import start, time_ms, version
from tapct_fast.io.dicom.read import read_series
from tapct_fast.io.findings import Inspection
from tapct_fast.io.read import check_is_hu, read_volume

Hu = NDArray[np.int16]
SOURCES = [
    *(f"csrc/{name}" for name in ("file.cpp", "dicom.cpp", "dicom_pixels.cpp", "bindings.cpp")),
    *(
        f"tapct_fast/io/dicom/{n}.py"
        for n in ("fields", "file", "read", "series", "slice", "stack")
    ),
    *(f"tapct_fast/io/{name}.py" for name in ("read", "orient")),
]
CT_IMAGE = UID("1.2.840.10008.5.1.4.1.1.2")


def write_series(folder: Path, hu_ZYX: Hu) -> None:
    """Write one file per slice, 1 mm apart, in an order that is not that of the names."""
    for z, hu_YX in enumerate(hu_ZYX):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CT_IMAGE
        meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{z + 1}")
        dataset = Dataset()
        dataset.file_meta, dataset.SOPClassUID = meta, CT_IMAGE
        dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.4", "1.2.5"
        dataset.FrameOfReferenceUID, dataset.PatientID = "1.2.6", "1"
        dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.InstanceNumber, dataset.SeriesNumber, dataset.SliceThickness = z + 1, 3, "1"
        dataset.Rows, dataset.Columns = hu_YX.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.PixelRepresentation = 1
        dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
        dataset.PixelSpacing = [0.78125, 0.78125]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [-200.0, -200.0, float(z)]
        dataset.PixelData = (hu_YX.astype(np.int32) + 1024).astype("<i2").tobytes()
        name = f"{z * 7 % len(hu_ZYX):04d}.dcm"
        dataset.save_as(folder / name, enforce_file_format=True)


def _on_one_thread(folder: Path) -> Hu:
    hu_ZYX = read_series(folder, threads=1).hu_ZYX
    check_is_hu(hu_ZYX, Inspection())
    return hu_ZYX


def _with_pydicom(folder: Path) -> Hu:
    slices = sorted(
        (dcmread(path) for path in folder.iterdir()),
        key=lambda dataset: float(dataset.ImagePositionPatient[2]),
    )
    hu_ZYX = np.empty((len(slices), *slices[0].pixel_array.shape), np.int16)
    for hu_YX, dataset in zip(hu_ZYX, slices, strict=True):
        slope, intercept = int(dataset.RescaleSlope), int(dataset.RescaleIntercept)
        np.add(dataset.pixel_array * np.int16(slope), np.int16(intercept), out=hu_YX)
    return hu_ZYX


def _with_simpleitk(folder: Path) -> Hu:
    reader = SimpleITK.ImageSeriesReader
    names = reader.GetGDCMSeriesFileNames(str(folder))  # type: ignore[no-untyped-call]
    image = SimpleITK.ReadImage(names)
    hu_ZYX: Hu = SimpleITK.GetArrayFromImage(image).astype(np.int16, copy=False)
    return hu_ZYX


def _with_dcm2niix(folder: Path, out: Path) -> None:
    for old in out.iterdir():
        old.unlink()
    subprocess.run(
        [dcm2niix.bin, "-z", "n", "-f", "scan", "-o", str(out), str(folder)],
        check=True,
        capture_output=True,
    )


def _checked_dcm2niix(folder: Path, out: Path) -> Hu:
    _with_dcm2niix(folder, out)
    image = Nifti1Image.from_filename(out / "scan.nii")
    # NIfTI's rows run the other way; slope and intercept stand in the header.
    return np.asarray(image.dataobj).T[:, ::-1].astype(np.int16)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the one series."""
    run = start(__file__, SOURCES, argv)
    volume = tiled_chest(is_tiny=run.is_tiny)
    if volume is None:
        return
    hu_ZYX = volume.hu_ZYX
    case = "x".join(map(str, hu_ZYX.shape))
    if not run.wants(case, "cpu"):
        return
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as out_name:
        folder, out = Path(name), Path(out_name)
        write_series(folder, hu_ZYX)
        readers: dict[str, Callable[[], Hu]] = {
            "tapct_fast": lambda: read_volume(folder).hu_ZYX,
            "tapct_fast, 1 thread": lambda: _on_one_thread(folder),
            "dcm2niix": lambda: _checked_dcm2niix(folder, out),
            "pydicom": lambda: _with_pydicom(folder),
            "SimpleITK": lambda: _with_simpleitk(folder),
        }
        for reader, read in readers.items():
            if not np.array_equal(read(), hu_ZYX):
                raise ValueError(f"{reader} returns other voxels than were written; not timed")
        calls = {**readers, "dcm2niix": lambda: _with_dcm2niix(folder, out)}
        times = time_ms(calls, device="cpu", rounds=3 if run.is_tiny else 9)
        run.write(
            case,
            "cpu",
            times,
            bytes=hu_ZYX.nbytes,
            verified="equal voxels",
            pydicom=version("pydicom"),
            simpleitk=version("simpleitk"),
            dcm2niix=version("dcm2niix"),
        )


if __name__ == "__main__":
    main()

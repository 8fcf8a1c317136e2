"""Write small valid files from which the fuzzers start: ``python tests/fuzz/seeds.py CORPUS``."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack
from tapct_fast.io.store import Store

AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def write_nifti_seeds(nifti: Path, members: Path) -> None:
    """Write every voxel type: plain, in gzip members, and scaled."""
    for name in ("int16", "uint8", "float32", "int32", "float64", "uint16", "int8", "int64"):
        plain, packed = nifti / f"{name}.nii", nifti / f"{name}.nii.gz"
        for path in (plain, packed):
            write_nifti(path, np.arange(24).reshape(2, 3, 4).astype(name), AFFINE)
        (members / f"{name}.gz").write_bytes(packed.read_bytes())
        scaled = bytearray(plain.read_bytes())
        struct.pack_into("<2f", scaled, 112, 2.0, -1024.0)
        (nifti / f"{name}-scaled.nii.gz").write_bytes(gzip.compress(bytes(scaled), mtime=0))


def write_dicom_seeds(folder: Path) -> None:
    """Write one slice in every uncompressed little-endian syntax, with a sequence to skip."""
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = syntax
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = "1.2.3"
        dataset = Dataset()
        dataset.file_meta = meta
        dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
        dataset.Modality, dataset.PatientName = "CT", "SEED"
        item = Dataset()
        item.ReferencedSOPInstanceUID = "1.2.9"
        dataset.ReferencedImageSequence = [item, item]
        dataset.Rows, dataset.Columns = 4, 6
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
        dataset.PixelData = np.arange(24, dtype="<i2").tobytes()
        dataset.save_as(folder / f"{syntax}.dcm", enforce_file_format=True)


def write_store_seeds(folder: Path, scratch: Path) -> None:
    """Pack one tiny scan with each codec."""
    scan = scratch / "scan.nii"
    voxels = np.random.default_rng(0).normal(0, 200, (9, 20, 12)).astype(np.int16)
    write_nifti(scan, voxels, AFFINE)
    for codec in ("lz4hc", "zstd"):
        store = scratch / codec
        pack([scan], store, codec=codec)
        case = store / Store.open(store).cases[0].file
        (folder / f"{codec}.b2nd").write_bytes(case.read_bytes())


def main(corpus: Path) -> None:
    """Fill one folder per fuzzer."""
    folders = {name: corpus / name for name in ("nifti", "gzip", "dicom", "b2nd", "scratch")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    write_nifti_seeds(folders["nifti"], folders["gzip"])
    write_dicom_seeds(folders["dicom"])
    write_store_seeds(folders["b2nd"], folders["scratch"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

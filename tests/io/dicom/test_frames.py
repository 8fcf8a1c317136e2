"""An enhanced CT object gives the slices it holds, or an error that names field and frame."""

import io
import time
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from tapct_fast.errors import FormatError
from tapct_fast.io.dicom.decode import decode_frames
from tapct_fast.io.dicom.frames import MAX_FRAMES, read_multi_frame

CANARY = "CANARY"
NUM, ROWS, COLUMNS = 5, 12, 10
STORED_ZYX = np.random.default_rng(0).integers(-1000, 2000, (NUM, ROWS, COLUMNS), np.int16)


def group(**values: object) -> Sequence:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return Sequence([item])


def enhanced(sop_class: str = "1.2.840.10008.5.1.4.1.1.2.1") -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.4", "1.2.5"
    dataset.FrameOfReferenceUID, dataset.SeriesNumber = "1.2.6", 3
    dataset.PatientName, dataset.PatientID = f"{CANARY}^NAME", f"{CANARY}-ID"
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = NUM, ROWS, COLUMNS
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelRepresentation = 1
    shared = Dataset()
    shared.PixelMeasuresSequence = group(PixelSpacing=[0.75, 0.5])
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.CTImageFrameTypeSequence = group(FrameType=["ORIGINAL", "PRIMARY", "AXIAL", "NONE"])
    shared.CTReconstructionSequence = group(ConvolutionKernel=f"{CANARY}K")
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for z in range(NUM):
        frame = Dataset()
        frame.PlanePositionSequence = group(ImagePositionPatient=[-120.0, -90.0, 2.5 * z])
        frame.PixelValueTransformationSequence = group(
            RescaleSlope="1", RescaleIntercept=str(-1024 + z), RescaleType="HU"
        )
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.PixelData = STORED_ZYX.astype("<i2").tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def packed(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def refuse(dataset: Dataset | bytes, field: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(FormatError, match=words) as caught:
        read_multi_frame(dataset if isinstance(dataset, bytes) else packed(dataset), "file 1 of 1")
    assert caught.value.field == field
    assert CANARY not in str(caught.value)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    "sop_class", ["1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"]
)
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
)
def test_each_frame_has_the_header_and_pixels_of_a_slice(tmp_path: Path, syntax, sop_class) -> None:
    dataset = enhanced(sop_class)
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = STORED_ZYX.astype(">i2").tobytes()
    path = tmp_path / f"{CANARY}.dcm"
    path.write_bytes(packed(dataset))
    for source in (path, path.read_bytes()):
        got = read_multi_frame(source, "file 1 of 1")
        assert not got.is_compressed
        assert got.places[2] == "frame 3 of 5 of file 1 of 1"
        for z, header in enumerate(got.headers):
            np.testing.assert_array_equal(got.stored(z), STORED_ZYX[z])
            assert list(header["ImagePositionPatient"]) == [-120.0, -90.0, 2.5 * z]
            assert list(header["ImageOrientationPatient"]) == [1, 0, 0, 0, 1, 0]
            assert list(header["PixelSpacing"]) == [0.75, 0.5]
            assert (header["RescaleSlope"], header["RescaleIntercept"]) == (1, -1024 + z)
            assert list(header["ImageType"]) == ["ORIGINAL", "PRIMARY", "AXIAL", "NONE"]
            assert (header["Rows"], header["RescaleType"]) == (ROWS, "HU")
            assert header["ConvolutionKernel"] == f"{CANARY}K"
            assert header["TransferSyntaxUID"] == syntax
            assert "NumberOfFrames" not in header


def compressed(syntax: str) -> Dataset:
    dataset = enhanced()
    dataset.compress(syntax, generate_instance_uid=False)
    return dataset


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
@pytest.mark.parametrize("table", ["basic", "none", "extended", "fragments"])
def test_compressed_frames_are_found_and_decoded(syntax: str, table: str) -> None:
    dataset = compressed(syntax)
    frames = list(generate_frames(dataset.PixelData, number_of_frames=NUM))
    if table == "none":
        dataset.PixelData = encapsulate(frames, has_bot=False)
    elif table == "extended":
        dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = (
            encapsulate_extended(frames)
        )
    elif table == "fragments":
        dataset.PixelData = encapsulate(frames, fragments_per_frame=3)
    got = read_multi_frame(packed(dataset), "file 1 of 1")
    assert got.is_compressed
    decoded = list(decode_frames([got.job(z) for z in range(NUM)]))
    np.testing.assert_array_equal(np.stack(decoded), STORED_ZYX)


def test_a_group_of_all_frames_may_be_said_by_each() -> None:
    dataset = enhanced()
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        frame.PixelMeasuresSequence = measures
    assert len(read_multi_frame(packed(dataset), "file 1 of 1").headers) == NUM
    other = group(PixelSpacing=[0.8, 0.5])
    dataset.PerFrameFunctionalGroupsSequence[3].PixelMeasuresSequence = other
    refuse(dataset, "PixelSpacing", "frame 4 of 5.*contradicts")


@pytest.mark.parametrize(
    ("home", "name", "field"),
    [
        ("shared", "PixelMeasuresSequence", "PixelSpacing"),
        ("shared", "PlaneOrientationSequence", "ImageOrientationPatient"),
        ("frame", "PlanePositionSequence", "ImagePositionPatient"),
        ("frame", "PixelValueTransformationSequence", "RescaleSlope"),
    ],
)
def test_a_missing_or_empty_or_double_group_names_field_and_frame(home, name, field) -> None:
    for harm in ("absent", "empty", "double"):
        dataset = enhanced()
        groups = (
            dataset.SharedFunctionalGroupsSequence[0]
            if home == "shared"
            else dataset.PerFrameFunctionalGroupsSequence[2]
        )
        place = "frame 1 of 5" if home == "shared" else "frame 3 of 5"
        if harm == "absent":
            delattr(groups, name)
            refuse(dataset, field, f"missing in {place}")
        elif harm == "empty":
            setattr(groups, name, Sequence([]))
            refuse(dataset, field, f"missing in {place}")
        else:
            items = getattr(groups, name)
            items.append(items[0])
            refuse(dataset, name, "has 2 items")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("NumberOfFrames", 4, "5 items in file 1 of 1 where NumberOfFrames says 4"),
        ("NumberOfFrames", 6, "5 items in file 1 of 1 where NumberOfFrames says 6"),
        ("NumberOfFrames", MAX_FRAMES + 1, "is not in 1"),
        ("NumberOfFrames", 0, "is not in 1"),
        ("NumberOfFrames", None, "missing"),
        ("Rows", 60000, "is not in 1"),
        ("Rows", 6, "240 bytes|1200 bytes where"),
        ("BitsAllocated", 8, "is not in 16..16"),
        ("SamplesPerPixel", 3, "is not in 1..1"),
        ("PixelRepresentation", 2, "is not in 0..1"),
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.4.1", "no enhanced CT"),
        ("PerFrameFunctionalGroupsSequence", None, "has 0 items"),
        ("PixelData", None, "missing"),
    ],
)
def test_a_header_that_lies_is_refused(field: str, value: object, words: str) -> None:
    dataset = enhanced()
    if value is None:
        delattr(dataset, field)
    else:
        setattr(dataset, field, value)
    name = {
        "NumberOfFrames": "PerFrameFunctionalGroupsSequence" if value in (4, 6) else field,
        "Rows": "PixelData" if value == 6 else field,
    }.get(field, field)
    refuse(dataset, name, words)


def test_pixels_cut_short_or_too_many_are_refused() -> None:
    for change in (lambda data: data[:-2], lambda data: data + b"\0\0"):
        dataset = enhanced()
        dataset.PixelData = change(dataset.PixelData)
        refuse(dataset, "PixelData", "bytes where")
    dataset = compressed(JPEGLSLossless)
    frames = list(generate_frames(dataset.PixelData, number_of_frames=NUM))
    dataset.PixelData = encapsulate(frames[:-1])
    refuse(dataset, "PixelData", "4 images where NumberOfFrames says 5|not found")
    dataset.PixelData = encapsulate([*frames, frames[0]])
    refuse(dataset, "PixelData", "more than 5 images|not found")


def test_a_deflated_object_is_refused_before_it_is_inflated_twice() -> None:
    dataset = enhanced()
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    refuse(dataset, "TransferSyntaxUID", "deflated")


def test_groups_nested_beyond_any_depth_are_an_error_and_no_crash() -> None:
    # Sequences of undefined length inside each other, 20,000 deep, written by hand.
    opening = b"\x00\x52\x29\x92SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    head = packed(enhanced())
    start = head.index(b"\x00\x52\x29\x92SQ")
    refuse(head[:start] + opening * 20_000, "file", "cannot be parsed")


def test_every_truncation_is_refused() -> None:
    whole = packed(enhanced())
    for num_bytes in range(0, len(whole) - 1, 61):
        with pytest.raises(FormatError):
            read_multi_frame(whole[:num_bytes], "file 1 of 1")


def test_the_real_supplemental_object_gives_two_frames_or_names_what_is_missing(
    real_ct: Path,
) -> None:
    path = real_ct / "dicom" / "oddities" / "eCT_Supplemental.dcm"
    got = read_multi_frame(path, "file 1 of 1")
    assert len(got.headers) == 2
    for z, header in enumerate(got.headers):
        assert (header["Rows"], header["Columns"]) == (512, 512)
        assert header["ImageType"][2] == "PERFUSION"  # no HU: for check_slice to refuse
        assert got.stored(z).shape == (512, 512)

"""Findings, repairs, archives and privacy of DICOM series, against independent computations."""

import json
import os
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from tapct_fast import _native
from tapct_fast.errors import FormatError, InputError, TapctError
from tapct_fast.io.dicom import list_series, read_series
from tapct_fast.io.findings import Inspection, Report
from tapct_fast.io.read import check_series, read_volume
from tapct_fast.io.volume import Volume

CANARY = "CANARY"
ROWS, COLUMNS = 14, 12
PIXEL_MM = (0.75, 0.5)  # y, x
Z_MM = [2.5 * z for z in range(8)]
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"

# PS3.15 table E.1-1: attributes that identify, by their value representation a name fits in.
IDENTIFYING = (
    *("PatientName", "PatientID", "OtherPatientNames", "PatientBirthName", "PatientAddress"),
    *("PatientMotherBirthName", "IssuerOfPatientID", "PatientComments", "AdditionalPatientHistory"),
    *("EthnicGroup", "Occupation", "MilitaryRank", "BranchOfService", "PatientTelephoneNumbers"),
    *("CountryOfResidence", "RegionOfResidence", "PatientReligiousPreference", "MedicalAlerts"),
    *("Allergies", "ResponsiblePerson", "ResponsibleOrganization", "InsurancePlanIdentification"),
    *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName"),
    *("ReferringPhysicianName", "ReferringPhysicianAddress", "PhysiciansOfRecord"),
    *("ReferringPhysicianTelephoneNumbers", "PerformingPhysicianName", "OperatorsName"),
    *("NameOfPhysiciansReadingStudy", "RequestingPhysician", "RequestingService"),
    *("ScheduledPerformingPhysicianName", "AccessionNumber", "StudyID", "StudyDescription"),
    *(
        "SeriesDescription",
        "ProtocolName",
        "AdmissionID",
        "IssuerOfAdmissionID",
        "CurrentPatientLocation",
    ),
    *("PatientInstitutionResidence", "VisitComments", "AdmittingDiagnosesDescription"),
    *("DeviceSerialNumber", "PerformedProcedureStepID", "PerformedProcedureStepDescription"),
    *("RequestedProcedureID", "RequestedProcedureDescription", "ReasonForTheRequestedProcedure"),
    *("RequestAttributesComments", "ImageComments", "FrameComments", "ContentCreatorName"),
    *("PersonName", "VerifyingObserverName", "DerivationDescription", "AcquisitionComments"),
    *("RequestedProcedureComments", "StudyComments", "InterpretationAuthor", "DetectorID"),
    *("PlateID", "CassetteID", "GantryID", "ScheduledStationName", "PerformedStationName"),
)


def linear_hu(x: float, y: float, z: float) -> float:
    """Return HU linear in LPS millimetres: linear interpolation of it is exact."""
    return -300.0 + 9.0 * z + 4.0 * y - 6.0 * x


def make_slice(z_mm: float, *, y_mm: float = 0.0, number: int = 1) -> Dataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CT_IMAGE
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
    dataset = Dataset()
    dataset.file_meta, dataset.SOPClassUID = meta, CT_IMAGE
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.4", "1.2.5"
    dataset.FrameOfReferenceUID = "1.2.6"
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber, dataset.SeriesNumber = number, 3
    dataset.Rows, dataset.Columns = ROWS, COLUMNS
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "0"
    dataset.PixelSpacing = list(PIXEL_MM)
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-3.0, y_mm, z_mm]
    y, x = np.mgrid[:ROWS, :COLUMNS]
    stored = linear_hu(-3.0 + PIXEL_MM[1] * x, y_mm + PIXEL_MM[0] * y, z_mm)
    dataset.PixelData = np.rint(stored).astype("<i2").tobytes()
    return dataset


def write(folder: Path, places: list[tuple[float, float]] | None = None) -> list[Path]:
    """Write slices at (z, y) places; name order is not slice order."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, (z_mm, y_mm) in enumerate(places or [(z, 0.0) for z in Z_MM]):
        path = folder / f"{(number * 5) % 97:03d}.dcm"
        make_slice(z_mm, y_mm=y_mm, number=number + 1).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def change(path: Path, **values: object) -> None:
    dataset = dcmread(path)
    for name, value in values.items():
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


def assert_upright(volume: Volume) -> None:
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)


def test_a_localizer_among_the_slices_is_dropped_on_request(tmp_path: Path) -> None:
    paths = write(tmp_path / "a")
    scout = make_slice(30.0, number=99)
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.ImageOrientationPatient, scout.Rows = [0, 1, 0, 0, 0, -1], ROWS - 2
    scout.PixelData = scout.PixelData[: -4 * COLUMNS]
    scout.save_as(tmp_path / "a" / "scout.dcm", enforce_file_format=True)
    with pytest.raises(FormatError, match="1 of 9 files are localizers"):
        read_series(tmp_path / "a")
    volume, report = repaired(tmp_path / "a")
    assert ("mend", "foreign_slices") in found(report)
    assert volume.hu_ZYX.shape == (len(paths), ROWS, COLUMNS)
    assert assert_linear(volume) == 1.0


def test_equal_copies_are_dropped_on_request_and_other_ones_never(tmp_path: Path) -> None:
    paths = write(tmp_path / "a")
    copy = tmp_path / "a" / "copy.dcm"
    copy.write_bytes(paths[3].read_bytes())
    with pytest.raises(FormatError, match="1 of 9 slices lie where another one does"):
        read_series(tmp_path / "a")
    volume, report = repaired(tmp_path / "a")
    assert ("mend", "duplicate_slices") in found(report)
    assert volume.hu_ZYX.shape[0] == len(Z_MM)
    assert assert_linear(volume) == 1.0
    change(copy, RescaleIntercept="1")
    with pytest.raises(FormatError, match="1 of 9 slices lie where another one does"):
        repaired(tmp_path / "a")


def test_missing_slices_are_never_made_up(tmp_path: Path) -> None:
    write(tmp_path / "a", [(z, 0.0) for z in Z_MM if z != 7.5])
    with pytest.raises(FormatError, match=r"1 slice.* missing") as caught:
        repaired(tmp_path / "a")
    assert caught.value.code == "missing_slices"


def test_uneven_slices_are_resampled_to_the_right_places(tmp_path: Path) -> None:
    write(tmp_path / "a", [(z, 0.0) for z in (0.0, 1.1, 2.2, 3.3, 6.0, 9.0, 12.0, 15.0)])
    volume, report = repaired(tmp_path / "a")
    assert ("mend", "uneven_spacing") in found(report)
    assert assert_linear(volume) == 1.0
    assert_upright(volume)
    z_mm = volume.affine[2, 3] + volume.affine[2, 2] * np.arange(len(volume.hu_ZYX))
    assert (z_mm[0], z_mm[-1]) == pytest.approx((0.0, 15.0))


@pytest.mark.parametrize("tilt_deg", [12.0, -20.0])
def test_tilted_slices_are_resampled_upright(tmp_path: Path, tilt_deg: float) -> None:
    lean = np.tan(np.radians(tilt_deg))
    write(tmp_path / "a", [(z, lean * z) for z in Z_MM])
    with pytest.raises(FormatError, match=f"leans {abs(tilt_deg):.2f} degrees"):
        read_series(tmp_path / "a")
    volume, report = repaired(tmp_path / "a")
    assert ("mend", "tilt") in found(report)
    assert_upright(volume)
    assert assert_linear(volume) > 0.5
    assert volume.spacing_mm == pytest.approx((2.5, *PIXEL_MM))


def test_doubts_are_kept_on_request(tmp_path: Path) -> None:
    for number, values in enumerate(
        [{"GantryDetectorTilt": "20"}, {"LossyImageCompression": "01"}]
    ):
        folder = tmp_path / str(number)
        for path in write(folder):
            change(path, **values)
        code = ("form_conflict", "lossy")[number]
        with pytest.raises(FormatError) as caught:
            read_series(folder)
        assert (caught.value.field, caught.value.code) == (next(iter(values)), code)
        inspection = Inspection("warn")
        assert assert_linear(read_series(folder, inspection=inspection)) == 1.0
        assert ("doubt", code) in found(inspection.report())


def test_notes_and_facts_tell_the_rest(tmp_path: Path) -> None:
    for path in write(tmp_path / "a"):
        dataset = dcmread(path)
        dataset.SliceThickness = "5"
        dataset.add_new("PixelPaddingValue", "SS", -2000)
        dataset.save_as(path)
    report = read_volume(tmp_path / "a", check_hu=False).report
    assert report is not None
    assert found(report) == {("note", "padding"), ("note", "spacing")}
    assert report.facts["transfer_syntax"] == ["explicit little endian"]
    assert report.facts["shape_zyx"] == [8, ROWS, COLUMNS]
    assert report.facts["spacing_mm"] == [2.5, *PIXEL_MM]
    assert (report.facts["axes"], report.facts["tilt_deg"]) == ("LPS", 0.0)


def test_a_report_names_all_that_is_wrong_with_the_slices(tmp_path: Path) -> None:
    paths = write(tmp_path / "a")
    change(paths[1], RescaleSlope="0")
    change(paths[2], HighBit=3)
    change(paths[3], PatientID="other")
    fields = {finding.field for finding in check_series(tmp_path / "a").findings}
    assert fields == {"RescaleSlope", "HighBit", "PatientID"}


def test_an_archive_reads_as_its_folder_does(tmp_path: Path) -> None:
    paths = write(tmp_path / "a")
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("scan/notes.txt", "by a radiographer\n")
        for number, path in enumerate(paths):
            if number % 2:
                dataset = dcmread(path)
                dataset.compress(RLELossless, encoding_plugin="pydicom")
                dataset.save_as(path)
            file.write(path, f"scan/{path.name}")
    assert [info.num_slices for info in list_series(archive)] == [8]
    from_archive, from_folder = read_volume(archive, check_hu=False), read_series(tmp_path / "a")
    np.testing.assert_array_equal(from_archive.hu_ZYX, from_folder.hu_ZYX)
    np.testing.assert_array_equal(from_archive.affine, from_folder.affine)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("../outside.dcm", b"")
    with pytest.raises(FormatError, match="outside the archive"):
        read_volume(archive)
    assert not (tmp_path.parent / "outside.dcm").exists()


def make_multi_frame(z_mm: list[float]) -> Dataset:
    """Return an enhanced CT whose frames stand in another order than their places."""
    frames = [make_slice(z) for z in z_mm]
    enhanced = make_slice(0.0)
    enhanced.SOPClassUID = enhanced.file_meta.MediaStorageSOPClassUID = f"{CT_IMAGE}.1"
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        del enhanced[name]
    del enhanced.RescaleSlope, enhanced.RescaleIntercept
    enhanced.NumberOfFrames = len(frames)
    shared, measures, orientation, rescale = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(PIXEL_MM), "2.5"
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = "1", "0", "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    shared.PixelValueTransformationSequence = [rescale]
    enhanced.SharedFunctionalGroupsSequence = [shared]
    items = []
    for frame in frames:
        item, position = Dataset(), Dataset()
        position.ImagePositionPatient = frame.ImagePositionPatient
        item.PlanePositionSequence = [position]
        items.append(item)
    enhanced.PerFrameFunctionalGroupsSequence = items
    enhanced.PixelData = b"".join(frame.PixelData for frame in frames)
    return enhanced


@pytest.mark.parametrize("is_compressed", [False, True])
def test_an_enhanced_object_is_a_volume(tmp_path: Path, is_compressed: bool) -> None:
    (tmp_path / "a").mkdir()
    enhanced = make_multi_frame([Z_MM[i] for i in (3, 0, 2, 1, 7, 6, 5, 4)])
    if is_compressed:
        enhanced.compress(RLELossless, encoding_plugin="pydicom")
    enhanced.save_as(tmp_path / "a" / "e.dcm", enforce_file_format=True)
    assert [info.num_slices for info in list_series(tmp_path / "a")] == [8]
    volume = read_series(tmp_path / "a")
    assert volume.hu_ZYX.shape == (8, ROWS, COLUMNS)
    assert assert_linear(volume) == 1.0


def _deep(num: int, is_endless: bool) -> bytes:
    """Return a private sequence that nests that deep, of undefined or of stated lengths."""
    if is_endless:
        opening = (
            struct.pack("<HH2sHI", 9, 0x1001, b"SQ", 0, 2**32 - 1) + b"\xfe\xff\0\xe0" + b"\xff" * 4
        )
        closing = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
        return opening * num + closing * num
    inner = b""
    for _ in range(num):
        inner = b"\xfe\xff\0\xe0" + struct.pack("<I", len(inner)) + inner
        inner = struct.pack("<HH2sHI", 9, 0x1001, b"SQ", 0, len(inner)) + inner
    return inner


@pytest.mark.parametrize(("is_endless", "depth"), [(True, 10_000), (False, 10_000), (True, 20)])
def test_deep_sequences_neither_recurse_nor_hide_the_slice(
    tmp_path: Path, is_endless: bool, depth: int
) -> None:
    paths = write(tmp_path / "a")
    raw = paths[2].read_bytes()
    at = raw.index(b"\x20\x00\x0d\x00UI")
    paths[2].write_bytes(raw[:at] + _deep(depth, is_endless) + raw[at:])
    began = time.perf_counter()
    if is_endless and depth > 100:
        with pytest.raises(FormatError, match="deeper than any CT"):
            read_series(tmp_path / "a")
    else:
        assert assert_linear(read_series(tmp_path / "a")) == 1.0
    assert time.perf_counter() - began < 1.0


@pytest.mark.parametrize("length", [2**32 - 2, 2**31, 70_000, 4000])
@pytest.mark.parametrize(
    "tag", [b"\x20\x00\x32\x00DS", b"\x28\x00\x10\x00US", b"\x20\x00\x0d\x00UI"]
)
def test_a_length_that_lies_is_refused(tmp_path: Path, length: int, tag: bytes) -> None:
    paths = write(tmp_path / "a")
    raw = paths[2].read_bytes()
    at = raw.index(tag)
    # As UN the field has a length of 32 bits.
    lie = raw[: at + 4] + b"UN\0\0" + struct.pack("<I", length) + raw[at + 8 :]
    paths[2].write_bytes(lie)
    with pytest.raises(FormatError):
        read_series(tmp_path / "a")


@pytest.mark.parametrize("lie", [2**32 - 2, 2**31, 10_000])
def test_a_fragment_that_lies_is_refused(tmp_path: Path, lie: int) -> None:
    paths = write(tmp_path / "a")
    for path in paths:
        dataset = dcmread(path)
        dataset.compress(RLELossless, encoding_plugin="pydicom")
        dataset.save_as(path)
    raw = bytearray(paths[4].read_bytes())
    first = raw.index(b"\xfe\xff\x00\xe0", raw.index(b"\xe0\x7f\x10\x00OB"))
    second = raw.index(b"\xfe\xff\x00\xe0", first + 8)
    raw[second + 4 : second + 8] = struct.pack("<I", lie)
    paths[4].write_bytes(raw)
    with pytest.raises(FormatError, match=r"does not end|damaged") as caught:
        read_series(tmp_path / "a")
    assert caught.value.field == "PixelData"


def test_many_tiny_files_take_bounded_time(tmp_path: Path) -> None:
    write(tmp_path / "a")
    for number in range(3000):
        (tmp_path / "a" / f"{number}.txt").write_bytes(b"x")
    began = time.perf_counter()
    assert assert_linear(read_series(tmp_path / "a")) == 1.0
    assert time.perf_counter() - began < 3.0  # 1 ms each on a loaded machine


def test_a_uid_never_becomes_a_path(tmp_path: Path) -> None:
    for path in write(tmp_path / "a"):
        raw = path.read_bytes()
        uid = b"\x20\x00\x0e\x00UI\x06\x001.2.5\0"
        assert uid in raw
        path.write_bytes(raw.replace(uid, b"\x20\x00\x0e\x00UI\x0c\x00../../../etc"))
    before = sorted(tmp_path.rglob("*"))
    assert assert_linear(read_series(tmp_path / "a")) == 1.0
    assert sorted(tmp_path.rglob("*")) == before


def _with_canaries(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = []
    for number, z_mm in enumerate(Z_MM):
        dataset = make_slice(z_mm, number=number)
        for keyword in IDENTIFYING:
            setattr(dataset, keyword, f"{CANARY}-{keyword}"[:16])
        block = dataset.private_block(0x0011, f"{CANARY} PRIVATE", create=True)
        block.add_new(1, "LO", f"{CANARY} IN PRIVATE")
        path = folder / f"{CANARY}_{number}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


BREAKS: tuple[Callable[[list[Path]], object], ...] = (
    lambda paths: paths[3].unlink(),
    lambda paths: paths[3].write_bytes(paths[2].read_bytes()),
    lambda paths: paths[3].write_bytes(b""),
    lambda paths: paths[3].write_bytes(paths[3].read_bytes()[:700]),
    lambda paths: paths[3].write_bytes(paths[3].read_bytes()[:-9]),
    lambda paths: paths[3].write_bytes(CANARY.encode() * 99),
    lambda paths: [path.write_bytes(path.read_bytes()[:3000]) for path in paths],
    *(
        lambda paths, values=values: change(paths[3], **values)
        for values in (
            {"PatientID": f"{CANARY}2"},
            {"ImageType": [CANARY, CANARY]},
            {"Modality": CANARY},
            {"RescaleType": CANARY},
            {"PhotometricInterpretation": CANARY},
            {"ConvolutionKernel": CANARY},
            {"FrameOfReferenceUID": "1.2.77"},
            {"SeriesInstanceUID": "1.2.77"},
            {"Rows": 7},
            {"RescaleSlope": "0"},
            {"PixelSpacing": [0.1, 0.1]},
            {"ImageType": ["ORIGINAL", CANARY, "LOCALIZER"]},
            {"LossyImageCompression": "01"},
        )
    ),
)


@pytest.mark.parametrize("number", range(len(BREAKS)))
def test_no_error_report_or_log_tells_a_name(
    tmp_path: Path,
    number: int,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert len(set(IDENTIFYING)) >= 60
    paths = _with_canaries(tmp_path / CANARY)
    BREAKS[number](paths)
    recwarn.clear()
    caplog.clear()
    caplog.set_level(0)
    told = []
    for policy in ("error", "warn", "repair"):
        try:
            report = read_volume(tmp_path / CANARY, check_hu=False, policy=policy).report
            told.append(json.dumps(report and report.to_json()))
        except TapctError as error:
            told.append(f"{error} {error.__context__ if not error.__suppress_context__ else ''}")
    told.append(json.dumps(check_series(tmp_path / CANARY).to_json()))
    told += [*capfd.readouterr(), caplog.text, *(str(item.message) for item in recwarn)]
    assert CANARY not in "".join(told)
    assert os.fspath(tmp_path) not in "".join(told)


def test_plain_series_need_no_pydicom_and_compressed_ones_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "plain")
    for path in write(tmp_path / "packed"):
        dataset = dcmread(path)
        dataset.compress(RLELossless, encoding_plugin="pydicom")
        dataset.save_as(path)
    for name in [name for name in sys.modules if name.split(".")[0] == "pydicom"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert assert_linear(read_series(tmp_path / "plain")) == 1.0
    with pytest.raises(InputError, match=r"pip install 'tapct-fast\[dicom\]'"):
        read_series(tmp_path / "packed")


def test_stored_values_become_hu_as_numpy_says() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        bits, is_signed = int(draw.integers(8, 17)), bool(draw.integers(2))
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if is_signed else (0, 2**bits)
        stored = draw.integers(low, high, (1, 9, 7))
        order = draw.choice(["<", ">"])
        slope = float(draw.choice([1.0, 2.0, -1.0, 0.5, 0.3333, 1e-3, 0.1]))
        intercept = float(draw.choice([0.0, -1024.0, 0.5, -1000.25, 40.0]))
        content = stored.astype(f"{order}{'i' if is_signed else 'u'}2").tobytes()
        out_ZYX = np.empty((1, 9, 7), np.int16)
        job = _Job(memoryview(content), order == ">", is_signed, bits, slope, intercept)
        expected = np.rint(stored * slope + intercept)
        if expected.min() < -32768 or expected.max() > 32767:
            with pytest.raises(FormatError, match="int16"):
                _native.read_slices(out_ZYX, [job], 1)
        else:
            _native.read_slices(out_ZYX, [job], 1)
            np.testing.assert_array_equal(out_ZYX, expected)


class _Job:
    place, index, pixel_offset, deflated_at, padding = "file 1 of 1", 0, 0, None, None

    def __init__(
        self,
        source: memoryview,
        is_big_endian: bool,
        is_signed: bool,
        bits_stored: int,
        slope: float,
        intercept: float,
    ) -> None:
        self.source, self.pixel_bytes = source, len(source)
        self.is_big_endian, self.is_signed, self.bits_stored = is_big_endian, is_signed, bits_stored
        self.slope, self.intercept = slope, intercept


def test_the_real_tilted_uneven_series_is_repaired(real_ct: Path) -> None:
    folder = real_ct / "dicom" / "ge_tilt18.5_uneven_jpegls"
    volume, report = repaired(folder)
    assert {("mend", "tilt"), ("mend", "uneven_spacing")} <= found(report)
    assert_upright(volume)
    slices = sorted(
        (dcmread(path) for path in folder.iterdir()), key=lambda d: float(d.ImagePositionPatient[2])
    )
    row, column = np.reshape(np.array(slices[0].ImageOrientationPatient, float), (2, 3))
    normal = np.cross(row, column)
    origin_N3 = np.array([d.ImagePositionPatient for d in slices], float)
    along_N = origin_N3 @ normal
    hu = [
        np.maximum(d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept), -1024)
        for d in slices
    ]
    spacing_y, spacing_x = map(float, slices[0].PixelSpacing)

    def sample(n: int, point: np.ndarray) -> float | None:
        y = (point - origin_N3[n]) @ column / spacing_y
        x = (point - origin_N3[n]) @ row / spacing_x
        if not (0 <= y < 510 and 0 <= x < 510):
            return None
        j, i, v, u = int(y), int(x), y % 1, x % 1
        return float(np.array([1 - v, v]) @ hu[n][j : j + 2, i : i + 2] @ np.array([1 - u, u]))

    num_compared = 0
    for index_zyx in np.random.default_rng(0).integers(0, volume.hu_ZYX.shape, (400, 3)):
        point = (volume.affine @ [*index_zyx[::-1], 1])[:3] * (-1, -1, 1)
        below = int(np.clip(np.searchsorted(along_N, point @ normal) - 1, 0, len(hu) - 2))
        weight = (point @ normal - along_N[below]) / (along_N[below + 1] - along_N[below])
        pair = sample(below, point), sample(below + 1, point)
        if None not in pair and 0 <= weight <= 1:
            expected = (1 - weight) * pair[0] + weight * pair[1]
            # Blends below a thousandth of a pixel or step count as none: 4000 HU x 4e-3.
            assert abs(volume.hu_ZYX[tuple(index_zyx)] - expected) <= 5.0
            num_compared += 1
    assert num_compared > 200

"""Findings, repairs and archives of DICOM series, against independent computations."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dicom_series import (
    COLUMNS,
    CT_IMAGE,
    ORIGIN,
    ROWS,
    SPACING,
    Z_MM,
    assert_linear,
    assert_upright,
    change,
    found,
    make_slice,
    repaired,
    write_series,
)
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from tapct_fast import _native
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom.read import list_series, read_series
from tapct_fast.io.findings import Inspection
from tapct_fast.io.read import check_series, read_volume


def test_a_localizer_among_the_slices_is_dropped_on_request(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "a")
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
    paths = write_series(tmp_path / "a")
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
    write_series(tmp_path / "a", [(z, 0.0) for z in Z_MM if z != 7.5])
    with pytest.raises(FormatError, match=r"1 slice.* missing") as caught:
        repaired(tmp_path / "a")
    assert caught.value.code == "missing_slices"


def test_uneven_slices_are_resampled_to_the_right_places(tmp_path: Path) -> None:
    write_series(tmp_path / "a", [(z, 0.0) for z in (0.0, 1.1, 2.2, 3.3, 6.0, 9.0, 12.0, 15.0)])
    volume, report = repaired(tmp_path / "a")
    assert ("mend", "uneven_spacing") in found(report)
    assert assert_linear(volume) == 1.0
    assert_upright(volume)
    z_mm = volume.affine[2, 3] + volume.affine[2, 2] * np.arange(len(volume.hu_ZYX))
    assert (z_mm[0], z_mm[-1]) == pytest.approx((ORIGIN[0], ORIGIN[0] + 15.0))


@pytest.mark.parametrize("tilt_deg", [12.0, -20.0])
def test_tilted_slices_are_resampled_upright(tmp_path: Path, tilt_deg: float) -> None:
    lean = np.tan(np.radians(tilt_deg))
    write_series(tmp_path / "a", [(z, lean * z) for z in Z_MM])
    with pytest.raises(FormatError, match=f"leans {abs(tilt_deg):.2f} degrees"):
        read_series(tmp_path / "a")
    volume, report = repaired(tmp_path / "a")
    assert ("mend", "tilt") in found(report)
    assert_upright(volume)
    assert assert_linear(volume) > 0.5
    assert volume.spacing_mm == pytest.approx((2.5, *SPACING[1:]))


def test_doubts_are_kept_on_request(tmp_path: Path) -> None:
    for number, values in enumerate(
        [{"GantryDetectorTilt": "20"}, {"LossyImageCompression": "01"}]
    ):
        folder = tmp_path / str(number)
        for path in write_series(folder):
            change(path, **values)
        code = ("form_conflict", "lossy")[number]
        with pytest.raises(FormatError) as caught:
            read_series(folder)
        assert (caught.value.field, caught.value.code) == (next(iter(values)), code)
        inspection = Inspection("warn")
        assert assert_linear(read_series(folder, inspection=inspection)) == 1.0
        assert ("doubt", code) in found(inspection.report())


def test_notes_and_facts_tell_the_rest(tmp_path: Path) -> None:
    for path in write_series(tmp_path / "a"):
        dataset = dcmread(path)
        dataset.SliceThickness = "5"
        dataset.add_new("PixelPaddingValue", "SS", -2000)
        dataset.save_as(path)
    report = read_volume(tmp_path / "a", check_hu=False).report
    assert report is not None
    assert found(report) == {("note", "padding"), ("note", "spacing")}
    assert report.facts["transfer_syntax"] == ["explicit little endian"]
    assert report.facts["shape_zyx"] == [8, ROWS, COLUMNS]
    assert report.facts["spacing_mm"] == [2.5, *SPACING[1:]]
    assert (report.facts["stored_axes"], report.facts["tilt_deg"]) == ("LPS", 0.0)


def test_a_report_names_all_that_is_wrong_with_the_slices(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "a")
    change(paths[1], RescaleSlope="0")
    change(paths[2], HighBit=3)
    change(paths[3], PatientID="other")
    fields = {finding.field for finding in check_series(tmp_path / "a").findings}
    assert fields == {"RescaleSlope", "HighBit", "PatientID"}


def test_an_archive_reads_as_its_folder_does(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "a")
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
    measures.PixelSpacing, measures.SliceThickness = list(SPACING[1:]), "2.5"
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = "1", "-1024", "HU"
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


def test_plain_series_need_no_pydicom_and_compressed_ones_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path / "plain")
    for path in write_series(tmp_path / "packed"):
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

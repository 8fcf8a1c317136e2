"""Broken DICOM folders give the right volume or an error that names the field, and never a name.

The classes are those on which public readers return a wrong volume without a word.
"""

import random
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, RLELossless

from tapct_fast.errors import FormatError, InputError, TapctError
from tapct_fast.io.dicom import list_series, read_series

CANARY = "CANARY"
NUM, ROWS, COLUMNS = 8, 12, 10
SPACING = (2.5, 0.75, 0.5)  # z, y, x mm
HU_ZYX = np.fromfunction(lambda z, y, x: 100 * z + 7 * y - 3 * x - 500, (NUM, ROWS, COLUMNS))
AFFINE = np.array([[-0.5, 0, 0, 120.0], [0, -0.75, 0, 90.0], [0, 0, 2.5, -40.0], [0, 0, 0, 1.0]])

Edit = Callable[[int, Dataset], None]


def make_slice(z: int) -> Dataset:
    """Return slice z of a plain CT whose every text field holds the canary."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{z + 1}"
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.4", "1.2.5"
    dataset.FrameOfReferenceUID = "1.2.6"
    dataset.PatientName, dataset.PatientID = f"{CANARY}^NAME", f"{CANARY}-ID"
    dataset.SeriesDescription = dataset.StudyDescription = f"{CANARY} TEXT"
    dataset.ConvolutionKernel = f"{CANARY}K"
    dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber, dataset.SeriesNumber = z + 1, 3
    dataset.Rows, dataset.Columns = ROWS, COLUMNS
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "1", "-1024", "HU"
    dataset.PixelSpacing = [SPACING[1], SPACING[2]]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-120.0, -90.0, -40.0 + SPACING[0] * z]
    dataset.PixelData = (HU_ZYX[z] + 1024).astype("<i2").tobytes()
    return dataset


def unchanged(_z: int, _dataset: Dataset) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / f"{CANARY}_FOLDER"
    folder.mkdir()
    return folder


def write(folder: Path, edit: Edit = unchanged, *, skip: tuple[int, ...] = ()) -> None:
    for z in range(NUM):
        if z not in skip:
            dataset = make_slice(z)
            edit(z, dataset)
            # File order is not slice order.
            save(dataset, folder / f"{CANARY}_{(z * 3) % NUM}.dcm")


def save(dataset: Dataset, path: Path) -> None:
    dataset.save_as(path, enforce_file_format=True)


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


def test_a_plain_series_gives_its_hu_and_place_whatever_the_file_names(folder: Path) -> None:
    write(folder)
    assert_right(folder)


# Broken in one slice or in all: (field of the error, words of the reason, edit).
def _set(z: int | None, **values: object) -> Edit:
    def edit(index: int, dataset: Dataset) -> None:
        if z is None or index == z:
            for name, value in values.items():
                if value is None:
                    delattr(dataset, name)
                else:
                    setattr(dataset, name, value)

    return edit


def _tilt(z: int, dataset: Dataset) -> None:
    dataset.ImagePositionPatient = [-120.0, -90.0 + z * 0.8, -40.0 + SPACING[0] * z]


def _uneven(z: int, dataset: Dataset) -> None:
    dataset.ImagePositionPatient = [-120.0, -90.0, -40.0 + SPACING[0] * z + 0.3 * (z % 3)]


def _slow_drift(z: int, dataset: Dataset) -> None:
    # Every gap within 2 % of the mean, but slices in the middle 0.16 spacings off the grid.
    dataset.ImagePositionPatient = [-120.0, -90.0, -40.0 + 2.5 * z + 0.01 * z * (NUM - 1 - z) * 3]


def _wobble(z: int, dataset: Dataset) -> None:
    dataset.ImagePositionPatient = [-120.0 + (z == 4), -90.0, -40.0 + SPACING[0] * z]


def _other_matrix(z: int, dataset: Dataset) -> None:
    if z == 2:
        dataset.Rows, dataset.PixelData = ROWS - 2, dataset.PixelData[: -4 * COLUMNS]


def _cut_pixels(z: int, dataset: Dataset) -> None:
    if z == 6:
        dataset.PixelData = dataset.PixelData[:-40]


def _extra_pixels(z: int, dataset: Dataset) -> None:
    if z == 6:
        dataset.PixelData = dataset.PixelData + bytes(40)


@pytest.mark.parametrize(
    ("field", "reason", "edit"),
    [
        ("ImagePositionPatient", "2.5|uneven", _uneven),
        ("ImagePositionPatient", "uneven", _slow_drift),
        ("ImagePositionPatient", "gantry tilt", _tilt),
        ("ImagePositionPatient", "sideways", _wobble),
        ("ImagePositionPatient", "missing in file", _set(5, ImagePositionPatient=None)),
        ("ImagePositionPatient", "missing in file", _set(None, ImagePositionPatient=None)),
        ("ImagePositionPatient", "8 of 8|7 of 8", _set(None, ImagePositionPatient=[0, 0, 0])),
        ("PixelSpacing", "missing", _set(None, PixelSpacing=None)),
        ("PixelSpacing", "not positive", _set(None, PixelSpacing=[0, 0])),
        ("PixelSpacing", "not positive", _set(None, PixelSpacing=[-0.7, 0.7])),
        ("PixelSpacing", "differs", _set(3, PixelSpacing=[0.8, 0.5])),
        ("PixelSpacing", "2 number", _set(None, PixelSpacing=[0.7])),
        ("Rows", f"{ROWS - 2}", _other_matrix),
        ("Rows", "60000", _set(None, Rows=60000)),
        ("Rows", "60000", _set(4, Rows=60000)),
        ("PixelData", "bytes where", _set(None, Rows=6000)),
        ("PixelData", "bytes where", _cut_pixels),
        ("PixelData", "bytes where", _extra_pixels),
        ("PixelData", "missing", _set(7, PixelData=None)),
        (
            "ImageOrientationPatient",
            "unit length",
            _set(None, ImageOrientationPatient=[0, 0, 0, 0, 0, 0]),
        ),
        (
            "ImageOrientationPatient",
            "unit length",
            _set(None, ImageOrientationPatient=[2, 0, 0, 0, 2, 0]),
        ),
        (
            "ImageOrientationPatient",
            "right angles",
            _set(None, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
        ),
        (
            "ImageOrientationPatient",
            "differs",
            _set(1, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
        ),
        ("ImageOrientationPatient", "missing", _set(1, ImageOrientationPatient=None)),
        ("ImageType", "localizer", _set(0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
        ("ImageType", "localizer", _set(None, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
        ("GantryDetectorTilt", "20 degrees", _set(None, GantryDetectorTilt="20")),
        ("RescaleSlope", "is 0", _set(None, RescaleSlope="0")),
        ("RescaleSlope", "missing", _set(2, RescaleSlope=None)),
        ("RescaleIntercept", "missing", _set(2, RescaleIntercept=None)),
        ("RescaleSlope, RescaleIntercept", "int16", _set(None, RescaleSlope="40")),
        ("RescaleSlope, RescaleIntercept", "infinite", _set(3, RescaleSlope="1e308")),
        ("RescaleType", "no HU", _set(None, RescaleType=f"{CANARY}U")),
        ("ModalityLUTSequence", "table", _set(None, ModalityLUTSequence=[Dataset()])),
        ("Modality", "not CT", _set(None, Modality="MR")),
        ("Modality", "not CT", _set(None, Modality=CANARY)),
        ("Modality", "cut short", _set(4, Modality=None)),
        ("SeriesInstanceUID", "cut short", _set(4, SeriesInstanceUID=None)),
        ("SOPClassUID", "screen", _set(None, SOPClassUID="1.2.840.10008.5.1.4.1.1.7")),
        ("NumberOfFrames", "missing", _set(None, SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")),
        ("NumberOfFrames", "multi-frame", _set(1, NumberOfFrames="2")),
        ("SamplesPerPixel", "3", _set(None, SamplesPerPixel=3)),
        ("BitsAllocated", "8", _set(None, BitsAllocated=8)),
        ("BitsStored", "beyond 8 bits", _set(None, PixelRepresentation=0, BitsStored=8, HighBit=7)),
        ("BitsStored", "99", _set(None, BitsStored=99)),
        ("HighBit", "11", _set(None, HighBit=11)),
        ("PixelRepresentation", "7", _set(None, PixelRepresentation=7)),
        (
            "PhotometricInterpretation",
            "MONOCHROME2",
            _set(None, PhotometricInterpretation="MONOCHROME1"),
        ),
        ("PatientID", "mixes", _set(2, PatientID=f"{CANARY}-2")),
        ("FrameOfReferenceUID", "mixes", _set(2, FrameOfReferenceUID="1.2.7")),
    ],
)
def test_a_broken_header_is_refused_by_field(
    folder: Path, field: str, reason: str, edit: Edit
) -> None:
    write(folder, edit)
    assert_refused(folder, field, reason)


@pytest.mark.parametrize(("skip", "words"), [((3,), "1 slice"), ((2, 3, 6), "3 slice")])
def test_missing_slices_are_counted(folder: Path, skip: tuple[int, ...], words: str) -> None:
    write(folder, skip=skip)
    assert_refused(folder, "ImagePositionPatient", f"^.*{words}.*missing: a gap of")


def test_a_slice_copied_twice_is_refused(folder: Path) -> None:
    write(folder)
    (folder / "copy.dcm").write_bytes(next(folder.iterdir()).read_bytes())
    assert_refused(folder, "ImagePositionPatient", "1 of 9 slices lie where another one does")


def test_one_slice_is_not_a_volume(folder: Path) -> None:
    write(folder, skip=tuple(range(1, NUM)))
    assert_refused(folder, "ImagePositionPatient", "one slice")


def test_two_series_are_listed_without_their_text_and_either_can_be_named(folder: Path) -> None:
    write(folder)
    for z in range(NUM - 2):
        dataset = make_slice(z)
        dataset.SeriesInstanceUID = "1.2.55"
        dataset.RescaleIntercept = "-1000"
        save(dataset, folder / f"second_{z}.dcm")
    assert_refused(folder, "SeriesInstanceUID", r"1 \(CT, 8 slices of 12x10, .*2 \(CT, 6 slices")
    first, second = list_series(folder)
    assert (first.key, first.num_slices, first.matrix_yx) == ("1", NUM, (ROWS, COLUMNS))
    assert first.spacing_mm == pytest.approx(SPACING)
    assert (second.key, second.num_slices) == ("2", NUM - 2)
    assert_right(folder, series="1")
    assert_right(folder, series="1.2.5")
    assert_right(folder, HU_ZYX[: NUM - 2] + 24, series="2")
    with pytest.raises(InputError, match="no such series; the folder holds 1 "):
        read_series(folder, series="3")


def test_series_of_other_modalities_and_scouts_are_passed_over(folder: Path) -> None:
    write(folder)
    for number, (modality, kind) in enumerate([("SR", "OTHER"), ("CT", "LOCALIZER")]):
        dataset = make_slice(0)
        dataset.SeriesInstanceUID, dataset.Modality = f"1.2.9.{number}", modality
        dataset.ImageType = ["ORIGINAL", "PRIMARY", kind]
        save(dataset, folder / f"other_{number}.dcm")
    assert_right(folder)


def test_a_folder_of_other_modalities_says_which_without_quoting_the_file(folder: Path) -> None:
    for number, modality in enumerate(["MR", CANARY]):
        dataset = make_slice(0)
        dataset.SeriesInstanceUID, dataset.Modality = f"1.2.9.{number}", modality
        save(dataset, folder / f"{number}.dcm")
    assert_refused(folder, "Modality", r"no CT images, only 1 \(MR, .*2 \(other, ")


def test_shuffled_instance_numbers_change_nothing(folder: Path) -> None:
    write(folder, lambda z, dataset: setattr(dataset, "InstanceNumber", (z * 5) % NUM))
    assert_right(folder)


def test_each_slice_has_its_own_rescale(folder: Path) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        intercept = -1024 + 10 * z
        dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", str(intercept)
        dataset.PixelData = ((HU_ZYX[z] - intercept) * 2).astype("<i2").tobytes()

    write(folder, edit)
    assert_right(folder)


@pytest.mark.parametrize(
    ("representation", "padding", "hu"),
    # Padding that leaves int16 is the lowest value: never metal, and never a reason to refuse.
    [(1, -2000, -3024), (1, -32768, -32768), (0, 63536, -32768), (0, 0, -1024)],
)
def test_padding_is_kept(folder: Path, representation: int, padding: int, hu: int) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        stored = HU_ZYX[z] + 1024
        stored[0, 0] = padding
        dataset.PixelRepresentation = representation
        dataset.PixelPaddingValue = padding
        dataset.PixelData = stored.astype("<i2" if representation else "<u2").tobytes()

    write(folder, edit)
    expected = HU_ZYX.copy()
    expected[:, 0, 0] = hu
    assert_right(folder, expected)


def test_stored_values_in_big_endian_and_rle_agree_with_little_endian(folder: Path) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        if z % 2:
            dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
            dataset.PixelData = (HU_ZYX[z] + 1024).astype(">i2").tobytes()
            dataset["PixelData"].VR = "OW"
        else:
            dataset.compress(RLELossless, encoding_plugin="pydicom")

    write(folder, edit)
    assert_right(folder)


def test_bystanders_are_passed_over_and_an_empty_file_is_not(folder: Path) -> None:
    write(folder)
    (folder / f"{CANARY}.txt").write_text("notes of a radiographer\n")
    (folder / "README").write_text("Umlaute \xe4 too\n", encoding="utf-8")
    (folder / "thumbnail.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (folder / ".DS_Store").write_bytes(bytes(100))
    (folder / "sub").mkdir()
    assert_right(folder)
    (folder / f"{CANARY}_empty").touch()
    assert_refused(folder, "file", "is empty")


@pytest.mark.parametrize("name", ["IM0009", "a.dcm", "1.2.840.113619.2"])
def test_a_slice_whose_start_is_destroyed_is_not_passed_over(folder: Path, name: str) -> None:
    write(folder)
    (folder / name).write_bytes(bytes(range(256)) * 8)
    assert_refused(folder, "file", "no DICM mark")


def test_an_error_page_saved_as_a_slice_is_not_passed_over(folder: Path) -> None:
    write(folder)
    (folder / "000.dcm").write_text("<html>404 Not Found</html>")
    assert_refused(folder, "file", "no DICM mark")


def test_a_folder_without_dicom_names_the_way_out(folder: Path) -> None:
    with pytest.raises(InputError, match="the folder in which the slices of a series lie"):
        read_series(folder)
    with pytest.raises(InputError, match="No such file") as caught:
        read_series(folder / CANARY)
    assert_keeps_the_secret(caught.value)


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    write(folder)
    path = sorted(folder.iterdir())[2]
    whole = path.read_bytes()
    for size in [*range(1, len(whole), 23), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(TapctError) as caught:
            read_series(folder)
        assert_keeps_the_secret(caught.value)


def test_no_flipped_header_byte_crashes_or_leaks(folder: Path) -> None:
    write(folder)
    draw = random.Random(0)
    path = sorted(folder.iterdir())[2]
    whole = path.read_bytes()
    num_refused = 0
    for _ in range(80):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(132, len(whole) - 2 * ROWS * COLUMNS)
            damaged[place] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            assert read_series(folder).hu_ZYX.shape == HU_ZYX.shape
        except TapctError as error:
            num_refused += 1
            assert_keeps_the_secret(error)
    assert num_refused > 25


@pytest.mark.parametrize(
    "keyword",
    [
        "Rows",
        "PixelSpacing",
        "ImagePositionPatient",
        "RescaleSlope",
        "BitsStored",
        "NumberOfFrames",
    ],
)
@pytest.mark.parametrize("vr", ["LO", "PN", "IS", "DS", "UI"])
def test_a_name_in_a_number_field_is_not_repeated(
    folder: Path,
    keyword: str,
    vr: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    write(folder)
    path = sorted(folder.iterdir())[0]
    dataset = dcmread(path)
    if keyword in dataset:
        del dataset[keyword]
    tag = Dataset()
    setattr(tag, keyword, [1, 1, 1] if keyword == "ImagePositionPatient" else None)
    tag = next(iter(tag)).tag
    dataset.add_new(tag, "LO", CANARY)
    dataset.save_as(path)
    raw = path.read_bytes()
    where = raw.index(b"LO" + len(CANARY).to_bytes(2, "little") + CANARY.encode())
    path.write_bytes(raw[:where] + vr.encode() + raw[where + 2 :])
    caplog.set_level(0)
    recwarn.clear()
    assert_refused(folder, keyword, "number")
    outputs = [*capfd.readouterr(), caplog.text, *(str(item.message) for item in recwarn)]
    assert CANARY not in "".join(outputs)


def test_pydicoms_own_warnings_and_logs_stay_inside(
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    write(folder)
    path = sorted(folder.iterdir())[0]
    raw = path.read_bytes()
    uid = b"UI\x06\x001.2.6\0"
    assert uid in raw
    for other in folder.iterdir():
        other.write_bytes(other.read_bytes().replace(uid, b"UI\x06\x00CANARY"))
    with pytest.warns(UserWarning, match=CANARY):  # pydicom alone does leak it
        str(dcmread(path).FrameOfReferenceUID)
    caplog.set_level(0)
    caplog.clear()
    recwarn.clear()
    assert_right(folder)
    outputs = [*capfd.readouterr(), caplog.text, *(str(item.message) for item in recwarn)]
    assert CANARY not in "".join(outputs)


def test_an_unknown_transfer_syntax_is_refused(folder: Path) -> None:
    write(folder)
    for path in folder.iterdir():
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.77"))
    assert_refused(folder, "TransferSyntaxUID", "unknown")


def test_a_deflate_bomb_is_refused_before_it_fills_memory(folder: Path) -> None:
    write(folder)
    path = sorted(folder.iterdir())[0]
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.save_as(path)
    raw = path.read_bytes()
    body = 144 + int.from_bytes(raw[140:144], "little")
    plain = zlib.decompress(raw[body:], -15)
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    bomb = packer.compress(plain)
    for _ in range(5):
        bomb += packer.compress(bytes(2**26))  # 320 MiB
    path.write_bytes(raw[:body] + bomb + packer.flush())
    assert_refused(folder, "file", "inflates to more")
    path.write_bytes(raw[:-20])
    assert_refused(folder, "file", "cut short|cannot be parsed")
    path.write_bytes(raw)
    assert_right(folder)


@pytest.mark.parametrize("syntax", ["jpegls", "j2k", "jpll", "rle", "deflate", "explicit"])
def test_a_compressed_slice_cut_short_is_refused(real_ct: Path, folder: Path, syntax: str) -> None:
    for path in (real_ct / "dicom" / "crlm1004_syntaxes" / syntax).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    last = sorted(folder.iterdir())[-1]
    whole = last.read_bytes()
    for part in (0.99, 0.6):
        last.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(FormatError):
            read_series(folder)
    if syntax in ("deflate", "explicit"):
        return
    # Cut inside the image while every DICOM length stays right.
    last.write_bytes(whole)
    dataset = dcmread(last)
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame[: len(frame) // 2]])
    dataset.save_as(last)
    assert_refused(folder, "PixelData", "cut short|damaged")


@pytest.mark.parametrize("syntax", ["jpegls", "j2k", "jpll", "rle"])
def test_a_stream_that_contradicts_rows_is_refused(
    real_ct: Path, folder: Path, syntax: str
) -> None:
    for path in (real_ct / "dicom" / "crlm1004_syntaxes" / syntax).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.iterdir():
        dataset = dcmread(path)
        dataset.Rows = 256
        dataset.save_as(path)
    assert_refused(folder, "PixelData", "another size|damaged")


def test_a_gantry_tilt_in_a_real_series_is_named_with_its_angle(real_ct: Path) -> None:
    assert_refused(
        real_ct / "dicom" / "ge_tilt18.5_uneven_jpegls",
        "ImagePositionPatient",
        "18.50 degrees.*gantry tilt.*uneven slice spacing, 1.081 to 6.999 mm",
    )


def test_real_oddities_are_read_or_refused_for_their_reason(real_ct: Path) -> None:
    folder = real_ct / "dicom" / "oddities"
    with pytest.raises(FormatError, match="3 CT series"):
        read_series(folder)
    outcomes = []
    for info in list_series(folder):
        try:
            volume = read_series(folder, series=info.key)
        except FormatError as error:
            outcomes.append(f"{error.field} {error.code}")
            continue
        enhanced = dcmread(folder / "eCT_Supplemental.dcm")
        (group,) = enhanced.SharedFunctionalGroupsSequence
        (rescale,) = group.PixelValueTransformationSequence
        expected = enhanced.pixel_array * float(rescale.RescaleSlope)
        expected += float(rescale.RescaleIntercept)
        assert sorted(map(int, volume.hu_ZYX.sum(axis=(1, 2), dtype=int))) == sorted(
            map(int, expected.sum(axis=(1, 2)))
        )
        outcomes.append("read")
    # One slice each is no volume; the third object holds two frames.
    assert sorted(outcomes) == [*["ImagePositionPatient missing_slices"] * 2, "read"]

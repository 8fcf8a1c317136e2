"""Broken DICOM folders give the right volume or an error that names the field, and never a name.

The classes are those on which public readers return a wrong volume without a word.
"""

import random
from pathlib import Path

import pytest
from dicom_series import (
    CANARY,
    COLUMNS,
    HU_ZYX,
    NUM,
    ROWS,
    SPACING,
    Z_MM,
    Edit,
    assert_keeps_the_secret,
    assert_refused,
    assert_right,
    make_slice,
    save,
)
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, RLELossless

from tapct_fast.errors import InputError, TapctError
from tapct_fast.io.dicom.read import list_series, read_series


def unchanged(_z: int, _dataset: Dataset) -> None:
    pass


def write(folder: Path, edit: Edit = unchanged, *, skip: tuple[int, ...] = ()) -> None:
    for z in range(NUM):
        if z not in skip:
            dataset = make_slice(Z_MM[z], number=z + 1)
            edit(z, dataset)
            # File order is not slice order.
            save(dataset, folder / f"{CANARY}_{(z * 3) % NUM}.dcm")


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
        dataset = make_slice(Z_MM[z], number=z + 1)
        dataset.SeriesInstanceUID = "1.2.55"
        dataset.RescaleIntercept = "-1000"
        save(dataset, folder / f"second_{z}.dcm")
    assert_refused(folder, "SeriesInstanceUID", r"1 \(CT, 8 slices of 14x12, .*2 \(CT, 6 slices")
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
        dataset = make_slice(0.0)
        dataset.SeriesInstanceUID, dataset.Modality = f"1.2.9.{number}", modality
        dataset.ImageType = ["ORIGINAL", "PRIMARY", kind]
        save(dataset, folder / f"other_{number}.dcm")
    assert_right(folder)


def test_a_folder_of_other_modalities_says_which_without_quoting_the_file(folder: Path) -> None:
    for number, modality in enumerate(["MR", CANARY]):
        dataset = make_slice(0.0)
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


@pytest.mark.cases(50)
def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    write(folder)
    path = sorted(folder.iterdir())[2]
    whole = path.read_bytes()
    for size in [*range(1, len(whole), 23), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(TapctError) as caught:
            read_series(folder)
        assert_keeps_the_secret(caught.value)


@pytest.mark.cases(80)
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

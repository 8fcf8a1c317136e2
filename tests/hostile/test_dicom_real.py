"""Real series: whole as other readers read them, damaged refused."""

from pathlib import Path

import numpy as np
import pytest
from dicom_series import assert_refused, assert_upright, found, repaired
from pydicom import dcmread
from pydicom.encaps import encapsulate, generate_frames

from tapct_fast.errors import FormatError
from tapct_fast.io.dicom.read import list_series, read_series


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

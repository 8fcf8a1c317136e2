"""One folder of every class on which public DICOM readers return a wrong volume, by policy.

A case names the field, reason code and severity of what is found; the severity says which policies
go on, and then every voxel lies in its place: the HU of ``dicom_series`` are linear in millimetres.
"""

import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pytest
from dicom_series import (
    AFFINE,
    CANARY,
    COLUMNS,
    HU_ZYX,
    NUM,
    ROWS,
    SPACING,
    Z_MM,
    assert_keeps_the_secret,
    assert_linear,
    assert_upright,
    change,
    make_slice,
    save,
    write_series,
)
from pydicom import dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from tapct_fast.errors import FormatError, Policy
from tapct_fast.io.findings import CODES, code_of
from tapct_fast.io.read import check_series, read_volume

Paths = list[Path]
GOES_ON = {"ok": ("error", "warn", "repair"), "doubt": ("warn", "repair"), "mend": ("repair",)}


class Case(NamedTuple):
    name: str
    severity: str  # ok, doubt, mend or refuse
    field: str
    code: str
    spoil: Callable[[Paths], object]  # a sound series, in the order of its places


def _all(**values: object) -> Callable[[Paths], object]:
    return lambda paths: [change(path, **values) for path in paths]


def _one(number: int, **values: object) -> Callable[[Paths], object]:
    return lambda paths: change(paths[number], **values)


def _without(*numbers: int) -> Callable[[Paths], object]:
    return lambda paths: [paths[number].unlink() for number in numbers]


def _added(**values: object) -> Callable[[Paths], object]:
    """Add a slice that is none of the volume."""

    def spoil(paths: Paths) -> None:
        dataset = make_slice(Z_MM[3] + 1.0, number=99)
        for name, value in values.items():
            setattr(dataset, name, value)
        save(dataset, paths[0].parent / "added.dcm")

    return spoil


def _moved(place: Callable[[int], tuple[float, float]]) -> Callable[[Paths], object]:
    """Write the series again with slice n at place(n), in (z, y) mm from the first."""
    return lambda paths: write_series(paths[0].parent, [place(n) for n in range(NUM)])


def _copied(**values: object) -> Callable[[Paths], object]:
    def spoil(paths: Paths) -> None:
        copy = paths[0].parent / "copy.dcm"
        copy.write_bytes(paths[3].read_bytes())
        if values:
            change(copy, **values)

    return spoil


def _rows_cut(paths: Paths) -> None:
    pixels = dcmread(paths[2]).PixelData
    change(paths[2], Rows=ROWS - 2, PixelData=pixels[: -4 * COLUMNS])


def _pixels_cut(paths: Paths) -> None:
    change(paths[6], PixelData=dcmread(paths[6]).PixelData[:-40])


def _file_cut(part: float) -> Callable[[Paths], object]:
    def spoil(paths: Paths) -> None:
        whole = paths[5].read_bytes()
        paths[5].write_bytes(whole[: int(part * len(whole))])

    return spoil


def _rescaled(paths: Paths) -> None:
    for n, path in enumerate(paths):
        pixels = ((HU_ZYX[n] + 1000 + 8 * n) * 2).astype("<i2").tobytes()
        change(path, RescaleSlope="0.5", RescaleIntercept=str(-1000 - 8 * n), PixelData=pixels)


def _second_series(paths: Paths) -> None:
    for n, z_mm in enumerate(Z_MM):
        dataset = make_slice(z_mm + 1.25, number=50 + n)
        dataset.SeriesInstanceUID = "1.2.55"
        save(dataset, paths[0].parent / f"second_{n}.dcm")


def _other_syntax(uid: str) -> Callable[[Paths], object]:
    def spoil(paths: Paths) -> None:
        for path in paths:
            dataset = dcmread(path)
            dataset.file_meta.TransferSyntaxUID = uid
            dataset.save_as(path, enforce_file_format=True)

    return spoil


def _bomb(paths: Paths) -> None:
    """Deflate one slice with 160 MiB of zeros behind it."""
    dataset = dcmread(paths[2])
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(paths[2], enforce_file_format=True)
    raw = paths[2].read_bytes()
    body = 144 + int.from_bytes(raw[140:144], "little")
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    bomb = packer.compress(zlib.decompress(raw[body:], -15))
    bomb += b"".join(packer.compress(bytes(1 << 20)) for _ in range(160))
    paths[2].write_bytes(raw[:body] + bomb + packer.flush())


def _beside(name: str, content: bytes) -> Callable[[Paths], object]:
    return lambda paths: (paths[0].parent / name).write_bytes(content)


def _shuffled(paths: Paths) -> None:
    for n, path in enumerate(paths):
        change(path, InstanceNumber=n * 5 % NUM)


POSITION, ORIENTATION = "ImagePositionPatient", "ImageOrientationPatient"
SCOUT = {
    "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"],
    ORIENTATION: [0, 1, 0, 0, 0, -1],
    POSITION: [0, -300, 50],
}
CASES = [
    Case("sound", "ok", "", "", lambda _: None),
    Case("one missing slice", "refuse", POSITION, "missing_slices", _without(3)),
    Case("three missing slices", "refuse", POSITION, "missing_slices", _without(1, 3, 5)),
    Case("missing slices in a row", "refuse", POSITION, "missing_slices", _without(2, 3, 4)),
    Case("all but one slice missing", "refuse", POSITION, "missing_slices", _without(*range(7))),
    Case("duplicate position, equal pixels", "mend", POSITION, "duplicate_slices", _copied()),
    Case(
        "duplicate position, other pixels",
        "refuse",
        POSITION,
        "duplicate_slices",
        _copied(RescaleIntercept="-1000"),
    ),
    Case("two series in a folder", "refuse", "SeriesInstanceUID", "foreign_slices", _second_series),
    Case(
        "slice of another patient", "refuse", "PatientID", "foreign_slices", _one(2, PatientID="x")
    ),
    Case(
        "slice of another frame of reference",
        "refuse",
        "FrameOfReferenceUID",
        "foreign_slices",
        _one(2, FrameOfReferenceUID="1.2.77"),
    ),
    Case("localizer inside the series", "mend", "ImageType", "foreign_slices", _added(**SCOUT)),
    Case(
        "only localizers",
        "refuse",
        "ImageType",
        "unsupported",
        _all(ImageType=SCOUT["ImageType"]),
    ),
    Case("InstanceNumber shuffled", "ok", "", "", _shuffled),
    Case("InstanceNumber missing", "ok", "", "", _all(InstanceNumber=None)),
    Case("one slice without position", "refuse", POSITION, "header", _one(5, **{POSITION: None})),
    Case("no positions at all", "refuse", POSITION, "header", _all(**{POSITION: None})),
    Case(
        "positions all equal", "refuse", POSITION, "duplicate_slices", _all(**{POSITION: [0, 0, 0]})
    ),
    Case("PixelSpacing missing", "refuse", "PixelSpacing", "header", _all(PixelSpacing=None)),
    Case("PixelSpacing zero", "refuse", "PixelSpacing", "spacing", _all(PixelSpacing=[0, 0])),
    Case(
        "PixelSpacing negative", "refuse", "PixelSpacing", "spacing", _all(PixelSpacing=[-0.7, 0.5])
    ),
    Case(
        "mixed PixelSpacing",
        "refuse",
        "PixelSpacing",
        "foreign_slices",
        _one(3, PixelSpacing=[0.8, 0.5]),
    ),
    Case("mixed matrix", "refuse", "Rows", "foreign_slices", _rows_cut),
    Case("mixed rescale", "ok", "", "", _rescaled),
    Case("pixel data cut", "refuse", "PixelData", "integrity", _pixels_cut),
    Case("pixel data missing", "refuse", "PixelData", "integrity", _one(7, PixelData=None)),
    Case("file cut in its pixels", "refuse", "PixelData", "integrity", _file_cut(0.8)),
    Case("file cut in its header", "refuse", "file", "integrity", _file_cut(0.2)),
    Case("Rows = 60000 in all headers", "refuse", "Rows", "dims", _all(Rows=60000)),
    Case("Rows = 60000 in one header", "refuse", "Rows", "dims", _one(4, Rows=60000)),
    Case("Rows = 6000", "refuse", "PixelData", "integrity", _all(Rows=6000)),
    Case(
        "uneven spacing",
        "mend",
        POSITION,
        "uneven_spacing",
        _moved(lambda n: (Z_MM[n] + 0.3 * (n % 3), 0.0)),
    ),
    Case(
        "gantry tilt",
        "mend",
        POSITION,
        "tilt",
        _moved(lambda n: (Z_MM[n], 0.3 * Z_MM[n])),
    ),
    Case(
        "tilt said but not seen",
        "doubt",
        "GantryDetectorTilt",
        "form_conflict",
        _all(GantryDetectorTilt="20"),
    ),
    Case(
        "orientation singular",
        "refuse",
        ORIENTATION,
        "orientation",
        _all(**{ORIENTATION: [1, 0, 0, 1, 0, 0]}),
    ),
    Case("orientation zero", "refuse", ORIENTATION, "orientation", _all(**{ORIENTATION: [0] * 6})),
    Case(
        "orientation not of unit length",
        "refuse",
        ORIENTATION,
        "orientation",
        _all(**{ORIENTATION: [2, 0, 0, 0, 2, 0]}),
    ),
    Case("orientation missing", "refuse", ORIENTATION, "header", _all(**{ORIENTATION: None})),
    Case(
        "mixed orientation",
        "refuse",
        ORIENTATION,
        "foreign_slices",
        _one(1, **{ORIENTATION: [0, 1, 0, 0, 0, -1]}),
    ),
    Case("slope 0", "refuse", "RescaleSlope", "rescale", _all(RescaleSlope="0")),
    Case("slope missing", "refuse", "RescaleSlope", "header", _one(2, RescaleSlope=None)),
    Case(
        "slope that leaves int16",
        "refuse",
        "RescaleSlope, RescaleIntercept",
        "hu",
        _all(RescaleSlope="90"),
    ),
    Case("RescaleType of no HU", "refuse", "RescaleType", "rescale", _all(RescaleType="OD")),
    Case(
        "lossy compression",
        "doubt",
        "LossyImageCompression",
        "lossy",
        _all(LossyImageCompression="01"),
    ),
    Case("MR", "refuse", "Modality", "unsupported", _all(Modality="MR")),
    Case(
        "inverted grey values",
        "refuse",
        "PhotometricInterpretation",
        "unsupported",
        _all(PhotometricInterpretation="MONOCHROME1"),
    ),
    Case("implicit VR", "ok", "", "", _other_syntax(ImplicitVRLittleEndian)),
    Case("deflated", "ok", "", "", _other_syntax(DeflatedExplicitVRLittleEndian)),
    Case("deflated bomb", "refuse", "file", "limit", _bomb),
    Case("text file beside the slices", "ok", "", "", _beside("notes.txt", b"by a radiographer\n")),
    Case("zero-byte file beside the slices", "refuse", "file", "integrity", _beside("IM1", b"")),
    Case("DICOMDIR that leads outside", "ok", "", "", _beside("DICOMDIR", b"../../etc" * 99)),
]


def test_the_classes_are_counted() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 29


@pytest.mark.cases(4)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_folder_is_right_or_refused_by_policy(folder: Path, case: Case) -> None:
    case.spoil(write_series(folder))
    for policy in get_args(Policy):
        if policy in GOES_ON.get(case.severity, ()):
            volume = read_volume(folder, check_hu=False, policy=policy)
            assert volume.report is not None
            assert case.severity == "ok" or case[1:4] in {
                (f.severity, f.field, f.code) for f in volume.report.findings
            }
            assert assert_linear(volume) > 0.5
            assert_upright(volume)
            if case.code not in ("tilt", "uneven_spacing"):  # those are resampled
                np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX)
                np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-9)
                assert volume.spacing_mm == pytest.approx(SPACING)
            continue
        with pytest.raises(FormatError) as caught:
            read_volume(folder, check_hu=False, policy=policy)
        assert (caught.value.field, code_of(caught.value)) == (case.field, case.code)
        assert case.code in CODES
        assert_keeps_the_secret(caught.value)
    report = check_series(folder, check_hu=False)
    for policy in get_args(Policy):
        refusal = report.refusal(policy)
        assert (refusal is None) == (policy in GOES_ON.get(case.severity, ()))
        assert refusal is None or refusal[1:3] == (case.code, case.field)
    assert CANARY not in str(report.to_json())


def test_padding_of_minus_2000_is_kept(folder: Path) -> None:
    padded_ZYX = HU_ZYX.copy()
    padded_ZYX[:, :2] = -2000
    for n, path in enumerate(write_series(folder)):
        change(path, PixelData=(padded_ZYX[n] + 1024).astype("<i2").tobytes())
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, padded_ZYX)


READ_AND_MEASURE = """
import resource, sys, time
from pathlib import Path
from tapct_fast.errors import FormatError
from tapct_fast.io.read import read_volume
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
slowest, num_refused = 0.0, 0
read_volume(Path(sys.argv[1], "0"), check_hu=False)
before = peak()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    start = time.perf_counter()
    try:
        read_volume(folder, check_hu=False)
    except FormatError:
        num_refused += 1
    slowest = max(slowest, time.perf_counter() - start)
print(peak() - before, slowest, num_refused)
"""


@pytest.mark.cases(len(CASES))
def test_all_classes_together_take_neither_memory_nor_time(tmp_path: Path) -> None:
    for number, case in enumerate(CASES):
        case.spoil(write_series(tmp_path / f"{number}"))
    # A process of its own: the peak of this one may be past what a lie would add.
    result = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown_kib, slowest_s, num_refused = map(float, result.stdout.split())
    # The bomb is inflated to the size of the largest slice; facts/reliability S5 allows 256 MB.
    assert grown_kib < 256 << 10
    assert slowest_s < 1.0
    assert num_refused == sum(case.severity != "ok" for case in CASES)

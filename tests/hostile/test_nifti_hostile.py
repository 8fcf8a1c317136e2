"""Files meant to break the reader: a typed error or the right voxels, never a wrong volume."""

import gzip
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tapct_fast.errors import FormatError
from tapct_fast.io.nifti import read_nifti, write_nifti

AFFINE = np.array(
    [[-0.8, 0, 0, 100.0], [0, -0.7, 0, 80.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]], dtype=np.float64
)
SHAPE_ZYX = (12, 40, 48)
SROW, QUATERN, QOFFSET, PIXDIM, DIM = 280, 256, 268, 76, 40


def scan() -> npt.NDArray[np.int16]:
    """Smooth shapes and noise, so that the stream has matches and literals as a CT has."""
    z, y, x = np.indices(SHAPE_ZYX)
    hu = 400 * np.sin(z / 3) + 300 * np.cos(y / 7) + 200 * np.sin(x / 5) - 200
    return (hu + np.random.default_rng(0).normal(0, 12, SHAPE_ZYX)).astype(np.int16)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("scan") / "scan.nii"
    write_nifti(path, scan(), AFFINE)
    data = bytearray(path.read_bytes())
    # A qform that agrees with the sform: half a turn about z.
    struct.pack_into("<2h", data, 252, 1, 1)
    struct.pack_into("<3f", data, QUATERN, 0.0, 0.0, 1.0)
    struct.pack_into("<3f", data, QOFFSET, 100.0, 80.0, -300.0)
    return bytes(data)


@pytest.fixture(scope="module")
def zipped(plain: bytes) -> bytes:
    return gzip.compress(plain, mtime=0)


def read(folder: Path, data: bytes) -> npt.NDArray[np.int16]:
    path = folder / "scan"
    path.write_bytes(data)
    return read_nifti(path).hu_ZYX


def patched(data: bytes, offset: int, layout: str, *values: float) -> bytes:
    copy = bytearray(data)
    struct.pack_into(f"<{layout}", copy, offset, *values)
    return bytes(copy)


def test_the_unbroken_scan_reads(tmp_path: Path, plain: bytes, zipped: bytes) -> None:
    for data in (plain, zipped):
        np.testing.assert_array_equal(read(tmp_path, data), scan())


def test_200_flipped_bits_are_all_detected(tmp_path: Path, zipped: bytes) -> None:
    # Bytes 0..9 are gzip's own: time stamp and system name carry no data and have no checksum.
    bits = np.random.default_rng(1).choice(np.arange(80, 8 * len(zipped)), 200, replace=False)
    for bit in bits.tolist():
        data = bytearray(zipped)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            read(tmp_path, bytes(data))


def test_flips_in_the_gzip_header_are_errors_or_harmless(tmp_path: Path, zipped: bytes) -> None:
    for bit in range(80):
        data = bytearray(zipped)
        data[bit // 8] ^= 1 << bit % 8
        try:
            np.testing.assert_array_equal(read(tmp_path, bytes(data)), scan())
        except FormatError:
            continue


def test_64_truncations_are_all_detected(tmp_path: Path, plain: bytes, zipped: bytes) -> None:
    for whole in (plain, zipped):
        sizes = {*np.linspace(0, len(whole) - 1, 60).astype(int).tolist()}
        sizes |= {len(whole) - n for n in (1, 2, 4, 8)}
        for size in sizes:
            with pytest.raises(FormatError):
                read(tmp_path, whole[:size])


def test_a_valid_stream_that_is_too_short_or_too_long_is_an_error(
    tmp_path: Path, plain: bytes
) -> None:
    for data in (plain[: len(plain) // 2], plain[:352], plain + b"\0", plain + plain):
        for container in (data, gzip.compress(data)):
            with pytest.raises(FormatError):
                read(tmp_path, container)


@pytest.mark.parametrize("trailer", [b"\0" * 512, b"garbage", b"\x1f\x8b\x08garbage"])
def test_bytes_after_the_stream_are_an_error(tmp_path: Path, zipped: bytes, trailer: bytes) -> None:
    with pytest.raises(FormatError, match="gzip"):
        read(tmp_path, zipped + trailer)


HEADERS: list[tuple[str, str, Callable[[bytes], bytes]]] = [
    ("negative dim", "dim[2]", lambda d: patched(d, DIM + 4, "h", -40)),
    ("zero dim", "dim[2]", lambda d: patched(d, DIM + 4, "h", 0)),
    ("no axes", "dim[0]", lambda d: patched(d, DIM, "h", 0)),
    ("two axes", "dim[0]", lambda d: patched(d, DIM, "h", 2)),
    ("dims larger than the data", "dim", lambda d: patched(d, DIM + 6, "h", 24)),
    ("dims smaller than the data", "vox_offset", lambda d: patched(d, DIM + 6, "h", 6)),
    ("dims beyond any file", "dim", lambda d: patched(d, DIM + 2, "3h", 32767, 32767, 32767)),
    ("offset beyond the file", "dim", lambda d: patched(d, 108, "f", 1e6)),
    ("offset NaN", "vox_offset", lambda d: patched(d, 108, "f", np.nan)),
    ("offset negative", "vox_offset", lambda d: patched(d, 108, "f", -352.0)),
    ("offset 0", "vox_offset", lambda d: patched(d, 108, "f", 0.0)),
    ("datatype unknown", "datatype", lambda d: patched(d, 70, "h", 77)),
    ("complex", "datatype", lambda d: patched(d, 70, "2h", 32, 64)),
    ("RGB", "datatype", lambda d: patched(d, 70, "2h", 128, 24)),
    ("bitpix", "bitpix", lambda d: patched(d, 72, "h", 8)),
    ("slope NaN", "scl_slope", lambda d: patched(d, 112, "f", np.nan)),
    ("intercept infinite", "scl_inter", lambda d: patched(d, 116, "f", np.inf)),
    ("values beyond int16", "voxels", lambda d: patched(d, 112, "f", 1e4)),
    ("two files", "magic", lambda d: patched(d, 344, "4s", b"ni1\0")),  # type: ignore[arg-type]
    ("Analyze", "magic", lambda d: patched(d, 344, "4s", b"\0\0\0\0")),  # type: ignore[arg-type]
    ("not NIfTI", "sizeof_hdr", lambda d: b"PK\3\4" + d[4:]),
    ("no orientation", "sform_code, qform_code", lambda d: patched(d, 252, "2h", 0, 0)),
    ("sform code", "sform_code", lambda d: patched(d, 254, "h", 9)),
    ("sform zero", "sform", lambda d: patched(d, SROW, "12f", *[0.0] * 12)),
    ("sform NaN", "sform", lambda d: patched(d, SROW, "f", np.nan)),
    ("sform of other spacing", "pixdim, sform", lambda d: patched(d, SROW, "f", -0.9)),
    ("sform mirrored", "sform, qform", lambda d: patched(d, SROW, "f", 0.8)),
    ("sform elsewhere", "sform, qform", lambda d: patched(d, SROW + 12, "f", 101.0)),
    ("qform turned", "sform, qform", lambda d: patched(d, QUATERN, "3f", 0.0, 0.1, 0.99)),
    ("quaternion too long", "qform", lambda d: patched(d, QUATERN, "3f", 1.0, 1.0, 0.0)),
    ("quaternion NaN", "qform", lambda d: patched(d, QUATERN, "f", np.nan)),
    ("qfac", "pixdim[0]", lambda d: patched(d, PIXDIM, "f", 0.5)),
    ("unit unknown", "xyzt_units", lambda d: patched(d, 123, "B", 7)),
    ("millimetres called metres", "xyzt_units", lambda d: patched(d, 123, "B", 1)),
]


def only(data: bytes, sform_code: int, qform_code: int) -> bytes:
    return patched(data, 252, "2h", qform_code, sform_code)


HEADERS += [
    (
        "sform singular",
        "sform",
        lambda d: patched(only(d, 1, 0), SROW, "12f", -0.8, -0.7, 0, 0, *[0] * 6, 2.5, 0),
    ),
    (
        "sform sheared",
        "sform",
        lambda d: patched(only(d, 1, 0), SROW + 16, "8f", 0, -0.7, 0.8, 0, 0, 0, 2.368, 0),
    ),
    ("pixdim 0 with a qform", "pixdim", lambda d: patched(only(d, 0, 1), PIXDIM + 4, "f", 0.0)),
    ("pixdim negative", "pixdim", lambda d: patched(only(d, 0, 1), PIXDIM + 4, "f", -0.8)),
    ("pixdim NaN", "pixdim", lambda d: patched(only(d, 0, 1), PIXDIM + 4, "f", np.nan)),
    ("spacing of no CT", "qform", lambda d: patched(only(d, 0, 1), PIXDIM + 4, "f", 800.0)),
]


@pytest.mark.parametrize(("field", "change"), [pytest.param(f, c, id=n) for n, f, c in HEADERS])
def test_a_header_that_lies_is_an_error_naming_the_field(
    tmp_path: Path, plain: bytes, field: str, change: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path, change(plain))
    assert caught.value.field == field
    with pytest.raises(FormatError):
        read(tmp_path, gzip.compress(change(plain)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_an_error(tmp_path: Path, value: float) -> None:
    voxels = scan().astype(np.float32)
    voxels[-1, -1, -1] = value
    write_nifti(tmp_path / "scan.nii.gz", voxels, AFFINE)
    with pytest.raises(FormatError, match="NaN or infinite"):
        read_nifti(tmp_path / "scan.nii.gz")


READ_AND_MEASURE = """
import resource, sys, time
from pathlib import Path
from tapct_fast.errors import FormatError
from tapct_fast.io.nifti import read_nifti
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_nifti(Path(sys.argv[1]))
before, start = peak(), time.perf_counter()
for path in sys.argv[2:]:
    try:
        read_nifti(Path(path))
        sys.exit(f"{path} was read")
    except FormatError:
        pass
print(peak() - before, time.perf_counter() - start)
"""


def test_bombs_are_refused_before_memory_is_taken(
    tmp_path: Path, plain: bytes, zipped: bytes
) -> None:
    zeros = zlib.compressobj(level=1, wbits=31)
    half_gib = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(512)) + zeros.flush()
    files = {
        "good": zipped,
        "declares_12_GiB": gzip.compress(patched(plain, DIM + 2, "3h", 1861, 1861, 1861)),
        "declares_2_GiB": gzip.compress(patched(plain, DIM + 2, "3h", 1024, 1024, 1024)),
        "decodes_to_more_in_a_second_member": zipped + half_gib,
        "nested": gzip.compress(half_gib),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    # A process of its own: the peak of this one may be past what a bomb would add.
    result = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, *(str(tmp_path / name) for name in files)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown_kib, seconds = map(float, result.stdout.split())
    assert grown_kib < 64 << 10  # facts/reliability S3: the declared voxels and 64 MB
    assert seconds < 5.0


def test_a_message_holds_no_path(tmp_path: Path, plain: bytes) -> None:
    path = tmp_path / "DOE^JOHN.nii"
    path.write_bytes(plain[:-1])
    with pytest.raises(FormatError) as caught:
        read_nifti(path)
    assert "DOE" not in str(caught.value)

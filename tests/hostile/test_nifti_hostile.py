"""Damage anywhere in a file is found; what each class gives is in test_nifti_classes.py."""

import gzip
import struct
import subprocess
import sys
import zlib
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
QUATERN, QOFFSET, DIM = 256, 268, 40


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


@pytest.mark.cases(200)
def test_200_flipped_bits_are_all_detected(tmp_path: Path, zipped: bytes) -> None:
    # Bytes 0..9 are gzip's own: time stamp and system name carry no data and have no checksum.
    bits = np.random.default_rng(1).choice(np.arange(80, 8 * len(zipped)), 200, replace=False)
    for bit in bits.tolist():
        data = bytearray(zipped)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            read(tmp_path, bytes(data))


@pytest.mark.cases(80)
def test_flips_in_the_gzip_header_are_errors_or_harmless(tmp_path: Path, zipped: bytes) -> None:
    for bit in range(80):
        data = bytearray(zipped)
        data[bit // 8] ^= 1 << bit % 8
        try:
            np.testing.assert_array_equal(read(tmp_path, bytes(data)), scan())
        except FormatError:
            continue


@pytest.mark.cases(2 * 64)
def test_64_truncations_are_all_detected(tmp_path: Path, plain: bytes, zipped: bytes) -> None:
    for whole in (plain, zipped):
        sizes = {*np.linspace(0, len(whole) - 1, 60).astype(int).tolist()}
        sizes |= {len(whole) - n for n in (1, 2, 4, 8)}
        for size in sizes:
            with pytest.raises(FormatError):
                read(tmp_path, whole[:size])


@pytest.mark.cases(8)
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


@pytest.mark.cases(5)
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

"""Lengths, depths, syntaxes and streams that lie: an error in bounded time and memory."""

import struct
import time
import zlib
from pathlib import Path

import pytest
from dicom_series import assert_linear, assert_refused, assert_right, write_series
from pydicom import dcmread
from pydicom.uid import RLELossless

from tapct_fast.errors import FormatError
from tapct_fast.io.dicom.read import read_series


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
    paths = write_series(tmp_path / "a")
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
    paths = write_series(tmp_path / "a")
    raw = paths[2].read_bytes()
    at = raw.index(tag)
    # As UN the field has a length of 32 bits.
    lie = raw[: at + 4] + b"UN\0\0" + struct.pack("<I", length) + raw[at + 8 :]
    paths[2].write_bytes(lie)
    with pytest.raises(FormatError):
        read_series(tmp_path / "a")


@pytest.mark.parametrize("lie", [2**32 - 2, 2**31, 10_000])
def test_a_fragment_that_lies_is_refused(tmp_path: Path, lie: int) -> None:
    paths = write_series(tmp_path / "a")
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


@pytest.mark.cases(3)
def test_many_tiny_files_take_bounded_time(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    for number in range(3000):
        (tmp_path / "a" / f"{number}.txt").write_bytes(b"x")
    began = time.perf_counter()
    assert assert_linear(read_series(tmp_path / "a")) == 1.0
    assert time.perf_counter() - began < 3.0  # 1 ms each on a loaded machine


def test_a_uid_never_becomes_a_path(tmp_path: Path) -> None:
    for path in write_series(tmp_path / "a"):
        raw = path.read_bytes()
        uid = b"\x20\x00\x0e\x00UI\x06\x001.2.5\0"
        assert uid in raw
        path.write_bytes(raw.replace(uid, b"\x20\x00\x0e\x00UI\x0c\x00../../../etc"))
    before = sorted(tmp_path.rglob("*"))
    assert assert_linear(read_series(tmp_path / "a")) == 1.0
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_transfer_syntax_is_refused(folder: Path) -> None:
    write_series(folder)
    for path in folder.iterdir():
        raw = path.read_bytes()
        path.write_bytes(raw.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.77"))
    assert_refused(folder, "TransferSyntaxUID", "unknown")


@pytest.mark.cases(3)
def test_a_deflate_bomb_is_refused_before_it_fills_memory(folder: Path) -> None:
    write_series(folder)
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

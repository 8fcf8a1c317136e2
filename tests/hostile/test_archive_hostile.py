"""Zip archives made to do harm are refused at opening, and no name in them reaches a message."""

import io
import random
import stat
import struct
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom.archive import Archive, is_zip

CANARY = "CANARY"
NOISE = np.random.default_rng(0).bytes(3_000_000)
FILES = {
    f"{CANARY}/a.dcm": b"",
    f"{CANARY}/b.dcm": b"slice" * 1000,
    f"{CANARY}/deep/c": NOISE,
    "d.nii": bytes(2_500_000),
}


def pack(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f"{CANARY}.zip"


def refuse(path: Path, code: str, words: str, **limits: int) -> None:
    started = time.monotonic()
    with pytest.raises(FormatError, match=words) as caught:
        Archive(path, **limits)
    assert time.monotonic() - started < 1.0
    assert (caught.value.field, caught.value.code) == ("zip", code)
    assert CANARY not in "".join(traceback.format_exception_only(caught.value))
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_file_is_read_whole_and_in_part(path: Path, method: int) -> None:
    with Archive(pack(path, FILES, method)) as archive:
        assert archive.names() == list(FILES)
        for number, (name, content) in enumerate(FILES.items(), start=1):
            assert archive.size(name) == len(content)
            assert archive.place(name) == f"entry {number} of 4"
            assert archive.read(name, 3_000_000) == content
            for num in (0, 1, 132, 2**20, 2**20 + 1, 10**7):
                assert archive.read_prefix(name, num) == content[:num]
    assert is_zip(path.read_bytes()[:4])


def test_no_size_around_the_piece_in_which_files_are_read_loses_a_byte(path: Path) -> None:
    files = {str(num): bytes(num) for num in range(2**20 - 300, 2**20 + 600, 23)}
    with Archive(pack(path, files)) as archive:
        for name, content in files.items():
            assert archive.read(name, 2**21) == content


def test_folders_comments_streamed_entries_and_a_prefix_are_no_obstacle(path: Path) -> None:
    class Pipe(io.RawIOBase):  # zipfile writes sizes behind the data where it cannot seek
        def __init__(self, file) -> None:
            self.file = file

        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            return self.file.write(data)

    with path.open("wb") as file, zipfile.ZipFile(Pipe(file), "w", zipfile.ZIP_DEFLATED) as made:
        made.mkdir("folder")
        made.writestr("./folder//x", b"one")
        with made.open("big", "w", force_zip64=True) as entry:
            entry.write(NOISE)
        made.comment = b"words " * 100
    path.write_bytes(b"#!/bin/sh\n" * 50 + path.read_bytes())
    with Archive(path) as archive:
        assert archive.names() == ["folder/x", "big"]
        assert archive.read("folder/x", 3) == b"one"
        assert archive.read("big", len(NOISE)) == NOISE


def test_an_empty_archive_holds_nothing(path: Path) -> None:
    with Archive(pack(path, {})) as archive:
        assert archive.names() == []


def test_an_archive_inside_the_archive_stays_closed(path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as made:
        made.writestr("../x", b"")
    with Archive(pack(path, {"inner.zip": inner.getvalue()})) as archive:
        assert archive.names() == ["inner.zip"]
        assert archive.read("inner.zip", 10_000) == inner.getvalue()


def test_a_file_larger_than_asked_for_or_unknown_is_refused(path: Path) -> None:
    with Archive(pack(path, FILES)) as archive:
        with pytest.raises(FormatError, match="entry 3 of 4 holds 3000000 bytes, limit 2999999"):
            archive.read(f"{CANARY}/deep/c", 2_999_999)
        with pytest.raises(InputError) as caught:
            archive.read(f"{CANARY}/other", 10)
        assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/../../x", "a/..", "..", "/etc/passwd", "//host/x", "C:/x", "c:x"),
        *("a\\b", "..\\x", "\\\\host\\x"),
    ],
)
def test_a_name_that_leads_outside_is_refused(path: Path, name: str) -> None:
    pack(path, {f"{CANARY}.dcm": b"1", name: b"2"})
    refuse(path, "unsupported", "entry 2 of 2 names a place outside")


def test_a_name_with_a_hidden_end_is_refused(path: Path) -> None:
    pack(path, {"x.dcmZevil": b"1"})
    path.write_bytes(path.read_bytes().replace(b"x.dcmZevil", b"x.dcm\0evil"))
    refuse(path, "unsupported", "entry 1 of 1")


@pytest.mark.parametrize("name", ["./", "."])
def test_an_entry_without_a_name_is_refused(path: Path, name: str) -> None:
    pack(path, {"x.dcm": b"1", name: b""})
    refuse(path, "integrity", "entry 2 of 2 has no name")


@pytest.mark.parametrize("second", ["x.dcm", "./x.dcm", ".//x.dcm"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(path: Path, second: str) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x.dcm", b"1")
        made.writestr(second, b"2")
    refuse(path, "integrity", "entry 2 of 2 has the name of an earlier one")


@pytest.mark.parametrize(
    "mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK]
)
def test_links_and_devices_are_refused(path: Path, mode: int) -> None:
    info = zipfile.ZipInfo("x.dcm")
    info.external_attr = (mode | 0o777) << 16
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(info, b"/etc/passwd")
    refuse(path, "unsupported", "entry 1 of 1 is a link or a device")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_are_refused(path: Path, method: int) -> None:
    refuse(pack(path, {"x": b"1" * 99}, method), "unsupported", "neither stored nor deflated")


Central = Callable[[bytearray, int], None]


def edit_directory(path: Path, edit: Central) -> None:
    """Change the first record of the archive's directory in place."""
    data = bytearray(path.read_bytes())
    edit(data, data.find(b"PK\1\2"))
    path.write_bytes(data)


def _put(offset: int, form: str, value: int) -> Central:
    return lambda data, start: struct.pack_into(form, data, start + offset, value)


@pytest.mark.parametrize(
    ("edit", "code", "words"),
    [
        (_put(8, "<H", 0x1), "unsupported", "encrypted"),
        (_put(8, "<H", 0x41), "unsupported", "encrypted"),
        (_put(24, "<I", 2**32 - 2), "limit", "more than its method can pack"),
        (_put(20, "<I", 0), "limit", "more than its method can pack"),
        (_put(20, "<I", 2**31), "integrity", "shares bytes"),
        (_put(42, "<I", 1), "integrity", "not where the directory says"),
        (_put(42, "<I", 2**32 - 2), "integrity", "not where the directory says"),
        (_put(0, "<I", 0), "integrity", "directory is damaged"),
        (_put(28, "<H", 60000), "integrity", "lists 1 entries and declares 2"),
    ],
)
def test_a_directory_that_lies_is_refused(path: Path, edit, code: str, words: str) -> None:
    pack(path, {"x.dcm": b"slice" * 100, "y.dcm": b"other" * 100})
    edit_directory(path, edit)
    refuse(path, code, words)


def test_a_stored_file_with_two_lengths_is_refused(path: Path) -> None:
    pack(path, {"x": b"1" * 99}, zipfile.ZIP_STORED)
    edit_directory(path, _put(24, "<I", 50))
    refuse(path, "integrity", "two lengths")


def test_a_folder_with_content_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("folder/", b"hidden")
    refuse(path, "integrity", "a folder with content")


def test_limits_on_number_entry_and_total_hold(path: Path) -> None:
    pack(path, {str(i): bytes(1000) for i in range(40)})
    refuse(path, "limit", "lists 40 entries", max_entries=39)
    refuse(path, "limit", "entry 1 of 40 holds 1000 bytes", max_entry_bytes=999)
    refuse(path, "limit", "holds 40000 bytes", max_total_bytes=39_999)
    with Archive(path, max_entries=40, max_entry_bytes=1000, max_total_bytes=40_000) as archive:
        assert len(archive.names()) == 40


def test_entries_that_share_bytes_are_refused(path: Path) -> None:
    # Fifield's bomb in small: the directory lists one body many times.
    pack(path, {f"{i:04}": bytes(10**6) for i in range(50)})
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\1\2")
    while place >= 0:
        struct.pack_into("<I", data, place + 42, 0)
        place = data.find(b"PK\1\2", place + 4)
    path.write_bytes(data)
    refuse(path, "integrity", r"entry \d+ of 50 shares bytes")


def test_a_body_that_reaches_into_the_next_is_refused(path: Path) -> None:
    pack(path, {"x": b"1" * 1000, "y": b"2" * 1000}, zipfile.ZIP_STORED)
    edit_directory(path, lambda data, at: struct.pack_into("<II", data, at + 20, 1010, 1010))
    refuse(path, "integrity", "entry 2 of 2 shares bytes")


def test_a_huge_directory_is_refused_before_it_is_parsed(path: Path) -> None:
    pack(path, {"x": b""})
    data = bytearray(path.read_bytes())
    struct.pack_into("<HHI", data, len(data) - 14, 60_000, 60_000, 3 * 10**9)
    path.write_bytes(data)
    refuse(path, "limit", "lists 60000 entries")


def test_a_count_that_disagrees_with_the_directory_is_refused(path: Path) -> None:
    pack(path, {"x": b"1", "y": b"2"})
    data = bytearray(path.read_bytes())
    struct.pack_into("<HH", data, len(data) - 14, 3, 3)
    path.write_bytes(data)
    refuse(path, "integrity", "lists 2 entries and declares 3")


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\5\6", NOISE[:5000], b"PK\3\4" + bytes(300)])
def test_other_files_are_no_archive(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refuse(path, "integrity", "has no directory")
    refuse(path.parent / "absent", "integrity", "cannot be opened")


def test_every_truncation_is_refused(path: Path) -> None:
    pack(path, {f"{CANARY}{i}": b"slice" * 50 for i in range(5)})
    whole = path.read_bytes()
    for num_bytes in range(0, len(whole), 7):
        path.write_bytes(whole[:num_bytes])
        refuse(path, "integrity", "cut short|damaged|declares|shares")


def test_random_flips_never_change_what_is_read(path: Path) -> None:
    files = {f"{CANARY}{i}": np.random.default_rng(i).bytes(200) * 3 for i in range(3)}
    pack(path, files)
    whole = path.read_bytes()
    rng = random.Random(0)
    num_found, messages = 0, set()
    for _ in range(400):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            with Archive(path) as archive:
                for name, content in zip(archive.names(), files.values(), strict=True):
                    assert archive.read(name, 10_000) == content
        except FormatError as error:
            num_found += 1
            messages.add(str(error))
    assert CANARY not in "".join(messages)
    assert num_found > 200  # the others hit names, dates and versions


def _with_body(path: Path, body: bytes, content: bytes, num_bytes: int) -> None:
    """Write an archive of one deflated entry that declares what it likes."""
    crc = zlib.crc32(content)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(body), num_bytes, 1, 0)
    central = struct.pack(
        "<4s6H3I5H2I",
        *(b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, len(body), num_bytes, 1, 0, 0, 0, 0, 0, 0),
    )
    data = local + b"x" + body + central + b"x"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 47, len(data) - 47, 0)
    path.write_bytes(data + end)


def deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(content) + packer.flush()


def test_the_handmade_archive_is_sound_where_it_does_not_lie(path: Path) -> None:
    _with_body(path, deflate(b"abc" * 99), b"abc" * 99, 297)
    with Archive(path) as archive:
        assert archive.read("x", 297) == b"abc" * 99


@pytest.mark.parametrize(
    ("body", "content", "num_bytes"),
    [
        (deflate(b"abc" * 99), b"abc" * 98, 294),  # goes on behind its declared end
        (deflate(b"abc" * 99), b"abc" * 99, 300),  # ends before
        (deflate(b"abc" * 99)[:-3], b"abc" * 99, 297),  # cut short
        (deflate(b"abc" * 99) + b"more", b"abc" * 99, 297),
        (deflate(b"abc" * 99), b"abd" * 99, 297),  # wrong checksum
        (b"\xff" * 50, b"abc" * 99, 297),  # no deflate stream
    ],
)
def test_a_body_that_differs_from_its_directory_is_refused(
    path: Path, body: bytes, content: bytes, num_bytes: int
) -> None:
    _with_body(path, body, content, num_bytes)
    with Archive(path) as archive, pytest.raises(FormatError) as caught:
        archive.read("x", 1000)
    assert (caught.value.field, caught.value.code) == ("zip", "integrity")
    assert "entry 1 of 1" in caught.value.reason


BOMB = """
import resource, sys, time
from pathlib import Path
from tapct_fast.errors import FormatError
from tapct_fast.io.dicom.archive import Archive
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
try:
    with Archive(Path(sys.argv[1])) as archive:
        archive.read(archive.names()[0], 2**40)
except FormatError as error:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(error.code, grown // 1024, time.monotonic() - started)
"""


@pytest.mark.parametrize("declared", [4000, 2**31])
def test_a_bomb_costs_neither_memory_nor_time(path: Path, declared: int) -> None:
    packer = zlib.compressobj(9, wbits=-15)
    block = bytes(2**20)
    body = b"".join(packer.compress(block) for _ in range(300)) + packer.flush()
    assert len(body) < 2**21
    if declared > 2**20:  # more than there is, and more than its bytes can hold
        body = body[:1000]
    _with_body(path, body, b"", declared)
    run = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, timeout=60
    )
    code, grown_mb, seconds = run.stdout.split()
    assert code in ("integrity", "limit")
    assert int(grown_mb) < 16
    assert float(seconds) < 1.0

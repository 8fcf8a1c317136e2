"""Read the files inside a zip archive without writing them to disk.

An archive from elsewhere may be a bomb (42 kB that inflate to petabytes), name files outside the
folder it is read into, or hold what nobody sees: a second file of the same name, a link, bytes that
two entries share. All of that is refused when the archive is opened, from its directory alone,
before anything is inflated. Errors name entries by number: a name may be a patient's.

Source: PKWARE APPNOTE 6.3.10; overlapping entries: D. Fifield, "A better zip bomb", WOOT 2019.
"""

import re
import stat
import struct
import threading
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, NoReturn, Self

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.findings import Code

MAX_ENTRIES = 100_000  # slices of a large study: about 10,000
MAX_ENTRY_BYTES = 2**33  # a scan of 2**31 voxels as int16, packed badly, and room
MAX_TOTAL_BYTES = 2**36
_MAX_DIRECTORY_BYTES = MAX_ENTRIES * 512
_MAX_RATIO = 1032  # 258 bytes from two bits is the most that deflate can do
_CHUNK_BYTES = 2**20

_END, _END_BYTES, _MAX_COMMENT_BYTES = b"PK\5\6", 22, 2**16 - 1
_END64, _LOCATOR64, _LOCATOR64_BYTES = b"PK\6\6", b"PK\6\7", 20
_LOCAL, _LOCAL_BYTES = b"PK\3\4", 30
_ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000  # traditional, strong, masked directory
_DAMAGE = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError),
    *(ValueError, LookupError, OverflowError, struct.error),
)


class _Entry(NamedTuple):
    """One file of the archive, found sound as far as the directory tells."""

    place: str  # "entry 3 of 40"
    is_deflated: bool
    offset: int  # of its packed bytes
    packed_bytes: int
    num_bytes: int
    crc32: int


class Archive:
    """A zip archive whose entries are read into memory, one at a time; a context manager.

    Entries may be read from several threads. Archives inside the archive are not opened: they are
    entries like any other.

    Args:
        path: The archive.
        max_entries: More are refused.
        max_entry_bytes: The largest entry, inflated.
        max_total_bytes: All entries together, inflated.

    Raises:
        FormatError: The file is no sound zip archive of plain files within the limits; its field
            is ``zip``.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_entries: int = MAX_ENTRIES,
        max_entry_bytes: int = MAX_ENTRY_BYTES,
        max_total_bytes: int = MAX_TOTAL_BYTES,
    ) -> None:
        self._lock = threading.Lock()
        try:
            self._file = path.open("rb")
        except OSError as error:
            _refuse("integrity", f"cannot be opened: {error.strerror}")
        try:
            infos, directory_start = _list(self._file, max_entries)
            self._entries = _check_all(self._file, infos, directory_start, max_entry_bytes)
            total = sum(entry.num_bytes for entry in self._entries.values())
            if total > max_total_bytes:
                _refuse("limit", f"holds {total} bytes, more than {max_total_bytes}")
        except OSError as error:
            self.close()
            _refuse("integrity", f"cannot be read: {error.strerror}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the archive's file."""
        self._file.close()

    def names(self) -> list[str]:
        """Return the names of all files in the order of the archive, without folders."""
        return list(self._entries)

    def place(self, name: str) -> str:
        """Return the words that name an entry in a message: ``entry 3 of 40``."""
        return self._entry(name).place

    def size(self, name: str) -> int:
        """Return the declared size of a file in bytes, which ``read`` enforces."""
        return self._entry(name).num_bytes

    def read(self, name: str, max_bytes: int) -> bytearray:
        """Return the content of one file, its length and checksum checked.

        Raises:
            InputError: There is no such file.
            FormatError: The file is larger than ``max_bytes``, or damaged.
        """
        entry = self._entry(name)
        if entry.num_bytes > max_bytes:
            _refuse("limit", f"{entry.place} holds {entry.num_bytes} bytes, limit {max_bytes}")
        content = bytearray(entry.num_bytes)
        num_read, is_complete = self._inflate(entry, memoryview(content))
        if num_read != entry.num_bytes or not is_complete:
            _refuse("integrity", f"{entry.place} has another length than declared; it is damaged")
        if zlib.crc32(content) != entry.crc32:
            _refuse("integrity", f"{entry.place} fails its checksum; copy the archive again")
        return content

    def read_prefix(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a file, fewer where it is shorter; its checksum is not checked.

        Raises:
            InputError: There is no such file.
            FormatError: The file is damaged before that many bytes.
        """
        entry = self._entry(name)
        content = bytearray(min(num_bytes, entry.num_bytes))
        num_read, _ = self._inflate(entry, memoryview(content))
        if num_read != len(content):
            _refuse("integrity", f"{entry.place} has another length than declared; it is damaged")
        return bytes(content)

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise InputError("the archive holds no such file; see names()") from None

    def _inflate(self, entry: _Entry, content: memoryview) -> tuple[int, bool]:
        """Fill ``content``; return how much was there and whether the entry ends with it."""
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        num_read, num_packed, packed, chunk = 0, 0, b"", b""
        # zlib may hold output back after it has taken the last input.
        while num_packed < entry.packed_bytes or packed or chunk:
            if not packed and num_packed < entry.packed_bytes:
                num_wanted = min(_CHUNK_BYTES, entry.packed_bytes - num_packed)
                packed = self._read_at(entry.offset + num_packed, num_wanted)
                if not packed:
                    return num_read, False
                num_packed += len(packed)
            # One byte more than fits tells a stream that goes on from one that ends.
            room = len(content) - num_read + 1
            if entry.is_deflated:
                try:
                    chunk = inflater.decompress(packed, min(room, _CHUNK_BYTES))
                except zlib.error:
                    _refuse("integrity", f"{entry.place} cannot be inflated; it is damaged")
                packed = inflater.unconsumed_tail
            else:
                chunk, packed = packed[:room], b""
            fits = min(len(chunk), room - 1)
            content[num_read : num_read + fits] = chunk[:fits]
            num_read += fits
            if len(chunk) == room:
                return num_read, False
            if inflater.eof:
                return num_read, not inflater.unused_data and num_packed == entry.packed_bytes
        return num_read, not entry.is_deflated

    def _read_at(self, offset: int, num_bytes: int) -> bytes:
        with self._lock:
            try:
                self._file.seek(offset)
                return self._file.read(num_bytes)
            except OSError as error:
                _refuse("integrity", f"cannot be read: {error.strerror}")


def is_zip(start: bytes) -> bool:
    """Tell a zip archive by its first four bytes; an empty archive starts with its end."""
    return start[:4] in (_LOCAL, _END)


def _refuse(code: Code, reason: str) -> NoReturn:
    raise FormatError("zip", reason, code) from None


def _list(file: BinaryIO, max_entries: int) -> tuple[list[zipfile.ZipInfo], int]:
    """Parse the archive's directory, after checking that it is small enough to be parsed."""
    num_declared, num_bytes = _directory_size(file)
    if num_declared > max_entries or num_bytes > _MAX_DIRECTORY_BYTES:
        _refuse("limit", f"lists {num_declared} entries in {num_bytes} bytes, limit {max_entries}")
    try:
        with zipfile.ZipFile(file) as archive:
            infos, directory_start = archive.infolist(), archive.start_dir
    except _DAMAGE:
        _refuse("integrity", "its directory is damaged; copy the archive again")
    if len(infos) != num_declared:
        _refuse("integrity", f"lists {len(infos)} entries and declares {num_declared}")
    if len(infos) > max_entries:
        _refuse("limit", f"lists {len(infos)} entries, limit {max_entries}")
    return infos, directory_start


def _directory_size(file: BinaryIO) -> tuple[int, int]:
    """Return the number of entries and bytes of the directory, found as zipfile finds it."""
    size = file.seek(0, 2)
    start = max(0, size - _END_BYTES - _MAX_COMMENT_BYTES)
    file.seek(start)
    tail = file.read()
    place = len(tail) - _END_BYTES
    if place < 0 or tail[place : place + 4] != _END or tail[-2:] != b"\0\0":
        place = tail.rfind(_END)  # behind it a comment
    if place < 0 or place + _END_BYTES > len(tail):
        _refuse("integrity", "has no directory: not a zip archive, or cut short")
    num_entries, num_bytes = struct.unpack_from("<HI", tail, place + 10)
    if start + place >= _LOCATOR64_BYTES:
        file.seek(start + place - _LOCATOR64_BYTES)
        locator = file.read(_LOCATOR64_BYTES)
        if locator[:4] == _LOCATOR64:
            # zipfile looks for the record right before its locator.
            file.seek(max(0, start + place - _LOCATOR64_BYTES - 56))
            record = file.read(56)
            if record[:4] == _END64:
                num_entries, num_bytes = struct.unpack_from("<QQ", record, 32)
    return num_entries, num_bytes


def _check_all(
    file: BinaryIO, infos: list[zipfile.ZipInfo], directory_start: int, max_entry_bytes: int
) -> dict[str, _Entry]:
    """Check every entry of the directory and its place in the file; return the files by name."""
    entries: dict[str, _Entry] = {}
    names: set[str] = set()
    spans: list[tuple[int, int, str]] = []
    for number, info in enumerate(infos, start=1):
        place = f"entry {number} of {len(infos)}"
        name = _check_name(info.orig_filename, place)
        if name in names:
            _refuse("integrity", f"{place} has the name of an earlier one")
        names.add(name)
        _check_kind(info, place)
        _check_size(info, place, max_entry_bytes)
        offset = _data_offset(file, info.header_offset, place)
        spans.append((info.header_offset, offset + info.compress_size, place))
        if not info.is_dir():
            is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
            entries[name] = _Entry(
                place, is_deflated, offset, info.compress_size, info.file_size, info.CRC
            )
    end = 0
    for start, stop, place in sorted(spans):
        if start < end or stop > directory_start:
            _refuse("integrity", f"{place} shares bytes with another part of the archive (a bomb?)")
        end = stop
    return entries


def _check_name(name: str, place: str) -> str:
    """Return the name without empty steps; refuse one that leads out of its folder."""
    parts = name.split("/")
    is_outside = ".." in parts or name.startswith("/") or re.match("[A-Za-z]:", name)
    if is_outside or "\\" in name or "\0" in name:
        _refuse("unsupported", f"{place} names a place outside the archive; pack it again")
    name = "/".join(part for part in parts if part not in ("", "."))
    if not name:
        _refuse("integrity", f"{place} has no name")
    return name


def _check_kind(info: zipfile.ZipInfo, place: str) -> None:
    if info.flag_bits & _ENCRYPTED_FLAGS:
        _refuse("unsupported", f"{place} is encrypted; unpack the archive first")
    # Upper half: the Unix mode, 0 where the archive was made elsewhere.
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        _refuse("unsupported", f"{place} is a link or a device, not a file; pack it again")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        _refuse("unsupported", f"{place} is neither stored nor deflated; unpack the archive first")


def _check_size(info: zipfile.ZipInfo, place: str, max_entry_bytes: int) -> None:
    if info.is_dir() and info.file_size:
        _refuse("integrity", f"{place} is a folder with content")
    if info.file_size > max_entry_bytes:
        _refuse("limit", f"{place} holds {info.file_size} bytes, limit {max_entry_bytes}")
    is_stored = info.compress_type == zipfile.ZIP_STORED
    if info.file_size > (1 if is_stored else _MAX_RATIO) * info.compress_size:
        _refuse(
            "limit",
            f"{place} declares {info.file_size} bytes in {info.compress_size}, more than its "
            "method can pack (a bomb?)",
        )
    if is_stored and info.file_size != info.compress_size:
        _refuse("integrity", f"{place} is stored, but has two lengths")


def _data_offset(file: BinaryIO, header_offset: int, place: str) -> int:
    """Return where the packed bytes of an entry start, behind its own header."""
    header = b""
    if header_offset >= 0:
        file.seek(header_offset)
        header = file.read(_LOCAL_BYTES)
    if len(header) != _LOCAL_BYTES or header[:4] != _LOCAL:
        _refuse("integrity", f"{place} is not where the directory says; the archive is damaged")
    num_name, num_extra = struct.unpack_from("<HH", header, 26)
    return header_offset + _LOCAL_BYTES + int(num_name) + int(num_extra)

"""Find the DICOM files of a folder or zip archive and parse their headers, without their pixels.

The native parser reads all headers in parallel; an archive's entries are parsed from memory.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tapct_fast import _native
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom.archive import Archive
from tapct_fast.io.dicom.fields import TAGS, Header, decode, text_of
from tapct_fast.io.dicom.frames import read_multi_frame

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_DICOMDIR = "1.2.840.10008.1.3.10"

_MAX_SLICE_BYTES = 2**28  # of one file, packed or inflated: 8192 x 8192 int16 and room for headers
_MAX_ENTRY_BYTES = 2**32  # of an archive's entry, which may be a whole multi-frame object
_PREFIX_BYTES = 2**16  # of an archive's entry: holds nearly every header of a slice


@dataclass(frozen=True, slots=True)
class DicomFile:
    """One slice: its header, where its pixels lie, and the words that name it in an error.

    Attributes:
        header: Values by keyword; absent fields are absent.
        place: ``file 3 of 40``.
        source: The path, or what returns the whole content of an archive's entry, or the pixels of
            all frames of an object.
        pixel_offset: Of the value of PixelData, in the file or the inflated data set.
        pixel_bytes: None where the value is encapsulated, so that its length is not stated.
        deflated_at: Where the deflated data set starts.
        stream: The compressed image, where it was taken out of its object already.
    """

    header: Header
    place: str
    source: bytes | memoryview | Callable[[], bytearray]
    is_big_endian: bool = False
    deflated_at: int | None = None
    pixel_offset: int | None = None
    pixel_bytes: int | None = None
    stream: bytes | None = None

    @property
    def is_multi_frame(self) -> bool:
        """Whether the object is an enhanced CT of many frames."""
        return text_of(self.header, "SOPClassUID") in MULTI_FRAME_CT


@contextmanager
def open_files(source: Path, threads: int) -> Iterator[list[DicomFile]]:
    """Parse the header of every DICOM file directly in a folder, or in a zip archive.

    An archive stays open while the files are in use.

    Raises:
        InputError: The folder cannot be read or holds no DICOM file.
        FormatError: A file is damaged.
    """
    if source.is_file():
        with Archive(source) as archive:
            yield _checked(_scan_archive(archive), "the archive")
    else:
        yield _checked(_scan_folder(source, threads), "the folder")


def frames_of(file: DicomFile) -> list[DicomFile]:
    """Return the frames of an enhanced CT object as the slices they are, other files as they are.

    Raises:
        InputError: pydicom is not installed.
        FormatError: The object is damaged or contradicts itself.
    """
    if not file.is_multi_frame:
        return [file]
    if callable(file.source):
        source: Path | bytes = bytes(file.source())
    else:
        assert isinstance(file.source, bytes)
        source = Path(os.fsdecode(file.source))
    found = read_multi_frame(source, file.place)
    frames = []
    for index, (fields, place) in enumerate(zip(found.headers, found.places, strict=True)):
        header = {field: _plain(value) for field, value in fields.items()}
        header["SOPClassUID"] = CT_IMAGE  # all checks of a slice hold for a frame
        header["LossyImageCompression"] = text_of(file.header, "LossyImageCompression")
        if found.is_compressed:
            frames.append(
                DicomFile(header, place, b"", pixel_offset=0, stream=found.streams[index])
            )
        else:
            num_bytes = found.stored(index).nbytes
            frames.append(
                DicomFile(
                    header,
                    place,
                    found.native,
                    file.is_big_endian,
                    pixel_offset=index * num_bytes,
                    pixel_bytes=num_bytes,
                )
            )
    return frames


def _plain(value: object) -> object:
    """Return a value of pydicom's as ``dicom_fields.decode`` would give it."""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Iterable):
        items = list(value)
        if any(isinstance(item, str) for item in items):
            return "\\".join(map(str, items))
        return tuple(items)
    return str(value)


def num_threads(threads: int | None) -> int:
    """Return the number of threads asked for, or the cores this process may use."""
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if threads < 1:
        raise InputError(f"threads={threads} is not positive")
    return threads


def _checked(files: list[DicomFile], container: str) -> list[DicomFile]:
    if not files:
        raise InputError(
            f"{container} holds no DICOM files; name the folder in which the slices of a series lie"
        )
    return files


def _scan_folder(folder: Path, threads: int) -> list[DicomFile]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_file())
    except OSError as error:
        raise InputError(f"the folder cannot be read: {error.strerror}") from None
    paths = [os.fsencode(folder / name) for name in names]
    scans = _native.scan_dicom(paths, TAGS, threads)
    parse = _Parser()
    files = []
    for number, (name, path, scan) in enumerate(zip(names, paths, scans, strict=True), start=1):
        file = parse(scan, name, path, f"file {number} of {len(names)}")
        if file is not None:
            files.append(file)
    return files


def _scan_archive(archive: Archive) -> list[DicomFile]:
    parse = _Parser()
    files = []
    names = [
        name
        for name in sorted(archive.names())
        if not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
    ]
    for number, name in enumerate(names, start=1):
        source = _EntrySource(archive, name)
        start = archive.read_prefix(name, _PREFIX_BYTES)
        (scan,) = _native.scan_dicom([memoryview(start)], TAGS, 1)
        if scan.field and archive.size(name) > len(start):
            (scan,) = _native.scan_dicom([memoryview(source())], TAGS, 1)
        file = parse(scan, PurePosixPath(name).name, source, f"file {number} of {len(names)}")
        if file is not None:
            files.append(file)
    return files


@dataclass(frozen=True, slots=True)
class _EntrySource:
    archive: Archive
    name: str

    def __call__(self) -> bytearray:
        return self.archive.read(self.name, _MAX_ENTRY_BYTES)


class _Parser:
    """Turns native scans into files; slices of a series share most values, which are kept."""

    def __init__(self) -> None:
        self._decoded: dict[tuple[str, str, bytes, bool], object] = {}

    def __call__(
        self,
        scan: _native.DicomScan,
        name: str,
        source: bytes | Callable[[], bytearray],
        place: str,
    ) -> DicomFile | None:
        """Return the file, or None for a bystander."""
        if scan.os_error:
            cause = OSError(scan.os_error, os.strerror(scan.os_error))
            raise FormatError(
                "file", f"{place} cannot be opened: {cause.strerror}", "input"
            ) from cause
        if scan.field:
            code = scan.code or ("integrity" if scan.field == "file" else "header")
            raise FormatError(scan.field, f"{place} {scan.reason}", code)
        if not scan.has_mark:
            _check_bystander(scan.start, name, place)
            return None
        header: Header = {}
        is_big_endian = scan.is_big_endian
        for field, (vr, raw) in scan.values.items():
            key = (field, vr, raw, is_big_endian)
            if key not in self._decoded:
                try:
                    self._decoded[key] = decode(*key)
                except ValueError:
                    raise FormatError(field, f"cannot be decoded in {place}", "header") from None
            header[field] = self._decoded[key]
        if text_of(header, "MediaStorageSOPClassUID") == _DICOMDIR:
            return None
        header["TransferSyntaxUID"] = scan.transfer_syntax
        file = DicomFile(
            header,
            place,
            source,
            is_big_endian,
            scan.deflated_at,
            scan.pixel_offset,
            scan.pixel_bytes,
        )
        if scan.num_bytes > _MAX_SLICE_BYTES and not file.is_multi_frame:
            raise FormatError("file", f"{place} is larger than any slice of a CT", "limit")
        return file


def _check_bystander(start: bytes, name: str, place: str) -> None:
    """Tell a bystander by its content from a slice that lost its start: losing one is an error."""
    if not start:
        raise FormatError(
            "file", f"{place} is empty; copy the series again, or remove the file", "integrity"
        )
    suffix = PurePosixPath(name).suffix.lower()
    is_text = all(byte in b"\t\n\r\f" or 32 <= byte < 127 or byte >= 128 for byte in start)
    is_nameless = suffix == "" or suffix[1:].isdigit()  # a UID or a number, or a README
    if suffix in DICOM_SUFFIXES or (is_nameless and not is_text):
        raise FormatError(
            "file",
            f"{place} has no DICM mark at byte 128: damaged, or not DICOM; remove it",
            "integrity",
        )

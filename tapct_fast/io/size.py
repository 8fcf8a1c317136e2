"""How much memory reading a scan takes, told from its headers before any voxel is read.

An estimate to share out memory by, not a limit: the readers check sizes themselves.
"""

import math
import os
import struct
import zlib
from pathlib import Path

from tapct_fast import _native
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom.archive import Archive, is_zip
from tapct_fast.io.dicom.fields import TAGS, Header, decode, integer_of
from tapct_fast.io.source import source_files
from tapct_fast.io.volume import MAX_VOXELS

_HEADER_BYTES = 540  # of NIfTI-2, the longer one
_START_BYTES = 2**16  # of a file, perhaps packed: holds its header
_COPIES = 2  # int16 voxels as stored and turned to LPS
_MIB = 2**20


def reading_bytes(scan: Path) -> int:
    """Estimate the bytes of memory that ``read_volume`` takes at most.

    Where the headers do not say, it is what the files hold.

    Raises:
        OSError: A file cannot be opened.
    """
    files = source_files(scan)
    held = sum(path.stat().st_size for path in files)
    try:
        voxels = _voxels_of_slices(files) if scan.is_dir() else _voxels_of_file(scan)
    except (FormatError, InputError, struct.error, zlib.error, ValueError):
        voxels = 0  # the reader will say what is wrong
    return _MIB + max(held, _COPIES * 2 * min(voxels, MAX_VOXELS))


def _voxels_of_file(path: Path) -> int:
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    if is_zip(start):
        with Archive(path) as archive:
            return sum(archive.size(name) for name in archive.names()) // 2
    if start[:2] == b"\x1f\x8b":
        start = zlib.decompressobj(31).decompress(start, _HEADER_BYTES)
    for order in "<>":
        (length,) = struct.unpack_from(order + "i", start)
        if length == 348:
            sizes = struct.unpack_from(order + "8h", start, 40)
            return math.prod(max(size, 1) for size in sizes[1:4])
        if length == 540:
            sizes = struct.unpack_from(order + "8q", start, 16)
            return math.prod(max(size, 1) for size in sizes[1:4])
    return _voxels_of_text(start)


def _voxels_of_text(start: bytes) -> int:
    """Return the product of ``sizes:`` (NRRD) or ``DimSize =`` (MetaImage), 0 without either."""
    for line in start.split(b"\n"):
        name, _, values = line.replace(b"=", b":").partition(b":")
        if name.strip().lower() in (b"sizes", b"dimsize"):
            return math.prod(int(word) for word in values.split())
    return 0


def _voxels_of_slices(files: list[Path]) -> int:
    """Return slices times the pixels of the first one that says how many it has."""
    for path in files:
        (scan,) = _native.scan_dicom([os.fsencode(path)], TAGS, 1)
        if not scan.has_mark:
            continue
        header: Header = {
            field: decode(field, *scan.values[field], scan.is_big_endian)
            for field in ("Rows", "Columns", "NumberOfFrames")
            if field in scan.values
        }
        rows, columns, frames = (
            integer_of(header, field, "a slice", missing=1 if field == "NumberOfFrames" else None)
            for field in ("Rows", "Columns", "NumberOfFrames")
        )
        return rows * columns * frames * len(files)
    return 0

"""Read NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd) through SimpleITK, after checks of our own.

SimpleITK fills missing voxels with 0 HU, replaces missing geometry by 1 mm and identity, and checks
no checksum, all without a word. So the text header is read here too: the data must have exactly the
declared length (inflated to the end where compressed), the geometry must be stated, and SimpleITK
must arrive at the same one.

Shape suffixes: Z Y X voxels. World coordinates are x, y, z.
Source: NRRD definition at teem.sourceforge.net/nrrd/format.html; MetaImage at itk.org/Wiki/MetaIO.
"""

import math
import zlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.orient import Affine, StoredGrid, check_affine, spacing_of, to_lps
from tapct_fast.io.volume import MAX_VOXELS, Volume, to_int16

_MAX_HEADER_BYTES = 2**20
_CHUNK_BYTES = 2**20

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SPACE_TO_RAS = {
    "left-posterior-superior": _LPS_TO_RAS,
    "lps": _LPS_TO_RAS,
    "left-anterior-superior": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "las": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "right-anterior-superior": np.eye(4),
    "ras": np.eye(4),
}
_NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "int8"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "uint8"),
    **dict.fromkeys(("short", "short int", "signed short", "int16", "int16_t"), "int16"),
    **dict.fromkeys(("ushort", "unsigned short", "uint16", "uint16_t"), "uint16"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "int32"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "uint32"),
    "float": "float32",
    "double": "float64",
}
_META_TYPES = {
    "MET_CHAR": "int8",
    "MET_UCHAR": "uint8",
    "MET_SHORT": "int16",
    "MET_USHORT": "uint16",
    "MET_INT": "int32",
    "MET_UINT": "uint32",
    "MET_FLOAT": "float32",
    "MET_DOUBLE": "float64",
}
_ZLIB_WINDOW = {"gzip": 31, "zlib or gzip": 47}  # zlib.decompressobj: which wrapper is accepted


class _Header(NamedTuple):
    """What the text header promises."""

    image_io: str  # SimpleITK's name of the format
    size_xyz: tuple[int, ...]
    dtype: str
    affine: Affine  # voxel x, y, z to RAS+ mm
    data_path: Path
    data_offset: int
    wrapper: str | None  # None where the data are not compressed
    packed_bytes: int | None  # declared size of compressed data


def read_itk(path: Path) -> Volume:
    """Read a CT stored as NRRD or MetaImage; values are rounded to whole HU.

    Returns:
        Volume in canonical LPS.

    Raises:
        InputError: SimpleITK is not installed, or there is no such file.
        FormatError: The file is damaged, not a 3D scalar image, or does not state its geometry.
    """
    return _volume(*_decode(path))


def read_itk_labels(path: Path) -> Volume:
    """Read a label map; ``hu_ZYX`` of the result holds the labels.

    Raises:
        InputError: As for ``read_itk``.
        FormatError: As for ``read_itk``, or a label is not a whole number.
    """
    array_ZYX, affine = _decode(path)
    if np.issubdtype(array_ZYX.dtype, np.floating) and (array_ZYX != np.rint(array_ZYX)).any():
        raise FormatError(
            "voxels", "some labels are not whole numbers; is this a label map?", "dtype"
        )
    return _volume(array_ZYX, affine)


def _volume(array_ZYX: NDArray[np.generic], affine: Affine) -> Volume:
    stored = StoredGrid(array_ZYX.shape, affine)
    hu_ZYX, affine = to_lps(to_int16(array_ZYX, "voxels"), affine)
    return Volume(hu_ZYX=hu_ZYX, spacing_mm=spacing_of(affine), affine=affine, stored=stored)


def _decode(path: Path) -> tuple[NDArray[np.generic], Affine]:
    """Check header and data, then let SimpleITK read, and hold it to the header."""
    if find_spec("SimpleITK") is None:
        raise InputError(
            "reading NRRD and MetaImage needs SimpleITK: pip install 'tapct-fast[itk]'"
        )
    sitk: Any = import_module("SimpleITK")  # Any: it ships no types

    try:
        header = _header(path)
        _check_data(header)
    except OSError as error:
        # Only the reason: the path may hold a patient's name.
        raise InputError(f"the scan cannot be opened: {error.strerror}") from None
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(header.image_io)
    shows_warnings = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # they name the file
    try:
        image = reader.Execute()
    except RuntimeError:
        raise FormatError("file", "SimpleITK cannot read it; it is damaged") from None
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shows_warnings)

    affine_lps = np.eye(4)
    if image.GetDimension() == 3:
        affine_lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine_lps[:3, 3] = image.GetOrigin()
    array_ZYX: NDArray[np.generic] = sitk.GetArrayFromImage(image)
    if (
        array_ZYX.shape != header.size_xyz[::-1]
        or array_ZYX.dtype != header.dtype
        or not np.allclose(_LPS_TO_RAS @ affine_lps, header.affine, rtol=1e-4, atol=1e-3)
    ):
        raise FormatError("header", "SimpleITK understands size, type or geometry in another way")
    return array_ZYX, header.affine


def _header(path: Path) -> _Header:
    with path.open("rb") as file:
        start = file.read(_MAX_HEADER_BYTES)
    header = _nrrd_header(path, start) if start[:4] == b"NRRD" else _meta_header(path, start)
    if len(header.size_xyz) != 3 or min(header.size_xyz) < 1:
        raise FormatError("size", "is not three numbers from 1 up")
    if math.prod(header.size_xyz) > MAX_VOXELS:
        raise FormatError("size", f"{header.size_xyz} (x, y, z) declares more voxels than any CT")
    check_affine(header.affine, field="spacing, direction")
    return header


def _nrrd_header(path: Path, start: bytes) -> _Header:
    head, blank, _ = start.replace(b"\r\n", b"\n").partition(b"\n\n")
    fields: dict[str, str] = {}
    for line in head.decode("utf-8", "replace").split("\n")[1:]:
        name, colon, value = line.partition(":")
        if line.startswith("#") or not colon or value.startswith("="):
            continue  # comments and the user's own key:=value pairs
        _add(fields, name.strip().lower().replace(" ", ""), value.strip())

    if _integers(fields, "dimension") != (3,):
        raise FormatError("dimension", "is not 3; split the file into 3D volumes")
    if not set(fields.get("kinds", "domain").lower().split()) <= {"domain", "space"}:
        raise FormatError("kinds", "an axis is not one of space")
    for field in ("lineskip", "byteskip", "oldmin", "oldmax"):
        if fields.get(field, "0") != "0":
            raise FormatError(field, "is set; write the file again without it")
    if any(unit.strip(' "').lower() != "mm" for unit in fields.get("spaceunits", "mm").split()):
        raise FormatError("space units", "are not mm")
    space = fields.get("space", "").lower()
    if space not in _SPACE_TO_RAS:
        raise FormatError("space", "is missing or does not say which way the patient lies")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise FormatError("encoding", "is not raw or gzip; write the file again with one of them")

    own = np.eye(4)
    directions = _numbers(fields, "spacedirections", 9, strip="(),")
    own[:3, :3] = np.reshape(directions, (3, 3)).T
    own[:3, 3] = _numbers(fields, "spaceorigin", 3, strip="(),")
    detached = fields.get("datafile")
    if detached is None and not blank:
        raise FormatError("header", "does not end")
    header_bytes = _end_of_nrrd_header(start) if detached is None else 0
    return _Header(
        image_io="NrrdImageIO",
        size_xyz=_integers(fields, "sizes"),
        dtype=_type(_NRRD_TYPES, fields.get("type", "").lower(), "type"),
        affine=_SPACE_TO_RAS[space] @ own,
        data_path=path if detached is None else _sibling(path, detached),
        data_offset=header_bytes,
        wrapper=None if encoding == "raw" else "gzip",
        packed_bytes=None,
    )


def _end_of_nrrd_header(start: bytes) -> int:
    ends = [start.find(mark) + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if mark in start]
    return min(ends)


def _meta_header(path: Path, start: bytes) -> _Header:
    fields: dict[str, str] = {}
    offset = 0
    for line in start.splitlines(keepends=True):
        offset += len(line)
        name, equals, value = line.decode("utf-8", "replace").partition("=")
        if not equals:
            break
        _add(fields, name.strip(), value.strip())
        if name.strip() == "ElementDataFile":  # always the last line
            break
    if "ElementDataFile" not in fields:
        raise FormatError("ElementDataFile", "is missing: not a MetaImage, or its header is cut")
    if _integers(fields, "NDims") != (3,):
        raise FormatError("NDims", "is not 3; split the file into 3D volumes")
    for field, plain in (
        ("ObjectType", "Image"),
        ("BinaryData", "True"),
        ("HeaderSize", "0"),
        ("ElementNumberOfChannels", "1"),
        ("ElementToIntensityFunctionSlope", "1"),
        ("ElementToIntensityFunctionOffset", "0"),
    ):
        if fields.get(field, plain).lower() != plain.lower():
            raise FormatError(field, f"is not {plain}, which is all that is read here")

    affine_lps = np.eye(4)
    matrix = _numbers(fields, _alias(fields, "TransformMatrix", "Orientation", "Rotation"), 9)
    # The file lists the direction of x, then of y, then of z: columns of the matrix.
    affine_lps[:3, :3] = np.reshape(matrix, (3, 3)).T
    if np.abs(np.linalg.norm(affine_lps[:3, :3], axis=0) - 1.0).max() > 1e-3:
        raise FormatError("TransformMatrix", "its directions are not of unit length")
    spacing_xyz = _numbers(fields, "ElementSpacing", 3)
    if min(spacing_xyz) <= 0:
        raise FormatError("ElementSpacing", "is not positive")
    affine_lps[:3, :3] *= spacing_xyz
    affine_lps[:3, 3] = _numbers(fields, _alias(fields, "Offset", "Position", "Origin"), 3)
    is_packed = fields.get("CompressedData", "False").lower() == "true"
    packed = _integers(fields, "CompressedDataSize") if "CompressedDataSize" in fields else None
    detached = fields["ElementDataFile"]
    is_local = detached.upper() == "LOCAL"
    return _Header(
        image_io="MetaImageIO",
        size_xyz=_integers(fields, "DimSize"),
        dtype=_type(_META_TYPES, fields.get("ElementType", ""), "ElementType"),
        affine=_LPS_TO_RAS @ affine_lps,
        data_path=path if is_local else _sibling(path, detached),
        data_offset=offset if is_local else 0,
        wrapper="zlib or gzip" if is_packed else None,
        packed_bytes=packed[0] if is_packed and packed else None,
    )


def _check_data(header: _Header) -> None:
    """Refuse data which are not exactly as long as the header says, inflating them to the end."""
    needed = math.prod(header.size_xyz) * np.dtype(header.dtype).itemsize
    try:
        stored = header.data_path.stat().st_size - header.data_offset
    except FileNotFoundError:
        raise FormatError("data file", "the header names a file that is not beside it") from None
    if header.wrapper is None:
        if stored != needed:
            raise FormatError("data", f"{stored} bytes where the header needs {needed}")
        return
    if header.packed_bytes not in (None, stored):
        raise FormatError(
            "CompressedDataSize", f"{header.packed_bytes}, but {stored} bytes are there"
        )
    inflater = zlib.decompressobj(_ZLIB_WINDOW[header.wrapper])
    num_inflated = 0
    try:
        with header.data_path.open("rb") as file:
            file.seek(header.data_offset)
            while num_inflated <= needed and not inflater.eof:
                packed = inflater.unconsumed_tail or file.read(_CHUNK_BYTES)
                chunk = inflater.decompress(packed, _CHUNK_BYTES)
                if not (packed or chunk):
                    break
                num_inflated += len(chunk)
            has_rest = bool(inflater.unused_data or file.read(1))
    except zlib.error:
        raise FormatError(
            "data", "damaged: the compressed stream or its checksum is wrong"
        ) from None
    if num_inflated != needed:
        found = "more" if num_inflated > needed else str(num_inflated)
        raise FormatError("data", f"inflate to {found} bytes where the header needs {needed}")
    if not inflater.eof or has_rest:
        raise FormatError("data", "the compressed stream is cut short or something follows it")


def _add(fields: dict[str, str], name: str, value: str) -> None:
    if name in fields:
        raise FormatError("header", "states a field twice")
    fields[name] = value


def _alias(fields: dict[str, str], *names: str) -> str:
    present = [name for name in names if name in fields]
    if len(present) > 1:
        raise FormatError(names[0], "is stated twice under different names")
    return present[0] if present else names[0]


def _numbers(
    fields: dict[str, str], field: str, count: int, *, strip: str = ""
) -> tuple[float, ...]:
    if field not in fields:
        raise FormatError(field, "missing; without it the voxels have no place in the patient")
    text = fields[field].translate(str.maketrans(strip, " " * len(strip)))
    try:
        numbers = tuple(float(word) for word in text.split())
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise FormatError(field, f"is not {count} finite numbers")
    return numbers


def _integers(fields: dict[str, str], field: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in fields[field].split())
    except (KeyError, ValueError):
        raise FormatError(field, "missing or not made of whole numbers") from None


def _type(known: dict[str, str], name: str, field: str) -> str:
    if name not in known:
        raise FormatError(field, f"is missing or not one of {', '.join(sorted(known))}")
    return known[name]


def _sibling(path: Path, name: str) -> Path:
    """Return the data file beside a header; a header may not point anywhere else."""
    if not name or "/" in name or "\\" in name or name.upper().startswith("LIST") or "%" in name:
        raise FormatError("data file", "is not one plain file name beside the header")
    return path.with_name(name)

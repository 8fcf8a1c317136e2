"""Read one DICOM file as one CT slice: parse, check every field that decides the voxels, decode.

pydicom warns and logs with values from the file, so both are silenced while it runs, and its errors
are replaced by a ``FormatError`` that names the field and the file's place in name order. No text
from a file is ever repeated: a hostile or careless file may hold a name in any field.

Shape suffixes: S rows or columns as stored.
"""

import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.volume import INT16_MAX, INT16_MIN, to_int16

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_MAX_MATRIX = 8192  # rows or columns; scanners reconstruct up to 2048
_MAX_SLICE_BYTES = 2**28  # of one file, packed or inflated: 8192 x 8192 int16 and room for headers
_CHUNK_BYTES = 2**20

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
DICOMDIR = "1.2.840.10008.1.3.10"

# Slices of one scan agree on these.
SHARED_FIELDS = ("PatientID", "FrameOfReferenceUID", "SeriesNumber", "ConvolutionKernel")

_PIXEL_TAGS = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "PixelPaddingValue"),
)

_META_TAGS = ("TransferSyntaxUID", "MediaStorageSOPClassUID")

_HEADER_TAGS = [
    *SHARED_FIELDS,
    *("SOPClassUID", "Modality", "ImageType", "StudyInstanceUID", "SeriesInstanceUID"),
    *_PIXEL_TAGS,
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "GantryDetectorTilt"),
]


class DicomFile(NamedTuple):
    """The header of one file and the words that name it in an error."""

    path: Path
    header: dict[str, Any]  # values by keyword; absent fields are absent
    place: str  # "file 3 of 40"


def _damage() -> tuple[type[Exception], ...]:
    """Return what pydicom, its decoders and number conversion raise on damaged bytes."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (
        *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NameError),
        *(
            NotImplementedError,
            OSError,
            RuntimeError,
            SystemError,
            TypeError,
            ValueError,
            UserWarning,
        ),
        *(struct.error, zlib.error, BytesLengthException, InvalidDicomError),
    )


@contextmanager
def silence_pydicom() -> Iterator[None]:
    """Keep pydicom's warnings and log records, which quote values, from reaching anybody."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    if find_spec("pydicom") is None:
        raise InputError("reading DICOM needs pydicom: pip install 'tapct-fast[dicom]'")
    logger = logging.getLogger("pydicom")
    logger.addFilter(drop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(drop)


def is_dicom(path: Path, place: str = "the file") -> bool:
    """Tell a DICOM file from a bystander by its content.

    Raises:
        FormatError: The file cannot be opened, or it is empty or damaged where its name promises a
            slice: passing over it would lose a slice.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise FormatError("file", f"{place} cannot be opened: {error.strerror}") from None
    if start[128:132] == b"DICM":
        return True
    if not start:
        raise FormatError("file", f"{place} is empty; copy the series again, or remove the file")
    suffix = path.suffix.lower()
    is_text = all(byte in b"\t\n\r\f" or 32 <= byte < 127 or byte >= 128 for byte in start)
    is_nameless = suffix == "" or suffix[1:].isdigit()  # a UID or a number, or a README
    if suffix in DICOM_SUFFIXES or (is_nameless and not is_text):
        raise FormatError(
            "file", f"{place} has no DICM mark at byte 128: damaged, or not DICOM; remove it"
        )
    return False


def read_header(path: Path, place: str) -> dict[str, Any]:
    """Return the fields of one file that decide the volume, by keyword.

    Raises:
        FormatError: The file is damaged, or a field cannot be decoded.
    """
    dataset = _parse(path, place, _HEADER_TAGS)
    header = {}
    for part, fields in ((dataset.file_meta, _META_TAGS), (dataset, _HEADER_TAGS)):
        for field in fields:
            try:
                if field in part:
                    header[field] = part[field].value
            except _damage():
                raise FormatError(field, f"cannot be decoded in {place}") from None
    return header


def _parse(path: Path, place: str, tags: Sequence[str]) -> "Dataset":
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    try:
        if path.stat().st_size > _MAX_SLICE_BYTES:
            raise FormatError("file", f"{place} is larger than any slice of a CT")
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            _check_deflated(path, 144 + int(meta.FileMetaInformationGroupLength), place)
        return dcmread(path, specific_tags=list(tags), stop_before_pixels="PixelData" not in tags)
    except FormatError:
        raise
    except OSError as error:
        raise FormatError("file", f"{place} cannot be read: {error.strerror}") from None
    except _damage():
        raise FormatError("file", f"{place} cannot be parsed as DICOM; it is damaged") from None


def _check_deflated(path: Path, offset: int, place: str) -> None:
    """Refuse a deflated data set that is cut short or grows beyond any slice."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    packed = path.read_bytes()[offset:]
    size = 0
    while not inflater.eof:
        chunk = inflater.decompress(packed, _CHUNK_BYTES)
        if not (packed or chunk):
            raise FormatError("file", f"{place} is cut short: its deflated data do not end")
        packed = inflater.unconsumed_tail
        size += len(chunk)
        if size > _MAX_SLICE_BYTES:
            raise FormatError("file", f"{place} inflates to more than any slice of a CT")


def check_slice(file: DicomFile) -> None:
    """Refuse a file that is not one axial slice with a linear way to HU."""
    if text_of(file, "Modality") != "CT":
        raise FormatError("Modality", f"{file.place} is not CT")
    sop_class = text_of(file, "SOPClassUID")
    if sop_class in MULTI_FRAME_CT or integer_of(file, "NumberOfFrames", missing=1) != 1:
        raise FormatError(
            "SOPClassUID" if sop_class in MULTI_FRAME_CT else "NumberOfFrames",
            f"{file.place} is an enhanced (multi-frame) CT object; "
            "convert it to single slices or to NIfTI first, for example with dcm2niix",
        )
    if sop_class not in ("", CT_IMAGE):
        raise FormatError("SOPClassUID", f"{file.place} is not a CT image (a screen capture?)")
    if is_localizer(file):
        raise FormatError("ImageType", f"{file.place} is a localizer; move it out of the folder")

    for field in ("Rows", "Columns"):
        if not 1 <= integer_of(file, field) <= _MAX_MATRIX:
            raise FormatError(
                field, f"{integer_of(file, field)} in {file.place} is not in 1..{_MAX_MATRIX}"
            )
    bits = integer_of(file, "BitsStored")
    for field, allowed in (
        ("SamplesPerPixel", (1,)),
        ("BitsAllocated", (16,)),
        ("BitsStored", tuple(range(1, 17))),
        ("HighBit", (bits - 1,)),
        ("PixelRepresentation", (0, 1)),
    ):
        if integer_of(file, field) not in allowed:
            raise FormatError(
                field, f"{integer_of(file, field)} in {file.place} is not that of a CT"
            )
    if text_of(file, "PhotometricInterpretation") != "MONOCHROME2":
        raise FormatError("PhotometricInterpretation", f"{file.place} is not MONOCHROME2")

    if "ModalityLUTSequence" in file.header:
        raise FormatError("ModalityLUTSequence", f"{file.place} maps to HU by a table")
    if text_of(file, "RescaleType") not in ("", "HU", "US"):  # US: unspecified, as GE writes for HU
        raise FormatError("RescaleType", f"{file.place} holds no HU (a dual-energy or other map)")
    numbers_of(file, "RescaleIntercept", 1)
    if numbers_of(file, "RescaleSlope", 1)[0] == 0.0:
        raise FormatError("RescaleSlope", f"is 0 in {file.place}")


def read_hu(file: DicomFile, rows: int, columns: int) -> NDArray[np.int16]:
    """Decode one slice and apply its slope and intercept."""
    stored_SS = _read_stored(file, rows, columns)
    bits, is_signed = integer_of(file, "BitsStored"), integer_of(file, "PixelRepresentation") == 1
    is_padding_SS = np.zeros(stored_SS.shape, bool)
    if text_of(file, "PixelPaddingValue"):
        padding = integer_of(file, "PixelPaddingValue") & 0xFFFF  # written signed or unsigned
        is_padding_SS = stored_SS & 0xFFFF == padding
    measured = stored_SS[~is_padding_SS]
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed else (0, (1 << bits) - 1)
    if measured.size and not (low <= measured.min() and measured.max() <= high):
        raise FormatError(
            "BitsStored", f"{file.place} has values beyond {bits} bits (an overlay in them?)"
        )

    slope, intercept = (
        numbers_of(file, field, 1)[0] for field in ("RescaleSlope", "RescaleIntercept")
    )
    hu_SS = np.rint(stored_SS * slope + intercept)
    # Padding is no measurement: -32768 - 1024 must not condemn the scan, 63536 not look like metal.
    hu_SS[is_padding_SS & ((hu_SS < INT16_MIN) | (hu_SS > INT16_MAX))] = INT16_MIN
    return to_int16(hu_SS, "RescaleSlope, RescaleIntercept")


def _read_stored(file: DicomFile, rows: int, columns: int) -> NDArray[np.int32]:
    """Decode the stored values of one slice."""
    from pydicom.encaps import generate_frames
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array
    from pydicom.uid import UID, RLELossless

    syntax = file.header.get("TransferSyntaxUID")
    if not isinstance(syntax, UID) or not syntax.is_transfer_syntax:
        raise FormatError("TransferSyntaxUID", f"missing or unknown in {file.place}")
    dataset = _parse(file.path, file.place, [*_PIXEL_TAGS, "PixelData"])
    try:
        data = dataset.PixelData if "PixelData" in dataset else None
    except _damage():
        data = None
    if not isinstance(data, bytes):
        raise FormatError("PixelData", f"missing in {file.place}; the file may be cut short")
    if not syntax.is_encapsulated:
        if len(data) != 2 * rows * columns:
            raise FormatError(
                "PixelData",
                f"{file.place} has {len(data)} bytes where Rows and Columns need "
                f"{2 * rows * columns}",
            )
        order = "<" if syntax.is_little_endian else ">"
        sign = "i" if integer_of(file, "PixelRepresentation") else "u"
        native = np.frombuffer(data, f"{order}{sign}2")
        return native.reshape(rows, columns).astype(np.int32)

    try:
        if not get_decoder(syntax).is_available:
            raise InputError(
                "no decoder for this series' compression: pip install 'tapct-fast[dicom]'"
            )
    except NotImplementedError:
        raise FormatError(
            "TransferSyntaxUID", f"{file.place} has a syntax without decoder"
        ) from None
    try:
        frames = list(generate_frames(data, number_of_frames=1))
        if len(frames) != 1:
            raise FormatError("PixelData", f"{file.place} holds {len(frames)} images, not one")
        # Decoders fill the rest of a cut JPEG, JPEG-LS or JPEG 2000 stream without a word.
        if syntax != RLELossless and not frames[0].rstrip(b"\0").endswith(b"\xff\xd9"):
            raise FormatError("PixelData", f"{file.place} is cut short: its image does not end")
        if syntax != RLELossless and _stream_size(frames[0]) != (1, rows, columns):
            raise FormatError("PixelData", f"{file.place} holds another size than Rows x Columns")
        with warnings.catch_warnings():
            # pydicom drops what an RLE segment holds beyond Rows x Columns, and only warns.
            warnings.filterwarnings("error", message="The decoded RLE segment")
            decoded = pixel_array(dataset, raw=True)
    except FormatError:
        raise
    except _damage():
        raise FormatError("PixelData", f"{file.place} cannot be decoded; it is damaged") from None
    if decoded.shape != (rows, columns) or decoded.dtype.itemsize != 2:
        raise FormatError("PixelData", f"{file.place} decodes to another size than Rows x Columns")
    return decoded.astype(np.int32)


def _stream_size(stream: bytes) -> tuple[int, int, int]:
    """Return samples, rows and columns which a JPEG, JPEG-LS or JPEG 2000 stream declares itself.

    Decoders believe the stream: one of 60000 x 60000 fills memory, and one of 512 rows under a
    header of 256 gives half an image.
    Source: ITU-T T.81 B.2.2, T.87 C.2.2 and T.800 A.5.1.
    """
    if stream[:4] == b"\xff\x4f\xff\x51":
        right, bottom, left, top = struct.unpack_from(">4I", stream, 8)
        return int.from_bytes(stream[40:42], "big"), bottom - top, right - left
    place = 2
    while stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns, samples = struct.unpack_from(">HHB", stream, place + 5)
            return samples, rows, columns
        place += 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
    raise ValueError("no frame header")


def text_of(file: DicomFile, field: str) -> str:
    """Return a field as text for comparisons, never for a message."""
    return str(file.header.get(field) or "")


def is_localizer(file: DicomFile) -> bool:
    """Tell a localizer (scout, topogram) from a slice."""
    return "LOCALIZER" in text_of(file, "ImageType").upper()


def numbers_of(
    file: DicomFile, field: str, count: int, *, missing: float | None = None
) -> tuple[float, ...]:
    """Return a field as that many finite numbers."""
    value = file.header.get(field)
    if value is None or value == "":
        if missing is not None:
            return (float(missing),) * count
        raise FormatError(field, f"missing in {file.place}")
    try:
        # A text would pass as a sequence of digits.
        items = [value] if count == 1 or isinstance(value, str) else list(value)
        numbers = tuple(float(item) for item in items)
    except (TypeError, ValueError, OverflowError):
        raise FormatError(field, f"is not {count} number(s) in {file.place}") from None
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise FormatError(field, f"is not {count} finite number(s) in {file.place}")
    return numbers


def integer_of(file: DicomFile, field: str, *, missing: float | None = None) -> int:
    """Return a field as a whole number; see ``numbers_of``."""
    (number,) = numbers_of(file, field, 1, missing=missing)
    if not number.is_integer():
        raise FormatError(field, f"is not a whole number in {file.place}")
    return int(number)

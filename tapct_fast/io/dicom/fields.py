"""The DICOM fields that decide a CT volume: their tags, their values, the transfer syntaxes.

No text of a file is ever repeated in an error: a careless file may hold a name in any field.

Source: DICOM PS3.6 (data dictionary, UIDs), PS3.5 6.2 (value representations).
"""

import math
import struct
from typing import Any, NamedTuple

from tapct_fast.errors import FormatError

Header = dict[str, Any]  # values by keyword; absent fields are absent

# keyword: (tag, value representation where the file does not say it)
FIELDS: dict[str, tuple[int, str]] = {
    "MediaStorageSOPClassUID": (0x00020002, "UI"),
    "TransferSyntaxUID": (0x00020010, "UI"),
    "ImageType": (0x00080008, "CS"),
    "SOPClassUID": (0x00080016, "UI"),
    "Modality": (0x00080060, "CS"),
    "PatientID": (0x00100020, "LO"),
    "SliceThickness": (0x00180050, "DS"),
    "SpacingBetweenSlices": (0x00180088, "DS"),
    "GantryDetectorTilt": (0x00181120, "DS"),
    "ConvolutionKernel": (0x00181210, "SH"),
    "StudyInstanceUID": (0x0020000D, "UI"),
    "SeriesInstanceUID": (0x0020000E, "UI"),
    "SeriesNumber": (0x00200011, "IS"),
    "ImagePositionPatient": (0x00200032, "DS"),
    "ImageOrientationPatient": (0x00200037, "DS"),
    "FrameOfReferenceUID": (0x00200052, "UI"),
    "SamplesPerPixel": (0x00280002, "US"),
    "PhotometricInterpretation": (0x00280004, "CS"),
    "NumberOfFrames": (0x00280008, "IS"),
    "Rows": (0x00280010, "US"),
    "Columns": (0x00280011, "US"),
    "PixelSpacing": (0x00280030, "DS"),
    "BitsAllocated": (0x00280100, "US"),
    "BitsStored": (0x00280101, "US"),
    "HighBit": (0x00280102, "US"),
    "PixelRepresentation": (0x00280103, "US"),
    "PixelPaddingValue": (0x00280120, "US"),
    "RescaleIntercept": (0x00281052, "DS"),
    "RescaleSlope": (0x00281053, "DS"),
    "RescaleType": (0x00281054, "LO"),
    "LossyImageCompression": (0x00282110, "CS"),
    "ModalityLUTSequence": (0x00283000, "SQ"),
}
TAGS = [(keyword, tag) for keyword, (tag, _) in FIELDS.items()]

_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}


class Syntax(NamedTuple):
    """A transfer syntax; its pixels are compressed where ``is_encapsulated``."""

    name: str
    is_encapsulated: bool = True
    is_lossy: bool | None = False  # None: the stream says


SYNTAXES: dict[str, Syntax] = {
    "1.2.840.10008.1.2": Syntax("implicit little endian", is_encapsulated=False),
    "1.2.840.10008.1.2.1": Syntax("explicit little endian", is_encapsulated=False),
    "1.2.840.10008.1.2.1.99": Syntax("deflated explicit little endian", is_encapsulated=False),
    "1.2.840.10008.1.2.2": Syntax("explicit big endian", is_encapsulated=False),
    "1.2.840.10008.1.2.4.50": Syntax("JPEG baseline", is_lossy=True),
    "1.2.840.10008.1.2.4.51": Syntax("JPEG extended", is_lossy=True),
    "1.2.840.10008.1.2.4.57": Syntax("JPEG lossless"),
    "1.2.840.10008.1.2.4.70": Syntax("JPEG lossless, first order"),
    "1.2.840.10008.1.2.4.80": Syntax("JPEG-LS lossless"),
    "1.2.840.10008.1.2.4.81": Syntax("JPEG-LS near-lossless", is_lossy=None),
    "1.2.840.10008.1.2.4.90": Syntax("JPEG 2000 lossless"),
    "1.2.840.10008.1.2.4.91": Syntax("JPEG 2000", is_lossy=None),
    "1.2.840.10008.1.2.4.201": Syntax("high-throughput JPEG 2000 lossless"),
    "1.2.840.10008.1.2.4.202": Syntax("high-throughput JPEG 2000 lossless RPCL"),
    "1.2.840.10008.1.2.4.203": Syntax("high-throughput JPEG 2000", is_lossy=None),
    "1.2.840.10008.1.2.5": Syntax("RLE lossless"),
}


def decode(field: str, vr: str, raw: bytes, is_big_endian: bool) -> Any:
    """Return a stored value: text, a number, a tuple of numbers, or True for a sequence.

    Raises:
        ValueError: The bytes are no whole number of values.
    """
    if vr in ("", "UN"):
        vr = FIELDS[field][1]
    if vr == "SQ":
        return True
    if vr not in _BINARY:
        return raw.decode("latin-1").strip(" \0")
    layout = struct.Struct((">" if is_big_endian else "<") + _BINARY[vr])
    if len(raw) % layout.size:
        raise ValueError("not a whole number of values")
    numbers = tuple(number for (number,) in layout.iter_unpack(raw))
    return numbers[0] if len(numbers) == 1 else numbers or ""


def text_of(header: Header, field: str) -> str:
    """Return a field as text for comparisons, never for a message."""
    value = header.get(field)
    return "" if value is None else str(value)


def numbers_of(
    header: Header, field: str, count: int, place: str, *, missing: float | None = None
) -> tuple[float, ...]:
    """Return a field as that many finite numbers."""
    value = header.get(field)
    if value is None or value == "":
        if missing is not None:
            return (float(missing),) * count
        raise FormatError(field, f"missing in {place}", "header")
    if isinstance(value, str):
        items: list[Any] = value.split("\\")
    else:
        items = [value] if isinstance(value, int | float) else list(value)
    try:
        if any(isinstance(item, str) and "_" in item for item in items):
            raise ValueError("Python reads 1_0 as 10")
        numbers = tuple(float(item) for item in items)
    except (TypeError, ValueError, OverflowError):
        raise FormatError(field, f"is not {count} number(s) in {place}", "header") from None
    if len(numbers) != count:
        raise FormatError(field, f"is not {count} number(s) in {place}", "header")
    if not all(map(math.isfinite, numbers)):
        raise FormatError(field, f"is not finite in {place}", "header")
    return numbers


def integer_of(header: Header, field: str, place: str, *, missing: float | None = None) -> int:
    """Return a field as a whole number; see ``numbers_of``."""
    (number,) = numbers_of(header, field, 1, place, missing=missing)
    if not number.is_integer():
        raise FormatError(field, f"is not a whole number in {place}", "header")
    return int(number)

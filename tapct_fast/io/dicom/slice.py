"""Check every field of one DICOM slice that decides its voxels, and read slices as HU.

No text from a file is ever repeated: a hostile or careless file may hold a name in any field.

Shape suffixes: Z Y X voxels.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tapct_fast import _native
from tapct_fast.errors import FormatError
from tapct_fast.io.dicom.codec import FrameJob
from tapct_fast.io.dicom.decode import decode_frames
from tapct_fast.io.dicom.fields import SYNTAXES, Header, Syntax, integer_of, numbers_of, text_of
from tapct_fast.io.dicom.file import CT_IMAGE, DicomFile

MAX_MATRIX = 8192  # rows or columns; scanners reconstruct up to 2048

# What ``check_slice`` judges: slices that agree in all of these need one check.
SLICE_FIELDS = (
    *("TransferSyntaxUID", "SOPClassUID", "Modality", "ImageType", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("PhotometricInterpretation", "NumberOfFrames", "PixelPaddingValue", "RescaleSlope"),
    *("RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
)


def check_slice(file: DicomFile) -> None:
    """Refuse a file that is not one slice with a linear way to HU."""
    header, place = file.header, file.place
    if text_of(header, "Modality") != "CT":
        raise FormatError("Modality", f"{place} is not CT", "unsupported")
    if integer_of(header, "NumberOfFrames", place, missing=1) != 1:
        raise FormatError(
            "NumberOfFrames",
            f"{place} is a multi-frame object of another kind than enhanced CT; "
            "convert it to single slices or to NIfTI first, for example with dcm2niix",
            "unsupported",
        )
    if text_of(header, "SOPClassUID") not in ("", CT_IMAGE):
        raise FormatError(
            "SOPClassUID", f"{place} is not a CT image (a screen capture?)", "unsupported"
        )
    if is_localizer(header):
        raise FormatError(
            "ImageType", f"{place} is a localizer; move it out of the folder", "unsupported"
        )
    syntax_of(file)

    for field in ("Rows", "Columns"):
        size = integer_of(header, field, place)
        if not 1 <= size <= MAX_MATRIX:
            raise FormatError(field, f"{size} in {place} is not in 1..{MAX_MATRIX}", "dims")
    bits = integer_of(header, "BitsStored", place)
    for field, allowed in (
        ("SamplesPerPixel", (1,)),
        ("BitsAllocated", (16,)),
        ("BitsStored", tuple(range(1, 17))),
        ("HighBit", (bits - 1,)),
        ("PixelRepresentation", (0, 1)),
    ):
        number = integer_of(header, field, place)
        if number not in allowed:
            raise FormatError(field, f"{number} in {place} is not that of a CT", "dtype")
    if text_of(header, "PhotometricInterpretation") != "MONOCHROME2":
        raise FormatError("PhotometricInterpretation", f"{place} is not MONOCHROME2", "unsupported")

    if "ModalityLUTSequence" in header:
        raise FormatError("ModalityLUTSequence", f"{place} maps to HU by a table", "rescale")
    # US: unspecified, as GE writes for HU.
    if text_of(header, "RescaleType") not in ("", "HU", "US"):
        raise FormatError(
            "RescaleType", f"{place} holds no HU (a dual-energy or other map)", "rescale"
        )
    numbers_of(header, "RescaleIntercept", 1, place)
    if numbers_of(header, "RescaleSlope", 1, place)[0] == 0.0:
        raise FormatError("RescaleSlope", f"is 0 in {place}", "rescale")
    if text_of(header, "PixelPaddingValue"):
        integer_of(header, "PixelPaddingValue", place)


def is_localizer(header: Header) -> bool:
    """Tell a localizer (scout, topogram) from a slice."""
    return "LOCALIZER" in text_of(header, "ImageType").upper()


def syntax_of(file: DicomFile) -> Syntax:
    """Return the transfer syntax of a slice."""
    syntax = SYNTAXES.get(text_of(file.header, "TransferSyntaxUID"))
    if syntax is None:
        raise FormatError(
            "TransferSyntaxUID",
            f"unknown in {file.place}; convert the series to explicit little endian",
            "unsupported",
        )
    return syntax


@dataclass(frozen=True, slots=True)
class _StoredSlice:
    """One slice for ``_native.read_slices``."""

    source: bytes | memoryview
    place: str
    index: int
    pixel_offset: int
    pixel_bytes: int
    deflated_at: int | None
    is_big_endian: bool
    is_signed: bool
    bits_stored: int
    padding: int | None
    slope: float
    intercept: float


def read_slices(
    files: Sequence[DicomFile], rows: int, columns: int, threads: int
) -> NDArray[np.int16]:
    """Read slices, which ``check_slice`` has passed, in their order.

    Returns:
        ``hu_ZYX``: round_half_even(stored * slope + intercept) by each slice's own header. Padding
        that leaves int16 is -32768.

    Raises:
        InputError: The decoder of a compressed slice is not installed.
        FormatError: Pixels are missing, damaged, or too few or too many.
    """
    for file in files:
        if file.pixel_offset is None:
            raise FormatError(
                "PixelData", f"missing in {file.place}; the file may be cut short", "integrity"
            )
        if (file.pixel_bytes is None) != syntax_of(file).is_encapsulated:
            raise FormatError(
                "PixelData", f"{file.place} stores it against its transfer syntax", "integrity"
            )
    hu_ZYX = np.empty((len(files), rows, columns), np.int16)
    plain = [(z, file) for z, file in enumerate(files) if file.pixel_bytes is not None]
    at_hand = [_stored(file, file.source, z) for z, file in plain if not callable(file.source)]
    _native.read_slices(hu_ZYX, at_hand, threads)
    # Entries of an archive are inflated a few at a time: all of them would double the memory.
    packed = [(z, file) for z, file in plain if callable(file.source)]
    for start in range(0, len(packed), threads):
        batch = [
            _stored(file, memoryview(file.source()), z)
            for z, file in packed[start : start + threads]
            if callable(file.source)
        ]
        _native.read_slices(hu_ZYX, batch, threads)

    encapsulated = [(z, file) for z, file in enumerate(files) if file.pixel_bytes is None]
    if not encapsulated:
        return hu_ZYX
    jobs = [_job(file, rows, columns) for _, file in encapsulated]
    for (z, file), stored_SS in zip(encapsulated, decode_frames(jobs), strict=True):
        pixels = stored_SS.reshape(-1).view(np.uint8).data
        slice_ = replace(
            _stored(file, pixels, z),
            pixel_offset=0,
            pixel_bytes=len(pixels),
            is_big_endian=False,
            deflated_at=None,
        )
        _native.read_slices(hu_ZYX, [slice_], 1)
    return hu_ZYX


def _stored(file: DicomFile, source: bytes | memoryview, index: int) -> _StoredSlice:
    header, place = file.header, file.place
    padding = None
    if text_of(header, "PixelPaddingValue"):  # written signed or unsigned
        padding = integer_of(header, "PixelPaddingValue", place) & 0xFFFF
    return _StoredSlice(
        source,
        place,
        index,
        file.pixel_offset or 0,
        file.pixel_bytes or 0,
        file.deflated_at,
        file.is_big_endian,
        integer_of(header, "PixelRepresentation", place) == 1,
        integer_of(header, "BitsStored", place),
        padding,
        *(numbers_of(header, field, 1, place)[0] for field in ("RescaleSlope", "RescaleIntercept")),
    )


def _job(file: DicomFile, rows: int, columns: int) -> FrameJob:
    return FrameJob(
        lambda: read_stream(file),
        text_of(file.header, "TransferSyntaxUID"),
        rows,
        columns,
        integer_of(file.header, "BitsStored", file.place),
        integer_of(file.header, "PixelRepresentation", file.place) == 1,
        file.place,
    )


def read_stream(file: DicomFile) -> bytes:
    """Return the one compressed image of an encapsulated slice, its fragments joined.

    Source: DICOM PS3.5 A.4.
    """
    assert file.pixel_offset is not None
    if file.stream is not None:
        return file.stream
    if isinstance(file.source, bytes):
        try:
            with open(file.source, "rb") as content:  # noqa: PTH123  # a path of bytes
                content.seek(file.pixel_offset)
                value = content.read()
        except OSError as error:
            raise FormatError(
                "file", f"{file.place} cannot be read: {error.strerror}", "integrity"
            ) from None
    else:
        assert callable(file.source)
        value = bytes(memoryview(file.source())[file.pixel_offset :])
    table, *fragments = _fragments(value, file.place)
    if len(table) > 4:
        num_images = len(table) // 4
        raise FormatError("PixelData", f"{file.place} holds {num_images} images, not one", "dims")
    if not fragments:
        raise FormatError("PixelData", f"{file.place} holds no image", "integrity")
    return b"".join(fragments)


def _fragments(value: bytes, place: str) -> list[bytes]:
    """Return the items of an encapsulated value, the offset table first."""
    items: list[bytes] = []
    at = 0
    while at + 8 <= len(value):
        group, element, length = struct.unpack_from("<HHI", value, at)
        at += 8
        if (group, element, length) == (0xFFFE, 0xE0DD, 0) and items:
            return items
        if (group, element) != (0xFFFE, 0xE000):
            raise FormatError("PixelData", f"{place} cannot be decoded; it is damaged", "integrity")
        if length > len(value) - at:
            break
        items.append(value[at : at + length])
        at += length
    raise FormatError(
        "PixelData", f"{place} is cut short: its compressed image does not end", "integrity"
    )


def is_lossy(files: Iterable[DicomFile]) -> bool:
    """Say whether a slice went through a compression that changed its voxels."""
    for file in files:
        if text_of(file.header, "LossyImageCompression") == "01":
            return True
        lossy = syntax_of(file).is_lossy
        if lossy is None and file.pixel_offset is not None and file.pixel_bytes is None:
            lossy = _is_lossy_stream(read_stream(file))
        if lossy:
            return True
    return False


def _is_lossy_stream(stream: bytes) -> bool:
    """Read JPEG-LS's NEAR and JPEG 2000's wavelet off the stream's own header.

    A stream that has neither counts as lossy; decoding it will say what is wrong.
    Source: ITU-T T.87 C.2.3 and T.800 A.6.1.
    """
    at = 2
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0x52:  # COD: 0 is the irreversible 9-7 wavelet
            return stream[at + 13 : at + 14] != b"\1"
        if marker == 0xDA:  # SOS: NEAR follows the components
            num_components = stream[at + 4]
            return stream[at + 5 + 2 * num_components : at + 6 + 2 * num_components] != b"\0"
        at += 2 + length
    return True

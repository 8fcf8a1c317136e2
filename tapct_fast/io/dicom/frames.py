"""Read an enhanced (multi-frame) CT object as the slices it holds.

What one file says of one slice in a classic series, a multi-frame object says in functional groups:
sequences that either all frames share or that each frame has for itself. They are merged into one
header per frame, in the words of a classic file, so that all checks of a series hold here too.

Source: DICOM PS3.3 C.7.6.16 and A.38.
"""

import io
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tapct_fast.errors import FormatError
from tapct_fast.io.dicom.codec import FrameJob, Pixels
from tapct_fast.io.dicom.errors import damage, silence_pydicom
from tapct_fast.io.volume import MAX_VOXELS

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

ENHANCED_CT, LEGACY_CONVERTED_CT = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"
MAX_FRAMES = 16384  # a whole body at 0.2 mm is 10,000
_MAX_FILE_BYTES = 2 * MAX_VOXELS + 2**28
_MAX_MATRIX = 8192
_DEFLATED = "1.2.840.10008.1.2.1.99"

# Said once for the whole object.
_OBJECT_FIELDS = (
    *("SOPClassUID", "Modality", "ImageType", "StudyInstanceUID", "SeriesInstanceUID"),
    *("PatientID", "FrameOfReferenceUID", "SeriesNumber"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PixelPaddingValue"),
)
_DETAILS = ("ConvolutionKernel", "GantryDetectorTilt")
# Sequence of a functional group -> what it says of a frame.
_GROUPS = {
    "PixelMeasuresSequence": ("PixelSpacing",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "CTImageFrameTypeSequence": ("FrameType",),
    "CTReconstructionSequence": ("ConvolutionKernel",),
    "CTAcquisitionDetailsSequence": ("GantryDetectorTilt",),
    "UnassignedSharedConvertedAttributesSequence": _DETAILS,
    "UnassignedPerFrameConvertedAttributesSequence": _DETAILS,
}
_SHARED, _PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
_REQUIRED = {
    field: group
    for group, fields in _GROUPS.items()
    for field in fields
    if field.startswith(("Pixel", "Image")) or field in ("RescaleSlope", "RescaleIntercept")
}


class MultiFrame(NamedTuple):
    """An enhanced CT object: one header for each frame, and its pixels.

    Attributes:
        headers: Values by keyword as of a classic slice; ``ImageType`` is that of the frame.
            ``NumberOfFrames`` is left out.
        places: ``frame 3 of 40 of file 1 of 1``, for errors.
        syntax: TransferSyntaxUID.
        streams: The compressed bytes of each frame; empty where pixels are not compressed.
        native: The uncompressed pixels of all frames; empty where they are compressed.
    """

    headers: tuple[dict[str, Any], ...]
    places: tuple[str, ...]
    syntax: str
    streams: tuple[bytes, ...]
    native: memoryview

    @property
    def is_compressed(self) -> bool:
        """Whether frames are to be decoded (``job``) or only viewed (``stored``)."""
        return bool(self.streams)

    def job(self, index: int) -> FrameJob:
        """Return what decodes one compressed frame."""
        header = self.headers[index]
        return FrameJob(
            self.streams[index],
            self.syntax,
            int(header["Rows"]),
            int(header["Columns"]),
            int(header["BitsStored"]),
            header["PixelRepresentation"] == 1,
            self.places[index],
        )

    def stored(self, index: int) -> Pixels:
        """Return a view of one uncompressed frame, before slope and intercept."""
        from pydicom.uid import UID

        header = self.headers[index]
        rows, columns = int(header["Rows"]), int(header["Columns"])
        order = "<" if UID(self.syntax).is_little_endian else ">"
        sign = "i" if header["PixelRepresentation"] == 1 else "u"
        num_bytes = 2 * rows * columns
        part = self.native[index * num_bytes : (index + 1) * num_bytes]
        return np.frombuffer(part, f"{order}{sign}2").reshape(rows, columns)


def read_multi_frame(source: Path | bytes, place: str) -> MultiFrame:
    """Read the headers and the pixels, still compressed, of an enhanced CT object.

    Args:
        source: The file, or its content.
        place: Names the file in an error: ``file 1 of 1``.

    Raises:
        InputError: pydicom is not installed.
        FormatError: The file is damaged, lacks a functional group, or contradicts itself. Compare
            with ``check_slice`` what a header may say; here only what places pixels is checked.
    """
    with silence_pydicom():
        dataset = _parse(source, place, None)
        syntax = _syntax(dataset, place)
        headers, places = _headers(dataset, place)
        for header in headers:
            header["TransferSyntaxUID"] = syntax
        num_bytes = 2 * int(headers[0]["Rows"]) * int(headers[0]["Columns"]) * len(headers)
        pixels = _parse(source, place, ["PixelData", "ExtendedOffsetTable", *_LENGTHS])
        data = _value(pixels, "PixelData", place)
        if not isinstance(data, bytes):
            raise FormatError("PixelData", f"missing in {place}; the file may be cut short")
        if syntax.is_encapsulated:
            streams = _streams(pixels, data, len(headers), place)
            return MultiFrame(headers, places, str(syntax), streams, memoryview(b""))
    if len(data) != num_bytes:
        raise FormatError(
            "PixelData",
            f"{place} has {len(data)} bytes where Rows, Columns, NumberOfFrames need {num_bytes}",
        )
    return MultiFrame(headers, places, str(syntax), (), memoryview(data))


_LENGTHS = ("ExtendedOffsetTableLengths", "NumberOfFrames")


def _parse(source: Path | bytes, place: str, tags: list[str] | None) -> "Dataset":
    """Parse the header, or these tags."""
    from pydicom import dcmread

    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise FormatError("file", f"{place} is larger than any CT", "limit")
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        return dcmread(file, stop_before_pixels=tags is None, specific_tags=tags)
    except FormatError:
        raise
    except OSError as error:
        raise FormatError("file", f"{place} cannot be read: {error.strerror}") from None
    except damage():
        raise FormatError("file", f"{place} cannot be parsed as DICOM; it is damaged") from None


def _syntax(dataset: "Dataset", place: str) -> Any:
    from pydicom.uid import UID

    syntax = _value(dataset.file_meta, "TransferSyntaxUID", place)
    if not isinstance(syntax, UID) or not syntax.is_transfer_syntax:
        raise FormatError("TransferSyntaxUID", f"missing or unknown in {place}")
    if syntax == _DEFLATED:
        raise FormatError(
            "TransferSyntaxUID",
            f"{place} is a deflated multi-frame object; convert it first, for example with dcmconv",
            "unsupported",
        )
    return syntax


def _headers(dataset: "Dataset", place: str) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """Merge what the object, the shared groups and each frame's groups say."""
    if _value(dataset, "SOPClassUID", place) not in (ENHANCED_CT, LEGACY_CONVERTED_CT):
        raise FormatError("SOPClassUID", f"{place} is no enhanced CT object", "unsupported")
    num_frames = _whole(dataset, "NumberOfFrames", place, 1, MAX_FRAMES)
    common = {field: _value(dataset, field, place) for field in _OBJECT_FIELDS}
    common = {field: value for field, value in common.items() if value is not None}
    rows = _whole(dataset, "Rows", place, 1, _MAX_MATRIX)
    columns = _whole(dataset, "Columns", place, 1, _MAX_MATRIX)
    for field, low, high in (
        ("SamplesPerPixel", 1, 1),
        ("BitsAllocated", 16, 16),
        ("BitsStored", 1, 16),
        ("PixelRepresentation", 0, 1),
    ):
        _whole(dataset, field, place, low, high)
    if num_frames * rows * columns > MAX_VOXELS:
        raise FormatError(
            "NumberOfFrames", f"{num_frames} frames of {rows}x{columns} are too many", "limit"
        )
    shared_items = _items(dataset, _SHARED, place)
    if len(shared_items) > 1:
        raise FormatError(_SHARED, f"has {len(shared_items)} items in {place}, not one")
    shared = _merge(shared_items[0], place) if shared_items else {}
    items = _items(dataset, _PER_FRAME, place)
    if len(items) != num_frames:
        raise FormatError(
            _PER_FRAME, f"has {len(items)} items in {place} where NumberOfFrames says {num_frames}"
        )
    places = tuple(f"frame {n} of {num_frames} of {place}" for n in range(1, num_frames + 1))
    headers = tuple(
        _frame_header(common, shared, item, frame)
        for item, frame in zip(items, places, strict=True)
    )
    return headers, places


def _frame_header(
    common: dict[str, Any], shared: dict[str, Any], item: "Dataset", place: str
) -> dict[str, Any]:
    own = _merge(item, place)
    for field in shared.keys() & own.keys():
        if shared[field] != own[field]:
            raise FormatError(field, f"of {place} contradicts the groups that all frames share")
    header = {**common, **shared, **own}
    if "FrameType" in header:
        header["ImageType"] = header.pop("FrameType")
    for field, group in _REQUIRED.items():
        if field not in header:
            raise FormatError(field, f"missing in {place}, as {group} does not say it")
    return header


def _merge(groups: "Dataset", place: str) -> dict[str, Any]:
    """Return the fields of the functional groups in one item."""
    header: dict[str, Any] = {}
    for group, fields in _GROUPS.items():
        items = _items(groups, group, place)
        if len(items) > 1:
            raise FormatError(group, f"has {len(items)} items in {place}, not one")
        for field in fields if items else ():
            value = _value(items[0], field, place)
            if value is not None and value != "":
                header[field] = value
    return header


def _items(dataset: "Dataset", field: str, place: str) -> Sequence["Dataset"]:
    from pydicom.sequence import Sequence as Items

    value = _value(dataset, field, place)
    if value is None:
        return ()
    if not isinstance(value, Items):
        raise FormatError(field, f"is no sequence in {place}")
    return value


def _value(dataset: "Dataset", field: str, place: str) -> Any:
    """Return the value of a field, None where it is absent."""
    try:
        return dataset[field].value if field in dataset else None
    except damage():
        raise FormatError(field, f"cannot be decoded in {place}") from None


def _whole(dataset: "Dataset", field: str, place: str, low: int, high: int) -> int:
    value = _value(dataset, field, place)
    if value is None:
        raise FormatError(field, f"missing in {place}")
    if not isinstance(value, int) or not low <= value <= high:
        number = int(value) if isinstance(value, int) else "the value"
        raise FormatError(field, f"{number} in {place} is not in {low}..{high}")
    return int(value)


def _streams(pixels: "Dataset", data: bytes, num_frames: int, place: str) -> tuple[bytes, ...]:
    """Split encapsulated pixel data into the frames, by offset table or fragments."""
    from pydicom.encaps import generate_frames

    offsets = _value(pixels, "ExtendedOffsetTable", place)
    lengths = _value(pixels, "ExtendedOffsetTableLengths", place)
    try:
        frames = generate_frames(
            data,
            number_of_frames=num_frames,
            extended_offsets=(offsets, lengths) if offsets and lengths else None,
        )
        # One more than there should be tells an object with too many.
        streams = tuple(bytes(frame) for frame in islice(frames, num_frames + 1))
    except damage():
        raise FormatError("PixelData", f"{place} is damaged: its frames are not found") from None
    if len(streams) != num_frames:
        found = f"more than {num_frames}" if len(streams) > num_frames else len(streams)
        raise FormatError(
            "PixelData", f"{place} holds {found} images where NumberOfFrames says {num_frames}"
        )
    return streams

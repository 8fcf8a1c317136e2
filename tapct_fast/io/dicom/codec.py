"""Decode one compressed DICOM frame, after checking that its stream is what the header says.

JPEG lossless has neither a checksum nor a strict decoder: of a stream whose entropy-coded part is
cut GDCM makes a picture and only prints a complaint, which the worker process (``worker.py``)
reads.

Shape suffixes: S rows or columns as stored.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom.errors import damage, silence_pydicom

Pixels = NDArray[np.integer[Any]]  # int16 or uint16

MAX_STREAM_BYTES = 2**28  # as much as one slice may have unpacked: 8192 x 8192 int16, and room
RLE_LOSSLESS = "1.2.840.10008.1.2.5"
# Decoders of these complain on stderr and go on; see the module's docstring.
LENIENT_SYNTAXES = frozenset(f"1.2.840.10008.1.2.4.{end}" for end in (50, 51, 57, 70))
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"

_J2K_START, _END_OF_IMAGE = b"\xff\x4f\xff\x51", b"\xff\xd9"
_RLE_HEADER_BYTES, _RLE_SEGMENTS = 64, 2  # the high bytes of all pixels, then the low bytes


class FrameJob(NamedTuple):
    """One frame to decode: its compressed bytes and what the header says of them.

    Frames have one sample of 16 bits allocated; the caller has checked that, and the size limits.
    """

    stream: bytes | Callable[[], bytes]  # all fragments joined; a callable reads when it is due
    syntax: str  # TransferSyntaxUID
    rows: int
    columns: int
    bits_stored: int
    is_signed: bool
    place: str  # names the frame in an error: "file 3 of 40"

    @property
    def dtype(self) -> type[np.int16] | type[np.uint16]:
        """The type of its pixels."""
        return np.int16 if self.is_signed else np.uint16

    @property
    def num_bytes(self) -> int:
        """The size of its pixels."""
        return 2 * self.rows * self.columns

    def read(self) -> bytes:
        """Return the compressed bytes."""
        return self.stream if isinstance(self.stream, bytes) else self.stream()


def check_decoder(syntax: str, place: str) -> None:
    """Say before any work that a syntax cannot be decoded.

    Raises:
        InputError: The decoder for it is not installed.
        FormatError: No decoder for it exists.
    """
    if syntax == RLE_LOSSLESS:
        return
    from pydicom.pixels.decoders.base import get_decoder

    try:
        plugins = get_decoder(syntax).available_plugins
    except NotImplementedError:
        raise FormatError(
            "TransferSyntaxUID", f"{place} has a syntax without decoder", "unsupported"
        ) from None
    if not plugins:
        raise InputError("no decoder for this series' compression: pip install 'tapct-fast[dicom]'")


def decode_frame(job: FrameJob) -> Pixels:
    """Decode one frame in this process.

    Returns:
        (rows, columns) of int16 where signed, else uint16, before slope and intercept.

    Raises:
        InputError: pydicom or the decoder is not installed.
        FormatError: The stream is cut short, damaged, or of another size than the header says.
    """
    stream = job.read()
    if len(stream) > MAX_STREAM_BYTES:
        raise FormatError("PixelData", f"{job.place} is larger than any slice of a CT", "limit")
    try:
        with silence_pydicom():
            check_decoder(job.syntax, job.place)
            return _decode_rle(job, stream) if job.syntax == RLE_LOSSLESS else _decode(job, stream)
    except (FormatError, InputError):
        raise
    except damage():
        raise FormatError(
            "PixelData", f"{job.place} cannot be decoded; it is damaged", "integrity"
        ) from None


def _decode(job: FrameJob, stream: bytes) -> Pixels:
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder

    if not stream.rstrip(b"\0").endswith(_END_OF_IMAGE):
        raise FormatError(
            "PixelData", f"{job.place} is cut short: its image does not end", "integrity"
        )
    if stream_size(stream) != (1, job.rows, job.columns):
        raise _other_size(job)
    header: dict[str, Any] = {
        "rows": job.rows,
        "columns": job.columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": 16,
        "bits_stored": job.bits_stored,
        "pixel_representation": int(job.is_signed),
        "pixel_keyword": "PixelData",
    }
    decoder = get_decoder(job.syntax)
    # Named, or pydicom asks the next one where the first refuses: of a JPEG-LS stream cut in its
    # middle GDCM and CharLS say so, and pylibjpeg gives an image of which half is wrong.
    plugins = decoder.available_plugins
    is_12_bit = job.syntax == _JPEG_EXTENDED and job.bits_stored != 8  # not for GDCM and Pillow
    plugin = plugins[-1 if is_12_bit else 0]
    decoded, _ = decoder.as_array(
        encapsulate([stream], has_bot=False), raw=True, decoding_plugin=plugin, **header
    )
    if decoded.shape != (job.rows, job.columns) or decoded.dtype.itemsize != 2:
        raise _other_size(job)
    return decoded.astype(job.dtype, copy=False)


def _decode_rle(job: FrameJob, stream: bytes) -> Pixels:
    """Unpack the two byte planes; what is missing or too much is an error.

    pydicom drops what a segment holds beyond Rows x Columns and only warns, which no thread can
    reliably turn into an error.
    Source: DICOM PS3.5 annex G.
    """
    num_segments, *offsets = struct.unpack_from("<16I", stream)
    starts = [*offsets[:_RLE_SEGMENTS], len(stream)]
    if num_segments != _RLE_SEGMENTS or starts != sorted(starts) or starts[0] < _RLE_HEADER_BYTES:
        raise ValueError("not two segments in order")
    pixels_SS2 = np.empty((job.rows, job.columns, 2), np.uint8)
    for index, start in enumerate(starts[:-1]):
        plane = _unpack_bits(stream[start : starts[index + 1]], job.rows * job.columns)
        pixels_SS2[..., index] = np.frombuffer(plane, np.uint8).reshape(job.rows, job.columns)
    return pixels_SS2.view(">u2")[..., 0].astype(job.dtype)


def _unpack_bits(packed: bytes, num_bytes: int) -> bytearray:
    plane = bytearray()
    place, end = 0, len(packed)
    while place < end:
        control = packed[place]
        if control < 128:
            plane += packed[place + 1 : place + 2 + control]
            place += 2 + control
        else:
            if control > 128:  # 128 does nothing
                plane += packed[place + 1 : place + 2] * (257 - control)
            place += 2 if control > 128 else 1
        if len(plane) > num_bytes:
            break
    if len(plane) != num_bytes:
        raise ValueError("a segment has another length than the image")
    return plane


def _other_size(job: FrameJob) -> FormatError:
    return FormatError(
        "PixelData", f"{job.place} holds another size than Rows x Columns", "integrity"
    )


def stream_size(stream: bytes) -> tuple[int, int, int]:
    """Return samples, rows and columns which a JPEG, JPEG-LS or JPEG 2000 stream declares itself.

    Source: ITU-T T.81 B.2.2, T.87 C.2.2 and T.800 A.5.1.

    Raises:
        ValueError: The stream has no frame header.
        IndexError: It ends before its frame header; or ``struct.error``.
    """
    if stream[:4] == _J2K_START:
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

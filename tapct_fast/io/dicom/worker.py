"""A process that decodes DICOM frames for another one, over its standard input and output.

A message is one line of JSON and as many raw bytes as the line's ``bytes`` says. The parent sends
one job and awaits one reply; nothing is ever unpickled. The process ends when its input ends, that
is when the parent closes it or dies, and by an alarm when one frame takes too long.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom.codec import LENIENT_SYNTAXES, MAX_STREAM_BYTES, FrameJob, decode_frame

_MAX_LINE_BYTES = 4096
_MAX_MEMORY_BYTES = 2**31  # beyond the libraries; JPEG 2000 of 8192 x 8192 needs about 0.8 GB
_MAX_PRINTED_BYTES = 2**20  # by the decoder of one frame
_COMPLAINT = b"Corrupt JPEG data"  # libjpeg's jerror.h: too many or few bytes before a marker
_ALARM_MARGIN_S = 5.0  # the parent's own limit comes first and knows which frame it was


def write_message(pipe: IO[bytes], header: dict[str, Any], content: bytes | memoryview) -> None:
    """Send one message."""
    line = json.dumps({**header, "bytes": len(content)}).encode("ascii")
    assert len(line) < _MAX_LINE_BYTES
    pipe.write(line + b"\n")
    pipe.write(content)
    pipe.flush()


def read_message(pipe: IO[bytes], max_bytes: int) -> tuple[dict[str, Any], bytearray]:
    """Receive one message.

    Raises:
        EOFError: The other side closed the pipe, also in the middle of a message.
        ValueError: This is no message, or it is larger than ``max_bytes``.
    """
    line = pipe.readline(_MAX_LINE_BYTES)
    if not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    num_bytes = header.get("bytes") if isinstance(header, dict) else None
    if not isinstance(num_bytes, int) or not 0 <= num_bytes <= max_bytes:
        raise ValueError("no message of a size that was expected")
    content = bytearray(num_bytes)
    view = memoryview(content)
    while view:
        num_read = pipe.readinto(view)  # type: ignore[attr-defined]  # buffered readers have it
        if not num_read:
            raise EOFError
        view = view[num_read:]
    return header, content


def main() -> None:
    """Serve jobs until the input ends."""
    # Decoders print to file descriptors 1 and 2: the replies get one of their own.
    replies = os.fdopen(os.dup(1), "wb")
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process inside any decoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent decides
    import pydicom.pixels.decoders  # noqa: F401  # part of the start, not of the first frame

    _limit_memory()
    try:
        write_message(replies, {"ready": True}, b"")
        while True:
            try:
                header, stream = read_message(sys.stdin.buffer, MAX_STREAM_BYTES)
            except EOFError:
                return
            _serve(replies, header, bytes(stream))
    except BrokenPipeError:
        os._exit(0)  # the parent is gone; nothing is left to flush


def _serve(replies: IO[bytes], header: dict[str, Any], stream: bytes) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, float(header["timeout_s"]) + _ALARM_MARGIN_S)
    os.lseek(2, 0, os.SEEK_SET)
    os.ftruncate(2, 0)
    fields = {name: header[name] for name in FrameJob._fields if name != "stream"}
    try:
        job = FrameJob(stream, **fields)
        pixels_SS = decode_frame(job)
        if job.syntax in LENIENT_SYNTAXES and _COMPLAINT in os.pread(2, _MAX_PRINTED_BYTES, 0):
            raise FormatError(
                "PixelData", f"{job.place} is damaged: its image ends too soon or late", "integrity"
            )
    except FormatError as error:
        reply = {"field": error.field, "reason": error.reason, "code": error.code}
        write_message(replies, reply, b"")
    except InputError as error:
        write_message(replies, {"input": str(error)}, b"")
    else:
        write_message(replies, {}, pixels_SS.reshape(-1).view("u1").data)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory() -> None:
    """Bound what a hostile stream can make a decoder allocate and print; on Linux only."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_PRINTED_BYTES, _MAX_PRINTED_BYTES))
    used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = used + _MAX_MEMORY_BYTES
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main()

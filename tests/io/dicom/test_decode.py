"""Decoding in other processes gives pydicom's pixels, in order, and outlives the processes."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom import decode
from tapct_fast.io.dicom.codec import FrameJob, decode_frame, stream_size
from tapct_fast.io.dicom.decode import DecoderPool, decode_frames
from tapct_fast.io.dicom.worker import read_message, write_message

ROWS, COLUMNS = 24, 20
HU_ZYX = np.random.default_rng(0).integers(-1024, 2000, (6, ROWS, COLUMNS), np.int16)


def compressed(hu_SS: np.ndarray, syntax: str) -> Dataset:
    dataset = Dataset()
    dataset.Rows, dataset.Columns = hu_SS.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelRepresentation = 1
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    dataset.PixelData = hu_SS.astype("<i2").tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.ensure_file_meta()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.compress(syntax, generate_instance_uid=False)
    return dataset


def job_of(dataset: Dataset, place: str = "file 1 of 1") -> FrameJob:
    return FrameJob(
        next(generate_frames(dataset.PixelData, number_of_frames=1)),
        str(dataset.file_meta.TransferSyntaxUID),
        dataset.Rows,
        dataset.Columns,
        dataset.BitsStored,
        dataset.PixelRepresentation == 1,
        place,
    )


def jobs(syntax: str = JPEGLSLossless) -> list[FrameJob]:
    return [
        job_of(compressed(hu_SS, syntax), f"file {z} of 6") for z, hu_SS in enumerate(HU_ZYX, 1)
    ]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(2) as pool:
        yield pool


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_frames_come_in_order_whoever_decodes_them(pool: DecoderPool, syntax: str) -> None:
    made = jobs(syntax)
    for frames in (decode_frames(made), pool.decode(made), decode_frames(made, workers=1)):
        got_ZYX = np.stack(list(frames))
        np.testing.assert_array_equal(got_ZYX, HU_ZYX)
        assert got_ZYX.dtype == np.int16


REAL = (
    *(f"crlm1004_syntaxes/{name}/*" for name in ("rle", "jpegls", "j2k", "jpll")),
    *("ts_j2k_20slices/*", "ge_tilt18.5_uneven_jpegls/*", "oddities/693_J2KI.dcm"),
)


@pytest.mark.parametrize("pattern", REAL)
def test_real_slices_equal_pydicom_bit_for_bit(
    real_ct: Path, pool: DecoderPool, pattern: str
) -> None:
    datasets = [dcmread(path) for path in sorted((real_ct / "dicom").glob(pattern))]
    assert datasets
    made = [job_of(dataset) for dataset in datasets]
    for dataset, here, there in zip(
        datasets, decode_frames(made, workers=0), pool.decode(made), strict=True
    ):
        expected_SS = pixel_array(dataset, raw=True)
        for got_SS in (here, there):
            np.testing.assert_array_equal(got_SS, expected_SS)
            assert got_SS.dtype == expected_SS.dtype


def test_few_frames_are_read_ahead_of_the_caller(pool: DecoderPool) -> None:
    read = []

    def lazy(index: int, stream: bytes) -> FrameJob:
        def due() -> bytes:
            read.append(index)
            return stream

        return jobs()[0]._replace(stream=due)

    stream = jobs()[0].read()
    frames = pool.decode(lazy(index, stream) for index in range(30))
    assert read == []
    next(frames)
    assert 1 <= len(read) <= 5
    assert len(list(frames)) == 29
    assert sorted(read) == list(range(30))


def _cut(stream: bytes) -> bytes:
    return stream[: len(stream) // 2]


def _cut_but_ended(stream: bytes) -> bytes:
    return stream[: len(stream) // 2] + b"\xff\xd9"


def _huge(stream: bytes) -> bytes:
    place = stream.index(b"\xff\xf7") + 5
    return stream[:place] + (60000).to_bytes(2, "big") * 2 + stream[place + 4 :]


def _garbage(stream: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(stream)) + b"\xff\xd9"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_cut, "cut short"),
        (_cut_but_ended, "cannot be decoded"),
        (_huge, "another size"),
        (_garbage, "cannot be decoded"),
        (lambda _: b"", "cut short"),
        (lambda _: b"\xff\xd8" * 200 + b"\xff\xd9", "cannot be decoded"),
        (lambda _: b"\xff\xd8\xff\xd9", "cannot be decoded"),
    ],
)
def test_a_hostile_stream_is_an_error_that_names_its_place(pool, harm, reason: str) -> None:
    made = jobs()
    made[3] = made[3]._replace(stream=harm(made[3].read()))
    for frames in (decode_frames(made, workers=0), pool.decode(made)):
        for z in range(3):
            np.testing.assert_array_equal(next(frames), HU_ZYX[z])
        with pytest.raises(FormatError, match=f"file 4 of 6.*{reason}") as caught:
            next(frames)
        assert (caught.value.field, caught.value.code) == ("PixelData", "integrity")
    np.testing.assert_array_equal(next(pool.decode(jobs())), HU_ZYX[0])


def test_a_j2k_bomb_is_refused_by_its_own_size(real_ct: Path) -> None:
    dataset = dcmread(real_ct / "dicom" / "crlm1004_syntaxes" / "j2k" / "000.dcm")
    job = job_of(dataset)
    stream = job.read()
    assert stream_size(stream) == (1, 512, 512)
    bomb = stream[:8] + (60000).to_bytes(4, "big") * 2 + stream[16:]
    with pytest.raises(FormatError, match="another size"):
        decode_frame(job._replace(stream=bomb))
    # Rows and Columns that lie likewise: the decoder stops at what the stream holds.
    with pytest.raises(FormatError, match="another size"):
        decode_frame(job._replace(rows=256))


@pytest.mark.parametrize(
    "harm",
    [
        lambda s: s[: len(s) // 2] + s[-2:],
        lambda s: s[: len(s) * 99 // 100] + s[-2:],
        lambda s: s[: len(s) // 2] + s[len(s) // 2 + 10 :],
        lambda s: s[: len(s) // 2] + b"abcdefgh" + s[len(s) // 2 :],
    ],
)
@pytest.mark.parametrize("syntax", ["jpegls", "j2k", "jpll"])
def test_a_real_stream_cut_inside_but_ended_is_refused(real_ct: Path, harm, syntax: str) -> None:
    job = job_of(dcmread(real_ct / "dicom" / "crlm1004_syntaxes" / syntax / "000.dcm"))
    harmed = job._replace(stream=harm(job.read().rstrip(b"\0")))
    with pytest.raises(FormatError, match="damaged") as caught:
        list(decode_frames([harmed]))
    assert (caught.value.field, caught.value.code) == ("PixelData", "integrity")


def test_a_complaint_about_one_frame_is_not_held_against_the_next(real_ct: Path) -> None:
    job = job_of(dcmread(real_ct / "dicom" / "crlm1004_syntaxes" / "jpll" / "000.dcm"))
    stream = job.read().rstrip(b"\0")
    harmed = job._replace(stream=stream[: len(stream) // 2] + stream[-2:])
    with DecoderPool(1) as pool:
        with pytest.raises(FormatError):
            list(pool.decode([harmed]))
        (pid,) = process_ids(pool)
        np.testing.assert_array_equal(next(pool.decode([job])), decode_frame(job))
        assert process_ids(pool) == [pid]


@pytest.mark.parametrize(
    "harm",
    [
        lambda s: s[:-30],
        lambda s: s + b"\x05abcdef",  # more than the image
        lambda s: s[:200],
        lambda s: s[:64],
        lambda s: s[:10],
        lambda s: b"\3" + s[1:],
        lambda s: s[:4] + b"\xff\xff\xff\xff" + s[8:],
        lambda s: s[:4] + b"\0\0\0\0" + s[8:],
    ],
)
def test_rle_of_another_length_than_the_image_is_refused(harm) -> None:
    job = jobs(RLELossless)[0]
    with pytest.raises(FormatError, match="cannot be decoded"):
        decode_frame(job._replace(stream=harm(job.read())))


def test_rle_runs_at_their_limits_are_unpacked() -> None:
    hu_SS = np.zeros((40, 40), np.int16)
    hu_SS[3, 5:9] = (1, -2, 300, -300)
    hu_SS[20:] = np.random.default_rng(1).integers(-1000, 1000, (20, 40))
    dataset = compressed(hu_SS, RLELossless)
    np.testing.assert_array_equal(decode_frame(job_of(dataset)), hu_SS)


def test_a_syntax_without_decoder_is_said_before_any_work() -> None:
    job = jobs()[0]._replace(syntax="1.2.840.10008.1.2.4.100")  # MPEG-2
    with pytest.raises(FormatError) as caught:
        list(decode_frames([job]))
    assert (caught.value.field, caught.value.code) == ("TransferSyntaxUID", "unsupported")


def process_ids(pool: DecoderPool) -> list[int]:
    return [worker.process.pid for worker in pool._running]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def await_death(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_a_worker_killed_between_frames_is_replaced_and_its_frame_decoded() -> None:
    with DecoderPool(1) as pool:
        frames = pool.decode(jobs() * 3)
        for z in range(18):
            if z in (2, 9):
                (pid,) = process_ids(pool)
                os.kill(pid, signal.SIGKILL)
            np.testing.assert_array_equal(next(frames), HU_ZYX[z % 6])


CRASH = "import os, sys; from tapct_fast.io.dicom import worker as w; {}; w.main()"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("w.decode_frame = lambda job: os.abort()", "died"),
        ("w.decode_frame = lambda job: sys.exit(0)", "died"),
        ("import time; w.decode_frame = lambda job: time.sleep(600)", "did not end"),
        ("import numpy; w.decode_frame = lambda job: numpy.zeros(3, numpy.int16)", "died"),
        (
            "w._serve = lambda replies, header, stream: (replies.write(b'[' * 9000), "
            "replies.flush())",
            "died",
        ),
    ],
)
def test_a_decoder_that_crashes_or_hangs_costs_one_frame_and_not_the_caller(
    monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    monkeypatch.setattr(
        decode, "_CHILD", "import sys; sys.path[:] = sys.argv[1:]; " + CRASH.format(fault)
    )
    monkeypatch.setattr(decode, "_TIMEOUT_S", 1.0)
    with DecoderPool(1) as pool:
        frames = pool.decode(jobs()[:1])
        with pytest.raises(FormatError, match=f"file 1 of 6 {words}") as caught:
            next(frames)
        assert caught.value.code == "integrity"
        assert process_ids(pool) == []
        monkeypatch.undo()
        np.testing.assert_array_equal(np.stack(list(pool.decode(jobs()))), HU_ZYX)


def test_a_worker_that_cannot_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_CHILD", "raise SystemExit")
    with pytest.raises(InputError, match="workers=0"):
        list(decode_frames(jobs(), workers=1))


def test_closing_ends_every_worker_also_in_the_middle_of_a_series() -> None:
    frames = decode_frames(jobs() * 50, workers=2)
    next(frames)
    pool = frames.gi_frame.f_locals["pool"]
    pids = process_ids(pool)
    assert pids
    frames.close()
    assert not any(map(is_alive, pids))


PARENT = """
import sys, time
sys.path[:] = sys.argv[1:]
from tapct_fast.io.dicom.codec import FrameJob
from tapct_fast.io.dicom.decode import DecoderPool
pool = DecoderPool(1)
print(pool._start().process.pid, flush=True)
time.sleep(600)
"""


def test_workers_end_when_the_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *sys.path], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
        await_death(pid)


def test_a_small_series_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_CHILD", "raise SystemExit")
    np.testing.assert_array_equal(np.stack(list(decode_frames(jobs()))), HU_ZYX)
    monkeypatch.setattr(decode, "MIN_PARALLEL_BYTES", 6 * ROWS * COLUMNS * 2)
    with pytest.raises(InputError, match="could not start"):
        list(decode_frames(jobs()))


@pytest.mark.parametrize(
    "data",
    [b"[]\n", b"{}\n", b'{"bytes": -1}\n', b'{"bytes": 11}\n', b'{"bytes": "3"}\n', b"\xff\n"],
)
def test_a_message_of_another_form_or_size_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_message(io.BytesIO(data), 10)


def test_a_message_arrives_whole_or_not_at_all() -> None:
    pipe = io.BytesIO()
    write_message(pipe, {"a": 1}, b"content")
    whole = pipe.getvalue()
    assert read_message(io.BytesIO(whole), 7) == ({"a": 1, "bytes": 7}, b"content")
    for num_bytes in range(len(whole)):
        with pytest.raises(EOFError):
            read_message(io.BytesIO(whole[:num_bytes]), 7)

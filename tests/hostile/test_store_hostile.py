"""Stores meant to break the reader: a typed error or the right voxels, never a crash.

A forged file has right checksums over wrong content; only the index tells it from the true one,
so where the index is forged too it may read as another volume, and do no more harm than that.
"""

import dataclasses
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import blosc2
import numpy as np
import numpy.typing as npt
import pytest

from tapct_fast import _native
from tapct_fast.errors import StoreError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack
from tapct_fast.io.store import Store

AFFINE = np.diag([-0.8, -0.7, 2.5, 1.0])
SHAPE_ZYX = (19, 150, 140)  # two chunks per axis, both ragged
NUM_CHUNKS, NUM_BLOCKS = 8, 16  # blocks of one chunk
MAX_SECONDS = 1.0  # for one read of a file that lies
CODECS = ["lz4hc", "zstd"]

Edit = Callable[[bytearray], object]


def scan() -> npt.NDArray[np.int16]:
    z, y, x = np.indices(SHAPE_ZYX)
    hu = 1500 * np.sin(z / 5) * np.cos(y / 17) + 900 * np.sin(x / 11) - 300
    return (hu + np.random.default_rng(0).normal(0, 20, SHAPE_ZYX)).astype(np.int16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "scan.nii"
    write_nifti(path, scan(), AFFINE)
    return path


@pytest.fixture(scope="module", params=CODECS)
def packed(
    source: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "store"
    pack([source], directory, codec=request.param)
    return directory


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Store:
    return Store.open(Path(shutil.copytree(packed, tmp_path / "copy")))


def volume_file(store: Store) -> Path:
    return store.directory / store.cases[0].file


def test_200_flipped_bits_and_200_truncations_of_a_volume_are_detected(store: Store) -> None:
    path = volume_file(store)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # The header and the offsets at the end are small; aim at them as often as at the voxels.
    bits = [*rng.choice(8 * 200, 70, replace=False), *rng.integers(0, 8 * len(whole), 60)]
    bits += [*(8 * len(whole) - 1 - rng.choice(8 * 150, 70, replace=False))]
    for bit in map(int, bits):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"case-.*damaged.*pack again"):
            dataclasses.replace(store).read_volume(0)
    path.write_bytes(whole)
    store.verify()
    for size in sorted(np.linspace(0, len(whole) - 1, 200).astype(int).tolist(), reverse=True):
        with path.open("r+b") as file:
            file.truncate(size)
        for reader in (store, dataclasses.replace(store)):  # open already, and opened now
            with pytest.raises(StoreError, match="damaged"):
                reader.read_volume(0)
    path.unlink()
    with pytest.raises(StoreError, match="No such file"):
        store.verify()


@pytest.mark.parametrize("name", ["index.json", "cases/*.json"])
def test_200_flipped_bits_and_200_truncations_of_a_record_are_detected(
    store: Store, source: Path, name: str
) -> None:
    path = next(store.directory.glob(name))
    whole = path.read_bytes()
    damaged = [whole[:size] for size in np.linspace(0, len(whole) - 2, 200).astype(int)]
    for bit in np.random.default_rng(0).choice(8 * len(whole), 200, replace=False).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(data))
    num_refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            if name.startswith("cases"):  # the index is rebuilt from the records
                pack([source], store.directory, codec=store.codec)  # type: ignore[arg-type]
            assert Store.open(store.directory) == store  # a flipped blank between two values
        except StoreError:
            num_refused += 1
    assert num_refused >= 0.9 * len(damaged)


class Frame(NamedTuple):
    """Where the parts of a true file lie."""

    data: bytes
    header: int  # bytes, = position of the first chunk
    chunks: list[tuple[int, int]]  # begin and end
    blocks: list[list[int]]  # per chunk, positions of its blocks and its end

    def sealed(self, edit: Edit) -> bytes:
        """Apply a lie, then make every checksum right again at its true place."""
        data = bytearray(self.data)
        edit(data)
        crc32s, block_crc32s = [], []
        for (begin, end), blocks in zip(self.chunks, self.blocks, strict=True):
            crc32s.append(zlib.crc32(data[begin:end]))
            block_crc32s.append(zlib.crc32(data[begin : blocks[0]]))
            for first, last in pairwise(blocks):
                block_crc32s.append(zlib.crc32(data[first:last]))
        at = 200 + 284
        data[at : at + 4 * NUM_CHUNKS] = struct.pack(f">{NUM_CHUNKS}I", *crc32s)
        at = 200 + 301 + 4 * NUM_CHUNKS
        num = len(block_crc32s)
        data[at : at + 4 * num] = struct.pack(f">{num}I", *block_crc32s)
        data[self.header - 4 : self.header] = bytes(4)
        rest = zlib.crc32(data[: self.header] + data[self.chunks[-1][1] :])
        data[self.header - 4 : self.header] = rest.to_bytes(4, "big")
        return bytes(data)


@pytest.fixture
def frame(store: Store) -> Frame:
    path = volume_file(store)
    data = path.read_bytes()
    header = int.from_bytes(data[11:15], "big")
    array = blosc2.open(path, mode="r")  # owns the chunks
    chunks, blocks, begin = [], [], header
    for i in range(NUM_CHUNKS):
        end = begin + len(array.schunk.get_chunk(i))
        starts = struct.unpack_from(f"<{NUM_BLOCKS}I", data, begin + 32)
        chunks.append((begin, end))
        blocks.append([*(begin + start for start in starts), end])
        begin = end
    return Frame(data, header, chunks, blocks)


def read_alone(path: Path, frame: Frame) -> npt.NDArray[np.int16]:
    """Read boxes that cut chunks, and all voxels, with an index that was forged as well."""
    data = path.read_bytes()
    crc32s = data[484 : 484 + 4 * NUM_CHUNKS] + data[frame.header - 4 : frame.header]
    reader = _native.BoxReader(["case-1"], [str(path)], [crc32s], False, 4)
    corners = np.array([[9, 70, 60], [3, 79, 76]], np.int64)
    out = np.empty((2, 10, 71, 64), np.int16)
    start = time.perf_counter()
    try:
        reader.read_boxes(np.zeros(2, np.int64), corners, (10, 71, 64), out, None, 1)
        whole = np.empty((1, *SHAPE_ZYX), np.int16)
        reader.read_boxes(
            np.zeros(1, np.int64), np.zeros((1, 3), np.int64), SHAPE_ZYX, whole, None, 2
        )
    finally:
        assert time.perf_counter() - start < MAX_SECONDS
    return out


def changed(old: int, change: int | Callable[[int], int]) -> int:
    return change if isinstance(change, int) else change(old)


def put(at: int, layout: str, value: int) -> Edit:
    return lambda data: struct.pack_into(layout, data, at, value)


def test_a_resealed_file_is_the_file(store: Store, frame: Frame) -> None:
    assert frame.sealed(bytearray.copy) == frame.data
    out = read_alone(volume_file(store), frame)
    np.testing.assert_array_equal(out[0], np.clip(scan(), -1024, 3071)[9:, 70:141, 60:124])


Lies = dict[str, tuple[int, str, int | Callable[[int], int]]]
HEADER_LIES: Lies = {
    "header larger": (11, ">I", lambda old: old + 1),
    "header huge": (11, ">I", 2**32 - 1),
    "file smaller": (16, ">Q", lambda old: old - 1),
    "file huge": (16, ">Q", 2**64 - 1),
    "chunks larger": (39, ">Q", lambda old: old + 1),
    "chunks huge": (39, ">Q", 2**64 - 8),
    "no chunks": (39, ">Q", 0),
    "voxels of 4 bytes": (48, ">I", 4),
    "no slices": (128, ">q", 0),
    "negative shape": (137, ">q", -1),
    "shape huge": (146, ">q", 2**62),
    "2^31 slices": (128, ">q", 2**31),
    "more chunks than checksums": (128, ">q", 2**20),
    "no chunk shape": (156, ">i", 0),
    "chunk of one slice": (156, ">i", 1),
    "chunk above the shape": (161, ">i", 2**30),
    "block of nothing": (172, ">i", 0),
    "block above the chunk": (172, ">i", 17),
    "block of one voxel": (182, ">i", 1),
    "metalayer larger": (196, ">I", lambda old: old + 1),
    "another version": (209, ">B", 3),
    "position of a metalayer": (100, ">I", lambda old: old + 1),
}


@pytest.mark.parametrize("name", HEADER_LIES)
def test_a_lying_header_with_right_checksums_is_refused(
    store: Store, frame: Frame, name: str
) -> None:
    at, layout, change = HEADER_LIES[name]
    (old,) = struct.unpack_from(layout, frame.data, at)
    path = volume_file(store)
    path.write_bytes(frame.sealed(put(at, layout, changed(old, change))))
    with pytest.raises(StoreError, match="damaged"):
        read_alone(path, frame)
    with pytest.raises(StoreError, match=r"damaged.*pack again"):
        store.read_volume(0)


CHUNK_LIES: Lies = {  # position in the head of a chunk
    "codec": (2, "<B", lambda old: old | 0xE0),
    "short header": (2, "<B", lambda old: old & ~0x05),
    "voxels of 4 bytes": (3, "<B", 4),
    "decoded larger": (4, "<I", lambda old: 2 * old),
    "decoded huge": (4, "<I", 2**31 - 1),
    "decoded negative": (4, "<I", 2**32 - 1),
    "block larger": (8, "<I", lambda old: 2 * old),
    "no block": (8, "<I", 0),
    "compressed larger": (12, "<I", lambda old: old + 1),
    "compressed smaller": (12, "<I", lambda old: old - 1),
    "filter that loads code": (16 + 5, "<B", 160),
    "filter that needs a reference": (16 + 5, "<B", 3),
    "dictionary": (31, "<B", lambda old: old | 0x01),
    "lazy": (31, "<B", lambda old: old | 0x08),
    "zeros": (31, "<B", lambda old: old | 0x10),
    "one value": (31, "<B", lambda old: old | 0x30),
    "first block before its place": (32, "<I", 0),
    "first block behind the chunk": (32, "<I", 2**31),
    "blocks out of order": (32 + 4 * 5, "<I", 100),
    "last block behind the chunk": (32 + 4 * 15, "<I", 2**32 - 1),
}


@pytest.mark.parametrize("name", CHUNK_LIES)
def test_a_lying_chunk_with_right_checksums_is_refused(
    store: Store, frame: Frame, name: str
) -> None:
    at, layout, change = CHUNK_LIES[name]
    path = volume_file(store)
    for begin, _ in (frame.chunks[0], frame.chunks[-1]):
        (old,) = struct.unpack_from(layout, frame.data, begin + at)
        path.write_bytes(frame.sealed(put(begin + at, layout, changed(old, change))))
        with pytest.raises(StoreError, match="damaged"):
            read_alone(path, frame)
        with pytest.raises(StoreError, match=r"damaged.*pack again"):
            dataclasses.replace(store).read_volume(0)


def test_lying_offsets_with_right_checksums_are_refused(store: Store, frame: Frame) -> None:
    path = volume_file(store)
    begin = frame.chunks[-1][1]
    content = frame.data[begin:-35]
    offsets = np.frombuffer(blosc2.decompress2(content), "<u8")
    assert offsets.tolist() == [first - frame.header for first, _ in frame.chunks]
    lies = [
        np.roll(offsets, 1),
        offsets[::-1],
        np.zeros_like(offsets),
        np.full_like(offsets, 2**63 - 1),
        np.full_like(offsets, 2**63 + 2**56),  # every chunk says "zeros"
        np.full_like(offsets, 2**64 - 1),
        offsets + 1,
        offsets - offsets[1],
        offsets * 1000,
        np.where(np.arange(8) == 3, offsets - 1, offsets),
    ]
    for lie in lies:
        for clevel in (0, 5):
            forged = blosc2.compress2(np.ascontiguousarray(lie), typesize=8, clevel=clevel)
            moved = len(frame.data) - len(content) + len(forged)

            def edit(data: bytearray, forged: bytes = forged, moved: int = moved) -> None:
                data[begin:-35] = forged
                struct.pack_into(">Q", data, 16, moved)

            path.write_bytes(frame.sealed(edit))
            with pytest.raises(StoreError, match="damaged"):
                read_alone(path, frame)


def test_any_bytes_under_right_checksums_are_an_error_or_a_volume(
    store: Store, frame: Frame
) -> None:
    path = volume_file(store)
    rng = np.random.default_rng(0)
    places = [(0, frame.header), (frame.chunks[-1][1], len(frame.data)), *frame.chunks]
    places += [(begin, begin + 32 + 4 * NUM_BLOCKS) for begin, _ in frame.chunks]
    num_refused = 0
    for _ in range(300):
        low, high = places[rng.integers(len(places))]
        at = rng.integers(low, high, rng.integers(1, 4))
        values = rng.integers(0, 256, len(at))

        def edit(data: bytearray, at: npt.NDArray[np.int64] = at, values: object = values) -> None:
            for place, value in zip(at.tolist(), np.asarray(values).tolist(), strict=True):
                data[place] = value

        path.write_bytes(frame.sealed(edit))
        try:
            assert read_alone(path, frame).shape == (2, 10, 71, 64)
        except StoreError:
            num_refused += 1
        if path.read_bytes() != frame.data:
            with pytest.raises(StoreError, match="damaged"):
                dataclasses.replace(store).read_volume(0)
    assert num_refused > 100


READ_AND_MEASURE = """
import sys
from pathlib import Path
from tapct_fast.config import HuConfig
from tapct_fast.io.store import Store
def peak():
    line = next(row for row in open("/proc/self/status") if row.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
store = Store.open(Path(sys.argv[1]), mmap=sys.argv[2] == "mmap")
normalise = HuConfig() if sys.argv[3] == "bf16" else None
store.read_boxes([0], [[0, 0, 0]], (1, 1, 1), normalise=normalise)
before = peak()
box = store.read_boxes([0], [[1, 1, 1]], (24, 500, 500), normalise=normalise, threads=1)
print(peak() - before, box.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure with")
@pytest.mark.parametrize("value", ["int16", "bf16"])
def test_a_box_costs_at_most_three_times_its_memory(tmp_path: Path, value: str) -> None:
    hu_ZYX = np.random.default_rng(0).integers(-1000, 1000, (26, 512, 512), dtype=np.int16)
    write_nifti(tmp_path / "scan.nii", hu_ZYX, AFFINE)
    pack([tmp_path / "scan.nii"], tmp_path / "store")
    command = [sys.executable, "-c", READ_AND_MEASURE, str(tmp_path / "store"), "pread", value]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, box_bytes = map(int, done.stdout.split())
    chunk_bytes = 16 * 128 * 128 * 2
    assert 0.9 * box_bytes < grown <= 3 * box_bytes + chunk_bytes

"""The training store: int16 HU volumes in chunked, compressed, checksummed files with one index.

``io.pack`` writes it; here it is read.

Layout of a store folder::

    index.json          all cases, and the SHA-256 of itself
    cases/<id>.b2nd     voxels in canonical LPS, HU clipped to [-1024, 3071]; plain Blosc2, with
                        geometry and checksums in the metalayer "tapct"
    cases/<id>.json     the case's record, with the SHA-256 of itself; written last, so that its
                        presence means "packed"
    quarantine.jsonl    inputs that could not be packed, with field and reason
    .lock               held by the one pack that writes
    .key                random key behind the case ids; without it ids say nothing about paths

The format is specified byte by byte in docs/store.md. Shape suffixes: N boxes, Z Y X voxels.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapct_fast import _native
from tapct_fast.config import HuConfig
from tapct_fast.errors import InputError, StoreError
from tapct_fast.io.atomic import without_collector
from tapct_fast.io.store_index import CaseRecord, Zyx, read_sealed, record_of
from tapct_fast.io.volume import Volume

BLOCK_ZYX = (4, 64, 64)  # voxels; 32 KiB, decoded alone
MAX_INDEX_BYTES = 1 << 32  # 1.4 million cases of 300 slices: 3.0 KB each
MAX_OPEN_FILES = 256  # per process; a limit of 1024 descriptors is common


@dataclass(frozen=True, slots=True)
class Store:
    """A store opened for reading; safe to share between threads, cheap to send to processes."""

    directory: Path
    cases: tuple[CaseRecord, ...]
    codec: str
    fingerprint: str  # SHA-256 of the index: equal fingerprints hold equal voxels
    mmap: bool = False
    # One per process: a reader's locks do not survive a fork.
    _readers: dict[int, _native.BoxReader] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def open(cls, directory: Path, *, mmap: bool = False) -> "Store":
        """Read and verify the index.

        Args:
            directory: The store.
            mmap: Map files instead of reading them: faster on a local disk, slower on NFS, and a
                file that is cut short while it is read ends the process.

        Raises:
            StoreError: The folder is no store, or its index is damaged or of another version.
        """
        way_out = "make or rebuild it with 'tapct-fast pack'"
        index = read_sealed(directory / "index.json", "store index", way_out, limit=MAX_INDEX_BYTES)
        with without_collector():
            cases = tuple(record_of(raw) for raw in index["cases"])
        return cls(directory, cases, index["codec"], index["sha256"], mmap)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.directory, self.cases, self.codec, self.fingerprint, self.mmap)

    def read_box(
        self, case: int, lo_zyx: Sequence[int], shape_zyx: Sequence[int]
    ) -> npt.NDArray[np.int16]:
        """Decode one box; all bytes it is decoded from are verified.

        Args:
            case: Position in ``cases``.
            lo_zyx: First voxel.
            shape_zyx: Voxels; the box must lie inside the volume.

        Returns:
            HU, int16, of shape ``shape_zyx``.

        Raises:
            StoreError: The box exceeds the volume, or the file is missing or damaged.
        """
        boxes_1ZYX = self.read_boxes([case], [list(lo_zyx)], shape_zyx, threads=1)
        box_ZYX: npt.NDArray[np.int16] = boxes_1ZYX[0]
        return box_ZYX

    def read_boxes(
        self,
        cases: Sequence[int] | npt.NDArray[np.int64],
        lo_Nzyx: Sequence[Sequence[int]] | npt.NDArray[np.int64],
        shape_zyx: Sequence[int],
        *,
        out: npt.NDArray[Any] | None = None,
        normalise: HuConfig | None = None,
        threads: int | None = None,
        snap: bool = False,
    ) -> npt.NDArray[Any]:
        """Decode a batch of boxes of one shape with several threads, without the GIL.

        Args:
            cases: Position in ``cases`` of every box.
            lo_Nzyx: First voxel of every box.
            shape_zyx: Voxels; every box must lie inside its volume.
            out: Array to fill and return; a batch in new memory costs up to twice as much.
            normalise: Clip and z-score so, and return bfloat16 instead of HU.
            threads: Default: all cores this process may use.
            snap: Move every box to the grid of blocks first, see ``snap_to_blocks``.

        Returns:
            (N, Z, Y, X): HU as int16, or with ``normalise`` the bits of bfloat16 as uint16, which
            numpy lacks; ``data.boxes`` returns them as torch tensors.

        Raises:
            StoreError: A box exceeds its volume, or a file is missing or damaged; the message
                names the case.
        """
        indices = np.ascontiguousarray(cases, dtype=np.int64)
        corners = np.array(lo_Nzyx, dtype=np.int64, ndmin=2)
        z, y, x = map(int, shape_zyx)
        self._check_boxes(indices, corners, (z, y, x))
        if snap:
            for row, case in zip(corners, indices, strict=True):
                row[:] = snap_to_blocks(row.tolist(), (z, y, x), self.cases[case].shape_zyx)
        dtype = np.int16 if normalise is None else np.uint16
        shape = (len(indices), z, y, x)
        if out is None:
            out = np.empty(shape, dtype=dtype)
        elif out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise InputError(
                f"read_boxes: out is not {np.dtype(dtype)} of shape {shape} in C order"
            )
        zscore = None
        if normalise is not None:
            zscore = (*normalise.clip, normalise.mean, normalise.std)
        threads = len(os.sched_getaffinity(0)) if threads is None else threads
        self._reader().read_boxes(indices, corners, (z, y, x), out, zscore, max(threads, 1))
        return out

    def _check_boxes(
        self, cases: npt.NDArray[np.int64], lo_Nzyx: npt.NDArray[np.int64], shape_zyx: Zyx
    ) -> None:
        wholes = [self.cases[case].shape_zyx for case in cases.tolist()]
        room_Nzyx = np.array(wholes, dtype=np.int64).reshape(-1, 3) - shape_zyx
        is_outside = (lo_Nzyx < 0) | (lo_Nzyx > room_Nzyx) | (np.array(shape_zyx) < 1)
        if is_outside.any():
            box = int(is_outside.any(axis=1).argmax())
            record = self.cases[int(cases[box])]
            raise StoreError(
                f"box at {tuple(lo_Nzyx[box].tolist())} of shape {shape_zyx} exceeds {record.case} "
                f"of shape {record.shape_zyx}; clip the box before read_box"
            )

    def _reader(self) -> _native.BoxReader:
        pid = os.getpid()
        if pid not in self._readers:
            made = _native.BoxReader(
                [record.case for record in self.cases],
                [os.fsencode(self.directory / record.file) for record in self.cases],
                [record.crc32s for record in self.cases],
                self.mmap,
                MAX_OPEN_FILES,
            )
            self._readers.setdefault(pid, made)  # two threads may come here at once
        return self._readers[pid]

    def read_volume(self, case: int) -> Volume:
        """Decode a whole case.

        Raises:
            StoreError: The file is missing or damaged.
        """
        record = self.cases[case]
        return Volume(
            hu_ZYX=self.read_box(case, (0, 0, 0), record.shape_zyx),
            spacing_mm=record.spacing_mm,
            affine=np.array(record.affine, dtype=np.float64).reshape(4, 4),
        )

    def verify(self) -> None:
        """Read every byte of every case and check it.

        Raises:
            StoreError: A file is missing or damaged; the message names the case.
        """
        fresh = replace(self)  # its own reader: a file that is open has its header checked already
        for case in range(len(self.cases)):
            fresh.read_volume(case)


def snap_to_blocks(
    lo_zyx: Sequence[int], shape_zyx: Sequence[int], whole_zyx: Sequence[int]
) -> Zyx:
    """Return the nearest corner on the grid of blocks from which the box lies inside the volume.

    A box at a random place touches about 1.8 times as many blocks as one on the grid.
    """
    z, y, x = (
        min((lo + block // 2) // block, (whole - size) // block) * block
        for lo, size, whole, block in zip(lo_zyx, shape_zyx, whole_zyx, BLOCK_ZYX, strict=True)
    )
    return z, y, x

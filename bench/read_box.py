"""Boxes of 16x256x256 voxels at random places of a store, as HU and as normalised bfloat16.

The case is the real chest of ``bench.chest``, packed as ``tapct-fast pack`` does; all variants read
the same boxes, the file cache is warm. Rivals: slicing with python-blosc2, one thread and a handle
kept open, alone and with torch's conversion; and torch's DataLoader over a dataset that does both,
its workers started before. Neither checks a CRC; ours checks that of every byte that it decodes.
"snapped" reads other boxes: the nearest ones on the store's grid of blocks.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.chest import tiled_chest
from bench.harness import Run, start, time_ms, version
from tapct_fast import _native
from tapct_fast.config import HuConfig
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import HU_RANGE, pack
from tapct_fast.io.store import Store, snap_to_blocks
from tapct_fast.io.store_index import Codec
from tapct_fast.io.volume import Volume

Zyx = tuple[int, int, int]
Hu = NDArray[np.int16]
SOURCES = [
    *(f"csrc/{name}.cpp" for name in ("frame", "box_reader", "file", "inflate", "bindings")),
    *(f"csrc/include/tapct/{name}.hpp" for name in ("clones", "zscore")),
    "tapct_fast/io/store.py",
]
CODECS: tuple[Codec, ...] = ("lz4hc", "zstd")
NUM_BOXES = 64
LOADED_AT_ONCE = 8  # boxes of one batch of the DataLoader
HU = HuConfig()
OURS = "tapct_fast bf16, 2 threads"


def draw_boxes(volume_zyx: Zyx, box_zyx: Zyx) -> list[Zyx]:
    """Draw the first voxels of boxes inside the volume."""
    rng = np.random.default_rng(0)
    places = [whole - size + 1 for whole, size in zip(volume_zyx, box_zyx, strict=True)]
    return [(int(z), int(y), int(x)) for z, y, x in rng.integers(0, places, (NUM_BOXES, 3))]


def to_bf16(hu: Hu) -> Tensor:
    """Clip, z-score and round as the released processor does."""
    values = torch.from_numpy(hu).float().clamp_(*HU.clip)
    return values.sub_(HU.mean).div_(HU.std).bfloat16()


class SlicedBoxes(Dataset[Tensor]):
    """What one would write without us: a slice by python-blosc2, converted by torch."""

    def __init__(self, path: Path, corners: Sequence[Zyx], box_zyx: Zyx) -> None:
        self._path = path
        self._file: blosc2.NDArray | None = None  # one per process
        self._boxes = [
            tuple(slice(lo, lo + size) for lo, size in zip(corner, box_zyx, strict=True))
            for corner in corners
        ]

    def __len__(self) -> int:
        return len(self._boxes)

    def __getitem__(self, index: int) -> Tensor:
        return to_bf16(self.hu_of(index))

    def hu_of(self, index: int) -> Hu:
        """Return one box in HU."""
        if self._file is None:
            self._file = blosc2.open(self._path, mode="r", dparams={"nthreads": 1})
        hu_ZYX: Hu = self._file[self._boxes[index]]
        return hu_ZYX


def _load(loader: DataLoader[Tensor]) -> list[Tensor]:
    return [box_ZYX for batch_BZYX in loader for box_ZYX in batch_BZYX]


def _measure(run: Run, codec: Codec, volume: Volume, box_zyx: Zyx, folder: Path) -> None:
    volume_zyx = volume.hu_ZYX.shape
    volume_name, box_name = ("x".join(map(str, shape)) for shape in (volume_zyx, box_zyx))
    case = f"{NUM_BOXES} boxes {box_name} of {volume_name}, {codec}"
    if not run.wants(case, "cpu"):
        return
    directory = folder / codec
    write_nifti(folder / "scan.nii", volume.hu_ZYX, volume.affine)
    pack([folder / "scan.nii"], directory, codec=codec)
    store, mapped = Store.open(directory), Store.open(directory, mmap=True)
    path = directory / store.cases[0].file
    corners = draw_boxes(store.cases[0].shape_zyx, box_zyx)
    snapped = [snap_to_blocks(corner, box_zyx, volume_zyx) for corner in corners]
    cases = np.zeros(NUM_BOXES, dtype=np.int64)
    sliced = SlicedBoxes(path, corners, box_zyx)
    hu_NZYX = np.empty((NUM_BOXES, *box_zyx), dtype=np.int16)
    bf16_NZYX = torch.empty((NUM_BOXES, *box_zyx), dtype=torch.bfloat16)
    bits_NZYX = bf16_NZYX.view(torch.uint16).numpy()

    def ours(source: Store, threads: int, *, snap: bool = False) -> Tensor:
        source.read_boxes(
            cases, corners, box_zyx, out=bits_NZYX, normalise=HU, threads=threads, snap=snap
        )
        return bf16_NZYX

    hu_readers: dict[str, Callable[[], Sequence[Hu]]] = {
        "blosc2 int16": lambda: [sliced.hu_of(i) for i in range(NUM_BOXES)],
        "tapct_fast int16, 1 thread": lambda: list(
            store.read_boxes(cases, corners, box_zyx, out=hu_NZYX, threads=1)
        ),
    }
    readers: dict[str, Callable[[], Sequence[Tensor] | Tensor]] = {
        "blosc2, torch bf16": lambda: [sliced[i] for i in range(NUM_BOXES)]
    }
    for num in (0, 1, 2):
        loader = DataLoader(
            SlicedBoxes(path, corners, box_zyx),
            batch_size=LOADED_AT_ONCE,
            num_workers=num,
            persistent_workers=num > 0,
        )
        readers[f"DataLoader bf16, {num} workers"] = partial(_load, loader)
    readers |= {
        "tapct_fast bf16, 1 thread": lambda: ours(store, 1),
        OURS: lambda: ours(store, 2),
        f"{OURS}, mmap": lambda: ours(mapped, 2),
        f"{OURS}, snapped": lambda: ours(store, 2, snap=True),
    }

    expected = np.clip(volume.hu_ZYX, *HU_RANGE)

    def box_at(corner: Zyx) -> Hu:
        z, y, x = (slice(lo, lo + size) for lo, size in zip(corner, box_zyx, strict=True))
        return expected[z, y, x]

    for name, read_hu in hu_readers.items():
        for corner, found_ZYX in zip(corners, read_hu(), strict=True):
            if not np.array_equal(found_ZYX, box_at(corner)):
                raise ValueError(f"{name} returns other voxels than were packed; not timed")
    for name, read in readers.items():
        bf16_NZYX.zero_()
        at = snapped if name.endswith("snapped") else corners
        for corner, box_ZYX in zip(at, read(), strict=True):
            if not torch.equal(box_ZYX, to_bf16(box_at(corner))):
                raise ValueError(f"{name} returns other values than torch computes; not timed")

    times = time_ms(hu_readers | readers, device="cpu", rounds=3 if run.is_tiny else 21)
    boxes_per_s = {name: round(NUM_BOXES / p50 * 1e3, 1) for name, (_, p50, _) in times.items()}
    best = max(rate for name, rate in boxes_per_s.items() if name.startswith("DataLoader"))
    run.write(
        case,
        "cpu",
        times,
        bytes=bits_NZYX.nbytes,
        boxes_per_s=boxes_per_s,
        ratio_to_best_dataloader=round(boxes_per_s[OURS] / best, 2),
        file_bytes=path.stat().st_size,
        verified="equal voxels, equal bits of bfloat16",
        codec=codec,
        inflate_backend=_native.inflate_backend(),
        c_blosc2=_native.blosc2_version(),
        blosc2=version("blosc2"),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both codecs."""
    run = start(__file__, SOURCES, argv)
    volume = tiled_chest(is_tiny=run.is_tiny)
    if volume is None:
        return
    box_zyx = (4, 32, 32) if run.is_tiny else (16, 256, 256)
    for codec in CODECS:
        with tempfile.TemporaryDirectory() as folder:
            _measure(run, codec, volume, box_zyx, Path(folder))


if __name__ == "__main__":
    main()

"""Decoding boxes of 16x256x256 voxels from a store against python-blosc2 on the same file.

The case is a synthetic phantom of 128x512x512 voxels, packed as ``tapct-fast pack`` does; the boxes
lie at eight fixed random places, so chunks are cut. ``Store.read_box`` checks the CRC of all bytes
that it decodes, in the calling thread; ``Store.read_boxes`` does so into one array that is kept.
python-blosc2 has no checksum, and is timed with one thread, a handle kept open or opened for
every box, and with its default threads. Times are per eight boxes, file cache warm.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import blosc2
import numpy as np
from numpy.typing import NDArray

from bench.harness import start, time_ms, version
from bench.read_nifti import write_scan
from tapct_fast import _native
from tapct_fast.io.store import Store, pack

Box = tuple[slice, slice, slice]
Hu = NDArray[np.int16]
SOURCES = [
    *(f"csrc/{name}" for name in ("frame.cpp", "box_reader.cpp", "file.cpp", "bindings.cpp")),
    "tapct_fast/io/store.py",
]
NUM_BOXES = 8


def draw_boxes(
    volume_zyx: tuple[int, int, int], box_zyx: tuple[int, int, int]
) -> list[tuple[int, int, int]]:
    """Draw the first voxels of boxes inside the volume."""
    rng = np.random.default_rng(0)
    places = [whole - size + 1 for whole, size in zip(volume_zyx, box_zyx, strict=True)]
    return [(int(z), int(y), int(x)) for z, y, x in rng.integers(0, places, (NUM_BOXES, 3))]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the one case with the store's default codec."""
    run = start(__file__, SOURCES, argv)
    volume_zyx = (8, 64, 64) if run.is_tiny else (128, 512, 512)
    box_zyx = (4, 32, 32) if run.is_tiny else (16, 256, 256)
    volume_name, box_name = ("x".join(map(str, shape)) for shape in (volume_zyx, box_zyx))
    case = f"{NUM_BOXES} boxes {box_name} of {volume_name}"
    if not run.wants(case, "cpu"):
        return
    with tempfile.TemporaryDirectory() as folder:
        scan, directory = Path(folder) / "scan.nii.gz", Path(folder) / "store"
        hu_ZYX = write_scan(scan, volume_zyx)
        pack([scan], directory)
        store = Store.open(directory)
        path = directory / store.cases[0].file
        corners = draw_boxes(volume_zyx, box_zyx)
        boxes: list[Box] = []
        for corner in corners:
            z, y, x = (slice(lo, lo + n) for lo, n in zip(corner, box_zyx, strict=True))
            boxes.append((z, y, x))

        out_NZYX = np.empty((NUM_BOXES, *box_zyx), dtype=np.int16)
        one_thread = {"nthreads": 1}
        kept = blosc2.open(path, mode="r", dparams=one_thread)
        kept_default = blosc2.open(path, mode="r")
        variants: dict[str, Callable[[], list[Hu]]] = {
            "Store.read_box": lambda: [store.read_box(0, lo, box_zyx) for lo in corners],
            "Store.read_boxes, 1 thread": lambda: list(
                store.read_boxes([0] * NUM_BOXES, corners, box_zyx, out=out_NZYX, threads=1)
            ),
            "Store.read_boxes, 2 threads": lambda: list(
                store.read_boxes([0] * NUM_BOXES, corners, box_zyx, out=out_NZYX, threads=2)
            ),
            "blosc2, handle kept": lambda: [kept[box] for box in boxes],
            "blosc2, opened per box": lambda: [
                blosc2.open(path, mode="r", dparams=one_thread)[box] for box in boxes
            ],
            f"blosc2, handle kept, {blosc2.nthreads} threads": lambda: [
                kept_default[box] for box in boxes
            ],
        }
        for name, call in variants.items():
            for found_ZYX, box in zip(call(), boxes, strict=True):
                if not np.array_equal(found_ZYX, hu_ZYX[box]):
                    raise ValueError(f"{name} returns other voxels than were packed; not timed")
        run.write(
            case,
            "cpu",
            time_ms(variants, device="cpu", rounds=3 if run.is_tiny else 30),
            bytes=sum(hu_ZYX[box].nbytes for box in boxes),
            file_bytes=path.stat().st_size,
            verified="equal voxels",
            checks_crc={name: name.startswith("Store") for name in variants},
            codec=store.codec,
            c_blosc2=_native.blosc2_version(),
            blosc2=version("blosc2"),
        )


if __name__ == "__main__":
    main()

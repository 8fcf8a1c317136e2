"""What readers make of damage: 200 random one-bit flips and 200 truncations of one file each.

A reader finds the damage (an error), is not touched by it (right voxels: a flip in gzip's time
stamp) or returns wrong voxels without a word; the row counts the three. The file is a part of the
real chest of ``bench.chest``, as ``.nii.gz`` in one gzip member and as a case of the store.
``times_ms`` is the reading of the undamaged file.
"""

import tempfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
import SimpleITK
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Image
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from bench.chest import tiled_chest, write_single_member
from bench.harness import start, time_ms, version
from tapct_fast import _native
from tapct_fast.errors import TapctError
from tapct_fast.io.pack import pack
from tapct_fast.io.read import read_volume
from tapct_fast.io.store import Store

SOURCES = [
    *(f"csrc/{n}.cpp" for n in ("box_reader", "file", "frame", "gzip_index", "inflate", "nifti")),
    *(f"tapct_fast/io/{name}.py" for name in ("nifti", "read", "store")),
]
RIVALS = ("medrs", "SimpleITK", "nibabel", "monai", "blosc2")
# What these readers raise for damage: ours, Python's, nibabel's, and what MONAI passes on.
DAMAGE = (
    *(TapctError, zlib.error, HeaderDataError, ImageFileError, OSError, EOFError, MemoryError),
    *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
)
Outcome = Literal["found", "harmless", "wrong voxels"]
Reader = Callable[[Path], NDArray[Any]]


def _rivals() -> dict[str, Reader]:
    rivals: dict[str, Reader] = {
        "nibabel": lambda path: np.asarray(Nifti1Image.from_filename(path).dataobj).T,
        "SimpleITK": lambda path: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)),
    }
    if find_spec("medrs"):
        medrs: Any = import_module("medrs")
        rivals["medrs"] = lambda path: np.asarray(medrs.load(str(path)).to_numpy()).T
    if find_spec("monai"):
        load: Any = import_module("monai.transforms").LoadImage(image_only=True)
        rivals["MONAI"] = lambda path: load(path).numpy().T
    return rivals


def _outcome(read: Reader, path: Path, expected: NDArray[np.int16]) -> Outcome:
    try:
        found = read(path)
    except DAMAGE:
        return "found"
    return "harmless" if np.array_equal(found, expected) else "wrong voxels"


def _damage(whole: bytes, num: int) -> dict[str, list[bytes]]:
    """Return flipped and cut copies of a file, the same for every reader."""
    rng = np.random.default_rng(0)
    flips = []
    for bit in rng.choice(8 * len(whole), num, replace=False).tolist():
        copy = bytearray(whole)
        copy[bit // 8] ^= 1 << bit % 8
        flips.append(bytes(copy))
    cuts = [whole[:size] for size in rng.choice(len(whole), num, replace=False).tolist()]
    return {"flips": flips, "truncations": cuts}


def _count(
    readers: dict[str, Reader], path: Path, expected: NDArray[np.int16], num: int
) -> dict[str, dict[str, dict[str, int]]]:
    whole = path.read_bytes()
    counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in readers}
    for kind, copies in _damage(whole, num).items():
        for name in readers:
            counts[name][kind] = {"found": 0, "harmless": 0, "wrong voxels": 0}
        for copy in copies:
            path.write_bytes(copy)
            for name, read in readers.items():
                counts[name][kind][_outcome(read, path, expected)] += 1
    path.write_bytes(whole)
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Count outcomes for one ``.nii.gz`` and one case of the store."""
    run = start(__file__, SOURCES, argv)
    volume = tiled_chest(is_tiny=run.is_tiny)
    if volume is None:
        return
    hu_ZYX = volume.hu_ZYX
    if not run.is_tiny:
        hu_ZYX = np.ascontiguousarray(hu_ZYX[:64, 128:384, 128:384])
    num = 10 if run.is_tiny else 200
    shape = "x".join(map(str, hu_ZYX.shape))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = folder / "scan.nii.gz"
        write_single_member(scan, hu_ZYX, volume.affine)
        pack([scan], folder / "store")
        case = folder / "store" / Store.open(folder / "store").cases[0].file
        expected = Store.open(folder / "store").read_volume(0).hu_ZYX

        def stored(_: Path) -> NDArray[np.int16]:
            return Store.open(folder / "store").read_volume(0).hu_ZYX

        def with_blosc2(path: Path) -> NDArray[Any]:
            return np.asarray(blosc2.open(str(path), mode="r")[:])

        cases: list[tuple[str, Path, NDArray[np.int16], dict[str, Reader]]] = [
            (
                f"nii.gz {shape}",
                scan,
                hu_ZYX,
                {"tapct_fast": lambda path: read_volume(path).hu_ZYX, **_rivals()},
            ),
            (
                f"store {shape}",
                case,
                expected,
                {"tapct_fast": stored, "python-blosc2": with_blosc2},
            ),
        ]
        for title, path, voxels, readers in cases:
            if not run.wants(title, "cpu"):
                continue
            for reader, read in readers.items():
                if not np.array_equal(read(path), voxels):
                    raise ValueError(f"{reader} misreads the undamaged file; nothing to count")
            calls = {reader: partial(read, path) for reader, read in readers.items()}
            times = time_ms(calls, device="cpu", rounds=3)
            run.write(
                title,
                "cpu",
                times,
                bytes=voxels.nbytes,
                file_bytes=path.stat().st_size,
                verified="equal voxels of the undamaged file",
                trials=num,
                outcomes=_count(readers, path, voxels, num),
                inflate=_native.inflate_backend(),
                rivals={
                    n: version(n) for n in ("medrs", "SimpleITK", "nibabel", "monai", "blosc2")
                },
            )


if __name__ == "__main__":
    main()

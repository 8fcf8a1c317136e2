"""From the path of a ``.nii.gz`` to bfloat16 pixel values 224x224xD, file cache warm, one thread.

The scan is 20 slices of a real chest CT, repeated along depth to 275 (512x512x275 int16, 144 MB),
in one gzip member at level 6. Rivals: medrs, SimpleITK, nibabel and MONAI read the file, then torch
resizes, pads, clips, normalises and casts in the same order. A second case loads two files: ours on
one thread and on two, the rivals in two threads. Without the real scan (``TAPCT_TEST_DATA``) or
with ``--tiny`` a synthetic phantom takes its place, and the row's case says so.
"""

import gzip
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from nibabel.nifti1 import Nifti1Image
from numpy.typing import NDArray
from torch import Tensor

from bench.harness import REPOSITORY, start, time_ms, version
from tapct_fast import _native
from tapct_fast.backbone.load_scans import load_for_tapct
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.data.phantom import make_phantom
from tapct_fast.io.nifti import read_nifti, write_nifti

SOURCES = [
    *(f"csrc/{name}" for name in ("inflate.cpp", "nifti.cpp", "pixels.cpp")),
    *(f"tapct_fast/io/{name}" for name in ("nifti.py", "orient.py", "pixels.py", "read.py")),
    "tapct_fast/backbone/load_scans.py",
]
NUM_SLICES = 275
Load = Callable[[Path], Tensor]


def _source() -> Path | None:
    folder = Path(os.environ.get("TAPCT_TEST_DATA", REPOSITORY / ".." / "shared" / "data" / "ct"))
    return next((folder / "nifti").glob("lidc0314*.nii.gz"), None)


def _write_scan(folder: Path, source: Path | None, *, is_tiny: bool) -> Path:
    """Write the scan with one gzip member at level 6."""
    if source is None:
        shape_zyx = (8, 64, 64) if is_tiny else (NUM_SLICES, 512, 512)
        volume = make_phantom(0, shape_zyx=shape_zyx, spacing_mm=(1.0, 0.8, 0.8)).volume
        hu_ZYX = volume.hu_ZYX
    else:
        volume = read_nifti(source)
        repeats = -(-NUM_SLICES // volume.hu_ZYX.shape[0])
        hu_ZYX = np.tile(volume.hu_ZYX, (repeats, 1, 1))[:NUM_SLICES]
    plain, packed = folder / "scan.nii", folder / "scan.nii.gz"
    write_nifti(plain, hu_ZYX, volume.affine)
    packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=6, mtime=0))
    plain.unlink()
    return packed


def _with_torch(hu_ZYX: NDArray[np.generic]) -> Tensor:
    hu = torch.from_numpy(np.ascontiguousarray(hu_ZYX))
    return Preprocess().apply(hu[None, None]).bfloat16()


def _with_simpleitk(path: Path) -> Tensor:
    image = SimpleITK.ReadImage(path)
    return _with_torch(SimpleITK.GetArrayViewFromImage(image).copy())


def _with_nibabel(path: Path) -> Tensor:
    return _with_torch(np.asarray(Nifti1Image.from_filename(path).dataobj).T)


def _rivals() -> dict[str, Load]:
    rivals: dict[str, Load] = {
        "SimpleITK + torch": _with_simpleitk,
        "nibabel + torch": _with_nibabel,
    }
    if find_spec("medrs"):
        medrs: Any = import_module("medrs")  # Any: optional, its types are not at hand
        rivals["medrs + torch"] = lambda path: _with_torch(
            np.asarray(medrs.load(str(path)).to_numpy()).T
        )
    if find_spec("monai"):
        load: Any = import_module("monai.transforms").LoadImage(image_only=True)
        rivals["MONAI + torch"] = lambda path: _with_torch(load(path).numpy().T)
    return rivals


def _verify(name: str, pixels: Tensor, expected: Tensor) -> None:
    # One step of bfloat16, or the rounding of float32 sums near 0.
    if pixels.shape != expected.shape or not torch.allclose(
        pixels.float(), expected.float(), rtol=2**-7, atol=1e-4
    ):
        raise ValueError(f"{name} gives other pixel values; not timed")


def _both(load: Load, pool: ThreadPoolExecutor, paths: list[Path]) -> list[Tensor]:
    return list(pool.map(load, paths))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one file on one thread, and two files on two."""
    run = start(__file__, SOURCES, argv)
    source = None if run.is_tiny else _source()
    kind = "phantom" if source is None else "chest"
    if source is None and not run.is_tiny:
        print("load_for_tapct: no real CT, set TAPCT_TEST_DATA; a phantom takes its place")
    torch.set_num_threads(1)
    rivals = _rivals()

    def ours(path: Path) -> Tensor:
        return load_for_tapct([path], threads=1).pixels_BCZYX

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        path = _write_scan(Path(folder), source, is_tiny=run.is_tiny)
        other = Path(folder) / "other.nii.gz"
        other.write_bytes(path.read_bytes())
        paths = [path, other]
        volume = read_nifti(path)
        expected = _with_torch(volume.hu_ZYX)
        for name, load in {"tapct_fast": ours, **rivals}.items():
            _verify(name, load(path), expected)
        _verify(
            "2 threads", load_for_tapct(paths, threads=2).pixels_BCZYX, torch.cat([expected] * 2)
        )

        one: dict[str, Callable[[], Any]] = {"tapct_fast": lambda: ours(path)}
        two: dict[str, Callable[[], Any]] = {
            "tapct_fast": lambda: load_for_tapct(paths, threads=2),
            "tapct_fast, 1 thread": lambda: load_for_tapct(paths, threads=1),
        }
        for name, load in rivals.items():
            one[name] = partial(load, path)
            two[name] = partial(_both, load, pool, paths)
        for case, calls, num_files in ((f"{kind} 1 file", one, 1), (f"{kind} 2 files", two, 2)):
            if not run.wants(case, "cpu"):
                continue
            run.write(
                case,
                "cpu",
                time_ms(calls, device="cpu", rounds=3 if run.is_tiny else 7),
                bytes=num_files * volume.hu_ZYX.nbytes,
                file_bytes=num_files * path.stat().st_size,
                verified="pixel values within one step of bfloat16",
                inflate=_native.inflate_backend(),
                rivals={n: version(n) for n in ("medrs", "SimpleITK", "nibabel", "monai")},
            )


if __name__ == "__main__":
    main()

"""From the path of a ``.nii.gz`` to bfloat16 pixel values 224x224xD, file cache warm, one thread.

The scan is the real chest of ``bench.chest``. Rivals: medrs, SimpleITK, nibabel and MONAI read the
file, then torch resizes, pads, clips, normalises and casts in the same order. A second case loads
two files: ours on one thread and on two, the rivals in two threads.
"""

import shutil
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

from bench.chest import tiled_chest, write_single_member
from bench.harness import start, time_ms, version
from tapct_fast import _native
from tapct_fast.backbone.load_scans import load_for_tapct
from tapct_fast.backbone.preprocess import Preprocess

SOURCES = [
    *(f"csrc/{name}" for name in ("inflate.cpp", "nifti.cpp", "pixels.cpp")),
    *(f"tapct_fast/io/{name}" for name in ("nifti.py", "orient.py", "pixels.py", "read.py")),
    "tapct_fast/backbone/load_scans.py",
]
Load = Callable[[Path], Tensor]


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
    volume = tiled_chest(is_tiny=run.is_tiny)
    if volume is None:
        return
    torch.set_num_threads(1)
    rivals = _rivals()

    def ours(path: Path) -> Tensor:
        return load_for_tapct([path], threads=1).pixels_BCZYX

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        paths = [path, other] = [Path(folder) / "scan.nii.gz", Path(folder) / "other.nii.gz"]
        write_single_member(path, volume.hu_ZYX, volume.affine)
        shutil.copy(path, other)
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
        shape = "x".join(map(str, volume.hu_ZYX.shape))
        for case, calls, num_files in ((f"1 file {shape}", one, 1), (f"2 files {shape}", two, 2)):
            if not run.wants(case, "cpu"):
                continue
            run.write(
                case,
                "cpu",
                time_ms(calls, device="cpu", rounds=3 if run.is_tiny else 5),
                bytes=num_files * volume.hu_ZYX.nbytes,
                file_bytes=num_files * path.stat().st_size,
                verified="pixel values within one step of bfloat16",
                inflate=_native.inflate_backend(),
                rivals={n: version(n) for n in ("medrs", "SimpleITK", "nibabel", "monai")},
            )


if __name__ == "__main__":
    main()

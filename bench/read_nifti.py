"""Reading one NIfTI of real size into checked int16 voxels against other readers, cache warm.

The scan is the real chest of ``bench.chest``. Rivals run in the same process with one thread each:
medrs and MONAI where installed, SimpleITK, nibabel, and Python's own gzip. Whether a reader checks
the CRC is tried, not assumed: ``checks_crc`` says who refuses a file whose CRC is wrong. Ours
checks sizes, the CRC, geometry and HU range, and returns canonical orientation; "buffer" decodes
into memory that was touched before, as a loader's pinned buffer is.
"""

import gzip
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from nibabel.nifti1 import Nifti1Image
from numpy.typing import NDArray

from bench.chest import tiled_chest, write_single_member
from bench.harness import start, time_ms, version
from tapct_fast import _native
from tapct_fast.errors import FormatError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.read import read_volume

Hu = NDArray[np.int16]
Reader = Callable[[Path], NDArray[Any]]
SOURCES = [
    *(f"csrc/{name}.cpp" for name in ("buffer", "file", "gzip_index", "inflate", "nifti")),
    *("csrc/voxels.cpp", "csrc/bindings.cpp"),
    *(f"tapct_fast/io/{name}.py" for name in ("nifti", "orient", "read")),
]
HEADER_BYTES = 352


def _ours_into(buffer: NDArray[np.uint8], threads: int, path: Path) -> Hu:
    return read_volume(path, buffer=buffer, threads=threads).hu_ZYX


def _with_nibabel(path: Path) -> NDArray[Any]:
    # The proxy, not get_fdata: no conversion to float64.
    return np.asarray(Nifti1Image.from_filename(path).dataobj).T


def _with_simpleitk(path: Path) -> NDArray[Any]:
    voxels_ZYX: NDArray[Any] = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
    return voxels_ZYX


def _with_gzip(shape_zyx: tuple[int, ...], type_name: str, path: Path) -> NDArray[Any]:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), type_name, offset=HEADER_BYTES).reshape(shape_zyx)


def _rivals(shape_zyx: tuple[int, ...], type_name: str) -> dict[str, Reader]:
    readers: dict[str, Reader] = {}
    if importlib.util.find_spec("medrs"):
        import medrs

        readers["medrs"] = lambda path: medrs.load(str(path)).to_numpy()
    if importlib.util.find_spec("monai"):
        from monai.transforms.io.array import LoadImage

        load = LoadImage(image_only=True, dtype=np.dtype(type_name))
        readers["MONAI"] = lambda path: np.asarray(load(path)).T
    return readers | {
        "SimpleITK": _with_simpleitk,
        "nibabel": _with_nibabel,
        "Python gzip": partial(_with_gzip, shape_zyx, type_name),
    }


def _is_refused(read: Reader, path: Path) -> bool:
    try:
        read(path)
    except (FormatError, OSError, EOFError, RuntimeError, ValueError):
        return True  # ours, gzip's, nibabel's, ITK's, medrs'
    return False


def _check(readers: dict[str, Reader], path: Path, expected_ZYX: Hu) -> None:
    """Compare values in any of the two axis orders; rivals keep the file's directions."""
    turns = [expected_ZYX, expected_ZYX[:, ::-1, ::-1]]
    for name, read in readers.items():
        found = read(path)
        found_ZYX = found if found.shape == expected_ZYX.shape else found.T
        if not any(np.array_equal(found_ZYX, turn) for turn in turns):
            raise ValueError(f"{name} returns other voxels than were written; not timed")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure five cases: one file, RAS, float32, two files, and members in parallel."""
    run = start(__file__, SOURCES, argv)
    volume = tiled_chest(is_tiny=run.is_tiny)
    if volume is None:
        return
    hu_ZYX = volume.hu_ZYX
    size = "x".join(map(str, hu_ZYX.shape))
    lps, ras = np.diag([-0.78, -0.78, 1.0, 1.0]), np.diag([0.78, 0.78, 1.0, 1.0])
    rounds = 3 if run.is_tiny else 5
    facts = {
        "inflate": _native.inflate_backend(),
        **{name.lower(): version(name) for name in ("medrs", "monai", "nibabel", "SimpleITK")},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases: list[tuple[str, NDArray[Any], NDArray[np.float64]]] = [
            ("int16", hu_ZYX, lps),
            ("int16 RAS", hu_ZYX, ras),
            ("float32", hu_ZYX.astype(np.float32), lps),
        ]
        for kind, array, affine in cases:
            case = f"{size} {kind}, one file, one thread"
            if not run.wants(case, "cpu"):
                continue
            path = folder / "scan.nii.gz"
            write_single_member(path, array, affine)
            buffer = np.zeros(array.nbytes + 4096, np.uint8)
            readers: dict[str, Reader] = {
                "tapct_fast": lambda path: read_volume(path).hu_ZYX,
                "tapct_fast, buffer": partial(_ours_into, buffer, 1),
                **_rivals(array.shape, array.dtype.name),
            }
            _check(readers, path, hu_ZYX)
            damaged = folder / "damaged.nii.gz"
            content = bytearray(path.read_bytes())
            content[-8] ^= 1  # the CRC-32 of RFC 1952 stands in front of the last four bytes
            damaged.write_bytes(content)
            calls: dict[str, Callable[[], Any]] = {
                key: partial(read, path) for key, read in readers.items()
            }
            run.write(
                case,
                "cpu",
                time_ms(calls, device="cpu", rounds=rounds),
                bytes=array.nbytes,
                file_bytes=path.stat().st_size,
                verified="equal voxels",
                checks_crc={key: _is_refused(read, damaged) for key, read in readers.items()},
                **facts,
            )
        case = f"{size} int16, two files on two threads; eight MiB members"
        if run.wants(case, "cpu"):
            path = folder / "scan.nii.gz"
            write_single_member(path, hu_ZYX, lps)
            second, members = folder / "second.nii.gz", folder / "members.nii.gz"
            second.write_bytes(path.read_bytes())
            write_nifti(members, hu_ZYX, lps, threads=2, level=6)
            buffers = [np.zeros(hu_ZYX.nbytes + 4096, np.uint8) for _ in range(2)]
            for threads in (1, 2):
                _check({"members": partial(_ours_into, buffers[0], threads)}, members, hu_ZYX)
            with ThreadPoolExecutor(2) as pool:

                def both() -> list[Hu]:
                    return list(pool.map(_ours_into, buffers, (1, 1), (path, second)))

                calls = {
                    "one file, one thread": partial(_ours_into, buffers[0], 1, path),
                    "two files, two threads": both,
                    "members, one thread": partial(_ours_into, buffers[0], 1, members),
                    "members, two threads": partial(_ours_into, buffers[0], 2, members),
                }
                times = time_ms(calls, device="cpu", rounds=rounds)
            one, two = times["one file, one thread"][1], times["two files, two threads"][1]
            run.write(
                case,
                "cpu",
                times,
                bytes=hu_ZYX.nbytes,
                file_bytes=path.stat().st_size,
                verified="equal voxels",
                throughput_of_two=round(2 * one / two, 3),
                **facts,
            )


if __name__ == "__main__":
    main()

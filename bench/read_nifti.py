"""Reading one ``.nii.gz`` of real size into int16 voxels against other readers, file cache warm.

The scan is a synthetic phantom of 128x512x512 voxels, gzipped at level 4. Rivals: nibabel,
SimpleITK, and Python's own gzip, which like ours decodes to the end and checks the CRC. Whether a
reader checks it is tried, not assumed: ``checks_crc`` says who refuses a file whose CRC is wrong.
Ours also returns the volume in canonical orientation, with its header cross-checked.
"""

import gzip
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK
from nibabel.nifti1 import Nifti1Image
from numpy.typing import NDArray

from bench.harness import start, time_ms, version
from tapct_fast import _native
from tapct_fast.data.phantom import make_phantom
from tapct_fast.errors import FormatError
from tapct_fast.io.nifti import read_nifti, write_nifti

Hu = NDArray[np.int16]
SOURCES = [
    *(f"csrc/{name}" for name in ("file.cpp", "inflate.cpp", "nifti.cpp", "bindings.cpp")),
    *(f"tapct_fast/io/{name}" for name in ("nifti.py", "orient.py")),
]
HEADER_BYTES = 352


def write_scan(path: Path, shape_zyx: tuple[int, int, int]) -> Hu:
    """Write a phantom as NIfTI and return its voxels."""
    volume = make_phantom(0, shape_zyx=shape_zyx, spacing_mm=(2.5, 0.7, 0.7)).volume
    write_nifti(path, volume.hu_ZYX, volume.affine)
    return volume.hu_ZYX


def _with_nibabel(path: Path) -> Hu:
    # The proxy, not get_fdata: no conversion to float64.
    voxels_XYZ: Hu = np.asarray(Nifti1Image.from_filename(path).dataobj)
    return voxels_XYZ.T


def _with_simpleitk(path: Path) -> Hu:
    voxels_ZYX: Hu = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))
    return voxels_ZYX


def _is_refused(read: Callable[[Path], Hu], path: Path) -> bool:
    try:
        read(path)
    except (FormatError, OSError, EOFError, RuntimeError):  # ours, gzip's, nibabel's, ITK's
        return True
    return False


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the one scan."""
    run = start(__file__, SOURCES, argv)
    shape_zyx = (8, 64, 64) if run.is_tiny else (128, 512, 512)
    case = "x".join(map(str, shape_zyx))
    if not run.wants(case, "cpu"):
        return

    def with_gzip(path: Path) -> Hu:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), "<i2", offset=HEADER_BYTES).reshape(shape_zyx)

    readers: dict[str, Callable[[Path], Hu]] = {
        "tapct_fast": lambda path: read_nifti(path).hu_ZYX,
        "nibabel": _with_nibabel,
        "SimpleITK": _with_simpleitk,
        "Python gzip": with_gzip,
    }
    with tempfile.TemporaryDirectory() as folder:
        path, damaged = Path(folder) / "scan.nii.gz", Path(folder) / "damaged.nii.gz"
        hu_ZYX = write_scan(path, shape_zyx)
        for name, read in readers.items():
            found_ZYX = read(path)
            if found_ZYX.dtype != np.int16 or not np.array_equal(found_ZYX, hu_ZYX):
                raise ValueError(f"{name} returns other voxels than were written; not timed")

        content = bytearray(path.read_bytes())
        content[-8] ^= 1  # the CRC-32 of RFC 1952 stands in front of the last four bytes
        damaged.write_bytes(content)
        checks_crc = {name: _is_refused(read, damaged) for name, read in readers.items()}

        calls = {name: (lambda read=read: read(path)) for name, read in readers.items()}
        times = time_ms(calls, device="cpu", rounds=3 if run.is_tiny else 11)
        run.write(
            case,
            "cpu",
            times,
            bytes=hu_ZYX.nbytes,
            file_bytes=path.stat().st_size,
            verified="equal voxels",
            checks_crc=checks_crc,
            inflate=_native.inflate_backend(),
            nibabel=version("nibabel"),
            simpleitk=version("simpleitk"),
        )


if __name__ == "__main__":
    main()

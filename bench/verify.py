"""Checking an archive of ``.nii.gz`` scans against inflating the same files with ISA-L in Python.

The archive is two copies of the real chest of ``bench.chest``. The rivals do the least that finds
a flipped bit: they inflate each file to its end, which checks the CRC. ``verify`` does that, judges
header, geometry and values, and writes its reports. One thread each; times are per archive, file
cache warm.
"""

import gzip
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from isal import igzip

from bench.chest import tiled_chest, write_single_member
from bench.harness import start, time_ms, version
from tapct_fast import _native
from tapct_fast.io.verify import Verification, verify

SOURCES = [
    *(f"csrc/{name}" for name in ("file.cpp", "inflate.cpp", "nifti.cpp", "bindings.cpp")),
    *(f"tapct_fast/io/{name}" for name in ("nifti.py", "orient.py", "read.py", "verify.py")),
]
NUM_SCANS = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the one archive."""
    run = start(__file__, SOURCES, argv)
    volume = tiled_chest(is_tiny=run.is_tiny)
    if volume is None:
        return
    case = f"{NUM_SCANS} scans " + "x".join(map(str, volume.hu_ZYX.shape))
    if not run.wants(case, "cpu"):
        return
    with tempfile.TemporaryDirectory() as folder:
        archive, out = Path(folder) / "archive", Path(folder) / "out"
        archive.mkdir()
        scans = [archive / f"{n}.nii.gz" for n in range(NUM_SCANS)]
        write_single_member(scans[0], volume.hu_ZYX, volume.affine)
        for copy in scans[1:]:
            shutil.copy(scans[0], copy)

        def ours() -> Verification:
            shutil.rmtree(out, ignore_errors=True)  # nothing to resume from
            return verify([archive], out, threads=1)

        def with_isal() -> list[int]:
            return [
                len(igzip.decompress(scan.read_bytes()))  # type: ignore[no-untyped-call]
                for scan in scans
            ]

        def with_gzip() -> list[int]:
            return [len(gzip.decompress(scan.read_bytes())) for scan in scans]

        voxel_bytes = volume.hu_ZYX.nbytes
        sizes = {*with_isal(), *with_gzip()}
        if ours().num_refused or sizes != {voxel_bytes + 352}:
            raise ValueError("a good archive is refused, or inflates to another size; not timed")
        times = time_ms(
            {"tapct_fast verify": ours, "ISA-L": with_isal, "Python gzip": with_gzip},
            device="cpu",
            rounds=3 if run.is_tiny else 11,
        )
        run.write(
            case,
            "cpu",
            times,
            bytes=NUM_SCANS * voxel_bytes,
            file_bytes=sum(scan.stat().st_size for scan in scans),
            verified="nothing refused; every file inflates to its size",
            inflate=_native.inflate_backend(),
            isal=version("isal"),
        )


if __name__ == "__main__":
    main()

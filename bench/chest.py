"""The volume that the readers are measured on: a real chest CT of 512x512x275 voxels, 144 MB.

The test data hold 20 of its slices (LIDC-IDRI-0314, native resolution, noisy kernel), tiled here
along z. A slice is 16 times deflate's window, so the repetition helps no compressor.
"""

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness import REPOSITORY
from tapct_fast.data.phantom import make_phantom
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.read import read_volume
from tapct_fast.io.volume import Volume

NUM_SLICES = 275
_FILE = "nifti/lidc0314_chest_native_z120-139_int16.nii.gz"


def tiled_chest(*, is_tiny: bool) -> Volume | None:
    """Return the chest with 275 slices; for tests a tiny phantom.

    Where there is no real CT it says so and returns None: nothing is measured then.
    """
    if is_tiny:
        return make_phantom(0, shape_zyx=(8, 64, 64), spacing_mm=(1.0, 0.8, 0.8)).volume
    folder = os.environ.get("TAPCT_TEST_DATA", REPOSITORY / ".." / "shared" / "data" / "ct")
    path = Path(folder) / _FILE
    if not path.exists():
        print("skipped: no real CT; set TAPCT_TEST_DATA to a folder with nifti/", flush=True)
        return None
    volume = read_volume(path)
    hu_ZYX = np.resize(volume.hu_ZYX, (NUM_SLICES, *volume.hu_ZYX.shape[1:]))
    return Volume(hu_ZYX=hu_ZYX, spacing_mm=volume.spacing_mm, affine=volume.affine)


def write_single_member(path: Path, array_ZYX: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write a ``.nii.gz`` as the common writers do: one gzip member, level 6."""
    plain = path.with_name("plain.nii")
    write_nifti(plain, array_ZYX, affine)
    path.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=6, mtime=0))
    plain.unlink()

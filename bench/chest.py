"""The volume that the readers are measured on: a real chest CT of 512x512x275 voxels, 144 MB.

The test data hold 20 of its slices (LIDC-IDRI-0314, native resolution, noisy kernel), tiled here
along z. A slice is 16 times deflate's window, so the repetition helps no compressor.
"""

import gzip
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.harness import REPOSITORY
from tapct_fast.io.read import read_volume
from tapct_fast.io.volume import Volume

NUM_SLICES = 275
_FILE = "nifti/lidc0314_chest_native_z120-139_int16.nii.gz"


def find_chest() -> Path | None:
    """Return the test data's file, None where there is no such data."""
    folder = os.environ.get("TAPCT_TEST_DATA", REPOSITORY / ".." / "shared" / "data" / "ct")
    path = Path(folder) / _FILE
    return path if path.exists() else None


def tiled_chest(path: Path, *, is_tiny: bool) -> Volume:
    """Return the chest with 275 slices, or a corner of it for tests."""
    volume = read_volume(path)
    hu_ZYX: NDArray[np.int16] = volume.hu_ZYX
    if is_tiny:
        hu_ZYX = np.ascontiguousarray(hu_ZYX[:8, 200:264, 200:264])
    else:
        hu_ZYX = np.resize(hu_ZYX, (NUM_SLICES, *hu_ZYX.shape[1:]))
    return Volume(hu_ZYX=hu_ZYX, spacing_mm=volume.spacing_mm, affine=volume.affine)


def gzip_plain(plain: Path) -> Path:
    """Compress ``scan.nii`` to ``scan.nii.gz`` as the common writers do: one member, level 6."""
    packed = plain.with_suffix(".nii.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes(), 6, mtime=0))
    return packed

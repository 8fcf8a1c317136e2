"""Random valid files against nibabel and SimpleITK: same voxels, same places.

Known disagreements of the readers, none of which is a fault of the file:

====================  ====================================  ==================================
file                  nibabel                               SimpleITK
====================  ====================================  ==================================
NIfTI-2               as we                                 cannot read; not compared
int64, uint64         as we                                 cannot hold; not compared
units other than mm   keeps the stored numbers, scaled here  scales, as we
qform and sform       follows the sform, as we              may follow the qform; equal here
====================  ====================================  ==================================
"""

import gzip
import itertools
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from tapct_fast.io.nifti import read_nifti

NUM_FILES = int(os.environ.get("TAPCT_DIFFERENTIAL_FILES", "300"))
TYPES = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
TYPES += ["float32", "float64"]
UNITS = {"mm": 1.0, "meter": 1000.0, "micron": 0.001}


def affine_of(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw axes in any order and direction, half of them oblique."""
    axes = np.eye(3)[:, rng.permutation(3)] * rng.choice([-1.0, 1.0], 3)
    if rng.random() < 0.5:
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ axes
    affine = np.eye(4)
    affine[:3, :3] = axes * rng.uniform(0.4, 4.0, 3)
    affine[:3, 3] = rng.uniform(-500, 500, 3)
    return affine


def write(path: Path, rng: np.random.Generator) -> tuple[float, bool]:
    """Write one file; return its unit in millimetres, and whether SimpleITK can read it."""
    version = int(rng.integers(1, 3))
    kind: Any = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    name = str(rng.choice(TYPES))
    low = 0 if name.startswith("u") else -100
    array = rng.integers(low, 120, rng.integers(1, 8, 3)).astype(name)
    unit = str(rng.choice(list(UNITS)))
    stored = affine_of(rng)
    stored[:3] /= UNITS[unit]
    header = kind.header_class(endianness=str(rng.choice(["<", ">"])))
    image = kind(array, stored, header=header, dtype=name)
    image.header.set_xyzt_units(unit)
    codes = [(1, 1), (2, 0), (0, 1)][int(rng.integers(3))]
    image.set_sform(stored, code=codes[0])
    image.set_qform(stored, code=codes[1])
    slope, inter = [(1, 0), (2, -1024), (0.5, 3.25), (-1, 7)][int(rng.integers(4))]
    image.header.set_slope_inter(slope, inter)
    # nibabel would divide by the slope when saving: set both in the bytes instead.
    data = bytearray(image.to_bytes())
    order = image.header.endianness
    offset, real = (112, "f4") if version == 1 else (176, "f8")
    pair = np.array([slope, inter], f"{order}{real}").tobytes()
    data[offset : offset + len(pair)] = pair
    if rng.random() < 0.5:
        cuts = [0, *sorted(rng.integers(0, len(data), 2).tolist()), len(data)]
        data = bytearray(
            b"".join(gzip.compress(bytes(data[a:b])) for a, b in itertools.pairwise(cuts))
        )
        path = path.with_suffix(".nii.gz")
    path.write_bytes(data)
    return UNITS[unit], version == 1 and name not in ("int64", "uint64")


def test_random_valid_files_read_as_two_readers_read_them(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="needs the itk extra")
    num_itk = 0
    for seed in range(NUM_FILES):
        folder = tmp_path / str(seed)
        folder.mkdir()
        unit_mm, in_itk = write(folder / "scan.nii", np.random.default_rng(seed))
        [path] = folder.iterdir()
        volume = read_nifti(path, threads=1 + seed % 2)
        image = nib.load(path)
        voxels_XYZ = np.rint(image.get_fdata())
        index = np.indices(voxels_XYZ.shape).reshape(3, -1)
        world = (np.diag([unit_mm] * 3) @ image.affine[:3]) @ [*index, np.ones(index.shape[1])]
        found = np.linalg.solve(volume.affine, np.vstack([world, np.ones(world.shape[1])]))[:3]
        # 0.01 voxels: quaternions are float32, worst near half turns
        np.testing.assert_allclose(found, np.rint(found), atol=0.01, err_msg=f"seed {seed}")
        x, y, z = np.rint(found).astype(int)
        np.testing.assert_array_equal(volume.hu_ZYX[z, y, x], voxels_XYZ.ravel(), f"seed {seed}")
        if not in_itk:
            continue
        num_itk += 1
        itk = sitk.ReadImage(path)
        itk_ZYX = np.rint(sitk.GetArrayFromImage(itk))
        np.testing.assert_array_equal(itk_ZYX.T, voxels_XYZ, f"seed {seed}")
        ras = np.array(itk.TransformIndexToPhysicalPoint([0, 0, 0])) * (-1, -1, 1)
        np.testing.assert_allclose(ras, world[:, 0], atol=1e-2, err_msg=f"seed {seed}")
    assert num_itk > NUM_FILES // 5

"""Read NIfTI files as canonical volumes, and write them.

The native reader decodes voxels and checks sizes and checksums; this module judges the geometry. A
file whose header contradicts itself is an error that names both claims, because no choice is
certain: nibabel follows the sform where ITK follows the qform.

Shape suffixes: C channels, Z Y X voxels. ``xyz`` marks the axis order of the file.
Source: nifti1.h of the NIfTI Data Format Working Group, for quaternions ``nifti_quatern_to_mat44``.
"""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tapct_fast import _native
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.findings import Inspection
from tapct_fast.io.orient import StoredGrid, check_affine, spacing_of, to_lps
from tapct_fast.io.volume import MAX_VOXELS, Volume

Affine = npt.NDArray[np.float64]

MAX_DECODED_BYTES = 4 * MAX_VOXELS  # float32; int16 voxels need half

_UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown (read as mm by all), metre, mm, micron
_DATATYPES = {"uint8": 2, "int16": 4, "float32": 16}


def read_nifti(path: Path, inspection: Inspection | None = None) -> Volume:
    """Read a ``.nii`` or ``.nii.gz`` CT, decoded to its end with every checksum verified.

    Slope and intercept are applied and values rounded to whole HU.

    Args:
        path: The file; what it is called does not matter.
        inspection: Receives what is found; by default nothing doubtful is accepted.

    Returns:
        Volume in canonical LPS.

    Raises:
        InputError: There is no such file.
        FormatError: The file is damaged, not 3D, or its header contradicts its data or itself.
    """
    return _volume(_decode(path), inspection or Inspection())


def read_nifti_labels(path: Path) -> Volume:
    """Read a label map; ``hu_ZYX`` of the result holds the labels.

    Raises:
        InputError: There is no such file.
        FormatError: As for ``read_nifti``, or a label is not a whole number.
    """
    image = _decode(path)
    if image.rounded:
        raise FormatError("voxels", "some labels are not whole numbers; is this a label map?")
    return _volume(image, Inspection())


def _decode(path: Path) -> _native.NiftiImage:
    try:
        return _native.read_nifti(os.fsencode(path), MAX_DECODED_BYTES)
    except OSError as error:
        # Only the reason: the path may hold a patient's name.
        raise InputError(f"the scan cannot be opened: {error.strerror}") from None


def _volume(image: _native.NiftiImage, inspection: Inspection) -> Volume:
    stored = StoredGrid(image.data_ZYX.shape, _affine_of(image, inspection))
    array_ZYX, affine = to_lps(image.data_ZYX, stored.affine)
    return Volume(
        hu_ZYX=np.ascontiguousarray(array_ZYX),
        spacing_mm=spacing_of(affine),
        affine=affine,
        stored=stored,
    )


def _affine_of(image: _native.NiftiImage, inspection: Inspection) -> Affine:
    """Return the one affine (voxel x, y, z to RAS+ mm) that every part of the header agrees on."""
    for name, code in (("sform_code", image.sform_code), ("qform_code", image.qform_code)):
        if not 0 <= code <= 5:
            raise FormatError(name, f"{code} is not a code from 0 to 5")
    unit = image.xyzt_units & 7
    if unit not in _UNITS_MM:
        raise FormatError("xyzt_units", f"{unit} is not a unit of length")
    sform = _sform(image, _UNITS_MM[unit]) if image.sform_code else None
    qform = _qform(image, _UNITS_MM[unit]) if image.qform_code else None
    if sform is not None and qform is not None:
        _check_agree(sform, qform, image.dims_xyz, inspection)
    affine = sform if sform is not None else qform
    if affine is None:
        raise FormatError(
            "sform_code, qform_code",
            "both are 0: the file does not say which way the patient lies; convert it again from "
            "the source, or set the sform if you know it",
        )
    # A spacing of 0.8 "metres" is a wrong unit, not a wrong affine.
    field = "sform" if sform is not None else "qform"
    check_affine(affine, field=field if unit in (0, 2) else f"{field}, xyzt_units")
    return affine


def _sform(image: _native.NiftiImage, unit_mm: float) -> Affine:
    srow = image.srow * unit_mm
    if not np.isfinite(srow).all():
        raise FormatError("sform", "srow_x, srow_y, srow_z hold NaN or infinity")
    affine = np.vstack([srow, [0.0, 0.0, 0.0, 1.0]])
    # pixdim is stored beside the sform, and ITK-based tools take the spacing from there.
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    pixdim = np.asarray(image.pixdim_xyz) * unit_mm
    if not np.allclose(pixdim, norms, rtol=0.01, atol=0.0):
        raise FormatError(
            "pixdim, sform",
            f"pixdim says spacing {_text(pixdim)} mm (x, y, z), the sform says {_text(norms)} mm",
        )
    return affine


def _qform(image: _native.NiftiImage, unit_mm: float) -> Affine:
    b, c, d = image.quaternion_bcd
    spacing = np.asarray(image.pixdim_xyz) * unit_mm
    offset = np.asarray(image.offset_xyz) * unit_mm
    if not np.isfinite([b, c, d, *offset]).all():
        raise FormatError("qform", "quatern or qoffset holds NaN or infinity")
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise FormatError("pixdim", "a spacing is not a positive number")
    if image.qfac not in (-1.0, 0.0, 1.0):
        raise FormatError("pixdim[0]", f"{image.qfac:g} is not -1, 0 or 1")
    a_squared = 1.0 - (b * b + c * c + d * d)
    if a_squared < -1e-5:
        raise FormatError("qform", "quatern_b, c, d are longer than a unit quaternion")
    # Below float32 rounding a is 0, a rotation by 180 degrees, which axial LPS scans are.
    a = a_squared**0.5 if a_squared > 3 * np.finfo(np.float32).eps else 0.0
    b, c, d = np.array([b, c, d]) / np.sqrt(a * a + b * b + c * c + d * d)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    if image.qfac < 0:
        affine[:3, 2] *= -1
    affine[:3, 3] = offset
    return affine


def _check_agree(
    sform: Affine, qform: Affine, dims_xyz: tuple[int, int, int], inspection: Inspection
) -> None:
    """Doubt two forms that place a corner a quarter voxel apart; rounding stays far below."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in dims_xyz])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    apart = float(np.linalg.norm(((sform - qform) @ corners)[:3], axis=0).max())
    norms = np.linalg.norm(qform[:3, :3], axis=0)
    if apart > 0.25 * norms.min():
        inspection.doubt(
            "form_conflict",
            "sform, qform",
            f"they place the same voxel up to {apart:.3g} mm apart, and readers differ in which "
            "they follow; set the wrong one's code to 0",
        )


def _text(numbers: npt.ArrayLike) -> str:
    return "(" + ", ".join(f"{n:.4g}" for n in np.asarray(numbers, dtype=float)) + ")"


def write_nifti(path: Path, array_ZYX: npt.NDArray[np.generic], affine: Affine) -> None:
    """Write an array as NIfTI-1, gzipped where the name ends in ``.gz``, atomically.

    Args:
        path: Ends in ``.nii`` or ``.nii.gz``.
        array_ZYX: int16, uint8 or float32; three axes, or four with channels first (CZYX).
        affine: (4, 4), voxel (x, y, z, 1) to RAS+ mm.

    Raises:
        InputError: The name, type, axes or sizes cannot be written as NIfTI-1.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError("the name of a NIfTI file must end in .nii or .nii.gz")
    datatype = _DATATYPES.get(array_ZYX.dtype.name)
    if datatype is None:
        raise InputError(f"NIfTI is written as {', '.join(_DATATYPES)}, not {array_ZYX.dtype}")
    if array_ZYX.ndim not in (3, 4) or not 0 < min(array_ZYX.shape) <= max(array_ZYX.shape) < 2**15:
        raise InputError(f"shape {array_ZYX.shape} is not 3 or 4 axes of 1 to 32767")
    dim = [array_ZYX.ndim, *reversed(array_ZYX.shape)]
    dim += [1] * (8 - len(dim))
    pixdim = [1.0, *reversed(spacing_of(affine)), 1.0, 1.0, 1.0, 1.0]
    header = bytearray(352)  # 348 and an empty extension flag
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, *dim)
    struct.pack_into("<2h", header, 70, datatype, 8 * array_ZYX.itemsize)
    struct.pack_into("<8f", header, 76, *pixdim)
    struct.pack_into("<3f", header, 108, 352.0, 1.0, 0.0)  # vox_offset, slope, intercept
    header[123] = 2  # mm
    struct.pack_into("<2h", header, 252, 0, 1)  # sform only: it holds any affine
    struct.pack_into("<12f", header, 280, *affine[:3].ravel())
    header[344:348] = b"n+1\0"
    little = np.ascontiguousarray(array_ZYX, dtype=array_ZYX.dtype.newbyteorder("<"))
    data = bytes(header) + little.tobytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=4, mtime=0)  # no time: equal input, equal file
    write_atomic(path, data)

"""Read NIfTI files as canonical volumes, and write them.

The native reader decodes voxels and checks sizes and checksums; this module judges the geometry.
Where a header contradicts itself the finding names both claims, because no choice is certain:
nibabel follows the sform where ITK follows the qform.

Shape suffixes: C channels, Z Y X voxels. ``xyz`` marks the axis order of the file.
Source: nifti1.h of the NIfTI Data Format Working Group, for quaternions ``nifti_quatern_to_mat44``.
"""

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapct_fast import _native
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.atomic import atomic_file
from tapct_fast.io.findings import Inspection
from tapct_fast.io.orient import (
    MAX_SHEAR_DEG,
    SPACING_RANGE_MM,
    StoredGrid,
    axes_of,
    check_affine,
    nearest_orthogonal,
    shear_deg,
    spacing_of,
    to_lps,
)
from tapct_fast.io.regrid import AIR_HU, straighten
from tapct_fast.io.volume import MAX_VOXELS, Volume

Affine = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

MAX_DECODED_BYTES = 4 * MAX_VOXELS  # float32; int16 voxels need half

_UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown (read as mm by all), metre, mm, micron
_DATATYPES = {
    "uint8": 2,
    "int16": 4,
    "int32": 8,
    "float32": 16,
    "float64": 64,
    "int8": 256,
    "uint16": 512,
    "uint32": 768,
    "int64": 1024,
    "uint64": 1280,
}
_TYPE_NAMES = {code: name for name, code in _DATATYPES.items()}


def read_nifti(
    path: Path,
    inspection: Inspection | None = None,
    *,
    buffer: Array | None = None,
    threads: int = 1,
) -> Volume:
    """Read a ``.nii`` or ``.nii.gz`` CT, decoded to its end with every checksum verified.

    Slope and intercept are applied and values rounded to whole HU.

    Args:
        path: The file; what it is called does not matter.
        inspection: Receives what is found; by default nothing doubtful is accepted.
        buffer: A writable C-contiguous array of any type, for example the numpy view of a pinned
            tensor. Everything is decoded into it, and the voxels of the result are a view of it, to
            be used until its next use. As many bytes as the decoded file has suffice (352 more than
            its voxels, where the header has no extension), and for voxels of one byte twice as
            many; where a repair resamples the scan, those of the result.
        threads: For files of several gzip members that state their size, as ``write_nifti`` and
            bgzip write them, decode so many at once.

    Returns:
        Volume in canonical LPS.

    Raises:
        InputError: There is no such file, or the buffer is too small.
        FormatError: The file is damaged, not 3D, or its header contradicts its data or itself.
    """
    inspection = inspection or Inspection()
    image = _decode(path, buffer, threads)
    volume = _volume(image, inspection)
    if image.rounded:
        inspection.note("dtype", "voxels", "values that were not whole were rounded to whole HU")
    if buffer is None or np.may_share_memory(volume.hu_ZYX, buffer):
        return volume
    return replace(volume, hu_ZYX=_copied_into(buffer, volume.hu_ZYX))


def read_nifti_labels(path: Path) -> Volume:
    """Read a label map; ``hu_ZYX`` of the result holds the labels, never an interpolated one.

    Raises:
        InputError: There is no such file.
        FormatError: As for ``read_nifti`` by the policy ``error``, or a label is not a whole
            number.
    """
    image = _decode(path)
    if image.rounded:
        raise FormatError(
            "voxels", "some labels are not whole numbers; is this a label map?", "dtype"
        )
    return _volume(image, Inspection())


def _decode(path: Path, buffer: Array | None = None, threads: int = 1) -> _native.NiftiImage:
    if threads < 1:
        raise InputError(f"read_nifti: threads={threads} is not positive")
    flat = None if buffer is None else _bytes_of(buffer)
    try:
        return _native.read_nifti(os.fsencode(path), MAX_DECODED_BYTES, flat, threads)
    except OSError as error:
        # Only the reason: the path may hold a patient's name.
        raise InputError(f"the scan cannot be opened: {error.strerror}") from None


def _bytes_of(buffer: Array) -> npt.NDArray[np.uint8]:
    if not (buffer.flags.c_contiguous and buffer.flags.writeable) or buffer.dtype.hasobject:
        raise InputError("read_nifti: buffer must be a writable C-contiguous array of numbers")
    return buffer.reshape(-1).view(np.uint8)


def _copied_into(buffer: Array, hu_ZYX: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    flat = _bytes_of(buffer)
    odd = flat.ctypes.data % hu_ZYX.itemsize
    if flat.size < odd + hu_ZYX.nbytes:
        raise InputError(f"buffer holds {flat.size} bytes, this scan needs {odd + hu_ZYX.nbytes}")
    copied = flat[odd : odd + hu_ZYX.nbytes].view(np.int16).reshape(hu_ZYX.shape)
    copied[...] = hu_ZYX
    return copied


def _volume(image: _native.NiftiImage, inspection: Inspection) -> Volume:
    hu_ZYX = image.data_ZYX
    inspection.facts |= {
        "format": f"NIfTI-{image.version}",
        "stored_type": _TYPE_NAMES[image.datatype],
        "byte_order": "big" if image.big_endian else "little",
        "gzip_members": image.num_members,
        "shape_zyx": list(hu_ZYX.shape),
    }
    if image.has_lone_inter:
        inspection.doubt(
            "rescale",
            "scl_slope, scl_inter",
            "the slope is 0 beside an intercept: nifti1.h and nibabel scale nothing, ITK adds the "
            "intercept; set both to what is meant",
        )
    affine, field = _affine_of(image, inspection)
    inspection.facts |= {"affine_source": field, "stored_axes": axes_of(affine)}
    if shear_deg(affine) > MAX_SHEAR_DEG:
        hu_ZYX, affine = _without_shear(hu_ZYX, affine, field, inspection)
    check_affine(affine, field=field if image.xyzt_units & 7 in (0, 2) else f"{field}, xyzt_units")
    # A resampled scan lies on a grid of its own, which overlays no file.
    is_resampled = not np.may_share_memory(hu_ZYX, image.data_ZYX)
    stored = None if is_resampled else StoredGrid(hu_ZYX.shape, affine)
    hu_ZYX, affine = to_lps(hu_ZYX, affine, in_place=True)
    spacing_mm = spacing_of(affine)
    inspection.facts |= {"shape_zyx": list(hu_ZYX.shape), "spacing_mm": list(spacing_mm)}
    return Volume(hu_ZYX=hu_ZYX, spacing_mm=spacing_mm, affine=affine, stored=stored)


def _without_shear(
    hu_ZYX: npt.NDArray[np.int16], affine: Affine, field: str, inspection: Inspection
) -> tuple[npt.NDArray[np.int16], Affine]:
    """Turn axes that rounding has sheared; resample a volume that a tilted gantry has sheared."""
    shear = shear_deg(affine)
    turned, moved_mm = nearest_orthogonal(affine, hu_ZYX.shape)
    if moved_mm <= 0.5 * min(spacing_of(affine)):
        inspection.mend(
            "shear",
            field,
            f"the axes are {shear:.2f} degrees off a right angle, as rounding makes them; the "
            f"nearest right angles move no voxel by more than {moved_mm:.2g} mm",
        )
        return hu_ZYX, turned
    inspection.mend(
        "tilt",
        field,
        f"sheared by {shear:.2f} degrees, as a tilted gantry leaves it; the scan can be resampled "
        "to a rectangular grid (policy 'repair')",
    )
    # Padding far below air would bleed into its neighbours.
    straight = straighten(np.maximum(hu_ZYX, np.int16(AIR_HU)), affine, field=field)
    inspection.note("tilt", field, f"{straight.num_filled} voxels outside the slices became air")
    return straight.hu_ZYX, straight.affine


def _affine_of(image: _native.NiftiImage, inspection: Inspection) -> tuple[Affine, str]:
    """Return the affine (voxel x, y, z to RAS+ mm) and the form it comes from: the sform's, if any.

    It has three axes in space; they may be sheared.
    """
    for name, code in (("sform_code", image.sform_code), ("qform_code", image.qform_code)):
        if not 0 <= code <= 5:
            inspection.refuse("orientation", name, f"{code} is not a code from 0 to 5")
    if not (image.sform_code or image.qform_code):
        inspection.refuse(
            "orientation",
            "sform_code, qform_code",
            "both are 0: the file does not say which way the patient lies; convert it again from "
            "the source, or set the sform if you know it",
        )
    unit_mm = _unit_mm(image, inspection)
    qform = _qform(image, unit_mm) if image.qform_code else None
    if not image.sform_code:
        assert qform is not None
        return qform, "qform"
    sform = _sform(image, unit_mm, inspection)
    if qform is not None:
        _check_agree(sform, qform, image.dims_xyz, inspection)
    return sform, "sform"


def _unit_mm(image: _native.NiftiImage, inspection: Inspection) -> float:
    unit = image.xyzt_units & 7
    if unit not in _UNITS_MM:
        inspection.refuse("units", "xyzt_units", f"{unit} is not a unit of length")
    stored = image.pixdim_xyz if not image.sform_code else _norms(image.srow)
    low, high = SPACING_RANGE_MM

    def is_plausible(unit_mm: float) -> bool:
        return bool(all(low <= length * unit_mm <= high for length in stored))

    if not is_plausible(_UNITS_MM[unit]) and is_plausible(1.0):
        inspection.mend(
            "units",
            "xyzt_units",
            f"a spacing of {_text(stored)} (x, y, z) in the stated unit is no CT's; in millimetres "
            "it is one",
        )
        return 1.0
    return _UNITS_MM[unit]


def _sform(image: _native.NiftiImage, unit_mm: float, inspection: Inspection) -> Affine:
    srow = image.srow * unit_mm
    if not np.isfinite(srow).all():
        inspection.refuse("orientation", "sform", "srow_x, srow_y, srow_z hold NaN or infinity")
    norms = _norms(srow)
    # 1e-6: a unit volume of columns in one plane, up to the rounding of float32
    if min(norms) == 0 or abs(np.linalg.det(srow[:, :3] / norms)) < 1e-6:
        inspection.refuse("orientation", "sform", "singular: its columns do not span space")
    # pixdim is stored beside the sform, and ITK-based tools take the spacing from there.
    pixdim = np.asarray(image.pixdim_xyz) * unit_mm
    if not np.allclose(pixdim, norms, rtol=0.01, atol=0.0):
        inspection.doubt(
            "form_conflict",
            "pixdim, sform",
            f"pixdim says spacing {_text(pixdim)} mm (x, y, z), the sform says {_text(norms)} mm",
        )
    return np.vstack([srow, [0.0, 0.0, 0.0, 1.0]])


def _norms(srow: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    norms: npt.NDArray[np.float64] = np.linalg.norm(srow[:, :3], axis=0)
    return norms


def _qform(image: _native.NiftiImage, unit_mm: float) -> Affine:
    b, c, d = image.quaternion_bcd
    spacing = np.asarray(image.pixdim_xyz) * unit_mm
    offset = np.asarray(image.offset_xyz) * unit_mm
    if not np.isfinite([b, c, d, *offset]).all():
        raise FormatError("qform", "quatern or qoffset holds NaN or infinity")
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise FormatError("pixdim", "a spacing is not a positive number", "spacing")
    if image.qfac not in (-1.0, 0.0, 1.0):
        raise FormatError("pixdim[0]", f"{image.qfac:g} is not -1, 0 or 1", "orientation")
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


def write_nifti(
    path: Path,
    array_ZYX: npt.NDArray[np.generic],
    affine: Affine,
    *,
    threads: int = 1,
    level: int = 4,
) -> None:
    """Write an array as NIfTI-1, gzipped where the name ends in ``.gz``, atomically.

    A ``.gz`` has one member for the header and one for every 8 MiB of voxels. Every gzip reader
    joins them; ``read_nifti`` decodes them in parallel. Equal input gives equal bytes, whatever
    the number of threads, with one backend (``_native.inflate_backend``).

    Args:
        path: Ends in ``.nii`` or ``.nii.gz``.
        array_ZYX: Integers or floats of 8 to 64 bits; three axes, or four with channels first
            (CZYX).
        affine: (4, 4), voxel (x, y, z, 1) to RAS+ mm.
        threads: How many members to compress at once.
        level: Of gzip, 1 (fast) to 9 (small).

    Raises:
        InputError: The name, type, axes, sizes or options cannot be written as NIfTI-1.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError("the name of a NIfTI file must end in .nii or .nii.gz")
    if not (1 <= level <= 9 and threads >= 1):
        raise InputError(f"write_nifti: level={level} is not 1 to 9, or threads={threads} below 1")
    datatype = _DATATYPES.get(array_ZYX.dtype.name)
    if datatype is None:
        raise InputError(f"NIfTI is written as {', '.join(_DATATYPES)}, not {array_ZYX.dtype}")
    if array_ZYX.ndim not in (3, 4) or not 0 < min(array_ZYX.shape) <= max(array_ZYX.shape) < 2**15:
        raise InputError(f"shape {array_ZYX.shape} is not 3 or 4 axes of 1 to 32767")
    header = _header(array_ZYX, datatype, affine)
    little = np.ascontiguousarray(array_ZYX, dtype=array_ZYX.dtype.newbyteorder("<"))
    voxels = little.reshape(-1).view(np.uint8)
    with atomic_file(path) as temporary:
        if path.name.endswith(".gz"):
            _native.write_gzip(os.fsencode(temporary), header, voxels, level, threads)
        else:
            with temporary.open("wb") as file:
                file.write(header.data)
                file.write(voxels.data)


def _header(
    array_ZYX: npt.NDArray[np.generic], datatype: int, affine: Affine
) -> npt.NDArray[np.uint8]:
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
    return np.frombuffer(header, np.uint8)

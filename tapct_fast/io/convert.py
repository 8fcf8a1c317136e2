"""Volumes to and from nibabel, SimpleITK, MONAI and numpy, and arrays saved in a scan's frame.

Voxels are shared, not copied, wherever the other library can hold int16 in our order; then a change
on one side shows on the other. Whatever comes in is turned to canonical LPS and judged as a file
is; a turn or another type costs a copy. The other libraries do not check what they decode (a
flipped bit in a ``.nii.gz`` passes), so ``read_volume(path)`` is the safer door.

Shape suffixes: C channels, Z Y X voxels. ``xyz`` marks the axis order of nibabel and MONAI.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError, InputError, Policy
from tapct_fast.io.findings import Inspection
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.orient import (
    Affine,
    StoredGrid,
    apart_mm,
    check_affine,
    from_lps,
    spacing_of,
    to_lps,
)
from tapct_fast.io.read import check_is_hu
from tapct_fast.io.volume import Volume, to_int16

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNITS_MM = {"unknown": 1.0, "meter": 1000.0, "mm": 1.0, "micron": 0.001}  # nibabel's words


def from_numpy(
    array_zyx: NDArray[np.generic],
    affine: Affine,
    *,
    check_hu: bool = True,
    policy: Policy = "error",
) -> Volume:
    """Return an array of HU as a volume; for the way back, ``volume.hu_ZYX`` is the array.

    int16 that lies C-contiguous in canonical LPS is shared; all else is copied.

    Args:
        array_zyx: Real numbers with three axes along any directions; rounded to whole HU.
        affine: (4, 4); maps the voxel index (x, y, z, 1) of ``array_zyx[z, y, x]`` to RAS+ mm.
        check_hu: See ``read_volume``; False for label maps.
        policy: See ``read_volume``.

    Raises:
        FormatError: Values or affine cannot be those of a CT.
    """
    return _volume(np.asarray(array_zyx), np.asarray(affine), Inspection(policy), check_hu)


def to_nibabel(volume: Volume) -> Any:
    """Return a ``nibabel.Nifti1Image`` that shares the volume's voxels, as (x, y, z).

    Raises:
        InputError: nibabel is not installed.
    """
    nibabel = _library("nibabel", "nibabel")
    # Any: nibabel ships no types.
    image: Any = nibabel.Nifti1Image(volume.hu_ZYX.T, volume.affine)
    image.header.set_xyzt_units("mm")
    return image


def from_nibabel(image: Any, *, check_hu: bool = True, policy: Policy = "error") -> Volume:
    """Return a nibabel image as a volume.

    An image in memory is shared as by ``from_numpy`` (int16, Fortran order, as ``to_nibabel`` makes
    it); one that nibabel has not loaded yet is decoded by nibabel.

    Args:
        image: 3D, or with further axes of length one.
        check_hu: See ``read_volume``.
        policy: See ``read_volume``.

    Raises:
        InputError: nibabel is not installed, or ``image`` is not one of its images.
        FormatError: The image cannot be a CT, or its header contradicts itself.
    """
    nibabel = _library("nibabel", "nibabel")
    if not isinstance(image, nibabel.spatialimages.SpatialImage):
        raise InputError(f"a {type(image).__name__} is not a nibabel image")
    inspection = Inspection(policy)
    array_xyz = np.asanyarray(image.dataobj)
    while array_xyz.ndim > 3 and array_xyz.shape[-1] == 1:
        array_xyz = array_xyz[..., 0]
    affine = _affine_of_nibabel(image, array_xyz.shape, inspection)
    return _volume(array_xyz.T, affine, inspection, check_hu)


def _affine_of_nibabel(image: Any, shape_xyz: tuple[int, ...], inspection: Inspection) -> Affine:
    if not hasattr(image, "get_sform"):
        return np.asarray(image.affine, dtype=np.float64)
    (sform, _), (qform, _) = image.get_sform(coded=True), image.get_qform(coded=True)
    if sform is None and qform is None:  # nibabel then makes an affine up
        raise FormatError(
            "sform_code, qform_code",
            "both are 0: the image does not say which way the patient lies; set_sform if you know",
        )
    unit = image.header.get_xyzt_units()[0]
    if unit not in _UNITS_MM:
        raise FormatError("xyzt_units", "is not a unit of length")
    # The image's own affine, not the header's float32 copy of it.
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= _UNITS_MM[unit]
    if sform is not None and qform is not None and len(shape_xyz) == 3:
        apart = apart_mm(sform, qform, shape_xyz[::-1])
        if apart > 0.25 * np.linalg.norm(qform[:3, :3], axis=0).min():
            inspection.doubt(
                "form_conflict",
                "sform, qform",
                f"they place the same voxel up to {apart * _UNITS_MM[unit]:.3g} mm apart; "
                "set the wrong one's code to 0",
            )
    return affine


def to_simpleitk(volume: Volume) -> Any:
    """Return a ``SimpleITK.Image`` with origin and direction in LPS.

    The voxels are copied: SimpleITK cannot be handed memory of others.

    Raises:
        InputError: SimpleITK is not installed.
    """
    sitk = _library("SimpleITK", "SimpleITK")
    affine_lps = _LPS_TO_RAS @ volume.affine
    spacing_xyz = np.array(spacing_of(volume.affine)[::-1])
    image: Any = sitk.GetImageFromArray(volume.hu_ZYX)  # Any: it ships no types
    image.SetSpacing(spacing_xyz.tolist())
    image.SetOrigin(affine_lps[:3, 3].tolist())
    image.SetDirection((affine_lps[:3, :3] / spacing_xyz).ravel().tolist())
    return image


def from_simpleitk(image: Any, *, check_hu: bool = True, policy: Policy = "error") -> Volume:
    """Return a SimpleITK image as a volume.

    int16 in canonical LPS is shared; the volume keeps its own hold of the memory, so that the image
    may go away. SimpleITK copies before it writes, so later changes of the image do not show.

    Raises:
        InputError: SimpleITK is not installed, or ``image`` is not one of its images.
        FormatError: The image is not 3D and scalar, or cannot be a CT.
    """
    sitk = _library("SimpleITK", "SimpleITK")
    if not isinstance(image, sitk.Image):
        raise InputError(f"a {type(image).__name__} is not a SimpleITK image")
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise FormatError("image", "is not 3D and scalar; take one volume and channel of it first")
    affine_lps = np.eye(4)
    affine_lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine_lps[:3, 3] = image.GetOrigin()
    array_zyx = np.asarray(_SharedImage(sitk, image))
    return _volume(array_zyx, _LPS_TO_RAS @ affine_lps, Inspection(policy), check_hu)


class _SharedImage:
    """What an array's ``base`` keeps: SimpleITK's own view dangles once the image is gone."""

    def __init__(self, sitk: Any, image: Any) -> None:
        # First the view: asking for one gives an image that shares its memory a copy of its own.
        self._view = sitk.GetArrayViewFromImage(image)
        self._image = sitk.Image(image)  # shares the memory and keeps it, copies on write

    @property
    def __array_interface__(self) -> dict[str, Any]:
        interface: dict[str, Any] = dict(self._view.__array_interface__)
        interface["data"] = (interface["data"][0], False)  # writeable, as all that is shared here
        return interface


def to_monai(volume: Volume) -> Any:
    """Return a ``monai.data.MetaTensor`` (1, X, Y, Z), as ``LoadImage(ensure_channel_first=True)``.

    It is int16 and shares the volume's voxels, with strides: ``.contiguous()`` or ``.float()``
    copies. Its axes are those of ``Volume``, to Left, Posterior, Superior; its affine maps to RAS.

    Raises:
        InputError: MONAI is not installed.
    """
    monai_data = _library("monai.data", "monai")
    affine = volume.affine.copy()
    meta = {
        "original_affine": affine.copy(),
        "spatial_shape": np.array(volume.hu_ZYX.shape[::-1]),
        "original_channel_dim": float("nan"),  # MONAI's mark for an image without channels
        "space": "RAS",
    }
    # Any: MONAI is optional, so its types are not at hand.
    tensor: Any = monai_data.MetaTensor(volume.hu_ZYX.T[None], affine=affine, meta=meta)
    return tensor


def from_monai(tensor: Any, *, check_hu: bool = True, policy: Policy = "error") -> Volume:
    """Return a MONAI image as a volume.

    int16 on the host, laid out as ``to_monai`` does, is shared. MONAI's readers give float32, which
    is rounded into a new array.

    Args:
        tensor: ``MetaTensor`` (X, Y, Z) or, channels first, (1, X, Y, Z).
        check_hu: See ``read_volume``.
        policy: See ``read_volume``.

    Raises:
        InputError: MONAI is not installed, or ``tensor`` is not a MetaTensor or not one image.
        FormatError: The image cannot be a CT.
    """
    monai_data = _library("monai.data", "monai")
    if not isinstance(tensor, monai_data.MetaTensor):
        raise InputError(f"a {type(tensor).__name__} is not a MetaTensor; use from_numpy")
    if tensor.is_batch or tensor.pending_operations:
        raise InputError("the MetaTensor is a batch or has pending transforms; resolve them first")
    plain = tensor.as_tensor().detach().cpu()
    if str(plain.dtype) == "torch.bfloat16":  # 8 bits of mantissa
        raise InputError("bfloat16 cannot hold HU; convert before the cast")
    array_xyz = plain.numpy()
    if array_xyz.ndim == 4 and array_xyz.shape[0] == 1:
        array_xyz = array_xyz[0]
    if array_xyz.ndim != 3:
        raise InputError(f"a MetaTensor of shape {tuple(tensor.shape)} is not (1, X, Y, Z)")
    affine = tensor.affine.numpy().astype(np.float64)
    space = str(getattr(tensor.meta.get("space"), "value", tensor.meta.get("space", "RAS")))
    if space not in ("RAS", "LPS"):
        raise FormatError("space", "is neither RAS nor LPS")
    if space == "LPS" and affine.shape == (4, 4):
        affine = _LPS_TO_RAS @ affine
    return _volume(array_xyz.T, affine, Inspection(policy), check_hu)


def save_nifti(
    path: Path | str,
    array: NDArray[np.generic],
    volume: Volume,
    *,
    affine: Affine | None = None,
    frame: Literal["scan", "lps"] = "scan",
) -> None:
    """Write a label map or feature maps as NIfTI in the frame of a scan, atomically.

    Args:
        path: Ends in ``.nii`` or ``.nii.gz``.
        array: (Z, Y, X), or (C, Z, Y, X) with channels, along the axes of ``volume``; of a type
            that ``io.nifti.write_nifti`` writes, or bool.
        volume: The scan.
        affine: Of an array on a grid of its own, as ``Features.affine`` of the patch tokens; None
            for one value per voxel of ``volume``.
        frame: ``scan`` writes along the axes of the scan's file, so that an array of voxels lies on
            the file voxel for voxel, with its shape and affine (a scan without a file of its own,
            as a DICOM series, has those of ``volume``). ``lps`` writes along the axes of
            ``volume``.

    Raises:
        InputError: The array does not fit the volume or cannot be written as NIfTI.
        FormatError: ``affine`` is not that of a regular grid.
    """
    array = np.asarray(array)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.ndim not in (3, 4):
        raise InputError(f"an array of shape {array.shape} is not (Z, Y, X) or (C, Z, Y, X)")
    if frame not in ("scan", "lps"):
        raise InputError(f"frame={frame!r} is not one of scan, lps")
    has_own_grid = affine is not None
    if affine is None:
        if array.shape[-3:] != volume.hu_ZYX.shape:
            raise InputError(
                f"an array of shape {array.shape} does not lie on the voxels of a scan of "
                f"{volume.hu_ZYX.shape} (z, y, x); give the affine of its own grid"
            )
        affine = volume.affine
    check_affine(affine)
    if frame == "scan" and volume.stored is not None:
        array, affine = from_lps(array, affine, volume.stored.affine)
        if not has_own_grid:
            affine = volume.stored.affine  # the file's own numbers, without rounding
    write_nifti(Path(path), array, affine)


def _volume(
    array_zyx: NDArray[np.generic], affine: Affine, inspection: Inspection, check_hu: bool
) -> Volume:
    if array_zyx.ndim != 3 or array_zyx.size == 0:
        raise FormatError("dim", f"shape {array_zyx.shape} is not three axes with voxels")
    check_affine(affine)
    stored = StoredGrid(array_zyx.shape, affine.astype(np.float64))
    hu_ZYX, affine = to_lps(to_int16(array_zyx, "voxels"), stored.affine)
    if check_hu:
        check_is_hu(hu_ZYX, inspection)
    return Volume(hu_ZYX, spacing_of(affine), affine, inspection.report(), stored)


def _library(module: str, package: str) -> Any:
    if find_spec(module.partition(".")[0]) is None:
        raise InputError(f"this conversion needs {package}: pip install {package}")
    return import_module(module)

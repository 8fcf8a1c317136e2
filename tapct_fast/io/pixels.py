"""From int16 HU to the pixel values of a backbone in one pass, without a float copy of the scan.

``backbone/preprocess.py`` defines the values; this is its fast form for int16 HU. Resizing is
torch's bilinear in float32, with sums in another order.

Shape suffixes: Z Y X voxels or pixels.
"""

import numpy as np
from numpy.typing import NDArray

from tapct_fast import _native
from tapct_fast.config import HuConfig
from tapct_fast.errors import InputError

Pixels = NDArray[np.float32] | NDArray[np.uint16]


def hu_to_pixels(
    hu_ZYX: NDArray[np.int16],
    out_ZYX: Pixels,
    *,
    resize_yx: tuple[int, int] | None,
    hu: HuConfig,
    pad_hu: float = -1024.0,
    antialias: bool = False,
    num_threads: int = 1,
) -> None:
    """Resize in plane, pad at the end with air, clip, subtract the mean, divide, cast.

    A range of slices is a view: pass ``hu_ZYX[begin:end]``.

    Args:
        hu_ZYX: C-contiguous int16 HU.
        out_ZYX: C-contiguous; float32, or uint16 for the bits of bfloat16. At least as large as the
            resized scan along each axis; what lies beyond the scan becomes air.
        resize_yx: Rows and columns after resizing; None keeps those of the scan.
        hu: Clip range, mean and standard deviation.
        pad_hu: Value of the padding, clipped and normalised as all others.
        antialias: Widen the triangle filter where the plane shrinks.
        num_threads: Threads among which the slices are shared.

    Raises:
        InputError: An array has another type, layout or number of axes, or ``out_ZYX`` is too
            small.
    """
    if hu_ZYX.dtype != np.int16 or hu_ZYX.ndim != 3 or not hu_ZYX.flags.c_contiguous:
        raise InputError("hu_ZYX is not a C-contiguous int16 array of three axes")
    if out_ZYX.dtype not in (np.float32, np.uint16) or out_ZYX.ndim != 3:
        raise InputError("out_ZYX is not a float32 or uint16 array of three axes")
    if not (out_ZYX.flags.c_contiguous and out_ZYX.flags.writeable):
        raise InputError("out_ZYX is not C-contiguous and writeable")
    if num_threads < 1:
        raise InputError(f"num_threads={num_threads} is not positive")
    resized_zyx = (hu_ZYX.shape[0], *(resize_yx or hu_ZYX.shape[1:]))
    if min(*hu_ZYX.shape, *resized_zyx) < 1 or any(
        size < needed for size, needed in zip(out_ZYX.shape, resized_zyx, strict=True)
    ):
        raise InputError(
            f"out_ZYX of shape {out_ZYX.shape} cannot hold a scan of {resized_zyx} pixels"
        )
    if np.may_share_memory(hu_ZYX, out_ZYX):
        raise InputError("out_ZYX overlaps hu_ZYX; give an array of its own")
    _native.hu_to_pixels(
        hu_ZYX,
        out_ZYX,
        resized_zyx[1:],
        antialias,
        pad_hu,
        hu.clip,
        hu.mean,
        hu.std,
        num_threads,
    )

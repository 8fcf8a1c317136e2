"""What the page carries, small: thinned voxels, and tokens in a few bytes with a measured error.

Shape suffixes: Z Y X voxels, N tokens, D width, K kept components, Q tokens asked about.
"""

import math
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.config import Zyx
from tapct_fast.io.volume import Volume

HU_LOW, HU_HIGH = -1024, 3071  # 12 bits, as scanners store
MOST_COMPONENTS, LEAST_COMPONENTS = 128, 8
_CHECKED_PAIRS = (256, 4096)  # tokens asked about, tokens answered: seconds for any scan
_LEVEL = 6  # of zlib: 9 takes four times longer on CT for 1 %


class Thinned(NamedTuple):
    """A scan with boxes of ``factor_zyx`` voxels averaged to one, HU clipped to 12 bits."""

    hu_ZYX: NDArray[np.int16]
    factor_zyx: Zyx


class SimilarityTable(NamedTuple):
    """Unit tokens in ``code_KN * scale_K`` (int8), and how wrong their cosines are."""

    code_KN: NDArray[np.int8]
    scale_K: NDArray[np.float32]
    largest_error: float
    rms_error: float
    num_pairs: int


def thin_factor(shape_zyx: Zyx, spacing_mm: tuple[float, float, float], most: int) -> Zyx:
    """Return how many voxels to average along z, y, x so that at most ``most`` are left.

    The finest axis is thinned first, so that voxels become more like cubes.
    """
    factor = [1, 1, 1]

    def left() -> list[int]:
        return [-(-size // f) for size, f in zip(shape_zyx, factor, strict=True)]

    while math.prod(left()) > most:
        thinnable = [axis for axis in range(3) if left()[axis] > 1]
        axis = min(thinnable, key=lambda axis: spacing_mm[axis] * factor[axis])
        factor[axis] += 1
    z, y, x = factor
    return z, y, x


def thin(volume: Volume, most: int) -> Thinned:
    """Average voxels until at most ``most`` are left; the last box of an axis may be smaller."""
    factor_zyx = thin_factor(_zyx(volume.hu_ZYX.shape), volume.spacing_mm, most)
    fz, fy, fx = factor_zyx
    planes = []
    for first in range(0, volume.hu_ZYX.shape[0], fz):
        mean_YX = np.clip(volume.hu_ZYX[first : first + fz], HU_LOW, HU_HIGH).mean(axis=0)
        for axis, f in ((0, fy), (1, fx)):
            starts = np.arange(0, mean_YX.shape[axis], f)
            counts = np.diff(np.append(starts, mean_YX.shape[axis]))
            sums = np.add.reduceat(mean_YX, starts, axis=axis)
            mean_YX = sums / (counts[:, None] if axis == 0 else counts)
        planes.append(np.rint(mean_YX).astype(np.int16))
    return Thinned(np.stack(planes), factor_zyx)


def thin_labels(labels_ZYX: NDArray[np.int16], factor_zyx: Zyx) -> NDArray[np.int16]:
    """Take the label in the middle of each box: an average of labels is none."""
    for axis, (size, f) in enumerate(zip(labels_ZYX.shape, factor_zyx, strict=True)):
        middle = np.minimum(np.arange(0, size, f) + f // 2, size - 1)
        labels_ZYX = labels_ZYX.take(middle, axis=axis)
    return labels_ZYX


def pack_hu(hu_ZYX: NDArray[np.int16]) -> bytes:
    """Compress HU: each voxel less the one before it in its row, low bytes, then high bytes."""
    step_ZYX = np.diff(hu_ZYX, axis=2, prepend=np.int16(0))  # 12 bits: no difference overflows
    # Zigzag: small steps of either sign have an empty high byte.
    return pack_uint16(((step_ZYX << 1) ^ (step_ZYX >> 15)).view(np.uint16))


def pack_uint16(values: NDArray[np.uint16]) -> bytes:
    """Compress numbers of two bytes: all low bytes, then all high bytes."""
    low, high = (values & 255).astype(np.uint8), (values >> 8).astype(np.uint8)
    return pack_bytes(np.stack([low, high]))


def pack_bytes(values: NDArray[Any]) -> bytes:
    """Compress as the page's DecompressionStream("deflate") reads it (zlib)."""
    return zlib.compress(np.ascontiguousarray(values).tobytes(), _LEVEL)


def similarity_table(tokens_ND: NDArray[np.float32], most_bytes: int) -> SimilarityTable:
    """Compress tokens so that a page can compute the cosine of any two.

    Tokens are scaled to unit length and projected onto the axes that keep most of their products
    (principal components without centring), then each component is rounded to a signed byte.

    Args:
        tokens_ND: All tokens of a scan.
        most_bytes: As many components are kept as fit, 8 to 128, and no more than the width.

    Returns:
        The table; its error is that of the cosine as the page computes it (codes times scales,
        scaled to unit length again) over a fixed sample of pairs.
    """
    num_tokens, width = tokens_ND.shape
    norm_N1 = np.linalg.norm(tokens_ND, axis=1, keepdims=True)
    unit_ND = tokens_ND / np.maximum(norm_N1, 1e-12)
    fitting = max(min(most_bytes // num_tokens, MOST_COMPONENTS), LEAST_COMPONENTS)
    num_kept = min(fitting, width)
    _, axes_DD = np.linalg.eigh((unit_ND.T @ unit_ND).astype(np.float64))  # ascending
    kept_NK = unit_ND @ axes_DD[:, : -num_kept - 1 : -1].astype(np.float32)
    scale_K = np.maximum(np.abs(kept_NK).max(axis=0) / 127, 1e-12).astype(np.float32)
    code_KN = np.rint(kept_NK / scale_K).astype(np.int8).T

    asked_Q, answered_N = (
        np.unique(np.linspace(0, num_tokens - 1, most).astype(int)) for most in _CHECKED_PAIRS
    )
    shown_NK = code_KN.T * scale_K
    shown_NK /= np.maximum(np.linalg.norm(shown_NK, axis=1, keepdims=True), 1e-12)
    exact_QN = unit_ND[asked_Q] @ unit_ND[answered_N].T
    error_QN = shown_NK[asked_Q] @ shown_NK[answered_N].T - exact_QN
    return SimilarityTable(
        code_KN=code_KN,
        scale_K=scale_K,
        largest_error=float(np.abs(error_QN).max()),
        rms_error=float(np.sqrt(np.square(error_QN).mean())),
        num_pairs=error_QN.size,
    )


def _zyx(sizes: tuple[int, ...]) -> Zyx:
    z, y, x = sizes
    return z, y, x

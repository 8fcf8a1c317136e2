"""From Hounsfield units to the pixel values a backbone was trained on.

The order is that of the released processor: resize in plane, pad depth at the end with air, clip,
subtract the mean, divide by the standard deviation. Padding before the z-score makes it air; zeros
after it would be soft tissue.

Shape suffixes: B batch, C channels (one), Z Y X voxels.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.config import HuConfig, Zyx
from tapct_fast.errors import ConfigError, InputError
from tapct_fast.io.volume import Volume

# |z-score| after clipping stays below 3; a scan in HU has air at -1000.
NORMALISED_LIMIT = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """The preprocessing saved beside the weights.

    Attributes:
        resize_yx: In-plane size in pixels after resizing; None keeps the scan's own resolution.
        antialias: Widen the triangle filter when the plane shrinks, as our training views do. The
            released processor's filter is not public; plain bilinear is torch's default.
        depth_multiple: Slices are padded at the end to a multiple of this.
        plane_multiple: Rows and columns are padded at the end to a multiple of this (native mode).
        pad_hu: Value of the padding.
        hu: Clip range, mean and standard deviation.
    """

    resize_yx: tuple[int, int] | None = (224, 224)
    antialias: bool = False
    depth_multiple: int = 4
    plane_multiple: int = 8
    pad_hu: float = -1024.0
    hu: HuConfig = field(default_factory=HuConfig)

    def __post_init__(self) -> None:
        if min(self.depth_multiple, self.plane_multiple) < 1:
            raise ConfigError(
                "preprocess.depth_multiple and preprocess.plane_multiple must be >= 1"
            )
        if self.resize_yx and any(s < 1 or s % self.plane_multiple for s in self.resize_yx):
            raise ConfigError(
                f"preprocess.resize_yx={self.resize_yx} is not a multiple of "
                f"preprocess.plane_multiple={self.plane_multiple}"
            )
        if not -32768 <= self.pad_hu <= 32767:
            raise ConfigError(f"preprocess.pad_hu={self.pad_hu} is outside int16")

    @property
    def air(self) -> float:
        """Pixel value of the padding."""
        low, high = self.hu.clip
        return (min(max(self.pad_hu, low), high) - self.hu.mean) / self.hu.std

    def resized_zyx(self, shape_zyx: Zyx) -> Zyx:
        """Return the size after resizing, before padding."""
        return (shape_zyx[0], *(self.resize_yx or shape_zyx[1:]))

    def padded_zyx(self, pixels_zyx: Zyx) -> Zyx:
        """Return the size after padding of what has this size after resizing."""
        z, y, x = (size + -size % m for size, m in zip(pixels_zyx, self.multiples_zyx, strict=True))
        return z, y, x

    @property
    def multiples_zyx(self) -> Zyx:
        """What each axis is padded to a multiple of."""
        return self.depth_multiple, self.plane_multiple, self.plane_multiple

    def pixel_affine(self, shape_zyx: Zyx) -> NDArray[np.float64]:
        """Return the (4, 4) map from pixel index (x, y, z, 1) to voxel index of a scan.

        Edges stay edges (``align_corners=False``), so the centre of pixel i lies at (i + 0.5) s -
        0.5.
        """
        affine = np.eye(4)
        resized_zyx = self.resized_zyx(shape_zyx)
        for axis, (size, pixels) in enumerate(zip(shape_zyx[::-1], resized_zyx[::-1], strict=True)):
            scale = size / pixels
            affine[axis, axis], affine[axis, 3] = scale, 0.5 * scale - 0.5
        return affine

    def apply(self, hu: Volume | Tensor) -> Tensor:
        """Return pixel values.

        Args:
            hu: A scan, or a (B, 1, Z, Y, X) tensor of HU, int16 or float, already in LPS with the
                axial axis first.

        Returns:
            pixel_values_BCZYX float32, padded; ``pixel_affine`` says where they lie.

        Raises:
            InputError: Wrong shape or type, non-finite values, or values that were already
                normalised.
        """
        if isinstance(hu, Volume):
            hu = torch.from_numpy(hu.hu_ZYX)[None, None]
        check_is_hu(hu)
        pixels_BCZYX = hu.float()
        if self.resize_yx and self.resize_yx != tuple(hu.shape[3:]):
            slices_NYX = pixels_BCZYX.flatten(0, 2)[:, None]
            slices_NYX = F.interpolate(
                slices_NYX, size=self.resize_yx, mode="bilinear", antialias=self.antialias
            )[:, 0]
            pixels_BCZYX = slices_NYX.reshape(*hu.shape[:3], *self.resize_yx)
        pixels_BCZYX = pad_end(pixels_BCZYX, self.multiples_zyx, self.pad_hu)
        return pixels_BCZYX.clamp(*self.hu.clip).sub(self.hu.mean).div(self.hu.std)


def pad_end(x_BCZYX: Tensor, multiples_zyx: Zyx, value: float) -> Tensor:
    """Pad each axis at the end to its multiple."""
    extra = [-size % m for size, m in zip(x_BCZYX.shape[2:], multiples_zyx, strict=True)]
    if not any(extra):
        return x_BCZYX
    return F.pad(x_BCZYX, (0, extra[2], 0, extra[1], 0, extra[0]), value=value)


def token_affine(patch_zyx: Zyx) -> NDArray[np.float64]:
    """Return the map from token index (x, y, z, 1) to the pixel index of its patch's centre."""
    affine = np.diag([*patch_zyx[::-1], 1.0])
    affine[:3, 3] = [(p - 1) / 2 for p in patch_zyx[::-1]]
    return affine


def check_is_hu(hu: Tensor) -> None:
    """Refuse what cannot be a batch of HU; see ``Preprocess.apply`` for the errors."""
    if hu.ndim != 5 or hu.shape[1] != 1 or math.prod(hu.shape) == 0:
        raise InputError(f"HU of shape {tuple(hu.shape)} are not (B, 1, Z, Y, X)")
    if hu.dtype == torch.int16:
        return
    if not hu.is_floating_point():
        raise InputError(f"HU of type {hu.dtype} are neither int16 nor float; convert them first")
    low, high = (value.item() for value in hu.aminmax())  # NaN anywhere makes both NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("HU hold NaN or infinite values; replace them with air (-1024) first")
    if max(-low, high) <= NORMALISED_LIMIT and bool((hu != hu.round()).any()):
        raise InputError(
            f"values {low:.3g}..{high:.3g} look already normalised; give HU, "
            "or pass normalised values straight to the backbone"
        )

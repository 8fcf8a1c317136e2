"""The preprocessing as a MONAI dict transform, and features put back into the scan's frame.

MONAI's axes are x, y, z and its images may lie any way; a backbone takes LPS with the axial axis
first. What comes out here is a MetaTensor along z, y, x whose affine says so, so that MONAI's own
transforms and writers place it.

Shape suffixes: C channels (one), D width, Z Y X pixels or tokens.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.errors import InputError, Policy
from tapct_fast.io.convert import from_monai

try:
    from monai.config import KeysCollection
    from monai.data import MetaTensor
    from monai.transforms import MapTransform
except ImportError as error:
    raise InputError(f"this adapter needs MONAI: pip install monai ({error})") from None


class TapctPreprocessd(MapTransform):  # type: ignore[misc]  # untyped base
    """Turn images in HU into the pixel values of a backbone.

    Put it in the place of ``Orientationd``, ``ScaleIntensityRanged``, ``Resized`` and the like:
    after ``LoadImaged``, without them. A patch sampler or ``SlidingWindowInferer`` may follow.

    Args:
        keys: Of images: ``MetaTensor`` (1, X, Y, Z) or (X, Y, Z) in HU.
        preprocess: ``backbone.preprocess``.
        check_hu: See ``read_volume``.
        policy: See ``read_volume``.
        allow_missing_keys: Pass over keys that are not there.
    """

    def __init__(
        self,
        keys: KeysCollection,
        preprocess: Preprocess,
        *,
        check_hu: bool = True,
        policy: Policy = "error",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.preprocess = preprocess
        self.check_hu = check_hu
        self.policy = policy

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the dict with (1, Z, Y, X) float32 MetaTensors in place of the images.

        Their affine maps the pixel index (z, y, x, 1) to RAS+ millimetres. Their ``meta`` has the
        keys of the image, and ``pixels_zyx``: how many are there before the padding at the end.

        Raises:
            InputError: An image is no MetaTensor or not one image.
            FormatError: An image cannot be a CT.
        """
        changed = dict(data)
        for key in self.key_iterator(changed):
            image = changed[key]
            volume = from_monai(image, check_hu=self.check_hu, policy=self.policy)
            z, y, x = volume.hu_ZYX.shape
            affine = volume.affine @ self.preprocess.pixel_affine((z, y, x))
            meta = {
                **image.meta,
                "space": "RAS",
                "pixels_zyx": self.preprocess.resized_zyx((z, y, x)),
            }
            changed[key] = _meta_tensor(self.preprocess.apply(volume)[0], _swap(affine), meta)
        return changed


def place_features(features_DZYX: Tensor, pixels_CZYX: Any) -> Any:  # Any: MetaTensor is untyped
    """Return a feature map with the affine of its tokens, in the frame of the scan.

    Args:
        features_DZYX: One map on the token grid of all of ``pixels_CZYX``, as
            ``backbone(pixels[None], reshape=True)`` returns it.
        pixels_CZYX: What ``TapctPreprocessd`` made.

    Returns:
        MetaTensor (D, Z, Y, X); tokens that hold nothing but padding are cut off. ``SaveImage``
        writes it, ``ResampleToMatch`` brings it onto the scan.

    Raises:
        InputError: The map does not cover whole patches of the pixels.
    """
    if not isinstance(pixels_CZYX, MetaTensor) or "pixels_zyx" not in pixels_CZYX.meta:
        raise InputError("place_features: pixels are not what TapctPreprocessd made")
    size_zyx = tuple(pixels_CZYX.shape[1:])
    grid_zyx = tuple(features_DZYX.shape[1:])
    if len(grid_zyx) != 3 or any(s % max(g, 1) for s, g in zip(size_zyx, grid_zyx, strict=True)):
        raise InputError(
            f"place_features: a map of shape {tuple(features_DZYX.shape)} is not (D, Z, Y, X) on "
            f"patches of {size_zyx} pixels; give one map with reshape=True"
        )
    patch_zyx = [s // g for s, g in zip(size_zyx, grid_zyx, strict=True)]
    token = np.diag([*map(float, patch_zyx), 1.0])  # token index -> pixel index of its centre
    token[:3, 3] = [(p - 1) / 2 for p in patch_zyx]
    held = [
        -(-size // p) for size, p in zip(pixels_CZYX.meta["pixels_zyx"], patch_zyx, strict=True)
    ]
    plain_DZYX = features_DZYX.as_subclass(Tensor)[:, : held[0], : held[1], : held[2]]
    affine = np.asarray(pixels_CZYX.affine, dtype=np.float64)
    return _meta_tensor(plain_DZYX, affine @ token, dict(pixels_CZYX.meta))


def _swap(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the affine of (z, y, x, 1) for that of (x, y, z, 1)."""
    return affine[:, [2, 1, 0, 3]]


def _meta_tensor(plain: Tensor, affine: NDArray[np.float64], meta: dict[str, Any]) -> Any:
    shape = np.array(plain.shape[1:])
    own = {"original_affine": affine.copy(), "spatial_shape": shape, "original_channel_dim": 0}
    # No list of applied operations: the image's own would not invert what was done here.
    kept = {name: value for name, value in meta.items() if name != "affine"}
    return MetaTensor(plain, affine=torch.from_numpy(affine), meta={**kept, **own})

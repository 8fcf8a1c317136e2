"""Ten views of one volume as users of other libraries make them today.

None of them can render our tables: each draws its own views from the same sizes, ranges and
probabilities, with its own transforms where it has them and torch or NumPy where it has none (said
at each). All start from the int16 volume and end with z-scored float32.

Shape suffixes: C one channel, Z Y X voxels.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tapct_fast.config import HuConfig, Range, ViewGroupConfig, ViewsConfig, Zyx

TenViews = Callable[[Tensor], Sequence[Tensor]]  # int16 ZYX -> ZYX each
RNG = np.random.default_rng(0)


def rivals(
    law: ViewsConfig, groups: Sequence[ViewGroupConfig], hu: HuConfig, shape_zyx: Zyx
) -> tuple[dict[str, TenViews], dict[str, str]]:
    """Return the rivals that are installed, and why the others are absent."""
    makers: dict[str, tuple[str, Callable[..., TenViews]]] = {
        "torch interpolate": ("torch", _torch),
        "MONAI": ("monai", _monai),
        "TorchIO": ("torchio", _torchio),
        "batchgeneratorsv2": ("batchgeneratorsv2", partial(_batchgenerators, shape_zyx=shape_zyx)),
        "kornia": ("kornia", _kornia),
    }
    present, absent = {}, {}
    for name, (package, make) in makers.items():
        if find_spec(package):
            present[name] = make(law, groups, hu)
        else:
            absent[name] = f"{package} is not installed: the rivals extra"
    return present, absent


def _views(groups: Sequence[ViewGroupConfig], views: Sequence[Callable[[Tensor], Any]]) -> TenViews:
    def render(hu_ZYX: Tensor) -> list[Tensor]:
        return [
            torch.as_tensor(view(hu_ZYX)).reshape(group.size_zyx)
            for group, view in zip(groups, views, strict=True)
            for _ in range(group.num)
        ]

    return render


def _z_score(hu: HuConfig) -> tuple[float, float]:
    """Return gain and offset from [0, 1] of the clip range to z-scores."""
    return (hu.clip[1] - hu.clip[0]) / hu.std, (hu.clip[0] - hu.mean) / hu.std


def _log_uniform(bounds: Range) -> float:
    return float(np.exp(RNG.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def _crop(hu_ZYX: Tensor, group: ViewGroupConfig) -> Tensor:
    """Cut a random part at whole voxels, as a view of the volume."""
    share = RNG.uniform(*group.in_plane_scale)
    ratio = _log_uniform(group.aspect)
    shares = (
        RNG.uniform(*group.depth_scale),
        min(math.sqrt(share * ratio), 1.0),
        min(math.sqrt(share / ratio), 1.0),
    )
    places = []
    for part, size in zip(shares, hu_ZYX.shape, strict=True):
        extent = max(round(part * size), 1)
        first = int(RNG.integers(size - extent + 1))
        places.append(slice(first, first + extent))
    return hu_ZYX[tuple(places)]


def _monai(law: ViewsConfig, groups: Sequence[ViewGroupConfig], hu: HuConfig) -> TenViews:
    """All by MONAI; it has no random resized crop with an area, so each side is drawn alone."""
    t: Any = import_module("monai.transforms")
    import_module("monai.data").set_track_meta(False)  # metadata would cost a fifth more
    gain, offset = _z_score(hu)

    def view(group: ViewGroupConfig) -> Any:
        low, high = map(math.sqrt, group.in_plane_scale)
        depth = group.depth_scale
        return t.Compose(
            [
                t.RandScaleCrop((depth[0], low, low), (depth[1], high, high), random_size=True),
                t.Resize(group.size_zyx, mode="trilinear"),
                *(t.RandFlip(law.flip_prob_zyx[axis], axis) for axis in range(3)),
                t.ScaleIntensityRange(*hu.clip, 0.0, 1.0, clip=True),
                t.RandAdjustContrast(law.gamma_prob, law.gamma),
                t.RandScaleIntensityFixedMean(
                    law.contrast_prob, (law.contrast[0] - 1, law.contrast[1] - 1)
                ),
                t.RandGaussianSmooth(*[law.blur_sigma] * 3, prob=group.blur_prob[1]),
                t.ScaleIntensityRange(0.0, 1.0, offset, gain + offset, clip=True),
                t.RandGaussianNoise(law.noise_prob, std=law.noise_std[1]),
            ]
        )

    def render(composed: Any, hu_ZYX: Tensor) -> Any:
        return composed(hu_ZYX[None])

    return _views(groups, [partial(render, view(group)) for group in groups])


def _torchio(law: ViewsConfig, groups: Sequence[ViewGroupConfig], hu: HuConfig) -> TenViews:
    """Crop, contrast and z-score by torch: TorchIO has no random resized crop and no contrast."""
    tio: Any = import_module("torchio")
    warnings.filterwarnings("ignore", "Output shape")  # its Resize is off by a voxel, and mends it
    gain, offset = _z_score(hu)

    def contrast(unit_CZYX: Tensor) -> Tensor:
        return ((unit_CZYX - 0.5) * RNG.uniform(*law.contrast) + 0.5).clamp_(0, 1)

    def view(group: ViewGroupConfig) -> Callable[[Tensor], Any]:
        composed = tio.Compose(
            [
                tio.Resize(group.size_zyx),
                tio.RandomFlip(axes=(0, 1, 2), flip_probability=law.flip_prob_zyx[0]),
                tio.RescaleIntensity((0, 1), in_min_max=hu.clip),
                tio.RandomGamma(tuple(map(math.log, law.gamma)), p=law.gamma_prob),
                tio.Lambda(contrast, p=law.contrast_prob),
                tio.RandomBlur(law.blur_sigma, p=group.blur_prob[1]),
                tio.Lambda(lambda unit_CZYX: unit_CZYX.clamp(0, 1) * gain + offset),
                tio.RandomNoise(std=law.noise_std, p=law.noise_prob),
            ]
        )

        def render(hu_ZYX: Tensor) -> Any:
            part_CZYX = _crop(hu_ZYX, group)[None].clamp(*map(int, hu.clip)).float()
            return composed(tio.ScalarImage(tensor=part_CZYX)).data

        return render

    return _views(groups, [view(group) for group in groups])


def _batchgenerators(
    law: ViewsConfig, groups: Sequence[ViewGroupConfig], hu: HuConfig, shape_zyx: Zyx
) -> TenViews:
    """Crop and resize by its one resampler; clip and z-score by torch."""
    base = "batchgeneratorsv2.transforms"

    def load(module: str, name: str) -> Any:
        return getattr(import_module(f"{base}.{module}"), name)

    gain, offset = _z_score(hu)
    sometimes = load("utils.random", "RandomTransform")

    def view(group: ViewGroupConfig) -> Callable[[Tensor], Any]:
        def scaling(*, image: Tensor, dim: int, **_: Any) -> float:
            """Return how much larger the part is than the view, along an axis."""
            share = RNG.uniform(*(group.depth_scale if dim == 0 else group.in_plane_scale))
            part = share if dim == 0 else math.sqrt(share)
            return float(part * image.shape[1 + dim] / group.size_zyx[dim])

        mosts = (group.depth_scale[1], *[math.sqrt(group.in_plane_scale[1])] * 2)
        resample = load("spatial.spatial", "SpatialTransform")(
            group.size_zyx,
            [int(0.5 * n * most) for n, most in zip(shape_zyx, mosts, strict=True)],
            random_crop=True,
            p_scaling=1,
            scaling=scaling,
            p_synchronize_scaling_across_axes=0,
            padding_mode_image="border",
        )
        steps = [
            load("spatial.mirroring", "MirrorTransform")((0, 1, 2)),
            lambda image: {
                "image": (
                    (image["image"].clamp_(*hu.clip) - hu.clip[0]) / (hu.clip[1] - hu.clip[0])
                )
            },
            sometimes(
                load("intensity.gamma", "GammaTransform")(law.gamma, 0, True, 1, 0), law.gamma_prob
            ),
            sometimes(
                load("intensity.contrast", "ContrastTransform")(law.contrast, True, True),
                law.contrast_prob,
            ),
            sometimes(
                load("noise.gaussian_blur", "GaussianBlurTransform")(law.blur_sigma),
                group.blur_prob[1],
            ),
            lambda image: {"image": image["image"].clamp_(0, 1) * gain + offset},
            sometimes(
                load("intensity.gaussian_noise", "GaussianNoiseTransform")(
                    (0, law.noise_std[1] ** 2)
                ),
                law.noise_prob,
            ),
        ]

        def render(hu_ZYX: Tensor) -> Any:
            image = resample(image=hu_ZYX[None])
            for step in steps:
                image = step(**image) if hasattr(step, "apply") else step(image)
            return image["image"]

        return render

    ten_views = _views(groups, [view(group) for group in groups])
    return lambda hu_ZYX: ten_views(hu_ZYX.float())  # once for all views


def _torch(law: ViewsConfig, groups: Sequence[ViewGroupConfig], hu: HuConfig) -> TenViews:
    """All by torch, as one writes it without a library."""

    def flip(volume: Tensor) -> Tensor:
        axes = [2 + axis for axis, prob in enumerate(law.flip_prob_zyx) if RNG.uniform() < prob]
        return volume.flip(axes) if axes else volume

    return _interpolated(law, groups, hu, flip)


def _kornia(law: ViewsConfig, groups: Sequence[ViewGroupConfig], hu: HuConfig) -> TenViews:
    """Flips by kornia, the rest by torch: kornia does not resize, blur or add noise in 3D."""
    k: Any = import_module("kornia.augmentation")
    flips = torch.nn.Sequential(
        k.RandomDepthicalFlip3D(p=law.flip_prob_zyx[0]),
        k.RandomVerticalFlip3D(p=law.flip_prob_zyx[1]),
        k.RandomHorizontalFlip3D(p=law.flip_prob_zyx[2]),
    )
    return _interpolated(law, groups, hu, flips)


def _interpolated(
    law: ViewsConfig,
    groups: Sequence[ViewGroupConfig],
    hu: HuConfig,
    flip: Callable[[Tensor], Tensor],
) -> TenViews:
    """Crop at whole voxels, ``interpolate``, ``flip``, and the rest in place."""
    gain, offset = _z_score(hu)

    def view(group: ViewGroupConfig) -> Callable[[Tensor], Any]:
        def render(hu_ZYX: Tensor) -> Tensor:
            part = _crop(hu_ZYX, group)[None, None].float()
            unit = functional.interpolate(part, group.size_zyx, mode="trilinear")
            unit = flip(unit).sub_(hu.clip[0]).div_(hu.clip[1] - hu.clip[0]).clamp_(0, 1)
            if RNG.uniform() < law.gamma_prob:
                unit.pow_(_log_uniform(law.gamma))
            if RNG.uniform() < law.contrast_prob:
                unit.sub_(0.5).mul_(RNG.uniform(*law.contrast)).add_(0.5).clamp_(0, 1)
            if RNG.uniform() < group.blur_prob[1]:
                unit = _blur(unit, RNG.uniform(*law.blur_sigma))
            unit.mul_(gain).add_(offset)
            if RNG.uniform() < law.noise_prob:
                unit.add_(torch.randn_like(unit), alpha=RNG.uniform(*law.noise_std))
            return unit

        return render

    return _views(groups, [view(group) for group in groups])


def _blur(volume: Tensor, sigma: float) -> Tensor:
    """Blur along three axes by shifted sums, which take a third of the time of conv3d."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in range(3):
        padding = [0] * 6
        padding[4 - 2 * axis] = padding[5 - 2 * axis] = reach
        padded = functional.pad(volume, padding, mode="reflect")
        size = volume.shape[2 + axis]
        volume = padded.narrow(2 + axis, 0, size) * float(weights[0])
        for shift, weight in enumerate(weights[1:], 1):
            volume.add_(padded.narrow(2 + axis, shift, size), alpha=float(weight))
    return volume

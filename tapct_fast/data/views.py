"""The parameters of every view, drawn on the host; renderers only apply them.

Shape suffixes: V views of one group, 3 axes z y x, 2 window ends.
The law of one view, all draws independent unless said otherwise:

- depth extent: uniform share of the box's depth; in-plane area: uniform share of the box's area;
- in-plane aspect (height / width in mm): log-uniform over the part of the configured range at
  which a rectangle of that area fits the box, or the nearest that fits (a box much longer one
  way). So the area keeps its exact law, which the rejection of RandomResizedCrop bends;
- position: uniform inside the box, continuous; each axis flipped with its probability;
- turns: one, two or three quarter turns in plane, equally likely;
- window ends: each moved by a uniform share of the clip range; gamma: log-uniform; contrast, blur
  sigma and noise deviation: uniform;
- thick slices: a Gaussian slice profile whose full width at half maximum is uniform; its variance
  adds to the blur's across slices.
Each of these six is left alone with one minus its probability. The first view of a group may have
another probability of blur than the rest, as in DINOv2. DINOv2's released code blurs with one minus
the probability it states (its RandomApply takes the probability to keep): 0, 0.9 and 0.5 where its
settings say 1, 0.1 and 0.5. ``blur_as_released`` does the same.

Source: DINOv2's multi-crop (facebookresearch/dinov2 data/transforms.py, Apache-2.0) with 3DINO's
separate scale across slices; HU window as in SPECTRE.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.config import HuConfig, Range, ViewGroupConfig, ViewsConfig, Zyx

# Uniforms of one view in drawing order; a new one goes to the end, so that the others stay.
_AREA, _ASPECT, _DEPTH = 0, 1, 2
_POSITION, _FLIP = 3, 6  # z, y, x each
_WINDOW = 9  # whether, low end, high end
_GAMMA, _BLUR, _NOISE = 12, 14, 16  # whether, how much
_TURN, _CONTRAST, _THICK = 18, 20, 22
_NUM_UNIFORMS = 24
_FWHM = 2 * np.sqrt(2 * np.log(2))  # of a Gaussian, in sigmas


class ViewTable(NamedTuple):
    """Everything that distinguishes the views of one group of one sample."""

    # Box voxels, 0 = outer face of the first voxel; lo > hi flips the axis.
    lo_V3: NDArray[np.float32]
    hi_V3: NDArray[np.float32]
    turns_V: NDArray[np.uint8]  # quarter turns of the view, as torch.rot90 in (Y, X) counts them
    window_V2: NDArray[np.float32]  # HU shown as the two ends of the clip range
    gamma_V: NDArray[np.float32]  # 1 = none
    contrast_V: NDArray[np.float32]  # 1 = none
    sigma_V3: NDArray[np.float32]  # blur per axis in view voxels, 0 = none; equal in y and x
    noise_std_V: NDArray[np.float32]  # of the z-scored intensities, 0 = none
    noise_key_V: NDArray[np.uint64]


def draw_views(
    config: ViewsConfig,
    group: ViewGroupConfig,
    hu: HuConfig,
    shape_zyx: Zyx,
    *,
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
) -> ViewTable:
    """Draw the views of one group for one box.

    Args:
        config: Probabilities and ranges shared by the groups.
        group: Number of views and the part of the box each shows.
        hu: Clip range that the window starts from.
        shape_zyx: Size of the box in voxels.
        spacing_mm: Spacing of the box (z, y, x); makes the aspect one of millimetres.
        rng: Generator of this (sample, group); see ``rng.generator``.
    """
    noise_key_V = rng.integers(0, 2**64, size=group.num, dtype=np.uint64)
    u = rng.random((_NUM_UNIFORMS, group.num)).T

    size_3 = np.array(shape_zyx, dtype=np.float64)
    extent_V3 = _extents(group, shape_zyx, spacing_mm[2] / spacing_mm[1], u)
    start_V3 = u[:, _POSITION : _POSITION + 3] * (size_3 - extent_V3)
    stop_V3 = np.minimum(start_V3 + extent_V3, size_3)
    flip_V3 = u[:, _FLIP : _FLIP + 3] < np.array(config.flip_prob_zyx)

    shift = config.window_shift
    shift_V2 = _uniform(u[:, _WINDOW + 1 : _WINDOW + 3], (-shift, shift))
    shift_V2 *= (u[:, _WINDOW, None] < config.window_prob) * (hu.clip[1] - hu.clip[0])
    gamma_V = np.exp(_uniform(u[:, _GAMMA + 1], (np.log(config.gamma[0]), np.log(config.gamma[1]))))
    turns_V = (u[:, _TURN] < config.quarter_turn_prob) * (1 + np.floor(3 * u[:, _TURN + 1]))
    contrast_V = _uniform(u[:, _CONTRAST + 1], config.contrast)
    noise_std_V = _uniform(u[:, _NOISE + 1], config.noise_std)
    return ViewTable(
        lo_V3=np.where(flip_V3, stop_V3, start_V3).astype(np.float32),
        hi_V3=np.where(flip_V3, start_V3, stop_V3).astype(np.float32),
        turns_V=turns_V.astype(np.uint8),
        window_V2=(np.array(hu.clip) + shift_V2).astype(np.float32),
        gamma_V=np.where(u[:, _GAMMA] < config.gamma_prob, gamma_V, 1).astype(np.float32),
        contrast_V=np.where(u[:, _CONTRAST] < config.contrast_prob, contrast_V, 1).astype(
            np.float32
        ),
        sigma_V3=_sigmas(config, group, u).astype(np.float32),
        noise_std_V=np.where(u[:, _NOISE] < config.noise_prob, noise_std_V, 0).astype(np.float32),
        noise_key_V=noise_key_V,
    )


def _sigmas(
    config: ViewsConfig, group: ViewGroupConfig, u: NDArray[np.float64]
) -> NDArray[np.float64]:
    prob_V = np.array([group.blur_prob[min(v, 1)] for v in range(group.num)])
    if config.blur_as_released:
        prob_V = 1 - prob_V
    blur_V = (u[:, _BLUR] < prob_V) * _uniform(u[:, _BLUR + 1], config.blur_sigma)
    thick_V = _uniform(u[:, _THICK + 1], config.thick_slices) / _FWHM
    thick_V *= u[:, _THICK] < config.thick_slice_prob
    return np.stack([np.hypot(blur_V, thick_V), blur_V, blur_V], axis=1)


def _extents(
    group: ViewGroupConfig, shape_zyx: Zyx, x_over_y_mm: float, u: NDArray[np.float64]
) -> NDArray[np.float64]:
    size_z, size_y, size_x = shape_zyx
    share_V = _uniform(u[:, _AREA], group.in_plane_scale)
    # In voxels, height = sqrt(area * r) <= size_y and width = sqrt(area / r) <= size_x bound r.
    least_V, most_V = share_V * size_y / size_x, size_y / (share_V * size_x)
    low_V = np.clip(group.aspect[0] * x_over_y_mm, least_V, most_V)
    high_V = np.clip(group.aspect[1] * x_over_y_mm, least_V, most_V)
    ratio_V = np.exp(np.log(low_V) + u[:, _ASPECT] * (np.log(high_V) - np.log(low_V)))
    area_V = share_V * size_y * size_x
    return np.stack(
        [
            _uniform(u[:, _DEPTH], group.depth_scale) * size_z,
            np.minimum(np.sqrt(area_V * ratio_V), size_y),
            np.minimum(np.sqrt(area_V / ratio_V), size_x),
        ],
        axis=1,
    )


def _uniform(u: NDArray[np.float64], bounds: Range) -> NDArray[np.float64]:
    return bounds[0] + u * (bounds[1] - bounds[0])

"""Views rendered with torch: the definition that faster renderers are held to.

Shape suffixes: V views, Z Y X voxels of the box or the view, O outputs, I inputs and T taps along
one axis, N voxels, P pairs of voxels.
Order: resample -> quarter turns -> window to [0, 1] and clip -> gamma -> contrast about 0.5 and
clip -> blur -> back to HU of the clip range -> z-score -> noise.

Resampling, per axis: output i sits at lo + (i + 0.5) / n * (hi - lo) - 0.5 in box voxels (0 =
centre of the first voxel); its weights are a triangle of half-width max(|hi - lo| / n, 1),
normalised to one. So enlarging is linear interpolation and shrinking is antialiased; without
``antialias`` the half-width is 1 and shrinking is linear interpolation too. The triangle may leave
the view but repeats the outermost voxel at the edge of the box. Blur is a Gaussian per axis of
radius ceil(3 sigma), mirrored without repeating the edge voxel (reflect 101), as often as a thin
view asks for.
Source: the geometry of DALI's resize and of ``grid_sample(align_corners=False)``.

Noise: voxel n of a view takes word n // 2 of Philox4x64-10 keyed by the view's noise key (counter
from 1, as numpy counts). The word's high and low 32 bits are the two uniforms of Box-Muller; an
even n takes the cosine, an odd n the sine. So a voxel's noise depends on nothing but (noise key,
n).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.config import HuConfig, ViewGroupConfig
from tapct_fast.data.views import ViewTable

# Outputs per matmul. The weights are banded, so a block of outputs reads a short range of inputs:
# at 450 -> 224 in plane 4 to 5 times faster than the dense product. Across slices 4, as the first
# product converts its input to float and a copy of 32 MB or more is paid for in page faults:
# 40x450x450 -> 12x224x224 takes 9.5 ms of one core, 120 ms with one float copy and dense products.
_BLOCK_ZYX = (4, 16, 16)


def render(hu_ZYX: Tensor, table: ViewTable, group: ViewGroupConfig, hu: HuConfig) -> Tensor:
    """Render the views of one group from one box; a pure function of its arguments.

    Args:
        hu_ZYX: int16 HU of the box, on any device.
        table: What ``draw_views`` drew for this box.
        group: Size of each view in voxels, and whether shrinking is antialiased.
        hu: Clip range, mean and deviation.

    Returns:
        Z-scored float32 views VZYX on the device of ``hu_ZYX``.
    """
    views_VZYX = torch.empty(
        (len(table.gamma_V), *group.size_zyx), dtype=torch.float32, device=hu_ZYX.device
    )
    gain = (hu.clip[1] - hu.clip[0]) / hu.std
    offset = (hu.clip[0] - hu.mean) / hu.std
    for v, view_ZYX in enumerate(views_VZYX):
        unit_ZYX = _resample(hu_ZYX, table.lo_V3[v], table.hi_V3[v], group)
        unit_ZYX = unit_ZYX.rot90(int(table.turns_V[v]), dims=(1, 2))
        low, high = map(float, table.window_V2[v])
        unit_ZYX.sub_(low).mul_(1 / (high - low)).clamp_(0, 1)
        if table.gamma_V[v] != 1:
            unit_ZYX.pow_(float(table.gamma_V[v]))
        if table.contrast_V[v] != 1:
            unit_ZYX.sub_(0.5).mul_(float(table.contrast_V[v])).add_(0.5).clamp_(0, 1)
        if table.sigma_V3[v].any():
            unit_ZYX = _blur(unit_ZYX, table.sigma_V3[v])
        torch.mul(unit_ZYX, gain, out=view_ZYX).add_(offset)
        if table.noise_std_V[v] > 0:
            noise_N = gaussian_noise(int(table.noise_key_V[v]), view_ZYX.numel())
            noise_ZYX = noise_N.to(hu_ZYX.device).view(group.size_zyx)
            view_ZYX.add_(noise_ZYX, alpha=float(table.noise_std_V[v]))
    return views_VZYX


def gaussian_noise(key: int, num_voxels: int) -> Tensor:
    """Return the standard normal float32 noise of voxels 0 .. ``num_voxels`` - 1 under one key."""
    words = np.random.Philox(key=key).random_raw((num_voxels + 1) // 2)
    high_P = torch.from_numpy((words >> np.uint64(32)).astype(np.float32))
    low_P = torch.from_numpy((words & np.uint64(0xFFFFFFFF)).astype(np.float32))
    # + 0.5 keeps the logarithm finite; the largest radius is sqrt(66 ln 2) = 6.76
    radius_P = high_P.add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle_P = low_P.mul_(2 * math.pi * 2.0**-32)
    noise_P2 = torch.stack([angle_P.cos().mul_(radius_P), angle_P.sin().mul_(radius_P)], dim=1)
    return noise_P2.flatten()[:num_voxels]


def _resample(
    hu_ZYX: Tensor, lo_3: NDArray[np.float32], hi_3: NDArray[np.float32], group: ViewGroupConfig
) -> Tensor:
    size_zyx = group.size_zyx
    axes = [
        _triangle_weights(float(lo), float(hi), num_out, num_in, antialias=group.antialias)
        for lo, hi, num_out, num_in in zip(lo_3, hi_3, size_zyx, hu_ZYX.shape, strict=True)
    ]
    box_ZYX = hu_ZYX
    for axis, (weights_OI, start) in enumerate(axes):
        box_ZYX = box_ZYX.narrow(axis, start, weights_OI.shape[1])
    # The axis that shrinks most goes first, so that the others have the least left to do.
    for axis in sorted(range(3), key=lambda axis: size_zyx[axis] / axes[axis][0].shape[1]):
        box_ZYX = _apply_along(box_ZYX, axes[axis][0], axis)
    return box_ZYX


def _blur(unit_ZYX: Tensor, sigma_3: NDArray[np.float32]) -> Tensor:
    for axis, (size, sigma) in enumerate(zip(unit_ZYX.shape, sigma_3, strict=True)):
        if sigma > 0:
            unit_ZYX = _apply_along(unit_ZYX, _gaussian_weights(float(sigma), size), axis)
    return unit_ZYX.clamp_(0, 1)  # rounding of the weights' sum must not leave the clip range


def _triangle_weights(
    lo: float, hi: float, num_out: int, num_in: int, *, antialias: bool
) -> tuple[NDArray[np.float32], int]:
    """Return weights over the inputs that any output touches, and the first of these inputs."""
    scale = (hi - lo) / num_out
    half_width = max(abs(scale), 1.0) if antialias else 1.0
    center_O = lo + (np.arange(num_out) + 0.5) * scale - 0.5
    taps = math.ceil(2 * half_width)
    input_OT = np.floor(center_O - half_width).astype(np.int64)[:, None] + 1 + np.arange(taps)
    weight_OT = np.maximum(1 - np.abs(input_OT - center_O[:, None]) / half_width, 0)
    weight_OT /= weight_OT.sum(axis=1, keepdims=True)
    return _scatter(weight_OT, input_OT.clip(0, num_in - 1))


def _gaussian_weights(sigma: float, size: int) -> NDArray[np.float32]:
    radius = math.ceil(3 * sigma)
    offset_T = np.arange(-radius, radius + 1)
    weight_T = np.exp(-0.5 * (offset_T / sigma) ** 2)
    weight_T /= weight_T.sum()
    period = max(2 * (size - 1), 1)  # folding by the period mirrors as often as the radius asks for
    input_OT = np.abs((np.arange(size)[:, None] + offset_T + size - 1) % period - (size - 1))
    return _scatter(np.broadcast_to(weight_T, input_OT.shape), input_OT)[0]


def _scatter(
    weight_OT: NDArray[np.float64], input_OT: NDArray[np.int64]
) -> tuple[NDArray[np.float32], int]:
    start = int(input_OT.min())
    weights_OI = np.zeros((len(input_OT), int(input_OT.max()) + 1 - start))
    np.add.at(weights_OI, (np.arange(len(input_OT))[:, None], input_OT - start), weight_OT)
    return weights_OI.astype(np.float32), start


def _apply_along(x_ZYX: Tensor, weights_OI: NDArray[np.float32], axis: int) -> Tensor:
    """Multiply one axis of an int16 or float32 box by banded weights, block by block."""
    num_out, block = len(weights_OI), _BLOCK_ZYX[axis]
    shape = list(x_ZYX.shape)
    shape[axis] = num_out
    out_ZYX = torch.empty(shape, dtype=torch.float32, device=x_ZYX.device)
    for first in range(0, num_out, block):
        band_OI = weights_OI[first : first + block]
        used = np.flatnonzero(band_OI.any(axis=0))
        start, stop = int(used[0]), int(used[-1]) + 1
        w_OI = torch.from_numpy(band_OI[:, start:stop].copy()).to(x_ZYX.device)
        part_ZYX = x_ZYX.narrow(axis, start, stop - start).float()
        if axis == 0:
            rows_ZYX = (w_OI @ part_ZYX.flatten(1)).view(-1, *part_ZYX.shape[1:])  # -1: block
        else:
            rows_ZYX = w_OI @ part_ZYX if axis == 1 else part_ZYX @ w_OI.T
        out_ZYX.narrow(axis, first, len(band_OI)).copy_(rows_ZYX)
    return out_ZYX

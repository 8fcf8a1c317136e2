"""Between the token grid and the label grid, by world millimetres.

The grids may differ in spacing, size and direction. Work goes slab by slab along z, so that memory
is bounded by a slab and not by the label map.

Shape suffixes: Z Y X label voxels, L tokens, D width, K classes, N three coordinates.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.downstream.features import Features
from tapct_fast.errors import InputError
from tapct_fast.io.volume import Volume

SLAB_VOXELS = 1 << 18  # one 512 x 512 slice


class LabelledTokens(NamedTuple):
    """Tokens of a scan that hold label voxels."""

    x_LD: Tensor
    share_LK: Tensor  # share of each class among a token's voxels; rows sum to 1


def labelled_tokens(features: Features, labels: Volume, num_classes: int) -> LabelledTokens:
    """Give each token the shares of the classes among the label voxels nearest to its centre.

    Raises:
        InputError: No label voxel lies in the scan, or a value is not a class number.
    """
    check_classes(labels, num_classes)
    grid_zyx = features.patches_ZYXC.shape[:3]
    limit_N = np.array(grid_zyx)[:, None, None, None]
    num_tokens = int(np.prod(grid_zyx))
    counts = np.zeros(num_tokens * num_classes, dtype=np.int64)
    for token_NZYX, slab_ZYX in _slabs(features, labels):
        near_NZYX = np.rint(token_NZYX).astype(np.int64)
        inside_ZYX = ((near_NZYX >= 0) & (near_NZYX < limit_N)).all(axis=0)
        z, y, x = near_NZYX[:, inside_ZYX]
        index = np.ravel_multi_index((z, y, x), grid_zyx)
        counts += np.bincount(index * num_classes + slab_ZYX[inside_ZYX], minlength=len(counts))
    counts_LK = counts.reshape(num_tokens, num_classes)
    total_L = counts_LK.sum(axis=1)
    if not total_L.any():
        raise InputError("it lies outside its scan; give label maps in the order of the scans")
    held_L = total_L > 0
    share_LK = counts_LK[held_L] / total_L[held_L, None]
    x_LD = features.patches_ZYXC.flatten(0, 2)[torch.from_numpy(held_L)]
    return LabelledTokens(x_LD, torch.from_numpy(share_LK).float())


def check_classes(labels: Volume, num_classes: int) -> None:
    """Refuse a label map whose values are not class numbers.

    Raises:
        InputError: A value is below 0 or not below ``num_classes``.
    """
    low, high = int(labels.hu_ZYX.min()), int(labels.hu_ZYX.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"it has values {low}..{high}, not 0..{num_classes - 1}")


def classify_voxels(scores_LK: Tensor, features: Features, labels: Volume) -> NDArray[np.int64]:
    """Return the class with the highest score at the place of each label voxel.

    Args:
        scores_LK: Finite scores of every token of ``features``.
        features: Where the tokens lie.
        labels: Where the voxels lie.

    Returns:
        Class numbers, ZYX; scores are trilinear between token centres and held beyond the
        outermost.
    """
    grid_zyx = features.patches_ZYXC.shape[:3]
    scores_BKZYX = scores_LK.float().T.reshape(1, -1, *grid_zyx)
    size_xyz = np.array(grid_zyx[::-1])
    slabs = []
    for token_NZYX, _ in _slabs(features, labels):
        token_ZYXN = np.moveaxis(token_NZYX[::-1], 0, -1)  # grid_sample takes x, y, z
        # Without align_corners the centre of token i of n lies at (2 i + 1) / n - 1.
        place_ZYXN = torch.from_numpy((2 * token_ZYXN + 1) / size_xyz - 1).float()
        voxels_BKZYX = F.grid_sample(
            scores_BKZYX, place_ZYXN[None], padding_mode="border", align_corners=False
        )
        slabs.append(voxels_BKZYX[0].argmax(0))
    predicted: NDArray[np.int64] = torch.cat(slabs).numpy()
    return predicted


def _slabs(
    features: Features, labels: Volume
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int16]]]:
    """Yield token coordinates (z, y, x) and labels of all label voxels, slab by slab."""
    to_token = np.linalg.inv(features.affine) @ labels.affine
    depth, height, width = labels.hu_ZYX.shape
    step = max(1, SLAB_VOXELS // (height * width))
    y, x = np.arange(height)[:, None], np.arange(width)
    for first in range(0, depth, step):
        z = np.arange(first, min(first + step, depth))[:, None, None]
        axes = [row[0] * x + row[1] * y + row[2] * z + row[3] for row in to_token[2::-1]]
        yield np.stack(axes), labels.hu_ZYX[first : first + step]

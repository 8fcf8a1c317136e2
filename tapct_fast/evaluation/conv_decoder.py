"""A small convolutional decoder on frozen patch tokens: two 3x3x3 convolutions, upsampled.

Logits on the token grid are interpolated trilinearly at label voxels drawn at random, where cross
entropy and soft Dice are taken: the label grid may have any spacing, size and direction. Float32,
fixed steps, drawn from a seed.

Shape suffixes: B batch, C channels or width, Z Y X tokens, N voxels, L tokens, D width, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.downstream.features import Features
from tapct_fast.io.volume import Volume

WIDTH = 32
STEPS, STEPS_PER_SCAN = 240, 4  # a scan is read once for a few crops
CROP_ZYX = (6, 24, 24)  # tokens
DRAWN_VOXELS, KEPT_VOXELS = 65536, 16384
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2


@dataclass(frozen=True, slots=True, eq=False)
class ConvHead:
    """Two convolutions on standardised tokens; call it with features."""

    mean_D: Tensor
    std_D: Tensor
    weights: tuple[Tensor, Tensor]  # (WIDTH, D, 3, 3, 3) and (K, WIDTH, 3, 3, 3)
    biases: tuple[Tensor, Tensor]

    def __call__(self, features: Features) -> Tensor:
        """Return scores_LK of all tokens, finite."""
        with torch.no_grad():
            scores_KZYX = self.scores_KZYX(features.patches_ZYXC)
        return scores_KZYX.flatten(1).T

    def scores_KZYX(self, tokens_ZYXC: Tensor) -> Tensor:
        """Return the scores of a box of tokens; beyond its edge lies the mean token."""
        x_BCZYX = ((tokens_ZYXC - self.mean_D) / self.std_D).movedim(-1, 0)[None]
        x_BCZYX = F.gelu(F.conv3d(x_BCZYX, self.weights[0], self.biases[0], padding=1))
        return F.conv3d(x_BCZYX, self.weights[1], self.biases[1], padding=1)[0]


def fit_conv_head(
    x_ND: Tensor,
    share_NK: Tensor,
    cases: Sequence[int],
    features_of: Callable[[int], Features],
    labels_of: Callable[[int], Volume],
    *,
    seed: int,
) -> ConvHead:
    """Fit the decoder.

    Args:
        x_ND: Tokens of the training scans, for their mean and standard deviation.
        share_NK: Their class shares: a class that they lack is never predicted.
        cases: Training scans.
        features_of: Reads their features.
        labels_of: Reads their label maps, voxels are class numbers.
        seed: Draws the initial weights, the order of the scans, crops and voxels.
    """
    num_channels, num_classes = x_ND.shape[1], share_NK.shape[1]
    generator = torch.Generator().manual_seed(seed)
    first = torch.empty(WIDTH, num_channels, 3, 3, 3)
    second = torch.empty(num_classes, WIDTH, 3, 3, 3)
    for weight in (first, second):
        torch.nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
    parameters = [first, second, torch.zeros(WIDTH), torch.zeros(num_classes)]
    for parameter in parameters:
        parameter.requires_grad_()
    std_D = x_ND.std(0, correction=0).clamp_min(1e-6)
    head = ConvHead(x_ND.mean(0), std_D, (first, second), (parameters[2], parameters[3]))

    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for step in range(STEPS):
        if step % STEPS_PER_SCAN == 0:
            order = order or [cases[i] for i in rng.permutation(len(cases))]
            case = order.pop()
            features, labels = features_of(case), labels_of(case)
        loss = _loss(head, features, labels, rng)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    offset_K = torch.where(share_NK.sum(0) > 0, 0.0, -1e4)
    biases = (head.biases[0].detach(), head.biases[1].detach() + offset_K)
    return replace(head, weights=(first.detach(), second.detach()), biases=biases)


def _loss(head: ConvHead, features: Features, labels: Volume, rng: np.random.Generator) -> Tensor:
    """Return cross entropy plus soft Dice of the classes at hand on voxels of one random crop."""
    grid_zyx = features.patches_ZYXC.shape[:3]
    size_zyx = tuple(map(min, grid_zyx, CROP_ZYX))
    start_zyx = [rng.integers(g - s + 1) for g, s in zip(grid_zyx, size_zyx, strict=True)]
    place_N3, class_N = _voxels(features, labels, rng)
    place_N3 = place_N3 - start_zyx
    inside_N = ((place_N3 >= -0.5) & (place_N3 < np.array(size_zyx) - 0.5)).all(1)
    place_N3, class_N = place_N3[inside_N][:KEPT_VOXELS], class_N[inside_N][:KEPT_VOXELS]
    box = tuple(slice(s, s + n) for s, n in zip(start_zyx, size_zyx, strict=True))
    scores_KZYX = head.scores_KZYX(features.patches_ZYXC[box])
    if len(class_N) == 0:  # a label map smaller than its scan, and a crop beside it
        return scores_KZYX.sum() * 0
    # grid_sample takes x, y, z; the centre of token i of n lies at (2 i + 1) / n - 1.
    place_xyz = torch.from_numpy((2 * place_N3[:, ::-1] + 1) / np.array(size_zyx[::-1]) - 1)
    sampled = F.grid_sample(
        scores_KZYX[None],
        place_xyz.float()[None, None, None],
        padding_mode="border",
        align_corners=False,
    )
    scores_NK = sampled[0, :, 0, 0].T
    target_N = torch.from_numpy(class_N)
    p_NK = torch.softmax(scores_NK, dim=1)
    truth_NK = F.one_hot(target_N, p_NK.shape[1]).float()
    dice_K = 2 * (p_NK * truth_NK).sum(0) / (p_NK.sum(0) + truth_NK.sum(0)).clamp_min(1e-6)
    present_K = truth_NK.sum(0) > 0
    return F.cross_entropy(scores_NK, target_N) + 1 - dice_K[present_K].mean()


def _voxels(
    features: Features, labels: Volume, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Draw label voxels: their token coordinates (z, y, x) and classes."""
    flat_N = rng.integers(labels.hu_ZYX.size, size=DRAWN_VOXELS)
    voxel_N3 = np.stack(np.unravel_index(flat_N, labels.hu_ZYX.shape), axis=1)
    to_token = np.linalg.inv(features.affine) @ labels.affine
    place_xyz = voxel_N3[:, ::-1] @ to_token[:3, :3].T + to_token[:3, 3]
    return place_xyz[:, ::-1], labels.hu_ZYX.reshape(-1)[flat_N].astype(np.int64)

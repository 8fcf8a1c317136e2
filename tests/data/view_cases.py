"""Laws with one step each, and boxes, that every renderer is held to torch on.

Shape suffixes: Z Y X voxels.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tapct_fast.config import HuConfig, ViewsConfig, Zyx
from tapct_fast.data.rng import generator

HU = HuConfig()
OFF = ViewsConfig(
    flip_prob_zyx=(0, 0, 0), window_prob=0, gamma_prob=0, contrast_prob=0, thick_slice_prob=0,
    noise_prob=0,
)  # fmt: skip
ALL = ViewsConfig(
    flip_prob_zyx=(0.5, 0.5, 0.5),
    quarter_turn_prob=0.5,
    gamma_prob=0.5,
    contrast_prob=0.5,
    thick_slice_prob=0.5,
    noise_prob=0.5,
)
STAGES = {
    "resample": OFF,
    "flips": dataclasses.replace(OFF, flip_prob_zyx=(1, 1, 1)),
    "turns": dataclasses.replace(OFF, quarter_turn_prob=1),
    "window": dataclasses.replace(OFF, window_prob=1),
    "gamma": dataclasses.replace(OFF, gamma_prob=1),
    "contrast": dataclasses.replace(OFF, contrast_prob=1),
    "thick slices": dataclasses.replace(OFF, thick_slice_prob=1, thick_slices=(1.0, 20.0)),
    "blur": OFF,  # and a probability of one in the group
    "noise": dataclasses.replace(OFF, noise_prob=1),
    "all": ALL,
}
# The last are thinner than a view, and one voxel: views reach beyond them.
SHAPES: list[Zyx] = [(30, 90, 80), (9, 40, 37), (3, 12, 14), (1, 30, 2), (1, 1, 1)]
MAX, MEAN = 1e-3, 1e-5  # z-scores that a renderer may differ from torch


def boxes_of(shapes: Sequence[Zyx] = SHAPES) -> list[Tensor]:
    """Return boxes of noise from below air to above bone."""
    return [
        torch.from_numpy(generator(n).integers(-1100, 3000, shape).astype(np.int16))
        for n, shape in enumerate(shapes)
    ]

"""Sliding windows on the token grid and their blending.

Windows start on token borders, so that every window's tokens fall on one grid and nothing is
resampled. Shape suffixes: W windows, Z Y X tokens, C width.
"""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from tapct_fast.config import Zyx
from tapct_fast.errors import InputError

MAX_OVERLAP = 0.9
SIGMA = 0.125  # of the window; MONAI's sliding window default, as in the released model card
Blending = Literal["gaussian", "uniform"]


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Return the first token of each window along one axis; together they cover it.

    Neighbours overlap by at least ``overlap``: whole tokens only, so 12 slices (3 tokens) at one
    half move by one token. The last window ends with the axis; an axis shorter than the window is
    one window.
    """
    step = max(1, math.floor(window * (1 - overlap) + 1e-9))
    last = max(length - window, 0)
    return [*range(0, last, step), last]


def tile(grid_zyx: Zyx, window_zyx: Zyx, overlap: float) -> list[Zyx]:
    """Return the first token of each window, depth slowest.

    Raises:
        InputError: The overlap is outside 0..0.9.
    """
    if not 0 <= overlap <= MAX_OVERLAP:
        raise InputError(f"overlap={overlap} is not in 0..{MAX_OVERLAP}")
    axes = [starts(g, w, overlap) for g, w in zip(grid_zyx, window_zyx, strict=True)]
    return [(z, y, x) for z, y, x in itertools.product(*axes)]


def blend_weight_ZYX(window_zyx: Zyx, blending: Blending) -> Tensor:
    """Return the blending weight of each token of a window, 1 at its centre.

    Raises:
        InputError: The blending is unknown.
    """
    if blending == "uniform":
        return torch.ones(window_zyx)
    if blending != "gaussian":
        raise InputError(f"blending={blending!r} is neither gaussian nor uniform")
    weights_ZYX = torch.ones(())
    for size in window_zyx:
        offset = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        weight = torch.exp(-0.5 * (offset / (SIGMA * size)) ** 2)
        weights_ZYX = weights_ZYX[..., None] * weight
    return weights_ZYX


class Blend:
    """A weighted sum of windows on the token grid, and the weights it has received."""

    def __init__(
        self, grid_zyx: Zyx, window_zyx: Zyx, blending: Blending, device: torch.device
    ) -> None:
        self.window_zyx = window_zyx
        self.weight_ZYX = blend_weight_ZYX(window_zyx, blending).to(device)
        self.total_ZYX = torch.zeros(grid_zyx, device=device)
        self.sum_ZYXC: Tensor | None = None  # its width is known with the first window

    def add(self, start_zyx: Zyx, tokens_ZYXC: Tensor) -> None:
        """Add the tokens of one window."""
        if self.sum_ZYXC is None:
            self.sum_ZYXC = tokens_ZYXC.new_zeros(*self.total_ZYX.shape, tokens_ZYXC.shape[-1])
        box = tuple(slice(s, s + w) for s, w in zip(start_zyx, self.window_zyx, strict=True))
        self.total_ZYX[box] += self.weight_ZYX
        self.sum_ZYXC[box].addcmul_(self.weight_ZYX[..., None], tokens_ZYXC)

    def mean_ZYXC(self) -> Tensor:
        """Return the blended tokens; the sum is used up."""
        assert self.sum_ZYXC is not None
        return self.sum_ZYXC.div_(self.total_ZYX[..., None])

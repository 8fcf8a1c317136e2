"""Sizes of the named models."""

import pytest
import torch

from tapct_fast.model.presets import VIT_PRESETS
from tapct_fast.model.vit import Vit


# By hand: patch + cls + registers + mask token + positions + blocks + norm, as in facts of B-3D.
@pytest.mark.parametrize(
    ("name", "parameters", "grid_zyx"),
    [
        ("vit_b_3d", 87_083_520, (3, 28, 28)),
        ("vit_s_3d", 22_308_096, (3, 28, 28)),
        ("vit_b_25d", 87_083_520 + 768 * (6 * 64 - 4 * 64 - 2 * 784), (1, 28, 28)),
        ("vit_s_25d", 22_308_096 + 384 * (6 * 64 - 4 * 64 - 2 * 784), (1, 28, 28)),
        ("vit_b_2d", 87_083_520 + 768 * (64 - 4 * 64 - 2 * 784), (1, 28, 28)),
        ("vit_s_2d", 22_308_096 + 384 * (64 - 4 * 64 - 2 * 784), (1, 28, 28)),
    ],
)
def test_presets_have_the_size_of_their_name(
    name: str, parameters: int, grid_zyx: tuple[int, int, int]
) -> None:
    config = VIT_PRESETS[name]()
    with torch.device("meta"):
        vit = Vit(config)
    assert sum(p.numel() for p in vit.parameters()) == parameters
    assert config.grid_zyx == grid_zyx
    assert config.num_heads == config.dim // 64


def test_every_preset_is_tested() -> None:
    assert sorted(VIT_PRESETS) == [
        "vit_b_25d", "vit_b_2d", "vit_b_3d", "vit_s_25d", "vit_s_2d", "vit_s_3d"
    ]  # fmt: skip

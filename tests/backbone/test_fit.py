"""Positions of a backbone on another grid, against a loop in numpy; what is refused."""

import dataclasses
import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch

from tapct_fast.backbone.fit import fit_state
from tapct_fast.config import VitConfig
from tapct_fast.errors import ConfigError
from tapct_fast.model.vit import Vit

SOURCE = VitConfig(dim=64, depth=1, image_zyx=(8, 24, 32), layer_scale=1.0)


def state() -> dict[str, torch.Tensor]:
    vit = Vit(SOURCE)
    vit.init_weights(0)
    return vit.state_dict()


def trilinear(grid_ZYXD: np.ndarray, size_zyx: tuple[int, int, int]) -> np.ndarray:
    """Half-pixel centres, the edge repeated, one output at a time."""
    out = np.empty((*size_zyx, grid_ZYXD.shape[-1]))
    for place in np.ndindex(*size_zyx):
        total = np.zeros(grid_ZYXD.shape[-1])
        ends = []
        for at, num_in, num_out in zip(place, grid_ZYXD.shape, size_zyx, strict=False):
            x = max((at + 0.5) * num_in / num_out - 0.5, 0.0)
            low = min(int(x), num_in - 1)
            high = min(low + 1, num_in - 1)
            ends.append(((low, 1 - (x - low)), (high, x - low)))
        for corner in itertools.product(*ends):
            index = tuple(i for i, _ in corner)
            total += np.prod([weight for _, weight in corner]) * grid_ZYXD[index]
        out[place] = total
    return out


@pytest.mark.parametrize("image_zyx", [(12, 40, 16), (4, 24, 32), (8, 48, 64)])
def test_positions_are_resized_on_all_three_axes_and_nothing_else_changes(
    image_zyx: tuple[int, int, int],
) -> None:
    before = state()
    target = dataclasses.replace(SOURCE, image_zyx=image_zyx, layer_scale=1e-5, drop_path=0.1)
    after = fit_state(before, SOURCE, target)
    grid_ZYXD = before["pos_embed"][0, 1:].double().numpy().reshape(*SOURCE.grid_zyx, 64)
    expected = trilinear(grid_ZYXD, target.grid_zyx).reshape(-1, 64)
    np.testing.assert_allclose(after["pos_embed"][0, 1:].numpy(), expected, atol=1e-7)  # float32
    assert torch.equal(after["pos_embed"][0, 0], before["pos_embed"][0, 0])
    others = before.keys() - {"pos_embed"}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in others)


@torch.no_grad()
def test_a_fitted_network_gives_the_tokens_that_the_old_one_gave_for_that_size() -> None:
    target = dataclasses.replace(SOURCE, image_zyx=(12, 40, 16))
    old, new = Vit(SOURCE), Vit(target)
    old.load_state_dict(state())
    new.load_state_dict(fit_state(state(), SOURCE, target))
    x_BCZYX = torch.randn(2, 1, 12, 40, 16)
    assert torch.equal(old(x_BCZYX).patches_BLD, new(x_BCZYX).patches_BLD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 128}, "the weights have vit.dim 64, the run has 128; give --vit.dim 64"),
        ({"depth": 2}, "give --vit.depth 1"),
        ({"head_dim": 32}, "give --vit.head_dim 64"),
        ({"num_registers": 0}, "the weights have vit.num_registers 4, the run has 0"),
        ({"ffn": "swiglu"}, "give --vit.ffn mlp"),
        ({"mlp_ratio": 3.0}, "give --vit.mlp_ratio 4.0"),
        ({"layer_scale": None}, "the weights have a LayerScale, vit.layer_scale=None"),
        ({"patch_zyx": (2, 8, 8)}, "give --vit.patch_zyx 4,8,8"),
    ],
)
def test_another_architecture_is_refused_with_the_setting_and_its_value(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        fit_state(state(), SOURCE, dataclasses.replace(SOURCE, **change))


def test_weights_without_layer_scale_are_refused_by_a_run_with_it() -> None:
    bare = dataclasses.replace(SOURCE, layer_scale=None)
    with pytest.raises(ConfigError, match=re.escape("no LayerScale, vit.layer_scale=1.0; give")):
        fit_state(Vit(bare).state_dict(), bare, SOURCE)

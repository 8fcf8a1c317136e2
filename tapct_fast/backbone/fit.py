"""Fit the weights of one backbone to the architecture of another run.

Only the position grid is resized; everything else must be equal. Shape suffixes: L patch tokens,
D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tapct_fast.config import VitConfig
from tapct_fast.errors import ConfigError
from tapct_fast.model.vit import Vit

_MUST_AGREE = ("dim", "depth", "head_dim", "patch_zyx", "num_registers", "ffn", "mlp_dim")


def fit_state(
    state: Mapping[str, Tensor], source: VitConfig, target: VitConfig
) -> dict[str, Tensor]:
    """Return the state of ``Vit(target)`` that holds the weights of ``Vit(source)``.

    The position grid is resized along all three axes where ``image_zyx`` differs, by the law with
    which ``Vit.position_rows`` serves another grid; so the fitted Vit gives the same tokens for
    volumes of the target's size, and those of its own grid are learned from there on.

    Args:
        state: Complete state of ``Vit(source)``.
        source: Architecture of the weights.
        target: Architecture of the run.

    Raises:
        ConfigError: They differ in more than the position grid, drop path and the initial value of
            LayerScale; names the setting and its way out.
    """
    _check_agree(source, target)
    fitted = dict(state)
    if source.grid_zyx != target.grid_zyx:
        with torch.device("meta"):
            vit = Vit(source)
        vit.load_state_dict(fitted, assign=True)
        with torch.no_grad():
            rows_LD = vit.position_rows(target.grid_zyx)
        cls_1D = fitted["pos_embed"][0, :1]
        fitted["pos_embed"] = torch.cat([cls_1D, rows_LD])[None]
    return fitted


def _check_agree(source: VitConfig, target: VitConfig) -> None:
    for name in _MUST_AGREE:
        theirs, ours = getattr(source, name), getattr(target, name)
        if theirs == ours:
            continue
        if name == "patch_zyx":
            raise ConfigError(
                f"the weights cut patches of {theirs} voxels, vit.patch_zyx={ours}: patches are "
                f"not resized between volumes; give --vit.patch_zyx {','.join(map(str, theirs))}"
            )
        setting = "mlp_ratio" if name == "mlp_dim" else name
        theirs, ours = getattr(source, setting), getattr(target, setting)
        raise ConfigError(
            f"the weights have vit.{setting} {theirs}, the run has {ours}; "
            f"give --vit.{setting} {theirs}"
        )
    if (source.layer_scale is None) != (target.layer_scale is None):
        which, value = ("no", "none") if source.layer_scale is None else ("a", "1e-5")
        raise ConfigError(
            f"the weights have {which} LayerScale, vit.layer_scale={target.layer_scale}; "
            f"give --vit.layer_scale {value}"
        )

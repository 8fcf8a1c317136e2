"""DINOv2's parameter groups: layer decay, patch-embed rate, no decay of norms and biases.

Source: DINOv2's utils/param_groups.py (Apache-2.0).
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from tapct_fast.config import OptimConfig
from tapct_fast.ssl.schedules import StepValues

_FIRST = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


class Multipliers(NamedTuple):
    """What a parameter group multiplies the values of a step with."""

    lr: float
    weight_decay: float
    is_last_layer: bool
    is_backbone: bool


def multipliers(name: str, *, depth: int, config: OptimConfig) -> Multipliers:
    """Return the multipliers of one parameter.

    ``layer_decay ** (depth + 1 - layer)`` with layer 0 for embeddings and tokens, i + 1 for block
    i, depth + 1 for the final norm and for the heads. Positions, tokens and prototypes do decay.

    Args:
        name: Parameter name under ``backbone.``, ``dino_head.`` or ``ibot_head.``.
        depth: Blocks of the backbone.
        config: Layer decay and the extra factor of the patch embedding.
    """
    layer, is_backbone = depth + 1, name.startswith("backbone.")
    if is_backbone:
        block = re.match(r"backbone\.blocks\.(\d+)\.", name)
        if block:
            layer = int(block[1]) + 1
        elif name.removeprefix("backbone.").startswith(_FIRST):
            layer = 0
    lr = config.layer_decay ** (depth + 1 - layer)
    if "patch_embed" in name:
        lr *= config.patch_embed_lr_scale
    decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return Multipliers(lr, float(decays), "last_layer" in name, is_backbone)


class ParamGroup(NamedTuple):
    """Parameters that share their multipliers."""

    multipliers: Multipliers
    params: list[nn.Parameter]


def param_groups(student: nn.Module, *, depth: int, config: OptimConfig) -> list[ParamGroup]:
    """Group the trainable parameters of ``student`` by equal multipliers, in order of first use."""
    groups: dict[Multipliers, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(multipliers(name, depth=depth, config=config), []).append(parameter)
    return [ParamGroup(key, params) for key, params in groups.items()]


def build_optimizer(groups: Iterable[ParamGroup], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over ``groups``; its rates are set by ``set_step_values`` before every step."""
    return torch.optim.AdamW(
        [{"params": group.params, "multipliers": group.multipliers} for group in groups],
        lr=0.0,
        betas=config.betas,
        fused=True,
    )


def set_step_values(optimizer: torch.optim.AdamW, values: StepValues) -> None:
    """Set learning rate and weight decay of every group to those of one step."""
    for group in optimizer.param_groups:
        mult: Multipliers = group["multipliers"]
        lr = values.last_layer_lr if mult.is_last_layer else values.lr
        group["lr"] = lr * mult.lr * (values.backbone_scale if mult.is_backbone else 1.0)
        group["weight_decay"] = values.weight_decay * mult.weight_decay

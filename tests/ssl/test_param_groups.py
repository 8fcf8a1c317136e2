"""Parameter groups against a table written by hand from the rules of DINOv2."""

import pytest
import torch

from tapct_fast.config import HeadConfig, HeadsConfig, HuConfig, OptimConfig, VitConfig
from tapct_fast.ssl.method import Networks
from tapct_fast.ssl.param_groups import (
    build_optimizer,
    multipliers,
    param_groups,
    set_step_values,
)
from tapct_fast.ssl.schedules import StepValues

DEPTH = 3
CONFIG = OptimConfig(layer_decay=0.5, patch_embed_lr_scale=0.2)


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay", "is_last_layer"),
    [
        ("backbone.cls_token", 0.5**4, 1, False),
        ("backbone.pos_embed", 0.5**4, 1, False),
        ("backbone.register_tokens", 0.5**4, 1, False),
        ("backbone.mask_token", 0.5**4, 1, False),
        ("backbone.patch_embed.proj.weight", 0.2 * 0.5**4, 1, False),
        ("backbone.patch_embed.proj.bias", 0.2 * 0.5**4, 0, False),
        ("backbone.blocks.0.attn.qkv.weight", 0.5**3, 1, False),
        ("backbone.blocks.2.mlp.fc1.weight", 0.5, 1, False),
        ("backbone.blocks.2.mlp.fc1.bias", 0.5, 0, False),
        ("backbone.blocks.2.norm1.weight", 0.5, 0, False),
        ("backbone.blocks.2.ls1.gamma", 0.5, 0, False),
        ("backbone.norm.weight", 1, 0, False),
        ("dino_head.mlp.0.weight", 1, 1, False),
        ("dino_head.mlp.0.bias", 1, 0, False),
        ("dino_head.last_layer.weight_g", 1, 1, True),
        ("ibot_head.last_layer.weight_v", 1, 1, True),
    ],
)
def test_multipliers_follow_the_table(
    name: str, lr: float, weight_decay: float, is_last_layer: bool
) -> None:
    got = multipliers(name, depth=DEPTH, config=CONFIG)
    expected = (lr, weight_decay, is_last_layer, name.startswith("backbone."))
    assert got == pytest.approx(expected)


def student() -> Networks:
    head = HeadConfig(num_prototypes=8, bottleneck_dim=4, hidden_dim=8)
    vit = VitConfig(dim=64, depth=DEPTH, image_zyx=(4, 8, 8))
    return Networks(vit, HeadsConfig(dino=head, ibot=head), HuConfig())


def test_every_parameter_is_in_exactly_one_group_and_groups_are_fused() -> None:
    networks = student()
    groups = param_groups(networks, depth=DEPTH, config=CONFIG)
    ids = [id(p) for group in groups for p in group.params]
    assert sorted(ids) == sorted(id(p) for p in networks.parameters())
    assert len({group.multipliers for group in groups}) == len(groups)


def test_a_frozen_last_layer_keeps_its_weights_but_gathers_moments() -> None:
    networks = student()
    networks.init_weights(0)
    optimizer = build_optimizer(param_groups(networks, depth=DEPTH, config=CONFIG), CONFIG)
    frozen, moving = networks.dino_head.last_layer.weight_v, networks.dino_head.mlp[0].weight
    before = frozen.detach().clone(), moving.detach().clone()
    for parameter in networks.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_step_values(optimizer, StepValues(0.1, 0.0, 0.3, 0.99, 0.04))
    optimizer.step()
    assert torch.equal(frozen, before[0])
    assert optimizer.state[frozen]["exp_avg"].abs().sum() > 0
    # First AdamW step with gradient 1: w (1 - lr wd) - lr.
    torch.testing.assert_close(moving.detach(), before[1] * (1 - 0.1 * 0.3) - 0.1)
    set_step_values(optimizer, StepValues(0.1, 0.1, 0.3, 0.99, 0.04, backbone_scale=0.0))
    backbone = {name: p.detach().clone() for name, p in networks.backbone.named_parameters()}
    before = moving.detach().clone()
    optimizer.step()
    assert all(torch.equal(p, backbone[name]) for name, p in networks.backbone.named_parameters())
    assert not torch.equal(moving, before)
    set_step_values(optimizer, StepValues(0.1, 0.0, 0.3, 0.99, 0.04))
    rates = {group["multipliers"]: group["lr"] for group in optimizer.param_groups}
    assert rates[multipliers("backbone.blocks.0.mlp.fc1.bias", depth=3, config=CONFIG)] == 0.1 / 8

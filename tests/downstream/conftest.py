"""Two small backbones: one whose tokens are random, one whose tokens depend on their patch only."""

import pytest
import torch

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import VitConfig
from tapct_fast.model.vit import Vit


def _vit() -> Vit:
    config = VitConfig(
        dim=64, depth=2, image_zyx=(12, 64, 64), num_registers=1, layer_scale=1.0, drop_path=0.0
    )
    vit = Vit(config)
    vit.init_weights(0)
    return vit.eval().requires_grad_(False)


@pytest.fixture
def backbone() -> Backbone:
    """A random network whose tokens see each other and their positions."""
    vit = _vit()
    vit.pos_embed.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return Backbone(vit, Preprocess(resize_yx=(64, 64)))


@pytest.fixture
def local_backbone() -> Backbone:
    """A network whose patch tokens depend on the content of their own patch and on nothing else."""
    vit = _vit()
    vit.pos_embed.zero_()
    for block in vit.blocks:
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    return Backbone(vit, Preprocess(resize_yx=None))

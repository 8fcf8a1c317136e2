"""Complete training runs, as functions; a study is a short function that replaces a few settings.

Source of the large recipes: DINOv2's defaults with 3DINO's learning rate, separate heads and
Sinkhorn centering (facts of the public programs; TAP-CT's own recipe is not public).
"""

import dataclasses
import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from tapct_fast.config import (
    Config,
    CropConfig,
    HeadConfig,
    HeadsConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    ViewGroupConfig,
    ViewsConfig,
    VitConfig,
    flatten,
    from_json,
    to_json,
)
from tapct_fast.errors import ConfigError


def debug() -> Config:
    """A small run that shows learning on two CPU cores in about two minutes; not a useful model.

    Views of 5 to 7.5 mm slices and 3 to 6 mm pixels, no flips (left and right are labels to tell
    apart), no change of contrast or slice thickness (so short a run learns less from more), few
    prototypes: a batch of 16 cannot fill more.
    """
    head = HeadConfig(num_prototypes=128, bottleneck_dim=64, hidden_dim=256)
    return Config(
        crops=CropConfig(extent_mm_zyx=(60.0, 360.0, 360.0)),
        views=ViewsConfig(
            global_views=ViewGroupConfig(
                num=2, size_zyx=(8, 64, 64), in_plane_scale=(0.2, 1.0), depth_scale=(0.5, 1.0)
            ),
            local_views=ViewGroupConfig(
                num=4, size_zyx=(8, 32, 32), in_plane_scale=(0.05, 0.25), depth_scale=(0.5, 1.0)
            ),
            flip_prob_zyx=(0.0, 0.0, 0.0),
            contrast_prob=0.0,
            thick_slice_prob=0.0,
        ),
        vit=VitConfig(dim=128, depth=4, image_zyx=(8, 64, 64), layer_scale=0.1, drop_path=0.0),
        heads=HeadsConfig(dino=head, ibot=head),
        optim=OptimConfig(layer_decay=1.0, patch_embed_lr_scale=1.0),
        schedule=ScheduleConfig(
            base_lr=8e-3,
            warmup_steps=20,
            weight_decay=(0.04, 0.04),
            momentum=(0.95, 0.99),
            teacher_temp=(0.03, 0.04),
            teacher_temp_warmup_steps=30,
            freeze_last_layer_steps=5,
        ),
        train=TrainConfig(num_steps=180, batch_size=16, checkpoint_every=60, log_every=1),
    )


def vit_s() -> Config:
    """ViT-S/4x8x8 on 12x224x224 views, DINOv2's 100 epochs of 1250 steps; for one large GPU."""
    return Config(vit=VitConfig(dim=384), train=TrainConfig(batch_size=64))


def vit_b() -> Config:
    """ViT-B/4x8x8 on 12x224x224 views; 64 samples in two micro-batches."""
    return Config(vit=VitConfig(dim=768), train=TrainConfig(batch_size=64, accumulate=2))


RECIPES = {"debug": debug, "vit-s": vit_s, "vit-b": vit_b}


def recipe(name: str) -> Config:
    """Return the recipe called ``name``.

    Raises:
        ConfigError: There is no such recipe; the message lists those that exist.
    """
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; recipes: {', '.join(RECIPES)}")
    return RECIPES[name]()


def settings(config: Config) -> dict[str, Any]:
    """Flatten the tree to dotted names and values, in reading order."""
    return flatten(dataclasses.asdict(config))


def override(config: Config, values: Mapping[str, str]) -> Config:
    """Replace settings by dotted name; values are JSON, bare words are strings, ``a,b`` is a list.

    Raises:
        ConfigError: A name is unknown (the nearest one is named), or a value is of the wrong type
            or out of range.
    """
    tree = json.loads(to_json(config))
    for name, text in values.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node:
            near = get_close_matches(name, settings(config), n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown setting {name}; nearest is {near}")
        node[leaf] = _value(text, is_list=isinstance(node[leaf], list))
    return from_json(Config, json.dumps(tree))


def _value(text: str, *, is_list: bool) -> Any:
    if is_list:
        return [_value(part, is_list=False) for part in text.strip("[]()").split(",")]
    try:
        return json.loads({"none": "null", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text

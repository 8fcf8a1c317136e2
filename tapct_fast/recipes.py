"""Complete training runs, as functions; a study is a short function that replaces a few settings.

Source of the large recipes: DINOv2's defaults with 3DINO's learning rate, separate heads and
Sinkhorn centering (facts of the public programs; TAP-CT's own recipe is not public). Stages change
a recipe for a run that starts from other weights. No number here was tuned at scale.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from tapct_fast.config import (
    Config,
    CropConfig,
    GramConfig,
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
from tapct_fast.ssl.schedules import LR_BATCH

# Samples: micro-batches of ``fit_to`` are multiples of it.
GROUP_SIZE = 8
EPOCH = 1250  # steps; DINOv2's official epoch


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
        train=TrainConfig(
            num_steps=180, batch_size=16, group_size=16, checkpoint_every=60, log_every=1
        ),
    )


def vit_s() -> Config:
    """ViT-S/4x8x8 on 12x224x224 views, DINOv2's 100 epochs of 1250 steps; for one large GPU."""
    return Config(vit=VitConfig(dim=384), train=TrainConfig(batch_size=64))


def vit_b() -> Config:
    """ViT-B/4x8x8 on 12x224x224 views; 64 samples in two micro-batches."""
    return Config(vit=VitConfig(dim=768), train=TrainConfig(batch_size=64, accumulate=2))


def continued(config: Config) -> Config:
    """Continue from the weights of a backbone: ``train --start``, whose heads are new.

    A fifth of the steps at a tenth of the learning rate. For a twentieth of them the backbone
    stands still, so that gradients of untrained heads do not reach it. The teacher moves slowly.
    """
    steps = _shortened(config, share=0.2)
    low, high = steps.schedule.momentum
    schedule = replace(
        steps.schedule,
        base_lr=steps.schedule.base_lr / 10,
        freeze_backbone_steps=steps.train.num_steps // 20,
        momentum=(max(low, min(0.998, high)), high),
    )
    return replace(steps, schedule=schedule)


def high_res(config: Config) -> Config:
    """Finish a run on views of 12/7 the in-plane size, 384 for 224: ``train --start RUN``.

    A tenth of the steps (3DINO's 12,500 of 125,000), the learning rate a constant twentieth, the
    other schedules at their last values, the teacher's momentum 0.999 and Gram anchoring of weight
    1.5 to the teacher of the start (DINOv3). Views have three times the tokens, so four times the
    micro-batches, as far as the batch divides.
    """

    def size(zyx: tuple[int, int, int]) -> tuple[int, int, int]:
        _, py, px = config.vit.patch_zyx
        z, y, x = zyx
        return z, max(y * 12 // (7 * py), 1) * py, max(x * 12 // (7 * px), 1) * px

    views = config.views
    views = replace(
        views,
        global_views=replace(views.global_views, size_zyx=size(views.global_views.size_zyx)),
        local_views=replace(views.local_views, size_zyx=size(views.local_views.size_zyx)),
    )
    steps = _shortened(config, share=0.1)
    old, base_lr = steps.schedule, steps.schedule.base_lr / 20
    schedule = replace(
        old,
        base_lr=base_lr,
        min_lr=base_lr * math.sqrt(config.train.batch_size / LR_BATCH),  # the same: constant
        weight_decay=(old.weight_decay[1],) * 2,
        momentum=(0.999, 0.999),
        teacher_temp=(old.teacher_temp[1],) * 2,
        teacher_temp_warmup_steps=0,
        freeze_last_layer_steps=0,
    )
    num_groups = config.train.batch_size // config.train.group_size
    accumulate = math.gcd(num_groups, config.train.accumulate * 4)
    return replace(
        steps,
        views=views,
        vit=replace(config.vit, image_zyx=size(config.vit.image_zyx)),
        gram=GramConfig(weight=1.5, max_refreshes=0),
        schedule=schedule,
        train=replace(steps.train, accumulate=max(accumulate, config.train.accumulate)),
    )


def anchored(config: Config) -> Config:
    """Anchor the last fifth of a run to the teacher at its begin, refreshed three times (DINOv3).

    DINOv3 does this after a million steps, when patch features have begun to decay.
    """
    num_steps = config.train.num_steps
    start = num_steps - num_steps // 5
    refresh_every = max((num_steps - start) // 4, 1)
    return replace(config, gram=GramConfig(start_step=start, refresh_every=refresh_every))


def distilled(config: Config) -> Config:
    """Learn from a larger run: ``train --distill RUN``. No drop path, every view has iBOT tokens.

    Source: DINOv2, arXiv:2304.07193 section 5; the student sees its views unmasked.
    """
    return replace(
        config, vit=replace(config.vit, drop_path=0.0), masks=replace(config.masks, prob=1.0)
    )


def _shortened(config: Config, *, share: float) -> Config:
    """Scale the length of a run, and with it every other number of steps."""
    return _with_steps(config, max(round(config.train.num_steps * share), 1))


def _with_steps(config: Config, num_steps: int) -> Config:
    share = num_steps / config.train.num_steps
    schedule = config.schedule
    names = ("warmup_steps", "teacher_temp_warmup_steps", "freeze_last_layer_steps")
    steps = {name: round(getattr(schedule, name) * share) for name in names}
    return replace(
        config,
        schedule=replace(schedule, **steps),
        train=replace(config.train, num_steps=num_steps),
    )


class Fit(NamedTuple):
    """What a run is fitted to."""

    num_gpus: int
    num_scans: int
    gpu_memory_gib: float | None = None  # of each GPU; None is 80


def fit_to(config: Config, fit: Fit) -> Config:
    """Fit length, batch and what goes with them to the GPUs and to the scans of a store.

    - samples wanted: 64 (scans / 1000) ** 0.45, in 64 .. 3072 (3DINO 512, DINOv2 up to 3072)
    - train.batch_size: GPUs times the power of two nearest to their share of that, at least 8
    - train.accumulate: so that a GPU holds the recipe's micro-batch, scaled by memory / 80 GiB
    - train.num_steps: 125,000 sqrt(scans / 100,000), from 5,000 to 125,000 (DINOv2, 3DINO)
    - warm-ups, frozen last layer: the recipe's shares of the run
    - schedule.momentum: from 0.992 ** (batch / 1024) on (DINOv2; the scaling of an EMA,
      arXiv:2307.13813), but the teacher averages at most a fiftieth of the run; never below 0.992
    - heads: 64 prototypes per sample wanted, in 4,096 .. 65,536 (DINOv2: 65,536 for 1024)
    - vit.drop_path: at most 0.1 in runs under 50,000 steps (DINO for ViT-S and ViT-B)

    The learning rate follows the batch by the square root, as ever. Exponents and bounds between
    the anchors are our own guess, untried at scale.

    Raises:
        ConfigError: There is no GPU or no scan.
    """
    num_gpus, num_scans, memory = fit
    if num_gpus < 1 or num_scans < 1:
        raise ConfigError(f"a run is fitted to GPUs and scans, not to {num_gpus} and {num_scans}")
    wanted = min(max(64 * (num_scans / 1000) ** 0.45, 64.0), 3072.0)
    per_gpu = max(2 ** round(math.log2(wanted / num_gpus)), GROUP_SIZE)
    micro = config.train.batch_size / config.train.accumulate * (memory or 80) / 80
    # 5 %: an 80 GB card reports 79 GiB.
    fits = max(2 ** math.floor(math.log2(micro * 1.05)), GROUP_SIZE)
    batch_size = num_gpus * per_gpu

    num_epochs = round(100 * min(math.sqrt(num_scans / 100_000), 1.0))
    fitted = _with_steps(config, EPOCH * max(num_epochs, 4))
    num_steps = fitted.train.num_steps
    last = fitted.schedule.momentum[1]
    momentum = min(0.992 ** (min(batch_size, LR_BATCH) / LR_BATCH), 1 - 50 / num_steps)
    num_prototypes = min(max(2 ** round(math.log2(64 * wanted)), 4096), 65536)
    heads = fitted.heads
    return replace(
        fitted,
        vit=replace(
            fitted.vit,
            drop_path=min(fitted.vit.drop_path, 0.1 if num_steps < 50_000 else 1.0),
        ),
        heads=HeadsConfig(
            dino=replace(heads.dino, num_prototypes=num_prototypes),
            ibot=None if heads.ibot is None else replace(heads.ibot, num_prototypes=num_prototypes),
        ),
        schedule=replace(fitted.schedule, momentum=(min(max(momentum, 0.992), last), last)),
        train=replace(
            fitted.train,
            batch_size=batch_size,
            group_size=GROUP_SIZE,
            accumulate=max(per_gpu // fits, 1),
        ),
    )


RECIPES = {"debug": debug, "vit-s": vit_s, "vit-b": vit_b}
STAGES: dict[str, Callable[[Config], Config]] = {
    "continue": continued,
    "high-res": high_res,
    "gram": anchored,
    "distill": distilled,
}


def recipe(name: str, *, fit: Fit | None = None) -> Config:
    """Return the recipe called ``name``, with stages behind a plus: ``vit-b+continue``.

    Args:
        name: A recipe and any stages, applied in order.
        fit: What the recipe is fitted to, before its stages.

    Raises:
        ConfigError: There is no such recipe or stage; the message lists those that exist.
    """
    base, *stages = name.split("+")
    if base not in RECIPES:
        raise ConfigError(f"no recipe {base!r}; recipes: {', '.join(RECIPES)}")
    config = RECIPES[base]()
    if fit is not None:
        config = fit_to(config, fit)
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"no stage {stage!r} of a recipe; stages: {', '.join(STAGES)}")
        config = STAGES[stage](config)
    return config


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
        # Of a setting that is a word, "none" is a word.
        is_word = isinstance(node[leaf], str) and text == "none"
        node[leaf] = text if is_word else _value(text, is_list=isinstance(node[leaf], list))
    return from_json(Config, json.dumps(tree))


def _value(text: str, *, is_list: bool) -> Any:
    if is_list:
        return [_value(part, is_list=False) for part in text.strip("[]()").split(",")]
    try:
        return json.loads({"none": "null", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text

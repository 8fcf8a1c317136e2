"""Training helps: the frozen trained backbone tells apart what HU cannot; a collapse fails here."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from tapct_fast import recipes
from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.export import export_backbone
from tapct_fast.backbone.load import load_backbone
from tapct_fast.data.phantom import HU_TWINS, LABEL_NAMES, write_phantoms
from tapct_fast.downstream.encode import embed_volume
from tapct_fast.downstream.probe import Scan, linear_segmentation
from tapct_fast.io.pack import pack
from tapct_fast.io.read import read_labels, read_volume
from tapct_fast.train.loop import init_method, train

NUM_PRETRAIN, NUM_FIT, NUM_TEST = 12, 6, 6
PLANE_YX = (88, 120)  # 3 mm pixels, as the demo
NUM_RESAMPLES = 2000


def test_a_trained_backbone_beats_its_own_start_by_more_than_the_interval(tmp_path: Path) -> None:
    torch.set_num_threads(2)  # no bits are compared here
    try:
        debug = recipes.debug()
        schedule = dataclasses.replace(debug.schedule, warmup_steps=10)
        settings = dataclasses.replace(debug.train, num_steps=80, checkpoint_every=80)
        config = dataclasses.replace(debug, schedule=schedule, train=settings)
        pairs = write_phantoms(tmp_path, NUM_PRETRAIN + NUM_FIT + NUM_TEST, seed=0)
        pack([scan for scan, _ in pairs[:NUM_PRETRAIN]], tmp_path / "store")
        result = train(config, tmp_path / "store", tmp_path / "run", device="cpu")

        # KoLeo comes on top of the uniform constant: compare the two cross-entropies with theirs.
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
        last = [json.loads(row) for row in text.splitlines()][-10:]
        entropies = [row["dino_global"] + row["dino_local"] + row["ibot"] for row in last]
        assert np.mean(entropies) < result.uniform_loss - 0.2

        trained = load_backbone(export_backbone(tmp_path / "run", tmp_path / "backbone"))
        start = Backbone(init_method(config).student.backbone, trained.preprocess).eval()
        dice_SK = {}
        for name, backbone in (("trained", trained), ("untrained", start)):
            scans = [_embed(backbone, *pair) for pair in pairs[NUM_PRETRAIN:]]
            probe = linear_segmentation(
                scans[:NUM_FIT], scans[NUM_FIT:], num_classes=len(LABEL_NAMES)
            )
            dice_SK[name] = probe.dice_SK
    finally:
        torch.set_num_threads(1)
    twins = [LABEL_NAMES.index(name) for group in HU_TWINS for name in group]
    gain_S = np.nanmean((dice_SK["trained"] - dice_SK["untrained"])[:, twins], axis=1)
    draws = np.random.default_rng(0).choice(gain_S, (NUM_RESAMPLES, NUM_TEST)).mean(1)
    low, high = np.percentile(draws, (2.5, 97.5))
    assert gain_S.mean() > high - low, f"gain {gain_S.mean():.3f}, interval {low:.3f}..{high:.3f}"
    assert low > 0


def _embed(backbone: Backbone, scan: Path, labels: Path) -> Scan:
    preprocess = dataclasses.replace(backbone.preprocess, resize_yx=PLANE_YX)
    resized = Backbone(backbone.vit, preprocess, dtype=backbone.dtype).eval()
    return embed_volume(resized, read_volume(scan)), read_labels(labels)

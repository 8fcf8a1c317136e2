"""Losses of the first steps of a tiny run on views given by a formula.

A refactor keeps ``tests/golden/step_losses.json``; changing it needs the reason in the commit.
Write it anew with ``TAPCT_WRITE_GOLDEN=1``.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
from training_case import do_step, kept_rows, run_of

from tapct_fast.config import Config
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.ssl.method import Losses
from tapct_fast.ssl.schedules import step_values
from tapct_fast.train.step import MicroBatch

GOLDEN = Path(__file__).parent.parent / "golden" / "step_losses.json"
NUM_STEPS = 5
FIELDS = [name for name in Losses._fields if name != "gram"]  # there is no anchor


def waves(step: int, *shape: int) -> torch.Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(0.7 * i + step) + torch.cos(0.013 * i * (step + 1))).float().reshape(shape)


def batch_at(step: int) -> ViewBatch:
    i = torch.arange(8 * 8).reshape(8, 8)
    mask_NL = ((i * 7 + step) % 3 == 0) & (i // 8 % 2 == 0)
    count_N1 = mask_NL.sum(1, keepdim=True).clamp(min=1)
    return ViewBatch(
        waves(step, 2, 4, 8, 16, 16),
        waves(step + 100, 2, 4, 4, 8, 8),
        mask_NL,
        mask_NL.flatten().nonzero().squeeze(1),
        (1 / count_N1).expand_as(mask_NL)[mask_NL],
        4,
    )


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_losses_of_the_first_steps_are_the_golden_ones(tiny_config: Config, centering: str) -> None:
    losses = dataclasses.replace(tiny_config.losses, centering=centering)
    config = dataclasses.replace(tiny_config, losses=losses)
    run = run_of(config, seed=11)
    rows = []
    for step in range(NUM_STEPS):
        values = step_values(config.schedule, step, num_steps=NUM_STEPS, batch_size=256)
        views = batch_at(step)
        metrics = do_step(run, [MicroBatch(views, kept_rows(config, views, step))], values)
        rows.append([metrics.losses[name] for name in FIELDS])
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("TAPCT_WRITE_GOLDEN") == "1":
        stored |= {"fields": FIELDS, centering: rows}
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
    # 1e-4: five steps of float32 with sums in another order (thread count, instruction set).
    torch.testing.assert_close(
        torch.tensor(rows), torch.tensor(stored[centering]), rtol=1e-4, atol=1e-6
    )

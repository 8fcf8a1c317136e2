"""Schedules against arrays built as the DINOv2 paper's program builds them, with numpy."""

import math

import numpy as np
import pytest

from tapct_fast.config import ScheduleConfig
from tapct_fast.ssl.schedules import step_values


def cosine_array(base: float, final: float, total: int, warmup: int = 0) -> np.ndarray:
    ramp = np.linspace(0.0, base, warmup)
    i = np.arange(total - warmup)
    return np.concatenate([ramp, final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))])


@pytest.mark.parametrize(("total", "warmup"), [(40, 10), (40, 1), (7, 0)])
def test_every_step_equals_the_array_form(total: int, warmup: int) -> None:
    config = ScheduleConfig(
        base_lr=4e-3,
        min_lr=1e-6,
        warmup_steps=warmup,
        teacher_temp_warmup_steps=5,
        freeze_last_layer_steps=3,
    )
    got = [step_values(config, step, num_steps=total, batch_size=256) for step in range(total)]
    lr = cosine_array(4e-3 * math.sqrt(256 / 1024), 1e-6, total, warmup)
    np.testing.assert_allclose([v.lr for v in got], lr, rtol=1e-12)
    lr[:3] = 0.0
    np.testing.assert_allclose([v.last_layer_lr for v in got], lr, rtol=1e-12)
    np.testing.assert_allclose(
        [v.weight_decay for v in got], cosine_array(0.04, 0.4, total), rtol=1e-12
    )
    np.testing.assert_allclose(
        [v.momentum for v in got], cosine_array(0.992, 1.0, total), rtol=1e-12
    )
    temps = np.concatenate([np.linspace(0.04, 0.07, 5), np.full(total, 0.07)])[:total]
    np.testing.assert_allclose([v.teacher_temp for v in got], temps, rtol=1e-12)


def test_the_final_value_is_reached_one_step_past_the_end() -> None:
    config = ScheduleConfig(warmup_steps=2)
    last = step_values(config, 9, num_steps=10, batch_size=1024)
    past = step_values(config, 10, num_steps=10, batch_size=1024)
    assert last.lr > config.min_lr
    assert past.lr == config.min_lr
    assert (past.weight_decay, past.momentum) == (0.4, 1.0)


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    config = ScheduleConfig(base_lr=1.0, warmup_steps=100)
    lrs = [step_values(config, step, num_steps=10, batch_size=1024).lr for step in range(10)]
    np.testing.assert_allclose(lrs, np.linspace(0, 1, 100)[:10], rtol=1e-12)


def test_a_frozen_backbone_stands_still_then_warms_up_as_the_run_did() -> None:
    config = ScheduleConfig(warmup_steps=5, freeze_backbone_steps=3, freeze_last_layer_steps=1)
    got = [step_values(config, step, num_steps=20, batch_size=1024) for step in range(20)]
    expected = [0.0] * 3 + list(np.linspace(0, 1, 5)) + [1.0] * 12
    np.testing.assert_allclose([v.backbone_scale for v in got], expected, rtol=1e-12)
    free = ScheduleConfig(warmup_steps=5, freeze_last_layer_steps=1)
    others = [step_values(free, step, num_steps=20, batch_size=1024) for step in range(20)]
    assert [v._replace(backbone_scale=1.0) for v in got] == others

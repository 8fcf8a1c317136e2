"""The training bench: its rivals compute what the library computes, whose FLOPs it counts."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from counted_flops import COUNTED
from torch.utils.flop_counter import FlopCounterMode

from tapct_fast.config import TrainConfig

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of bench/, which is not installed."""
    monkeypatch.syspath_prepend(REPOSITORY)
    names = ("train_rivals", "train_eager", "train_runs", "waterfall", "learning")
    return SimpleNamespace(**{name: importlib.import_module(f"bench.{name}") for name in names})


def three_steps(bench: SimpleNamespace, stepper: Any, config: Any) -> list[dict[str, float]]:
    values = bench.train_runs.VALUES._replace(lr=1e-3, last_layer_lr=1e-3, momentum=0.9)
    batches = [bench.train_runs.random_batch(config, seed, "cpu") for seed in range(3)]
    return [stepper.step([(batch, 7)], values) for batch in batches]


def assert_same_training(bench: SimpleNamespace, steppers: list[Any], config: Any) -> None:
    """Losses to 1e-6 of the total; weights to 1e-3 of how far they moved.

    AdamW divides a gradient by its own size: where a gradient is rounding alone, as of the biases
    of keys, two right implementations move such a weight in different directions.
    """
    start = torch.cat([p.detach().flatten() for p in steppers[0].student.parameters()])
    found = [three_steps(bench, stepper, config) for stepper in steppers]
    for losses in found[1:]:
        for mine, wanted in zip(losses, found[0], strict=True):
            assert mine.keys() == wanted.keys()
            for name, value in mine.items():
                assert value == pytest.approx(wanted[name], abs=1e-6 * wanted["total"]), name
    for part in ("student", "teacher"):
        weights = [
            torch.cat([p.detach().flatten() for p in getattr(stepper, part).parameters()])
            for stepper in steppers
        ]
        moved = (weights[0] - start).norm()
        assert moved > 1e-3 * start.norm()
        for other in weights[1:]:
            assert (other - weights[0]).norm() < 1e-3 * moved


@pytest.mark.parametrize("num_local", [2, 0])
def test_dinov3_the_eager_step_and_the_library_train_alike(
    bench: SimpleNamespace, num_local: int
) -> None:
    config = bench.train_runs.tiny_run()
    local = replace(config.views.local_views, num=num_local)
    config = replace(config, views=replace(config.views, local_views=local))
    state = bench.train_runs.method_of(config).state_dict()
    steppers = [
        bench.train_runs.Library(config, state, device="cpu", dtype=torch.float32),
        bench.train_rivals.Rival(config, state, bench.train_eager.EAGER),
        bench.train_rivals.Rival(config, state, bench.train_rivals.DINOV3),
    ]
    assert_same_training(bench, steppers, config)


def test_every_technique_of_the_waterfall_trains_as_dinov3_does(bench: SimpleNamespace) -> None:
    config = bench.train_runs.tiny_run()
    state = bench.train_runs.method_of(config).state_dict()
    found = bench.waterfall.techniques(torch.float32, "no")
    steppers = [bench.train_rivals.Rival(config, state, t.arrangement) for t in found]
    assert len({stepper.arrangement for stepper in steppers}) == len(steppers) == 9
    assert_same_training(bench, steppers, config)


def test_what_drop_path_skips_passes_through_and_the_rest_is_scaled_up(
    bench: SimpleNamespace,
) -> None:
    config = bench.train_runs.tiny_run()
    block = bench.train_runs.method_of(config).student.backbone.blocks[0]
    plain = bench.train_rivals.PlainBlock(block, config.vit.head_dim)
    torch.nn.init.zeros_(block.ls2.gamma)
    x = [torch.randn(6, 5, 64), torch.randn(4, 3, 64)]
    for x_BTD, out_BTD, whole_BTD, keep in zip(
        x, plain(x, 0.4), plain(x, 0.0), (3, 2), strict=True
    ):
        kept_B = (out_BTD != x_BTD).flatten(1).any(1)
        assert kept_B.sum() == keep
        scaled_BTD = x_BTD + (whole_BTD - x_BTD) * len(x_BTD) / keep
        expected_BTD = torch.where(kept_B[:, None, None], scaled_BTD, x_BTD)
        torch.testing.assert_close(out_BTD, expected_BTD)


def test_bfloat16_rounds_the_weights_of_dinov3_but_not_those_it_trains(
    bench: SimpleNamespace,
) -> None:
    config = bench.train_runs.tiny_run()
    state = bench.train_runs.method_of(config).state_dict()
    dinov3 = bench.train_rivals.DINOV3
    rival = bench.train_rivals.Rival(config, state, dinov3, dtype=torch.bfloat16)
    exact = bench.train_rivals.Rival(config, state, dinov3)
    (first, *_), (expected, *_) = (three_steps(bench, r, config) for r in (rival, exact))
    assert first["total"] == pytest.approx(expected["total"], rel=0.02)  # 8 bits
    assert {p.dtype for p in rival.computing.parameters()} == {torch.bfloat16}
    for trained, start in zip(rival.student.parameters(), exact.student.parameters(), strict=True):
        assert trained.dtype == torch.float32
        assert trained.grad is not None
        assert trained.grad.dtype == start.dtype
    weight = rival.student.backbone.blocks[0].mlp.fc1.weight
    assert not torch.equal(weight, weight.bfloat16().float())


def test_a_restart_repeats_the_same_training(bench: SimpleNamespace) -> None:
    config = bench.train_runs.tiny_run()
    state = bench.train_runs.method_of(config).state_dict()
    rival = bench.train_rivals.Rival(config, state, bench.train_rivals.DINOV3)
    library = bench.train_runs.Library(config, state, device="cpu", dtype=torch.float32)
    for stepper in (rival, library):
        first = three_steps(bench, stepper, config)
        assert three_steps(bench, stepper, config) != first
        bench.train_runs.restart(stepper, state)
        assert three_steps(bench, stepper, config) == first


def test_half_of_the_views_are_masked_and_their_tokens_weigh_one_together(
    bench: SimpleNamespace,
) -> None:
    config = replace(bench.train_runs.tiny_run(), train=TrainConfig(batch_size=6, group_size=6))
    batch = bench.train_runs.random_batch(config, 0, "cpu")
    count_N = batch.mask_NL.sum(1)
    assert (count_N > 0).sum() == 6
    assert count_N.max() == 4  # half of 8 tokens
    view_M = batch.masked_index_M // 8
    weight_N = torch.zeros(12).index_add(0, view_M, batch.masked_weight_M)
    torch.testing.assert_close(weight_N, (count_N > 0).float())


def test_a_gain_is_paired_by_seed_and_scan(bench: SimpleNamespace) -> None:
    learning = bench.learning
    points = {learning.OURS: [[0.5, 0.7], [0.2, 0.4]], learning.D: [[0.4, 0.6], [0.2, 0.2]]}
    curves = {
        name: [learning.Curve(dice_S=[np.array(dice_S)]) for dice_S in seeds]
        for name, seeds in points.items()
    }
    [found] = learning._gains(curves)
    assert found["gain"] == pytest.approx(0.1)  # of 0.1, 0.1, 0.0, 0.2
    assert 0 <= found["low"] < 0.1 < found["high"] <= 0.2


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_step_flops_are_those_that_torch_counts(bench: SimpleNamespace, drop_path: float) -> None:
    config = bench.train_runs.tiny_run()
    config = replace(config, vit=replace(config.vit, drop_path=drop_path))
    state = bench.train_runs.method_of(config).state_dict()
    library = bench.train_runs.Library(config, state, device="cpu", dtype=torch.float32)
    batch = bench.train_runs.random_batch(config, 0, "cpu")
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        library.step([(batch, 0)], bench.train_runs.VALUES)
    # Torch also counts KoLeo's products of 2 rows; ours does not.
    expected = bench.train_runs.step_flops(config)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)

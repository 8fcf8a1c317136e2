"""The rivals of the training bench: they compute what the library computes, and count its FLOPs."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of bench/, which is not installed."""
    monkeypatch.syspath_prepend(REPOSITORY)
    names = ("train_rivals", "train_eager", "train_runs")
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
        assert moved > 0.01 * start.norm()
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


def test_step_flops_are_those_that_torch_counts(bench: SimpleNamespace) -> None:
    config = bench.train_runs.tiny_run()
    state = bench.train_runs.method_of(config).state_dict()
    rival = bench.train_rivals.Rival(config, state, bench.train_rivals.DINOV3)
    batch = bench.train_runs.random_batch(config, 0, "cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        rival.step([(batch, 0)], bench.train_runs.VALUES)
    # Torch also counts the sums of the DINO loss over pairs and KoLeo's products; ours does not.
    expected = bench.train_runs.step_flops(config, batch.masked_index_M.shape[0])
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)

"""KoLeo against a double loop in float64, and inputs that make it infinite if written naively."""

import math

import numpy as np
import pytest
import torch

from tapct_fast.ssl.koleo import koleo_loss


@pytest.mark.parametrize("batch", [2, 7])
def test_loss_equals_the_double_loop(batch: int) -> None:
    x = np.random.default_rng(0).normal(size=(batch, 16))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = 0.0
    for i in range(batch):
        nearest = min(np.linalg.norm(unit[i] - unit[j]) for j in range(batch) if j != i)
        expected -= math.log(nearest + 1e-8) / batch
    # eps inside the distance (1e-8 per channel) moves it by at most 1e-8 sqrt(16) / distance.
    assert koleo_loss(torch.from_numpy(x)[None]).item() == pytest.approx(expected, abs=1e-6)
    assert koleo_loss(torch.from_numpy(x)[None].float()).item() == pytest.approx(expected, abs=1e-5)


def test_opposite_features_have_a_neighbour_too() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # similarity -1, the value a naive fill uses
    assert koleo_loss(x[None]).item() == pytest.approx(-math.log(2), abs=1e-6)


def test_one_sample_gives_zero_with_a_zero_gradient() -> None:
    x = torch.randn(1, 8, requires_grad=True)
    loss = koleo_loss(x[None])
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros(1, 8))


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_equal_features_give_a_finite_loss_and_gradient(value: float) -> None:
    x = torch.full((4, 8), value, requires_grad=True)
    loss = koleo_loss(x[None])
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8 * math.sqrt(8) + 1e-8), rel=1e-4)
    assert x.grad.isfinite().all()


def test_half_precision_features_are_compared_in_float32() -> None:
    x = torch.randn(6, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = koleo_loss(x[None])
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(koleo_loss(x[None].double()).item(), abs=1e-5)


def test_neighbours_are_of_the_same_group() -> None:
    x_GBD = torch.randn(3, 5, 16, dtype=torch.float64)
    expected = torch.stack([koleo_loss(group_BD[None]) for group_BD in x_GBD]).mean()
    torch.testing.assert_close(koleo_loss(x_GBD), expected)
    assert koleo_loss(x_GBD.flatten(0, 1)[None]) > koleo_loss(x_GBD)  # nearer ones among more

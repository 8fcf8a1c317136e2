"""Centering against float64 numpy written from the papers."""

import numpy as np
import pytest
import torch

from tapct_fast.ssl.centering import SoftmaxCenter, sinkhorn_knopp


def logits_np(rows: int, prototypes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, prototypes))


def sinkhorn_oracle(logits: np.ndarray, temp: float, n_iter: int) -> np.ndarray:
    """DINOv2's form: transposed, every division written out."""
    q = np.exp(logits / temp).T
    k, b = q.shape
    q /= q.sum()
    for _ in range(n_iter):
        q /= q.sum(axis=1, keepdims=True)
        q /= k
        q /= q.sum(axis=0, keepdims=True)
        q /= b
    return (q * b).T


@pytest.mark.parametrize(("rows", "prototypes", "n_iter"), [(32, 64, 3), (5, 1000, 3), (1, 7, 1)])
@pytest.mark.parametrize("temp", [0.04, 0.07])
def test_sinkhorn_equals_the_written_out_iteration(
    rows: int, prototypes: int, n_iter: int, temp: float
) -> None:
    logits = logits_np(rows, prototypes)
    expected = sinkhorn_oracle(logits, temp, n_iter)
    got = sinkhorn_knopp(torch.from_numpy(logits), temp, n_iter)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10)
    # float32: exp of numbers up to 50 turns their rounding of 6e-8 * 50 into a relative error.
    got = sinkhorn_knopp(torch.from_numpy(logits).float(), temp, n_iter)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=5e-5, atol=1e-12)


def test_sinkhorn_rows_sum_to_one_and_prototypes_are_used_equally() -> None:
    target = sinkhorn_knopp(torch.from_numpy(logits_np(64, 16)), 0.07, n_iter=50)
    torch.testing.assert_close(target.sum(1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(target.sum(0), torch.full((16,), 4.0, dtype=torch.float64))


def test_sinkhorn_stays_finite_where_exp_of_the_logits_overflows() -> None:
    logits = logits_np(8, 16) + 40.0  # exp(40 / 0.04) is not a float64 either
    got = sinkhorn_knopp(torch.from_numpy(logits).float(), 0.04)
    expected = sinkhorn_oracle(logits - 40.0, 0.04, 3)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3)  # 40 has float32 steps of 4e-6


def test_sinkhorn_leaves_its_input_alone() -> None:
    logits = torch.from_numpy(logits_np(4, 8)).float()
    before = logits.clone()
    sinkhorn_knopp(logits, 0.05)
    assert torch.equal(logits, before)


def test_softmax_center_lags_one_call_and_moves_by_a_tenth() -> None:
    center = SoftmaxCenter(6)
    c = np.zeros(6)
    for seed in range(3):
        logits = logits_np(10, 6, seed)
        shifted = (logits - c) / 0.05
        expected = np.exp(shifted - shifted.max(1, keepdims=True))
        expected /= expected.sum(1, keepdims=True)
        got = center(torch.from_numpy(logits).float(), 0.05)
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=1e-12)
        c = 0.9 * c + 0.1 * logits.mean(axis=0)
        np.testing.assert_allclose(center.center_P.numpy(), c, rtol=1e-5, atol=1e-7)

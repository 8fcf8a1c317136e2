"""The moving center against float64 numpy written from the paper."""

import numpy as np
import torch

from tapct_fast.ssl.centering import SoftmaxCenter


def test_softmax_center_lags_one_call_and_moves_by_a_tenth() -> None:
    center = SoftmaxCenter(6)
    c = np.zeros(6)
    for seed in range(3):
        logits = np.random.default_rng(seed).uniform(-1, 1, (10, 6))
        shifted = (logits - c) / 0.05
        expected = np.exp(shifted - shifted.max(1, keepdims=True))
        expected /= expected.sum(1, keepdims=True)
        got = center(torch.from_numpy(logits).float(), 0.05).dense()
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=1e-12)
        center.move(torch.from_numpy(logits.mean(axis=0)), torch.tensor(True))
        c = 0.9 * c + 0.1 * logits.mean(axis=0)
        np.testing.assert_allclose(center.center_P.numpy(), c, rtol=1e-5, atol=1e-7)

"""The iBOT loss against a loop over views and tokens in float64."""

import math

import numpy as np
import pytest
import torch

from tapct_fast.ssl.ibot import ibot_loss
from tapct_kernels import SoftTargets


def soft_targets(target: torch.Tensor) -> SoftTargets:
    """Targets as logits of temperature 1."""
    M, P = target.shape
    return SoftTargets(
        target.log(), None, target.new_zeros(P), target.new_zeros(M), target.new_ones(())
    )


def test_loss_equals_the_mean_over_views_of_the_mean_over_masked_tokens() -> None:
    rng = np.random.default_rng(0)
    counts, P = [0, 3, 0, 5], 20  # masked tokens of four global views
    target = rng.exponential(size=(8, P))
    target /= target.sum(-1, keepdims=True)
    features, prototypes = rng.normal(size=(8, 6)), rng.normal(size=(P, 6))
    logits = features @ prototypes.T
    expected, m = 0.0, 0
    for count in counts:
        for _ in range(count):
            x = logits[m] / 0.1
            ce = -sum(target[m, p] * (x[p] - np.log(np.exp(x).sum())) for p in range(P))
            expected += ce / count / len(counts)
            m += 1
    weight = np.concatenate([np.full(c, 1 / c) for c in counts if c])
    target, *args = (torch.from_numpy(a) for a in (target, features, prototypes, weight))
    got = ibot_loss(soft_targets(target), *args, num_views=4, student_temp=0.1)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_a_uniform_student_with_half_of_the_views_masked_gives_half_of_ln_prototypes() -> None:
    targets = soft_targets(torch.softmax(torch.randn(12, 65536), dim=-1))
    features_MK, prototypes_PK = torch.randn(12, 4), torch.zeros(65536, 4)
    weight = torch.tensor([1 / 4] * 4 + [1 / 8] * 8)  # two masked views of four
    got = ibot_loss(targets, features_MK, prototypes_PK, weight, num_views=4, student_temp=0.1)
    assert got.item() == pytest.approx(0.5 * math.log(65536), rel=1e-5)

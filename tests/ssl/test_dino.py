"""The DINO loss against the sum over pairs of views, written out in float64."""

import math

import numpy as np
import pytest
import torch

from tapct_fast.ssl.dino import dino_loss
from tapct_kernels import SoftTargets


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def targets_np(rng: np.random.Generator, *shape: int) -> np.ndarray:
    t = rng.exponential(size=shape)
    return t / t.sum(-1, keepdims=True)


def soft_targets(target_VBP: torch.Tensor) -> SoftTargets:
    """Targets as logits of temperature 1."""
    target_NP = target_VBP.flatten(0, 1)
    N, P = target_NP.shape
    zeros_N, zeros_P = target_NP.new_zeros(N), target_NP.new_zeros(P)
    return SoftTargets(target_NP.log(), None, zeros_P, zeros_N, target_NP.new_ones(()))


@pytest.mark.parametrize("num_local", [8, 3, 0])
def test_loss_equals_the_mean_over_pairs_of_views(num_local: int) -> None:
    rng = np.random.default_rng(1)
    B, P, K = 3, 40, 6
    target = targets_np(rng, 2, B, P)
    features, prototypes = rng.normal(size=(2 + num_local, B, K)), rng.normal(size=(P, K))
    logp = log_softmax(features @ prototypes.T / 0.1)
    pairs = 2 + 2 * num_local
    global_part = local_part = 0.0
    for t in range(2):
        for v in range(2 + num_local):
            ce = -(target[t] * logp[v]).sum(-1).mean() / pairs
            if v >= 2:
                local_part += ce
            elif v != t:
                global_part += ce
    args = [torch.from_numpy(a) for a in (target, features, prototypes)]
    got = dino_loss(soft_targets(args[0]), *args[1:], student_temp=0.1)
    assert got.global_views.item() == pytest.approx(global_part, rel=1e-12)
    assert got.local_views.item() == pytest.approx(local_part, rel=1e-12, abs=1e-15)
    args = [a.float() for a in args]
    got = dino_loss(soft_targets(args[0]), *args[1:], student_temp=0.1)
    assert got.global_views.dtype == torch.float32
    assert got.global_views.item() == pytest.approx(global_part, rel=1e-6)


def test_a_view_does_not_meet_its_own_targets() -> None:
    # View 0 asks for prototype 0, view 1 for prototype 1, and each says the other's.
    targets = soft_targets(torch.eye(2).reshape(2, 1, 2))
    features = torch.tensor([[0.0, 5.0], [5.0, 0.0]]).reshape(2, 1, 2)
    prototypes = torch.eye(2)
    assert dino_loss(targets, features, prototypes, student_temp=0.1).global_views < 1e-6
    assert dino_loss(targets, features.flip(0), prototypes, student_temp=0.1).global_views > 10


@pytest.mark.parametrize("num_prototypes", [4096, 65536])
def test_a_uniform_student_gives_ln_of_the_prototypes(num_prototypes: int) -> None:
    rng = np.random.default_rng(2)
    target = torch.from_numpy(targets_np(rng, 2, 2, num_prototypes)).float()
    features, prototypes = torch.ones(10, 2, 3), torch.ones(num_prototypes, 3)
    got = dino_loss(soft_targets(target), features, prototypes, student_temp=0.1)
    ln_k = math.log(num_prototypes)
    assert got.global_views.item() == pytest.approx(ln_k * 2 / 18, rel=1e-5)
    assert got.local_views.item() == pytest.approx(ln_k * 16 / 18, rel=1e-5)


def test_gradient_is_softmax_minus_target() -> None:
    rng = np.random.default_rng(3)
    target = torch.from_numpy(targets_np(rng, 2, 2, 9))
    student = torch.from_numpy(rng.normal(size=(2, 2, 9))).requires_grad_()
    prototypes = torch.eye(9, dtype=torch.float64)  # the features are the logits
    dino_loss(soft_targets(target), student, prototypes, student_temp=0.1).global_views.backward()
    probability = np.exp(log_softmax(student.detach().numpy() / 0.1))
    expected = (probability - target.numpy()[::-1]) / 0.1 / (2 * 2)
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-10, atol=1e-14)

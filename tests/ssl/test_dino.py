"""The DINO loss against the sum over pairs of views, written out in float64."""

import math

import numpy as np
import pytest
import torch

from tapct_fast.ssl.dino import dino_loss


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def targets_np(rng: np.random.Generator, *shape: int) -> np.ndarray:
    t = rng.exponential(size=shape)
    return t / t.sum(-1, keepdims=True)


@pytest.mark.parametrize("num_local", [8, 3, 0])
def test_loss_equals_the_mean_over_pairs_of_views(num_local: int) -> None:
    rng = np.random.default_rng(1)
    B, P = 3, 40
    target = targets_np(rng, 2, B, P)
    student_global, student_local = (rng.normal(size=(v, B, P)) for v in (2, num_local))
    pairs = 2 + 2 * num_local
    global_part = local_part = 0.0
    for t in range(2):
        for s in range(2):
            if s != t:
                ce = -(target[t] * log_softmax(student_global[s] / 0.1)).sum(-1)
                global_part += ce.mean() / pairs
        for v in range(num_local):
            ce = -(target[t] * log_softmax(student_local[v] / 0.1)).sum(-1)
            local_part += ce.mean() / pairs
    args = [torch.from_numpy(a) for a in (target, student_global, student_local)]
    got = dino_loss(*args, student_temp=0.1)
    assert got.global_views.item() == pytest.approx(global_part, rel=1e-12)
    assert got.local_views.item() == pytest.approx(local_part, rel=1e-12, abs=1e-15)
    got = dino_loss(*(a.float() for a in args), student_temp=0.1)
    assert got.global_views.dtype == torch.float32
    assert got.global_views.item() == pytest.approx(global_part, rel=1e-6)


def test_a_view_does_not_meet_its_own_targets() -> None:
    target = torch.eye(2).reshape(2, 1, 2)  # view 0 asks for prototype 0, view 1 for prototype 1
    student = torch.tensor([[0.0, 5.0], [5.0, 0.0]]).reshape(2, 1, 2)  # each says the other's
    none = torch.empty(0, 1, 2)
    assert dino_loss(target, student, none, student_temp=0.1).global_views < 1e-6
    assert dino_loss(target, student.flip(0), none, student_temp=0.1).global_views > 10


@pytest.mark.parametrize("num_prototypes", [4096, 65536])
def test_a_uniform_student_gives_ln_of_the_prototypes(num_prototypes: int) -> None:
    rng = np.random.default_rng(2)
    target = torch.from_numpy(targets_np(rng, 2, 2, num_prototypes)).float()
    student_global, student_local = (torch.full((v, 2, num_prototypes), 0.3) for v in (2, 8))
    got = dino_loss(target, student_global, student_local, student_temp=0.1)
    ln_k = math.log(num_prototypes)
    assert got.global_views.item() == pytest.approx(ln_k * 2 / 18, rel=1e-5)
    assert got.local_views.item() == pytest.approx(ln_k * 16 / 18, rel=1e-5)


def test_gradient_is_softmax_minus_target() -> None:
    rng = np.random.default_rng(3)
    target = torch.from_numpy(targets_np(rng, 2, 2, 9))
    student = torch.from_numpy(rng.normal(size=(2, 2, 9))).requires_grad_()
    none = torch.empty(0, 2, 9, dtype=torch.float64)
    dino_loss(target, student, none, student_temp=0.1).global_views.backward()
    probability = np.exp(log_softmax(student.detach().numpy() / 0.1))
    expected = (probability - target.numpy()[::-1]) / 0.1 / (2 * 2)
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-10, atol=1e-14)

"""The teacher's moving average."""

import copy

import torch
from torch import nn

from tapct_fast.ssl.ema import update_teacher


def pair() -> tuple[nn.Module, nn.Module]:
    student = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    return teacher, student


def test_every_parameter_moves_by_the_complement_of_the_momentum() -> None:
    teacher, student = pair()
    expected = [
        0.992 * t.double() + 0.008 * s.double()
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    before = [s.clone() for s in student.parameters()]
    update_teacher(teacher, student, 0.992)
    for got, want in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_a_momentum_of_one_changes_no_bit() -> None:
    teacher, student = pair()
    before = [t.clone() for t in teacher.parameters()]
    update_teacher(teacher, student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))

"""The teacher: an exponential moving average of the student's weights."""

import torch
from torch import nn


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set every teacher parameter to ``momentum * teacher + (1 - momentum) * student``, in place.

    Both modules have the same parameters in the same order. A momentum of 1 changes no bit.
    """
    torch._foreach_lerp_(
        list(teacher.parameters()), list(student.parameters()), weight=1 - momentum
    )

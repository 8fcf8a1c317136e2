"""The teacher: an exponential moving average of the student's weights."""

import torch
from torch import Tensor, nn

from tapct_fast.ssl.shards import local


@torch.no_grad()
def update_teacher(
    teacher: nn.Module, student: nn.Module, momentum: float, is_sound: Tensor | None = None
) -> None:
    """Set every teacher parameter to ``momentum * teacher + (1 - momentum) * student``, in place.

    Both modules have the same parameters in the same order. A momentum of 1 changes no bit, nor
    does an ``is_sound`` that holds False.
    """
    averages: list[Tensor] = [local(parameter) for parameter in teacher.parameters()]
    values: list[Tensor] = [local(parameter) for parameter in student.parameters()]
    if is_sound is None:
        torch._foreach_lerp_(averages, values, weight=1 - momentum)
        return
    # Chosen, not multiplied: nothing of a student that is not finite may reach the teacher.
    moved = torch._foreach_lerp(averages, values, weight=1 - momentum)
    chosen = [torch.where(is_sound, new, old) for new, old in zip(moved, averages, strict=True)]
    torch._foreach_copy_(averages, chosen)

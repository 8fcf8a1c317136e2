"""What changes over a run, as pure functions of the step.

Source: DINOv2's CosineScheduler (Apache-2.0) and the schedules of its train.py.
"""

import math
from typing import NamedTuple

from tapct_fast.config import ScheduleConfig

LR_BATCH = 1024  # samples; DINOv2 scales the learning rate by sqrt(batch / 1024)


class StepValues(NamedTuple):
    """The values of one optimizer step, before the multipliers of the parameter groups."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    backbone_scale: float = 1.0  # factor on the learning rates of the backbone


def linear(start: float, end: float, *, step: int, num_steps: int) -> float:
    """Return value ``step`` of ``num_steps`` evenly spaced ones, both ends included.

    One value is ``start``; past the last one the value stays ``end``.
    """
    if step >= num_steps:
        return end
    return start if num_steps == 1 else start + (end - start) * step / (num_steps - 1)


def cosine(base: float, final: float, *, step: int, num_steps: int, warmup_steps: int = 0) -> float:
    """Return a linear warm-up from 0 to ``base``, then half a cosine towards ``final``.

    ``final`` itself is first reached at ``step == num_steps``, one past the last step of a run.
    """
    if step < warmup_steps:
        return linear(0.0, base, step=step, num_steps=warmup_steps)
    if step >= num_steps:
        return final
    share = (step - warmup_steps) / (num_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * share))


def step_values(
    config: ScheduleConfig, step: int, *, num_steps: int, batch_size: int
) -> StepValues:
    """Return the values of step ``step``, counted from 0.

    Args:
        config: The schedules.
        step: Steps already done.
        num_steps: Steps of the whole run.
        batch_size: Samples per optimizer step; the minimum learning rate is not scaled by it.
    """
    lr = cosine(
        config.base_lr * math.sqrt(batch_size / LR_BATCH),
        config.min_lr,
        step=step,
        num_steps=num_steps,
        warmup_steps=config.warmup_steps,
    )
    return StepValues(
        lr=lr,
        # A learning rate of zero, not a cancelled gradient: Adam's moments still accumulate.
        last_layer_lr=0.0 if step < config.freeze_last_layer_steps else lr,
        weight_decay=cosine(*config.weight_decay, step=step, num_steps=num_steps),
        momentum=cosine(*config.momentum, step=step, num_steps=num_steps),
        teacher_temp=linear(
            *config.teacher_temp, step=step, num_steps=config.teacher_temp_warmup_steps
        ),
        backbone_scale=backbone_scale(config, step),
    )


def backbone_scale(config: ScheduleConfig, step: int) -> float:
    """Return 0 while the backbone is frozen, then a warm-up as long as the run's own, then 1.

    AdamW's weight decay is multiplied by the learning rate, so a frozen backbone does not decay
    either. Its moments still accumulate: those of the first steps behind untrained heads are
    forgotten within 1 / (1 - beta2) = 1000 steps, and large second moments only slow its start.
    """
    if config.freeze_backbone_steps == 0:
        return 1.0
    after = step - config.freeze_backbone_steps
    return 0.0 if after < 0 else linear(0.0, 1.0, step=after, num_steps=config.warmup_steps)

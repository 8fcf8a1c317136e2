"""What follows skipped steps: go on, go back and pass over their data, or stop.

Every choice is a function of the guard's numbers, which a checkpoint holds. So a run that is killed
between a roll-back and its next checkpoint meets the same skips, goes back to the same step and
passes over the same data: a resume stays bit-exact.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from tapct_fast.config import GuardConfig
from tapct_fast.errors import TrainError
from tapct_fast.train.checkpoint import Run, load_latest
from tapct_fast.train.guard import GuardState


def must_roll_back(in_a_row: int, config: GuardConfig) -> bool:
    """Say whether the budget of skips in a row is spent."""
    return in_a_row >= config.skip_budget


def roll_back(run: Run, directory: Path, step: int, *, notify: Callable[[str], None]) -> int:
    """Go back to the last checkpoint before a row of skips, and pass over the data since then.

    Call it on all ranks, when no save is in the air. Checkpoints of the course that is left are
    removed. The data of step index ``i`` is from now on that of ``i + passed_over``.

    Args:
        run: Its guard is in the state after ``step``; loaded in place.
        directory: The run's folder.
        step: Steps done when the budget was spent; the last of the skipped ones.
        notify: Told in one line what happens.

    Returns:
        Steps done at the checkpoint.

    Raises:
        TrainError: There is nothing to go back to, or ``guard.max_rollbacks`` is spent. The last
            checkpoint is intact.
    """
    before = GuardState(*(tensor.clone() for tensor in run.guard))
    in_a_row, rollbacks = int(before.in_a_row), int(before.rollbacks)
    budget = run.config.guard.max_rollbacks
    if rollbacks >= budget:
        raise TrainError(
            f"step {step} is the last of {in_a_row} skipped steps in a row, and the run has gone "
            f"back {rollbacks} times, as often as guard.max_rollbacks allows. Other data did not "
            "help: replay a step of incidents.jsonl, then lower schedule.base_lr or look for "
            "damaged hardware"
        )
    target = load_latest(run, directory, notify=notify, at_most=step - in_a_row)
    if target == 0:
        raise TrainError(
            f"step {step} is the last of {in_a_row} skipped steps in a row and there is no "
            "checkpoint before them to go back to: replay a step of incidents.jsonl, then lower "
            "schedule.base_lr or lengthen schedule.warmup_steps"
        )
    _carry_over(run.guard, before, num_passed=step - target)
    notify(
        f"{in_a_row} steps in a row were skipped, the last is {step}: back to step {target}, "
        f"passing over the data of {step - target} steps"
    )
    return target


@torch.no_grad()
def _carry_over(state: GuardState, before: GuardState, *, num_passed: int) -> None:
    """Keep what a roll-back must not forget: an older checkpoint knows fewer of them."""
    state.skipped.copy_(before.skipped)
    state.passed_over.copy_(before.passed_over + num_passed)
    state.rollbacks.copy_(before.rollbacks + 1)
    state.in_a_row.zero_()

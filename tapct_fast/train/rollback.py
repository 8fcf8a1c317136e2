"""What follows skipped steps: go on, go back and pass over their data, or stop.

Every choice is a function of the guard's numbers, which a checkpoint holds. So a run that is killed
between a roll-back and its next checkpoint meets the same skips, goes back to the same step and
passes over the same data: a resume stays bit-exact.
"""

from collections.abc import Callable
from pathlib import Path

from tapct_fast.config import GuardConfig
from tapct_fast.errors import TrainError
from tapct_fast.train.checkpoint import Run, load_latest
from tapct_fast.train.guard import Verdict


def must_roll_back(verdict: Verdict, config: GuardConfig) -> bool:
    """Say whether the budget of skips in a row is spent."""
    return verdict.in_a_row >= config.skip_budget


def roll_back(
    run: Run,
    directory: Path,
    step: int,
    verdict: Verdict,
    *,
    notify: Callable[[str], None],
    rank: int = 0,
) -> int:
    """Go back to the last checkpoint before a row of skips, and pass over the data since then.

    Call it when no save is in the air, on rank 0 first, then on the others. Steps that were done
    behind ``step`` are forgotten, and checkpoints of the course that is left are removed. The data
    of step index ``i`` is from now on that of ``i + passed_over``.

    Args:
        run: Loaded in place.
        directory: The run's folder.
        step: Steps done when the budget was spent; the last of the skipped ones.
        verdict: Of that step; the run itself may be further by now.
        notify: Told in one line what happens.
        rank: Only rank 0 changes files.

    Returns:
        Steps done at the checkpoint.

    Raises:
        TrainError: There is nothing to go back to, or ``guard.max_rollbacks`` is spent. The last
            checkpoint is intact.
    """
    in_a_row = verdict.in_a_row
    rollbacks, passed_over = int(run.guard.rollbacks), int(run.guard.passed_over)
    if rollbacks >= run.config.guard.max_rollbacks:
        raise TrainError(
            f"step {step} is the last of {in_a_row} skipped steps in a row, and the run has gone "
            f"back {rollbacks} times, as often as guard.max_rollbacks allows. Other data did not "
            "help: replay a step of incidents.jsonl, then begin a new run from this one (--start) "
            "with a lower schedule.base_lr, or look for damaged hardware"
        )
    target = load_latest(run, directory, notify=notify, at_most=step - in_a_row, rank=rank)
    if target == 0:
        raise TrainError(
            f"step {step} is the last of {in_a_row} skipped steps in a row and there is no "
            "checkpoint before them to go back to: replay a step of incidents.jsonl, then begin a "
            "new run with a lower schedule.base_lr or a longer schedule.warmup_steps"
        )
    # The checkpoint may be older than a roll-back before this one, and knows less.
    run.guard.skipped.fill_(verdict.skipped)
    run.guard.passed_over.fill_(passed_over + step - target)
    run.guard.rollbacks.fill_(rollbacks + 1)
    notify(
        f"{in_a_row} steps in a row were skipped, the last is {step}: back to step {target}, "
        f"passing over the data of {step - target} steps"
    )
    return target

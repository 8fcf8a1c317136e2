"""Skips in a row end in a roll-back that passes over their data, and a resume repeats it.

The engine here is the smallest one: a step's loss is a function of weights and data position, the
update is predicated on the guard's verdict as in training, checkpoints are the real ones.
"""

import dataclasses
from collections import deque
from pathlib import Path

import pytest
import torch
from training_case import assert_equal, run_of, tensors

from tapct_fast.config import Config, GuardConfig
from tapct_fast.errors import TrainError
from tapct_fast.train.checkpoint import Run, folders, load_latest, step_of
from tapct_fast.train.checkpoint_writer import CheckpointWriter
from tapct_fast.train.guard import Verdict, judge
from tapct_fast.train.rollback import must_roll_back, roll_back

NUM_STEPS = 14


class Killed(Exception):
    """The process ends here."""


@pytest.fixture
def config(tiny_config: Config) -> Config:
    settings = dataclasses.replace(tiny_config.train, num_steps=NUM_STEPS, checkpoint_every=4)
    return dataclasses.replace(tiny_config, train=settings, guard=GuardConfig(max_rollbacks=2))


@torch.no_grad()
def step_at(run: Run, position: int, *, is_bad: bool) -> float:
    """Do one predicated step on the data of a position and return its loss."""
    weight = run.method.student.backbone.norm.weight
    data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(position))
    loss = (weight * data).mean() + (torch.nan if is_bad else 0.0)
    ok, state = judge(run.guard, loss[None], torch.ones(3), run.config.guard)
    weight.copy_(torch.where(ok, weight * 0.9 + 0.1 * data, weight))
    for kept, new in zip(run.guard, state, strict=True):
        kept.copy_(new)
    return float(loss)


def train(
    run: Run, out: Path, bad: set[int], *, late: int, kill_at: int | None = None
) -> list[tuple[int, int, float]]:
    """Train as the loop does, reading verdicts ``late`` steps late.

    Returns:
        Step, position and loss of every step in order.
    """
    log = []
    step = load_latest(run, out, notify=pytest.fail)
    # The last verdict before a kill may never have been read.
    unread = deque([(step, Verdict.of(run.guard))])
    with CheckpointWriter(out, keep=3) as writer:
        while step < NUM_STEPS or unread:
            if step < NUM_STEPS:
                if len(log) == kill_at:
                    raise Killed
                position = step + int(run.guard.passed_over)
                log.append((step, position, step_at(run, position, is_bad=position in bad)))
                step += 1
                unread.append((step, Verdict.of(run.guard)))
                if step % run.config.train.checkpoint_every == 0 or step == NUM_STEPS:
                    writer.submit(run, step)
            while len(unread) > late or (unread and step == NUM_STEPS):
                done, verdict = unread.popleft()
                if must_roll_back(verdict, run.config.guard):
                    writer.wait()
                    step = roll_back(run, out, done, verdict, notify=lambda _: None)
                    unread.clear()
    return log


@pytest.mark.parametrize("late", [0, 1])
def test_the_data_since_the_checkpoint_is_passed_over_and_nothing_else(
    config: Config, tmp_path: Path, late: int
) -> None:
    run = run_of(config)
    # The checkpoint of step 8 lies within the skips.
    log = train(run, tmp_path, {6, 7, 8}, late=late)
    steps = [(step, position) for step, position, _ in log]
    assert steps == [(s, s) for s in range(9 + late)] + [(s, s + 5) for s in range(4, NUM_STEPS)]
    state = {name: int(t) for name, t in run.guard._asdict().items() if t.dtype == torch.int64}
    assert state == {
        "accepted": NUM_STEPS,
        "skipped": 3,
        "in_a_row": 0,
        "passed_over": 5,
        "rollbacks": 1,
    }
    # As a run that never saw the window.
    clean = run_of(config)
    for position in [*range(4), *range(9, NUM_STEPS + 5)]:
        step_at(clean, position, is_bad=False)
    assert_equal(dict(clean.method.state_dict()), dict(run.method.state_dict()))


@pytest.mark.parametrize("late", [0, 1])
def test_a_run_killed_anywhere_around_a_roll_back_ends_in_the_same_bits(
    config: Config, tmp_path: Path, late: int
) -> None:
    bad = {6, 7, 8, 10, 11, 12}  # the second row follows before there is a new checkpoint
    whole = run_of(config)
    log = train(whole, tmp_path / "whole", bad, late=late)
    assert int(whole.guard.rollbacks) == 2
    for kill_at in range(2, 21, 3):
        out = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            train(run_of(config), out, bad, late=late, kill_at=kill_at)
        resumed = run_of(config)
        tail = train(resumed, out, bad, late=late)
        assert_equal(tensors(resumed), tensors(whole))
        assert tail[-1] == log[-1]


def test_fewer_skips_than_the_budget_only_cost_their_steps(config: Config, tmp_path: Path) -> None:
    run = run_of(config)
    log = train(run, tmp_path, {5, 6, 9}, late=1)
    assert [(step, position) for step, position, _ in log] == [(s, s) for s in range(NUM_STEPS)]
    assert (int(run.guard.skipped), int(run.guard.rollbacks)) == (3, 0)


def test_a_refused_step_changes_no_bit_but_the_counts(config: Config) -> None:
    run = run_of(config)
    step_at(run, 0, is_bad=False)
    before = tensors(run)
    step_at(run, 1, is_bad=True)
    after = tensors(run)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"skipped", "in_a_row"}


def test_after_the_last_roll_back_the_run_stops_with_its_checkpoint(
    config: Config, tmp_path: Path
) -> None:
    run = run_of(config)
    with pytest.raises(TrainError, match=r"gone back 2 times.*guard\.max_rollbacks") as caught:
        train(run, tmp_path, set(range(6, 100)), late=1)
    assert caught.value.exit_code == 70
    with pytest.raises(TrainError, match="gone back 2 times"):  # no silent loop of requeued jobs
        train(run_of(config), tmp_path, set(range(6, 100)), late=1)
    patient = dataclasses.replace(config, guard=GuardConfig(max_rollbacks=9))
    run = run_of(patient)
    train(run, tmp_path, set(range(6, 30)), late=1)
    assert int(run.guard.rollbacks) > 2
    assert load_latest(run_of(patient), tmp_path, notify=pytest.fail) == NUM_STEPS


def test_without_a_checkpoint_before_the_skips_the_run_stops(
    config: Config, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="no checkpoint before them"):
        train(run_of(config), tmp_path, {0, 1, 2}, late=1)


def test_checkpoints_of_the_course_that_is_left_are_removed(config: Config, tmp_path: Path) -> None:
    with pytest.raises(Killed):  # right after the roll-back from step 9 to step 4
        train(run_of(config), tmp_path, {6, 7, 8}, late=0, kill_at=9)
    assert [step_of(folder) for folder in folders(tmp_path)] == [4]

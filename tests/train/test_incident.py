"""A refused step is kept so that it can be done again: what is written, and what replay finds."""

import dataclasses
import json
import math
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training_case import stepped_run

from tapct_fast.cli import main
from tapct_fast.config import Config, GramConfig, GuardConfig
from tapct_fast.data.pipeline import ViewBatch, ViewPipeline
from tapct_fast.data.samples import Sample, Samples
from tapct_fast.errors import CheckpointError, InputError, StoreError, TrainError
from tapct_fast.io.store import Store
from tapct_fast.ssl.method import DinoMethod
from tapct_fast.train.checkpoint import folders, step_of
from tapct_fast.train.checkpoint_writer import save
from tapct_fast.train.guard import RefusedError
from tapct_fast.train.incident import (
    INCIDENTS,
    capture,
    incident_file,
    read_incident,
    read_rollbacks,
    replayed_from,
)
from tapct_fast.train.loop import drop_seed, train
from tapct_fast.train.replay import replay

Loaded = Sequence[tuple[Sample, NDArray[np.int16]]]
Made = tuple[ViewBatch, torch.cuda.Event | None]
BAD_STEP = 5  # counted from 1


def poison(patch: pytest.MonkeyPatch, positions: Collection[int]) -> None:
    """Let one voxel of one view be NaN in the data of some steps, whenever it is made."""
    make = ViewPipeline._batch

    def poisoned(self: ViewPipeline, step: int, micro: int, loaded: Loaded) -> Made:
        batch, event = make(self, step, micro, loaded)
        if step + 1 in positions and micro == 1:
            batch.global_VBZYX[0, 0, 0, 0, 0] = torch.nan
        return batch, event

    patch.setattr(ViewPipeline, "_batch", poisoned)


def fail_at(patch: pytest.MonkeyPatch, position: int) -> None:
    make = ViewPipeline._batch

    def failing(self: ViewPipeline, step: int, micro: int, loaded: Loaded) -> Made:
        if step + 1 == position:
            raise StoreError("the disk went away")
        return make(self, step, micro, loaded)

    patch.setattr(ViewPipeline, "_batch", failing)


@pytest.fixture(scope="module")
def refused(
    tiny_config: Config, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that met the bad step twice: the second time it was resumed."""
    out = tmp_path_factory.mktemp("refused")
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {BAD_STEP})
        with pytest.MonkeyPatch.context() as inner:
            fail_at(inner, BAD_STEP + 1)
            with pytest.raises(StoreError, match="the disk went away"):
                train(tiny_config, tiny_store, out)
        assert (out / "incidents" / "step-00000005.json").exists()
        train(tiny_config, tiny_store, out)
    return out


def test_a_refused_step_is_written_once_with_all_that_its_replay_needs_and_no_voxel(
    refused: Path, tiny_config: Config, tiny_store: Path
) -> None:
    (row,) = map(json.loads, (refused / INCIDENTS).read_text().splitlines())
    assert row["kind"] == "skip"
    assert row["step"] == BAD_STEP
    assert row["checkpoint"] == "step-00000003"
    assert "the views hold NaN" in row["cause"]
    path = refused / "incidents" / "step-00000005.json"
    content = json.loads(path.read_text())
    first = (BAD_STEP - 1) * tiny_config.train.batch_size
    assert content["samples"] == [first, first + 1, first + 2, first + 3]
    samples = Samples(Store.open(tiny_store), tiny_config)
    assert content["cases"] == [samples.draw(i).record.case for i in content["samples"]]
    assert content["seed"] == tiny_config.train.seed
    assert content["drop_path_seeds"] == [
        drop_seed(tiny_config, BAD_STEP - 1, group, kind) for group in (0, 1) for kind in (0, 1)
    ]
    assert content["losses"]["total"] == "nan"  # JSON has no NaN
    assert set(content["grad_norms"]) == {"backbone", "dino_head", "ibot_head"}
    assert content["environment"]["torch"] == torch.__version__
    assert path.stat().st_size < 4000
    assert {p.name for p in (refused / "incidents").iterdir()} == {path.name}
    found = read_incident(refused, BAD_STEP)
    assert found is not None
    assert math.isnan(found["losses"]["total"])
    assert read_incident(refused, 4) is None


def test_a_step_from_the_metrics_is_replayed_bit_for_bit(
    refused: Path,
    tiny_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, {BAD_STEP})
    before = {p: p.stat().st_mtime_ns for p in refused.rglob("*")}
    # From the start, from the checkpoint of step 3, and from there past the refused step.
    for step in (2, 4, 6):
        words = ["replay", str(refused), str(tiny_store), "--step", str(step), "--device", "cpu"]
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert "recorded and replayed numbers are equal, bit for bit" in printed
        assert "first module not finite: none" in printed
        assert "the step is sound now" in printed
    assert {p: p.stat().st_mtime_ns for p in refused.rglob("*")} == before


def test_replay_without_the_fault_says_that_the_step_is_sound(
    refused: Path, tiny_store: Path
) -> None:
    found = replay(refused, tiny_store, BAD_STEP, device="cpu", notify=pytest.fail)
    assert found.start == 3
    assert found.cause == found.first_module == found.first_gradient == ""
    assert all(math.isfinite(value) for value in found.now.losses.values())
    assert found.recorded is not None
    assert math.isnan(found.recorded.losses["total"])


def test_replay_with_the_fault_names_the_first_module_and_what_came_in(
    refused: Path,
    tiny_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, {BAD_STEP})
    words = ["replay", str(refused), str(tiny_store), "--step", "5", "--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "recorded and replayed numbers are equal, bit for bit" in printed
    assert (
        "first module not finite: teacher.backbone.patch_embed (what came in was not finite)"
        in printed
    )
    assert "the views hold NaN" in printed


@pytest.mark.parametrize(
    ("name", "calls_per_step", "is_backward"),
    [("student.backbone.blocks.1.mlp", 4, False), ("student.ibot_head.mlp.4", 2, True)],
)
def test_replay_names_the_module_or_the_parameter_that_breaks(
    refused: Path,
    tiny_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    calls_per_step: int,
    is_backward: bool,
) -> None:
    build = DinoMethod.__init__

    def break_one(method: DinoMethod, *args: object, **kwargs: object) -> None:
        build(method, *args, **kwargs)
        module = method.get_submodule(name)
        calls: list[int] = []

        def spoil(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) <= calls_per_step:  # of the step before the one that is replayed
                return output
            if is_backward:
                output.register_hook(lambda grad: grad * torch.inf)
                return output
            return output * torch.inf

        module.register_forward_hook(spoil)

    monkeypatch.setattr(DinoMethod, "__init__", break_one)
    found = replay(refused, tiny_store, BAD_STEP, device="cpu", notify=pytest.fail)
    assert "not finite" in found.cause
    if is_backward:
        assert found.first_module == ""
        assert found.first_gradient.startswith(name)
    else:
        assert found.first_module == name


@pytest.fixture(scope="module")
def rolled_back(
    tiny_config: Config, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with two spikes in a row, one where a checkpoint was due, and a lone one behind."""
    out = tmp_path_factory.mktemp("rolled")
    settings = dataclasses.replace(
        tiny_config.train, num_steps=12, checkpoint_every=2, keep_checkpoints=9
    )
    guard = GuardConfig(warmup_steps=2, skip_budget=2)
    with pytest.MonkeyPatch.context() as patch:
        inflate(patch, {6, 7, 13})
        train(dataclasses.replace(tiny_config, train=settings, guard=guard), tiny_store, out)
    return out


def inflate(patch: pytest.MonkeyPatch, positions: Collection[int]) -> None:
    """Let masked tokens count a million times in the data of some steps: a spike, yet finite."""
    make = ViewPipeline._batch

    def inflated(self: ViewPipeline, step: int, micro: int, loaded: Loaded) -> Made:
        batch, event = make(self, step, micro, loaded)
        if step + 1 in positions:
            batch.masked_weight_M.mul_(1e6)
        return batch, event

    patch.setattr(ViewPipeline, "_batch", inflated)


def test_the_list_of_a_run_tells_its_skips_and_its_roll_backs(rolled_back: Path) -> None:
    found = [json.loads(row) for row in (rolled_back / INCIDENTS).read_text().splitlines()]
    told = [(r["kind"], r["step"], r["passed_over"], r["checkpoint"]) for r in found]
    assert told == [
        ("skip", 6, 0, "step-00000004"),
        ("skip", 7, 0, "step-00000004"),
        ("roll back", 7, 3, "step-00000004"),
        ("skip", 10, 3, "step-00000008"),
    ]


@pytest.mark.parametrize(
    ("step", "start", "is_refused"),
    [
        (4, 2, False),
        (5, 4, False),  # its checkpoint was written before the roll-back
        (6, 4, True),
        (7, 4, True),
        (8, 6, False),
        (10, 8, True),
        (11, 8, False),  # no checkpoint is written behind a refused step
        (12, 8, False),
    ],
)
def test_steps_before_and_behind_a_roll_back_are_replayed_bit_for_bit(
    rolled_back: Path,
    tiny_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    start: int,
    is_refused: bool,
) -> None:
    inflate(monkeypatch, {6, 7, 13})
    words = ["replay", str(rolled_back), str(tiny_store), "--step", str(step), "--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"step {step}, replayed from the checkpoint of step {start}" in printed
    assert "recorded and replayed numbers are equal, bit for bit" in printed
    assert ("a spike" in printed) == is_refused


def test_a_run_that_goes_on_with_wider_limits_forgets_the_roll_backs_it_does_not_repeat(
    tiny_config: Config, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = GuardConfig(warmup_steps=2, skip_budget=1, max_rollbacks=1)
    config = dataclasses.replace(tiny_config, guard=guard)
    inflate(monkeypatch, {5, 7})
    with pytest.raises(TrainError, match="gone back 1 times"):
        train(config, tiny_store, tmp_path)
    assert read_rollbacks(tmp_path) == [(3, 2)]
    wider = dataclasses.replace(guard, spike_loss=1e9, spike_norm=1e9)
    train(dataclasses.replace(config, guard=wider), tiny_store, tmp_path)
    assert read_rollbacks(tmp_path) == []
    # The incidents of the course that was left, and steps of the one that was not.
    for step, start, is_left in ((5, 3, True), (6, 3, False)):
        found = replay(tmp_path, tiny_store, step, device="cpu", notify=pytest.fail)
        assert found.start == start
        assert found.now == found.recorded
        incident = read_incident(tmp_path, step)
        assert (incident is not None) == is_left
        assert not is_left or incident["rollbacks"] == [(3, 2)]


def test_a_checkpoint_of_another_course_is_not_what_a_step_is_replayed_from(
    rolled_back: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(rolled_back, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    inflate(monkeypatch, {6, 7, 13})
    found = replay(tmp_path / "run", tiny_store, 7, device="cpu", notify=pytest.fail)
    assert found.start == 2  # the one of step 6 was written behind the roll-back
    assert found.now == found.recorded


def test_without_checkpoints_the_whole_course_of_a_step_is_replayed(
    rolled_back: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(rolled_back, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    inflate(monkeypatch, {6, 7, 13})
    for step in (7, 12):
        found = replay(tmp_path / "run", tiny_store, step, device="cpu", notify=pytest.fail)
        assert found.start == 0
        assert found.now == found.recorded


def test_a_run_with_a_start_a_guide_and_an_anchor_is_replayed_bit_for_bit(
    rolled_back: Path,
    tiny_config: Config,
    tiny_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, other = tmp_path / "run", str(rolled_back)
    settings = dataclasses.replace(tiny_config.train, num_steps=4, checkpoint_every=2)
    gram = GramConfig(start_step=1, refresh_every=2)
    config = dataclasses.replace(tiny_config, train=settings, gram=gram)
    train(config, tiny_store, out, start=other, distill=rolled_back, device="cpu")
    words = ["replay", str(out), str(tiny_store), "--device", "cpu", "--step"]
    for step in ("2", "4"):
        given = ["--start", other, "--distill", other]
        assert main([*words, step, *given]) == 0
        assert "recorded and replayed numbers are equal, bit for bit" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="give the same --start"):
        replay(out, tiny_store, 4, device="cpu", notify=pytest.fail)


def test_a_step_that_is_not_of_the_run_is_refused(refused: Path, tiny_store: Path) -> None:
    for step in (0, 7):
        with pytest.raises(InputError, match=f"--step {step} is not one of 1 to 6"):
            replay(refused, tiny_store, step, notify=pytest.fail)
    with pytest.raises(InputError, match=r"no config\.json"):
        replay(tiny_store, tiny_store, 1, notify=pytest.fail)


def test_the_checkpoint_of_the_last_incident_outlives_the_retention(
    tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    run, store = stepped_run(tiny_config), Store.open(tiny_store)
    for step in range(1, 8):
        save(run, tmp_path, step)
        if step in (1, 3):
            capture(
                tmp_path,
                run,
                store,
                step=step + 1,
                refused=RefusedError("not finite: loss total", {"total": math.inf}, {}),
                drop_path_seeds=[1, 2],
            )
    assert replayed_from(tmp_path) == "step-00000003"
    assert [step_of(folder) for folder in folders(tmp_path)] == [3, 5, 6, 7]


def test_the_same_step_number_behind_a_roll_back_is_another_incident(
    tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    run, store = stepped_run(tiny_config), Store.open(tiny_store)
    for passed_over in (0, 9, 10):
        run.guard.passed_over.fill_(passed_over)
        capture(
            tmp_path,
            run,
            store,
            step=2,
            refused=RefusedError(f"after {passed_over}", {"total": math.nan}, {}),
            drop_path_seeds=[1, 2],
        )
    assert incident_file(tmp_path, 2, 10).exists()
    assert len((tmp_path / INCIDENTS).read_text().splitlines()) == 3
    last = read_incident(tmp_path, 2)
    assert last is not None
    assert last["cause"] == "after 10"
    assert last["samples"] == [44, 45, 46, 47]  # of the data of step 2 + 10


def test_replay_goes_to_the_start_where_no_checkpoint_before_the_step_is_left(
    refused: Path, tiny_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(refused, tmp_path / "run")
    lines: list[str] = []
    found = replay(tmp_path / "run", tiny_store, 2, device="cpu", notify=lines.append)
    assert found.start == 0
    assert lines == ["no checkpoint before this step is left, so it is replayed from the start"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    found = replay(tmp_path / "run", tiny_store, 2, device="cpu", notify=pytest.fail)
    assert found.recorded is None
    assert math.isfinite(found.now.losses["total"])


def test_a_changed_setting_of_the_guard_does_not_end_a_run(
    tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    short = dataclasses.replace(tiny_config.train, num_steps=2, checkpoint_every=1)
    config = dataclasses.replace(tiny_config, train=short)
    train(config, tiny_store, tmp_path)
    guard = dataclasses.replace(config.guard, spike_norm=99.0, skip_budget=7)
    train(dataclasses.replace(config, guard=guard), tiny_store, tmp_path)

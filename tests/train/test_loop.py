"""Whole runs on a real store: exact resume, real kills, refusals."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training_case import fail_at, hashes, rows, run_in_server, train_until_killed

from tapct_fast.config import Config, from_json
from tapct_fast.data.pipeline import ViewBatch, ViewPipeline
from tapct_fast.data.samples import Sample
from tapct_fast.errors import (
    CheckpointError,
    InputError,
    StoppedError,
    StoreError,
    TrainError,
)
from tapct_fast.io.store import Store
from tapct_fast.train import loop
from tapct_fast.train.checkpoint import Run, folders, pointed_to, step_of, verify
from tapct_fast.train.loop import choose_backend, train, uniform_loss
from tapct_fast.train.step import StepResult

Loaded = Sequence[tuple[Sample, NDArray[np.int16]]]
Made = tuple[ViewBatch, torch.cuda.Event | None]


@pytest.fixture(scope="module")
def finished(
    tiny_config: Config, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run that nothing interrupts."""
    out = tmp_path_factory.mktemp("finished")
    train(tiny_config, tiny_store, out)
    return out


def test_a_run_writes_its_config_its_metrics_and_its_checkpoints(
    finished: Path, tiny_config: Config, tiny_store: Path
) -> None:
    assert from_json(Config, (finished / "config.json").read_text()) == tiny_config
    log = rows(finished)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(value) for row in log for value in row.values())
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["latest.json", "step-00000003", "step-00000006"]
    again = train(tiny_config, tiny_store, finished)  # a finished run has nothing to do
    assert again.checkpoint == finished / "checkpoints" / "step-00000006"
    assert again.final_loss == log[-1]["loss"]
    assert rows(finished) == log


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    finished: Path,
    tiny_config: Config,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, step)
        with pytest.raises(StoreError, match="the disk went away"):
            train(tiny_config, tiny_store, tmp_path)
    assert len(rows(tmp_path)) == step
    train(tiny_config, tiny_store, tmp_path)
    assert rows(tmp_path) == rows(finished)
    assert hashes(tmp_path) == hashes(finished)


def test_twenty_kills_at_random_times_leave_a_run_that_repeats_the_uninterrupted_one_bit_for_bit(
    tiny_config: Config, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(tiny_config.train, checkpoint_every=1, keep_checkpoints=2)
    config = dataclasses.replace(tiny_config, train=settings)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as this process: threads change the bits of sums
    # A server imports torch once and forks each victim from a process without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_case", "torch.utils.tensorboard", "torch._dynamo"])
    whole = tmp_path / "whole"
    for name in ("warm", "whole"):  # the first victim also waits for the server
        start = time.monotonic()
        assert run_in_server(context, train_until_killed, config, tiny_store, tmp_path / name) == 0
        seconds = time.monotonic() - start
    draw = random.Random(7)
    num_kills, chain = 0, 0
    while num_kills < 20:
        out = tmp_path / f"killed-{chain}"
        after = draw.uniform(0, seconds)
        code = run_in_server(context, train_until_killed, config, tiny_store, out, after)
        assert code in (0, -signal.SIGKILL)
        num_kills += code != 0
        for folder in folders(out):
            verify(folder)
        assert not pointed_to(out) or (out / "checkpoints" / pointed_to(out)).is_dir()
        if code == 0:  # this one came through; the next victim starts again
            assert rows(out) == rows(whole)
            assert hashes(out) == hashes(whole)
            chain += 1
    out = tmp_path / f"killed-{chain}"
    train(config, tiny_store, out)
    assert rows(out) == rows(whole)
    assert hashes(out) == hashes(whole)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_behind_a_checkpoint_and_the_run_goes_on_bit_for_bit(
    finished: Path,
    tiny_config: Config,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    which: signal.Signals,
) -> None:
    make = ViewPipeline._batch

    def signalling(self: ViewPipeline, at: int, micro: int, loaded: Loaded) -> Made:
        if (at, micro) == (4, 1):
            os.kill(os.getpid(), which)  # handled in the main thread
        return make(self, at, micro, loaded)

    before = signal.getsignal(which)
    with monkeypatch.context() as patch:
        patch.setattr(ViewPipeline, "_batch", signalling)
        with pytest.raises(
            StoppedError, match=f"{which.name} behind the checkpoint of step"
        ) as error:
            train(tiny_config, tiny_store, tmp_path)
    assert error.value.exit_code == 75
    assert signal.getsignal(which) is before
    (step,) = map(int, re.findall(r"of step (\d+)", str(error.value)))
    assert (tmp_path / "checkpoints" / f"step-{step:08d}").is_dir()
    assert step < 6
    train(tiny_config, tiny_store, tmp_path)
    assert rows(tmp_path) == rows(finished)
    assert hashes(tmp_path) == hashes(finished)


def test_a_damaged_case_is_listed_and_a_resumed_run_still_repeats_the_first(
    tiny_config: Config,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_store, tmp_path / "store")
    record = Store.open(tmp_path / "store").cases[1]
    path = tmp_path / "store" / record.file
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    train(tiny_config, tmp_path / "store", tmp_path / "whole")
    (line,) = (tmp_path / "whole" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["case"] == record.case
    assert "quarantine.jsonl" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        fail_at(patch, 4)
        with pytest.raises(StoreError, match="the disk went away"):
            train(tiny_config, tmp_path / "store", tmp_path / "killed")
    train(tiny_config, tmp_path / "store", tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert len((tmp_path / "killed" / "quarantine.jsonl").read_text().splitlines()) == 1


def test_a_resumed_run_may_have_other_workers(
    finished: Path, tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    settings = dataclasses.replace(tiny_config.train, num_workers=2, read_timeout=9.0)
    train(dataclasses.replace(tiny_config, train=settings), tiny_store, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(finished)


def test_accumulation_does_not_change_the_losses(
    finished: Path, tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    whole = dataclasses.replace(tiny_config.train, accumulate=1)
    train(dataclasses.replace(tiny_config, train=whole), tiny_store, tmp_path)
    for one, two in zip(rows(tmp_path), rows(finished), strict=True):
        for name in ("loss", "dino_global", "dino_local", "ibot", "koleo"):
            # Sums of float32 in another order.
            assert one[name] == pytest.approx(two[name], rel=1e-4), (one["step"], name)


def test_never_refuses_a_folder_that_holds_a_run(
    finished: Path, tiny_config: Config, tiny_store: Path
) -> None:
    with pytest.raises(InputError, match="--resume auto"):
        train(tiny_config, tiny_store, finished, resume="never")


def test_a_finished_folder_refuses_another_config(
    finished: Path, tiny_config: Config, tiny_store: Path
) -> None:
    longer = dataclasses.replace(tiny_config.train, num_steps=7)
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"train\.num_steps"):
        train(dataclasses.replace(tiny_config, train=longer), tiny_store, finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def poison(monkeypatch: pytest.MonkeyPatch, positions: Collection[int]) -> None:
    """Put a NaN into the views whose data belongs to some steps."""
    make = ViewPipeline._batch

    def poisoned(self: ViewPipeline, step: int, micro: int, loaded: Loaded) -> Made:
        batch, event = make(self, step, micro, loaded)
        if step in positions and micro == 1:
            batch.global_VBZYX[0, 0, 0, 0, 0] = torch.nan
        return batch, event

    monkeypatch.setattr(ViewPipeline, "_batch", poisoned)


def test_a_step_that_is_not_finite_is_skipped_recorded_and_the_run_goes_on(
    finished: Path,
    tiny_config: Config,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, {4})
    train(tiny_config, tiny_store, tmp_path)
    assert "step 5 was skipped: not finite" in capsys.readouterr().err
    assert hashes(tmp_path, 3) == hashes(finished, 3)
    log = rows(tmp_path)
    assert [(row["step"], row["skipped"]) for row in log] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 0),
        (6, 1),
    ]
    assert log[:4] == rows(finished)[:4]
    (incident,) = (tmp_path / "incidents.jsonl").read_text().splitlines()
    assert json.loads(incident)["step"] == 5
    assert "the views hold" in json.loads(incident)["cause"]


def test_a_row_of_skips_goes_back_passes_over_the_data_and_a_resume_repeats_it(
    tiny_config: Config,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guard = dataclasses.replace(tiny_config.guard, skip_budget=2)
    settings = dataclasses.replace(tiny_config.train, num_steps=8, checkpoint_every=2)
    config = dataclasses.replace(tiny_config, guard=guard, train=settings)
    with monkeypatch.context() as patch:
        poison(patch, {4, 5})
        train(config, tiny_store, tmp_path / "whole")
        assert "back to step 4, passing over the data of 2 steps" in capsys.readouterr().err
        with monkeypatch.context() as inner:
            make = ViewPipeline._batch

            def failing(self: ViewPipeline, step: int, micro: int, loaded: Loaded) -> Made:
                if step == 7:
                    raise StoreError("the disk went away")
                return make(self, step, micro, loaded)

            inner.setattr(ViewPipeline, "_batch", failing)
            with pytest.raises(StoreError, match="the disk went away"):
                train(config, tiny_store, tmp_path / "killed")
        train(config, tiny_store, tmp_path / "killed")
    log = rows(tmp_path / "whole")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["skipped"] for row in log] == [0, 0, 0, 0, 2, 2, 2, 2]
    assert rows(tmp_path / "killed") == log
    assert hashes(tmp_path / "killed", 8) == hashes(tmp_path / "whole", 8)


def test_a_weight_that_breaks_in_memory_is_mended_by_going_back(
    tiny_config: Config, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = dataclasses.replace(tiny_config.guard, skip_budget=2)
    settings = dataclasses.replace(tiny_config.train, num_steps=8, checkpoint_every=2)
    config = dataclasses.replace(tiny_config, guard=guard, train=settings)
    step, calls = loop.train_step, []

    def breaking(run: Run, *args: Any, **kwargs: Any) -> StepResult:
        calls.append(1)
        if len(calls) == 6:  # a checkpoint is due behind it
            run.method.teacher.backbone.norm.weight[3] = torch.inf
        return step(run, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", breaking)
    train(config, tiny_store, tmp_path)
    assert len(calls) == 7 + 4
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["skipped"] for row in log] == [0, 0, 0, 0, 2, 2, 2, 2]
    assert [step_of(folder) for folder in folders(tmp_path)] == [4, 6, 8]


def test_a_signal_that_comes_with_the_last_skip_stops_the_run_behind_its_roll_back(
    tiny_config: Config, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = dataclasses.replace(tiny_config.guard, skip_budget=1)
    config = dataclasses.replace(tiny_config, guard=guard)
    poison(monkeypatch, {4})
    train(config, tiny_store, tmp_path / "whole")
    step, calls = loop.train_step, []

    def signalling(*args: Any, **kwargs: Any) -> StepResult:
        calls.append(1)
        if len(calls) == 5:  # whether to stop was asked before
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", signalling)
        with pytest.raises(StoppedError, match="SIGTERM behind the checkpoint of step 4"):
            train(config, tiny_store, tmp_path / "asked")
    train(config, tiny_store, tmp_path / "asked")
    assert rows(tmp_path / "asked") == rows(tmp_path / "whole")
    assert hashes(tmp_path / "asked") == hashes(tmp_path / "whole")


def test_the_loss_of_a_run_whose_last_step_was_refused_is_that_of_the_step_before(
    tiny_config: Config, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {5})
    result = train(tiny_config, tiny_store, tmp_path)
    assert result.final_loss == rows(tmp_path)[-1]["loss"]
    assert result.checkpoint.is_dir()


def test_skips_that_other_data_does_not_end_stop_the_run(
    tiny_config: Config, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = dataclasses.replace(tiny_config.guard, skip_budget=1, max_rollbacks=2)
    config = dataclasses.replace(tiny_config, guard=guard)
    poison(monkeypatch, range(3, 100))
    with pytest.raises(TrainError, match=r"gone back 2 times.*incidents\.jsonl"):
        train(config, tiny_store, tmp_path)
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_a_missing_store_and_an_unknown_device_say_the_way_out(
    tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="tapct-fast pack"):
        train(tiny_config, tmp_path / "none", tmp_path / "out")
    for device in ("gpu", "meta", "cuda:99"):
        with pytest.raises(InputError, match="--device"):
            train(tiny_config, tiny_store, tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


def test_auto_precision_is_float32_on_the_cpu(tiny_config: Config) -> None:
    assert choose_backend(tiny_config, "cpu") == (torch.device("cpu"), torch.float32)
    rounded = dataclasses.replace(tiny_config.train, precision="bf16")
    config = dataclasses.replace(tiny_config, train=rounded)
    assert choose_backend(config, "cpu")[1] == torch.bfloat16


def test_the_uniform_loss_is_ln_of_the_prototypes(tiny_config: Config) -> None:
    # Batches of 2 samples have 4 global views, 2 of them masked.
    assert uniform_loss(tiny_config) == pytest.approx(1.5 * math.log(32))

"""Several processes are one run: the same losses, the same checkpoints, and one end for all.

Equal are losses and norms of float32 sums taken in another order, which the optimizer carries on:
one part in 10 million at first. After 6 steps of the tiny run 1e-7 of a loss and 7e-7 of a
gradient norm were measured.
"""

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_runs import (
    Fault,
    codes,
    measure_shards,
    refuse_cases,
    start,
    start_server,
    stderr_of,
    train_together,
    wait_for_step,
)
from torch.distributed import TCPStore
from training_case import rows

from tapct_fast.config import Config, GramConfig
from tapct_fast.data.pipeline import ViewPipeline
from tapct_fast.errors import InputError
from tapct_fast.io.store import Store
from tapct_fast.train.checkpoint import folders, step_of, verify
from tapct_fast.train.loop import train
from tapct_fast.train.processes import LONG, SHORT, Processes, started

SUMMED = ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as this process: threads change the bits of sums
        yield start_server()


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    """Eight groups a step, in two micro-batches: for 1, 2 or 4 processes."""
    return with_train(tiny_config, batch_size=16, keep_checkpoints=9)


@pytest.fixture(scope="module")
def alone(config: Config, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without a group."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(config, tiny_store, out)
    return out


def with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def share(
    server: ForkServerContext,
    world_size: int,
    config: Config,
    store: Path,
    out: Path,
    **arguments: Any,
) -> list[int | None]:
    return codes(start(server, train_together, world_size, config, store, out, arguments))


def told_step(out: Path) -> int:
    """Return the last step in the log of a run that may have been killed."""
    path = out / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+),', path.read_text() if path.exists() else "")
    return int(steps[-1]) if steps else 0


def hashes(out: Path) -> dict[str, str]:
    files = sorted(folders(out)[-1].glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def told(out: Path, world_size: int) -> list[str]:
    return [stderr_of(out, rank).read_text() for rank in range(world_size)]


def go_back(out: Path, step: int) -> None:
    """Leave a run as it was after ``step``."""
    for folder in folders(out):
        if step_of(folder) > step:
            shutil.rmtree(folder)


def assert_close(out: Path, other: Path, *, loss: float = 1e-6, norm: float = 5e-6) -> None:
    for one, two in zip(rows(out), rows(other), strict=True):
        assert (one["step"], one["skipped"]) == (two["step"], two["skipped"])
        for name in set(SUMMED) & set(two):
            # absolute: the Gram loss compares two networks that are nearly one, 1e-5 here
            assert one[name] == pytest.approx(two[name], rel=loss, abs=1e-10), (one["step"], name)
        for name in (n for n in two if n.startswith("grad_norm")):
            assert one[name] == pytest.approx(two[name], rel=norm, abs=1e-9), (one["step"], name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_parts_of_all_processes_are_the_samples_of_one(
    config: Config, tiny_store: Path, accumulate: int
) -> None:
    store, size = Store.open(tiny_store), config.train.batch_size
    whole = ViewPipeline(store, with_train(config, accumulate=1), device="cpu").batch_at(5, 0)
    for world_size in (1, 2, 4):
        dealt = with_train(config, accumulate=accumulate)
        indices, parts = [], []
        for rank in range(world_size):
            pipeline = ViewPipeline(store, dealt, device="cpu", rank=rank, world_size=world_size)
            for micro in range(accumulate):
                indices += pipeline._indices(5, micro)
                parts.append(pipeline.batch_at(5, micro))
        assert indices == list(range(5 * size, 6 * size))
        views_VBZYX = torch.cat([part.global_VBZYX for part in parts], dim=1)
        assert torch.equal(views_VBZYX, whole.global_VBZYX)
        masks = [part.mask_NL.unflatten(0, (2, -1)) for part in parts]
        assert torch.equal(torch.cat(masks, dim=1).flatten(0, 1), whole.mask_NL)


@pytest.mark.parametrize(
    ("world_size", "parallel", "accumulate"),
    [(2, "ddp", 2), (4, "ddp", 2), (2, "fsdp", 1)],
)
def test_processes_train_as_one_does_and_repeat_it_bit_for_bit(
    server: ForkServerContext,
    alone: Path,
    config: Config,
    tiny_store: Path,
    tmp_path: Path,
    world_size: int,
    parallel: str,
    accumulate: int,
) -> None:
    config = with_train(config, parallel=parallel, accumulate=accumulate)
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs[: 1 if world_size > 2 else 2]:
        assert share(server, world_size, config, tiny_store, out) == [0] * world_size
        assert told(out, world_size) == [""] * world_size
        assert_close(out, alone)
        assert hashes(out) == hashes(outs[0])
        assert rows(out) == rows(outs[0])


def test_a_run_goes_on_with_any_number_of_processes_and_shards(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    config = with_train(config, num_steps=12)
    train(config, tiny_store, tmp_path / "alone")
    out = tmp_path / "run"
    shutil.copytree(tmp_path / "alone", out)
    chain = [(3, 2, "ddp"), (6, 4, "fsdp"), (9, 1, "ddp")]
    for step, world_size, parallel in chain:
        go_back(out, step)
        changed = with_train(config, parallel=parallel, accumulate=2 if world_size < 4 else 1)
        if world_size == 1:
            train(changed, tiny_store, out)
            break
        assert share(server, world_size, changed, tiny_store, out) == [0] * world_size
        first, *others = told(out, world_size)
        assert "not bit for bit" in first
        assert f"{parallel} on {world_size}" in first
        assert others == [""] * (world_size - 1)
    assert_close(out, tmp_path / "alone")
    for folder in folders(out):
        verify(folder)


def test_each_process_holds_its_part_of_weights_gradients_and_moments(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    sharded = with_train(config, parallel="fsdp", accumulate=1)
    processes = start(server, measure_shards, 2, sharded, tiny_store, tmp_path / "shares")
    assert codes(processes) == [0, 0]
    shares = [json.loads((tmp_path / f"shares-{rank}").read_text()) for rank in range(2)]
    for name in ("student", "teacher", "gradients", "moments"):
        assert sum(share[name] for share in shares) == pytest.approx(1)
        # a tensor of one row is the first one's
        assert shares[1][name] == pytest.approx(0.5, abs=0.02)


def test_shards_do_for_every_part_of_the_method(
    server: ForkServerContext, tiny_config: Config, tiny_store: Path, tmp_path: Path, alone: Path
) -> None:
    config = dataclasses.replace(
        tiny_config,
        losses=dataclasses.replace(tiny_config.losses, centering="softmax"),
        gram=GramConfig(start_step=2, refresh_every=2),
    )
    train(config, tiny_store, tmp_path / "one", distill=alone)
    sharded = with_train(config, parallel="fsdp", accumulate=1, checkpointing="full")
    out = tmp_path / "two"
    train(with_train(sharded, checkpointing="full"), tiny_store, tmp_path / "full", distill=alone)
    assert share(server, 2, sharded, tiny_store, out, distill=alone) == [0, 0]
    assert_close(out, tmp_path / "full")
    assert_close(out, tmp_path / "one")
    go_back(out, 3)  # one process reads centers, anchor, moments and shards
    train(sharded, tiny_store, out, distill=alone)
    assert_close(out, tmp_path / "one")


def test_processes_skip_and_go_back_together(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    guard = dataclasses.replace(config.guard, skip_budget=2)
    config = dataclasses.replace(config, guard=guard)
    config = with_train(config, num_steps=8, checkpoint_every=2, parallel="fsdp")
    fault = Fault(rank=1, positions=(4, 5), is_fatal=False)
    assert share(server, 2, config, tiny_store, tmp_path / "run", fault=fault) == [0, 0]
    first, second = told(tmp_path / "run", 2)
    assert "step 5 was skipped: not finite" in first
    assert "the views hold NaN" in first
    assert "back to step 4, passing over the data of 2 steps" in first
    assert second == ""
    log = rows(tmp_path / "run")
    assert [(row["step"], row["skipped"]) for row in log] == [
        *((step, 0) for step in range(1, 5)),
        *((step, 2) for step in range(5, 9)),
    ]


def test_an_error_of_one_process_ends_all_and_is_told_once(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    fault = Fault(rank=1, positions=(4,), is_fatal=True)
    out = tmp_path / "run"
    began = time.monotonic()
    assert share(server, 2, config, tiny_store, out, fault=fault) == [70, 65]
    assert time.monotonic() - began < 30
    assert told(out, 2) == ["", "the disk went away\n"]


def test_numbers_of_processes_that_cannot_share_a_step_are_refused_with_those_that_can(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert share(server, 3, config, tiny_store, out) == [2] * 3
    (line,) = filter(None, told(out, 3))
    assert "3 processes cannot share train.batch_size=16" in line
    assert line.endswith("numbers of processes that can: 1, 2, 4\n")
    assert not out.exists()


def test_kills_of_either_process_leave_a_run_that_repeats_the_uninterrupted_one_bit_for_bit(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    num_kills = int(os.environ.get("TAPCT_TEST_KILLS", "3"))
    config = with_train(config, num_steps=30, checkpoint_every=1, keep_checkpoints=2)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert share(server, 2, config, tiny_store, whole) == [0, 0]
    draw, killed = random.Random(7), 0
    while killed < num_kills:
        processes = start(server, train_together, 2, config, tiny_store, out, {})
        victim = draw.randrange(2)
        done = told_step(out)
        if done < 30:  # the step of a new row, so that both have joined
            wait_for_step(out, min(done + draw.randint(1, 8), 30))
            processes[victim].join(draw.uniform(0, 0.2))  # somewhere in a step or a save
            processes[victim].kill()
        found = codes(processes)
        assert found[victim] in (0, -signal.SIGKILL)
        assert found[1 - victim] in (0, 70)
        for folder in folders(out):
            verify(folder)
        killed += found[victim] != 0
        if found == [0, 0]:
            assert hashes(out) == hashes(whole)
            shutil.rmtree(out)
    assert share(server, 2, config, tiny_store, out) == [0, 0]
    assert rows(out) == rows(whole)
    assert hashes(out) == hashes(whole)


def test_processes_that_are_started_anew_beside_the_same_store_find_each_other(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path, alone: Path
) -> None:
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's
    out = tmp_path / "run"
    ends = []
    for attempt in range(2):
        fault = Fault(rank=1, positions=(4,) if attempt == 0 else (), is_fatal=True)
        arguments = {"attempt": attempt, "fault": fault}
        job = start(server, train_together, 2, config, tiny_store, out, arguments, port=agent.port)
        ends.append(codes(job))
    assert ends == [[70, 65], [0, 0]]
    assert_close(out, alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_left_by_the_others_who_say_where_they_waited(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path, victim: int
) -> None:
    config = with_train(config, num_steps=3000, checkpoint_every=25)
    out = tmp_path / "run"
    processes = start(server, train_together, 2, config, tiny_store, out, {"short": 4})
    wait_for_step(out, 28)  # a step behind a save may take long
    os.kill(processes[victim].pid or 0, signal.SIGSTOP)
    began = time.monotonic()
    processes[1 - victim].join(40)
    assert time.monotonic() - began < 15
    assert codes(processes, seconds=0)[1 - victim] == 70
    text = told(out, 2)[1 - victim]
    assert "all_reduce" in text  # of the stacks
    assert re.search(r"process \d of 2 lost the others.*last checkpoint.*Timed out", text)
    verify(folders(out)[-1])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_others_wait_for_a_slow_disk(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path, parallel: str
) -> None:
    config = with_train(config, checkpoint_every=2, parallel=parallel)
    arguments = {"short": 3.0, "late": 5.0}
    assert share(server, 2, config, tiny_store, tmp_path / "run", **arguments) == [0, 0]


def test_patience_lasts_until_its_step_is_done() -> None:
    processes = Processes()
    assert processes._limit == LONG
    for until in (1, 5, 3):  # the start, a save, and a step that was gone back to
        processes.be_patient(until=until)
        processes.step_ends(until - 1)
        assert processes._limit == LONG
        for done in (until, until + 1):
            processes.step_ends(done)
            assert processes._limit == SHORT


@pytest.mark.parametrize("asked", [(1,), (0, 1)])
def test_a_signal_to_one_or_all_stops_all_behind_the_same_checkpoint(
    server: ForkServerContext,
    config: Config,
    tiny_store: Path,
    tmp_path: Path,
    asked: Sequence[int],
) -> None:
    config = with_train(config, num_steps=3000, checkpoint_every=1000)
    out = tmp_path / "run"
    processes = start(server, train_together, 2, config, tiny_store, out, {})
    wait_for_step(out, 3)
    for rank in asked:
        os.kill(processes[rank].pid or 0, signal.SIGTERM)
    assert codes(processes) == [75, 75]
    (folder,) = folders(out)
    (line,) = filter(None, told(out, 2))
    assert f"behind the checkpoint of step {step_of(folder)};" in line
    verify(folder)


def test_processes_that_list_refused_cases_at_once_lose_none(
    server: ForkServerContext, tmp_path: Path
) -> None:
    assert codes(start(server, refuse_cases, 3, tmp_path, 20)) == [0, 0, 0]
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    cases = sorted(json.loads(line)["case"] for line in lines)
    assert cases == sorted(f"{who}-{case}" for who in (0, 1, 2, "all") for case in range(20))


def test_a_damaged_case_that_several_processes_meet_is_listed_once(
    server: ForkServerContext, config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_store, tmp_path / "store")
    record = Store.open(tmp_path / "store").cases[1]
    path = tmp_path / "store" / record.file
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    out = tmp_path / "run"
    assert share(server, 2, config, tmp_path / "store", out) == [0, 0]
    assert all("listed in quarantine.jsonl" in text for text in told(out, 2))
    (line,) = (out / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["case"] == record.case
    train(config, tmp_path / "store", tmp_path / "alone")
    assert_close(out, tmp_path / "alone")


def test_torchrun_starts_the_command_line(tiny_store: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {"num_steps": 2, "checkpoint_every": 1, "group_size": 4}
    words = [word for name, n in settings.items() for word in (f"--train.{name}", str(n))]
    train = ["-m", "tapct_fast.cli", "train", "debug", str(tiny_store), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*run, *train, "--out", str(tmp_path / "run"), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ddp on 2" in done.stderr
    assert len(done.stderr.splitlines()) == 2  # how it starts and the last step, once
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert [step_of(folder) for folder in folders(tmp_path / "run")] == [1, 2]


def test_a_process_alone_needs_no_group_and_half_the_variables_are_refused() -> None:
    for environment in ({}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}):
        with started(environment, CPU) as processes:
            assert processes.is_first
            assert processes.group is None
    with pytest.raises(InputError, match="start with torchrun"), started({"WORLD_SIZE": "2"}, CPU):
        pass

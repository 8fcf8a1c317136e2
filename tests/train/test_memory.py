"""Allocations that really fail: one line with the way out, and the checkpoint stays."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from tapct_fast.config import TrainConfig
from tapct_fast.data.pipeline import groups_per_micro_batch
from tapct_fast.errors import StoppedError, TrainError
from tapct_fast.train.checkpoint import newest_intact
from tapct_fast.train.memory import memory_errors

PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from tapct_fast.cli import main
from tapct_fast.train import loop

torch.set_num_threads(1)
step, count = loop.train_step, 0

def limited(*args, **kwargs):
    # From the third step on, this process gets no more memory than it has and 40 MB, and of that,
    # and of what malloc keeps, all but 8 MB are taken.
    global count
    count += 1
    if count == 3:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 40_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            while True:
                hoard.append(torch.ones(250_000))
        except RuntimeError:
            del hoard[-8:]
    return step(*args, **kwargs)

hoard = []
loop.train_step = limited
sys.exit(main(sys.argv[1:]))
"""


def test_a_step_that_does_not_fit_is_one_line_and_leaves_the_checkpoint(
    tiny_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["train", "debug", str(tiny_store), "--out", str(out), "--device", "cpu"]
    words += [
        "--train.batch_size",
        "32",
        "--train.group_size",
        "16",
        "--train.num_steps",
        "3",
        "--train.checkpoint_every",
        "1",
    ]
    words += ["--train.num_workers", "1", "--vit.depth", "2"]
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    line = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 75, found.stderr
    assert "out of memory on the host: the peak was" in line
    assert "have 32 samples: start a run with train.checkpointing=selective. The check" in line
    assert re.search(r"The checkpoint of step [12] is intact", line)
    assert str(tmp_path) not in line
    newest, damaged = newest_intact(out, notify=pytest.fail)
    assert newest is not None
    assert damaged == []


def test_without_a_checkpoint_another_try_is_not_promised(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=6, group_size=3, accumulate=2, checkpointing="full")
    said = pytest.raises(TrainError, match="smaller views or a smaller model")
    with said as caught, memory_errors(tmp_path, config):
        torch.empty(2**60, dtype=torch.uint8)  # the CPU allocator of torch refuses
    assert caught.value.exit_code == 70
    assert "when 1152921504606846976 bytes more were asked for" in str(caught.value)
    with pytest.raises(TrainError, match="out of memory"), memory_errors(tmp_path, config):
        np.empty(2**60, dtype=np.uint8)  # numpy raises a MemoryError


@pytest.mark.parametrize(
    ("checkpointing", "accumulate", "world_size", "way_out"),
    [
        ("none", 1, 1, "have 12 samples: start a run with train.checkpointing=selective"),
        ("selective", 1, 1, "have 12 samples: start a run with train.accumulate=2, or a smaller"),
        ("full", 2, 1, "have 6 samples: start a run with train.accumulate=3, or a smaller"),
        ("full", 3, 1, "have 4 samples: start a run with train.accumulate=6, or a smaller"),
        ("selective", 6, 1, "have 2 samples: start a run with train.checkpointing=full"),
        ("full", 1, 2, "have 6 samples: start a run with train.accumulate=3, or a smaller"),
        ("full", 6, 1, "have 2 samples: start a run with smaller views or a smaller model"),
    ],
)
def test_the_way_out_is_what_costs_least_next_and_a_setting_that_is_allowed(
    tmp_path: Path,
    checkpointing: Literal["none", "selective", "full"],
    accumulate: int,
    world_size: int,
    way_out: str,
) -> None:
    config = TrainConfig(
        batch_size=12, group_size=2, accumulate=accumulate, checkpointing=checkpointing
    )
    with (
        pytest.raises(TrainError, match=way_out) as caught,
        memory_errors(tmp_path, config, world_size=world_size),
    ):
        raise MemoryError
    for name, value in re.findall(r"train\.(\w+)=(\w+)", str(caught.value)):
        setting = int(value) if name == "accumulate" else value
        groups_per_micro_batch(dataclasses.replace(config, **{name: setting}), world_size)


def test_with_a_checkpoint_the_command_is_worth_another_try(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    said = pytest.raises(StoppedError, match="step 7 is intact")
    with said as caught, memory_errors(tmp_path, TrainConfig()):
        torch.empty(2**60, dtype=torch.uint8)
    assert caught.value.exit_code == 75


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors(tmp_path, TrainConfig()):
        raise RuntimeError("shapes do not agree")

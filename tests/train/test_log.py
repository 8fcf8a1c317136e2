"""The logs of a run: rows on disk at once, rows past a checkpoint dropped, torn rows forgiven."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tapct_fast.train.log import RunLog


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": step / 8, "samples_per_s": 2.0, "data_wait": 0.25}


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_readable_while_the_run_is_on(tmp_path: Path) -> None:
    with RunLog(tmp_path, step=0, num_steps=3, progress=False) as log:
        assert math.isnan(log.last_loss)
        log.write(row(1))
        assert read(tmp_path) == [row(1)]
        log.sync()
        assert log.last_loss == 1 / 8


def test_a_resumed_log_drops_rows_past_the_checkpoint_and_a_torn_one(tmp_path: Path) -> None:
    rows = "".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 4, "lo')
    with RunLog(tmp_path, step=2, num_steps=4, progress=False) as log:
        assert log.last_loss == 2 / 8
        log.write(row(3))
    assert read(tmp_path) == [row(1), row(2), row(3)]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="no tensorboard: pip install 'tapct-fast[track]'",
    )
    with RunLog(tmp_path, step=0, num_steps=2, progress=False) as log:
        log.write(row(1))
        log.write(row(2))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "samples_per_s", "data_wait"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1 / 8), (2, 2 / 8)]


def test_progress_without_a_terminal_is_whole_lines_with_rate_wait_and_remaining_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLog(tmp_path, step=1, num_steps=4, progress=True) as log:
        log.write(row(2))
        log.advance()  # not yet due
        monkeypatch.setattr("tapct_fast.train.log.time.monotonic", lambda: math.inf)
        log.write(row(3))
        log.advance()
        log.write(row(4))
        log.advance()
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"step 3/4, loss 0.375, 2.0 samples/s, data wait 25 %, eta \d\d:\d\d", first
    )
    assert last.startswith("step 4/4, loss 0.500")


def test_no_progress_is_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, step=0, num_steps=1, progress=False) as log:
        log.write(row(1))
        log.advance()
    assert capsys.readouterr().err == ""

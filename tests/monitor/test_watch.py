"""The terminal view: what it shows, when it prints, how it ends."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tapct_fast.config import to_json
from tapct_fast.errors import InputError
from tapct_fast.monitor.record import Record, read_record, read_rows
from tapct_fast.monitor.verdict import judge
from tapct_fast.monitor.watch import SPARK, duration, render, spark, watch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write_run(folder: Path, record: Record, num: int, tail: str = "") -> None:
    (folder / "config.json").write_text(to_json(record.config))
    rows = "".join(json.dumps(row) + "\n" for row in record.rows[:num])
    (folder / "metrics.jsonl").write_text(rows + tail)


def test_a_line_cut_short_is_passed_over_and_read_once_it_is_whole(
    tmp_path: Path, steady: Record
) -> None:
    write_run(tmp_path, steady, 3, '{"step": 4, "lo')
    assert read_record(tmp_path).step == 3
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.0}\n')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_without_a_run_is_an_error_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no run.*--out"):
        watch(tmp_path / name, once=True)


def test_the_view_shows_progress_losses_numbers_probe_and_findings(steady: Record) -> None:
    rows = [{**row, "effective_rank": 1.0} for row in steady.rows]
    probe = {"step": 60, "linear": 0.6, "linear_low": 0.55, "linear_high": 0.65, "knn": 0.5}
    record = steady._replace(rows=rows, probes=[probe])
    text = render(record, judge(record))
    assert text.isascii()
    # 300 steps of 16 samples at 12 samples/s
    assert text.startswith("step 100 of 400 (25 %), eta 6:40, 12 samples/s, data wait 0 %\n")
    assert "uniform: ln 128 = 4.85" in text
    assert "  iBOT loss                         4.46" in text
    assert "step 60, 95 %: 0.550 to 0.650" in text
    assert "\nbad: rank: The cls tokens have effective rank 1.00" in text
    assert max(map(len, text.splitlines()[3:-2])) < 110


def test_a_spark_rises_with_its_values_and_fits_its_width() -> None:
    assert spark(np.arange(10.0), 10) == SPARK
    assert len(spark(np.random.default_rng(0).normal(size=1000), 30)) == 30
    assert spark(np.full(5, 2.0)) == SPARK[5] * 5
    assert spark(np.array([np.nan, 1.0, 2.0])) == SPARK[0] + SPARK[-1]
    assert spark(np.array([])) == ""


def test_times_are_short() -> None:
    assert [duration(s) for s in (5, 65, 3700, 200000)] == ["0:05", "1:05", "1 h 01 min", "2 d 7 h"]


def test_exit_codes_are_0_healthy_1_warning_70_sick(tmp_path: Path, steady: Record) -> None:
    for numbers, code in (({}, 0), ({"data_wait": 0.5}, 1), ({"effective_rank": 1.0}, 70)):
        rows = [{**row, **numbers} for row in steady.rows]
        write_run(tmp_path, steady._replace(rows=rows), 100)
        assert watch(tmp_path, once=True, stream=io.StringIO()) == code


def test_json_is_one_line_that_parses_strictly(tmp_path: Path, steady: Record) -> None:
    rows = [{**row, "loss": float("nan")} for row in steady.rows]
    write_run(tmp_path, steady._replace(rows=rows), 100)
    stream = io.StringIO()
    assert watch(tmp_path, once=True, as_json=True, stream=stream) == 70
    (line,) = stream.getvalue().splitlines()
    state = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert (state["step"], state["num_steps"], state["severity"]) == (100, 400, "bad")
    assert state["row"]["loss"] is None
    assert state["findings"][0]["about"] == "losses"


def test_off_a_terminal_it_prints_once_per_change_until_the_run_has_finished(
    tmp_path: Path, steady: Record
) -> None:
    settings = {**json.loads(to_json(steady.config))["train"], "num_steps": 30}
    tree = {**json.loads(to_json(steady.config)), "train": settings}
    write_run(tmp_path, steady, 10)
    (tmp_path / "config.json").write_text(json.dumps(tree))

    def go_on() -> None:
        time.sleep(0.5)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            for row in steady.rows[10:30]:
                file.write(json.dumps(row) + "\n")

    writer = threading.Thread(target=go_on)
    writer.start()
    stream = io.StringIO()
    assert watch(tmp_path, every=0.05, stream=stream) == 0
    writer.join()
    heads = [line for line in stream.getvalue().splitlines() if line.startswith("step ")]
    assert heads[0].startswith("step 10 of 30")
    assert heads[-1].startswith("step 30 of 30 (100 %), finished")
    assert len(heads) == len(set(heads))
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_it_is_redrawn(healthy_run: Path) -> None:
    stream = Terminal()
    assert watch(healthy_run, stream=stream) in (0, 1)
    assert stream.getvalue().startswith("\x1b[H\x1b[2J")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_an_interrupt_ends_it_cleanly_with_the_verdict(tmp_path: Path, steady: Record) -> None:
    write_run(tmp_path, steady, 100)
    script = "import sys; from tapct_fast.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", script, "watch", str(tmp_path), "--every", "0.1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 100 of 400")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")

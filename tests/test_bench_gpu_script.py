"""bench/gpu.sh on a machine without a GPU, at tiny sizes: its order, and that it goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu") / "venv"


def start(out: Path, venv: Path, *steps: str, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "bench/gpu.sh", *steps],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "OUT": str(out),
            "TAPCT_VENV": str(venv),
            "PYTHON": sys.executable,
            "TAPCT_BENCH": "--tiny masked_gather patch_embed",
            "TAPCT_JOBS": "1",
            **settings,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def cases(out: Path) -> list[str]:
    """The rows in the order in which they were measured, as the subject and the case."""
    lines = [line for file in out.glob("*.jsonl") for line in file.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    return [f"{row['subject']}, {row['case']}" for row in rows]


def test_it_measures_the_most_valuable_first_and_goes_on_after_an_interruption(
    venv: Path, tmp_path: Path
) -> None:
    script = start(tmp_path, venv, "benches")
    deadline = time.monotonic() + 60
    while not cases(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(script.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    assert script.wait(20) != 0
    before = cases(tmp_path)
    assert 1 <= len(before) < 4

    script = start(tmp_path, venv, "benches")
    said, _ = script.communicate(timeout=90)
    assert script.returncode == 0, said
    after = cases(tmp_path)
    assert after[: len(before)] == before
    assert len(set(after)) == len(after) == 4
    assert [name.partition(",")[0] for name in after] == ["patch_embed"] * 2 + ["masked_gather"] * 2
    assert f"{4 - len(before)} rows measured" in said


def test_it_stops_when_the_time_is_over_and_refuses_unknown_steps(
    venv: Path, tmp_path: Path
) -> None:
    script = start(tmp_path, venv, "benches", TAPCT_TOTAL_S="1")
    said, _ = script.communicate(timeout=30)
    assert script.returncode == 0
    assert "the 1 s are over" in said
    assert cases(tmp_path) == []
    script = start(tmp_path, venv, "benchs")
    said, _ = script.communicate(timeout=30)
    assert script.returncode == 2
    assert "benchs is not one of build, gpu-tests" in said


def test_a_sanitizer_that_is_missing_or_does_not_run_is_skipped_and_said(
    venv: Path, tmp_path: Path
) -> None:
    for answer, why in (
        (None, "no compute-sanitizer in CUDA_HOME/bin"),
        ("echo no driver; exit 1", "compute-sanitizer does not run here: no driver"),
    ):
        folder = tmp_path / "cuda" / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        if answer is None and shutil.which("compute-sanitizer"):
            continue
        if answer:
            (folder / "compute-sanitizer").write_text(f"#!/bin/sh\n{answer}\n")
            (folder / "compute-sanitizer").chmod(0o755)
        script = start(tmp_path, venv, "sanitize", CUDA_HOME=str(folder.parent))
        said, _ = script.communicate(timeout=60)
        assert script.returncode == 0, said
        assert why in (tmp_path / "skipped.txt").read_text()


def test_the_sanitizer_sees_the_kernel_tests_and_its_findings_fail(
    venv: Path, tmp_path: Path
) -> None:
    """A stand-in lets the trial pass, writes down the rest, and finds a race."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "compute-sanitizer"
    stand_in.write_text(
        '#!/bin/sh\n[ "$1" = --tool ] || exit 0\necho "$TAPCT_DRAWS $*"\n[ "$2" = memcheck ]\n'
    )
    stand_in.chmod(0o755)
    script = start(tmp_path, venv, "sanitize", CUDA_HOME=str(tmp_path))
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 1
    assert "1 --tool memcheck" in said
    assert "pytest -q -x tests/kernels -m gpu" in said
    assert "FAILED: sanitize, racecheck" in said
    assert "FAILED: sanitize, memcheck" not in said

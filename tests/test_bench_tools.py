"""The tools around the benches: list, run, compare, plot, pytest-benchmark, tuner."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tapct_kernels import tuning

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_RUN = ("--tiny", "--out")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of bench/, which is not installed."""
    monkeypatch.syspath_prepend(REPOSITORY)
    names = ("rows", "compare", "catalogue", "drawing", "figures", "plot", "tune", "harness")
    modules = {name: importlib.import_module(f"bench.{name}") for name in names}
    return SimpleNamespace(**modules, main=importlib.import_module("bench.__main__").main)


def row(case: str = "1x2", *, device: str = "gpu-a", commit: str = "none", **more: Any) -> str:
    """One line of a row file; times are given as variant=(p20, p50, p80)."""
    times = more.pop("times_ms", {"tapct op": [0.9, 1.0, 1.1], "eager": [1.9, 2.0, 2.2]})
    values = {
        "subject": "op",
        "case": case,
        "bytes": 2_000_000,
        "times_ms": times,
        "tiny": False,
        "device": device,
        "commit": commit,
        "sources": "0",
        "torch": "2.11",
        "command": "c",
    }
    return json.dumps(values | more) + "\n"


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Rows of two devices: one with ceilings and FLOPs, one without."""
    folder = tmp_path / "rows"
    folder.mkdir()
    copy = row("copy", subject="ceilings", bytes=8e9, times_ms={"torch": [2, 2, 2]})
    product = row(
        "gemm", subject="ceilings", flops=7e11, dtype="bfloat16", times_ms={"torch": [1, 1, 1]}
    )
    cases = row("a", flops=4e9, dtype="bfloat16", floor_ms=0.5) + row("b <&>", dtype="bfloat16")
    (folder / "gpu-a.jsonl").write_text(copy + product + cases)
    (folder / "cpu-b.jsonl").write_text(row(device="cpu-b"))
    return folder


def test_a_row_knows_its_ratios_rates_and_share_of_the_floor(
    tools: SimpleNamespace, measured: Path
) -> None:
    rows = {r.case: r for r in tools.rows.read(str(measured)) if r.device == "gpu-a"}
    a = rows["a"]
    assert a.ours == "tapct op"
    assert a.ratio("eager") == 2
    assert a.gb_per_s("eager") == pytest.approx(1.0)  # 2 MB in 2 ms
    assert a.tflop_per_s("eager") == pytest.approx(2.0)
    assert a.share("eager") == 0.25
    assert rows["b <&>"].share("eager") is None
    [ceilings] = tools.rows.ceilings(rows.values()).values()
    assert ceilings == (pytest.approx(4000), pytest.approx(700))


def test_a_line_that_was_cut_short_is_left_out(tools: SimpleNamespace) -> None:
    assert len(tools.rows.parse(row() + row()[:40])) == 1


@pytest.mark.parametrize(
    ("after", "verdict"),
    [((0.5, 0.6, 0.89), "faster"), ((0.5, 0.6, 0.95), "noise"), ((1.11, 1.2, 1.3), "slower")],
)
def test_a_change_counts_where_the_ranges_do_not_overlap(
    tools: SimpleNamespace, tmp_path: Path, after: tuple[float, ...], verdict: str
) -> None:
    before, now = tmp_path / "before.jsonl", tmp_path / "now.jsonl"
    before.write_text(row(times_ms={"x": [5, 5, 5]}) + row())  # the last row of a case counts
    now.write_text(row(times_ms={"tapct op": after}, torch="2.12") + row("new"))
    [found] = tools.compare.compare(str(before), str(now))
    [change] = found.changes
    assert (change.verdict, change.ratio) == (verdict, after[1])
    assert found.only_after == ["op, new"]
    assert "torch 2.11 -> 2.12" in tools.compare.render(found)


def test_rows_of_different_devices_are_not_compared(
    tools: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for device in ("gpu-a", "gpu-b"):
        (tmp_path / f"{device}.jsonl").write_text(row(device=device))
    files = [str(tmp_path / f"{device}.jsonl") for device in ("gpu-a", "gpu-b")]
    assert tools.main(["compare", *files]) == 2
    assert "gpu-a and gpu-b" in capsys.readouterr().err
    assert tools.main(["compare", str(tmp_path), "no-such-revision"]) == 2
    assert "no git revision" in capsys.readouterr().err


def test_two_revisions_are_compared(
    tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        name = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(tools.rows, "REPOSITORY", tmp_path)
    file = tmp_path / "bench" / "results" / "gpu-a.jsonl"
    file.parent.mkdir(parents=True)
    git("init", "-q")
    for p50 in (1.0, 3.0):
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=tmp_path, capture_output=True, text=True
        ).stdout.strip()
        times = {"tapct op": [p50, p50, p50]}
        file.write_text(row(times_ms=times, commit=head if p50 > 1 else "none"))
        git("add", "-A")
        git("commit", "-qm", "rows")
    [found] = tools.compare.compare("HEAD~1", "HEAD")
    assert found.changes[0].ratio == 3
    [points] = tools.rows.history().values()
    assert [point.row.times_ms["tapct op"].p50 for point in points] == [1, 3]
    assert points[1].day


def test_the_page_stands_alone_and_names_every_case(
    tools: SimpleNamespace, measured: Path, tmp_path: Path
) -> None:
    again = row("a", flops=4e9, dtype="bfloat16", commit="other", torch="2.12")
    (measured / "later.jsonl").write_text(again)
    points: dict[Any, list[Any]] = {}
    for r in tools.rows.read(str(measured)):
        points.setdefault(r.key, []).append(tools.rows.Point(r, "2026-01-01"))
    written = tools.plot.write_plots(tmp_path / "out", points)
    names = sorted(path.name for path in written)
    assert names == [
        *("bandwidth-gpu-a.png", "bandwidth-gpu-a.svg", "report.html"),
        *("roofline-gpu-a.png", "roofline-gpu-a.svg"),
        *("times-cpu-b.png", "times-cpu-b.svg", "times-gpu-a.png", "times-gpu-a.svg"),
    ]
    html = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!#)|url\(|@import", html)
    assert "b &lt;&amp;&gt;" in html
    assert "b <&>" not in html
    assert "History: 2 commits" in html
    environment = html.partition("<h2>Environment</h2>")[2].partition("</table>")[0]
    # The current rows only: that of an earlier commit is in the history.
    assert "other (1)" in environment
    pictures = re.findall(r"<svg[^>]*>(.{7})", html)
    assert set(pictures) == {"<title>"}  # each says what it shows


@pytest.mark.parametrize("intensity", [0.01, 1, 1e5])  # FLOP per byte; the ridge is at 8.75
def test_a_roof_rises_and_stays_inside_the_axes(tools: SimpleNamespace, intensity: float) -> None:
    [case] = tools.rows.parse(row(bytes=1e9, flops=1e9 * intensity))
    drawing = tools.figures.roofline("gpu-a", [case], tools.rows.Ceilings(8e3, 70.0))
    [roof] = [i.points for i in drawing.items if getattr(i, "width", 0) == 1.8]
    xs, ys = zip(*roof, strict=True)
    assert len(roof) == 3
    assert 76 <= xs[0] < xs[1] < xs[2] <= drawing.width
    assert ys[0] > ys[1] == ys[2] > 0
    labels = [item for item in drawing.items if getattr(item, "text", "").startswith("copy")]
    assert [label.text for label in labels] == ["copy 8.000 TB/s"]


def test_what_is_not_ours_is_not_drawn_relative_to_ours(tools: SimpleNamespace) -> None:
    rivals = row("b", times_ms={"one file": [1, 1, 1], "two files": [2, 2, 2]})
    assert tools.figures.overview("gpu-a", tools.rows.parse(rivals)) is None
    both = tools.figures.overview("gpu-a", tools.rows.parse(row("a") + rivals))
    assert "b" not in [getattr(item, "text", "") for item in both.items]


def test_a_png_is_what_the_svg_draws(tools: SimpleNamespace) -> None:
    drawing = tools.drawing
    items = [
        drawing.Area([(0, 0), (10, 0), (10, 20), (0, 20)], "ours"),
        drawing.Line([(20, 10), (40, 10)], "ink", 4),
        drawing.Mark((50, 10), "circle", "compile", 8, ""),
        drawing.Text((60, 15), "Ag", "ink"),
        drawing.Text((78, 18), "Ag", "ink", turn_degrees=90),
    ]
    data = drawing.png_bytes(drawing.Drawing(80, 20, "t", "d", items))
    rgb_YXC = np.asarray(Image.open(io.BytesIO(data)))
    assert rgb_YXC.shape == (40, 160, 3)

    def color(x: int, y: int) -> str:
        return "#" + rgb_YXC[2 * y, 2 * x].tobytes().hex()

    light = {role: colors[0] for role, colors in drawing.COLORS.items()}
    assert [color(x, 10) for x in (5, 15, 30, 50)] == [
        light[role] for role in ("ours", "paper", "ink", "compile")
    ]
    for part in (rgb_YXC[:, 120:-24], rgb_YXC[:, -24:]):  # the letters, upright and turned
        assert (part < 100).any()


def test_pictures_without_pillow_name_the_extra(
    tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "bench.plot")
    monkeypatch.delitem(sys.modules, "bench.figures")
    monkeypatch.delitem(sys.modules, "bench.drawing")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert tools.main(["plot"]) == 2
    assert "pip install 'tapct-fast[bench]'" in capsys.readouterr().err


def test_list_and_run_say_what_is_there_and_what_was_skipped(
    tools: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tools.main(["list", "masked_gather"]) == 0
    assert "masked_gather  (cpu, cuda)" in capsys.readouterr().out
    assert tools.main(["list", "masked_gatherr"]) == 2
    assert "masked_gather, " in capsys.readouterr().err

    assert tools.main(["run", "masked_gather", *TINY_RUN, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 rows measured" in out
    assert re.search(r"^tapct masked_gather +\S+ +\S+\.\.\S+ +1\.00 ", out, re.MULTILINE)
    assert tools.main(["run", "masked_gather", "--missing", *TINY_RUN, str(tmp_path)]) == 0
    assert "0 rows measured" in capsys.readouterr().out
    [file] = tmp_path.glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 2

    assert tools.main(["run", "masked_gather", "--limit", "0.05", *TINY_RUN, str(tmp_path)]) == 0
    assert "skipped  masked_gather: stopped after" in capsys.readouterr().out
    assert tools.main(["run", "masked_gather", "--tiny"]) == 1  # a tiny row is no result
    assert "FAILED   masked_gather:" in capsys.readouterr().out


def test_the_most_valuable_benches_come_first(tools: SimpleNamespace) -> None:
    names = [subject.name for subject in tools.catalogue.subjects()]
    ranked = [name for name in tools.catalogue.ORDER if name in names]
    assert names[: len(ranked)] == ranked
    assert {"masked_gather", "read_nifti"} <= set(names)
    assert not {"harness", "tune", "__main__", "chest"} & set(names)


@pytest.mark.parametrize(
    ("flags", "name"), [("avx512_bf16", "a-r-cpu-4-cores"), ("amx_tile", "a-r-cpu-amx-4-cores")]
)
def test_hosts_with_amx_have_a_name_of_their_own(
    tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, name: str
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"model name\t: A(R) CPU\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(tools.harness, "Path", lambda _: info)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert tools.harness.device_name("cpu") == name


def test_pytest_bench_measures_every_variant(tmp_path: Path) -> None:
    file = tmp_path / "benchmark.json"
    quick = ("--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "--benchmark-warmup=off")
    command = ["bench", "-q", "--op", "masked_gather", f"--benchmark-json={file}", *quick]
    # Under pytest-xdist, as its variables tell, pytest-benchmark measures nothing.
    others = ("TRITON_INTERPRET", "PYTEST_XDIST")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text())["benchmarks"]
    names = {bench["params"]["variant"] for bench in found}
    assert {"tapct masked_gather", "eager norm, select"} <= names
    assert all(bench["extra_info"]["relative_error"] < 1e-5 for bench in found)


FAST, SLOW, WRONG = {"wait": 1}, {"wait": 5}, {"wait": 0}


def _fake_op() -> list[torch.Tensor]:
    config = tuning.config_for("fake.kernel", 384, (SLOW, FAST, WRONG))
    tuning.config_for("fake.single", 384, (SLOW,))
    time.sleep(config["wait"] / 1e3)
    return [torch.full((4,), 2.0 if config == WRONG else 1.0)]


def test_the_tuner_takes_the_fastest_of_the_right(tools: SimpleNamespace) -> None:
    expected = [torch.ones(4, dtype=torch.float64)]
    work = tools.harness.Work(
        {"tapct fake": _fake_op}, expected, 1e-5, bytes=32, dtype=torch.float32
    )
    [(launch, found)] = tools.tune.measure(work, "cpu", rounds=3).items()
    assert launch == ("fake.kernel", 384)
    assert set(found.times_ms) == {0, 1}  # the wrong one is out
    assert tools.tune.winner([found.times_ms]) == 1


def test_the_default_stays_where_nothing_is_faster_beyond_the_noise(
    tools: SimpleNamespace,
) -> None:
    winner = tools.tune.winner
    assert winner([{0: (0.9, 1.0, 1.1), 1: (0.8, 0.85, 0.95)}]) == 0
    assert winner([{0: (0.9, 1.0, 1.1), 1: (0.8, 0.8, 0.85)}]) == 1
    assert winner([{0: (1, 1, 1), 1: (0.5, 0.5, 0.5)}, {0: (1, 1, 1)}]) == 0  # wrong in one case
    assert winner([{0: (1, 1, 1), 1: (0.5, 0.5, 0.5)}, {0: (9, 9, 9), 1: (16, 16, 16)}]) == 0


def test_a_table_goes_to_disk_and_back(
    tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned" / "gpu.json"
    table = tools.tune.merge({"b.kernel": {"768": SLOW}}, {("a.kernel", 384): FAST})
    tools.tune.write(path, tools.tune.merge(table, {("b.kernel", 384): FAST}))
    monkeypatch.setattr(tuning, "table_path", lambda: path)
    assert tuning.config_for("b.kernel", 768, (FAST, SLOW)) == SLOW
    assert tuning.config_for("b.kernel", 384, (SLOW, FAST)) == FAST
    assert tuning.config_for("a.kernel", 384, (SLOW, FAST)) == FAST
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_tuner_needs_a_cuda_device(
    tools: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tools.tune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_benches_run_side_by_side_and_are_timed_alone(
    tools: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["masked_gather", "patch_embed"]
    assert tools.main(["run", *names, "--jobs", "2", *TINY_RUN, str(tmp_path / "rows")]) == 0
    out = capsys.readouterr().out
    assert "4 rows measured" in out
    assert out.index("patch_embed: ") < out.index("tapct masked_gather")  # it did not wait for it
    assert tools.main(["run", "--jobs", "0"]) == 2
    assert "--jobs 0" in capsys.readouterr().err

    jobs = importlib.import_module("bench.jobs")
    folder = tmp_path / "jobs"
    folder.mkdir()
    running = jobs.Jobs(folder)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    clock = "import time\nwhile True: print(time.monotonic(), flush=True); time.sleep(0.01)"
    timing = (
        "import time; from bench.jobs import alone; now = time.monotonic\n"
        "with alone(): print(now(), flush=True); time.sleep(1); print(now(), flush=True)"
    )
    beside = running.start([sys.executable, "-c", clock], environment)
    assert beside.stdout.readline()
    alone = running.start([sys.executable, "-c", timing], environment)
    begin, end = (float(alone.stdout.readline()) for _ in range(2))
    running.stop(alone)
    while (last := float(beside.stdout.readline())) < end:
        assert not begin < last < end
    killed = running.start(
        [sys.executable, "-c", timing.replace("sleep(1)", "sleep(99)")], environment
    )
    assert killed.stdout.readline()
    running.stop(killed)  # what it had stopped goes on
    now = time.monotonic()
    while float(beside.stdout.readline()) < now:
        pass
    running.stop_all()
    assert beside.returncode != 0
    assert [path.name for path in folder.iterdir()] == [jobs.LOCK]


def test_a_terminated_run_leaves_no_bench_behind(tmp_path: Path) -> None:
    """``timeout`` and ``kill`` reach only the command; its bench is a group of its own."""
    run = subprocess.Popen(
        [sys.executable, "-m", "bench", "run", "masked_gather", *TINY_RUN, str(tmp_path / "rows")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def children() -> list[int]:
        tasks = Path(f"/proc/{run.pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]

    assert run.stdout is not None
    assert any(line.startswith("masked_gather: ") for line in run.stdout)
    deadline = time.monotonic() + 60
    while not (benches := children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert benches
    run.terminate()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "with --missing the same command goes on" in said
    assert not any(Path(f"/proc/{child}").exists() for child in benches)

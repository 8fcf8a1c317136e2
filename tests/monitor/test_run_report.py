"""The page of a run: what stands on it, and that a browser shows it and keeps up with the run."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Browser

from tapct_fast.monitor import run_report
from tapct_fast.monitor.record import Record
from tapct_fast.monitor.run_report import PAGE, RunReport, render_run_report
from tapct_fast.train.loop import train

PROBES = [
    {"step": 60, "linear": 0.5, "linear_low": 0.46, "linear_high": 0.55, "knn": 0.45, "seconds": 9},
    {"step": 80, "skipped": "the probe of step 60 was still at work"},
    {"step": 90, "error": "<b>no labels</b>"},
    {"step": 99, "linear": 0.6, "linear_low": None, "linear_high": None, "knn": 0.5, "seconds": 9},
]


def test_the_page_says_how_the_run_is_and_shows_every_number(steady: Record) -> None:
    page = render_run_report(steady._replace(probes=PROBES), is_running=True)
    assert "Healthy at step 100 of 400" in page
    assert "of 400, 6:40 to go" in page
    for text in (
        "uniform: ln 128 = 4.85",
        "clip: 3",
        "effective_rank",
        "0.46 to 0.55",
        "width 128",
    ):
        assert text in page
    numbers = [k for k in steady.rows[0] if k.startswith(("grad", "teacher_e", "proto", "koleo_d"))]
    shown = {name.replace("_", " ") for name in numbers if not name.endswith("_share")}
    assert all(name in page.replace("_", " ") for name in shown)
    assert "&lt;b&gt;no labels" in page
    assert "<b>no labels" not in page


def test_a_sick_run_is_red_and_says_why_on_top(steady: Record) -> None:
    rows = [{**row, "effective_rank": 1.0} for row in steady.rows]
    page = render_run_report(steady._replace(rows=rows), is_running=True)
    assert "Not healthy at step 100 of 400: 1 problem" in page
    assert re.search(r"\.lead\{border-left-color:#b91c1c", page)
    assert page.index("features have collapsed") < page.index("<h2>Losses")


def test_the_page_refers_to_nothing_outside_and_reloads_only_while_the_run_goes_on(
    steady: Record,
) -> None:
    page = render_run_report(steady, is_running=True)
    assert page.count("<script>") == 1
    assert "location.reload()" in page
    assert not re.search(r"https?:|@import|url\(|file:|src=", page)
    ended = render_run_report(steady, is_running=False)
    assert "<script" not in ended
    assert "Not finished" in ended
    done = dataclasses.replace(steady.config.train, num_steps=100)
    config = dataclasses.replace(steady.config, train=done)
    assert "Finished" in render_run_report(steady._replace(config=config), is_running=False)


def test_a_page_without_rows_or_with_broken_numbers_is_a_page(steady: Record) -> None:
    assert "No step has been logged" in render_run_report(steady._replace(rows=[]), is_running=True)
    rows = [{**row, "loss": math.nan, "koleo": math.inf} for row in steady.rows[:1]]
    assert "not a finite number" in render_run_report(steady._replace(rows=rows), is_running=True)


def test_records_beside_the_rows_may_be_of_any_kind(steady: Record) -> None:
    incidents = [
        {"kind": "skip", "step": 1200, "cause": "<b>not finite</b>", "checkpoint": ""},
        {"kind": "roll back", "step": 1300, "cause": "many", "checkpoint": "step-00001000"},
        {"step": 1400, "checkpoint": None},
    ]
    sessions = [{"step": 0}, {"step": 70, "num_scans": "many", "environment": 3, "store": "<i>"}]
    record = steady._replace(incidents=incidents, sessions=sessions, num_damaged=2)
    page = render_run_report(record, is_running=False)
    text = re.sub(r"(<[^>]+>)+", "|", page)
    assert "|1,200|skipped|&lt;b&gt;not finite&lt;/b&gt;|the start|" in text
    assert "|1,300|went back|many|step 1,000|" in text
    assert "fingerprint &lt;i&gt;" in text
    assert "|scans|not recorded|" in text


def test_the_page_of_a_long_run_stays_small(steady: Record) -> None:
    rows = [{**steady.rows[0], "step": n, "koleo": math.sin(n)} for n in range(1, 12501)]
    page = render_run_report(steady._replace(rows=rows), is_running=True)
    assert len(page) < 1_000_000


def test_an_observed_run_leaves_a_page_of_its_end(
    store: Path, healthy: Record, tmp_path: Path
) -> None:
    short = dataclasses.replace(healthy.config.train, num_steps=3, checkpoint_every=2)
    config = dataclasses.replace(healthy.config, train=short)
    train(config, store, tmp_path, device="cpu", observers=[RunReport(tmp_path, config)])
    page = (tmp_path / PAGE).read_text()
    assert "at step 3 of 3" in page
    assert "<script" not in page


def test_it_is_written_at_most_every_ten_seconds_and_knows_the_rows_of_a_resumed_run(
    tmp_path: Path, steady: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps(row) + "\n" for row in steady.rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:50]))
    page, observer = tmp_path / PAGE, RunReport(tmp_path, steady.config)
    observer.logged(steady.rows[49])
    assert "at step 50 of" in page.read_text()
    observer.logged(steady.rows[50])
    assert "at step 50 of" in page.read_text()
    later = time.monotonic() + 11
    monkeypatch.setattr(run_report.time, "monotonic", lambda: later)
    observer.logged(steady.rows[51])
    text = page.read_text()
    assert "at step 52 of" in text
    assert "step 1," not in text
    observer.logged(steady.rows[52])
    observer.close()
    assert "Not finished" in page.read_text()
    assert "at step 53 of" in page.read_text()


def test_a_page_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, steady: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    observer = RunReport(tmp_path / "gone", steady.config)
    for row in steady.rows[:2]:
        observer.logged(row)
    observer.close()
    assert capsys.readouterr().err.count("is not written any more: No such file") == 1


def faster(page: str) -> str:
    assert "10000)" in page
    return page.replace("10000)", "300)")


SHOWS: Callable[[int], str] = "document.body?.innerText.includes('at step {} of 400')".format


def test_a_browser_draws_the_page_follows_the_run_and_stops_at_its_end(
    browser: Browser, tmp_path: Path, steady: Record
) -> None:
    path = tmp_path / PAGE
    young = steady._replace(rows=steady.rows[:60], probes=PROBES[:1])
    path.write_text(faster(render_run_report(young, is_running=True)))
    browser("Runtime.enable")
    browser("Page.navigate", url=path.as_uri())
    browser.wait(SHOWS(60))
    # Every picture has a size, and nothing is wider than the window.
    sizes = browser.value(
        "[...document.querySelectorAll('.curves svg')].map(s=>s.getBoundingClientRect().height)"
    )
    assert len(sizes) >= 18
    assert min(sizes) > 100
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    browser.value("scrollTo(0, 500)")

    path.write_text(faster(render_run_report(steady, is_running=True)))
    browser.wait(SHOWS(100))
    browser.wait("scrollY == 500")

    path.write_text(render_run_report(steady, is_running=False))
    browser.wait("document.body?.innerText.includes('Not finished')")
    browser.value("window.isSame = true")
    time.sleep(1)
    assert browser.value("window.isSame && scrollY") == 500

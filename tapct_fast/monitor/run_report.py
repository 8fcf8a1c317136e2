"""``report.html`` of a run: one page without anything outside it, rewritten as the run goes on.

The verdict stands on top, in words; below it every number over the steps, then what a reader needs
to do the run again: skipped steps, starts, settings, data, environment and hashes. While the run
goes on the page loads itself anew; the browser keeps the place.
"""

import html
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tapct_fast.config import Config
from tapct_fast.io.atomic import write_atomic
from tapct_fast.monitor.checks import Finding, percent
from tapct_fast.monitor.curves import (
    dice_interval,
    health_curves,
    loss_curves,
    optimisation_curves,
    probe_curves,
    scored,
    speed_curves,
)
from tapct_fast.monitor.losses import head_losses
from tapct_fast.monitor.record import Record, Row, column, latest, read_rows, record_beside
from tapct_fast.monitor.run_settings import settings_html
from tapct_fast.monitor.verdict import headline, judge, worst
from tapct_fast.monitor.watch import duration
from tapct_fast.report import Table, curves_html, facts_list, render_page, table_html
from tapct_fast.train.log import METRICS, notify

PAGE = "report.html"
EVERY_SECONDS = 10.0
MOST_OF_A_RUN = 0.01  # of its time goes into the page
MAX_LISTED = 100  # skipped steps; incidents.jsonl has them all


class RunReport:
    """An observer that keeps the page of a run up to date.

    Args:
        directory: The run's folder.
        config: The run.
    """

    def __init__(self, directory: Path, config: Config) -> None:
        self._directory = directory
        self._config = config
        self._rows: list[Row] = []
        self._next = 0.0
        self._can_write = True

    def logged(self, row: Mapping[str, Any]) -> None:
        """Take a row, and write the page if it is time."""
        if self._rows:
            self._rows.append(dict(row))
        else:  # of a resumed run there are earlier ones; this one is among them
            self._rows = read_rows(self._directory / METRICS)
        now = time.monotonic()
        if now >= self._next:
            self._write(is_running=True)
            took = time.monotonic() - now
            self._next = now + max(EVERY_SECONDS, took / MOST_OF_A_RUN)

    def saved(self, step: int, folder: Path) -> None:
        """Checkpoints are read when the page is written."""

    def close(self) -> None:
        """Write the page a last time; it loads itself no more."""
        self._write(is_running=False)

    def _write(self, *, is_running: bool) -> None:
        if not self._can_write:
            return
        record = record_beside(self._directory, self._config, self._rows)
        try:
            write_run_report(self._directory, record, is_running=is_running)
        except OSError as error:  # the run matters more than its page
            self._can_write = False
            notify(f"{PAGE} is not written any more: {error.strerror}")


def write_run_report(directory: Path, record: Record, *, is_running: bool = False) -> Path:
    """Write the page of a run into its folder; see ``render_run_report``.

    Raises:
        OSError: The folder cannot be written.
    """
    page = render_run_report(record, is_running=is_running)
    write_atomic(directory / PAGE, page.encode())
    return directory / PAGE


def render_run_report(record: Record, *, is_running: bool) -> str:
    """Return the page as HTML.

    Args:
        record: The run so far.
        is_running: Whether the page shall load itself anew.
    """
    findings = judge(record)
    sections = [
        ("Verdict", _state(record, is_running=is_running), _findings(findings)),
        (
            "Losses",
            "Every logged step in light blue, a running mean in blue. The dashed line is the loss "
            "of a student whose output says nothing; iBOT is per masked token.",
            curves_html(loss_curves(record)),
        ),
        (
            "Targets and features",
            "What the teacher asks for, and how its features lie. docs/health.md says what a "
            "healthy curve looks like.",
            curves_html(health_curves(record)),
        ),
        (
            "Probe",
            "Mean Dice of frozen features on the labelled scans, cross-validated over them.",
            _probes(record),
        ),
        (
            "Optimisation",
            "Gradient norms before the clip; the schedules.",
            curves_html(optimisation_curves(record)),
        ),
        ("Speed", "", curves_html(speed_curves(record)) + facts_list(_speed_facts(record))),
        (
            "Skipped steps",
            "A step whose loss or gradient was not finite, or a spike, changed nothing; behind too "
            "many in a row the run went back to a checkpoint. tapct-fast replay does one again.",
            _incidents(record.incidents),
        ),
        (
            "Starts",
            "Every call of tapct-fast train on this run. A resumed run gives the numbers of one "
            "that was never stopped.",
            _sessions(record.sessions),
        ),
        ("Settings", "", settings_html(record.config)),
        ("Data and hashes", "", facts_list(_data_facts(record)) + _checkpoints(record)),
        ("Environment", "Of the last start.", _environment_of_last(record.sessions)),
        ("What this is not", "", _LIMITS),
    ]
    color = {"ok": "#15803d", "warn": "#b45309", "bad": "#b91c1c"}[worst(findings)]
    return render_page(
        "Training run",
        headline(record, findings),
        _tiles(record),
        sections,
        style=f"{_STYLE}.lead{{border-left-color:{color};color:{color}}}",
        script=_SCRIPT if is_running else "",
    )


# A reload keeps the place by itself; a page that nobody looks at need not load.
_SCRIPT = f"setInterval(()=>document.hidden||location.reload(),{1000 * EVERY_SECONDS:.0f})"


def _state(record: Record, *, is_running: bool) -> str:
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if is_running:
        return f"Written at {written}; a run at work writes this page anew every few seconds."
    if record.is_finished:
        return f"Finished; written at {written}."
    return f"Not finished at {written}; the same tapct-fast train command goes on."


def _findings(findings: Sequence[Finding]) -> str:
    t = html.escape
    items = "".join(
        f'<li class="{f.severity}"><b>{t(f.about)}</b><span>{t(f.text)}</span>'
        f"<small>{t(f.rule)}</small></li>"
        for f in findings
    )
    return f'<ul class="verdict">{items}</ul>' if items else ""


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    rows, num_steps = record.rows, record.config.train.num_steps
    if record.is_finished:
        remark = "finished"
    elif record.eta_seconds is None:
        remark = f"of {num_steps:,}"
    else:
        remark = f"of {num_steps:,}, {duration(record.eta_seconds)} to go"
    tiles = [("step", f"{record.step:,}", remark)]
    for loss in head_losses(record.config, rows[-10:]):
        if not loss.value_N:
            continue
        uniform = f"uniform {loss.uniform:.2f}"
        tiles.append((loss.title, f"{sum(loss.value_N) / len(loss.value_N):.2f}", uniform))
    rank, rate, wait = (
        latest(rows, name) for name in ("effective_rank", "samples_per_s", "data_wait")
    )
    if rank is not None:
        tiles.append(("effective rank", f"{rank:.1f}", "1 is collapse"))
    if rate is not None and wait is not None:
        tiles.append(("samples per second", f"{rate:.3g}", f"data wait {percent(wait)}"))
    if probes := scored(record.probes):
        last = probes[-1]
        tiles.append(("Dice, linear probe", f"{last['linear']:.2f}", f"at step {last['step']:,}"))
    return tiles


def _probes(record: Record) -> str:
    columns = ("step", "linear, 95 % interval", "kNN, 95 % interval", "took", "remark")
    rows = [
        (
            f"{row['step']:,}",
            dice_interval(row, "linear"),
            dice_interval(row, "knn"),
            f"{row['seconds']:.0f} s" if "seconds" in row else None,
            str(row.get("error") or row.get("skipped") or ""),
        )
        for row in reversed(record.probes)
    ]
    return curves_html(probe_curves(record)) + table_html(Table("", columns, rows))


def _speed_facts(record: Record) -> list[tuple[str, str]]:
    step_N, rate_N = column(record.rows, "samples_per_s")
    if not rate_N.size or not rate_N.min() > 0:
        return []
    size = record.config.train.batch_size
    low, middle, high = np.percentile(rate_N, (5, 50, 95))
    seconds = float((np.diff(step_N, prepend=0) * size / rate_N).sum())
    return [
        ("samples per second", f"{middle:.3g}, 90 % of the rows {low:.3g} to {high:.3g}"),
        ("samples seen", f"{record.step * size:,}"),
        ("time in steps", f"{duration(seconds)}, start-ups left out"),
    ]


def _incidents(incidents: Sequence[Row]) -> str:
    rows = [
        (
            f"{row['step']:,}",
            "went back" if row.get("kind") == "roll back" else "skipped",
            str(row.get("cause", "")),
            _place(str(row.get("checkpoint", ""))),
        )
        for row in reversed(incidents[-MAX_LISTED:])
    ]
    rest = len(incidents) - MAX_LISTED
    remark = f"{rest:,} earlier ones are in incidents.jsonl." if rest > 0 else ""
    return table_html(Table("", ("step", "what", "cause", "replayed from"), rows, remark))


def _place(checkpoint: str) -> str:
    found = re.fullmatch(r"step-(\d+)", checkpoint)
    return f"step {int(found[1]):,}" if found else "the start"


def _sessions(sessions: Sequence[Row]) -> str:
    rows = [
        (
            str(row.get("started", "")),
            f"step {row['step']:,}" if row["step"] else "the start",
            str(row.get("backend", "")),
            _of(row, "tapct-fast"),
            _of(row, "torch"),
        )
        for row in reversed(sessions)
    ]
    return table_html(Table("", ("when", "from", "on", "tapct-fast", "torch"), rows))


def _of(session: Row, name: str) -> str | None:
    return dict(_environment(session)).get(name)


def _data_facts(record: Record) -> list[tuple[str, str]]:
    if not record.sessions:
        return []
    last = record.sessions[-1]
    damaged = f", {record.num_damaged:,} of them damaged" if record.num_damaged else ""
    num = last.get("num_scans")
    facts = [("scans", f"{num:,}{damaged}" if isinstance(num, int) else "not recorded")]
    facts.append(("store", f"fingerprint {last.get('store') or 'unknown'}"))
    for key, name in (("start_sha256", "started from"), ("guide_sha256", "guided by")):
        if last.get(key):
            facts.append((name, f"weights of sha256 {last[key]}"))
    return facts


def _checkpoints(record: Record) -> str:
    rows = [
        (f"{saved.step:,}", saved.teacher_sha256, saved.manifest_sha256)
        for saved in reversed(record.checkpoints)
    ]
    remark = (
        "Every checkpoint was read back and compared with its manifest before it took its name; "
        "manifest.json holds the hash of every other file of it."
    )
    columns = ("step", "sha256 of teacher.safetensors", "sha256 of manifest.json")
    return f'<div class="hashes">{table_html(Table("Checkpoints", columns, rows, remark))}</div>'


def _environment_of_last(sessions: Sequence[Row]) -> str:
    return facts_list(_environment(sessions[-1])) if sessions else ""


def _environment(session: Row) -> list[tuple[str, str]]:
    found = session.get("environment")
    facts = {"backend": session.get("backend", ""), **(found if isinstance(found, dict) else {})}
    return [(name, str(value)) for name, value in facts.items()]


_LIMITS = (
    '<ul class="limits"><li>The verdict knows the failures it was written for. A run without a '
    "finding can still be of little use: the probe, on scans of your own, says more than any other "
    "number here.</li><li>Thresholds come from small runs on a CPU and from public reports of 2D "
    "runs; they are not calibrated on long runs on CT.</li><li>The numbers are those of one step "
    "and one rank. Not a medical device; not for diagnosis.</li></ul>"
)

_STYLE = """
main{max-width:1320px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.lead{border-left:5px solid;padding:2px 0 2px 14px;font-weight:600}
.verdict{list-style:none;margin:0;padding:0;font-size:14px}
.verdict li{display:grid;grid-template-columns:140px 1fr;gap:2px 14px;padding:5px 12px;
border-bottom:1px solid var(--faint);border-left:4px solid #86c99b}
.verdict small{color:var(--soft)}
.verdict b{font-weight:500}
.verdict li.warn,.verdict li.bad{padding-block:10px}
.verdict li.warn{border-left-color:#d97706;background:#fffbeb}
.verdict li.bad{border-left-color:#dc2626;background:#fef2f2}
.verdict li.warn b,.verdict li.bad b{font-weight:650}
.verdict li.warn small,.verdict li.bad small{grid-column:2}
@media (min-width:900px){.verdict li.ok{grid-template-columns:140px minmax(0,5fr) minmax(0,6fr)}}
.curves{margin-bottom:20px;grid-template-columns:repeat(auto-fill,minmax(380px,1fr))}
@media (max-width:640px){.curves{grid-template-columns:1fr}}
"""

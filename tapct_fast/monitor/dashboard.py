"""``dashboard.html`` of a run: one page without anything outside it, rewritten as the run goes on.

The verdict stands on top, in words; below it every number over the steps. While the run goes on the
page loads itself anew; the browser keeps the place.
"""

import html
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tapct_fast import __version__
from tapct_fast.config import Config
from tapct_fast.io.atomic import write_atomic
from tapct_fast.monitor.checks import DATA_WAIT, Finding, percent
from tapct_fast.monitor.losses import head_losses
from tapct_fast.monitor.record import Record, Row, column, latest, read_probes, read_rows
from tapct_fast.monitor.verdict import headline, judge, worst
from tapct_fast.monitor.watch import duration
from tapct_fast.report import Curve, curves_html, facts_list, render_page
from tapct_fast.ssl.health import MEANINGS
from tapct_fast.train.log import METRICS, notify

PAGE = "dashboard.html"
EVERY_SECONDS = 10.0
MOST_OF_A_RUN = 0.01  # of its time goes into the page


class Dashboard:
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
        """A checkpoint is not on the page."""

    def close(self) -> None:
        """Write the page a last time; it loads itself no more."""
        self._write(is_running=False)

    def _write(self, *, is_running: bool) -> None:
        if not self._can_write:
            return
        record = Record(self._config, self._rows, read_probes(self._directory))
        page = render_dashboard(record, is_running=is_running)
        try:
            write_atomic(self._directory / PAGE, page.encode())
        except OSError as error:  # the run matters more than its page
            self._can_write = False
            notify(f"{PAGE} is not written any more: {error.strerror}")


def render_dashboard(record: Record, *, is_running: bool) -> str:
    """Return the page as HTML.

    Args:
        record: The run so far.
        is_running: Whether the page shall load itself anew.
    """
    findings = judge(record)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if is_running:
        state = f"Written at {written}; a run at work writes this page anew every few seconds."
    elif record.is_finished:
        state = f"Finished; written at {written}."
    else:
        state = f"Stopped at {written}; the same tapct-fast train command goes on."
    config, rows = record.config, record.rows
    sections = [
        ("Verdict", state, _findings(findings)),
        (
            "Losses",
            "Every logged step in light blue, a running mean in blue. The dashed line is the loss "
            "of a student whose output says nothing; iBOT is per masked token.",
            curves_html(
                [
                    *(loss.curve() for loss in head_losses(config, rows)),
                    *_curves(rows, [("koleo", "KoLeo")]),
                ]
            ),
        ),
        (
            "Targets and features",
            "What the teacher asks for, and how its features lie. docs/health.md says what a "
            "healthy curve looks like.",
            curves_html(_health_curves(config, rows)),
        ),
        (
            "Probe",
            "Mean Dice of frozen features on the labelled scans, cross-validated over them.",
            _probes(record.probes),
        ),
        (
            "Optimisation",
            "Gradient norms before the clip; the schedules.",
            curves_html([*_norm_curves(config, rows), *_curves(rows, _SCHEDULES)]),
        ),
        ("Speed", "", curves_html(_speed_curves(rows))),
        ("Run", "", facts_list(_facts(config))),
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

_SCHEDULES = (
    ("lr", "learning rate"),
    ("weight_decay", "weight decay"),
    ("momentum", "teacher momentum"),
    ("teacher_temp", "teacher temperature"),
)


def _curves(rows: Sequence[Row], names: Iterable[tuple[str, str]]) -> list[Curve]:
    return [_curve(rows, name, title) for name, title in names if name in rows[-1]] if rows else []


def _curve(
    rows: Sequence[Row], name: str, title: str, level: float | None = None, level_text: str = ""
) -> Curve:
    step_N, value_N = column(rows, name)
    return Curve(title, step_N.tolist(), value_N.tolist(), level, level_text)


def _health_curves(config: Config, rows: Sequence[Row]) -> list[Curve]:
    curves = []
    heads = {"dino": config.heads.dino, "ibot": config.heads.ibot or config.heads.dino}
    for name, meaning in MEANINGS.items():
        # The share is the same curve.
        if not rows or name not in rows[-1] or name.endswith("_share"):
            continue
        head = name.rpartition("_")[2]
        if name.startswith("teacher_entropy"):
            num = heads[head].num_prototypes
            level, text = math.log(num), f"uniform: ln {num} = {math.log(num):.2f}"
            curve = _curve(rows, name, name, level, text)
        else:
            curve = _curve(rows, name, name)
        curves.append(curve._replace(remark=meaning))
    return curves


def _norm_curves(config: Config, rows: Sequence[Row]) -> list[Curve]:
    if not rows:
        return []
    clip = config.optim.clip_norm
    return [
        _curve(rows, name, name.replace("_", " "), clip, f"clip: {clip:g}")
        for name in rows[-1]
        if name.startswith("grad_norm_")
    ]


def _speed_curves(rows: Sequence[Row]) -> list[Curve]:
    if not rows:
        return []
    return [
        _curve(rows, "samples_per_s", "samples per second"),
        _curve(
            rows,
            "data_wait",
            "share of the time that waits for data",
            DATA_WAIT,
            f"look at it: {percent(DATA_WAIT)}",
        ),
    ]


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
    scored = [row for row in record.probes if isinstance(row.get("linear"), int | float)]
    if scored:
        last = scored[-1]
        tiles.append(("Dice, linear probe", f"{last['linear']:.2f}", f"at step {last['step']:,}"))
    return tiles


def _probes(probes: Sequence[Row]) -> str:
    if not probes:
        return ""
    scored = [row for row in probes if isinstance(row.get("linear"), int | float)]
    curves = [
        _curve(scored, kind, title)._replace(interval_N2=[_interval(row, kind) for row in scored])
        for kind, title in (("linear", "Dice, linear head"), ("knn", "Dice, kNN"))
    ]
    names = ("step", "linear, 95 % interval", "kNN, 95 % interval", "took", "remark")
    heads = "".join(f"<th>{name}</th>" for name in names)
    lines = "".join(
        f'<tr><td class="number">{row["step"]:,}</td>{_dice(row, "linear")}{_dice(row, "knn")}'
        f'<td class="number">{_seconds(row)}</td>'
        f"<td>{html.escape(str(row.get('error') or row.get('skipped') or ''))}</td></tr>"
        for row in reversed(probes)
    )
    return (
        f'{curves_html(curves)}<table class="probes"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table>"
    )


def _seconds(row: Row) -> str:
    return f"{row['seconds']:.0f} s" if "seconds" in row else ""


def _interval(row: Row, kind: str) -> tuple[float, float]:
    low, high = (row.get(f"{kind}_{end}") for end in ("low", "high"))
    return (math.nan, math.nan) if low is None or high is None else (low, high)


def _dice(row: Row, kind: str) -> str:
    mean, low, high = (row.get(name) for name in (kind, f"{kind}_low", f"{kind}_high"))
    if mean is None:
        return "<td></td>"
    spread = "" if low is None else f" <small>{low:.3f} to {high:.3f}</small>"
    return f'<td class="number"><b>{mean:.3f}</b>{spread}</td>'


def _facts(config: Config) -> list[tuple[str, str]]:
    vit, heads, train = config.vit, config.heads, config.train
    schedule, losses = config.schedule, config.losses
    views = config.views
    ibot = "shared" if heads.ibot is None else f"{heads.ibot.num_prototypes:,}"
    return [
        ("tapct_fast", __version__),
        (
            "backbone",
            f"width {vit.dim}, {vit.depth} blocks, patches of {vit.patch_zyx} voxels (z, y, x)",
        ),
        ("prototypes", f"DINO {heads.dino.num_prototypes:,}, iBOT {ibot}"),
        (
            "views",
            f"{views.global_views.num} of {views.global_views.size_zyx} voxels, "
            f"{views.local_views.num} of {views.local_views.size_zyx}",
        ),
        (
            "steps",
            f"{train.num_steps:,} of {train.batch_size} samples, seed {train.seed}, a checkpoint "
            f"every {train.checkpoint_every:,}, a row every {train.log_every}",
        ),
        (
            "learning rate",
            f"base {schedule.base_lr:g}, warm-up {schedule.warmup_steps:,} steps, last layer "
            f"frozen for {schedule.freeze_last_layer_steps:,}",
        ),
        (
            "losses",
            f"DINO {losses.dino_weight:g}, iBOT {losses.ibot_weight:g}, KoLeo "
            f"{losses.koleo_weight:g}; centering {losses.centering}",
        ),
    ]


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
.probes td:nth-child(2){color:inherit}
@media (max-width:640px){.curves{grid-template-columns:1fr}}
"""

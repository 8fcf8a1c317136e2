"""One HTML file that shows a run: scans beside their features, loss curves, probe scores.

The file stands alone: images are inline PNG, curves are inline SVG, there is no script and no
reference to anything outside. It carries only what the ``Report`` carries; scans are named by their
number, never by a path. Shape letters: Y X pixels, N values, C channels.
"""

import base64
import html
import math
import os
import platform
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast import __version__
from tapct_fast.io.atomic import write_atomic

MAX_POINTS = 800  # of a drawn line: two per pixel column of the picture

Pixels = NDArray[np.uint8]
Rgb = tuple[int, int, int]


class Panel(NamedTuple):
    """One picture: ``rgb_YXC`` uint8, shown at the proportions of ``size_mm`` (height, width)."""

    caption: str
    rgb_YXC: Pixels
    size_mm: tuple[float, float]


class Figure(NamedTuple):
    """Pictures of one scan, row by row."""

    title: str
    rows: Sequence[Sequence[Panel]]


class Curve(NamedTuple):
    """One number over the steps.

    ``uniform`` is drawn as a dashed line: of a loss, its value for a student that knows nothing; of
    another number, a value to be told from. ``interval_N2`` has the ends of each value's interval,
    NaN where there is none.
    """

    title: str
    step_N: Sequence[int]
    value_N: Sequence[float]
    uniform: float | None = None
    uniform_text: str = ""
    remark: str = ""
    interval_N2: Sequence[tuple[float, float]] = ()


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


class Table(NamedTuple):
    """Rows below named columns; all text is plain and is escaped when it is written.

    A number stands right-aligned in its column, an ``Interval`` with its ends, None as a dash.
    """

    title: str  # "" for none
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Interval | float | int | None]]
    remark: str = ""


class Score(NamedTuple):
    """One row of the probe table; ``beside`` says what it is to be told from."""

    name: str
    beside: str
    color: Rgb
    trained: Interval
    untrained: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything the page shows; all text is escaped when it is written."""

    title: str
    lead: str
    tiles: Sequence[tuple[str, str, str]]  # name, value, remark
    figures_text: str
    figures: Sequence[Figure]
    legend: Sequence[tuple[str, Rgb]]
    curves_text: str
    curves: Sequence[Curve]
    scores_text: str
    scores: Sequence[Score]
    stages: Sequence[tuple[str, float]]  # name, seconds
    facts: Sequence[tuple[str, str]]
    limits: Sequence[str]


def png(rgb_YXC: Pixels) -> bytes:
    """Encode (Y, X, 3) uint8 as PNG (8-bit RGB, no filter)."""
    height, width, _ = rgb_YXC.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # every row starts with its filter type, 0
    rows[:, 1:] = rgb_YXC.reshape(height, 3 * width)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 9)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def write_report(path: Path, report: Report) -> None:
    """Write the page; the file appears whole or not at all."""
    write_atomic(path, render_report(report).encode())


def render_report(report: Report) -> str:
    """Return the page as HTML."""
    limits = "".join(f"<li>{html.escape(limit)}</li>" for limit in report.limits)
    sections = [
        (
            "Features",
            report.figures_text,
            figures_html(report.figures) + legend_html(report.legend),
        ),
        ("Training", report.curves_text, curves_html(report.curves)),
        ("Linear probe", report.scores_text, _scores(report.scores)),
        ("Run", "", _stages(report.stages) + facts_list(report.facts)),
        ("What this is not", "", f'<ul class="limits">{limits}</ul>'),
    ]
    return render_page(report.title, report.lead, report.tiles, sections)


def render_page(
    title: str,
    lead: str,
    tiles: Sequence[tuple[str, str, str]],
    sections: Sequence[tuple[str, str, str]],
    *,
    style: str = "",
    script: str = "",
) -> str:
    """Return a page in the house's one look.

    Args:
        title: Plain text.
        lead: Plain text: what the page is about.
        tiles: Name, value and remark of each number at the top; plain text.
        sections: Title and text (plain), and content (HTML) of each; one without content is left
            out.
        style: CSS that follows the house's.
        script: JavaScript, for a page that must act by itself.
    """
    t = html.escape
    boxes = "".join(
        f'<div class="tile"><span>{t(name)}</span><b>{t(value)}</b><small>{t(remark)}</small></div>'
        for name, value, remark in tiles
    )
    body = "".join(
        f"<section><h2>{t(name)}</h2>{f'<p>{t(text)}</p>' if text else ''}{content}</section>"
        for name, text, content in sections
        if content
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{t(title)}</title><style>{_STYLE}{style}</style></head><body><main>"
        f'<header><h1>{t(title)}</h1><p class="lead">{t(lead)}</p>'
        f'<div class="tiles">{boxes}</div></header>{body}</main>'
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def _css(color: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def figures_html(figures: Sequence[Figure]) -> str:
    """Return figures as HTML, their pictures inside."""
    parts = []
    for figure in figures:
        # Panels of one kind share a width, so that millimetres compare down a column.
        rows = "".join(f'<div class="row">{"".join(map(_panel, row))}</div>' for row in figure.rows)
        parts.append(f'<div class="scan"><h3>{html.escape(figure.title)}</h3>{rows}</div>')
    return "".join(parts)


def _panel(panel: Panel) -> str:
    data = base64.b64encode(png(panel.rgb_YXC)).decode()
    height, width = panel.size_mm
    caption = html.escape(panel.caption)
    return (
        f'<figure><img alt="{caption}" style="aspect-ratio:{width:g}/{height:g}" '
        f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def legend_html(legend: Sequence[tuple[str, Rgb]]) -> str:
    """Return names (plain text) beside their colours as HTML."""
    items = "".join(
        f'<span><i style="background:{_css(color)}"></i>{html.escape(name)}</span>'
        for name, color in legend
    )
    return f'<p class="legend">{items}</p>' if items else ""


def curves_html(curves: Sequence[Curve]) -> str:
    """Return curves as HTML, drawn inside."""
    return '<div class="curves">' + "".join(map(_curve, curves)) + "</div>" if curves else ""


def _curve(curve: Curve) -> str:
    """Draw one number as SVG: every step thin, a running mean on top, the level dashed.

    A long run is thinned to as many points as the picture has room for, extremes kept.
    """
    width, height, left, right, top, bottom = 480, 250, 48, 14, 22, 34
    step_N, value_N = np.asarray(curve.step_N, float), np.asarray(curve.value_N, float)
    is_number_N = np.isfinite(value_N)
    step_N, value_N = step_N[is_number_N], value_N[is_number_N]
    if not value_N.size:
        return ""
    interval_N2 = np.full((is_number_N.size, 2), np.nan)
    if curve.interval_N2:
        interval_N2 = np.asarray(curve.interval_N2, float)
    interval_N2 = interval_N2[is_number_N]
    levels = [] if curve.uniform is None else [curve.uniform]
    seen_N = np.concatenate([value_N, levels, interval_N2[np.isfinite(interval_N2)]])
    pad = 0.06 * (float(np.ptp(seen_N)) or 1.0)
    low, high = float(seen_N.min()) - pad, float(seen_N.max()) + pad
    last = float(step_N.max()) or 1.0

    def at_x(step: float) -> float:
        return left + (width - left - right) * step / last

    def at_y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    def line(value_N: NDArray[np.float64], kind: str) -> str:
        at_N = _extremes(value_N, MAX_POINTS)
        pairs = zip(step_N[at_N], value_N[at_N], strict=True)
        points = " ".join(f"{at_x(s):.1f},{at_y(v):.1f}" for s, v in pairs)
        return f'<polyline class="{kind}" points="{points}"/>'

    parts = []
    for tick in _ticks(low, high):
        y = at_y(tick)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(0, last):
        x = f"{at_x(tick):.1f}"
        parts.append(f'<text x="{x}" y="{height - 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 2}" text-anchor="middle">step</text>'
    )
    parts += [
        f'<line class="interval" x1="{at_x(step):.1f}" x2="{at_x(step):.1f}" '
        f'y1="{at_y(start):.1f}" y2="{at_y(end):.1f}"/>'
        for step, (start, end) in zip(step_N, interval_N2, strict=True)
        if np.isfinite(start + end)
    ]
    parts += [line(value_N, "raw"), line(_running_mean(value_N), "mean")]
    if curve.uniform is not None:
        y = at_y(curve.uniform)
        parts.append(
            f'<line class="uniform" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="uniform" x="{width - right}" y="{y - 6:.1f}" text-anchor="end">'
            f"{html.escape(curve.uniform_text)}</text>"
        )
    title = html.escape(curve.title)
    remark = f"<small>{html.escape(curve.remark)}</small>" if curve.remark else ""
    return (
        f"<figure><figcaption>{title}{remark}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _extremes(value_N: NDArray[np.float64], most: int) -> NDArray[np.intp]:
    """Return the places of at most ``most`` values: the lowest and the highest of equal parts."""
    if value_N.size <= most:
        return np.arange(value_N.size)
    parts = np.array_split(np.arange(value_N.size), most // 2)
    ends = [(p[value_N[p].argmin()], p[value_N[p].argmax()]) for p in parts]
    return np.unique(np.array(ends))


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round values within a range."""
    step = 10 ** np.floor(np.log10((high - low) / 3))
    step *= next(m for m in (5, 2, 1) if m * step <= (high - low) / 3)
    return [
        round(float(i * step), 10) for i in range(int(np.ceil(low / step)), int(high / step) + 1)
    ]


def _running_mean(value_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over a centred window of a twelfth of the run, shorter at the ends."""
    reach = max(1, value_N.size // 24)
    total_N = np.concatenate([[0.0], np.cumsum(value_N)])
    at_N = np.arange(value_N.size)
    reach_N = np.minimum(reach, np.minimum(at_N, value_N.size - 1 - at_N))
    mean_N: NDArray[np.float64] = (total_N[at_N + reach_N + 1] - total_N[at_N - reach_N]) / (
        2 * reach_N + 1
    )
    return mean_N


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = "".join(
        f'<tr><td><i style="background:{_css(score.color)}"></i>{html.escape(score.name)}</td>'
        f"<td>{html.escape(score.beside)}</td>{_interval(score.untrained)}{_interval(score.trained)}"
        f'<td class="bar">{_whiskers(score)}</td></tr>'
        for score in scores
    )
    return (
        '<table class="scores"><thead><tr><th>score</th><th>same HU as</th><th>untrained</th>'
        '<th>trained</th><th class="bar"><span class="zero">0</span><span class="one">1</span>'
        f"</th></tr></thead><tbody>{rows}</tbody></table>"
        '<p class="legend"><span><i class="dot trained"></i>trained</span>'
        '<span><i class="dot untrained"></i>untrained</span></p>'
    )


def _interval(interval: Interval) -> str:
    mean, low, high = interval
    if not math.isfinite(mean):
        return '<td class="number">-</td>'
    ends = f" <small>{low:.2f} to {high:.2f}</small>" if math.isfinite(low + high) else ""
    return f'<td class="number"><b>{mean:.2f}</b>{ends}</td>'


def _whiskers(score: Score) -> str:
    """Draw both intervals on one scale from 0 to 1."""
    parts = ['<line class="grid" x1="0" x2="200" y1="12" y2="12"/>']
    for (mean, low, high), kind, y in (
        (score.untrained, "untrained", 7),
        (score.trained, "trained", 17),
    ):
        parts.append(
            f'<line class="{kind}" x1="{200 * low:.1f}" x2="{200 * high:.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(f'<circle class="{kind}" cx="{200 * mean:.1f}" cy="{y}" r="4"/>')
    return f'<svg viewBox="-6 0 212 24" aria-hidden="true">{"".join(parts)}</svg>'


def _stages(stages: Sequence[tuple[str, float]]) -> str:
    total = sum(seconds for _, seconds in stages) or 1.0
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{seconds:.1f} s</td>'
        f'<td class="bar"><i style="width:{100 * seconds / total:.1f}%"></i></td></tr>'
        for name, seconds in stages
    )
    return f'<table class="stages"><tbody>{rows}</tbody></table>' if rows else ""


def table_html(table: Table) -> str:
    """Return a table as HTML; one without rows is left out."""
    if not table.rows:
        return ""
    t = html.escape
    kinds = [_column_class([row[i] for row in table.rows]) for i in range(len(table.columns))]
    heads = "".join(
        f"<th{kind}>{t(name)}</th>" for name, kind in zip(table.columns, kinds, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True))}</tr>"
        for row in table.rows
    )
    title = f"<h3>{t(table.title)}</h3>" if table.title else ""
    remark = f'<p class="remark">{t(table.remark)}</p>' if table.remark else ""
    return (
        f'{title}<div class="scroll"><table class="plain"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{remark}"
    )


def _column_class(cells: Sequence[str | Interval | float | int | None]) -> str:
    """Return the class of a column: numbers are aligned where all its cells are numbers."""
    is_number = all(cell is None or isinstance(cell, int | float) for cell in cells)
    return ' class="number right"' if is_number else ""


def _cell(cell: str | Interval | float | int | None, kind: str) -> str:
    if isinstance(cell, Interval):
        return _interval(cell)
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        text = "-"
    elif isinstance(cell, int):
        text = f"{cell:,}"
    elif isinstance(cell, float):
        text = f"{cell:,.0f}" if 1e4 <= abs(cell) < 1e15 else f"{cell:.4g}"
    else:
        text = html.escape(cell)
    return f"<td{kind}>{text}</td>"


def intervals_html(
    title: str, rows: Sequence[tuple[str, Interval]], *, low: float = 0.0, high: float = 1.0
) -> str:
    """Return means with their intervals as HTML: numbers, and dot and whisker on one scale.

    Args:
        title: Plain text; "" for none.
        rows: Name (plain text) and interval; one whose ends are not finite has no whisker.
        low: Left end of the scale.
        high: Its right end; what lies outside is drawn at the end.
    """
    if not rows:
        return ""

    def at(value: float) -> str:
        return f"{200 * min(max((value - low) / (high - low), 0.0), 1.0):.1f}"

    def drawn(interval: Interval) -> str:
        mean, start, end = interval
        parts = ['<line class="grid" x1="0" x2="200" y1="9" y2="9"/>']
        if math.isfinite(start + end):
            parts.append(f'<line class="trained" x1="{at(start)}" x2="{at(end)}" y1="9" y2="9"/>')
        if math.isfinite(mean):
            parts.append(f'<circle class="trained" cx="{at(mean)}" cy="9" r="4"/>')
        return f'<svg viewBox="-6 0 212 18" aria-hidden="true">{"".join(parts)}</svg>'

    lines = "".join(
        f"<tr><td>{html.escape(name)}</td>{_interval(interval)}"
        f'<td class="bar">{drawn(interval)}</td></tr>'
        for name, interval in rows
    )
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    return (
        f'{heading}<table class="plain intervals"><thead><tr><th>score</th>'
        f'<th>95 % interval</th><th class="bar"><span class="zero">{low:g}</span>'
        f'<span class="one">{high:g}</span></th></tr></thead><tbody>{lines}</tbody></table>'
    )


def environment_facts() -> list[tuple[str, str]]:
    """Return what this process runs on, by name: no path, no host, no user."""
    # A page about files alone, as that of verify, needs no torch.
    import torch

    from tapct_fast import _native
    from tapct_fast.backbone.describe import device_text

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = "with CUDA" if _native.has_cuda else "without CUDA"
    return [
        ("tapct-fast", __version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {sys.platform} {platform.machine()}"),
        ("device", device_text(device)),
        ("cores", str(os.cpu_count())),
        (
            "native build",
            f"{_native.inflate_backend()}, c-blosc2 {_native.blosc2_version()}, {cuda}",
        ),
    ]


def facts_list(facts: Sequence[tuple[str, str]]) -> str:
    """Return names and values (plain text) as an HTML list."""
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts
    )
    return f"<dl>{rows}</dl>"


_STYLE = """
:root{--ink:#1d2733;--soft:#5d6b7a;--faint:#e4e8ed;--blue:#1f6feb;--grey:#98a3b0;--red:#c2410c}
*{box-sizing:border-box}
body{margin:0;background:#fbfcfd;color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:48px 24px 72px}
h1{font-size:34px;line-height:1.2;margin:0 0 8px;letter-spacing:-.015em}
h2{font-size:22px;margin:0 0 6px;letter-spacing:-.01em}
h3{font-size:15px;margin:22px 0 8px;font-weight:600}
p{margin:0 0 14px;max-width:74ch;color:var(--soft)}
.lead{font-size:18px;color:var(--ink)}
section{margin-top:44px;padding-top:28px;border-top:1px solid var(--faint)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin-top:24px}
.tile{background:#fff;border:1px solid var(--faint);border-radius:8px;padding:14px 16px}
.tile span,.tile small{display:block;font-size:13px;color:var(--soft)}
.tile b{display:block;font-size:25px;font-weight:600;line-height:1.35;
font-variant-numeric:tabular-nums}
.row{display:grid;grid-template-columns:repeat(4,1fr);gap:10px;margin-bottom:10px;align-items:start}
figure{margin:0}
.row img{display:block;width:100%;background:#000;border-radius:4px;image-rendering:pixelated}
figcaption{font-size:13px;color:var(--soft);padding-top:4px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin-top:12px;max-width:none}
i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:7px;vertical-align:-1px}
i.dot{border-radius:50%}i.trained{background:var(--blue)}i.untrained{background:var(--grey)}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:20px}
.curves figcaption{font-weight:600;color:var(--ink);font-size:14px}
.curves small{display:block;font-weight:400;color:var(--soft)}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--faint)}
.raw{fill:none;stroke:#b9d2f8;stroke-width:1.2}
.mean{fill:none;stroke:var(--blue);stroke-width:2.2;stroke-linejoin:round}
line.interval{stroke:#a9c7f5;stroke-width:3}
line.uniform{stroke:var(--red);stroke-dasharray:5 4;stroke-width:1.3}
svg text.uniform{fill:var(--red)}
table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:500;color:var(--soft);text-align:left;font-size:13px}
th,td{padding:5px 10px 5px 0;border-bottom:1px solid var(--faint);vertical-align:middle}
td:nth-child(2){color:var(--soft)}
.number{font-variant-numeric:tabular-nums;white-space:nowrap}
.number small{color:var(--soft)}
.scores .bar{width:220px}
th.bar .one{float:right}
line.trained{stroke:var(--blue);stroke-width:2.5}circle.trained{fill:var(--blue)}
line.untrained{stroke:var(--grey);stroke-width:2.5}circle.untrained{fill:var(--grey)}
.stages{max-width:640px;margin-bottom:22px}
.stages td:nth-child(1){width:220px}.stages td.number{width:80px;color:var(--ink);text-align:right}
.stages i{height:8px;background:#a9c7f5;min-width:1px}
dl{display:grid;grid-template-columns:180px 1fr;gap:4px 16px;font-size:14px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.reasons{max-width:none}.reasons td:nth-child(1){width:55%}
.findings td{vertical-align:top}.findings td:nth-child(-n+3){white-space:nowrap}
.scroll{overflow-x:auto}
.plain{width:auto;min-width:min(100%,420px)}
.plain :is(td,th){padding-right:28px}.plain :is(td,th):last-child{padding-right:0}
.plain td{vertical-align:baseline}.plain td:nth-child(2){color:inherit}
.plain .right{text-align:right}.remark{font-size:13px;margin-top:8px}
.intervals td{vertical-align:middle}.intervals .bar{width:220px}
.limits{padding-left:20px;color:var(--soft);max-width:74ch}
@media (max-width:640px){.row{grid-template-columns:repeat(2,1fr)}dl{grid-template-columns:1fr}
.curves{grid-template-columns:1fr}}
"""

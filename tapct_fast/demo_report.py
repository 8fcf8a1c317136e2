"""The page of the demo: scans beside their features, loss curves, probe scores.

It carries only what the ``Report`` carries, has no script, and names scans by their number.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tapct_fast.io.atomic import write_atomic
from tapct_fast.report import (
    Curve,
    Figure,
    Interval,
    Rgb,
    bars_html,
    css_color,
    curves_html,
    facts_list,
    figures_html,
    interval_cell,
    legend_html,
    render_page,
)


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


def write_report(path: Path, report: Report) -> None:
    """Write the page; the file appears whole or not at all."""
    write_atomic(path, render_report(report).encode())


def render_report(report: Report) -> str:
    """Return the page as HTML."""
    stages = [(name, f"{seconds:.1f} s", seconds) for name, seconds in report.stages]
    limits = "".join(f"<li>{html.escape(limit)}</li>" for limit in report.limits)
    sections = [
        (
            "Features",
            report.figures_text,
            figures_html(report.figures) + legend_html(report.legend),
        ),
        ("Training", report.curves_text, curves_html(report.curves)),
        ("Linear probe", report.scores_text, _scores(report.scores)),
        ("Run", "", bars_html(stages) + facts_list(report.facts)),
        ("What this is not", "", f'<ul class="limits">{limits}</ul>'),
    ]
    return render_page(report.title, report.lead, report.tiles, sections)


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    rows = "".join(
        f'<tr><td><i style="background:{css_color(score.color)}"></i>{html.escape(score.name)}</td>'
        f"<td>{html.escape(score.beside)}</td>{interval_cell(score.untrained)}{interval_cell(score.trained)}"
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

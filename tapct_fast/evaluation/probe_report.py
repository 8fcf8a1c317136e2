"""The result of an evaluation as text, as ``probe.json`` and as one page, ``report.html``."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapct_fast.downstream.dice import NUM_RESAMPLES
from tapct_fast.evaluation.scores import Score
from tapct_fast.io.atomic import write_atomic, write_json
from tapct_fast.report import (
    Interval,
    Table,
    environment_facts,
    facts_list,
    intervals_html,
    render_page,
    table_html,
)

if TYPE_CHECKING:
    from tapct_fast.evaluation.evaluate import Evaluation

FORMAT, VERSION = "tapct-probe", 1
RESULTS_FILE, REPORT_FILE = "probe.json", "report.html"
_UNIT = {"dice", "auroc", "balanced accuracy", "recall@1"}  # 0..1, drawn on that scale


def table_text(table: Table) -> str:
    """Return a table as Markdown, in columns that also read as plain text."""
    lines = [list(table.columns), *([_text(cell) for cell in row] for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    padded = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    parts = [f"**{table.title}**", "\n".join([padded[0], rule, *padded[1:]]), table.remark]
    return "\n\n".join(part for part in parts if part)


def _text(cell: str | Interval | float | int | None) -> str:
    if isinstance(cell, Interval):
        value, low, high = cell
        if not math.isfinite(value):
            return "-"
        return _number(value) + (
            f" ({_number(low)}..{_number(high)})" if math.isfinite(low + high) else ""
        )
    if isinstance(cell, float):
        return _number(cell)
    return "-" if cell is None else str(cell)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def write_probe_report(out: Path, found: "Evaluation") -> None:
    """Write ``probe.json`` and ``report.html``; each appears whole.

    Raises:
        OSError: The folder cannot be written.
    """
    write_json(out / RESULTS_FILE, to_json(found))
    write_atomic(out / REPORT_FILE, render_probe_report(found).encode())


def to_json(found: "Evaluation") -> dict[str, Any]:
    """Return everything that was found; the same run again gives the same."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": found.task,
        "settings": found.settings,
        "environment": dict(environment_facts()),
        "num_scans": found.num_scans,
        "num_patients": found.num_patients,
        "num_left_out": found.num_left_out,
        "data": found.data,
        "remarks": list(found.remarks),
        "labels": list(found.labels),
        "classes": list(found.classes),
        "chance": found.chance,
        "results": [
            {
                "name": result.name,
                "fingerprint": result.fingerprint,
                "width": result.width,
                "scores": _scores_json(result.scores),
            }
            for result in found.results
        ],
        "differences": [
            {
                "name": found.results[0].name,
                "rival": difference.rival,
                "scores": _scores_json(difference.scores),
            }
            for difference in found.differences
        ],
        "cases": [
            {**case, "scores": {result.name: result.rows[row] for result in found.results}}
            for row, case in enumerate(found.cases)
        ],
    }


def _scores_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    return [
        {
            name: value if isinstance(value, str) or math.isfinite(value) else None
            for name, value in score._asdict().items()
        }
        for score in scores
    ]


def render_probe_report(found: "Evaluation") -> str:
    """Return the page as HTML."""
    names = [result.name for result in found.results]
    first = found.results[0].scores[0]
    brief, *differences = found.tables()
    rest = found.rest()
    tiles = [
        (
            f"{result.name}, {result.scores[0].name}",
            _tile(result.scores[0]),
            _ends(result.scores[0]),
        )
        for result in found.results
    ]
    low, high = (0.0, 1.0) if first.name in _UNIT else _scale([r.scores[0] for r in found.results])
    drawn = intervals_html(
        first.name, [(r.name, _interval(r.scores[0])) for r in found.results], low=low, high=high
    )
    between = ""
    if differences:
        pairs = [(f"minus {d.rival}", d.scores[0]) for d in found.differences]
        reach = _round_up(max(abs(v) for _, s in pairs for v in (0.0, *s[1:]) if math.isfinite(v)))
        between = intervals_html(
            f"{first.name} of {names[0]}",
            [(name, _interval(score)) for name, score in pairs],
            low=-reach,
            high=reach,
        ) + "".join(table_html(table._replace(remark="")) for table in differences)
    facts = [
        *((name, str(value)) for name, value in found.settings.items() if value is not None),
        *((f"fingerprint of {r.name}", r.fingerprint or "not known") for r in found.results),
        ("data, keyed hash", found.data),
        *environment_facts(),
    ]
    return render_page(
        f"Probe: {found.task}",
        f"Frozen features of {len(names)} backbones on {found.num_scans} held-out scans of "
        f"{found.num_patients} patients: the same splits, heads and budget for each.",
        tiles,
        [
            ("Scores", " ".join(found.remarks), drawn + table_html(brief._replace(remark=""))),
            (
                "Differences",
                "Both backbones on the same patients, drawn together. An interval that holds 0 "
                "shows no difference.",
                between,
            ),
            ("Surfaces of single labels", "", table_html(rest)),
            ("Run", "", facts_list(facts)),
            ("What this is not", "", _LIMITS),
        ],
    )


def _tile(score: Score) -> str:
    return _number(score.value) if math.isfinite(score.value) else "-"


def _ends(score: Score) -> str:
    if not math.isfinite(score.low + score.high):
        return "no interval"
    return f"95 %: {_number(score.low)} to {_number(score.high)}"


def _interval(score: Score) -> Interval:
    return Interval(score.value, score.low, score.high)


def _round_up(value: float) -> float:
    """Return the next of 0.1, 0.2, 0.5, 1, 2, ... that is not below a value."""
    steps = [m * 10.0**power for power in range(-1, 6) for m in (1, 2, 5)]
    return next((round(step, 6) for step in steps if step >= value), value)


def _scale(scores: Sequence[Score]) -> tuple[float, float]:
    ends = [v for score in scores for v in score[1:] if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin


_LIMITS = (
    f'<ul class="limits"><li>Intervals are 95 % percentiles of {NUM_RESAMPLES:,} draws of the '
    "patients at hand. They cover neither the draw of folds nor that of heads, nor patients of "
    "another hospital.</li><li>Label maps and targets are taken as the truth.</li><li>Rivals get "
    "the same heads and budget; each gets its own preprocessing, stated in docs/probe.md, and none "
    "was tuned on these data.</li><li>Not a medical device; not for diagnosis.</li></ul>"
)

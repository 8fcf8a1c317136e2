"""Scores of a backbone that were measured before, read back for its model card.

Two files hold such: ``probe.jsonl``, which a run writes beside its checkpoints, and
``probe.json`` of ``tapct-fast probe``. Their text comes from outside and is made plain.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tapct_fast.errors import FormatError
from tapct_fast.io.atomic import read_limited

MAX_BYTES = 1 << 26
_EVALUATION = "tapct-probe"  # the format of probe.json; that layer is above this one


class Measurement(NamedTuple):
    """One number with the ends of its 95 % interval, None where there is none."""

    name: str
    value: float
    low: float | None
    high: float | None


class Measured(NamedTuple):
    """What was measured, in a sentence, and the numbers."""

    text: str
    scores: list[Measurement]


def read_measured(path: Path, *, step: int, which: str, fingerprint: Callable[[], str]) -> Measured:
    """Read the scores of a backbone.

    Args:
        path: ``probe.jsonl`` of the run or ``probe.json`` of an evaluation.
        step: Of the run, that the backbone was taken from; later scores are of other weights.
        which: ``teacher`` or ``student``; a run scores its teacher.
        fingerprint: Of the backbone; asked for by an evaluation, which may hold several.

    Raises:
        FormatError: The file is too large, or holds no score of this backbone.
    """
    data = read_limited(path, "probe", limit=MAX_BYTES)
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if isinstance(content, dict) and content.get("format") == _EVALUATION:
        return _of_evaluation(content, fingerprint())
    if which != "teacher":
        raise FormatError("probe", "a run scores its teacher; export that, or leave the file out")
    return _of_run(data, step)


def _of_run(data: bytes, step: int) -> Measured:
    rows = [row for row in map(_row, data.splitlines()) if row is not None and row["step"] <= step]
    if not rows:
        raise FormatError("probe", f"there is no score of step {step} or before")
    row = max(rows, key=lambda row: int(row["step"]))
    scores = [
        Measurement(
            name, row[kind], *(_number(row.get(f"{kind}_{end}")) for end in ("low", "high"))
        )
        for kind, name in (("linear", "Dice, linear head"), ("knn", "Dice, kNN"))
        if _number(row.get(kind)) is not None
    ]
    return Measured(
        f"Mean Dice of frozen features at step {row['step']:,} of this run, cross-validated over "
        "the labelled scans that it was given.",
        scores,
    )


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # one that is being written is cut short
    is_score = (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and _number(row.get("linear")) is not None
    )
    return row if is_score else None


def _of_evaluation(content: dict[str, Any], fingerprint: str) -> Measured:
    try:
        result = next(r for r in content["results"] if r["fingerprint"] == fingerprint)
        scores = [
            Measurement(_plain(s["name"]), float(s["value"]), _number(s["low"]), _number(s["high"]))
            for s in result["scores"]
            if _number(s["value"]) is not None
        ]
        num_scans, num_patients = int(content["num_scans"]), int(content["num_patients"])
        task = _plain(content["task"])
    except StopIteration:
        raise FormatError("probe", "it holds no score of this backbone; probe it first") from None
    except (KeyError, TypeError, ValueError):
        raise FormatError("probe", "it is damaged or of another version; probe again") from None
    return Measured(
        f"Frozen features in {task}, on {num_scans:,} held-out scans of {num_patients:,} patients.",
        scores,
    )


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _plain(text: str) -> str:
    """Return printable ASCII that cannot become Markdown: the text comes from outside."""
    return re.sub(r"[^A-Za-z0-9 .,@+()/-]", "?", text)[:60]

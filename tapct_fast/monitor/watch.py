"""A run in a terminal: how far, how fast, what it has learned, and whether it is healthy."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from tapct_fast.monitor.checks import Finding, Severity, percent
from tapct_fast.monitor.losses import head_losses
from tapct_fast.monitor.record import Record, column, latest, read_record
from tapct_fast.monitor.verdict import headline, judge, worst
from tapct_fast.ssl.health import MEANINGS

# 70 as of a run that stopped itself; a script may end a run that is sick.
EXIT_CODES: dict[Severity, int] = {"ok": 0, "warn": 1, "bad": 70}
SPARK = "_.:-=+*#%@"  # from the lowest value to the highest
SPARK_WIDTH = 36
_CLEAR = "\x1b[H\x1b[2J"


def watch(
    directory: Path,
    *,
    every: float = 5.0,
    once: bool = False,
    as_json: bool = False,
    stream: TextIO | None = None,
) -> int:
    """Show the run in ``directory`` until it has finished or the user interrupts.

    On a terminal the view is redrawn; elsewhere it is printed whenever the run has moved on.

    Args:
        directory: What the run was given as ``--out``.
        every: Seconds between two looks.
        once: Look once.
        as_json: Print one line of JSON per change instead.
        stream: By default stdout.

    Returns:
        0 for a healthy run, 1 with warnings, 70 for a sick one, by the last look.

    Raises:
        InputError: There is no run.
    """
    stream = stream or sys.stdout
    redraws = stream.isatty() and not once and not as_json
    shown: tuple[Any, ...] = ()
    code = 0
    try:
        while True:
            record = read_record(directory)
            findings = judge(record)
            code = EXIT_CODES[worst(findings)]
            state = (record.step, len(record.probes), code)
            if redraws or state != shown:
                text = _as_json(record, findings) if as_json else render(record, findings)
                stream.write(f"{_CLEAR if redraws else ''}{text}\n")
                stream.flush()
                shown = state
            if once or record.is_finished:
                return code
            time.sleep(every)
    except KeyboardInterrupt:
        return code  # the usual way to leave


def render(record: Record, findings: Sequence[Finding]) -> str:
    """Return the view as lines of ASCII."""
    lines = [_progress(record), headline(record, findings), ""]
    if record.rows:
        for loss in head_losses(record.config, record.rows):
            beside = f"uniform: ln {loss.num_prototypes} = {loss.uniform:.2f}"
            lines.append(_line(loss.title, np.asarray(loss.value_N), beside))
        for name, beside in (("koleo", ""), *_norms(record), ("lr", "")):
            lines.append(_line(name, column(record.rows, name)[1], beside))
        health = [name for name in MEANINGS if name in record.rows[-1]]
        lines += [_line(name, column(record.rows, name)[1], "") for name in health]
        lines.append("")
    scored = [row for row in record.probes if isinstance(row.get("linear"), int | float)]
    if scored:
        for kind, title in (("linear", "probe, linear Dice"), ("knn", "probe, kNN Dice")):
            last = scored[-1]
            beside = f"step {last['step']}"
            if last.get(f"{kind}_low") is not None:
                beside += f", 95 %: {last[f'{kind}_low']:.3f} to {last[f'{kind}_high']:.3f}"
            lines.append(_line(title, column(scored, kind)[1], beside, num=1))
        lines.append("")
    lines += [f"{f.severity}: {f.about}: {f.text}" for f in findings if f.severity != "ok"]
    return "\n".join(lines).rstrip()


def _progress(record: Record) -> str:
    num_steps = record.config.train.num_steps
    parts = [f"step {record.step} of {num_steps} ({percent(record.step / num_steps)})"]
    if record.is_finished:
        parts.append("finished")
    elif record.eta_seconds is not None:
        parts.append(f"eta {duration(record.eta_seconds)}")
    rate, wait = (latest(record.rows, name) for name in ("samples_per_s", "data_wait"))
    if rate is not None:
        parts.append(f"{rate:.3g} samples/s")
    if wait is not None:
        parts.append(f"data wait {percent(wait)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Write a time as days, hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02}"


def _norms(record: Record) -> list[tuple[str, str]]:
    names = [name for name in record.rows[-1] if name.startswith("grad_norm_")]
    return [(name, f"clip {record.config.optim.clip_norm:g}") for name in names]


def _line(title: str, value_N: NDArray[np.float64], beside: str, *, num: int = 10) -> str:
    last = f"{float(np.median(value_N[-num:])):10.4g}" if value_N.size else " " * 10
    return f"  {title:<28}{last}  {spark(value_N):<{SPARK_WIDTH}}  {beside}".rstrip()


def spark(value_N: NDArray[np.float64], width: int = SPARK_WIDTH) -> str:
    """Draw values as one line of ASCII, a character per part of the run, from low to high."""
    value_N = value_N[np.isfinite(value_N)]
    if not value_N.size:
        return ""
    part_N = np.array([p.mean() for p in np.array_split(value_N, min(width, value_N.size))])
    span = float(np.ptp(part_N))
    if span <= 1e-9 * float(np.abs(part_N).max()):
        return SPARK[len(SPARK) // 2] * part_N.size
    level_N = np.rint((part_N - part_N.min()) / span * (len(SPARK) - 1)).astype(int)
    return "".join(SPARK[level] for level in level_N)


def _as_json(record: Record, findings: Sequence[Finding]) -> str:
    numbers = (
        {name: _number(value) for name, value in record.rows[-1].items()} if record.rows else {}
    )
    state = {
        "step": record.step,
        "num_steps": record.config.train.num_steps,
        "is_finished": record.is_finished,
        "eta_seconds": None if record.eta_seconds is None else round(record.eta_seconds),
        "severity": worst(findings),
        "headline": headline(record, findings),
        "findings": [finding._asdict() for finding in findings],
        "row": numbers,
        "probe": dict(record.probes[-1]) if record.probes else None,
    }
    return json.dumps(state, allow_nan=False)


def _number(value: Any) -> Any:
    """Return what JSON can hold: NaN and infinity become null."""
    return None if isinstance(value, float) and not np.isfinite(value) else value

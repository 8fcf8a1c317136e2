"""What a run tells: ``metrics.jsonl``, the trackers, a progress line if wanted.

A row of ``metrics.jsonl`` has the step it follows, losses, gradient norms before the clip, the
schedules at that step, and two measured numbers over the steps since the row before: samples per
second and the share of time spent waiting for data. All but those two repeat bit for bit.
"""

import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from tapct_fast.io.atomic import write_atomic
from tapct_fast.train.trackers import Start, Trackers, choose_trackers

METRICS = "metrics.jsonl"
LINE_SECONDS = 10.0  # between progress lines where there is no terminal


def notify(line: str) -> None:
    """Print one line to stderr without tearing a progress line."""
    tqdm.write(f"tapct-fast train: {line}", file=sys.stderr)


class RunLog:
    """The open logs of one run; a context manager.

    Args:
        directory: The run's folder.
        step: Steps done; rows past it, of a run that was killed, are dropped.
        num_steps: Steps of the whole run.
        progress: Show a progress line on stderr.
        settings: Of the run, flat, for the trackers.
        track: Names of trackers; by default TensorBoard where it is installed.

    Raises:
        InputError: There is no such tracker, or its library is not installed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        step: int,
        num_steps: int,
        progress: bool,
        settings: Mapping[str, Any] | None = None,
        track: Sequence[str] | None = None,
    ) -> None:
        names = choose_trackers(track)
        self._path = directory / METRICS
        rows = self._path.read_bytes().splitlines() if self._path.exists() else []
        steps = [_step_of(row) for row in rows]
        kept = [row for row, of in zip(rows, steps, strict=True) if of is not None and of <= step]
        write_atomic(self._path, b"".join(row + b"\n" for row in kept))
        self.last_loss: float = json.loads(kept[-1])["loss"] if kept else math.nan
        self._file = self._path.open("a", encoding="utf-8")
        logged = max([step, *(of for of in steps if of is not None)])
        self._trackers = Trackers(names, Start(directory, step, logged, settings or {}), notify)
        self._is_terminal = sys.stderr.isatty()
        self._next_line = time.monotonic() + LINE_SECONDS
        self._progress = progress
        self._bar = tqdm(
            total=num_steps,
            initial=step,
            unit="step",
            # Redrawn lines make a file unreadable: off a terminal, `advance` prints whole ones.
            file=sys.stderr if self._is_terminal else io.StringIO(),
            disable=not progress,
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt}"
            + (" |{bar}|" if self._is_terminal else "")
            + "{postfix}, eta {remaining}",
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._file.close()
        self._trackers.close()

    def advance(self) -> None:
        """Count one step on the progress line; call it after ``write``."""
        self._bar.update()
        is_due = self._bar.n == self._bar.total or time.monotonic() >= self._next_line
        if self._progress and not self._is_terminal and is_due:
            self._next_line = time.monotonic() + LINE_SECONDS
            sys.stderr.write(f"{self._bar}\n")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, readable by others at once; ``step`` is one of its keys."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.last_loss = row["loss"]
        self._bar.set_postfix_str(
            f"loss {row['loss']:.3f}, {row['samples_per_s']:.1f} samples/s, "
            f"data wait {100 * row['data_wait']:.0f} %",
            refresh=False,
        )
        self._trackers.write(row)

    def sync(self) -> None:
        """Wait until every row is on the disk: no checkpoint may know more steps than the log."""
        os.fsync(self._file.fileno())


def _step_of(row: bytes) -> int | None:
    """Return the step of a row, None for one that was cut short by a kill."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return None

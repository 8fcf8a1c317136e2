"""How far an ``embed`` is: a bar or lines on stderr, ``progress.json``, and the sums at the end.

Numbers only, and keyed ids nowhere: what is shown here can be mailed.
"""

import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from tapct_fast import __version__
from tapct_fast.downstream.archive import Done
from tapct_fast.io.atomic import write_json

PROGRESS_FILE = "progress.json"


class Progress:
    """Counts finished scans; a context manager that writes ``progress.json`` a last time.

    Args:
        out: The output folder.
        num_scans: Of the call.
        is_shown: On stderr: a bar on a terminal, else a line now and then.
        every_s: Seconds between lines and between writings.
        about: What else ``progress.json`` is to say, as JSON values.

    Attributes:
        written: What ``progress.json`` says.
    """

    def __init__(
        self, out: Path, num_scans: int, *, is_shown: bool, every_s: float, about: Mapping[str, Any]
    ) -> None:
        self._path = out / PROGRESS_FILE
        self._num_scans, self._every_s, self._about = num_scans, every_s, about
        self._counts: Counter[str] = Counter()
        self._codes: Counter[str] = Counter()
        self._waited_s = self._encoded_s = self._written_s = 0.0
        self._began = time.monotonic()
        self._passed_s = 0.0  # until the first scan that was not there before
        self._next = self._began + every_s
        self._state = "running"
        self.written: dict[str, Any] = {}
        self._is_lined = is_shown and not sys.stderr.isatty()
        self._bar = tqdm(
            total=num_scans, desc="embed", unit="scan", disable=not is_shown or self._is_lined
        )

    def __enter__(self) -> "Progress":
        self._write()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._state = "finished" if kind is None else "stopped"
        self._bar.close()
        if self._is_lined:
            self._print()
        self._write()

    def add(self, done: Done) -> None:
        """Count one finished scan."""
        self._counts[done.status] += 1
        if done.code:
            self._codes[done.code] += 1
        self._waited_s += done.waited_s
        self._encoded_s += done.encoded_s
        self._written_s += done.written_s
        now = time.monotonic()
        if done.status == "skipped" and not self._counts["embedded"]:
            self._passed_s = now - self._began
            self._waited_s = 0.0  # for a look at what was there: no encoder waits for it
        self._bar.update()
        if now >= self._next:
            self._next = now + self._every_s
            self._bar.set_postfix_str(f"encoder waiting {self._waiting_share():.0%}")
            if self._is_lined:
                self._print()
            self._write()

    def _sums(self) -> dict[str, Any]:
        rate, left_s = self._rate(), self._left_s()
        return {
            "state": self._state,
            "num_scans": self._num_scans,
            "embedded": self._counts["embedded"],
            "skipped": self._counts["skipped"],
            "quarantined": self._counts["quarantined"],
            "quarantined_by_code": dict(sorted(self._codes.items())),
            "seconds": round(time.monotonic() - self._began, 3),
            "scans_per_s": round(rate, 4),
            "eta_s": None if left_s is None else round(left_s, 1),
            "waiting_share": round(self._waiting_share(), 4),
            "encoding_share": round(self._share(self._encoded_s), 4),
            "writing_share": round(self._share(self._written_s), 4),
            **self._about,
            "versions": {
                "tapct_fast": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    def _num_done(self) -> int:
        return sum(self._counts.values())

    def _rate(self) -> float:
        """Return scans per second, without those that were there at the start."""
        seconds = time.monotonic() - self._began - self._passed_s
        return (self._counts["embedded"] + self._counts["quarantined"]) / max(seconds, 1e-9)

    def _left_s(self) -> float | None:
        left = self._num_scans - self._num_done()
        rate = self._rate()
        return 0.0 if not left else left / rate if rate else None

    def _share(self, seconds: float) -> float:
        """Return the share of time of the workers, together."""
        return seconds / max(self._waited_s + self._encoded_s + self._written_s, 1e-9)

    def _waiting_share(self) -> float:
        return self._share(self._waited_s)

    def _print(self) -> None:
        left_s = self._left_s()
        eta = "unknown" if left_s is None else str(timedelta(seconds=round(left_s)))
        line = (
            f"embed: {self._num_done()}/{self._num_scans} scans, {self._rate():.3g} scans/s, "
            f"ETA {eta}, encoder waiting {self._waiting_share():.0%}, "
            f"quarantined {self._counts['quarantined']}"
        )
        sys.stderr.write(line + "\n")

    def _write(self) -> None:
        self.written = self._sums()
        write_json(self._path, self.written)

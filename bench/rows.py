"""Rows of ``bench/results`` read back: from files, folders and git revisions, and over commits."""

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = "bench/results"
FLOOR_SUBJECT = "ceilings"


class BenchError(ValueError):
    """What was asked for is not there; the message names the way out."""


class Times(NamedTuple):
    """Percentiles in milliseconds."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True, slots=True)
class Row:
    """One measured case."""

    device: str
    subject: str
    case: str
    times_ms: Mapping[str, Times]  # variant
    bytes: float | None
    flops: float | None
    commit: str
    values: Mapping[str, Any]  # the whole row

    @property
    def key(self) -> tuple[str, str, str]:
        """What is measured, and where."""
        return self.device, self.subject, self.case

    @property
    def ours(self) -> str:
        """The variant that ratios refer to: the first of this library, else the first."""
        return next((v for v in self.times_ms if v.startswith("tapct")), next(iter(self.times_ms)))

    def ratio(self, variant: str) -> float:
        """Return how many times as long as ours a variant takes."""
        return self.times_ms[variant].p50 / self.times_ms[self.ours].p50

    def gb_per_s(self, variant: str) -> float | None:
        """Return the bytes of the floor over the time."""
        return self.bytes and self.bytes / self.times_ms[variant].p50 / 1e6

    def tflop_per_s(self, variant: str) -> float | None:
        """Return the FLOPs of the floor over the time."""
        return self.flops and self.flops / self.times_ms[variant].p50 / 1e9

    @property
    def floor_ms(self) -> float | None:
        """The least time that the measured ceilings of the device allow."""
        return self.values.get("floor_ms")

    def share(self, variant: str) -> float | None:
        """Return the part of a variant's time that the floor needs."""
        return self.floor_ms and self.floor_ms / self.times_ms[variant].p50

    @property
    def versions_text(self) -> str:
        """Versions that a time depends on, as one line."""
        names = ("torch", "triton", "cuda", "driver")
        return ", ".join(f"{n} {self.values[n]}" for n in names if self.values.get(n))


class Ceilings(NamedTuple):
    """The best copy and the best matrix product of a device; None where not measured."""

    gb_per_s: float | None = None
    tflop_per_s: float | None = None


def parse(text: str) -> list[Row]:
    """Parse the lines of one file; a line that an interruption cut short is left out."""
    rows = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        times = {name: Times(*three) for name, three in values["times_ms"].items()}
        rows.append(
            Row(
                device=values["device"],
                subject=values["subject"],
                case=values["case"],
                times_ms=times,
                bytes=values.get("bytes") or None,
                flops=values.get("flops") or None,
                commit=values.get("commit") or "unknown",
                values=values,
            )
        )
    return rows


def read(source: str) -> list[Row]:
    """Return the rows of a file, of the files in a folder, or of ``bench/results`` at a revision.

    Raises:
        BenchError: It is none of these, or holds no rows.
    """
    path = Path(source)
    if path.is_file():
        rows = parse(path.read_text())
    elif path.is_dir():
        rows = parse("".join(file.read_text() for file in sorted(path.rglob("*.jsonl"))))
    else:
        revision, _, below = source.partition(":")
        names = git("ls-tree", "-r", "--name-only", revision, "--", below or RESULTS)
        if names is None:
            raise BenchError(f"{source!r} is no row file, no folder and no git revision")
        texts = (git("show", f"{revision}:{name}") for name in names.split() if _is_rows(name))
        rows = parse("\n".join(text for text in texts if text))
    if not rows:
        raise BenchError(f"{source!r} holds no rows; measure some with: tapct-fast bench run")
    return rows


def latest(rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    """Return the last row of each case: rows are appended."""
    return {row.key: row for row in rows}


def ceilings(rows: Iterable[Row]) -> dict[str, Ceilings]:
    """Return the ceilings of each device: the best copy and the best product among its rows."""
    best: dict[str, Ceilings] = {}
    for row in latest(rows).values():
        if row.subject != FLOOR_SUBJECT:
            continue
        old = best.get(row.device, Ceilings())
        rates = [(row.gb_per_s(v) or 0, row.tflop_per_s(v) or 0) for v in row.times_ms]
        is_copy = row.case.startswith("copy")
        gb = max([old.gb_per_s or 0, *(rate for rate, _ in rates if is_copy)])
        tflop = max([old.tflop_per_s or 0, *(rate for _, rate in rates)])
        best[row.device] = Ceilings(gb or None, tflop or None)
    return best


class Point(NamedTuple):
    """A row in time order."""

    row: Row
    day: str  # of its commit, ISO; empty where the commit is unknown


def history(extra: Sequence[Row] = ()) -> dict[tuple[str, str, str], list[Point]]:
    """Return every row that ``bench/results`` ever held and ``extra``, by case, oldest first.

    A row is placed at the commit that it measured; of several of one commit the last one counts.
    """
    revisions = (git("log", "--format=%H", "--reverse", "--", RESULTS) or "").split()
    rows = [row for revision in revisions for row in _quiet(revision)]
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in [*rows, *extra]:
        commits = found.setdefault(row.key, {})
        commits.pop(row.commit, None)
        commits[row.commit] = row
    when: dict[str, tuple[int, str]] = {}
    for commit in {commit for commits in found.values() for commit in commits}:
        shown = git("show", "-s", "--format=%ct %cs", commit.partition("+")[0])
        seconds, _, day = (shown or "0 ").partition(" ")
        when[commit] = (int(seconds), day)
    return {
        key: [
            Point(row, when[commit][1])
            for commit, row in sorted(commits.items(), key=lambda item: when[item[0]][0])
        ]
        for key, commits in found.items()
    }


def _quiet(revision: str) -> list[Row]:
    try:
        return read(revision)
    except BenchError:  # a revision that deleted its rows
        return []


def _is_rows(name: str) -> bool:
    return name.endswith(".jsonl")


def git(*words: str) -> str | None:
    """Return what a git command printed, None where it failed or there is no git."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def number(value: float) -> str:
    """Return a positive number with three to four digits that mean something."""
    if value >= 1000:
        return f"{value:,.0f}"
    digits = 1 if value >= 100 else 2 if value >= 10 else 3 if value >= 1 else 4
    return f"{value:.{digits}f}"


def flop_rate(tflop_per_s: float | None) -> str:
    """Return a rate to stand before FLOP/s, with its prefix; a dash where there is none."""
    if not tflop_per_s:
        return "-"
    if tflop_per_s >= 1:
        return f"{number(tflop_per_s)} T"
    return f"{number(tflop_per_s * 1e3)} G"

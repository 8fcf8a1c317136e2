"""What can be measured: one subject per module of this folder that has a ``main``."""

import ast
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from bench.harness import Device, OpBench, device_name, digest_of
from bench.rows import RESULTS, BenchError, Row, parse

FOLDER = Path(__file__).resolve().parent
# The most valuable rows first, for machines that are lent for minutes; the others follow by name.
ORDER = (
    *("ceilings", "train", "heads_and_losses", "waterfall"),
    *("sinkhorn", "backbone", "prototype_cross_entropy", "residual_norm"),
    *("patch_embed", "views", "attention", "masked_gather", "matmul", "block_masks", "mlp", "ema"),
)
State = Literal["current", "stale", "missing"]


class Subject(NamedTuple):
    """One bench, read without importing it."""

    name: str
    text: str  # first line of its docstring
    devices: Sequence[Device]
    is_op: bool


class CaseState(NamedTuple):
    """One case on this machine's device; ``row`` is its last one."""

    name: str
    state: State
    row: Row | None


def subjects() -> list[Subject]:
    """Return every subject, in the order in which to measure."""
    found = []
    for path in FOLDER.glob("*.py"):
        source = path.read_text()
        if not re.search(r"\b(start|op_bench)\(\s*__file__", source):
            continue
        text = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0]
        is_op = "op_bench(" in source
        # Most others read files, which no GPU does.
        devices: tuple[Device, ...] = ("cpu", "cuda") if '"cuda"' in source or is_op else ("cpu",)
        found.append(Subject(path.stem, " ".join(text.split()), devices, is_op))
    return sorted(found, key=lambda s: (_rank(s.name), not s.is_op, s.name))


def _rank(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def chosen(names: Sequence[str]) -> list[Subject]:
    """Return the subjects of some names, all if none is given, in the order in which to measure.

    Raises:
        BenchError: A name is no subject.
    """
    every = subjects()
    known = [subject.name for subject in every]
    for name in names:
        if name not in known:
            raise BenchError(f"{name!r} is no bench; there are {', '.join(known)}")
    return [subject for subject in every if not names or subject.name in names]


def states(subject: Subject, device: Device, folders: Sequence[Path] = ()) -> list[CaseState]:
    """Say of each case whether its row for this machine exists and is current.

    The cases of an op are known without measuring; of the others only those that have a row.

    Raises:
        ImportError: The bench needs a package that is not installed.
    """
    main = importlib.import_module(f"bench.{subject.name}").main
    current = digest(subject)
    files = [
        folder / f"{device_name(device)}.jsonl" for folder in (FOLDER.parent / RESULTS, *folders)
    ]
    rows = {
        row.case: row
        for file in files
        if file.exists()
        for row in parse(file.read_text())
        if row.subject == subject.name and not row.values["tiny"]
    }
    is_op = isinstance(main, OpBench)
    names = [case.name for case in main.cases(device, False)] if is_op else list(rows)
    return [
        CaseState(name, _state(row, current), row) for name in names for row in [rows.get(name)]
    ]


def digest(subject: Subject) -> str:
    """Return the SHA-256 of a subject's sources, which its current rows hold.

    Raises:
        ImportError: The bench needs a package that is not installed.
    """
    module = importlib.import_module(f"bench.{subject.name}")
    is_op = isinstance(module.main, OpBench)
    sources = module.main.sources if is_op else module.SOURCES
    return digest_of([f"bench/{subject.name}.py", *sources])


def _state(row: Row | None, current: str) -> State:
    if row is None:
        return "missing"
    return "current" if row.values["sources"] == current else "stale"

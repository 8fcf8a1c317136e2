"""What is kept of a step that was refused: all that its replay needs, and not one voxel.

``DIR/incidents.jsonl`` has one short row per incident and per roll-back that followed;
``DIR/incidents/step-00000105.json`` has the rest of an incident: samples and cases (keyed ids),
seeds, numbers, environment and the checkpoint to start from.
A resumed run meets the same incidents again; they are written once.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tapct_fast.data.samples import Samples
from tapct_fast.errors import CheckpointWriteError
from tapct_fast.io.atomic import read_json, write_atomic, write_json
from tapct_fast.io.store import Store
from tapct_fast.train.checkpoint import Run, environment, folders, step_of
from tapct_fast.train.guard import RefusedError

INCIDENTS = "incidents.jsonl"
_ROW = ("kind", "step", "passed_over", "cause", "checkpoint")


class Rollback(NamedTuple):
    """From the step with index ``target`` on, data is that of ``passed_over`` steps later."""

    target: int
    passed_over: int


class Incident(NamedTuple):
    """One step that did not update."""

    step: int  # counted from 1, as in metrics.jsonl
    passed_over: int  # steps' worth of data left out before it; its data is that of the sum
    cause: str
    checkpoint: str  # folder that the step can be replayed from; empty: from the start
    samples: list[int]  # numbers of its samples over the run, in order
    cases: list[str]  # of these, keyed ids of the store; damage is passed over after the draw
    seed: int  # of the run
    drop_path_seeds: list[int]
    rollbacks: list[Rollback]  # that were done before
    losses: Mapping[str, float]
    grad_norms: Mapping[str, float]
    environment: Mapping[str, Any]


def capture(
    directory: Path,
    run: Run,
    store: Store,
    *,
    step: int,
    refused: RefusedError,
    drop_path_seeds: list[int],
) -> None:
    """Describe a refused step and record it.

    Args:
        directory: The run's folder.
        run: Its guard says how much data was passed over before the step.
        store: What the run reads.
        step: Counted from 1.
        refused: Cause and numbers.
        drop_path_seeds: Of its micro-batches.

    Raises:
        CheckpointWriteError: The disk is full or cannot be written.
    """
    config, passed = run.config, int(run.guard.passed_over)
    size = config.train.batch_size
    first = (step - 1 + passed) * size
    samples = Samples(store, config)
    before = [folder.name for folder in folders(directory) if step_of(folder) < step]
    incident = Incident(
        step=step,
        passed_over=passed,
        cause=str(refused),
        checkpoint=before[-1] if before else "",
        samples=list(range(first, first + size)),
        cases=[samples.draw(index).record.case for index in range(first, first + size)],
        seed=config.train.seed,
        drop_path_seeds=drop_path_seeds,
        rollbacks=read_rollbacks(directory),
        losses=refused.losses,
        grad_norms=refused.grad_norms,
        environment=environment(run),
    )
    try:
        record(directory, incident)
    except OSError as error:
        raise CheckpointWriteError(
            f"step {step} was refused and cannot be recorded: {error.strerror}. {refused}"
        ) from None


def record(directory: Path, incident: Incident) -> None:
    """Append the incident to the run's list and write its file.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    content = {"kind": "skip", **_spell(incident._asdict())}
    folder = directory / "incidents"
    folder.mkdir(exist_ok=True)
    write_json(incident_file(directory, incident.step, incident.passed_over), content)
    _append(directory, content)


def record_rollback(directory: Path, run: Run, *, step: int, target: int) -> None:
    """Append a roll-back that was done to the run's list: replay needs it for the steps behind it.

    Args:
        directory: The run's folder.
        run: As it goes on.
        step: The last one that was skipped.
        target: Steps done at the checkpoint that the run went back to.

    Raises:
        CheckpointWriteError: The disk is full or cannot be written.
    """
    content = {
        "kind": "roll back",
        "step": step,
        "passed_over": int(run.guard.passed_over),
        "cause": "too many steps in a row were skipped",
        "checkpoint": f"step-{target:08d}",
    }
    try:
        _append(directory, content)
    except OSError as error:
        raise CheckpointWriteError(
            f"the roll-back from step {step} cannot be recorded: {error.strerror}; mend that and "
            "give the same command again"
        ) from None


def read_rollbacks(directory: Path) -> list[Rollback]:
    """Return the roll-backs of a run in order."""
    rows = [row for row in map(json.loads, _rows(directory)) if row["kind"] == "roll back"]
    return [Rollback(step_of(Path(row["checkpoint"])), row["passed_over"]) for row in rows]


def passed_over(rollbacks: Iterable[Rollback], at: int) -> int:
    """Return how many steps' worth of data the step with index ``at`` had passed over."""
    return max((r.passed_over for r in rollbacks if r.target <= at), default=0)


def forget_later(directory: Path, run: Run) -> None:
    """Drop what a checkpoint does not know from the list of the run that goes on from it.

    As rows of ``metrics.jsonl``: where the run comes to the same roll-backs again, they are written
    again. The files of incidents stay.

    Raises:
        CheckpointWriteError: The disk is full or cannot be written.
    """
    known, rows = int(run.guard.passed_over), _rows(directory)
    kept = [row for row in rows if json.loads(row)["passed_over"] <= known]
    if kept != rows:
        try:
            _write_rows(directory, kept)
        except OSError as error:
            raise CheckpointWriteError(
                f"incidents.jsonl of --out cannot be written: {error.strerror}; mend that and give "
                "the same command again"
            ) from None


def read_incident(directory: Path, step: int) -> dict[str, Any] | None:
    """Return the last incident of a step with its numbers as floats; None without one."""
    files = (directory / "incidents").glob(f"step-{step:08d}*.json")
    contents = [read_json(file, "incident") for file in files]
    if not contents:
        return None
    content = max(contents, key=lambda content: int(content["passed_over"]))
    for group in ("losses", "grad_norms"):
        content[group] = {name: float(value) for name, value in content[group].items()}
    content["rollbacks"] = [Rollback(*pair) for pair in content["rollbacks"]]
    return dict(content)


def replayed_from(directory: Path) -> str:
    """Return the checkpoint that the run's last incident is replayed from; empty without one."""
    rows = _rows(directory)
    try:
        return str(json.loads(rows[-1])["checkpoint"]) if rows else ""
    except (ValueError, KeyError, TypeError):
        return ""


def incident_file(directory: Path, step: int, passed_over: int) -> Path:
    """Return the file of an incident; behind a roll-back a step number can come a second time."""
    again = f"-passed-{passed_over}" if passed_over else ""
    return directory / "incidents" / f"step-{step:08d}{again}.json"


def _append(directory: Path, content: Mapping[str, Any]) -> None:
    row = json.dumps({key: content[key] for key in _ROW})
    rows = _rows(directory)
    if row not in rows:
        _write_rows(directory, [*rows, row])


def _write_rows(directory: Path, rows: list[str]) -> None:
    write_atomic(directory / INCIDENTS, "".join(row + "\n" for row in rows).encode())


def _rows(directory: Path) -> list[str]:
    try:
        return (directory / INCIDENTS).read_text().splitlines()
    except FileNotFoundError:
        return []


def _spell(content: dict[str, Any]) -> dict[str, Any]:
    """Return numbers that JSON lacks as text, which ``float`` reads again."""
    return {
        key: _spell(dict(value))
        if isinstance(value, Mapping)
        else str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in content.items()
    }

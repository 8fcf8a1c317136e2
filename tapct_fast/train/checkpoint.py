"""Training checkpoints: safetensors and JSON in a folder that is complete, hashed, or not used.

``checkpoint_writer.py`` writes them; here they are checked and read. Layout of
``DIR/checkpoints/step-00000100``, the run after 100 steps::

    student.safetensors    backbone.*, dino_head.*, ibot_head.*
    teacher.safetensors    the same names, dino_center.*, ibot_center.* with softmax centering, and
                           anchor.* with Gram anchoring
    optimizer.safetensors  <name>.exp_avg, <name>.exp_avg_sq, <name>.step of the student's names,
                           and guard.*, see guard.py
    config.json            the run's config
    state.json             step, store fingerprint, and what the bits of a step depend on
    manifest.json          sha256 and size of every other file

The folder takes its name when all of it is on the disk and was read back; then
``checkpoints/latest.json`` names it. One that fails its hashes is renamed to ``.damaged`` and the
one before it is used. Tensors are whole, for any number of processes. Nothing is pickled.
"""

import json
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from tapct_fast import __version__
from tapct_fast.config import Config, flatten, to_json
from tapct_fast.errors import CheckpointError, CheckpointWriteError, FormatError
from tapct_fast.io.atomic import read_json, remove_folder, sha256_file, write_json
from tapct_fast.ssl.method import DinoMethod
from tapct_fast.ssl.shards import fill, like
from tapct_fast.train.guard import GuardState

FORMAT = "tapct-checkpoint"
VERSION = 2  # 2: guard.* in optimizer.safetensors, latest.json
STATE = ("student", "teacher", "optimizer")
LATEST = "latest.json"
_GUARD = "guard."
_BESIDE = ("dino_center.", "ibot_center.", "anchor.")
# How fast a run is, and when it gives up, never what a healthy step computes: a resume may change
# these. So it may change how a step is dealt out, which only rounds otherwise.
_FREE = ("train.num_workers", "train.read_timeout", _GUARD)
_DEALT = ("train.accumulate", "train.parallel", "losses.recompute_ibot_logits")


class DamagedError(CheckpointError):
    """A checkpoint whose files are not the ones it was written with; an older one may do."""


class Run(NamedTuple):
    """What a checkpoint holds and what it belongs to."""

    method: DinoMethod
    optimizer: torch.optim.AdamW
    config: Config
    fingerprint: str  # of the store
    backend: str  # device and precision, as logged
    guard: GuardState
    start_sha256: str = ""  # of the weights it started from
    guide_sha256: str = ""  # of those that give its targets


def load_latest(
    run: Run,
    directory: Path,
    *,
    notify: Callable[[str], None],
    at_most: int | None = None,
    rank: int = 0,
) -> int:
    """Load the newest checkpoint that passes its check into ``run``.

    Damaged ones are set aside, and what a killed save left behind is removed.

    With several ranks, rank 0 calls first; the others then ask for ``at_most`` the step it found.

    Args:
        run: Built from the config that wants to resume.
        directory: The run's folder.
        notify: Told in one line about damaged checkpoints and about what may change bits.
        at_most: Go back to this step or one before; what is newer belongs to a course that the run
            leaves, and is removed.
        rank: Only rank 0 changes files.

    Returns:
        Steps done: 0, and nothing loaded, where there is no checkpoint.

    Raises:
        CheckpointError: No checkpoint passes, the newest one is of another version, or the run has
            other settings or another store.
        CheckpointWriteError: The run's folder cannot be written.
    """
    folder, damaged = newest_intact(directory, notify=notify, at_most=at_most)
    step = 0 if folder is None else load(run, folder, notify=notify)
    if rank != 0:
        return step
    try:
        for leftover in (directory / "checkpoints").glob(".*.tmp"):  # of a save that was killed
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()
        if folder is not None:
            _leave(directory, folder, damaged)
    except OSError as error:
        raise CheckpointWriteError(
            f"checkpoints of --out cannot be set aside: {error.strerror}; mend that and give the "
            "same command again"
        ) from None
    return step


def _leave(directory: Path, loaded: Path, damaged: list[Path]) -> None:
    point_to(loaded)  # first: it never names a folder that is gone
    for path in damaged:
        aside = path.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    for newer in folders(directory):
        if step_of(newer) > step_of(loaded):
            remove_folder(newer)


def newest_intact(
    directory: Path, *, notify: Callable[[str], None], at_most: int | None = None
) -> tuple[Path | None, list[Path]]:
    """Find the newest checkpoint that passes its check, and the damaged ones that are newer.

    Raises:
        CheckpointError: There are checkpoints and none passes, or the newest one is of another
            version.
    """
    candidates = [f for f in folders(directory) if at_most is None or step_of(f) <= at_most]
    damaged: list[Path] = []
    for folder in reversed(candidates):
        try:
            verify(folder)
        except DamagedError as error:
            notify(f"{folder.name} is damaged ({error}); trying the one before")
            damaged.append(folder)
        else:
            return folder, damaged
    if candidates:
        raise CheckpointError(
            f"none of {len(candidates)} checkpoints passes its check; restore one, or give another "
            "--out to start again"
        )
    return None, []


def load(run: Run, folder: Path, *, notify: Callable[[str], None]) -> int:
    """Load one checkpoint that was verified; nothing on the disk changes.

    Returns:
        Steps done.

    Raises:
        CheckpointError: The run has other settings or another store.
    """
    state = read_json(folder / "state.json", "checkpoint state")
    _check_same_run(run, folder, state, notify)
    _load(run, folder)
    return int(state["step"])


def verify(folder: Path) -> None:
    """Check a checkpoint against its manifest: the same files, sizes and hashes.

    Raises:
        DamagedError: It is damaged or incomplete.
        CheckpointError: It is of another version.
    """
    try:
        manifest = read_json(folder / "manifest.json", "manifest")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DamagedError("manifest.json is not one of a training checkpoint")
        if manifest.get("version") != VERSION:
            raise CheckpointError(
                f"{folder.name} was written by checkpoint version {manifest.get('version')}; this "
                f"tapct_fast reads {VERSION}: continue with the release that wrote it"
            )
        files = manifest.get("files")
        if not isinstance(files, dict):
            raise DamagedError("manifest.json lists no files")
        present = {path.name for path in folder.iterdir()} - {"manifest.json"}
        if present != set(files):
            odd = sorted(present ^ set(files))[0]
            raise DamagedError(f"{odd} is {'not listed' if odd in present else 'missing'}")
        for name, entry in files.items():
            path = folder / name
            if not isinstance(entry, dict) or path.stat().st_size != entry.get("size"):
                raise DamagedError(f"{name} has another size than manifest.json says")
            if sha256_file(path) != entry.get("sha256"):
                raise DamagedError(f"{name} has another sha256 than manifest.json says")
    except FormatError as error:
        raise DamagedError(str(error)) from None
    except OSError as error:
        raise DamagedError(f"cannot be read: {error.strerror}") from None


def has_run(directory: Path) -> bool:
    """Say whether ``directory`` holds checkpoints or metrics of a run."""
    return bool(folders(directory)) or (directory / "metrics.jsonl").exists()


def folders(directory: Path) -> list[Path]:
    """Return the checkpoints below a run's folder, oldest first."""
    found = (directory / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def step_of(folder: Path) -> int:
    """Return the steps done at a checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


def point_to(folder: Path) -> None:
    """Let ``latest.json`` name a verified checkpoint.

    Raises:
        OSError: The disk is full or cannot be written; the old pointer stays.
    """
    pointer = {"folder": folder.name, "manifest_sha256": sha256_file(folder / "manifest.json")}
    path = folder.parent / LATEST
    content = versioned(pointer)
    if not path.exists() or _lenient(path) != content:
        write_json(path, content)


def pointed_to(directory: Path) -> str:
    """Return the folder that ``latest.json`` names; empty without one."""
    return str((_lenient(directory / "checkpoints" / LATEST) or {}).get("folder", ""))


def _lenient(path: Path) -> Any:
    try:
        content = read_json(path, "pointer")
    except FormatError:
        return None  # the hashes decide what is loaded; a pointer is only written anew
    return content if isinstance(content, dict) else None


def versioned(content: dict[str, Any]) -> dict[str, Any]:
    """Put format and version before the content of a JSON file."""
    return {"format": FORMAT, "version": VERSION, **content}


def identity(run: Run) -> dict[str, Any]:
    """Return the store and what the bits of a step depend on besides config and store."""
    return {
        "store": run.fingerprint,
        "start_sha256": run.start_sha256,
        "guide_sha256": run.guide_sha256,
        "environment": environment(run),
    }


def environment(run: Run) -> dict[str, Any]:
    """Return what the bits of a step depend on besides config and store."""
    return {
        "tapct_fast": __version__,
        "torch": torch.__version__,
        "backend": run.backend,
        "threads": torch.get_num_threads(),  # sums are split by thread
        "machine": platform.machine(),
    }


def tensors_of(run: Run, kind: str) -> dict[str, Tensor]:
    """Return the live tensors of one file by name; they may be spread over processes."""
    method = run.method
    if kind == "student":
        return dict(method.student.state_dict())
    if kind == "teacher":
        beside = {k: v for k, v in method.state_dict().items() if k.startswith(_BESIDE)}
        return method.teacher.state_dict() | beside
    named = {
        f"{name}.{key}": tensor
        for name, parameter in method.student.named_parameters()
        for key, tensor in run.optimizer.state.get(parameter, {}).items()
    }
    return named | {_GUARD + name: tensor for name, tensor in run.guard._asdict().items()}


@torch.no_grad()
def _load(run: Run, folder: Path) -> None:
    loaded = {kind: safetensors.torch.load_file(folder / f"{kind}.safetensors") for kind in STATE}
    for kind in ("student", "teacher"):
        live = tensors_of(run, kind)
        assert live.keys() == loaded[kind].keys(), f"{kind}: equal configs have equal tensors"
        for name, tensor in live.items():
            fill(tensor, loaded[kind][name])
    for name, tensor in run.guard._asdict().items():
        tensor.copy_(loaded["optimizer"].pop(_GUARD + name))
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in loaded["optimizer"].items():
        name, _, field = key.rpartition(".")
        moments.setdefault(name, {})[field] = tensor
    for name, parameter in run.method.student.named_parameters():
        if name not in moments:  # it never had a gradient
            run.optimizer.state.pop(parameter, None)
            continue
        held = run.optimizer.state[parameter]
        for field, tensor in moments[name].items():
            if field in held:  # in place: a captured graph holds these addresses
                fill(held[field], tensor)
            elif tensor.shape == parameter.shape:
                held[field] = like(tensor, parameter)
            else:
                held[field] = tensor.to(parameter.device)


def _check_same_run(
    run: Run, folder: Path, state: dict[str, Any], notify: Callable[[str], None]
) -> None:
    old = flatten(read_json(folder / "config.json", "checkpoint config"))
    new = flatten(json.loads(to_json(run.config)))
    for name in [*new, *old]:
        if not name.startswith((*_FREE, *_DEALT)) and old.get(name, "absent") != new.get(
            name, "absent"
        ):
            raise CheckpointError(
                f"the run to resume has {name} = {old.get(name, 'absent')}, now it is "
                f"{new.get(name, 'absent')}; give the old setting, or another --out for a new run"
            )
    if state.get("store") != run.fingerprint:
        raise CheckpointError(
            "the run to resume was trained on another store, or this one was packed anew; give "
            "the old store, or another --out for a new run"
        )
    for option, key in (("--start", "start_sha256"), ("--distill", "guide_sha256")):
        if state.get(key) != getattr(run, key):
            raise CheckpointError(
                f"the run to resume has other weights for {option}, or none; give the same "
                f"{option}, or another --out for a new run"
            )
    before, now = state.get("environment", {}), environment(run)
    before |= {name: old.get(name) for name in _DEALT}
    now |= {name: new.get(name) for name in _DEALT}
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
    if changed:
        notify(f"resuming, but not bit for bit: {', '.join(changed)}")

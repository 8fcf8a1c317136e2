"""Training checkpoints: safetensors and JSON in a folder that is complete, hashed, or not used.

Layout of ``DIR/checkpoints/step-00000100``, the run after 100 steps::

    student.safetensors    backbone.*, dino_head.*, ibot_head.*
    teacher.safetensors    the same names, and dino_center.*, ibot_center.* with softmax centering
    optimizer.safetensors  <name>.exp_avg, <name>.exp_avg_sq, <name>.step of the student's names
    config.json            the run's config
    state.json             step, store fingerprint, and what the bits of a step depend on
    manifest.json          sha256 and size of every other file

The folder takes its name when all of it is on the disk; one that fails its hashes is renamed to
``.damaged`` and the one before it is used. Nothing is pickled.
"""

import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from tapct_fast import __version__
from tapct_fast.config import Config, flatten, to_json
from tapct_fast.errors import CheckpointError, FormatError, TrainError
from tapct_fast.io.atomic import atomic_folder, read_json, sha256_file, write_json
from tapct_fast.ssl.method import DinoMethod

FORMAT = "tapct-checkpoint"
VERSION = 1
_STATE = ("student", "teacher", "optimizer")
# How fast a run is, never what it computes: a resume may change these.
_FREE = {"train.num_workers", "train.read_timeout"}


class DamagedError(CheckpointError):
    """A checkpoint whose files are not the ones it was written with; an older one may do."""


class Run(NamedTuple):
    """What a checkpoint holds and what it belongs to."""

    method: DinoMethod
    optimizer: torch.optim.AdamW
    config: Config
    fingerprint: str  # of the store
    backend: str  # device and precision, as logged


def save(run: Run, directory: Path, step: int) -> Path:
    """Write the run after ``step`` steps below ``directory`` and remove the oldest ones.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk is full or cannot be written; earlier checkpoints are as before.
        TrainError: A tensor is not finite: such a state is never written.
    """
    tensors = {name: _tensors(run, name) for name in _STATE}
    for kind, state in tensors.items():
        for name, tensor in state.items():
            if not bool(tensor.isfinite().all()):
                raise TrainError(
                    f"{kind} {name} is not finite after step {step}; no checkpoint was written. "
                    "Resume from the one before with a lower schedule.base_lr"
                )
    folder = directory / "checkpoints" / f"step-{step:08d}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as temporary:
            for kind, state in tensors.items():
                # safetensors writes the memory of a tensor: it must be dense and on the host.
                host = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
                safetensors.torch.save_file(host, temporary / f"{kind}.safetensors")
            (temporary / "config.json").write_text(to_json(run.config) + "\n")
            write_json(temporary / "state.json", _versioned({"step": step, **_identity(run)}))
            files = {
                path.name: {"sha256": sha256_file(path), "size": path.stat().st_size}
                for path in sorted(temporary.iterdir())
            }
            write_json(temporary / "manifest.json", _versioned({"files": files}))
        _remove_old(directory, run.config.train.keep_checkpoints)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written: {error.strerror}; free space and "
            "give the same command again"
        ) from None
    return folder


def load_latest(run: Run, directory: Path, *, notify: Callable[[str], None]) -> int:
    """Load the newest checkpoint that passes its check into ``run``.

    Args:
        run: Built from the config that wants to resume.
        directory: The run's folder.
        notify: Told in one line about damaged checkpoints and about what may change bits.

    Returns:
        Steps done: 0, and nothing loaded, where there is no checkpoint.

    Raises:
        CheckpointError: No checkpoint passes, the newest one is of another version, or the run has
            other settings or another store.
    """
    folders = list(reversed(_folders(directory)))
    damaged: list[Path] = []
    for folder in folders:
        try:
            verify(folder)
        except DamagedError as error:
            notify(f"{folder.name} is damaged ({error}); trying the one before")
            damaged.append(folder)
            continue
        state = read_json(folder / "state.json", "checkpoint state")
        _check_same_run(run, folder, state, notify)
        _load(run, folder)
        for path in damaged:
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        for leftover in folder.parent.glob(".step-*.tmp"):  # of a run killed while it saved
            shutil.rmtree(leftover, ignore_errors=True)
        return int(state["step"])
    if folders:
        raise CheckpointError(
            f"none of {len(folders)} checkpoints passes its check; restore one, or give another "
            "--out to start again"
        )
    return 0


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
    return bool(_folders(directory)) or (directory / "metrics.jsonl").exists()


def _folders(directory: Path) -> list[Path]:
    """Return the checkpoints below a run's folder, oldest first."""
    found = (directory / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def _remove_old(directory: Path, keep: int) -> None:
    for folder in _folders(directory)[:-keep]:
        shutil.rmtree(folder)


def _versioned(content: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **content}


def _identity(run: Run) -> dict[str, Any]:
    return {"store": run.fingerprint, "environment": _environment(run)}


def _environment(run: Run) -> dict[str, Any]:
    """Return what the bits of a step depend on besides config and store."""
    return {
        "tapct_fast": __version__,
        "torch": torch.__version__,
        "backend": run.backend,
        "threads": torch.get_num_threads(),  # sums are split by thread
        "machine": platform.machine(),
    }


def _named_state(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parameter in run.method.student.named_parameters():
        if parameter in run.optimizer.state:
            yield name, run.optimizer.state[parameter]


def _tensors(run: Run, kind: str) -> dict[str, Tensor]:
    """Return the live tensors of one file; loading copies into the same names."""
    method = run.method
    if kind == "student":
        return dict(method.student.state_dict())
    if kind == "teacher":
        centers = {k: v for k, v in method.state_dict().items() if "_center." in k}
        return method.teacher.state_dict() | centers
    return {f"{name}.{key}": t for name, state in _named_state(run) for key, t in state.items()}


def _load(run: Run, folder: Path) -> None:
    loaded = {kind: safetensors.torch.load_file(folder / f"{kind}.safetensors") for kind in _STATE}
    for kind in ("student", "teacher"):
        live = _tensors(run, kind)
        assert live.keys() == loaded[kind].keys(), f"{kind}: equal configs have equal tensors"
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(loaded[kind][name])
    # A parameter that never had a gradient has no state, so the names come from the file.
    parameters = dict(run.method.student.named_parameters())
    run.optimizer.state.clear()
    for key, tensor in loaded["optimizer"].items():
        name, _, field = key.rpartition(".")
        run.optimizer.state[parameters[name]][field] = tensor.to(parameters[name].device)


def _check_same_run(
    run: Run, folder: Path, state: dict[str, Any], notify: Callable[[str], None]
) -> None:
    old = flatten(read_json(folder / "config.json", "checkpoint config"))
    new = flatten(json.loads(to_json(run.config)))
    for name in [*new, *old]:
        if name not in _FREE and old.get(name, "absent") != new.get(name, "absent"):
            raise CheckpointError(
                f"the run to resume has {name} = {old.get(name, 'absent')}, now it is "
                f"{new.get(name, 'absent')}; give the old setting, or another --out for a new run"
            )
    if state.get("store") != run.fingerprint:
        raise CheckpointError(
            "the run to resume was trained on another store, or this one was packed anew; give "
            "the old store, or another --out for a new run"
        )
    before, now = state.get("environment", {}), _environment(run)
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
    if changed:
        notify(f"resuming, but not bit for bit: {', '.join(changed)}")

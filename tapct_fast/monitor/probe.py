"""An online probe: what the teacher of each checkpoint is worth on labelled scans, while training.

Every checkpoint is scored in a thread beside the run, on CUDA in a stream of its own; the run waits
for nothing and its random numbers are not touched. A row of ``probe.jsonl``::

    {"step": 1000, "knn": 0.51, "knn_low": 0.46, "knn_high": 0.55,
     "linear": 0.58, "linear_low": 0.54, "linear_high": 0.61, "num_scans": 8, "seconds": 41.2}

mean Dice with its 95 % interval over the scans (null where it is not known); or with ``skipped``
or ``error``, a reason, in place of scores. Scans are named by their number.
"""

import contextlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.export import read_teacher
from tapct_fast.downstream.dice import ProbeResult
from tapct_fast.downstream.encode import embed_volume
from tapct_fast.downstream.probe import Scan, probe_scans
from tapct_fast.errors import InputError, TapctError
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.read import read_labels, read_volume
from tapct_fast.monitor.record import PROBES, read_rows

NEEDED_FILES = ("manifest.json", "config.json", "teacher.safetensors")
WINDOWS = 4  # encoded at a time: free memory on the device belongs to the run
_KEPT = ".probe"  # in the run's folder: files of the checkpoint at work


class OnlineProbe:
    """An observer that scores the teacher of every checkpoint.

    While one checkpoint is being scored, others are skipped, and a row says so; only the last one
    of the run is waited for, when there is nothing left to delay.

    Args:
        directory: The run's folder.
        scans: Labelled scans; files or DICOM series folders.
        labels: A label map per scan, 0 being background.
        num_steps: Steps of the whole run.
        device: Where the backbone runs.
        seed: Draws folds, training tokens and the bootstrap.

    Raises:
        InputError: There are fewer than two scans, or not one label map for each.
    """

    def __init__(
        self,
        directory: Path,
        scans: Sequence[Path],
        labels: Sequence[Path],
        *,
        num_steps: int,
        device: str | torch.device,
        seed: int = 0,
    ) -> None:
        if len(scans) != len(labels):
            raise InputError(
                f"{len(labels)} --probe-labels for {len(scans)} --probe scans; give one per scan"
            )
        if len(scans) < 2:
            raise InputError("--probe needs two scans or more: it fits on some, scores the others")
        self._directory = directory
        self._pairs = list(zip(scans, labels, strict=True))
        self._num_steps = num_steps
        self._device = torch.device(device)
        self._seed = seed
        self._stream: torch.cuda.Stream | None = None
        self._thread: threading.Thread | None = None
        self._running_step = 0
        self._is_stopping = threading.Event()
        self._known: set[int] | None = None

    def logged(self, row: Mapping[str, Any]) -> None:
        """A row of numbers is nothing to score."""

    def saved(self, step: int, folder: Path) -> None:
        """Begin to score a checkpoint, unless that was done or another one is at work."""
        if step in self._known_steps():
            return
        is_last = step >= self._num_steps
        if self._thread is not None and (is_last or not self._thread.is_alive()):
            self._thread.join()
            self._thread = None
        self._known_steps().add(step)
        if self._thread is not None:
            reason = f"the probe of step {self._running_step} was still at work"
            self._append({"step": step, "skipped": reason})
            return
        try:
            kept = self._keep(folder)
        except OSError as error:
            self._append({"step": step, "error": f"cannot keep the weights: {error.strerror}"})
            return
        self._running_step = step
        self._thread = threading.Thread(target=self._run, args=(step, kept), name="probe")
        self._thread.start()

    def close(self) -> None:
        """Wait for the probe of the last checkpoint; stop one of a run that ended before."""
        if self._thread is None:
            return
        if self._running_step < self._num_steps:
            self._is_stopping.set()
        self._thread.join()
        self._thread = None

    def _known_steps(self) -> set[int]:
        if self._known is None:
            path = self._directory / PROBES
            rows = read_rows(path)
            if rows:  # without what a kill cut short
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                write_atomic(path, lines.encode())
            shutil.rmtree(self._directory / _KEPT, ignore_errors=True)
            self._known = {int(row["step"]) for row in rows}
        return self._known

    def _keep(self, folder: Path) -> Path:
        """Keep what is needed of a checkpoint: retention may remove it before it is read."""
        kept = self._directory / _KEPT / folder.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in NEEDED_FILES:
            try:
                os.link(folder / name, kept / name)  # at once, whatever the size
            except OSError:  # a file system without hard links
                shutil.copyfile(folder / name, kept / name)
        return kept

    def _append(self, row: Mapping[str, Any]) -> None:
        # One line in one write: a reader, and the other thread, never see half of it.
        with (self._directory / PROBES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def _run(self, step: int, kept: Path) -> None:
        start = time.monotonic()
        # Whatever is wrong with the scans or with memory, the run goes on.
        try:
            row = self._score(kept)
        except (TapctError, RuntimeError, MemoryError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            row = {"error": reason}
        except OSError as error:
            row = {"error": error.strerror or type(error).__name__}
        finally:
            shutil.rmtree(kept, ignore_errors=True)
            with contextlib.suppress(OSError):
                kept.parent.rmdir()
        row = {"step": step, **row, "seconds": round(time.monotonic() - start, 1)}
        with contextlib.suppress(OSError):  # a full disk: the run's own writes will say so
            self._append(row)

    def _score(self, kept: Path) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            if self._device.type == "cuda":
                stack.enter_context(torch.cuda.device(self._device))
                # One for all probes: freed memory can be had again only in the stream it was in.
                if self._stream is None:
                    self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
                stack.enter_context(torch.cuda.stream(self._stream))
            backbone = read_teacher(kept, device=self._device)
            scans = []
            for number, (scan, labels) in enumerate(self._pairs, start=1):
                if self._is_stopping.is_set():
                    return {"skipped": "the run ended before it was done"}
                scans.append(_embed(backbone, number, scan, labels))
        # The features are on the host, and so are both probes.
        if self._is_stopping.is_set():
            return {"skipped": "the run ended before it was done"}
        result = probe_scans(scans, seed=self._seed)
        return {
            **_dice("knn", result.knn),
            **_dice("linear", result.linear),
            "num_scans": len(scans),
        }


def _embed(backbone: Backbone, number: int, scan: Path, labels: Path) -> Scan:
    try:
        features = embed_volume(backbone, read_volume(scan), batch_size=WINDOWS)
        return features, read_labels(labels)
    except TapctError as error:
        raise InputError(f"probe scan {number}: {error}") from None


def _dice(name: str, result: ProbeResult) -> dict[str, float | None]:
    values = (result.mean_dice, *result.interval)
    keys = (name, f"{name}_low", f"{name}_high")
    return {
        key: round(value, 4) if math.isfinite(value) else None
        for key, value in zip(keys, values, strict=True)
    }

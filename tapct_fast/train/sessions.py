"""``DIR/sessions.jsonl``: one row per call of ``train`` on a run, for its report.

A row has the steps done when the call began, the time, the number of scans, the store's fingerprint
and the weights as ``state.json`` of a checkpoint names them, and what the process ran on. Nothing
reads it to compute.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tapct_fast.backbone.describe import environment
from tapct_fast.io.atomic import write_atomic
from tapct_fast.train.checkpoint import Run

SESSIONS = "sessions.jsonl"


def record_session(
    directory: Path, run: Run, *, step: int, num_scans: int, device: torch.device
) -> None:
    """Append a row for the call that begins.

    Args:
        directory: The run's folder.
        run: As it begins.
        step: Steps done.
        num_scans: Of the store.
        device: Of the run.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    row: dict[str, Any] = {
        "step": step,
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "num_scans": num_scans,
        "store": run.fingerprint,
        "start_sha256": run.start_sha256,
        "guide_sha256": run.guide_sha256,
        "backend": run.backend,
        "environment": environment(device),
    }
    path = directory / SESSIONS
    before = path.read_bytes() if path.exists() else b""
    write_atomic(path, before + json.dumps(row).encode() + b"\n")

"""Time variants of one piece of work beside each other and write a row that says how.

A bench verifies its result before it times it, interleaves the variants in one process, warms up,
and reports p20, p50 and p80 in milliseconds with device, versions and commit.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parent / "results"


def device_name() -> str:
    """The machine's device, in words that make a file name: the GPU's name, or the CPU's model."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        text = info.read_text() if info.exists() else ""
        match = re.search(r"model name\s*:\s*(.+)", text)
        name = f"{match.group(1) if match else platform.machine()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment() -> dict[str, str]:
    """Device, versions and commit; a tree with changes is marked as such."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    dirty = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": device_name(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "triton", "numpy")},
        "commit": git("rev-parse", "--short", "HEAD") + dirty,
    }


def time_ms(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 20
) -> dict[str, list[float]]:
    """Run every variant once per round, in turn, and return each one's p20, p50 and p80.

    On CUDA a round is timed with events; two rounds warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, call in variants.items():
            elapsed = _once(call)
            if turn >= 2:
                times[name].append(elapsed)
    return {
        name: [round(float(q), 4) for q in np.percentile(values, (20, 50, 80))]
        for name, values in times.items()
    }


def _once(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def write_row(subject: str, **values: Any) -> None:
    """Append one JSON row to ``$OUT`` or ``bench/results``, and print it."""
    folder = Path(os.environ.get("OUT", RESULTS))
    row = {
        "subject": subject,
        **values,
        "command": f"python -m bench.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip(),
        **environment(),
    }
    line = json.dumps(row)
    with (folder / f"{device_name()}.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)

"""Time rivals beside each other on the same inputs, and write a row that says how.

A bench verifies its results before it times them, interleaves the variants in one process, warms
up, and reports p20, p50 and p80 in milliseconds with device, versions, load and commit. A row is
stale once the bench or a source it names has changed: its ``sources`` holds their SHA-256.

The bench of an op is a function ``cases(device, is_tiny)`` and ``main = op_bench(...)``; see
masked_gather. Its rows carry ``floor_ms``, what the device's measured ceilings allow: the larger of
bytes over copy bandwidth and FLOPs over the best matrix product (rows of ``bench.ceilings``).
"""

import argparse
import ctypes
import gc
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.jobs import alone

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
WARM_UP = 2  # rounds; the first compiles
ROUNDS = 20
# Larger than any L2 (126 MB on a B200). Written often enough for 2 ms of work at 4.3 TB/s: the host
# meanwhile enqueues a short variant, so that events time the device, not Python's launches.
FLUSH_BYTES = 512 * 2**20
NUM_FLUSHES = 16

Device = Literal["cpu", "cuda"]
Variants = Mapping[str, Callable[[], Any]]
Results = Callable[[], Sequence[Tensor]]


class Work(NamedTuple):
    """One case, ready to be verified and timed.

    Attributes:
        variants: Ours first, then its rivals; each returns the tensors it computed.
        expected: Their values in float64.
        tolerance: Largest relative error in the Frobenius norm.
        bytes: The floor: every operand read once, every result written once.
        flops: Of the matrix products.
        dtype: Of the operands; names the matrix product that is the ceiling.
        backend: What runs under our name on this device.
        checks: What to verify in place of a variant whose results are too large to compare.
        absent: Rivals that cannot run here, each with the reason.
        measures_memory: Also report each variant's peak of extra memory.
        values: Anything else the row should say.
    """

    variants: Mapping[str, Results]
    expected: Sequence[Tensor]
    tolerance: float
    bytes: int
    dtype: torch.dtype
    flops: int = 0
    backend: str = ""
    checks: Mapping[str, Results] = {}
    absent: Mapping[str, str] = {}
    measures_memory: bool = False
    values: Mapping[str, Any] = {}


class Case(NamedTuple):
    """One row: its name, and what allocates its operands when its turn comes."""

    name: str
    make: Callable[[], Work]


Cases = Callable[[Device, bool], Iterator[Case]]


@dataclass(frozen=True, slots=True)
class Run:
    """One start of one bench: what was asked for, and what its rows share."""

    subject: str
    command: str
    sources: str  # SHA-256
    out: Path
    is_tiny: bool
    only_missing: bool
    load_1min: float  # before the bench itself adds to it

    def wants(self, case: str, device: Device) -> bool:
        """Say whether this case is to be measured: always, or with ``--missing`` if no row is."""
        if self.only_missing and any(
            (row["subject"], row["case"], row["sources"]) == (self.subject, case, self.sources)
            for folder in (RESULTS, self.out)
            for row in _rows(folder / f"{device_name(device)}.jsonl")
        ):
            print(f"{self.subject}, {case}: measured already", flush=True)
            return False
        return True

    def write(
        self, case: str, device: Device, times_ms: Mapping[str, Sequence[float]], **values: Any
    ) -> None:
        """Append one row to the device's file, and print it."""
        row = {
            "subject": self.subject,
            "case": case,
            **values,
            "times_ms": times_ms,
            "percentiles": [20, 50, 80],
            "tiny": self.is_tiny,
            "sources": self.sources,
            "load_1min": round(self.load_1min, 2),
            "command": self.command,
            **_environment(device),
        }
        line = json.dumps(row)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / f"{device_name(device)}.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def start(bench: str, sources: Sequence[str], argv: Sequence[str] | None) -> Run:
    """Read the command line of a bench.

    Args:
        bench: ``__file__`` of the bench.
        sources: Files whose change makes its rows stale, relative to the repository.
        argv: Arguments, or None for those of the process.
    """
    subject = Path(bench).stem
    parser = argparse.ArgumentParser(prog=f"python -m bench.{subject}")
    parser.add_argument("--tiny", action="store_true", help="a size for tests; not a measurement")
    parser.add_argument("--missing", action="store_true", help="skip cases whose row is current")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or RESULTS),
        help="folder of the rows (default: $OUT, or bench/results)",
    )
    args = parser.parse_args(argv)
    if args.tiny and args.out.resolve() == RESULTS:
        parser.error("a --tiny row is no result: name another folder with --out")
    words = ["python -m", f"bench.{subject}", *(["--tiny"] if args.tiny else [])]
    return Run(
        subject=subject,
        command=" ".join(words),
        sources=digest_of([f"bench/{subject}.py", *sources]),
        out=args.out,
        is_tiny=args.tiny,
        only_missing=args.missing,
        load_1min=os.getloadavg()[0],
    )


@dataclass(frozen=True, slots=True)
class OpBench:
    """The bench of an op; called, it verifies and times every case on this device."""

    bench: str
    sources: Sequence[str]
    cases: Cases

    def __call__(self, argv: Sequence[str] | None = None) -> None:
        """Run as a command line does."""
        run = start(self.bench, self.sources, argv)
        device = this_device()
        for case in self.cases(device, run.is_tiny):
            if run.wants(case.name, device):
                torch._dynamo.reset()  # another shape is another graph, not a dynamic one
                _measure(run, case.name, device, case.make())


def op_bench(bench: str, sources: Sequence[str], cases: Cases) -> OpBench:
    """Return the ``main`` of an op's bench."""
    return OpBench(bench, sources, cases)


def this_device() -> Device:
    """Return where benches run: on CUDA where there is a device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _measure(run: Run, name: str, device: Device, work: Work) -> None:
    calls = {**work.variants, **work.checks}
    errors = relative_errors(calls, work.expected, tolerance=work.tolerance)
    times = time_ms(work.variants, device=device, rounds=3 if run.is_tiny else ROUNDS)
    row: dict[str, Any] = {"dtype": str(work.dtype).removeprefix("torch."), **work.values}
    if work.flops:
        row["flops"] = work.flops
    if work.measures_memory:
        row["extra_bytes"] = {
            key: peak_extra_bytes(call, device) for key, call in work.variants.items()
        }
    if work.absent:
        row["absent"] = work.absent
    floor = floor_ms(device, work, (RESULTS, run.out))
    if floor is not None:
        row["floor_ms"] = floor
    row |= {"backend": work.backend, "relative_error": errors, "bytes": work.bytes}
    run.write(name, device, times, **row)


def floor_ms(device: Device, work: Work, folders: Sequence[Path] = (RESULTS,)) -> float | None:
    """Return the least time that the measured ceilings allow, or None where there are none."""
    rows = [
        row
        for folder in folders
        for row in _rows(folder / f"{device_name(device)}.jsonl")
        if row["subject"] == "ceilings" and not row["tiny"]
    ]
    dtype = str(work.dtype).removeprefix("torch.")
    copies = [row["bytes"] / _best_ms(row) for row in rows if row["case"].startswith("copy")]
    products = [
        row["flops"] / _best_ms(row) for row in rows if "flops" in row and row["dtype"] == dtype
    ]
    if not copies or (work.flops and not products):
        return None
    compute = work.flops / max(products) if work.flops else 0.0
    return float(f"{max(work.bytes / max(copies), compute):.4g}")


def _best_ms(row: Mapping[str, Any]) -> float:
    return float(min(p50 for _, p50, _ in row["times_ms"].values()))


def compiled(call: Callable[..., Any], device: Device) -> dict[str, Callable[..., Any]]:
    """Return ``torch.compile`` of a function as rivals by name: default, on CUDA max-autotune too.

    Compilation costs more than a test may: benches leave these out of tiny runs.
    """
    rivals = {"torch.compile": torch.compile(call, fullgraph=True, dynamic=False)}
    if device == "cuda":
        mode = "max-autotune-no-cudagraphs"  # graphs would time the replay of stale inputs
        rivals["torch.compile max-autotune"] = torch.compile(
            call, fullgraph=True, dynamic=False, mode=mode
        )
    return rivals


def peak_extra_bytes(call: Callable[[], Any], device: Device) -> int:
    """Return the most memory that a call had beyond what was there before, its results included.

    On the CPU by the high-water mark of the resident set, so only large allocations count truly.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with suppress(AttributeError):  # of glibc: what it keeps of freed memory is not there before
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident_bytes()
    call()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(name: str = "VmRSS") -> int:
    """Return memory of this process: what is resident now, or with ``VmHWM`` the most there was."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def time_ms(variants: Variants, *, device: Device, rounds: int) -> dict[str, list[float]]:
    """Run every variant once per round, in turn, and return each one's p20, p50 and p80.

    Benches that run beside this one, see ``bench run --jobs``, are stopped meanwhile.
    Work on CUDA is timed by events behind writes that empty the L2 of the variant's inputs.
    """
    once = _once_cuda if device == "cuda" else _once_cpu
    times: dict[str, list[float]] = {name: [] for name in variants}
    with alone():
        for turn in range(WARM_UP + rounds):
            for name, call in variants.items():
                elapsed = once(call)
                if turn >= WARM_UP:
                    times[name].append(elapsed)
    return {
        name: [round(float(q), 4) for q in np.percentile(values, (20, 50, 80))]
        for name, values in times.items()
    }


def relative_errors(
    variants: Mapping[str, Callable[[], Sequence[Tensor]]],
    expected: Sequence[Tensor],
    *,
    tolerance: float,
) -> dict[str, float]:
    """Compare every output of every variant with its float64 value, in the Frobenius norm.

    Raises:
        ValueError: One is further away than ``tolerance``, or not finite: nothing to time.
    """
    errors = {}
    for name, call in variants.items():
        pairs = zip(call(), expected, strict=True)
        worst = max(float((out.double() - ref).norm() / ref.norm()) for out, ref in pairs)
        if not worst <= tolerance:  # so that NaN fails
            raise ValueError(f"{name} is off by {worst:.2g}, more than {tolerance:g}; not timed")
        errors[name] = float(f"{worst:.2g}")
    return errors


def device_name(device: Device) -> str:
    """Return the GPU's or the CPU's name as words that make a file name."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        text = info.read_text() if info.exists() else ""
        match = re.search(r"model name\s*:\s*(.+)", text)
        name = match.group(1) if match else platform.machine()
        # Hosts of one name come with AMX and without; bfloat16 products are fast only with it.
        name += " AMX" * ("amx_tile" in text) + f" {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def version(distribution: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _environment(device: Device) -> dict[str, Any]:
    row: dict[str, Any] = {
        "device": device_name(device),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "numpy")},
    }
    if device == "cuda":
        row |= {"cuda": torch.version.cuda, "driver": _answer("nvidia-smi", *_ASK_DRIVER)}
    else:
        row |= {"torch_threads": torch.get_num_threads()}
    is_dirty = _answer("git", "status", "--porcelain", "--untracked-files=no")
    commit = _answer("git", "rev-parse", "--short", "HEAD")
    return row | {"commit": commit and commit + ("+changes" if is_dirty else "")}


_ASK_DRIVER = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _answer(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def digest_of(sources: Sequence[str]) -> str:
    """Return the SHA-256 over some files, names relative to the repository."""
    digest = hashlib.sha256()
    for source in sources:
        content = (REPOSITORY / source).read_bytes()
        digest.update(f"{source} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):  # a line that a killed process left unfinished
            rows.append(json.loads(line))
    return rows


def _once_cpu(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def _once_cuda(call: Callable[[], Any]) -> float:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    # Freed and reused at once by the caching allocator: the write costs no allocation.
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(NUM_FLUSHES):
        flushed.zero_()
    del flushed
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))

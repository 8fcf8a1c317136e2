"""``python -m bench.tune [op ...]``: choose launch configurations on this CUDA device.

Every candidate of every kernel runs inside the op's own bench cases, on their operands. One whose
results differ from the default's beyond the case's tolerance is out; one replaces the default only
if it is faster beyond the noise in sum over the cases. The winners go to the table that
``tapct_kernels.tuning`` reads; entries of other kernels stay.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.catalogue import chosen
from bench.harness import ROUNDS, Device, OpBench, Work, relative_errors, time_ms
from bench.rows import BenchError
from tapct_kernels import tuning
from tapct_kernels.tuning import Config, Launch

Table = dict[str, dict[str, dict[str, int]]]
Percentiles = Sequence[float]  # p20, p50, p80


class Measured(NamedTuple):
    """One kernel and key in one case: what is allowed, and by position what the case took."""

    configs: Sequence[Config]
    times_ms: Mapping[int, Percentiles]


def measure(work: Work, device: Device, rounds: int = ROUNDS) -> dict[Launch, Measured]:
    """Time our variant of a case with every candidate of every kernel that it launches."""
    ours = next(iter(work.variants.values()))
    # A backward in autograd's own threads would not see the forced configurations.
    with torch.autograd.set_multithreading_enabled(False):
        with tuning.asked() as candidates:
            wanted = [out.double() for out in ours()]
        return {
            launch: Measured(
                configs,
                _measure_one(ours, wanted, work.tolerance, launch[0], configs, device, rounds),
            )
            for launch, configs in candidates.items()
            if len(configs) > 1
        }


def _measure_one(
    ours: Callable[[], Sequence[Tensor]],
    wanted: Sequence[Tensor],
    tolerance: float,
    kernel: str,
    configs: Sequence[Config],
    device: Device,
    rounds: int,
) -> dict[int, Percentiles]:
    right: dict[str, Callable[[], Any]] = {}
    for index, config in enumerate(configs):
        call = partial(_with, kernel, config, ours)
        try:
            relative_errors({"this": call}, wanted, tolerance=tolerance)
        except ValueError as error:
            if index == 0:
                raise
            print(f"{kernel} {config}: {error}", flush=True)
            continue
        right[str(index)] = call
    times = time_ms(right, device=device, rounds=rounds)
    return {int(index): percentiles for index, percentiles in times.items()}


def _with(kernel: str, config: Config, call: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    with tuning.forced(kernel, config):
        return call()


def winner(cases: Iterable[Mapping[int, Percentiles]]) -> int:
    """Return the best candidate over some cases; the default unless one is faster beyond the noise.

    A candidate that is wrong in one case has no times there, and is out.
    """
    cases = list(cases)
    usable = set.intersection(*(set(times) for times in cases))

    def total(index: int, percentile: int) -> float:
        # In units of the default, so that a long case does not outvote a short one.
        return sum(times[index][percentile] / times[0][1] for times in cases)

    best = min(usable, key=lambda index: total(index, 1))
    return best if total(best, 2) < total(0, 0) else 0


def merge(table: Table, chosen_configs: Mapping[Launch, Config]) -> Table:
    """Return a table with some entries replaced, in a fixed order."""
    merged = {kernel: dict(entries) for kernel, entries in table.items()}
    for (kernel, key), config in chosen_configs.items():
        merged.setdefault(kernel, {})[str(key)] = dict(config)
    return {
        kernel: dict(sorted(entries.items(), key=lambda item: int(item[0])))
        for kernel, entries in sorted(merged.items())
    }


def write(path: Path, table: Table) -> None:
    """Write a table; a reader finds the old one or the whole new one.

    By itself: ``tapct_fast.io.atomic`` comes with the native core, which a bare GPU machine lacks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune the named ops, or all, and write the table after each."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune")
    parser.add_argument("op", nargs="*", help="see python -m bench list (default: all)")
    args = parser.parse_args(argv)
    path = tuning.table_path()
    if path is None:
        print("bench.tune: no CUDA device; tables are made on the device that uses them")
        return 2
    try:
        subjects = [subject for subject in chosen(args.op) if subject.is_op]
    except BenchError as error:
        print(f"bench.tune: {error}")
        return 2
    for subject in subjects:
        bench = importlib.import_module(f"bench.{subject.name}").main
        if isinstance(bench, OpBench):
            _tune(bench, path)
    print(path)
    return 0


def _tune(bench: OpBench, path: Path) -> None:
    found: dict[Launch, list[Measured]] = {}
    for case in bench.cases("cuda", False):
        torch._dynamo.reset()
        for launch, measured in measure(case.make(), "cuda").items():
            found.setdefault(launch, []).append(measured)
    best = {
        launch: cases[0].configs[winner([case.times_ms for case in cases])]
        for launch, cases in found.items()
    }
    for launch, config in best.items():
        print(*launch, dict(config), flush=True)
    table = json.loads(path.read_text()) if path.exists() else {}
    write(path, merge(table, best))


if __name__ == "__main__":
    sys.exit(main())

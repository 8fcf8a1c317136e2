"""What grows with the number of scans: drawing a sample's case, opening a store, a checkpoint.

The stores are made up: an index of as many cases, whose files nobody reads. A draw is timed beside
the same draw that makes the epoch's order anew. "First draw" is all that a resumed run does before
its first read: index, order by content, reader, one draw.
"""

import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.harness import Run, resident_bytes, start
from tapct_fast import recipes
from tapct_fast.config import Config, CropConfig
from tapct_fast.data.crops import CaseOrder, crop_at
from tapct_fast.data.rng import Stream, generator
from tapct_fast.data.samples import Samples
from tapct_fast.io.pack import CHUNK_ZYX
from tapct_fast.io.store import Store
from tapct_fast.io.store_index import CaseRecord, versioned, write_sealed
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.train.checkpoint import Run as State
from tapct_fast.train.checkpoint import verify
from tapct_fast.train.checkpoint_writer import CheckpointWriter
from tapct_fast.train.guard import start_guard
from tapct_fast.train.loop import init_method

SOURCES = [
    *("tapct_fast/data/crops.py", "tapct_fast/data/samples.py", "tapct_fast/io/store_index.py"),
    *("tapct_fast/io/atomic.py", "tapct_fast/train/checkpoint.py"),
    "tapct_fast/train/checkpoint_writer.py",
]
_DRAWS = 1000


def main(argv: Sequence[str] | None = None) -> None:
    """Measure draws, stores and checkpoints."""
    run = start(__file__, SOURCES, argv)
    for num_cases in (105_000, 1_000_000, 10_000_000):
        _draws(run, num_cases // 100 if run.is_tiny else num_cases)
    for num_cases, num_slices in ((105_000, 300), (1_000_000, 60)):
        _first_draw(run, num_cases // 1000 if run.is_tiny else num_cases, num_slices)
    for name in ["debug"] if run.is_tiny else ["vit-s", "vit-b"]:
        _checkpoint(run, name)


def _percentiles(call: Callable[[], object], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        gc.collect()
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return [round(1000 * float(t), 4) for t in np.percentile(seconds, (20, 50, 80))]


def _draws(run: Run, num_cases: int) -> None:
    case = f"{_DRAWS} draws of {num_cases} cases"
    if not run.wants(case, "cpu"):
        return
    cases = [_record(0, 300)] * num_cases
    order = CaseOrder(num_cases, seed=0)

    def ours() -> list[int]:
        return [crop_at(cases, CropConfig(), order, index=i).case for i in range(_DRAWS)]

    def one_anew() -> int:
        return int(generator(0, Stream.CASE_ORDER, 0).permutation(num_cases)[0])

    if ours()[0] != one_anew():
        raise ValueError("both ways should draw the same case; not timed")
    times = {
        "tapct_fast": _percentiles(ours, 5),
        "first of an epoch": _percentiles(lambda: CaseOrder(num_cases, seed=0).case_at(0), 5),
        "1 draw, order made anew": _percentiles(one_anew, 5),
    }
    run.write(case, "cpu", times, bytes=4 * num_cases, verified="both draw the same case")


def _first_draw(run: Run, num_cases: int, num_slices: int) -> None:
    case = f"first draw, {num_cases} cases of {num_slices} slices"
    if not run.wants(case, "cpu"):
        return
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.json"
        cases = [_record(number, num_slices).to_json() for number in range(num_cases)]
        write_sealed(index, versioned("lz4hc") | {"cases": cases})
        cases.clear()
        kept: list[Samples] = []

        def ours() -> None:
            kept.clear()
            store = Store.open(Path(folder))
            kept.append(Samples(store, Config()))
            kept[0].draw(0)
            store._reader()

        before = resident_bytes()
        rounds = 3 if num_cases < 1_000_000 else 1
        times = {"tapct_fast": _percentiles(ours, rounds)}
        gc.collect()
        resident = max(resident_bytes() - before, 0)
        names = {record.case for record in kept.pop()._cases}
        if len(names) != num_cases:
            raise ValueError("cases are missing; not written")
        names.clear()
        times["json.loads of the index"] = _percentiles(
            lambda: json.loads(index.read_bytes()), rounds
        )
        run.write(
            case,
            "cpu",
            times,
            bytes=index.stat().st_size,
            resident_bytes=resident,
            verified="every case is there",
        )


def _checkpoint(run: Run, name: str) -> None:
    case = f"checkpoint of {name}"
    if not run.wants(case, "cpu"):
        return
    config = recipes.recipe(name)
    method = init_method(config)
    groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
    optimizer = build_optimizer(groups, config.optim)
    for parameter in method.student.parameters():
        moments = {key: torch.rand_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {**moments, "step": torch.ones(())}
    guard = start_guard(len(list(method.student.children())), "cpu")
    state = State(method, optimizer, config, "made up", "cpu float32", guard)
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(Path(folder), keep=2) as writer:

        def save() -> Path:
            path = writer.submit(state, 1)
            writer.wait()
            return path

        path = save()
        size = sum(file.stat().st_size for file in path.iterdir())
        times = {
            "tapct_fast save": _percentiles(save, 3),
            "tapct_fast verify": _percentiles(lambda: verify(path), 3),
        }
        run.write(case, "cpu", times, bytes=size, verified="by its hashes")


def _record(number: int, num_slices: int) -> CaseRecord:
    """Return the record of a scan of 512 x 512 pixels that nobody packed."""
    shape = (num_slices, 512, 512)
    num_chunks = int(np.prod([-(-s // c) for s, c in zip(shape, CHUNK_ZYX, strict=True)]))
    noise = np.random.default_rng(number).bytes(4 * (num_chunks + 1) + 32)
    name = f"case-{number:016x}"
    affine = (
        -0.78,
        0.0,
        0.0,
        200.0,
        0.0,
        -0.78,
        0.0,
        200.0,
        0.0,
        0.0,
        1.0,
        -100.0,
        0.0,
        0.0,
        0.0,
        1.0,
    )
    return CaseRecord(
        name,
        f"cases/{name}.b2nd",
        shape,
        (1.0, 0.78, 0.78),
        ((0, 20, 30), (num_slices, 480, 490)),
        affine,
        noise[32:],
        noise[:32].hex(),
        60_000_000,
    )


if __name__ == "__main__":
    main()

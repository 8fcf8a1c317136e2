"""Processes that share a run, forked from a server that has torch loaded."""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tapct_fast.config import Config
from tapct_fast.data.pipeline import ViewPipeline
from tapct_fast.errors import StoreError, TapctError
from tapct_fast.io.quarantine import Refusal, write_quarantine
from tapct_fast.io.store import Store
from tapct_fast.ssl.schedules import step_values
from tapct_fast.ssl.shards import local
from tapct_fast.train import processes as module
from tapct_fast.train.checkpoint_writer import CheckpointWriter
from tapct_fast.train.loop import build_run, micro_batch, train
from tapct_fast.train.step import build_engine, train_step

_PRELOAD = ["shared_runs", "torch.utils.tensorboard", "torch._dynamo", "torch.distributed.fsdp"]


class Fault(NamedTuple):
    """What goes wrong with the data that one process prepares for some steps."""

    rank: int
    positions: tuple[int, ...]
    is_fatal: bool  # else a voxel is NaN


def start_server() -> ForkServerContext:
    """A server imports torch once and forks each process from one without threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def start(
    context: ForkServerContext,
    target: Callable[..., None],
    world_size: int,
    *args: Any,
    port: int | None = None,
) -> list[ForkServerProcess]:
    """Start ``target(*args, rank, world_size, port)`` for every rank."""
    if port is None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
    processes = [
        context.Process(target=target, args=(*args, rank, world_size, port))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def codes(processes: Sequence[ForkServerProcess], *, seconds: float = 60) -> list[int | None]:
    """Wait for the exit codes; None is that of one that did not leave and is killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return found


def stderr_of(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.stderr-{rank}")


def wait_for_step(out: Path, step: int) -> None:
    """Wait until a run has told of a step."""
    path, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert time.monotonic() < deadline, "the run does not come so far"
        time.sleep(0.01)


def train_together(
    config: Config,
    store: Path,
    out: Path,
    arguments: dict[str, Any],
    rank: int,
    world_size: int,
    port: int,
) -> None:
    """Be one process of a run, as the command line is; its stderr is a file beside the run.

    ``arguments`` are those of ``train``, and a ``fault``, a ``short`` patience in seconds, the
    seconds by which a checkpoint is written late, or the number of an ``attempt`` for which
    torchrun keeps the store.
    """
    arguments = dict(arguments)
    _write_late(arguments.pop("late", 0.0))
    attempt = arguments.pop("attempt", None)
    if attempt is not None:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
    fault, short = arguments.pop("fault", None), arguments.pop("short", None)
    if fault is not None and fault.rank == rank:
        _go_wrong(fault)
    if short is not None:
        module.SHORT = timedelta(seconds=short)
    os.dup2(os.open(stderr_of(out, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    _be(rank, world_size, port)
    try:
        with module.started(os.environ, torch.device("cpu")) as processes:
            train(config, store, out, processes=processes, **arguments)
    except TapctError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def measure_shards(
    config: Config, store: Path, out: Path, rank: int, world_size: int, port: int
) -> None:
    """Write which share of weights, gradients and moments this process holds after a step."""
    _be(rank, world_size, port)
    device = torch.device("cpu")
    with module.started(os.environ, device) as processes:
        place = {"rank": processes.rank, "world_size": processes.world_size}
        pipeline = ViewPipeline(Store.open(store), config, device=device, **place)
        run = build_run(config, "", device, torch.float32, "", processes=processes)
        engine = build_engine(run.method, config.train, dtype=torch.float32, processes=processes)
        batch = micro_batch(config, 0, pipeline.groups(0), pipeline.batch_at(0, 0))
        values = step_values(config.schedule, 0, num_steps=6, batch_size=config.train.batch_size)
        train_step(run, [batch], values, engine)
        student = list(run.method.student.parameters())
        tensors = {
            "student": student,
            "teacher": list(run.method.teacher.parameters()),
            "gradients": [p.grad for p in student if p.grad is not None],
            "moments": [t for s in run.optimizer.state.values() for t in s.values() if t.dim()],
        }
        shares = {
            name: sum(local(t).numel() for t in some) / sum(t.numel() for t in some)
            for name, some in tensors.items()
        }
        out.with_name(f"{out.name}-{rank}").write_text(json.dumps(shares))


def refuse_cases(folder: Path, num_cases: int, rank: int, world_size: int, _: int) -> None:
    """List cases of its own and those that others list too."""
    for case in range(num_cases):
        for name in (f"{rank}-{case}", f"all-{case}"):
            write_quarantine(folder, [name], [Refusal(name, "store", f"of {world_size}")])


def _be(rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"


def _write_late(seconds: float) -> None:
    write = CheckpointWriter._write

    def late(self: CheckpointWriter, folder: Path, texts: dict[str, str]) -> None:
        time.sleep(seconds)
        write(self, folder, texts)

    CheckpointWriter._write = late  # type: ignore[method-assign]


def _go_wrong(fault: Fault) -> None:
    make = ViewPipeline._batch

    def wrong(self: ViewPipeline, step: int, micro: int, loaded: Any) -> Any:
        batch, event = make(self, step, micro, loaded)
        if step in fault.positions:
            if fault.is_fatal:
                raise StoreError("the disk went away")
            batch.global_VBZYX[0, 0, 0, 0, 0] = torch.nan
        return batch, event

    ViewPipeline._batch = wrong  # type: ignore[method-assign]

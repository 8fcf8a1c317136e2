"""Processes that share a run, forked from a server that has torch loaded."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

from tapct_fast.config import Config
from tapct_fast.errors import TapctError
from tapct_fast.train import processes as module
from tapct_fast.train.loop import train

_PRELOAD = ["shared_runs", "torch.utils.tensorboard", "torch._dynamo", "torch.distributed.fsdp"]


def start_server() -> ForkServerContext:
    """A server imports torch once and forks each process from one without threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def join_run(
    config: Config,
    store: Path,
    out: Path,
    rank: int,
    world_size: int,
    port: int,
    short: float | None,
) -> None:
    """Be one of the processes of a run, as the command line is; stderr is a file beside it."""
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    descriptor = os.open(stderr_of(out, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    if short is not None:
        module.SHORT = timedelta(seconds=short)
    try:
        with module.started(os.environ, torch.device("cpu")) as processes:
            train(config, store, out, processes=processes)
    except TapctError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def stderr_of(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.stderr-{rank}")


def start(
    context: ForkServerContext,
    config: Config,
    store: Path,
    out: Path,
    world_size: int,
    *,
    short: float | None = None,
) -> list[ForkServerProcess]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [
        context.Process(target=join_run, args=(config, store, out, rank, world_size, port, short))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def codes(processes: Sequence[ForkServerProcess], *, seconds: float = 60) -> list[int | None]:
    """Wait for the exit codes; None is one that did not leave, and is killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return found


def wait_for_step(out: Path, step: int) -> None:
    """Wait until a run has told of a step."""
    path, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert time.monotonic() < deadline, "the run does not come so far"
        time.sleep(0.01)

"""Runs built without a store, one step of them, and processes that die while they save."""

import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tapct_fast.config import Config
from tapct_fast.data.pipeline import ViewBatch, ViewPipeline
from tapct_fast.errors import StoreError
from tapct_fast.model.block import draw_kept_rows
from tapct_fast.ssl.method import DinoMethod, Kept, Losses
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import StepValues, step_values
from tapct_fast.train.checkpoint import Run
from tapct_fast.train.checkpoint_writer import CheckpointWriter
from tapct_fast.train.guard import explain, start_guard
from tapct_fast.train.loop import train
from tapct_fast.train.processes import Processes
from tapct_fast.train.step import Engine, MicroBatch, StepMetrics, build_engine, train_step

# What changes folders, as Python's audit events, and what makes content durable.
CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
VALUES = StepValues(0.01, 0.01, 0.04, 0.9, 0.05)
TIMED = {"samples_per_s", "data_wait"}  # measured, not computed


def run_of(
    config: Config,
    *,
    seed: int = 2,
    group_size: int = 0,
    fingerprint: str = "store",
    device: str = "cpu",
) -> Run:
    method = DinoMethod(
        config.vit, config.heads, config.losses, hu=config.hu, seed=seed, group_size=group_size
    ).to(device)
    groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
    optimizer = build_optimizer(groups, config.optim)
    guard = start_guard(len(list(method.student.children())), device)
    return Run(method, optimizer, config, fingerprint, "cpu float32", guard)


def stepped_run(config: Config, *, seed: int = 0) -> Run:
    """Return a run after one random update, with a number of its own in every tensor of state."""
    run = run_of(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in run.method.student.named_parameters():
        if name != "backbone.mask_token":  # never masked: no gradient, no optimizer state
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    run.optimizer.step()
    for center in (m for m in run.method.children() if hasattr(m, "center_P")):
        center.center_P.normal_(generator=generator)
    for number, tensor in enumerate(run.guard):
        tensor.fill_(number + seed)
    return run


def tensors(run: Run) -> dict[str, Tensor]:
    names = {p: n for n, p in run.method.student.named_parameters()}
    state = {f"{names[p]}.{k}": t for p, s in run.optimizer.state.items() for k, t in s.items()}
    both = run.method.state_dict() | state | run.guard._asdict()
    return {k: t.detach().clone() for k, t in both.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def with_centers(config: Config) -> Config:
    """Softmax centering adds buffers to the teacher's file."""
    losses = dataclasses.replace(config.losses, centering="softmax")
    return dataclasses.replace(config, losses=losses)


def explained(run: Run, metrics: StepMetrics) -> str:
    """Return the cause that the loop tells of a refused step."""
    return explain(
        metrics.losses,
        metrics.grad_norms,
        voxels=metrics.voxels,
        networks={"student": run.method.student, "teacher": run.method.teacher},
        optimizer=run.optimizer,
    )


def run_in_server(context: ForkServerContext, target: Callable[..., None], *args: Any) -> int:
    """Run ``target`` in a process of its own; return its exit code."""
    process = context.Process(target=target, args=args)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def save_until_killed(config: Config, folder: Path, num_saves: int, kill_at: int) -> None:
    """Save, and die at call number ``kill_at`` of the thread that writes."""
    torch.set_num_threads(1)
    count = 0

    def audit(event: str, _: tuple[Any, ...]) -> None:
        nonlocal count
        if event in CALLS and threading.current_thread().name.startswith("checkpoint"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    run = stepped_run(config)
    sys.addaudithook(audit)
    with CheckpointWriter(folder, keep=2) as writer:
        for step in range(1, num_saves + 1):
            writer.submit(run, step)
    (folder / "num_calls").write_text(str(count))


def save_and_record(config: Config, folder: Path, num_saves: int) -> None:
    """Save, and write the order of what the writing thread asked of the system."""
    calls: list[tuple[str, str]] = []
    fsync = os.fsync

    def noted_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename":
            calls.append(("rename", Path(args[1]).name))

    run = stepped_run(config)
    os.fsync = noted_fsync
    sys.addaudithook(audit)
    with CheckpointWriter(folder, keep=2) as writer:
        for step in range(1, num_saves + 1):
            calls.append(("save", str(step)))
            writer.submit(run, step)
            writer.wait()
    (folder / "calls.json").write_text(json.dumps(calls))


def train_until_killed(config: Config, store: Path, out: Path, after: float | None = None) -> None:
    """Train, and die ``after`` so many seconds, wherever that is."""
    torch.set_num_threads(1)
    if after is not None:

        def die() -> None:
            time.sleep(after)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=die, daemon=True).start()
    train(config, store, out)


def clipped_at(config: Config, norm: float) -> Config:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_norm=norm))


def kept_rows(config: Config, views: ViewBatch, seed: int) -> Kept:
    """What drop path keeps of a batch that is one group."""
    num_samples = views.num_samples
    return Kept(
        *(
            draw_kept_rows(
                [2 * seed + kind],
                depth=config.vit.depth,
                num_views=v_VBZYX.shape[0],
                group_size=num_samples,
                drop_path=config.vit.drop_path,
            )
            for kind, v_VBZYX in enumerate((views.global_VBZYX, views.local_VBZYX))
        )
    )


def engine_of(
    run: Run,
    *,
    dtype: torch.dtype = torch.float32,
    compile: str = "off",
    waits: bool = True,
) -> Engine:
    """``waits=False`` is the step as it runs on CUDA, where the host reads nothing."""
    settings = dataclasses.replace(run.config.train, compile=compile)
    engine = build_engine(run.method, settings, dtype=dtype, processes=Processes())
    return engine._replace(waits=waits)


def do_step(
    run: Run,
    batches: Sequence[MicroBatch],
    values: StepValues,
    *,
    dtype: torch.dtype = torch.float32,
    waits: bool = True,
) -> StepMetrics:
    return train_step(run, batches, values, engine_of(run, dtype=dtype, waits=waits)).read()


def random_batch(seed: int) -> ViewBatch:
    generator = torch.Generator().manual_seed(seed)
    mask_NL = torch.zeros(4, 8, dtype=torch.bool)
    mask_NL[1, :3] = mask_NL[2, 2:7] = True
    return ViewBatch(
        torch.randn(2, 2, 8, 16, 16, generator=generator),
        torch.randn(2, 2, 4, 8, 8, generator=generator),
        mask_NL,
        mask_NL.flatten().nonzero().squeeze(1),
        torch.tensor([1 / 3] * 3 + [1 / 5] * 5),
        2,
    )


def random_batches(config: Config, num: int = 2, *, first: int = 1) -> list[MicroBatch]:
    seeds = range(first, first + num)
    return [
        MicroBatch(views, kept_rows(config, views, seed))
        for seed, views in ((seed, random_batch(seed)) for seed in seeds)
    ]


def snapshot(run: Run) -> list[Tensor]:
    state = [t for s in run.optimizer.state.values() for t in s.values()]
    return [t.detach().clone() for t in (*run.method.state_dict().values(), *state)]


def losses_of_steps(
    config: Config,
    num: int,
    *,
    compile: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensor:
    """Every loss of every step, each on views of its own."""
    run, found = run_of(config, device=device), []
    engine = engine_of(run, compile=compile, dtype=dtype, waits=device == "cpu")
    for step in range(num):
        values = step_values(config.schedule, step, num_steps=num, batch_size=4)
        batches = random_batches(config, config.train.accumulate, first=1 + 2 * step)
        metrics = train_step(run, moved(batches, device), values, engine).read()
        found.append([metrics.losses[name] for name in Losses._fields])
    return torch.tensor(found, dtype=torch.float64)


def moved(batches: list[MicroBatch], device: str) -> list[MicroBatch]:
    return [tree_map_only(Tensor, lambda t: t.to(device), batch) for batch in batches]


def hashes(out: Path, step: int = 6) -> dict[str, str]:
    folder = out / "checkpoints" / f"step-{step:08d}"
    files = [*folder.glob("*.safetensors"), folder / "config.json", folder / "state.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a run without what is measured, not computed."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    make = ViewPipeline._batch

    def failing(self: ViewPipeline, at: int, micro: int, loaded: Any) -> Any:
        if at == step:
            raise StoreError("the disk went away")
        return make(self, at, micro, loaded)

    monkeypatch.setattr(ViewPipeline, "_batch", failing)

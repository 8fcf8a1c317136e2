"""A whole run, from a store to checkpoints: build or resume, then step by step.

A run is a pure function of config, store and backend: every draw is keyed by (seed, step), so a run
that was killed and started again gives the same losses and weights bit for bit.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tapct_fast.config import Config, flatten, to_json
from tapct_fast.data.pipeline import ViewBatch, ViewPipeline
from tapct_fast.data.rng import Stream, generator
from tapct_fast.errors import InputError, StoppedError, TrainError
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.quarantine import Refusal, write_quarantine
from tapct_fast.io.store import Store
from tapct_fast.ssl.method import DinoMethod
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import StepValues, step_values
from tapct_fast.train.checkpoint import Run, has_run, load_latest, save
from tapct_fast.train.log import RunLog, notify
from tapct_fast.train.signals import StopSignals
from tapct_fast.train.step import StepMetrics, train_step
from tapct_fast.train.trackers import choose_trackers
from tapct_kernels.attention import choose_backend as choose_attention

_SEEDS = 2**61  # networks and drop path add to, or double, what is drawn below this


class TrainResult(NamedTuple):
    """A finished run."""

    checkpoint: Path  # the last one
    num_steps: int
    final_loss: float  # total of the last step
    uniform_loss: float  # DINO and iBOT terms of a student whose logits are all equal
    seconds: float  # of this call


def train(
    config: Config,
    store_dir: Path,
    out_dir: Path,
    *,
    resume: Literal["auto", "never"] = "auto",
    device: torch.device | str | None = None,
    progress: bool = False,
    track: Sequence[str] | None = None,
) -> TrainResult:
    """Train to ``config.train.num_steps``, from the newest checkpoint in ``out_dir`` if any.

    Args:
        config: The run.
        store_dir: Folder written by ``pack``.
        out_dir: Gets ``config.json``, ``metrics.jsonl``, ``checkpoints/`` and what the trackers
            write; and ``quarantine.jsonl``, if cases turn out damaged.
        resume: ``auto`` continues a run in ``out_dir``; ``never`` refuses a folder that holds one.
        device: By default CUDA where there is one, else the CPU.
        progress: Show a progress line on stderr.
        track: Names of trackers, see ``trackers.KINDS``; by default TensorBoard where installed.

    Raises:
        InputError: A tracker is unknown or not installed, ``out_dir`` holds a run and ``resume``
            is ``never``, there is no such device, or the renderer that was asked for cannot run
            on it.
        StoreReadError: A case could not be read, however often it was tried.
        StoreError: The store is missing or empty, or too many of its cases are damaged.
        CheckpointError: The run in ``out_dir`` has other settings or another store, or is damaged.
        TrainError: A loss or gradient was not finite; the last checkpoint is intact.
        StoppedError: SIGTERM or SIGUSR1 came; the checkpoint of the step then at work is written.
    """
    start = time.perf_counter()
    trackers = choose_trackers(track)
    store = Store.open(store_dir)
    if resume == "never" and has_run(out_dir):
        raise InputError("--out holds a run; --resume auto continues it, or give another --out")
    target, dtype = choose_backend(config, device)

    def on_damage(case: str, reason: str) -> None:
        write_quarantine(out_dir, [case], [Refusal(case, "store", reason, "integrity")])
        notify(f"passed over and listed in quarantine.jsonl: {reason}")

    pipeline = ViewPipeline(store, config, device=target, on_damage=on_damage)
    run = _build(config, store.fingerprint, target, dtype, pipeline.renderer)
    step = load_latest(run, out_dir, notify=notify)
    if progress:
        where = f"resuming after step {step}" if step else "starting"
        notify(f"{where} of {config.train.num_steps} on {run.backend}")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(out_dir / "config.json", (to_json(config) + "\n").encode())
    except OSError as error:
        raise InputError(f"--out cannot be written: {error.strerror}") from None
    with RunLog(
        out_dir,
        step=step,
        num_steps=config.train.num_steps,
        progress=progress,
        settings=flatten(dataclasses.asdict(config)),
        track=trackers,
    ) as log:
        folder = _run_steps(run, pipeline, log, out_dir, step, dtype)
    return TrainResult(
        checkpoint=folder,
        num_steps=config.train.num_steps,
        final_loss=log.last_loss,
        uniform_loss=uniform_loss(config),
        seconds=time.perf_counter() - start,
    )


def choose_backend(
    config: Config, device: torch.device | str | None
) -> tuple[torch.device, torch.dtype]:
    """Return the device of a run and the dtype of its matrix products.

    ``train.precision=auto`` is bfloat16 on CUDA devices that have it and float32 elsewhere: CPUs
    without bfloat16 units emulate it at a fraction of the speed.

    Raises:
        InputError: There is no such device.
    """
    has_cuda = torch.cuda.is_available()
    try:
        target = torch.device(device or ("cuda" if has_cuda else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {device!r} is unknown; use cpu, cuda or cuda:1") from None
    if target.type not in ("cpu", "cuda"):
        raise InputError(f"--device {target} is not supported; use cpu or cuda")
    if target.type == "cuda" and not (has_cuda and (target.index or 0) < torch.cuda.device_count()):
        raise InputError(f"--device {target}: there is no such CUDA device; see tapct-fast doctor")
    precision = config.train.precision
    if precision == "auto":
        fast = target.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if fast else "fp32"
    return target, torch.bfloat16 if precision == "bf16" else torch.float32


def uniform_loss(config: Config) -> float:
    """Return the DINO and iBOT terms of the loss of a student whose logits are all equal.

    A run whose loss stays at this number has not started to learn; KoLeo comes on top.
    """
    ibot = config.heads.ibot or config.heads.dino
    num_views = 2 * (config.train.batch_size // config.train.accumulate)
    share = int(num_views * config.masks.prob) / num_views
    return config.losses.dino_weight * math.log(
        config.heads.dino.num_prototypes
    ) + config.losses.ibot_weight * share * math.log(ibot.num_prototypes)


def init_method(config: Config) -> DinoMethod:
    """Return student and teacher as a run of ``config`` starts, on the host."""
    seed = int(generator(config.train.seed, Stream.WEIGHTS).integers(_SEEDS))
    # Built on the host: the same seed gives the same weights on every device.
    return DinoMethod(config.vit, config.heads, config.losses, hu=config.hu, seed=seed)


def _build(
    config: Config, fingerprint: str, device: torch.device, dtype: torch.dtype, renderer: str
) -> Run:
    method = init_method(config).to(device)
    groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
    optimizer = build_optimizer(groups, config.optim)
    attention = choose_attention(device.type, dtype, config.vit.head_dim, needs_grad=True)
    number = str(dtype).removeprefix("torch.")
    backend = f"{device.type} {number}, attention {attention}, views {renderer}"
    return Run(method, optimizer, config, fingerprint, backend)


def _run_steps(
    run: Run, pipeline: ViewPipeline, log: RunLog, out_dir: Path, first: int, dtype: torch.dtype
) -> Path:
    """Do the steps from ``first`` to the end and return the last checkpoint."""
    config, settings = run.config, run.config.train
    folder = out_dir / "checkpoints" / f"step-{first:08d}"
    waits: list[float] = []
    mark, mark_step = time.perf_counter(), first
    with StopSignals() as stop, closing(pipeline.stream(first)) as stream:
        for step in range(first, settings.num_steps):
            values = step_values(
                config.schedule,
                step,
                num_steps=settings.num_steps,
                batch_size=settings.batch_size,
            )
            try:
                metrics = train_step(
                    run.method,
                    run.optimizer,
                    _micro_batches(stream, config, step, waits),
                    values,
                    accumulate=settings.accumulate,
                    clip_norm=config.optim.clip_norm,
                    dtype=dtype,
                )
            except TrainError as error:
                raise TrainError(f"step {step + 1}: {error}") from None
            done = step + 1
            if done % settings.log_every == 0 or done == settings.num_steps:
                now = time.perf_counter()
                seconds = now - mark
                rate = (done - mark_step) * settings.batch_size / seconds
                log.write(_row(done, metrics, values, rate, sum(waits) / seconds))
                mark, mark_step = now, done
                waits.clear()
            log.advance()
            is_last = done == settings.num_steps
            if done % settings.checkpoint_every == 0 or is_last or stop.received:
                log.sync()
                folder = save(run, out_dir, done)
            if stop.received and not is_last:
                raise StoppedError(
                    f"stopped by {stop.received} behind the checkpoint of step {done}; the same "
                    "command goes on"
                )
    return folder


def _micro_batches(
    stream: Iterator[tuple[ViewBatch, float]], config: Config, step: int, waits: list[float]
) -> Iterator[tuple[ViewBatch, int]]:
    """Yield the micro-batches of one step with their drop-path seeds; note the waiting times."""
    for micro, (batch, seconds) in enumerate(islice(stream, config.train.accumulate)):
        waits.append(seconds)
        rng = generator(config.train.seed, Stream.DROP_PATH, step, micro)
        yield batch, int(rng.integers(_SEEDS))


def _row(
    step: int, metrics: StepMetrics, values: StepValues, samples_per_s: float, data_wait: float
) -> dict[str, Any]:
    losses = metrics.losses
    return {
        "step": step,
        "loss": losses["total"],
        **{name: value for name, value in losses.items() if name != "total"},
        **{f"grad_norm_{name}": value for name, value in metrics.grad_norms.items()},
        **values._asdict(),
        "samples_per_s": round(samples_per_s, 3),
        "data_wait": round(data_wait, 4),
    }

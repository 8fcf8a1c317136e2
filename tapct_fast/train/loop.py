"""A whole run, from a store to checkpoints: build or resume, then step by step.

A run is a pure function of config, store and backend: every draw is keyed by (seed, step, group),
so a run that was killed and started again gives the same losses and weights bit for bit.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tapct_fast.config import Config, flatten, to_json
from tapct_fast.data.pipeline import ViewBatch, ViewPipeline
from tapct_fast.data.rng import Stream, generator
from tapct_fast.errors import InputError, StoppedError
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.quarantine import Refusal, write_quarantine
from tapct_fast.io.store import Store
from tapct_fast.model.block import draw_kept_rows
from tapct_fast.model.fp8 import refusal as fp8_refusal
from tapct_fast.ssl.gram import anchor_step
from tapct_fast.ssl.health import Evidence, measure
from tapct_fast.ssl.method import DinoMethod, Kept
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import StepValues, step_values
from tapct_fast.train.anchor import make_anchor
from tapct_fast.train.checkpoint import Run, has_run, load_latest
from tapct_fast.train.checkpoint_writer import CheckpointWriter, gather
from tapct_fast.train.guard import RefusedError, Verdict, explain, start_guard
from tapct_fast.train.guide import Guide, load_guide
from tapct_fast.train.incident import capture, forget_later, record_rollback
from tapct_fast.train.log import RunLog, notify
from tapct_fast.train.memory import memory_errors
from tapct_fast.train.observer import Observer
from tapct_fast.train.processes import Processes
from tapct_fast.train.rollback import must_roll_back, roll_back
from tapct_fast.train.sessions import record_session
from tapct_fast.train.signals import StopSignals
from tapct_fast.train.start import Start, read_start, start_from
from tapct_fast.train.step import (
    Engine,
    MicroBatch,
    StepMetrics,
    StepResult,
    build_engine,
    gather_evidence,
    train_step,
)
from tapct_fast.train.trackers import choose_trackers
from tapct_kernels.attention import choose_backend as choose_attention

_SEEDS = 2**61  # networks add to what is drawn below this


class TrainResult(NamedTuple):
    """A finished run."""

    checkpoint: Path  # the last one
    num_steps: int
    final_loss: float  # total of the last step that was not refused
    uniform_loss: float  # DINO and iBOT terms of a student whose logits are all equal
    seconds: float  # of this call


def train(
    config: Config,
    store_dir: Path,
    out_dir: Path,
    *,
    start: str | Path | None = None,
    distill: Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    device: torch.device | str | None = None,
    progress: bool = False,
    track: Sequence[str] | None = None,
    observers: Sequence[Observer] = (),
    processes: Processes | None = None,
) -> TrainResult:
    """Train to ``config.train.num_steps``, from the newest checkpoint in ``out_dir`` if any.

    Args:
        config: The run.
        store_dir: Folder written by ``pack``.
        out_dir: Gets ``config.json``, ``sessions.jsonl``, ``metrics.jsonl``, ``checkpoints/`` and
            what the trackers write; ``quarantine.jsonl`` if cases turn out damaged,
            ``incidents.jsonl`` if steps are refused.
        start: Weights that student and teacher start from, see ``train.start``; a run that goes on
            must be given the same.
        distill: Run whose frozen teacher gives the targets, see ``train.guide``; a run that goes on
            must be given the same.
        resume: ``auto`` continues a run in ``out_dir``; ``never`` refuses a folder that holds one.
        device: By default CUDA where there is one, else the CPU.
        progress: Show a progress line on stderr.
        track: Names of trackers, see ``trackers.KINDS``; by default TensorBoard where installed.
        observers: Told about rows and checkpoints, and closed in this order; by one process only.
        processes: This process among those that share the run; by default it is alone. All give
            the same arguments, and ``out_dir`` is one folder for all.

    Raises:
        InputError: A tracker is unknown or not installed, ``out_dir`` holds a run and ``resume``
            is ``never``, there is no such device, or the renderer that was asked for cannot run on
            it.
        StoreReadError: A case could not be read, however often it was tried.
        StoreError: The store is missing or empty, or too many of its cases are damaged.
        CheckpointError: The run in ``out_dir`` has other settings or another store, or is damaged.
        ConfigError: The groups of a step cannot be dealt out to so many processes.
        CheckpointWriteError: The disk is full or cannot be written; earlier checkpoints are intact.
        TrainError: Too many steps were refused, or another process was lost, and the last
            checkpoint is intact; or the first steps do not fit into memory.
        StoppedError: SIGTERM or SIGUSR1 came, and the checkpoint of the step then at work is
            written; or a step did not fit into memory, and the last checkpoint is intact.
    """
    began = time.perf_counter()
    processes = processes or Processes()
    trackers = choose_trackers(track)
    store = Store.open(store_dir)
    if resume == "never" and has_run(out_dir):
        raise InputError("--out holds a run; --resume auto continues it, or give another --out")
    target, dtype = choose_backend(config, device)

    def on_damage(case: str, reason: str) -> None:
        write_quarantine(out_dir, [case], [Refusal(case, "store", reason, "integrity")])
        notify(f"passed over and listed in quarantine.jsonl: {reason}")

    pipeline = ViewPipeline(
        store,
        config,
        device=target,
        on_damage=on_damage,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    run = build_run(
        config,
        store.fingerprint,
        target,
        dtype,
        pipeline.renderer,
        start=None if start is None else read_start(start, config, notify=notify),
        guide=None if distill is None else load_guide(distill, config),
        processes=processes,
    )
    step = _resume(run, out_dir, processes)
    num_steps = config.train.num_steps
    if processes.is_first:
        if progress:
            where = f"resuming after step {step}" if step else "starting"
            notify(f"{where} of {num_steps} on {run.backend}")
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            write_atomic(out_dir / "config.json", (to_json(config) + "\n").encode())
            num_scans = len(store.cases)
            record_session(out_dir, run, step=step, num_scans=num_scans, device=target)
        except OSError as error:
            raise InputError(f"--out cannot be written: {error.strerror}") from None
    engine = build_engine(run.method, config.train, dtype=dtype, processes=processes)
    # One for all courses: a signal that comes before a roll-back stops the run behind it.
    with (
        ExitStack() as watched,
        memory_errors(out_dir, config.train, world_size=processes.world_size),
        StopSignals() as stop,
    ):
        for observer in reversed(observers if processes.is_first else ()):
            watched.callback(observer.close)
        steps = _Steps(run, engine, store, pipeline, out_dir, trackers, observers)
        while True:
            try:
                steps.run_from(step, stop, progress=progress)
                break
            except _BudgetSpentError as spent:
                step = _go_back(run, out_dir, spent, processes)
    return TrainResult(
        checkpoint=out_dir / "checkpoints" / f"step-{num_steps:08d}",
        num_steps=num_steps,
        final_loss=steps.last_loss,
        uniform_loss=uniform_loss(config),
        seconds=time.perf_counter() - began,
    )


def choose_backend(
    config: Config, device: torch.device | str | None
) -> tuple[torch.device, torch.dtype]:
    """Return the device of a run and the dtype of its matrix products.

    ``train.precision=auto`` is bfloat16 on CUDA devices that have it and float32 elsewhere: CPUs
    without bfloat16 units emulate it at a fraction of the speed, and a run that moves between them
    and those with AMX keeps its numbers. What ``fp8`` leaves is bfloat16.

    Raises:
        InputError: There is no such device, or it cannot do ``fp8``.
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
    if precision == "fp8" and (reason := fp8_refusal(target)):
        raise InputError(
            f"train.precision=fp8 does not run on {target}: {reason}; use train.precision=bf16"
        )
    return target, torch.float32 if precision == "fp32" else torch.bfloat16


def uniform_loss(config: Config) -> float:
    """Return the DINO and iBOT terms of the loss of a student whose logits are all equal.

    A run whose loss stays at this number has not started to learn; KoLeo comes on top.
    """
    ibot = config.heads.ibot or config.heads.dino
    num_views = 2 * config.train.group_size
    share = int(num_views * config.masks.prob) / num_views
    return config.losses.dino_weight * math.log(
        config.heads.dino.num_prototypes
    ) + config.losses.ibot_weight * share * math.log(ibot.num_prototypes)


def init_method(config: Config) -> DinoMethod:
    """Return student and teacher as a run of ``config`` starts, on the host."""
    seed = int(generator(config.train.seed, Stream.WEIGHTS).integers(_SEEDS))
    # Built on the host: the same seed gives the same weights on every device.
    return DinoMethod(
        config.vit,
        config.heads,
        config.losses,
        hu=config.hu,
        seed=seed,
        group_size=config.train.group_size,
    )


def build_run(
    config: Config,
    fingerprint: str,
    device: torch.device,
    dtype: torch.dtype,
    renderer: str,
    *,
    start: Start | None = None,
    guide: Guide | None = None,
    processes: Processes | None = None,
) -> Run:
    """Return a run as it starts; see ``ViewPipeline`` for the renderer."""
    processes = processes or Processes()
    method = init_method(config)
    if start is not None:
        start_from(method, start)
    if guide is not None:
        method.guide = guide.networks
    method.anchor = make_anchor(config)
    method.to(device)
    if processes.group is not None and config.train.parallel == "fsdp":
        processes.shard(method)
    groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
    optimizer = build_optimizer(groups, config.optim)
    attention = choose_attention(device.type, dtype, config.vit.head_dim, needs_grad=True)
    number = str(dtype).removeprefix("torch.")
    if config.train.precision == "fp8":
        number += " and float8 linears"
    backend = f"{device.type} {number}, attention {attention}, views {renderer}"
    if processes.group is not None:
        backend += f", {config.train.parallel} on {processes.world_size}"
    guard = start_guard(len(list(method.student.children())), device)
    return Run(
        method,
        optimizer,
        config,
        fingerprint,
        backend,
        guard,
        "" if start is None else start.sha256,
        "" if guide is None else guide.sha256,
    )


def micro_batch(config: Config, position: int, groups: range, views: ViewBatch) -> MicroBatch:
    """Put the rows that drop path keeps beside the views of some groups.

    Args:
        config: The run.
        position: Step whose data the views are.
        groups: Which groups of that step; see ``ViewPipeline.groups``.
        views: Of these groups.
    """
    if config.vit.drop_path == 0:
        return MicroBatch(views, None)
    kept = []
    for kind, views_VBZYX in enumerate((views.global_VBZYX, views.local_VBZYX)):
        kept_S2N = draw_kept_rows(
            [drop_seed(config, position, group, kind) for group in groups],
            depth=config.vit.depth,
            num_views=views_VBZYX.shape[0],
            group_size=config.train.group_size,
            drop_path=config.vit.drop_path,
        )
        device = views_VBZYX.device
        if device.type == "cuda":
            kept_S2N = kept_S2N.pin_memory()
        kept.append(kept_S2N.to(device, non_blocking=True))
    return MicroBatch(views, Kept(*kept))


def take_step(
    run: Run,
    batches: Sequence[MicroBatch],
    step: int,
    engine: Engine,
    *,
    is_asked: bool = False,
) -> tuple[StepValues, StepResult]:
    """Do a step of the run's schedules, counted from 0; see ``train_step``."""
    config, anchor = run.config, run.method.anchor
    values = step_values(
        config.schedule,
        step,
        num_steps=config.train.num_steps,
        batch_size=config.train.batch_size,
    )
    if anchor is not None:
        anchor.refresh(run.method.teacher.backbone, step)
    is_anchored = anchor is not None and anchor_step(anchor.config, step) is not None
    result = train_step(run, batches, values, engine, is_anchored=is_anchored, is_asked=is_asked)
    return values, result


def drop_seed(config: Config, position: int, group: int, kind: int) -> int:
    """Return the seed of drop path for the global (0) or the local (1) views of a group."""
    rng = generator(config.train.seed, Stream.DROP_PATH, position, group, kind)
    return int(rng.integers(_SEEDS))


def _resume(run: Run, out_dir: Path, processes: Processes) -> int:
    """Load the newest checkpoint in every process; one of them tidies up the folder."""
    step = 0
    if processes.is_first:
        step = load_latest(run, out_dir, notify=notify)
        forget_later(out_dir, run)
    step = processes.of_first(step)
    if step and not processes.is_first:
        load_latest(run, out_dir, notify=_silent, at_most=step, rank=processes.rank)
    return step


class _BudgetSpentError(Exception):
    """Too many steps in a row were refused."""

    def __init__(self, step: int, verdict: Verdict) -> None:
        super().__init__()
        self.step, self.verdict = step, verdict


def _go_back(run: Run, out_dir: Path, spent: _BudgetSpentError, processes: Processes) -> int:
    def go(rank: int) -> int:
        tell = notify if rank == 0 else _silent
        return roll_back(run, out_dir, spent.step, spent.verdict, notify=tell, rank=rank)

    step = 0
    if processes.is_first:
        step = go(0)
        record_rollback(out_dir, run, step=spent.step, target=step)
    step = processes.of_first(step)
    return step if processes.is_first else go(processes.rank)


def _silent(_: str) -> None:
    pass


class _Steps:
    """The steps of one run, from a first one to the last or to what stops them.

    On CUDA the host reads the numbers of a step while the device works on the next one. Log and
    checkpoints are the first process's.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        store: Store,
        pipeline: ViewPipeline,
        out_dir: Path,
        trackers: Sequence[str],
        observers: Sequence[Observer],
    ) -> None:
        self._run, self._engine, self._store, self._pipeline = run, engine, store, pipeline
        self._out_dir, self._trackers, self._observers = out_dir, trackers, observers
        self._log: RunLog | None = None
        self._writer: CheckpointWriter | None = None
        self._waits: list[float] = []
        self._mark = (0.0, 0)  # of the last row: its time and step
        self.last_loss = math.nan

    def run_from(self, first: int, stop: StopSignals, *, progress: bool) -> None:
        """Do the steps behind ``first``.

        Raises:
            _BudgetSpentError: Too many steps in a row were refused.
            StoppedError: A process was asked to stop; a checkpoint is written.
        """
        train = self._run.config.train
        shift = int(self._run.guard.passed_over)
        positions = first + shift, train.num_steps + shift
        self._engine.processes.be_patient(until=first + 1)  # compiles
        self._mark = time.perf_counter(), first
        with ExitStack() as open_parts:
            if self._engine.processes.is_first:
                self._log = open_parts.enter_context(
                    RunLog(
                        self._out_dir,
                        step=first,
                        num_steps=train.num_steps,
                        progress=progress,
                        settings=flatten(dataclasses.asdict(self._run.config)),
                        track=self._trackers,
                    )
                )
                self.last_loss = self._log.last_loss
                self._writer = open_parts.enter_context(
                    CheckpointWriter(
                        self._out_dir, keep=train.keep_checkpoints, saved=self._tell_saved
                    )
                )
            stream = open_parts.enter_context(closing(self._pipeline.stream(*positions)))
            self._do_all(first, shift, stream, stop)

    def _do_all(
        self, first: int, shift: int, stream: Iterator[tuple[ViewBatch, float]], stop: StopSignals
    ) -> None:
        train = self._run.config.train
        reads_late = self._run.guard.accepted.is_cuda
        unread: tuple[int, StepValues, StepResult] | None = None
        for step in range(first, train.num_steps):
            values, result = self._do(step, step + shift, stream, bool(stop.received))
            if unread is not None:
                self._settle(*unread)
            done = step + 1
            unread = done, values, result
            saves = done % train.checkpoint_every == 0 or done == train.num_steps
            if reads_late and not (saves or self._is_logged(done)):
                continue
            metrics, unread = self._settle(*unread), None
            # What a refused step leaves is the state before it, or damage that going back mends.
            if (saves and metrics.is_sound) or metrics.is_asked or done == train.num_steps:
                self._save(done)
            if metrics.is_asked and done < train.num_steps:
                if self._writer is not None:
                    self._writer.wait()
                self._engine.processes.barrier()
                by = f" by {stop.received}" if stop.received else ""
                raise StoppedError(
                    f"stopped{by} behind the checkpoint of step {done}; the same command goes on"
                )

    def _do(
        self,
        step: int,
        position: int,
        stream: Iterator[tuple[ViewBatch, float]],
        is_asked: bool,
    ) -> tuple[StepValues, StepResult]:
        config, processes = self._run.config, self._engine.processes
        batches = []
        for micro, (views, seconds) in enumerate(islice(stream, config.train.accumulate)):
            self._waits.append(seconds)
            batches.append(micro_batch(config, position, self._pipeline.groups(micro), views))
        processes.step_begins()
        gram = config.gram
        if gram is not None and step == gram.start_step:  # another graph
            processes.be_patient(until=step + 1)
        return take_step(self._run, batches, step, self._engine, is_asked=is_asked)

    def _is_logged(self, done: int) -> bool:
        train = self._run.config.train
        return done % train.log_every == 0 or done == train.num_steps

    def _settle(self, done: int, values: StepValues, result: StepResult) -> StepMetrics:
        """Read a step and log it or record its refusal."""
        metrics = result.read()
        self._engine.processes.step_ends(done)
        if metrics.is_sound:
            self.last_loss = metrics.losses["total"]
        else:
            self._refuse(done, metrics)
        processes = self._engine.processes
        # A step that was refused has no row: it is in incidents.jsonl.
        is_told = metrics.is_sound and self._is_logged(done)
        if is_told and (processes.is_first or processes.is_sharded):
            evidence = gather_evidence(self._run, result, self._engine)
            if self._log is not None:
                self._write_row(done, values, metrics, evidence)
        if self._log is not None:
            self._log.advance()
        if self._writer is not None:
            self._writer.poll()
        return metrics

    def _refuse(self, done: int, metrics: StepMetrics) -> None:
        """Record a step that did not update."""
        run, config = self._run, self._run.config
        processes = self._engine.processes
        processes.be_patient(until=done + 2)  # one step may be under way
        cause = explain(
            metrics.losses,
            metrics.grad_norms,
            voxels=metrics.voxels,
            networks={"student": run.method.student, "teacher": run.method.teacher},
            optimizer=run.optimizer,
            mean=processes.mean,
        )
        if self._writer is not None:
            self._writer.wait()
            notify(f"step {done} was skipped: {cause}")
            position = done - 1 + int(run.guard.passed_over)
            capture(
                self._out_dir,
                run,
                self._store,
                step=done,
                refused=RefusedError(cause, metrics.losses, metrics.grad_norms),
                drop_path_seeds=[
                    drop_seed(config, position, group, kind)
                    for group in range(config.train.batch_size // config.train.group_size)
                    for kind in (0, 1)
                ],
            )
        if must_roll_back(metrics.verdict, config.guard):
            raise _BudgetSpentError(done, metrics.verdict)

    def _write_row(
        self, done: int, values: StepValues, metrics: StepMetrics, evidence: Evidence
    ) -> None:
        assert self._log is not None
        now, (then, before) = time.perf_counter(), self._mark
        rate = (done - before) * self._run.config.train.batch_size / (now - then)
        losses = metrics.losses
        told = set(losses) - {"total"} - (set() if self._run.method.anchor else {"gram"})
        row: dict[str, Any] = {
            "step": done,
            "loss": losses["total"],
            **{name: value for name, value in losses.items() if name in told},
            **{f"grad_norm_{name}": value for name, value in metrics.grad_norms.items()},
            **values._asdict(),
            "skipped": metrics.verdict.skipped,
            **{name: value.item() for name, value in measure(evidence).items()},
            "samples_per_s": round(rate, 3),
            "data_wait": round(sum(self._waits) / (now - then), 4),
        }
        self._log.write(row)
        for observer in self._observers:
            observer.logged(row)
        self._mark = now, done
        self._waits.clear()

    def _save(self, done: int) -> None:
        # The others wait in their next step while the first one finishes an earlier save.
        self._engine.processes.be_patient(until=done + 1)
        if self._writer is not None and self._log is not None:
            self._log.sync()
            self._writer.submit(self._run, done)
        elif self._engine.processes.is_sharded:
            gather(self._run)

    def _tell_saved(self, step: int, folder: Path) -> None:
        for observer in self._observers:
            observer.saved(step, folder)

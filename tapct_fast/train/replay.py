"""Do one step of a run again, from the checkpoint before it, and look where its numbers break."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from tapct_fast.config import Config, from_json
from tapct_fast.data.pipeline import ViewPipeline
from tapct_fast.errors import ConfigError, InputError
from tapct_fast.io.store import Store
from tapct_fast.ssl.method import Losses
from tapct_fast.train.checkpoint import Run, folders, load, newest_intact, step_of
from tapct_fast.train.guard import explain
from tapct_fast.train.guide import load_guide
from tapct_fast.train.incident import Rollback, passed_over, read_incident, read_rollbacks
from tapct_fast.train.log import METRICS
from tapct_fast.train.loop import build_run, choose_backend, micro_batch, take_step
from tapct_fast.train.processes import Processes
from tapct_fast.train.start import read_start
from tapct_fast.train.step import build_engine


class Numbers(NamedTuple):
    """Losses and gradient norms of one step."""

    losses: Mapping[str, float]
    grad_norms: Mapping[str, float]


class Replay(NamedTuple):
    """One step as it was recorded and as it came out now."""

    step: int
    start: int  # steps done at the checkpoint it started from; 0: the untrained run
    recorded: Numbers | None  # None where neither incidents nor metrics have the step
    now: Numbers
    cause: str  # why the step would be refused; empty if it would not
    first_module: str  # that gave a number that is not finite; empty without one
    first_gradient: str  # parameter whose gradient is not finite, first on the way back; or empty


def replay(
    run_dir: Path,
    store_dir: Path,
    step: int,
    *,
    start: str | Path | None = None,
    distill: Path | None = None,
    device: str | None = None,
    notify: Callable[[str], None],
) -> Replay:
    """Load the newest checkpoint before ``step`` and run up to it; the run's folder is only read.

    Args:
        run_dir: Folder of the run.
        store_dir: The store it was trained on.
        step: Counted from 1, as in ``metrics.jsonl`` and ``incidents.jsonl``.
        start: What the run was given.
        distill: What the run was given.
        device: As in ``train``.
        notify: Told in one line about damaged checkpoints and about what may change bits.

    Raises:
        InputError: There is no such run, step or device.
        CheckpointError: No checkpoint passes its check, or the store or what the run was given is
            another one.
    """
    config = _config_of(run_dir)
    if not 1 <= step <= config.train.num_steps:
        raise InputError(f"--step {step} is not one of 1 to {config.train.num_steps}")
    store = Store.open(store_dir)
    target, dtype = choose_backend(config, device)
    pipeline = ViewPipeline(store, config, device=target)
    run = build_run(
        config,
        store.fingerprint,
        target,
        dtype,
        pipeline.renderer,
        start=None if start is None else read_start(start, config, notify=notify),
        guide=None if distill is None else load_guide(distill, config),
    )
    eager = dataclasses.replace(config.train, compile="off")  # hooks see modules, not graphs
    engine = build_engine(run.method, eager, dtype=dtype, processes=Processes())
    incident = read_incident(run_dir, step)
    rollbacks = incident["rollbacks"] if incident else read_rollbacks(run_dir)
    done = _load_before(run, run_dir, step, incident, rollbacks, notify)

    def do(at: int) -> tuple[Numbers, str]:
        position = at + passed_over(rollbacks, at)
        batches = [
            micro_batch(
                config, position, pipeline.groups(micro), pipeline.batch_at(position, micro)
            )
            for micro in range(config.train.accumulate)
        ]
        metrics = take_step(run, batches, at, engine)[1].read()
        numbers = Numbers(metrics.losses, metrics.grad_norms)
        if metrics.is_sound:
            return numbers, ""
        networks = {"student": run.method.student, "teacher": run.method.teacher}
        return numbers, explain(
            *numbers, voxels=metrics.voxels, networks=networks, optimizer=run.optimizer
        )

    for at in range(done, step - 1):
        do(at)
    now, cause = do(step - 1)
    modules: list[str] = []
    gradients: list[str] = []
    if cause:  # again, for it changed nothing: a layer with hooks is not fused and has other bits
        with first_not_finite(run.method) as (modules, gradients):
            do(step - 1)
    return Replay(
        step,
        done,
        _recorded(run_dir, step, incident),
        now,
        cause,
        next(iter(modules), ""),
        next(iter(gradients), ""),
    )


@contextmanager
def first_not_finite(network: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Note in the yielded lists what is not finite, in order of calls.

    Yields:
        Modules by their outputs, and parameters by their gradients before the clip.
    """
    found: list[str] = []
    gradients: list[str] = []

    def grad_hook(name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                gradients.append(name)

        return look

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(_: nn.Module, inputs: Any, output: Any) -> None:
            if not all(bool(t.isfinite().all()) for t in _tensors(output)):
                came_in = all(bool(t.isfinite().all()) for t in _tensors(inputs))
                found.append(name if came_in else f"{name} (what came in was not finite)")

        return look

    handles = [
        module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(grad_hook(name))  # type: ignore[no-untyped-call]
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield found, gradients
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def render(replay: Replay) -> str:
    """Return the replay as lines for a terminal."""
    came_from = f"the checkpoint of step {replay.start}" if replay.start else "the start of the run"
    lines = [
        f"step {replay.step}, replayed from {came_from}",
        f"{'':<22}{'recorded':>14}{'now':>14}",
    ]
    for group, label in (("losses", "loss"), ("grad_norms", "gradient norm")):
        for name, value in getattr(replay.now, group).items():
            old = getattr(replay.recorded, group).get(name) if replay.recorded else None
            lines.append(
                f"{f'{label} {name}':<28}{'-' if old is None else f'{old:.6g}':>14}{value:>14.6g}"
            )
    if replay.recorded is not None:
        same = "equal, bit for bit" if _same(replay.recorded, replay.now) else "not equal"
        lines.append(f"recorded and replayed numbers are {same}")
    lines.append(f"first module not finite: {replay.first_module or 'none'}")
    lines.append(f"first gradient not finite: {replay.first_gradient or 'none'}")
    lines.append(replay.cause or "the step is sound now")
    return "\n".join(lines)


def _same(one: Numbers, other: Numbers) -> bool:
    def pairs(numbers: Numbers) -> list[tuple[str, str]]:
        # Text: NaN is not equal to itself.
        both = [*numbers.losses.items(), *numbers.grad_norms.items()]
        return [(name, repr(value)) for name, value in both]

    return pairs(one) == pairs(other)


def _config_of(run_dir: Path) -> Config:
    try:
        return from_json(Config, (run_dir / "config.json").read_text())
    except OSError:
        raise InputError("RUN holds no run: there is no config.json") from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise InputError(
            f"RUN holds a config of another release or a damaged one: {error}"
        ) from None


def _load_before(
    run: Run,
    run_dir: Path,
    step: int,
    incident: Mapping[str, Any] | None,
    rollbacks: Sequence[Rollback],
    notify: Callable[[str], None],
) -> int:
    wanted = incident["checkpoint"] if incident else ""
    if wanted in {folder.name for folder in folders(run_dir)}:
        at_most = step_of(Path(wanted))
    else:
        at_most = step - 1
    folder, _ = newest_intact(run_dir, notify=notify, at_most=at_most)
    while folder is not None and not _is_of_course(folder, rollbacks):
        folder, _ = newest_intact(run_dir, notify=notify, at_most=step_of(folder) - 1)
    if folder is None:
        if folders(run_dir) and step > 1:
            notify("no checkpoint before this step is left, so it is replayed from the start")
        return 0
    return load(run, folder, notify=notify)


def _is_of_course(checkpoint: Path, rollbacks: Sequence[Rollback]) -> bool:
    """Say whether a checkpoint is of this course: behind a roll-back it is written anew."""
    with safe_open(checkpoint / "optimizer.safetensors", "pt") as file:
        found = int(file.get_tensor("guard.passed_over"))
    return found == passed_over(rollbacks, step_of(checkpoint) - 1)


def _recorded(run_dir: Path, step: int, incident: Mapping[str, Any] | None) -> Numbers | None:
    if incident is not None:
        return Numbers(incident["losses"], incident["grad_norms"])
    try:
        lines = (run_dir / METRICS).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        row = json.loads(line)
        if row["step"] == step:
            losses = {n: row.get("loss" if n == "total" else n, 0.0) for n in Losses._fields}
            norms = {
                name.removeprefix("grad_norm_"): value
                for name, value in row.items()
                if name.startswith("grad_norm_")
            }
            return Numbers(losses, norms)
    return None

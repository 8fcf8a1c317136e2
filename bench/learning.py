"""Learning curves at equal wall time: this library's step and D's on the same phantoms and views.

A CPU-sized twin of training: the recipe ``debug``, phantoms with labels. D is dinov3's structure
(``bench.train_rivals``), blocks and heads compiled one by one. Both start from the same weights and
take the same stream of batches from its start, each at its own speed; the faster sees more of it.
Each goes through its whole schedule in the time that both have: its number of steps is that time
over its own step, measured beforehand. The clock counts steps and what they wait for data;
compiling and probing it does not. At each point of time the teacher's backbone is frozen and probed
by a linear layer on phantoms not trained on: Dice over the labels, with a 95 % interval over scans.
``gain`` is ours less D's, paired by seed and scan, with a 95 % bootstrap over these pairs.

Shape suffixes: S scans.
"""

import copy
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bench.harness import Device, Run, start
from bench.train_rivals import DINOV3, Rival, Stepper
from bench.train_runs import (
    OURS,
    D,
    Library,
    every_graph_compiles,
    least_bytes,
    method_of,
    restart,
    tiny_run,
)
from bench.train_runs import SOURCES as TRAINED_BY
from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.load import default_preprocess
from tapct_fast.config import Config
from tapct_fast.data.phantom import LABEL_NAMES, write_phantoms
from tapct_fast.data.pipeline import ViewPipeline
from tapct_fast.downstream.encode import embed_volume
from tapct_fast.downstream.probe import linear_segmentation
from tapct_fast.io.pack import pack
from tapct_fast.io.read import read_labels, read_volume
from tapct_fast.io.store import Store
from tapct_fast.io.volume import Volume
from tapct_fast.recipes import debug
from tapct_fast.ssl.schedules import step_values

SOURCES = [*TRAINED_BY, "tapct_fast/recipes.py", "tapct_fast/data/phantom.py"]
DEVICE: Device = "cpu"
PLANE_YX = (88, 120)  # 3 mm pixels, as the demo
NUM_COMPILING, NUM_CLOCKED = 2, 5  # steps before the clock starts
NUM_RESAMPLES = 2000
MOST_STEPS = 100_000  # of the stream; a run ends by time


class Setting(NamedTuple):
    """The one row.

    Attributes:
        name: Of the model.
        config: The run, but for its number of steps.
        seeds: Of weights, phantoms and views.
        points_s: Seconds of training after which to probe; the last one ends a run.
        num_train: Phantoms to train on.
        num_fit: Phantoms to fit the probe on, and as many to score it on.
    """

    name: str
    config: Config
    seeds: Sequence[int]
    points_s: Sequence[float]
    num_train: int
    num_fit: int


FULL = Setting("debug", debug(), (0, 1), (15.0, 30.0, 45.0, 60.0), 12, 6)


def tiny() -> Setting:
    """Return a setting of the same paths for tests."""
    config = tiny_run()
    crops = replace(config.crops, extent_mm_zyx=(60.0, 360.0, 360.0))
    return Setting("tiny", replace(config, crops=crops), (0,), (0.2,), 1, 2)


class Phantoms(NamedTuple):
    """The phantoms of a seed: a store to train on, and scans with labels to probe on."""

    store: Store
    scans: list[tuple[Volume, Volume]]  # with its label map


@dataclass(slots=True)
class Curve:
    """What became of one run."""

    points: list[dict[str, float]] = field(default_factory=list)
    dice_S: list[NDArray[np.float64]] = field(default_factory=list)  # of each point, over labels
    step_ms: list[float] = field(default_factory=list)


def _phantoms(setting: Setting, seed: int, folder: Path) -> Phantoms:
    pairs = write_phantoms(folder / "phantoms", setting.num_train + 2 * setting.num_fit, seed)
    pack([scan for scan, _ in pairs[: setting.num_train]], folder / "store")
    scans = [(read_volume(s), read_labels(labels)) for s, labels in pairs[setting.num_train :]]
    return Phantoms(Store.open(folder / "store"), scans)


def _probe(stepper: Stepper, config: Config, phantoms: Phantoms, curve: Curve, at_s: float) -> None:
    """Add a point to the curve."""
    preprocess = replace(default_preprocess(config.vit), resize_yx=PLANE_YX)
    vit = copy.deepcopy(stepper.teacher.backbone)
    backbone = Backbone(vit, preprocess, precision="fp32").eval()
    scans = [(embed_volume(backbone, volume), labels) for volume, labels in phantoms.scans]
    half = len(scans) // 2
    found = linear_segmentation(scans[:half], scans[half:], num_classes=len(LABEL_NAMES))
    low, high = found.interval
    curve.points.append(
        {
            "seconds": round(at_s, 2),
            "steps": len(curve.step_ms),
            "dice": round(found.mean_dice, 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    )
    curve.dice_S.append(np.nanmean(found.dice_SK[:, 1:], axis=1))


def _seconds_per_step(stepper: Stepper, config: Config, store: Store) -> float:
    """Compile, then return the median time of a step and its data."""
    pipeline = ViewPipeline(store, config, device=DEVICE)
    values = step_values(config.schedule, 0, num_steps=1, batch_size=config.train.batch_size)
    seconds = []
    with closing(pipeline.stream(0, MOST_STEPS)) as stream:
        for _ in range(NUM_COMPILING + NUM_CLOCKED):
            began = time.perf_counter()
            batch, _ = next(stream)
            stepper.step([(batch, 0)], values)
            seconds.append(time.perf_counter() - began)
    return median(seconds[NUM_COMPILING:])


def _learn(stepper: Stepper, setting: Setting, seed: int, phantoms: Phantoms) -> Curve:
    """Train for the time that the setting gives and probe on the way."""
    train = replace(setting.config.train, seed=seed, num_steps=MOST_STEPS)
    config = replace(setting.config, train=train)
    state = method_of(config).state_dict()
    num_steps = max(
        1, round(setting.points_s[-1] / _seconds_per_step(stepper, config, phantoms.store))
    )
    restart(stepper, state)
    curve, elapsed, points = Curve(), 0.0, list(setting.points_s)
    _probe(stepper, config, phantoms, curve, elapsed)
    pipeline = ViewPipeline(phantoms.store, config, device=DEVICE)
    with closing(pipeline.stream(0, MOST_STEPS)) as stream:
        while points:
            step = len(curve.step_ms)
            values = step_values(
                config.schedule, step, num_steps=num_steps, batch_size=train.batch_size
            )
            began = time.perf_counter()
            batch, waited = next(stream)
            stepper.step([(batch, step)], values)
            taken = time.perf_counter() - began
            elapsed += taken
            curve.step_ms.append((taken - waited) * 1e3)
            if elapsed >= points[0]:
                points.pop(0)
                _probe(stepper, config, phantoms, curve, elapsed)
    return curve


def _steppers(setting: Setting, *, is_tiny: bool) -> dict[str, Stepper]:
    state = method_of(setting.config).state_dict()
    compiled = "no" if is_tiny else "blocks"
    return {
        OURS: Library(setting.config, state, device=DEVICE, dtype=torch.float32),
        D: Rival(setting.config, state, DINOV3, compiled=compiled),  # type: ignore[arg-type]
    }


def _gains(curves: dict[str, list[Curve]]) -> list[dict[str, float]]:
    """Return ours less D's at each point, over all seeds and scans."""
    rng, found = np.random.default_rng(0), []
    for i in range(len(curves[OURS][0].dice_S)):
        ours_S, other_S = (
            np.concatenate([curve.dice_S[i] for curve in curves[name]]) for name in (OURS, D)
        )
        gain_S = ours_S - other_S
        draws = gain_S[rng.integers(gain_S.size, size=(NUM_RESAMPLES, gain_S.size))].mean(1)
        low, high = np.percentile(draws, (2.5, 97.5))
        numbers = {"gain": gain_S.mean(), "low": low, "high": high}
        found.append({name: round(float(value), 4) for name, value in numbers.items()})
    return found


def _measure(run: Run, setting: Setting, case: str) -> None:
    curves: dict[str, list[Curve]] = {OURS: [], D: []}
    steppers = _steppers(setting, is_tiny=run.is_tiny)
    for seed in setting.seeds:
        with tempfile.TemporaryDirectory() as folder:
            phantoms = _phantoms(setting, seed, Path(folder))
            for name, stepper in steppers.items():
                curve = _learn(stepper, setting, seed, phantoms)
                curves[name].append(curve)
                print(f"learning, seed {seed}, {name}: {curve.points}", flush=True)
            pipeline = ViewPipeline(phantoms.store, setting.config, device=DEVICE)
            moved = least_bytes(pipeline.batch_at(0, 0), steppers[OURS])
    times = {
        name: [
            round(float(q), 4)
            for q in np.percentile([ms for c in found for ms in c.step_ms], (20, 50, 80))
        ]
        for name, found in curves.items()
    }
    points: dict[str, Any] = {
        name: [{"seed": s, "points": c.points} for s, c in zip(setting.seeds, found, strict=True)]
        for name, found in curves.items()
    }
    run.write(
        case,
        DEVICE,
        times,
        bytes=moved,
        seeds=list(setting.seeds),
        curves=points,
        gain=_gains(curves),
        scans=setting.num_fit,
        verified="one start: the first points of both are of the same weights",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the one row."""
    run = start(__file__, SOURCES, argv)
    setting = tiny() if run.is_tiny else FULL
    case = f"{setting.name}, {len(setting.seeds)} seeds, {setting.points_s[-1]:g} s each"
    if run.wants(case, DEVICE):
        torch._dynamo.reset()
        with every_graph_compiles():
            _measure(run, setting, case)


if __name__ == "__main__":
    main()

"""A run built without a store, and one step of it as the loop does it."""

import dataclasses
from collections.abc import Sequence

import torch

from tapct_fast.config import Config
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.model.block import draw_kept_rows
from tapct_fast.ssl.method import DinoMethod, Kept
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import StepValues
from tapct_fast.train.checkpoint import Run
from tapct_fast.train.guard import start_guard
from tapct_fast.train.processes import Processes
from tapct_fast.train.step import Engine, MicroBatch, StepMetrics, build_engine, train_step


def run_of(config: Config, *, seed: int = 2, group_size: int = 0) -> Run:
    method = DinoMethod(
        config.vit, config.heads, config.losses, hu=config.hu, seed=seed, group_size=group_size
    )
    groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
    optimizer = build_optimizer(groups, config.optim)
    guard = start_guard(len(list(method.student.children())), "cpu")
    return Run(method, optimizer, config, "store", "cpu", guard)


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

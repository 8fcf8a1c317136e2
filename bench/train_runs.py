"""What the training benches share: runs, views of noise, FLOPs, and this library's step.

``ours`` is the one place that knows how the library's step is called.

Shape suffixes: V views, B samples, N = V * B global views, Z Y X voxels, L patch tokens.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from bench.train_rivals import LossNumbers, MicroBatches, Stepper
from tapct_fast.config import (
    Config,
    HeadConfig,
    HeadsConfig,
    TrainConfig,
    ViewGroupConfig,
    VitConfig,
    Zyx,
)
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.model.block import draw_kept_rows
from tapct_fast.ssl.method import DinoMethod, Kept
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import StepValues
from tapct_fast.train.checkpoint import Run
from tapct_fast.train.guard import start_guard
from tapct_fast.train.plan import count_flops
from tapct_fast.train.processes import Processes
from tapct_fast.train.step import MicroBatch, build_engine, train_step

# What a step of this library runs; a bench adds itself and its rivals.
SOURCES = [
    "bench/train_runs.py",
    *("bench/train_rivals.py", "bench/train_eager.py"),
    *(f"tapct_fast/train/{name}.py" for name in ("step", "guard", "processes")),
    *(f"tapct_fast/ssl/{name}.py" for name in ("method", "dino", "ibot", "koleo", "param_groups")),
    *(f"tapct_fast/model/{name}.py" for name in ("vit", "block", "attention", "heads")),
    *(
        f"kernels/tapct_kernels/{name}.py"
        for name in (
            "attention",
            "operator",
            "prototype_cross_entropy",
            "residual_norm",
            "sinkhorn",
        )
    ),
]
OURS, E, D = "tapct train_step", "E, eager", "D, dinov3"
VALUES = StepValues(1e-4, 1e-4, 0.04, 0.994, 0.05)
LOSS_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the total


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module."""
    return str(dtype).removeprefix("torch.")


def every_graph_compiles() -> AbstractContextManager[None]:
    """Let any number of graphs be compiled.

    They are counted per function, whatever its module; past the default of 8 the rest would run
    eagerly, and D would be timed as what it is not. dinov3 lifts the limit too.
    """
    limits = torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)
    return cast(AbstractContextManager[None], limits)


class Library:
    """This library's step under a rival's interface: the one place that knows how it is called."""

    def __init__(
        self, config: Config, state: Mapping[str, Tensor], *, device: str, dtype: torch.dtype
    ) -> None:
        self.config, self.dtype = config, dtype
        self.method = method_of(config)
        self.method.load_state_dict(state)
        self.method.to(device)
        self.student, self.teacher = self.method.student, self.method.teacher
        groups = param_groups(self.student, depth=config.vit.depth, config=config.optim)
        self.optimizer = build_optimizer(groups, config.optim)
        guard = start_guard(len(list(self.student.children())), device)
        self.run = Run(self.method, self.optimizer, config, "", "", guard)
        self.engine = build_engine(self.method, config.train, dtype=dtype, processes=Processes())

    def step(self, batches: MicroBatches, values: StepValues) -> LossNumbers:
        """Do one optimizer step in place and return its losses."""
        return ours(self, batches, values)


def ours(library: Library, batches: MicroBatches, values: StepValues) -> LossNumbers:
    """Do one step of this library in place and return its losses."""
    own = [MicroBatch(views, _kept(library.config, views, seed)) for views, seed in batches]
    losses = train_step(library.run, own, values, library.engine).read().losses
    return {name: losses[name] for name in losses if name != "gram"}


def _kept(config: Config, views: ViewBatch, seed: int | None) -> Kept | None:
    """Return the rows that drop path keeps, those of the rivals with the same seed."""
    if seed is None or not config.vit.drop_path:
        return None
    drawn = [
        draw_kept_rows(
            [2 * seed + kind],
            depth=config.vit.depth,
            num_views=views_VBZYX.shape[0],
            group_size=views.num_samples,
            drop_path=config.vit.drop_path,
        ).to(views_VBZYX.device)
        for kind, views_VBZYX in enumerate((views.global_VBZYX, views.local_VBZYX))
    ]
    return Kept(*drawn)


def method_of(config: Config) -> DinoMethod:
    """Return student and teacher of a run, as its seed starts them."""
    seed = config.train.seed
    return DinoMethod(config.vit, config.heads, config.losses, hu=config.hu, seed=seed)


def restart(stepper: Stepper, state: Mapping[str, Tensor]) -> None:
    """Put the weights of a ``DinoMethod`` in place and forget the optimizer's moments."""
    for name, networks in (("student.", stepper.student), ("teacher.", stepper.teacher)):
        own = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
        networks.load_state_dict(own)
    stepper.optimizer.state.clear()


def run_config(
    dim: int,
    *,
    depth: int = 12,
    sizes: tuple[Zyx, Zyx],
    num_local: int = 8,
    num_prototypes: int = 65_536,
    hidden_dim: int = 2048,
    batch: int,
    drop_path: float = 0.0,
) -> Config:
    """Return a run of one micro-batch, with a LayerScale of 0.1, so that every branch counts.

    Args:
        dim: Width.
        depth: Blocks.
        sizes: Voxels of a global view and of a local one.
        num_local: Local views of a sample.
        num_prototypes: Of each head.
        hidden_dim: Of each head.
        batch: Samples of a step.
        drop_path: Share of rows that a branch skips.
    """
    base = Config()
    views = base.views
    head = HeadConfig(num_prototypes=num_prototypes, hidden_dim=hidden_dim)
    return replace(
        base,
        views=replace(
            views,
            global_views=replace(views.global_views, size_zyx=sizes[0]),
            local_views=replace(views.local_views, size_zyx=sizes[1], num=num_local),
        ),
        vit=VitConfig(
            dim=dim, depth=depth, image_zyx=sizes[0], layer_scale=0.1, drop_path=drop_path
        ),
        heads=HeadsConfig(dino=head, ibot=head),
        train=TrainConfig(batch_size=batch, group_size=batch),
    )


def tiny_run() -> Config:
    """Return a run for tests."""
    sizes = ((8, 16, 16), (4, 8, 8))
    return run_config(
        64, depth=2, sizes=sizes, num_local=2, num_prototypes=32, hidden_dim=16, batch=2
    )


def random_batch(config: Config, seed: int, device: str) -> ViewBatch:
    """Return views of noise, half of the global ones masked, their ratios spread as in training."""
    generator, batch = torch.Generator().manual_seed(seed), config.train.batch_size
    groups = (config.views.global_views, config.views.local_views)
    global_VBZYX, local_VBZYX = (
        torch.randn(group.num, batch, *group.size_zyx, generator=generator) for group in groups
    )
    num_views, num_tokens = 2 * batch, num_patches(config.vit, groups[0])
    num_masked = int(num_views * config.masks.prob)
    edges = np.linspace(*config.masks.ratio, num_masked + 1)[1:]
    mask_NL = torch.zeros(num_views, num_tokens, dtype=torch.bool)
    for row, edge in zip(torch.randperm(num_views, generator=generator), edges, strict=False):
        order_L = torch.randperm(num_tokens, generator=generator)
        mask_NL[row, order_L[: max(int(num_tokens * edge), 1)]] = True
    count_N = mask_NL.sum(1)
    return ViewBatch(
        global_VBZYX.to(device),
        local_VBZYX.to(device),
        mask_NL.to(device),
        mask_NL.flatten().nonzero().squeeze(1).to(device),
        (1 / count_N.float()).repeat_interleave(count_N).to(device),
        num_samples=batch,
    )


def num_patches(vit: VitConfig, group: ViewGroupConfig) -> int:
    """Return the patch tokens of one view."""
    return math.prod(s // p for s, p in zip(group.size_zyx, vit.patch_zyx, strict=True))


def step_flops(config: Config) -> int:
    """Return the FLOPs that a step of this library computes, of one micro-batch that is one group.

    See ``tapct_fast.train.plan``: rows that drop path skips, and rows of the last block that no
    loss reads, are not among them.
    """
    train = replace(config.train, group_size=config.train.batch_size)
    return count_flops(replace(config, train=train)).computed * config.train.batch_size


def least_bytes(batch: ViewBatch, stepper: Stepper) -> int:
    """Return views, and 40 bytes per parameter: AdamW reads 16 and writes 12, the teacher 8 + 4."""
    views = batch.global_VBZYX.nbytes + batch.local_VBZYX.nbytes
    return views + 40 * sum(p.numel() for p in stepper.student.parameters())

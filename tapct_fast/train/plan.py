"""What a run will take, before it starts: sizes, memory, FLOPs, and one step without numbers.

The arithmetic is of shapes alone; one step is then run on fake tensors in a fake group of as many
processes as asked for, so that a setting that does not fit fails here and not on the cluster. No
memory is taken and nothing is read: no store, no device. The step is run eagerly and on copies,
whatever ``train.compile`` and ``train.parallel`` say. ``train.precision=auto`` is planned as bf16.

Model FLOPs: 2 for each multiply-add of the matrix products that the definition asks for. Of the
student they count three times (forward, and the gradients of both operands), of the teacher once;
no gradient of the voxels is taken. Not all of them are computed: drop path skips rows of the batch,
and of the last block's projection and feed-forward only the rows are run that the losses read.
Nothing is counted for what is computed twice, for norms, losses, Sinkhorn-Knopp, the optimizer or
rendering.

Shape suffixes: V views, B samples, Z Y X voxels, N = V * B global views, L tokens, M masked tokens.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tapct_fast.config import Config, HeadConfig, ViewGroupConfig, VitConfig
from tapct_fast.data.masks import masked_counts
from tapct_fast.data.pipeline import ViewBatch, groups_per_micro_batch
from tapct_fast.model.block import draw_kept_rows
from tapct_fast.ssl.method import Losses, Networks
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import step_values
from tapct_fast.train.checkpoint import Run
from tapct_fast.train.guard import start_guard
from tapct_fast.train.loop import init_method, micro_batch
from tapct_fast.train.processes import Processes
from tapct_fast.train.step import build_engine, train_step

PEAK = 989.5e12  # dense bf16 FLOP/s of an H100 or H200, NVIDIA's data sheets (SXM)
SHARES = (0.3, 0.4, 0.5)
_PREFETCH = 2  # micro-batches that are made while one is used


class Parameters(NamedTuple):
    """Numbers of one network; the teacher has as many, none of them trained."""

    backbone: int
    heads: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.backbone + self.heads


class Memory(NamedTuple):
    """Bytes on one rank; the first four are of its shard with ``train.parallel=fsdp``."""

    weights: int
    gradients: int
    adam: int
    teacher: int
    views: int  # of the micro-batches of a step and of those made ahead
    logits: int  # of the teacher, stored for the rank's step
    saved: int  # for the backward pass of one micro-batch, counted on the step; views left out

    @property
    def total(self) -> int:
        """All of them; what is short-lived comes on top."""
        return sum(self)


class Flops(NamedTuple):
    """Model FLOPs of one sample."""

    student: int
    teacher: int
    heads: int  # of both
    dropped: int  # of the student's, in rows of the batch that drop path skips
    unread: int  # of both, in rows of the last block that no loss reads

    @property
    def total(self) -> int:
        """All that the definition asks for, as if drop path dropped nothing."""
        return self.student + self.teacher + self.heads

    @property
    def computed(self) -> int:
        """Those that a step runs."""
        return self.total - self.dropped - self.unread


class Plan(NamedTuple):
    """What a run takes on ``world`` ranks."""

    world: int
    legal_worlds: list[int]
    samples_per_rank: int  # of a step
    micro_batch: int  # samples
    tokens_per_step: int  # of student and teacher, on all ranks
    masked_rows_per_step: int
    parameters: Parameters
    memory: Memory
    flops: Flops
    steps: int
    is_sharded: bool
    not_planned: list[str]  # parts of the run that no number here counts

    def flops_per_step(self) -> int:
        """Return the model FLOPs of a step on all ranks."""
        return self.flops.total * self.samples_per_rank * self.world

    def samples_per_s(self, share: float) -> float:
        """Return what a share of ``PEAK`` on every rank comes to: arithmetic, not a measurement."""
        return PEAK * share * self.world / self.flops.total


def legal_worlds(config: Config) -> list[int]:
    """Return the numbers of ranks to which the groups of a step can be dealt out evenly."""
    train = config.train
    most = train.batch_size // (train.group_size * train.accumulate)
    return [world for world in range(1, most + 1) if most % world == 0]


def plan(config: Config, *, world: int = 1) -> Plan:
    """Plan a run of ``config`` on ``world`` ranks and try its step on fake tensors.

    Raises:
        ConfigError: The groups of a step cannot be dealt out to so many ranks; the message lists
            the numbers of ranks to which they can.
    """
    train = config.train
    num_groups = groups_per_micro_batch(train, world)
    micro = num_groups * train.group_size
    tokens_global, tokens_local = _num_tokens(config)
    per_sample = 4 * tokens_global + config.views.local_views.num * tokens_local
    parameters = count_parameters(config)
    is_sharded = train.parallel == "fsdp" and world > 1
    memory = _memory(config, parameters, num_groups, saved=saved_bytes(config, world=world))
    return Plan(
        world=world,
        legal_worlds=legal_worlds(config),
        samples_per_rank=micro * train.accumulate,
        micro_batch=micro,
        tokens_per_step=per_sample * train.batch_size,
        masked_rows_per_step=_num_masked(config) * (train.batch_size // train.group_size),
        parameters=parameters,
        memory=_sharded(memory, world) if is_sharded else memory,
        flops=count_flops(config),
        steps=train.num_steps,
        is_sharded=is_sharded,
        not_planned=[] if config.gram is None else ["gram: its anchor, and its part of a step"],
    )


def count_parameters(config: Config) -> Parameters:
    """Return how many numbers a network has, from one that is built without memory."""
    with torch.device("meta"):
        networks = Networks(config.vit, config.heads, config.hu)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    backbone = count(networks.backbone)
    return Parameters(backbone, count(networks) - backbone)


def count_flops(config: Config) -> Flops:
    """Return the model FLOPs of a sample; its masked tokens are a share of its group's."""
    vit, heads = config.vit, config.heads
    num_global, num_local = config.views.global_views.num, config.views.local_views.num
    tokens_global, tokens_local = _num_tokens(config)
    masked = _num_masked(config) / config.train.group_size
    globals_, locals_ = (
        num * _block_flops(vit, tokens)
        for num, tokens in ((num_global, tokens_global), (num_local, tokens_local))
    )
    embed = [2 * n * math.prod(vit.patch_zyx) * vit.dim for n in _num_patches(config)]
    student_embed = num_global * embed[0] + num_local * embed[1]
    head_rows: list[tuple[HeadConfig, float, float]] = [  # of the teacher, of the student
        (heads.dino, num_global, num_global + num_local),
        (heads.ibot or heads.dino, masked, masked),
    ]
    # In the last block drop path is a factor: it skips nothing there.
    dropped = [
        blocks * (vit.depth - 1) * _dropped_share(config, num)
        for blocks, num in ((globals_, num_global), (locals_, num_local))
    ]
    unread_global = num_global * (tokens_global - 1) - masked  # cls tokens are read
    unread_local = num_local * (tokens_local - 1)
    return Flops(
        student=3 * vit.depth * (globals_ + locals_) + 2 * student_embed,
        teacher=vit.depth * globals_ + num_global * embed[0],
        heads=round(
            sum(
                (teacher + 3 * student) * _head_flops(head, vit.dim)
                for head, teacher, student in head_rows
            )
        ),
        dropped=round(3 * sum(dropped)),
        unread=round((4 * unread_global + 3 * unread_local) * _row_flops(vit)),
    )


def saved_bytes(config: Config, *, world: int) -> int:
    """Run one step on fake tensors and return the bytes that a micro-batch leaves for its backward.

    That is what is still there when the losses are known and was not before: neither parameters,
    views nor targets, but what activation checkpointing keeps.
    """
    train = dataclasses.replace(config.train, compile="off", parallel="ddp")
    config = dataclasses.replace(config, gram=None, train=train)
    num_groups = groups_per_micro_batch(train, world)
    dtype = torch.float32 if train.precision == "fp32" else torch.bfloat16
    with _fake_world(world) as (processes, storages):
        # The one place that knows what a step is given; the step is the one of training.
        method = init_method(config)
        groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
        guard = start_guard(len(list(method.student.children())), "cpu")
        run = Run(method, build_optimizer(groups, config.optim), config, "", "", guard)
        engine = build_engine(method, train, dtype=dtype, processes=processes)
        batches = [
            micro_batch(
                *(config, 0, range(micro * num_groups, (micro + 1) * num_groups)),
                _fake_batch(config, num_groups),
            )
            for micro in range(train.accumulate)
        ]
        values = step_values(
            config.schedule, 0, num_steps=train.num_steps, batch_size=train.batch_size
        )
        saved: list[int] = []

        def student_losses(*args: Any, **kwargs: Any) -> tuple[Losses, Tensor]:
            before = storages.num_bytes()
            results = engine.student_losses(*args, **kwargs)
            saved.append(storages.num_bytes() - before)
            return results

        train_step(run, batches, values, engine._replace(student_losses=student_losses))
    return max(saved)


def _memory(config: Config, parameters: Parameters, num_groups: int, *, saved: int) -> Memory:
    accumulate, micro = config.train.accumulate, num_groups * config.train.group_size
    voxels = sum(group.num * math.prod(group.size_zyx) for group in _groups(config))
    size = 4 if config.train.precision == "fp32" else 2  # under autocast logits are float16
    heads = config.heads
    logits = config.views.global_views.num * micro * heads.dino.num_prototypes
    if not config.losses.recompute_ibot_logits:
        logits += num_groups * _num_masked(config) * (heads.ibot or heads.dino).num_prototypes
    return Memory(
        weights=4 * parameters.total,
        gradients=4 * parameters.total,
        adam=8 * parameters.total,
        teacher=4 * parameters.total,
        views=4 * voxels * micro * (accumulate + _PREFETCH),
        logits=size * accumulate * logits,
        saved=saved,
    )


def _sharded(memory: Memory, world: int) -> Memory:
    """Return the memory of a rank that holds one of ``world`` shards of both networks."""
    names = ("weights", "gradients", "adam", "teacher")
    return memory._replace(**{name: math.ceil(getattr(memory, name) / world) for name in names})


def _groups(config: Config) -> tuple[ViewGroupConfig, ViewGroupConfig]:
    return config.views.global_views, config.views.local_views


def _num_patches(config: Config) -> tuple[int, int]:
    """Return the patch tokens of a global and of a local view."""
    patch = math.prod(config.vit.patch_zyx)
    num_global, num_local = (math.prod(group.size_zyx) // patch for group in _groups(config))
    return num_global, num_local


def _num_tokens(config: Config) -> tuple[int, int]:
    """Return all tokens of a global and of a local view."""
    prefix = 1 + config.vit.num_registers
    num_global, num_local = _num_patches(config)
    return prefix + num_global, prefix + num_local


def _num_masked(config: Config) -> int:
    """Return the masked tokens of a group."""
    num_views = config.views.global_views.num * config.train.group_size
    return sum(masked_counts(config.masks, num_views, _num_patches(config)[0]))


def _dropped_share(config: Config, num_views: int) -> float:
    """Return the share of a group's rows that drop path skips, of so many views of each sample."""
    drop_path, size = config.vit.drop_path, config.train.group_size
    if drop_path == 0 or num_views == 0:
        return 0.0
    kept_S2N = draw_kept_rows(
        [0], depth=1, num_views=num_views, group_size=size, drop_path=drop_path
    )
    return 1 - kept_S2N.shape[2] / (num_views * size)


def _block_flops(vit: VitConfig, tokens: int) -> int:
    """Return those of a block's forward pass over one view."""
    return tokens * (6 * vit.dim * vit.dim + _row_flops(vit)) + 4 * tokens * tokens * vit.dim


def _row_flops(vit: VitConfig) -> int:
    """Return those of a block's projection and feed-forward over one token."""
    width_in = vit.mlp_dim if vit.ffn == "mlp" else 2 * vit.mlp_dim
    return 2 * (vit.dim * vit.dim + vit.dim * width_in + vit.mlp_dim * vit.dim)


def _head_flops(head: HeadConfig, dim: int) -> int:
    """Return those of a head's forward pass over one row."""
    widths = [dim, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim]
    return 2 * sum(a * b for a, b in pairwise([*widths, head.num_prototypes]))


def _fake_batch(config: Config, num_groups: int) -> ViewBatch:
    """Return a micro-batch without voxels; call it in a fake world."""
    micro, masked = num_groups * config.train.group_size, num_groups * _num_masked(config)
    views = [torch.empty(group.num, micro, *group.size_zyx) for group in _groups(config)]
    return ViewBatch(
        views[0],
        views[1],
        torch.empty(views[0].shape[0] * micro, _num_patches(config)[0], dtype=torch.bool),
        torch.empty(masked, dtype=torch.int64),
        torch.empty(masked),
        micro,
    )


@contextlib.contextmanager
def _fake_world(world: int) -> Iterator[tuple[Processes, "_Storages"]]:
    """Be rank 0 of a group whose collectives do nothing, on tensors that hold nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made by one process of its own"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    group = dist.group.WORLD if world > 1 else None
    try:
        with FakeTensorMode(), _Storages() as storages:
            yield Processes(rank=0, world_size=world, group=group), storages
    finally:
        dist.destroy_process_group()


class _Storages(TorchDispatchMode):
    """Remembers what the results of all calls are stored in, for as long as it is there.

    A host that reads a number is answered: there are none on fake tensors, one is as good as any.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def num_bytes(self) -> int:
        """Return how many bytes are there now."""
        return sum(storage.nbytes() for storage in self._seen)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # of a truncated normal: done yet?
            return False if args[0].dtype == torch.bool else 1.0
        results = func(*args, **(kwargs or {}))
        for result in pytree.tree_leaves(results):
            if isinstance(result, Tensor):
                self._seen.add(result.untyped_storage())
        return results


def to_json(made: Plan) -> dict[str, Any]:
    """Return the plan as JSON values; rates are arithmetic at shares of the nominal peak."""
    return {
        "world": made.world,
        "legal_worlds": made.legal_worlds,
        "samples_per_rank": made.samples_per_rank,
        "micro_batch": made.micro_batch,
        "tokens_per_step": made.tokens_per_step,
        "masked_rows_per_step": made.masked_rows_per_step,
        "parameters": made.parameters._asdict() | {"total": made.parameters.total},
        "memory_bytes_per_rank": made.memory._asdict() | {"total": made.memory.total},
        "flops_per_sample": made.flops._asdict()
        | {"total": made.flops.total, "computed": made.flops.computed},
        "flops_per_step": made.flops_per_step(),
        "steps": made.steps,
        "is_sharded": made.is_sharded,
        "not_planned": made.not_planned,
        "samples_per_s_by_arithmetic": {
            f"{share:.0%} of {PEAK / 1e12:.1f} TFLOP/s": round(made.samples_per_s(share), 1)
            for share in SHARES
        },
    }


def render(made: Plan) -> str:
    """Return the plan as text."""
    parameters, memory, flops = made.parameters, made.memory, made.flops
    kept, on_top = "whole networks", "short-lived tensors"
    if made.is_sharded:
        kept, on_top = f"1/{made.world} of the networks", f"parts gathered, {on_top}"
    lines = [
        f"ranks                {made.world}; its groups can be dealt out to "
        f"{', '.join(map(str, made.legal_worlds))}",
        f"samples              {made.samples_per_rank} a step and rank, "
        f"{made.micro_batch} at a time",
        f"tokens               {made.tokens_per_step:,} a step, student and teacher, all ranks",
        f"masked rows          {made.masked_rows_per_step:,} a step, all ranks",
        f"parameters           {parameters.total / 1e6:.2f} M trained: backbone "
        f"{parameters.backbone / 1e6:.2f} M, heads {parameters.heads / 1e6:.2f} M; "
        f"{2 * parameters.total / 1e6:.2f} M with the teacher",
        f"model FLOPs          {flops.total / 1e12:.3f} T a sample: student "
        f"{flops.student / 1e12:.3f}, teacher {flops.teacher / 1e12:.3f}, heads "
        f"{flops.heads / 1e12:.3f}",
        f"                     computed {flops.computed / 1e12:.3f} T: drop path skips "
        f"{flops.dropped / 1e12:.3f}, of the last block {flops.unread / 1e12:.3f} are not read",
        f"                     {made.flops_per_step() / 1e12:,.1f} T a step, "
        f"{made.flops_per_step() * made.steps / 1e18:,.1f} E the run",
        f"memory of one rank, {kept} on each ({on_top} come on top):",
    ]
    names = {
        "weights": "student, float32",
        "gradients": "float32",
        "adam": "two moments, float32",
        "teacher": "float32",
        "views": "of the step and two micro-batches ahead",
        "logits": "the teacher's, of the step",
        "saved": "for the backward pass of a micro-batch, counted on the step below",
    }
    for name, note in names.items():
        lines.append(f"  {name:<19}{getattr(memory, name) / 2**30:8.2f} GiB  {note}")
    lines.append(f"  {'total':<19}{memory.total / 2**30:8.2f} GiB")
    rates = ", ".join(f"{s:.0%} {made.samples_per_s(s):,.0f}" for s in SHARES)
    lines += [
        "samples/s            not measured; by arithmetic, at shares of the nominal",
        f"                     {PEAK / 1e12:.1f} TFLOP/s of an H100 or H200: {rates}",
        f"one eager step on fake tensors as one of {made.world}: done",
        *(f"not planned          {part}" for part in made.not_planned),
    ]
    return "\n".join(lines)

"""What a run will take, before it starts: sizes, memory, FLOPs, and one step without numbers.

The arithmetic is of shapes alone; one step is then run on fake tensors in a fake group of as many
processes as asked for, so that a setting that does not fit fails here and not on the cluster. No
memory is taken and nothing is read: no store, no device.

Model FLOPs: 2 for each multiply-add of the matrix products that the definition asks for. Of the
student they count three times (forward, and the gradients of both operands), of the teacher once;
no gradient of the voxels is taken. Nothing is counted for what kernels compute anew, for norms,
losses, Sinkhorn-Knopp, the optimizer or rendering. ``train.precision=auto`` is planned as bf16.

Shape suffixes: V views, B samples, Z Y X voxels, N = V * B global views, L tokens, M masked tokens.
"""

import contextlib
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tapct_fast.config import Config, HeadConfig, ViewGroupConfig, VitConfig
from tapct_fast.data.masks import masked_counts
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.errors import ConfigError
from tapct_fast.ssl.method import DinoMethod, Networks
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.ssl.schedules import step_values
from tapct_fast.train.step import train_step

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
    """Bytes on one rank where every rank holds whole networks; ``saved`` is counted on a step."""

    weights: int
    gradients: int
    adam: int
    teacher: int
    views: int  # of the micro-batches of a step and of those made ahead
    logits: int  # of the teacher, for all rows of the rank's step
    saved: int  # by autograd for the backward pass of one micro-batch, logits and views left out

    @property
    def total(self) -> int:
        """All of them; what is short-lived comes on top."""
        return sum(self)


class Flops(NamedTuple):
    """Model FLOPs of one sample."""

    student: int
    teacher: int
    heads: int  # of both
    dropped: int  # of the student's, which drop path does not run

    @property
    def total(self) -> int:
        """All of them, as if drop path dropped nothing."""
        return self.student + self.teacher + self.heads


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

    def flops_per_step(self) -> int:
        """Return the model FLOPs of a step on all ranks."""
        return self.flops.total * self.samples_per_rank * self.world

    def samples_per_s(self, share: float) -> float:
        """Return what a share of ``PEAK`` on every rank comes to: arithmetic, not a measurement."""
        return PEAK * share * self.world / self.flops.total


def legal_worlds(config: Config) -> list[int]:
    """Return the numbers of ranks among which the samples of a step can be divided."""
    most = config.train.batch_size // config.train.accumulate
    return [world for world in range(1, most + 1) if most % world == 0]


def plan(config: Config, *, world: int = 1) -> Plan:
    """Plan a run of ``config`` on ``world`` ranks and try its step on fake tensors.

    Raises:
        ConfigError: The samples of a step cannot be divided among so many ranks; the message lists
            the numbers of ranks that can.
    """
    legal = legal_worlds(config)
    if world not in legal:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} in train.accumulate="
            f"{config.train.accumulate} micro-batches cannot be divided among {world} ranks; it "
            f"can among {', '.join(map(str, legal))}"
        )
    samples = config.train.batch_size // world
    micro = samples // config.train.accumulate
    masked = _num_masked(config, micro)
    tokens_global, tokens_local = _num_tokens(config)
    num_local = config.views.local_views.num
    per_sample = 4 * tokens_global + num_local * tokens_local
    parameters = count_parameters(config)
    return Plan(
        world=world,
        legal_worlds=legal,
        samples_per_rank=samples,
        micro_batch=micro,
        tokens_per_step=per_sample * config.train.batch_size,
        masked_rows_per_step=masked * config.train.accumulate * world,
        parameters=parameters,
        memory=_memory(config, parameters, micro, masked, saved=saved_bytes(config, world=world)),
        flops=count_flops(config, micro),
        steps=config.train.num_steps,
    )


def count_parameters(config: Config) -> Parameters:
    """Return how many numbers a network has, from one that is built without memory."""
    with torch.device("meta"):
        networks = Networks(config.vit, config.heads, config.hu)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    backbone = count(networks.backbone)
    return Parameters(backbone, count(networks) - backbone)


def count_flops(config: Config, micro: int) -> Flops:
    """Return the model FLOPs of a sample; its masked tokens are a share of ``micro`` samples'."""
    vit, heads = config.vit, config.heads
    num_global, num_local = config.views.global_views.num, config.views.local_views.num
    tokens_global, tokens_local = _num_tokens(config)
    blocks = num_global * _block_flops(vit, tokens_global)
    student_blocks = vit.depth * (blocks + num_local * _block_flops(vit, tokens_local))
    embed = [2 * n * math.prod(vit.patch_zyx) * vit.dim for n in _num_patches(config)]
    student_embed = num_global * embed[0] + num_local * embed[1]
    masked = _num_masked(config, micro) / micro
    head_rows: list[tuple[HeadConfig, float, float]] = [  # of the teacher, of the student
        (heads.dino, num_global, num_global + num_local),
        (heads.ibot or heads.dino, masked, masked),
    ]
    return Flops(
        student=3 * student_blocks + 2 * student_embed,
        teacher=vit.depth * blocks + num_global * embed[0],
        heads=round(
            sum(
                (teacher + 3 * student) * _head_flops(head, vit.dim)
                for head, teacher, student in head_rows
            )
        ),
        dropped=round(3 * student_blocks * vit.drop_path),
    )


def saved_bytes(config: Config, *, world: int) -> int:
    """Run one step on fake tensors and return the bytes that autograd saves in a micro-batch.

    Parameters, views and the teacher's logits are not counted.
    """
    train = config.train
    micro = train.batch_size // (world * train.accumulate)
    dtype = torch.float32 if train.precision == "fp32" else torch.bfloat16
    with _fake_world(world):
        # The one place that knows what a step is given; the step is the one of training.
        method = DinoMethod(config.vit, config.heads, config.losses, hu=config.hu, seed=0)
        groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
        optimizer = build_optimizer(groups, config.optim)
        batches = [(_fake_batch(config, micro), seed) for seed in range(train.accumulate)]
        values = step_values(
            config.schedule, 0, num_steps=train.num_steps, batch_size=train.batch_size
        )
        known = {_storage(t) for t in method.parameters()}
        known |= {_storage(t) for batch, _ in batches for t in batch[:-1] if isinstance(t, Tensor)}
        logits = _logit_shapes(config, micro, _num_masked(config, micro))
        saved: list[torch.UntypedStorage] = []  # kept, so that no other one takes its address

        def note(tensor: Tensor) -> Tensor:
            if tuple(tensor.shape) not in logits and _storage(tensor) not in known:
                known.add(_storage(tensor))
                saved.append(tensor.untyped_storage())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train_step(
                method,
                optimizer,
                batches,
                values,
                accumulate=train.accumulate,
                clip_norm=config.optim.clip_norm,
                dtype=dtype,
            )
    return sum(storage.nbytes() for storage in saved) // train.accumulate


def _memory(
    config: Config, parameters: Parameters, micro: int, masked: int, *, saved: int
) -> Memory:
    accumulate, groups = config.train.accumulate, _groups(config)
    voxels = sum(group.num * math.prod(group.size_zyx) for group in groups)
    size = 4 if config.train.precision == "fp32" else 2  # under autocast logits are float16
    logits = accumulate * sum(n * p for n, p in _logit_shapes(config, micro, masked))
    return Memory(
        weights=4 * parameters.total,
        gradients=4 * parameters.total,
        adam=8 * parameters.total,
        teacher=4 * parameters.total,
        views=4 * voxels * micro * (accumulate + _PREFETCH),
        logits=size * logits,
        saved=saved,
    )


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


def _num_masked(config: Config, micro: int) -> int:
    """Return the masked tokens of a micro-batch."""
    num_views = config.views.global_views.num * micro
    return sum(masked_counts(config.masks, num_views, _num_patches(config)[0]))


def _logit_shapes(config: Config, micro: int, masked: int) -> list[tuple[int, int]]:
    """Return rows and prototypes of the teacher's logits in a micro-batch."""
    heads = config.heads
    rows = [(config.views.global_views.num * micro, heads.dino.num_prototypes)]
    return [*rows, (masked, (heads.ibot or heads.dino).num_prototypes)]


def _block_flops(vit: VitConfig, tokens: int) -> int:
    """Return those of a block's forward pass over one view."""
    width_in = vit.mlp_dim if vit.ffn == "mlp" else 2 * vit.mlp_dim
    linear = 4 * vit.dim * vit.dim + vit.dim * width_in + vit.mlp_dim * vit.dim
    return 2 * tokens * linear + 4 * tokens * tokens * vit.dim


def _head_flops(head: HeadConfig, dim: int) -> int:
    """Return those of a head's forward pass over one row."""
    widths = [dim, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim]
    return 2 * sum(a * b for a, b in pairwise([*widths, head.num_prototypes]))


def _fake_batch(config: Config, micro: int) -> ViewBatch:
    """Return a micro-batch without voxels; call it in a fake world."""
    views = [torch.empty(group.num, micro, *group.size_zyx) for group in _groups(config)]
    masked = _num_masked(config, micro)
    return ViewBatch(
        views[0],
        views[1],
        torch.empty(views[0].shape[0] * micro, _num_patches(config)[0], dtype=torch.bool),
        torch.empty(masked, dtype=torch.int64),
        torch.empty(masked),
        micro,
    )


@contextlib.contextmanager
def _fake_world(world: int) -> Iterator[None]:
    """Be rank 0 of a group whose collectives do nothing, on tensors that hold nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made by one process of its own"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with FakeTensorMode(), _HostReads():  # type: ignore[no-untyped-call]
            yield
    finally:
        dist.destroy_process_group()


class _HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers a host that reads a number: there are none on fake tensors, one is as good as any."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1.0
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


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
        "flops_per_sample": made.flops._asdict() | {"total": made.flops.total},
        "flops_per_step": made.flops_per_step(),
        "steps": made.steps,
        "samples_per_s_measured": None,
        "samples_per_s_by_arithmetic": {
            f"{share:.0%} of {PEAK / 1e12:.1f} TFLOP/s": round(made.samples_per_s(share), 1)
            for share in SHARES
        },
    }


def render(made: Plan) -> str:
    """Return the plan as text."""
    parameters, memory, flops = made.parameters, made.memory, made.flops
    total, dropped = flops.total, flops.dropped
    lines = [
        f"ranks                {made.world}; the batch can be divided among "
        f"{', '.join(map(str, made.legal_worlds))}",
        f"samples              {made.samples_per_rank} a step and rank, "
        f"{made.micro_batch} at a time",
        f"tokens               {made.tokens_per_step:,} a step, student and teacher, all ranks",
        f"masked rows          {made.masked_rows_per_step:,} a step, all ranks",
        f"parameters           {parameters.total / 1e6:.2f} M trained: backbone "
        f"{parameters.backbone / 1e6:.2f} M, heads {parameters.heads / 1e6:.2f} M; "
        f"{2 * parameters.total / 1e6:.2f} M with the teacher",
        f"model FLOPs          {total / 1e12:.3f} T a sample: student {flops.student / 1e12:.3f}, "
        f"teacher {flops.teacher / 1e12:.3f}, heads {flops.heads / 1e12:.3f}; drop path leaves "
        f"{(total - dropped) / 1e12:.3f}",
        f"                     {made.flops_per_step() / 1e12:,.1f} T a step, "
        f"{made.flops_per_step() * made.steps / 1e18:,.1f} E the run",
        "memory of one rank, whole networks on each (short-lived tensors come on top):",
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
        f"one step on fake tensors as one of {made.world}: done",
    ]
    return "\n".join(lines)

"""The processes that share a run: one without a group, or those that torchrun started.

Each takes an equal part of every step. ``ddp`` keeps a copy of the weights in each and averages the
gradients; ``fsdp`` keeps a shard of weights, gradients and moments, and gathers what it needs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from tapct_fast.errors import InputError, TrainError
from tapct_fast.ssl.method import DinoMethod

_BUCKET = 2**24  # gradients of one all-reduce, 64 MiB: long enough for the bandwidth of any network
_START_TIMEOUT = timedelta(minutes=30)  # until all processes have compiled their first step
STEP_TIMEOUT = timedelta(seconds=45)  # then a process that does not answer ends all within a minute


@dataclass(slots=True)
class Processes:
    """This process among those that share a step."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None
    is_sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes: logs, checkpoints, observers."""
        return self.rank == 0

    def mean(self, numbers: Tensor) -> Tensor:
        """Return the mean over the processes."""
        if self.group is None:
            return numbers
        numbers = numbers.clone()
        dist.all_reduce(numbers, group=self.group)
        return numbers / self.world_size

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over the processes, in place, always in the same order."""
        if self.group is None or self.is_sharded:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        pending = []
        for bucket in _buckets(grads):
            flat_N = torch.cat([grad.flatten() for grad in bucket])
            work = dist.all_reduce(flat_N, group=self.group, async_op=True)
            pending.append((bucket, flat_N, work))
        for bucket, flat_N, work in pending:
            assert work is not None
            work.wait()
            parts = torch.split(flat_N / self.world_size, [grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it is without shards; all processes call this together."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def shard(self, method: DinoMethod) -> None:
        """Spread the weights of student and teacher over the processes, in place."""
        device_type = next(method.parameters()).device.type
        mesh = init_device_mesh(device_type, (self.world_size,))
        for networks in (method.student, method.teacher):
            blocks: Any = networks.backbone.blocks  # Any: a ModuleList forgets its type
            for block in blocks:
                # Not the block: its norms are computed by the block before it.
                fully_shard(block.attn, mesh=mesh)
                fully_shard(block.mlp, mesh=mesh)
            fully_shard(networks, mesh=mesh)
            for name in ("encode_teacher", "encode_student", "encode_patches"):
                register_fsdp_forward_method(networks, name)
        self.is_sharded = True

    def steps_began(self) -> None:
        """From now on, do not wait for the others longer than a step can take."""
        if self.group is not None:
            dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, self.group)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.group is not None:
            dist.barrier(group=self.group)


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        bucket.append(grad)
        size += grad.numel()
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@contextmanager
def started(environment: Mapping[str, str], device_type: str) -> Iterator[Processes]:
    """Join the processes that torchrun describes in its variables, or be alone without them.

    Raises:
        InputError: The variables contradict each other, or there are more processes on this machine
            than CUDA devices.
        TrainError: Another process died or did not answer.
    """
    if "WORLD_SIZE" not in environment:
        yield Processes()
        return
    try:
        rank, world_size, local_rank = (
            int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
    except (KeyError, ValueError):
        raise InputError(
            "WORLD_SIZE is set, but RANK or LOCAL_RANK is not a number: start with torchrun, or "
            "unset WORLD_SIZE"
        ) from None
    if world_size == 1:
        yield Processes()
        return
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {local_rank} of this machine has no CUDA device: there are "
                f"{torch.cuda.device_count()}; give torchrun --nproc-per-node that number"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=_START_TIMEOUT,
    )
    try:
        yield Processes(rank, world_size, local_rank, dist.group.WORLD)
    except (dist.DistBackendError, dist.DistNetworkError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise TrainError(
                f"process {rank} of {world_size} lost the others: one died or did not answer for "
                f"{math.ceil(STEP_TIMEOUT.total_seconds())} s; its own message says why. The same "
                "command goes on from the last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()

"""The processes that share a run: one without a group, or those that torchrun started.

Each takes an equal part of every step. ``ddp`` keeps a copy of the weights in each and averages the
gradients; ``fsdp`` keeps a shard of weights, gradients and moments, and gathers what it needs.

A process that dies or hangs ends all of them. Nobody waits for the others longer than 45 s, except
where one may rightly take longer: while it compiles, saves or goes back.
"""

import contextlib
import faulthandler
import math
import re
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous

from tapct_fast.errors import InputError, TapctError, TrainError
from tapct_fast.ssl.method import DinoMethod

_BUCKET = 2**24  # gradients of one all-reduce, 64 MiB: long enough for the bandwidth of any network
LONG = timedelta(minutes=30)  # compiling a step, or a disk that is slow to take a checkpoint
SHORT = timedelta(seconds=45)  # any other step; with the way out, all leave within a minute
_DUMP_SECONDS = 5  # before that, each that still waits says where
_STORE_SECONDS = 3
_LEFT = "processes that left with an error"  # a key of the group's store


@dataclass(slots=True)
class Processes:
    """This process among those that share a step."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    is_sharded: bool = False
    _patient_until: int = 0  # this step
    _limit: timedelta = field(default=LONG)

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

    def shard(self, method: DinoMethod) -> None:
        """Spread the weights of student and teacher over the processes, in place."""
        # It warns of every module that returns a view, lest somebody write into it; nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = init_device_mesh(next(method.parameters()).device.type, (self.world_size,))
        for networks in (method.student, method.teacher):
            blocks: Any = networks.backbone.blocks  # Any: a ModuleList forgets its type
            for block in blocks:
                # Not the block: its norms are computed by the block before it.
                fully_shard(block.attn, mesh=mesh)
                fully_shard(block.mlp, mesh=mesh)
            # What is gathered of the student outside the blocks is kept for the backward; of the
            # teacher, which has none, it would stay, and miss every later update.
            fully_shard(networks, mesh=mesh, reshard_after_forward=networks is method.teacher)
            for name in ("encode_teacher", "encode_student", "encode_patches"):
                register_fsdp_forward_method(networks, name)
        self.is_sharded = True

    def of_first(self, number: int) -> int:
        """Return the number of the first process; all wait for it."""
        if self.group is None:
            return number
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        number_1 = torch.tensor([number], device=device)
        dist.broadcast(number_1, 0, group=self.group)
        return int(number_1)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def be_patient(self, *, until: int) -> None:
        """Let the others take long until step ``until`` is done by all."""
        self._patient_until = until
        self._wait_at_most(LONG)

    def step_begins(self) -> None:
        """Say on stderr where this process waits, should the step take too long."""
        if self.group is not None and self._limit == SHORT:
            faulthandler.dump_traceback_later(max(SHORT.total_seconds() - _DUMP_SECONDS, 1))

    def step_ends(self, done: int) -> None:
        """Note that all processes have done ``done`` steps, as this one has read."""
        faulthandler.cancel_dump_traceback_later()
        if done >= self._patient_until:
            self._wait_at_most(SHORT)

    def _wait_at_most(self, limit: timedelta) -> None:
        if self.group is not None and self._limit != limit:
            dist.distributed_c10d._set_pg_timeout(limit, self.group)
        self._limit = limit


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


@contextlib.contextmanager
def started(environment: Mapping[str, str], device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun describes in its variables, or be alone without them.

    One that has no more to say than another one did leaves with ``SystemExit`` and the same code.

    Raises:
        InputError: The variables contradict each other, or there are more processes on this machine
            than CUDA devices.
        TrainError: Another process died or did not answer.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        yield Processes()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in names)
    except (KeyError, ValueError):
        raise InputError(
            "WORLD_SIZE is set, but RANK or LOCAL_RANK is not a number: start with torchrun, or "
            "unset WORLD_SIZE"
        ) from None
    if device.type == "cuda":
        _take_device(device, local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=LONG))
        # torchrun keeps its store when it starts all of them anew, with the addresses of the dead.
        store = PrefixStore(environment.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=LONG
        )
    except (RuntimeError, ValueError) as error:  # gloo raises it plainly
        raise TrainError(
            f"process {rank} of {world_size} did not find the others: {_reason(error)}; start "
            "with torchrun, or set MASTER_ADDR and MASTER_PORT alike for all"
        ) from error
    try:
        yield Processes(rank, world_size, dist.group.WORLD)
    except TapctError as error:
        if _others_left(store, rank, world_size):
            raise SystemExit(error.exit_code) from None
        raise
    except RuntimeError as error:
        others_left = _others_left(store, rank, world_size)
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        if others_left:
            raise SystemExit(TrainError.exit_code) from None
        raise TrainError(
            f"process {rank} of {world_size} lost the others: one died, or did not answer for "
            f"{math.ceil(SHORT.total_seconds())} s. The same command goes on from the last "
            f"checkpoint. torch: {_reason(error)}"
        ) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
        dist.destroy_process_group()


def _take_device(device: torch.device, local_rank: int) -> None:
    if device.index is not None:
        raise InputError(f"--device {device} is one for all processes; give --device cuda")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no CUDA device: there are "
            f"{torch.cuda.device_count()}; give torchrun --nproc-per-node that number"
        )
    torch.cuda.set_device(local_rank)


def _others_left(store: Store, rank: int, world_size: int) -> bool:
    """Say whether another process left with an error before, which is the one to be told.

    The first, whose store it may be, stays until the others have asked, or ``_STORE_SECONDS``.
    """
    count = [0]

    def enter() -> None:
        with contextlib.suppress(dist.DistError):  # the one that kept the store was killed
            count.append(int(store.add(_LEFT, 1)))
            while rank == 0 and int(store.add(_LEFT, 0)) < world_size:
                time.sleep(0.02)

    # In a thread, which can be left behind: if it hangs, its store does too.
    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    thread.join(_STORE_SECONDS)
    return count[-1] > 1


def _reason(error: BaseException) -> str:
    """Return what torch says first, without its place in the source."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[[^ ]*\] ", "", line).partition(". ")[0]

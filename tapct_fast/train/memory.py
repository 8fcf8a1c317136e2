"""Out of memory in a step, told in one line with a way out instead of a trace."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tapct_fast.config import TrainConfig
from tapct_fast.errors import StoppedError, TrainError
from tapct_fast.train.checkpoint import folders, step_of

# Of torch's allocators on CUDA and on the CPU, of the C++ library, and of numpy.
_SIGNS = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc|bad alloc")
_ASKED = re.compile(r"allocate ([0-9.]+ ?(?:[KMGT]i?B|bytes))")


@contextmanager
def memory_errors(directory: Path, config: TrainConfig, *, world_size: int = 1) -> Iterator[None]:
    """Turn an allocation that fails inside into one line with peak, request and suggestion.

    Args:
        directory: The run's folder.
        config: The settings that decide how much a step takes.
        world_size: Processes that share a step.

    Raises:
        StoppedError: There is a checkpoint; memory may be free another time.
        TrainError: There is none: the run never fitted.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not _SIGNS.search(str(error)):
            raise
        line = _explain(str(error), config, world_size)
    else:
        return
    done = folders(directory)
    if done:
        raise StoppedError(
            f"{line}. The checkpoint of step {step_of(done[-1])} is intact; the same command goes "
            "on if the memory was taken by others"
        )
    raise TrainError(line)


def _explain(message: str, config: TrainConfig, world_size: int) -> str:
    asked = _ASKED.search(message)
    where, peak = "the host", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if "CUDA" in message:
        where, peak = "the GPU", torch.cuda.max_memory_allocated()
    wanted = f", when {asked[1]} more were asked for" if asked else ""
    way_out = _way_out(config, world_size)
    return f"out of memory on {where}: the peak was {peak / 1e9:.2f} GB{wanted}. {way_out}"


def _way_out(config: TrainConfig, world_size: int) -> str:
    """Return what costs least next: time for activations, smaller micro-batches, more time."""
    micro = config.batch_size // (world_size * config.accumulate)
    num_groups = config.batch_size // (world_size * config.group_size)  # of a process
    more = [a for a in range(config.accumulate + 1, num_groups + 1) if num_groups % a == 0]
    if config.checkpointing == "none":
        setting = "train.checkpointing=selective"
    elif more:
        setting = f"train.accumulate={more[0]}, or a smaller train.batch_size"
    elif config.checkpointing == "selective":
        setting = "train.checkpointing=full"
    else:
        setting = "smaller views or a smaller model"
    return f"Micro-batches have {micro} samples: start a run with {setting}"

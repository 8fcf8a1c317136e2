"""Launch configurations: candidates stand beside their kernel, winners in ``tuned/`` per device.

A table is one JSON file per device name and Triton version, ``{kernel: {key: config}}``, written by
a tuner on that device and committed; nothing is tuned at run time. Where no table or entry fits,
the first candidate is launched: a Triton upgrade moves the optimum (triton#11373), so an old
table is never borrowed.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import torch
import triton

Config = Mapping[str, int]  # block sizes, num_warps, num_stages
Launch = tuple[str, int]  # kernel, key
TUNED = Path(__file__).with_name("tuned")

T = TypeVar("T")

_forced: ContextVar[Mapping[str, Config] | None] = ContextVar("forced", default=None)
# Context variables: autograd runs a backward on CUDA in another thread, which does not see them
# unless torch.autograd.set_multithreading_enabled(False) keeps it in this one.
_asked: ContextVar[dict[Launch, Sequence[Config]] | None] = ContextVar("asked", default=None)


def config_for(kernel: str, key: int, candidates: Sequence[Config]) -> Config:
    """Return the configuration to launch a kernel with on the current device.

    Args:
        kernel: ``"<op>.<kernel>"``.
        key: What the optimum depends on, such as the width.
        candidates: All that are allowed; the first is the default.
    """
    asked = _asked.get()
    if asked is not None:
        asked[kernel, key] = candidates
    forced_configs = _forced.get() or {}
    if kernel in forced_configs:
        return forced_configs[kernel]
    tuned = _table(table_path()).get(kernel, {}).get(str(key))
    return tuned if tuned is not None and tuned in candidates else candidates[0]


def table_path() -> Path | None:
    """Return where the table of the current device belongs, or None without a CUDA device."""
    if not torch.cuda.is_available():
        return None
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return TUNED / f"{device}-triton-{triton.__version__}.json"


@functools.cache
def _table(path: Path | None) -> dict[str, dict[str, dict[str, int]]]:
    if path is None or not path.exists():
        return {}
    table: dict[str, dict[str, dict[str, int]]] = json.loads(path.read_text())
    return table


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Launch a kernel with one configuration, whatever the table says; for tests and the tuner."""
    token = _forced.set({**(_forced.get() or {}), kernel: config})
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def asked() -> Iterator[dict[Launch, Sequence[Config]]]:
    """Collect the candidates of every kernel and key launched inside."""
    found: dict[Launch, Sequence[Config]] = {}
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


def each_config(call: Callable[[], T]) -> Iterator[tuple[str, Config, T]]:
    """Call with the default configurations, then once with every other candidate.

    Yields:
        The kernel whose configuration was forced ("" at first), the configuration, the result.
    """
    with asked() as candidates:
        yield "", {}, call()
    for (kernel, _), configs in candidates.items():
        for config in configs[1:]:
            with forced(kernel, config):
                result = call()
            yield kernel, config, result

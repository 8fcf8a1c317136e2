"""From the store to what a training step takes: a pure function of (seed, step, group).

A step is a row of groups of ``train.group_size`` samples. Each has masks of its own, with as many
masked tokens as any other, so a group is the same whatever micro-batch and process it falls into.

Shape suffixes: V views, B samples, Z Y X voxels, N = V * B global views, L tokens, M masked tokens.
Global views are numbered view-major: n = v * B + b; the samples of a group are neighbours.
"""

import os
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.config import Config, TrainConfig
from tapct_fast.data.masks import mask_law
from tapct_fast.data.render import choose_renderer, make_renderer
from tapct_fast.data.rng import Stream, generator
from tapct_fast.data.samples import OnDamage, Sample, Samples
from tapct_fast.data.workers import Workers
from tapct_fast.errors import ConfigError
from tapct_fast.io.store import Store
from tapct_kernels import BlockMasks, block_masks

_SEEDS = 2**62
_GLOBAL_VIEWS = 2  # DINO compares two
_PREFETCH = 2  # batches: one ready, one in the making


class ViewBatch(NamedTuple):
    """One micro-batch of views and the masks of its global views."""

    global_VBZYX: Tensor  # float32, z-scored
    local_VBZYX: Tensor
    mask_NL: Tensor  # bool, True where the student sees the mask token
    masked_index_M: Tensor  # int64 into N * L, each once; M is a constant of the run
    masked_weight_M: Tensor  # float32, 1 / masked tokens of the same view
    num_samples: int


class ViewPipeline:
    """Reads boxes from a store and renders their views.

    Args:
        store: Where the boxes come from.
        config: The run; its seed, batch size, crops, views and masks are used.
        device: Where the views are rendered and end up.
        on_damage: Told of every case that turns out damaged, with the reason; see ``Samples``.
        rank: This process takes the ``rank``-th of ``world_size`` equal parts of every step.
        world_size: Processes that share a step.

    Raises:
        StoreError: The store has no cases.
        ConfigError: A global view has too many tokens to be masked, or the groups of a step cannot
            be dealt out evenly.
        InputError: The renderer that was asked for cannot run here.
    """

    def __init__(
        self,
        store: Store,
        config: Config,
        *,
        device: torch.device | str,
        on_damage: OnDamage | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._samples = Samples(store, config, on_damage=on_damage)
        self._config = config
        self._device = torch.device(device)
        self._rank = rank
        self.num_groups = groups_per_micro_batch(config.train, world_size)
        self._micro_size = self.num_groups * config.train.group_size
        self._num_workers = config.train.num_workers or min(
            max(len(os.sched_getaffinity(0)) // 2, 1), 8
        )
        self.renderer = choose_renderer(config.views.renderer, self._device)
        self._render = make_renderer(
            self.renderer,
            self._samples.groups,
            config.hu,
            self._device,
            batch_size=self._micro_size,
            threads=self._num_workers,
        )
        group = config.views.global_views
        z, y, x = (s // p for s, p in zip(group.size_zyx, config.vit.patch_zyx, strict=True))
        self._mask_law = mask_law(
            config.masks, (z, y, x), group.num * config.train.group_size, device=self._device
        )
        # Of its own: copies and views of the next batch run beside the step of this one.
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # What is on the device already, the masks' law, is there before it is used.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def batch_at(self, step: int, micro: int) -> ViewBatch:
        """Return micro-batch ``micro`` of ``step``: the same at any time."""
        loaded = list(map(self._samples.load, self._indices(step, micro)))
        return self._handed_over(*self._batch(step, micro, loaded))

    def stream(self, start: int, end: int) -> Generator[tuple[ViewBatch, float], None, None]:
        """Yield this process's micro-batches of steps ``start`` to ``end - 1``, prepared ahead.

        Yields:
            The batch and the seconds its consumer waited for it.

        Raises:
            StoreReadError: A case could not be read, however often it was tried.
            StoreError: Too many cases are damaged.
        """
        train = self._config.train
        places = ((step, micro) for step in range(start, end) for micro in range(train.accumulate))
        pending: deque[Future[tuple[ViewBatch, torch.cuda.Event | None]]] = deque()
        readers = Workers(self._num_workers, timeout=train.read_timeout)
        # One torch thread in the worker (the setting is per thread): the others train, and a second
        # one only costs: 8 against 66 ms of CPU per debug sample on two busy cores.
        pool = ThreadPoolExecutor(1, "views", initializer=torch.set_num_threads, initargs=(1,))

        def prepare(step: int, micro: int) -> tuple[ViewBatch, torch.cuda.Event | None]:
            loaded = readers.map(self._samples.load, self._indices(step, micro))
            return self._batch(step, micro, loaded)

        try:
            for place in places:
                pending.append(pool.submit(prepare, *place))
                if len(pending) > _PREFETCH:
                    yield self._wait_for(pending.popleft())
            while pending:
                yield self._wait_for(pending.popleft())
        finally:
            readers.close()  # first: a read that hangs is not waited for
            pool.shutdown(wait=True, cancel_futures=True)

    def groups(self, micro: int) -> range:
        """Return which groups of a step make up micro-batch ``micro`` of this process."""
        first = (self._rank * self._config.train.accumulate + micro) * self.num_groups
        return range(first, first + self.num_groups)

    def _indices(self, step: int, micro: int) -> range:
        train = self._config.train
        first = step * train.batch_size + self.groups(micro).start * train.group_size
        return range(first, first + self._micro_size)

    def _batch(
        self, step: int, micro: int, loaded: Sequence[tuple[Sample, NDArray[np.int16]]]
    ) -> tuple[ViewBatch, torch.cuda.Event | None]:
        """Return a batch and, on CUDA, the event after which it is there."""
        tables = [[sample.tables[g] for sample, _ in loaded] for g in range(2)]
        with torch.cuda.stream(self._stream):  # None changes nothing
            boxes = self._to_device([hu_ZYX for _, hu_ZYX in loaded])
            views = [
                torch.empty((group.num, len(boxes), *group.size_zyx), device=self._device)
                for group in self._samples.groups
            ]
            self._render(boxes, tables, views)
            masks = self._masks(step, micro)
        batch = ViewBatch(views[0], views[1], *masks, num_samples=len(boxes))
        return batch, None if self._stream is None else self._stream.record_event()

    def _to_device(self, boxes: Sequence[NDArray[np.int16]]) -> list[Tensor]:
        if self._stream is None:
            return [torch.from_numpy(hu_ZYX) for hu_ZYX in boxes]
        # One copy of all; torch keeps pinned memory until the copy from it is done.
        pinned_N = torch.empty(sum(b.size for b in boxes), dtype=torch.int16, pin_memory=True)
        ends = np.cumsum([hu_ZYX.size for hu_ZYX in boxes])
        for hu_ZYX, end in zip(boxes, ends, strict=True):
            pinned_N[end - hu_ZYX.size : end].copy_(torch.from_numpy(hu_ZYX).flatten())
        device_N = pinned_N.to(self._device, non_blocking=True)
        return [
            device_N[end - hu_ZYX.size : end].view(hu_ZYX.shape)
            for hu_ZYX, end in zip(boxes, ends, strict=True)
        ]

    def _masks(self, step: int, micro: int) -> BlockMasks:
        drawn = []
        for group in self.groups(micro):
            rng = generator(self._config.train.seed, Stream.MASKS, step, group)
            # Filled on the device, not copied there: nothing waits for the host.
            seed = torch.full((), int(rng.integers(_SEEDS)), dtype=torch.int64, device=self._device)
            drawn.append(block_masks(self._mask_law, seed))
        return drawn[0] if len(drawn) == 1 else _side_by_side(drawn)

    def _wait_for(
        self, future: Future[tuple[ViewBatch, torch.cuda.Event | None]]
    ) -> tuple[ViewBatch, float]:
        start = time.perf_counter()
        batch = self._handed_over(*future.result())
        return batch, time.perf_counter() - start

    def _handed_over(self, batch: ViewBatch, event: torch.cuda.Event | None) -> ViewBatch:
        """Let the consumer's stream wait for this batch, not for those after it."""
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            for tensor in batch[:-1]:
                assert isinstance(tensor, Tensor)
                tensor.record_stream(current)
        return batch


def groups_per_micro_batch(train: TrainConfig, world_size: int) -> int:
    """Return how many groups one process takes at a time.

    Raises:
        ConfigError: The groups of a step cannot be dealt out evenly; the message lists the numbers
            of processes for which they can.
    """
    num_groups = train.batch_size // train.group_size
    parts = world_size * train.accumulate
    if num_groups % parts:
        legal = [n for n in range(1, num_groups + 1) if num_groups % (n * train.accumulate) == 0]
        raise ConfigError(
            f"{world_size} processes cannot share train.batch_size={train.batch_size} in groups of "
            f"train.group_size={train.group_size} with train.accumulate={train.accumulate}; "
            f"numbers of processes that can: {', '.join(map(str, legal))}"
        )
    return num_groups // parts


def _side_by_side(drawn: Sequence[BlockMasks]) -> BlockMasks:
    """Join the masks of groups, each view-major, into those of a view-major batch."""
    num_groups = len(drawn)
    rows, num_tokens = drawn[0].mask_NL.shape
    per_view = rows // _GLOBAL_VIEWS  # samples of a group

    def moved(group: int, index_M: Tensor) -> Tensor:
        view_M, rest_M = index_M // (per_view * num_tokens), index_M % (per_view * num_tokens)
        return (view_M * num_groups + group) * per_view * num_tokens + rest_M

    mask_GNL = torch.stack([m.mask_NL for m in drawn])
    mask_GVBL = mask_GNL.view(num_groups, _GLOBAL_VIEWS, per_view, num_tokens)
    return BlockMasks(
        mask_GVBL.transpose(0, 1).flatten(0, 2),
        torch.cat([moved(group, m.masked_index_M) for group, m in enumerate(drawn)]),
        torch.cat([m.masked_weight_M for m in drawn]),
    )

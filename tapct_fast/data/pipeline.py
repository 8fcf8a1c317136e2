"""From the store to what a training step takes: a pure function of (seed, step, micro-batch).

Shape suffixes: V views, B samples, Z Y X voxels, N = V * B global views, L tokens, M masked tokens.
Global views are numbered view-major: n = v * B + b. A sample is the same whatever micro-batch it
falls into; masks are drawn per micro-batch, because each must have as many masked tokens as any.
"""

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from tapct_fast.config import Config
from tapct_fast.data.crops import crop_at
from tapct_fast.data.masks import mask_law
from tapct_fast.data.reference import render
from tapct_fast.data.rng import Stream, generator
from tapct_fast.data.views import draw_views
from tapct_fast.errors import StoreError
from tapct_fast.io.store import Store
from tapct_kernels import BlockMasks, block_masks

_SEEDS = 2**62
_PREFETCH = 2  # batches: one ready, one in the making


class ViewBatch(NamedTuple):
    """One micro-batch of views and the masks of its global views."""

    global_VBZYX: Tensor  # float32, z-scored
    local_VBZYX: Tensor
    mask_NL: Tensor  # bool, True where the student sees the mask token
    masked_index_M: Tensor  # int64 into N * L, ascending; M is a constant of the run
    masked_weight_M: Tensor  # float32, 1 / masked tokens of the same view
    num_samples: int


class ViewPipeline:
    """Reads boxes from a store and renders their views.

    Args:
        store: Where the boxes come from.
        config: The run; its seed, batch size, crops, views and masks are used.
        device: Where the views are rendered and end up.

    Raises:
        StoreError: The store has no cases.
        ConfigError: A global view has too many tokens to be masked.
    """

    def __init__(self, store: Store, config: Config, *, device: torch.device | str) -> None:
        if not store.cases:
            raise StoreError("the store has no cases: pack scans; see its quarantine.jsonl")
        self._store = store
        # By content: ids are random per store, yet the same scans and seed must give the same run.
        self._order = sorted(range(len(store.cases)), key=lambda i: store.cases[i].crc32s)
        self._cases = [store.cases[i] for i in self._order]
        self._config = config
        self._device = torch.device(device)
        self._micro_size = config.train.batch_size // config.train.accumulate
        group = config.views.global_views
        z, y, x = (s // p for s, p in zip(group.size_zyx, config.vit.patch_zyx, strict=True))
        self._mask_law = mask_law(
            config.masks, (z, y, x), group.num * self._micro_size, device=self._device
        )

    def batch_at(self, step: int, micro: int) -> ViewBatch:
        """Return micro-batch ``micro`` of ``step``: the same at any time and in any process."""
        views, num = self._config.views, self._micro_size
        global_VBZYX, local_VBZYX = (
            torch.empty((group.num, num, *group.size_zyx), dtype=torch.float32, device=self._device)
            for group in (views.global_views, views.local_views)
        )
        first = step * self._config.train.batch_size + micro * num
        for b in range(num):
            global_VBZYX[:, b], local_VBZYX[:, b] = self._sample(first + b)
        masks = self._masks(step, micro)
        return ViewBatch(global_VBZYX, local_VBZYX, *masks, num_samples=num)

    def stream(self, start_step: int) -> Generator[tuple[ViewBatch, float], None, None]:
        """Yield every micro-batch from ``start_step`` to the end of the run, prepared ahead.

        Yields:
            The batch and the seconds its consumer waited for it.
        """
        train = self._config.train
        places = (
            (step, micro)
            for step in range(start_step, train.num_steps)
            for micro in range(train.accumulate)
        )
        pending: deque[Future[ViewBatch]] = deque()
        # One torch thread in the worker (the setting is per thread): the others train, and a second
        # one only costs: 8 against 66 ms of CPU per debug sample on two busy cores.
        pool = ThreadPoolExecutor(1, "views", initializer=torch.set_num_threads, initargs=(1,))
        try:
            for place in places:
                pending.append(pool.submit(self.batch_at, *place))
                if len(pending) > _PREFETCH:
                    yield _wait_for(pending.popleft())
            while pending:
                yield _wait_for(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _sample(self, index: int) -> tuple[Tensor, Tensor]:
        config, seed = self._config, self._config.train.seed
        crop = crop_at(self._cases, config.crops, seed=seed, index=index)
        box_ZYX = self._store.read_box(self._order[crop.case], crop.lo_zyx, crop.shape_zyx)
        hu_ZYX = torch.from_numpy(box_ZYX).to(self._device)
        global_VZYX, local_VZYX = (
            render(
                hu_ZYX,
                draw_views(
                    config.views,
                    group,
                    config.hu,
                    crop.shape_zyx,
                    spacing_mm=self._cases[crop.case].spacing_mm,
                    rng=generator(seed, Stream.VIEWS, index, number),
                ),
                group,
                config.hu,
            )
            for number, group in enumerate((config.views.global_views, config.views.local_views))
        )
        return global_VZYX, local_VZYX

    def _masks(self, step: int, micro: int) -> BlockMasks:
        rng = generator(self._config.train.seed, Stream.MASKS, step, micro)
        seed = int(rng.integers(_SEEDS))
        # Filled on the device, not copied there: nothing waits for the host.
        return block_masks(
            self._mask_law, torch.full((), seed, dtype=torch.int64, device=self._device)
        )


def _wait_for(future: Future[ViewBatch]) -> tuple[ViewBatch, float]:
    start = time.perf_counter()
    batch = future.result()
    return batch, time.perf_counter() - start

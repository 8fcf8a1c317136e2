"""One training sample: its crop, the tables of its views, and the voxels these need.

Everything but the voxels is drawn on the host from (seed, sample index), so batch size, threads,
ranks, renderer and resume do not change a sample.

Shape suffixes: V views, Z Y X voxels.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.config import Config, ViewGroupConfig, Zyx
from tapct_fast.data.crops import CaseOrder, Crop, crop_at
from tapct_fast.data.rng import Stream, generator
from tapct_fast.data.views import ViewTable, draw_views
from tapct_fast.errors import StoreError, StoreReadError
from tapct_fast.io.store import Store
from tapct_fast.io.store_index import CaseRecord

_READS = 3  # of a box, before an error of the system stops the run
_PAUSE_SECONDS = 0.2  # before the second; twice as long before the third
_MOST_DAMAGED = 0.05  # of the cases

OnDamage = Callable[[str, str], None]  # case, reason


class Sample(NamedTuple):
    """A sample before its voxels are read; ``tables`` are relative to ``region``."""

    number: int  # counted over the run
    record: CaseRecord
    crop: Crop
    region: Crop  # of the store: the part of the crop that any view looks at
    tables: tuple[ViewTable, ...]  # of the global and the local views


class Samples:
    """The samples of a run in a store.

    Args:
        store: Where the boxes come from.
        config: The run; its seed, crops and views are used.
        on_damage: Told of every case that turns out damaged, once.

    Raises:
        StoreError: The store has no cases.
    """

    def __init__(self, store: Store, config: Config, *, on_damage: OnDamage | None = None) -> None:
        if not store.cases:
            raise StoreError("the store has no cases: pack scans; see its quarantine.jsonl")
        self._store = store
        # By content: ids are random per store, yet the same scans and seed must give the same run.
        self._by_content = sorted(range(len(store.cases)), key=lambda i: store.cases[i].crc32s)
        self._cases = [store.cases[i] for i in self._by_content]
        self._order = CaseOrder(len(self._cases), seed=config.train.seed)
        self._config = config
        self._on_damage = on_damage
        self._damaged: set[int] = set()  # positions in the store
        self._lock = threading.Lock()

    @property
    def groups(self) -> tuple[ViewGroupConfig, ViewGroupConfig]:
        """Global and local views, in the order of ``Sample.tables``."""
        return self._config.views.global_views, self._config.views.local_views

    def draw(self, index: int, *, skip: int = 0) -> Sample:
        """Draw sample ``index`` of the run; ``skip`` as in ``crop_at``."""
        config, seed = self._config, self._config.train.seed
        crop = crop_at(self._cases, config.crops, self._order, index=index, skip=skip)
        record = self._cases[crop.case]
        tables = [
            draw_views(
                config.views,
                group,
                config.hu,
                crop.shape_zyx,
                spacing_mm=record.spacing_mm,
                rng=generator(seed, Stream.VIEWS, index, number),
            )
            for number, group in enumerate(self.groups)
        ]
        lo_zyx, shape_zyx = union_region(tables, self.groups, crop.shape_zyx)
        # Subtracting whole voxels from a larger float32 is exact.
        shift_3 = np.array(lo_zyx, dtype=np.float32)
        z, y, x = (a + b for a, b in zip(crop.lo_zyx, lo_zyx, strict=True))
        return Sample(
            index,
            record,
            Crop(self._by_content[crop.case], crop.lo_zyx, crop.shape_zyx),
            Crop(self._by_content[crop.case], (z, y, x), shape_zyx),
            tuple(t._replace(lo_V3=t.lo_V3 - shift_3, hi_V3=t.hi_V3 - shift_3) for t in tables),
        )

    def load(self, index: int) -> tuple[Sample, NDArray[np.int16]]:
        """Draw sample ``index`` of the run and read its region.

        Where the region is damaged, the next case in the epoch's order takes its place. Nothing is
        remembered for that: a resumed run, which has met other damage, gives the same sample.

        Returns:
            The sample, and the HU of its region.

        Raises:
            StoreReadError: The system could not read a file, however often it was asked.
            StoreError: Too many cases are damaged.
        """
        for skip in range(len(self._cases)):
            sample = self.draw(index, skip=skip)
            try:
                return sample, self._read(sample.region)
            except StoreReadError:
                raise
            except StoreError as error:
                self._note_damage(sample, str(error))
        raise StoreError("every case is damaged; pack the scans again into a new store")

    def _read(self, region: Crop) -> NDArray[np.int16]:
        for attempt in range(_READS):
            try:
                return self._store.read_box(region.case, region.lo_zyx, region.shape_zyx)
            except StoreReadError:
                if attempt == _READS - 1:
                    raise
                time.sleep(_PAUSE_SECONDS * 2**attempt)
        raise AssertionError

    def _note_damage(self, sample: Sample, reason: str) -> None:
        with self._lock:
            if sample.region.case in self._damaged:
                return
            self._damaged.add(sample.region.case)
            if self._on_damage is not None:
                self._on_damage(sample.record.case, reason)
            num, total = len(self._damaged), len(self._cases)
        if num > max(1, _MOST_DAMAGED * total):
            raise StoreError(
                f"{num} of {total} cases are damaged, the last one so: {reason}; check the disk "
                "and pack these scans again"
            )


def union_region(
    tables: Sequence[ViewTable], groups: Sequence[ViewGroupConfig], shape_zyx: Zyx
) -> tuple[Zyx, Zyx]:
    """Return first voxel and shape of what any view of a crop looks at, filters included.

    Rendered from it, with bounds relative to it, a view is what it is from the whole crop.

    Args:
        tables: Of each group, bounds relative to the crop.
        groups: Sizes and antialiasing.
        shape_zyx: Voxels of the crop.
    """
    lows, highs = [], []
    for table, group in zip(tables, groups, strict=True):
        lo_V3, hi_V3 = table.lo_V3.astype(np.float64), table.hi_V3.astype(np.float64)
        scale_V3 = np.abs(hi_V3 - lo_V3) / np.array(group.size_zyx)
        reach_V3 = np.maximum(scale_V3, 1.0) if group.antialias else np.ones_like(scale_V3)
        lows.append(np.minimum(lo_V3, hi_V3) - reach_V3 - 1)
        highs.append(np.maximum(lo_V3, hi_V3) + reach_V3 + 1)
    shape_3 = np.array(shape_zyx)
    low_3 = np.floor(np.concatenate(lows).min(axis=0)).astype(int).clip(0, shape_3 - 1)
    high_3 = np.ceil(np.concatenate(highs).max(axis=0)).astype(int).clip(low_3 + 1, shape_3)
    z, y, x = map(int, low_3)
    depth, height, width = map(int, high_3 - low_3)
    return (z, y, x), (depth, height, width)

"""Which box of which case a training sample is, as a pure function of (seed, sample index).

The box has a size in millimetres, so that
scans of any spacing show as much anatomy; along an axis where the scan is shorter the box spans it.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.config import CropConfig, Zyx
from tapct_fast.data.rng import Stream, generator
from tapct_fast.io.store import snap_to_blocks
from tapct_fast.io.store_index import CaseRecord


class Crop(NamedTuple):
    """One box: position of the case in the store, first voxel, size in voxels (z, y, x)."""

    case: int
    lo_zyx: Zyx
    shape_zyx: Zyx


class CaseOrder:
    """The case of every sample: an epoch visits each once, in an order of its own.

    The orders of two epochs are kept, so that a draw costs the same for any number of cases: an
    order of 10 million takes 0.5 s and 40 MB once, and readers near an epoch's end are in two.

    Args:
        num_cases: Cases of the store, at least one.
        seed: Seed of the run.
    """

    def __init__(self, num_cases: int, *, seed: int) -> None:
        assert num_cases > 0
        self.num_cases = num_cases
        self.seed = seed
        self._orders: dict[int, NDArray[np.uint32]] = {}  # of the epochs asked for last
        self._lock = threading.Lock()

    def case_at(self, index: int, *, skip: int = 0) -> int:
        """Return the case of global sample ``index``.

        Args:
            index: Counted over all steps of the run.
            skip: Take the case this many places later in the epoch's order, round to its start.
        """
        epoch, position = divmod(index, self.num_cases)
        with self._lock:
            order = self._orders.pop(epoch, None)
            if order is None:
                rng = generator(self.seed, Stream.CASE_ORDER, epoch)
                order = rng.permutation(self.num_cases).astype(np.uint32)
            self._orders[epoch] = order  # the last one now
            if len(self._orders) > 2:
                del self._orders[next(iter(self._orders))]
        return int(order[(position + skip) % self.num_cases])


def crop_at(
    cases: Sequence[CaseRecord],
    config: CropConfig,
    order: CaseOrder,
    *,
    index: int,
    skip: int = 0,
) -> Crop:
    """Return the box of global sample ``index``.

    Boxes are uniform over the positions inside the scan at which, with ``config.center_in_body``,
    their centre lies in the patient's bounding box, or over the nearest position to these.
    With ``config.snap_to_blocks`` they start on the store's grid of blocks (4, 64, 64) instead, at
    the point nearest to the place that was drawn: fewer distinct boxes, the scan's last voxels in
    fewer of them, and about 1.7 times the boxes a second.

    Args:
        cases: Cases of the store, not empty; only shapes, spacings and bodies are read.
        config: Extent of the box in mm.
        order: Which case the sample is of; its seed draws the box too.
        index: As in ``CaseOrder.case_at``.
        skip: As in ``CaseOrder.case_at``.
    """
    case = order.case_at(index, skip=skip)
    record = cases[case]
    z, y, x = (
        min(max(round(extent / spacing), 1), size)
        for extent, spacing, size in zip(
            config.extent_mm_zyx, record.spacing_mm, record.shape_zyx, strict=True
        )
    )
    first, end = (
        [0, 0, 0],
        [s - box + 1 for s, box in zip(record.shape_zyx, (z, y, x), strict=True)],
    )
    if config.center_in_body:
        for axis, box in enumerate((z, y, x)):
            low, high = (int(body[axis]) - box // 2 for body in record.body_zyx)
            first[axis] = min(max(low, 0), end[axis] - 1)
            end[axis] = max(min(high, end[axis]), first[axis] + 1)
    lo_z, lo_y, lo_x = map(int, generator(order.seed, Stream.BOX, index).integers(first, end))
    lo_zyx = (lo_z, lo_y, lo_x)
    if config.snap_to_blocks:
        lo_zyx = snap_to_blocks(lo_zyx, (z, y, x), record.shape_zyx)
    return Crop(case, lo_zyx, (z, y, x))

"""Boxes of the store as torch tensors in memory that is used again for every batch.

Shape suffixes: B boxes, Z Y X voxels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tapct_fast.config import HuConfig, Zyx
from tapct_fast.io.store import Store


class BoxBatch:
    """A batch of one size, filled in place; pinned where there is CUDA, for copies beside work.

    Args:
        store: Where the boxes come from.
        num: Boxes of a batch.
        shape_zyx: Voxels of a box.
        normalise: Clip and z-score so and return bfloat16; None returns HU as int16.
        threads: See ``Store.read_boxes``.
    """

    def __init__(
        self,
        store: Store,
        num: int,
        shape_zyx: Zyx,
        *,
        normalise: HuConfig | None = None,
        threads: int | None = None,
    ) -> None:
        self._store = store
        self._shape_zyx = shape_zyx
        self._normalise = normalise
        self._threads = threads
        self._boxes_BZYX = torch.empty(
            (num, *shape_zyx),
            dtype=torch.int16 if normalise is None else torch.bfloat16,
            pin_memory=torch.cuda.is_available(),
        )
        stored = torch.int16 if normalise is None else torch.uint16
        self._out_BZYX = self._boxes_BZYX.view(stored).numpy()

    def read(
        self, cases: Sequence[int], lo_Bzyx: Sequence[Sequence[int]], *, snap: bool = False
    ) -> Tensor:
        """Fill the batch and return it; the next call overwrites it.

        Raises:
            StoreError: See ``Store.read_boxes``.
        """
        self._store.read_boxes(
            cases,
            lo_Bzyx,
            self._shape_zyx,
            out=self._out_BZYX,
            normalise=self._normalise,
            threads=self._threads,
            snap=snap,
        )
        return self._boxes_BZYX

"""Which box of which case a training sample is, as a pure function of (seed, sample index).

An epoch visits every case once, in an order of its own. The box has a size in millimetres, so that
scans of any spacing show as much anatomy; along an axis where the scan is shorter the box spans it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tapct_fast.config import CropConfig, Zyx
from tapct_fast.data.rng import Stream, generator
from tapct_fast.io.store import CaseRecord


class Crop(NamedTuple):
    """One box: position of the case in the store, first voxel, size in voxels (z, y, x)."""

    case: int
    lo_zyx: Zyx
    shape_zyx: Zyx


def crop_at(cases: Sequence[CaseRecord], config: CropConfig, *, seed: int, index: int) -> Crop:
    """Return the box of global sample ``index``; boxes are uniform over positions inside the scan.

    Args:
        cases: Cases of the store, not empty; only shapes and spacings are read.
        config: Extent of the box in mm.
        seed: Seed of the run.
        index: Global sample index, counted over all steps of the run.
    """
    epoch, position = divmod(index, len(cases))
    case = int(generator(seed, Stream.CASE_ORDER, epoch).permutation(len(cases))[position])
    record = cases[case]
    z, y, x = (
        min(max(round(extent / spacing), 1), size)
        for extent, spacing, size in zip(
            config.extent_mm_zyx, record.spacing_mm, record.shape_zyx, strict=True
        )
    )
    room = [size - box + 1 for size, box in zip(record.shape_zyx, (z, y, x), strict=True)]
    lo_z, lo_y, lo_x = map(int, generator(seed, Stream.BOX, index).integers(room))
    return Crop(case, (lo_z, lo_y, lo_x), (z, y, x))

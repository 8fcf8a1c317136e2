"""Where in a scan the patient is, coarsely: crops should not be spent on the air around.

Shape suffixes: Z Y X voxels.
"""

import numpy as np
from numpy.typing import NDArray

Zyx = tuple[int, int, int]

_STEP_ZYX = (2, 4, 4)  # every 32nd voxel says enough, in a few milliseconds
_TISSUE_HU = -500  # between lung and fat; a lung's walls count, its air does not
_SHARE = 0.1  # of the fullest plane's tissue: less is a limb, the table or a cable


def body_box(hu_ZYX: NDArray[np.int16]) -> tuple[Zyx, Zyx]:
    """Return first voxel and end of the box along each axis that holds the patient.

    A plane belongs to it if it has at least a tenth of the tissue of the fullest plane, and so does
    what lies between two such planes. Without any tissue the box is the whole scan.
    """
    tissue_ZYX = hu_ZYX[tuple(slice(None, None, step) for step in _STEP_ZYX)] > _TISSUE_HU
    ends = []
    for axis, (step, size) in enumerate(zip(_STEP_ZYX, hu_ZYX.shape, strict=True)):
        others = tuple(other for other in range(3) if other != axis)
        count_N = tissue_ZYX.sum(axis=others)
        full = np.flatnonzero((count_N > 0) & (count_N >= _SHARE * count_N.max()))
        ends.append((full[0] * step, min((full[-1] + 1) * step, size)) if len(full) else (0, size))
    (z0, z1), (y0, y1), (x0, x1) = ((int(first), int(end)) for first, end in ends)
    return (z0, y0, x0), (z1, y1, x1)

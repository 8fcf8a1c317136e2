"""What the tests of a view know of their body, and where a browser would put it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.io.volume import Volume

# World millimetres (RAS) of a bone cube: to the left, in front, near the head.
LANDMARK_MM = (-44.0, 36.0, 41.0)
NAME = "DOE_JANE_19700101"  # stands for a patient's name in a path


class Body(NamedTuple):
    scan: Path
    labels: Path
    volume: Volume
    labels_volume: Volume
    file_ijk: NDArray[np.float64]  # the file's own array
    file_affine: NDArray[np.float64]

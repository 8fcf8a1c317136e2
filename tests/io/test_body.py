import numpy as np
import pytest

from tapct_fast.data.phantom import make_phantom
from tapct_fast.io.body import body_box


def test_the_box_holds_the_body_to_within_the_sampling_step() -> None:
    hu_ZYX = np.full((40, 100, 120), -1000, dtype=np.int16)
    hu_ZYX[6:30, 20:72, 32:100] = 40
    assert body_box(hu_ZYX) == ((6, 20, 32), (30, 72, 100))


def test_a_thin_table_and_a_cable_are_not_the_body() -> None:
    hu_ZYX = np.full((40, 100, 120), -1000, dtype=np.int16)
    hu_ZYX[6:30, 20:72, 32:100] = 40
    hu_ZYX[:, 88, 56:60] = 300
    assert body_box(hu_ZYX) == ((6, 20, 32), (30, 72, 100))


@pytest.mark.parametrize("shape_zyx", [(1, 1, 1), (3, 50, 7)])
def test_without_tissue_the_box_is_the_whole_scan(shape_zyx: tuple[int, int, int]) -> None:
    assert body_box(np.full(shape_zyx, -1000, dtype=np.int16)) == ((0, 0, 0), shape_zyx)


def test_one_slice_of_tissue_is_a_box() -> None:
    assert body_box(np.zeros((1, 5, 6), dtype=np.int16)) == ((0, 0, 0), (1, 5, 6))


def test_a_phantom_lies_in_its_box() -> None:
    hu_ZYX = make_phantom(0, 0).volume.hu_ZYX
    lo, hi = body_box(hu_ZYX)
    box = tuple(slice(first, end) for first, end in zip(lo, hi, strict=True))
    tissue_ZYX = hu_ZYX > -500
    assert tissue_ZYX[box].sum() > 0.97 * tissue_ZYX.sum()
    assert (hi[1] - lo[1]) < hu_ZYX.shape[1]

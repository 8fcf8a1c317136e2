from collections import Counter
from collections.abc import Sequence
from itertools import permutations

import numpy as np

from tapct_fast.config import CropConfig
from tapct_fast.data.crops import CaseOrder, Crop, crop_at
from tapct_fast.data.rng import Stream, generator
from tapct_fast.io.store_index import CaseRecord

CONFIG = CropConfig(extent_mm_zyx=(60.0, 200.0, 180.0), center_in_body=False)


def case(
    shape_zyx: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    body_zyx: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None,
) -> CaseRecord:
    body = body_zyx or ((0, 0, 0), shape_zyx)
    return CaseRecord("case-0", "cases/case-0.b2nd", shape_zyx, spacing_mm, body, (0.0,) * 16, b"")


def draw(cases: Sequence[CaseRecord], config: CropConfig, *, seed: int, index: int) -> Crop:
    return crop_at(cases, config, CaseOrder(len(cases), seed=seed), index=index)


CASES = [
    case((100, 400, 380), (1.5, 0.8, 0.75)),
    case((30, 512, 512), (5.0, 0.5, 0.5)),
    case((1, 64, 700), (3.0, 4.0, 0.25)),
    case((12, 20, 20), (100.0, 500.0, 500.0)),  # one voxel is longer than the box
]


def test_an_epoch_visits_every_case_once_in_an_order_of_its_own() -> None:
    cases = CASES * 5
    orders = [
        [draw(cases, CONFIG, seed=0, index=e * len(cases) + i).case for i in range(len(cases))]
        for e in range(4)
    ]
    assert all(sorted(order) == list(range(len(cases))) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    other_seed = [draw(cases, CONFIG, seed=1, index=i).case for i in range(len(cases))]
    assert other_seed != orders[0]


def test_every_order_of_an_epoch_is_equally_likely() -> None:
    order = CaseOrder(4, seed=7)
    seen = Counter(tuple(order.case_at(4 * epoch + i) for i in range(4)) for epoch in range(4800))
    assert set(seen) == set(permutations(range(4)))
    chi2 = sum((count - 200) ** 2 for count in seen.values()) / 200
    assert chi2 < 49.7  # the 0.999 quantile with 23 degrees of freedom


def test_the_case_of_a_sample_does_not_depend_on_what_was_asked_before() -> None:
    order = CaseOrder(1000, seed=3)
    expected = np.concatenate(
        [generator(3, Stream.CASE_ORDER, epoch).permutation(1000) for epoch in range(5)]
    )
    for index in np.random.default_rng(0).integers(0, 5000, 300):
        assert order.case_at(int(index)) == expected[index]
    assert order.case_at(999, skip=2) == expected[1]  # round to the start of the epoch


def test_boxes_have_the_configured_size_in_mm_or_span_the_scan() -> None:
    expected = {0: (40, 250, 240), 1: (12, 400, 360), 2: (1, 50, 700), 3: (1, 1, 1)}
    for index in range(8):
        crop = draw(CASES, CONFIG, seed=0, index=index)
        assert crop.shape_zyx == expected[crop.case]


def test_boxes_lie_inside_the_scan_and_reach_both_ends() -> None:
    seen: dict[int, list[Crop]] = {i: [] for i in range(len(CASES))}
    for index in range(4000):
        crop = draw(CASES, CONFIG, seed=3, index=index)
        seen[crop.case].append(crop)
    for i, crops in seen.items():
        lo = np.array([crop.lo_zyx for crop in crops])
        last = np.array(CASES[i].shape_zyx) - crops[0].shape_zyx
        assert (lo >= 0).all()
        assert (lo <= last).all()
        assert (lo.min(0) <= last * 0.02).all()
        assert (lo.max(0) >= last * 0.98).all()


def test_every_position_is_equally_likely() -> None:
    cases = [case((10, 10, 10), (1.0, 1.0, 1.0))]
    config = CropConfig(extent_mm_zyx=(3.0, 10.0, 1.0), center_in_body=False)
    crops = [draw(cases, config, seed=0, index=index) for index in range(8000)]
    for axis, positions in enumerate([8, 1, 10]):
        counts = np.array(list(Counter(crop.lo_zyx[axis] for crop in crops).values()))
        assert len(counts) == positions
        chi2 = ((counts - 8000 / positions) ** 2).sum() / (8000 / positions)
        assert chi2 < 27.9  # the 0.999 quantile with 9 degrees of freedom


def test_a_crop_is_a_function_of_seed_and_index_alone() -> None:
    forward = [draw(CASES, CONFIG, seed=5, index=i) for i in range(20)]
    backward = [draw(CASES, CONFIG, seed=5, index=i) for i in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward[:3] == [
        Crop(1, (7, 67, 17), (12, 400, 360)),
        Crop(2, (0, 7, 0), (1, 50, 700)),
        Crop(3, (2, 6, 8), (1, 1, 1)),
    ]


def test_boxes_are_centred_in_the_body_and_reach_both_of_its_ends() -> None:
    body = (20, 90, 0), (60, 310, 380)
    cases = [case((100, 400, 380), (1.5, 0.8, 0.75), body)]
    config = CropConfig(extent_mm_zyx=(60.0, 200.0, 180.0))
    crops = [draw(cases, config, seed=0, index=index) for index in range(4000)]
    lo = np.array([crop.lo_zyx for crop in crops])
    assert crops[0].shape_zyx == (40, 250, 240)
    # Centre in the body, as far as the box stays inside the scan: 20 - 20 .. 59 - 20 and so on.
    assert lo.min(0).tolist() == [0, 0, 0]
    assert lo.max(0).tolist() == [39, 150, 140]
    counts = Counter(lo[:, 0].tolist())
    assert set(counts) == set(range(40))
    assert max(counts.values()) < 100 + 5 * 10  # uniform: 100 each


def test_a_body_at_the_edge_gives_the_nearest_box_inside_the_scan() -> None:
    cases = [case((100, 400, 380), (1.5, 0.8, 0.75), ((96, 0, 0), (100, 10, 4)))]
    config = CropConfig(extent_mm_zyx=(60.0, 200.0, 180.0))
    for index in range(20):
        assert draw(cases, config, seed=0, index=index).lo_zyx == (60, 0, 0)

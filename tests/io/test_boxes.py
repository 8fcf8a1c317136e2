"""Boxes, alone and in batches, at any place and on the store's grid of blocks."""

import dataclasses

import numpy as np
import pytest
import torch

from tapct_fast.config import CropConfig, HuConfig
from tapct_fast.data.boxes import BoxBatch
from tapct_fast.data.crops import CaseOrder, crop_at
from tapct_fast.errors import StoreError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack
from tapct_fast.io.store import BLOCK_ZYX, Store, snap_to_blocks

SHAPE_ZYX = (21, 150, 200)
CROPS = CropConfig(extent_mm_zyx=(25.0, 49.0, 56.0))  # 10 x 70 x 70 voxels


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("boxes")
    for seed in range(2):
        hu_ZYX = np.random.default_rng(seed).integers(-1000, 1000, SHAPE_ZYX).astype(np.int16)
        write_nifti(folder / f"{seed}.nii", hu_ZYX, np.diag([-0.8, -0.7, 2.5, 1.0]))
    pack([folder], folder / "store")
    return Store.open(folder / "store")


def test_any_box_equals_the_slice_of_the_whole(store: Store) -> None:
    whole_ZYX = store.read_volume(0).hu_ZYX
    rng = np.random.default_rng(0)
    for _ in range(40):
        lo = [int(rng.integers(0, n)) for n in SHAPE_ZYX]
        shape = [
            int(rng.integers(1, n - start + 1)) for n, start in zip(SHAPE_ZYX, lo, strict=True)
        ]
        box = tuple(slice(start, start + n) for start, n in zip(lo, shape, strict=True))
        np.testing.assert_array_equal(store.read_box(0, lo, shape), whole_ZYX[box])


def test_boxes_outside_the_volume_are_errors(store: Store) -> None:
    for lo, shape in [((-1, 0, 0), (2, 2, 2)), ((0, 0, 199), (1, 1, 2)), ((0, 0, 0), (0, 1, 1))]:
        with pytest.raises(StoreError, match=r"exceeds case-.*clip the box"):
            store.read_box(0, lo, shape)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_batch_equals_its_boxes_raw_and_normalised(store: Store, mmap: bool) -> None:
    store = Store.open(store.directory, mmap=mmap)
    rng = np.random.default_rng(1)
    shape_zyx = (7, 70, 90)
    cases = rng.integers(0, 2, 24)
    lo = rng.integers(0, np.array(SHAPE_ZYX) - shape_zyx + 1, (24, 3))
    volumes = [store.read_volume(case).hu_ZYX for case in range(2)]
    expected = np.stack(
        [
            volumes[c][z : z + 7, y : y + 70, x : x + 90]
            for c, (z, y, x) in zip(cases, lo, strict=True)
        ]
    )
    for threads in (1, 4):
        np.testing.assert_array_equal(
            store.read_boxes(cases, lo, shape_zyx, threads=threads), expected
        )
    hu = HuConfig()
    clipped = torch.from_numpy(expected).float().clamp(*hu.clip)
    reference = ((clipped - hu.mean) / hu.std).bfloat16()
    batch = BoxBatch(store, 24, shape_zyx, normalise=hu, threads=2)
    assert torch.equal(batch.read(cases.tolist(), lo.tolist()), reference)
    assert batch.read(cases.tolist(), lo.tolist()).data_ptr() == batch._boxes_BZYX.data_ptr()
    snapped = np.array([snap_to_blocks(row, shape_zyx, SHAPE_ZYX) for row in lo.tolist()])
    assert (snapped % BLOCK_ZYX == 0).all()
    assert (snapped + shape_zyx <= SHAPE_ZYX).all()
    np.testing.assert_array_equal(
        store.read_boxes(cases, lo, shape_zyx, snap=True),
        store.read_boxes(cases, snapped, shape_zyx),
    )


def test_snapped_crops_are_the_nearest_on_the_grid_and_no_other_thing_changes(store: Store) -> None:
    snapping = dataclasses.replace(CROPS, snap_to_blocks=True)
    corners = set()
    order = CaseOrder(len(store.cases), seed=3)
    for index in range(200):
        free = crop_at(store.cases, CROPS, order, index=index)
        snapped = crop_at(store.cases, snapping, order, index=index)
        assert (snapped.case, snapped.shape_zyx) == (free.case, (10, 70, 70))
        assert free.shape_zyx == (10, 70, 70)
        axes = zip(snapped.lo_zyx, free.lo_zyx, free.shape_zyx, SHAPE_ZYX, BLOCK_ZYX, strict=True)
        for lo, drawn, size, whole, block in axes:
            on_grid = np.arange(0, whole - size + 1, block)
            assert lo in on_grid
            assert abs(lo - drawn) == np.abs(on_grid - drawn).min()
        corners.add(snapped.lo_zyx)
    assert len(corners) == 3 * 2 * 3  # all there are: z 0, 4, 8; y 0, 64; x 0, 64, 128


@pytest.mark.parametrize("whole", [3, 4, 5])
def test_a_box_of_the_whole_axis_snaps_to_its_start(whole: int) -> None:
    assert snap_to_blocks((0, 0, 0), (whole, 60, 60), (whole, 60, 60)) == (0, 0, 0)


def test_a_batch_reads_the_crops_where_crop_at_says(store: Store) -> None:
    wholes = [torch.from_numpy(store.read_volume(case).hu_ZYX) for case in range(2)]
    config = dataclasses.replace(CROPS, snap_to_blocks=True)
    order = CaseOrder(len(store.cases), seed=0)
    crops = [crop_at(store.cases, config, order, index=i) for i in range(6)]
    normalise = HuConfig()
    batch = BoxBatch(store, len(crops), crops[0].shape_zyx, normalise=normalise, threads=2)
    boxes_BZYX = batch.read([c.case for c in crops], [c.lo_zyx for c in crops])
    for crop, box_ZYX in zip(crops, boxes_BZYX, strict=True):
        z, y, x = (slice(lo, lo + n) for lo, n in zip(crop.lo_zyx, crop.shape_zyx, strict=True))
        values = wholes[crop.case][z, y, x].float().clamp(*normalise.clip)
        expected = ((values - normalise.mean) / normalise.std).bfloat16()
        assert torch.equal(box_ZYX, expected)
    free = [crop_at(store.cases, CROPS, order, index=i).lo_zyx for i in range(6)]
    snapped_BZYX = batch.read([c.case for c in crops], free, snap=True)
    assert torch.equal(snapped_BZYX, boxes_BZYX)

"""Shape suffixes: V views, B samples, N = V * B global views, L tokens, M masked tokens."""

import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tapct_fast.config import (
    Config,
    CropConfig,
    MaskConfig,
    TrainConfig,
    ViewGroupConfig,
    ViewsConfig,
    VitConfig,
)
from tapct_fast.data.crops import CaseOrder, crop_at
from tapct_fast.data.masks import masked_counts
from tapct_fast.data.pipeline import ViewBatch, ViewPipeline
from tapct_fast.data.reference import render
from tapct_fast.data.rng import Stream, generator
from tapct_fast.data.samples import Sample, Samples
from tapct_fast.data.views import draw_views
from tapct_fast.errors import ConfigError, StoreError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack
from tapct_fast.io.store import Store

CONFIG = Config(
    crops=CropConfig(extent_mm_zyx=(50.0, 60.0, 60.0)),
    views=ViewsConfig(
        global_views=ViewGroupConfig(
            num=2, size_zyx=(8, 32, 32), in_plane_scale=(0.3, 1.0), depth_scale=(0.5, 1.0)
        ),
        local_views=ViewGroupConfig(
            num=3, size_zyx=(4, 16, 16), in_plane_scale=(0.05, 0.3), depth_scale=(0.2, 0.5)
        ),
    ),
    masks=MaskConfig(prob=0.5, ratio=(0.1, 0.5)),
    vit=VitConfig(dim=64, depth=1, image_zyx=(8, 32, 32)),
    train=TrainConfig(num_steps=6, batch_size=4, group_size=2, accumulate=2, seed=11),
)


def with_train(**changes: float) -> Config:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **changes))


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Balls of soft tissue in air, with noise; three shapes and spacings."""
    folder = tmp_path_factory.mktemp("scans")
    cases = [((20, 60, 70), (5.0, 1.0, 1.0)), ((64, 40, 40), (1.0, 2.0, 2.0))]
    cases += [((9, 90, 80), (3.0, 0.5, 0.5)), ((3, 30, 30), (5.0, 5.0, 5.0))]
    for i, (shape, spacing) in enumerate(cases):
        z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        tissue = np.where(z**2 + y**2 + x**2 < 0.9, 40.0 + 200 * z, -1000.0)
        hu = tissue + generator(i).normal(0, 20, shape)
        affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
        write_nifti(folder / f"scan{i}.nii.gz", hu.astype(np.int16), affine)
    return folder


@pytest.fixture(scope="module")
def store(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory = tmp_path_factory.mktemp("store")
    assert pack([scans], directory).packed == 4
    return Store.open(directory)


@pytest.fixture
def pipeline(store: Store) -> ViewPipeline:
    return ViewPipeline(store, CONFIG, device="cpu")


def assert_same(a: ViewBatch, b: ViewBatch) -> None:
    for name in ViewBatch._fields:
        left, right = getattr(a, name), getattr(b, name)
        assert left == right if name == "num_samples" else torch.equal(left, right), name


def view_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("views")]


def test_a_batch_holds_the_views_of_the_samples_it_should(
    pipeline: ViewPipeline, store: Store
) -> None:
    batch = pipeline.batch_at(step=3, micro=1)
    assert batch.num_samples == 2
    assert batch.global_VBZYX.shape == (2, 2, 8, 32, 32)
    assert batch.local_VBZYX.shape == (3, 2, 4, 16, 16)
    assert batch.global_VBZYX.dtype == batch.local_VBZYX.dtype == torch.float32
    # The run is that of the scans, whatever their random ids: cases count in order of content.
    order = sorted(range(4), key=lambda i: store.cases[i].crc32s)
    cases = [store.cases[i] for i in order]
    for b, index in enumerate([3 * 4 + 2, 3 * 4 + 3]):
        crop = crop_at(cases, CONFIG.crops, CaseOrder(len(cases), seed=11), index=index)
        hu = store.read_volume(order[crop.case]).hu_ZYX
        z, y, x = crop.lo_zyx
        depth, height, width = crop.shape_zyx
        box_ZYX = torch.from_numpy(hu[z : z + depth, y : y + height, x : x + width].copy())
        groups = [CONFIG.views.global_views, CONFIG.views.local_views]
        for number, views in enumerate([batch.global_VBZYX, batch.local_VBZYX]):
            table = draw_views(
                CONFIG.views,
                groups[number],
                CONFIG.hu,
                crop.shape_zyx,
                spacing_mm=cases[crop.case].spacing_mm,
                rng=generator(11, Stream.VIEWS, index, number),
            )
            expected = render(box_ZYX, table, groups[number], CONFIG.hu)
            # From the part that is seen, by the native renderer.
            torch.testing.assert_close(views[:, b], expected, atol=1e-5, rtol=0)


def test_views_are_finite_and_differ_from_one_another(pipeline: ViewPipeline) -> None:
    views = [
        view
        for step in range(6)
        for micro in range(2)
        for view in pipeline.batch_at(step, micro).global_VBZYX.flatten(0, 1)
    ]
    assert all(torch.isfinite(view).all() for view in views)
    assert all(view.std() > 0 for view in views)
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_masked_tokens_are_listed_ascending_with_one_over_their_number(
    pipeline: ViewPipeline,
) -> None:
    total = sum(masked_counts(CONFIG.masks, 4, 2 * 4 * 4))
    for step in range(12):
        batch = pipeline.batch_at(step, 0)
        mask_NL = batch.mask_NL.numpy()
        assert mask_NL.shape == (4, 32)
        index_M, weight_M = batch.masked_index_M.numpy(), batch.masked_weight_M.numpy()
        assert index_M.dtype == np.int64
        assert weight_M.dtype == np.float32
        assert index_M.tolist() == [i for i, m in enumerate(mask_NL.ravel()) if m]
        assert len(index_M) == total  # a constant of the run
        image_M = index_M // 32
        np.testing.assert_allclose(weight_M, 1 / mask_NL.sum(1)[image_M], rtol=1e-6)
    assert len({pipeline.batch_at(s, 0).mask_NL.numpy().tobytes() for s in range(5)}) == 5


def test_a_run_without_masks_lists_none(store: Store) -> None:
    config = dataclasses.replace(CONFIG, masks=MaskConfig(prob=0.0))
    batch = ViewPipeline(store, config, device="cpu").batch_at(0, 0)
    assert not batch.mask_NL.any()
    assert batch.masked_index_M.shape == batch.masked_weight_M.shape == (0,)


def test_a_batch_is_a_function_of_seed_step_and_micro_alone(store: Store) -> None:
    first, second = (ViewPipeline(store, CONFIG, device="cpu") for _ in range(2))
    ahead = second.batch_at(5, 1)
    assert_same(second.batch_at(2, 1), first.batch_at(2, 1))
    assert_same(first.batch_at(5, 1), ahead)
    other = ViewPipeline(store, with_train(seed=12), device="cpu").batch_at(2, 1)
    assert not torch.equal(other.global_VBZYX, first.batch_at(2, 1).global_VBZYX)


@pytest.mark.parametrize(("accumulate", "world_size"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_groups_are_the_same_whatever_micro_batch_and_process_they_fall_into(
    store: Store, accumulate: int, world_size: int
) -> None:
    groups_of_one = with_train(group_size=1, accumulate=1)
    whole = ViewPipeline(store, groups_of_one, device="cpu").batch_at(4, 0)
    config = with_train(group_size=1, accumulate=accumulate)
    parts = [
        pipeline.batch_at(4, micro)
        for rank in range(world_size)
        for pipeline in [
            ViewPipeline(store, config, device="cpu", rank=rank, world_size=world_size)
        ]
        for micro in range(accumulate)
    ]
    for name in ("global_VBZYX", "local_VBZYX"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined, getattr(whole, name))
    masks = [part.mask_NL.unflatten(0, (2, -1)) for part in parts]
    assert torch.equal(torch.cat(masks, dim=1).flatten(0, 1), whole.mask_NL)
    for batch in (*parts, whole):
        hidden = torch.zeros_like(batch.mask_NL).flatten()
        hidden[batch.masked_index_M] = True
        assert torch.equal(hidden.view_as(batch.mask_NL), batch.mask_NL)
        view_M = batch.masked_index_M // batch.mask_NL.shape[1]
        torch.testing.assert_close(batch.masked_weight_M, 1 / batch.mask_NL.sum(1)[view_M].float())


def test_groups_that_cannot_be_dealt_out_are_refused_with_the_numbers_that_can(
    store: Store,
) -> None:
    config = with_train(batch_size=24, group_size=2, accumulate=2)
    with pytest.raises(ConfigError, match=r"4 processes cannot share.* can: 1, 2, 3, 6"):
        ViewPipeline(store, config, device="cpu", world_size=4)


def test_the_same_scans_packed_again_give_the_same_batches(
    scans: Path, pipeline: ViewPipeline, tmp_path: Path
) -> None:
    pack([scans], tmp_path / "again")
    again = ViewPipeline(Store.open(tmp_path / "again"), CONFIG, device="cpu")
    for step in range(3):
        assert_same(again.batch_at(step, 0), pipeline.batch_at(step, 0))


def test_the_stream_gives_every_batch_from_its_start_to_the_end(pipeline: ViewPipeline) -> None:
    places = [(step, micro) for step in range(4, 6) for micro in range(2)]
    streamed = list(pipeline.stream(4, 6))
    assert len(streamed) == len(places)
    for (batch, wait_seconds), place in zip(streamed, places, strict=True):
        assert_same(batch, pipeline.batch_at(*place))
        assert wait_seconds >= 0
    assert list(pipeline.stream(6, 6)) == []
    assert view_threads() == []


def test_the_stream_prepares_two_batches_ahead_and_no_more(
    pipeline: ViewPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    arrived = threading.Semaphore(0)
    load = Samples.load

    def recorded(samples: Samples, index: int) -> tuple[Sample, NDArray[np.int16]]:
        loaded = load(samples, index)
        read.append(index)
        arrived.release()
        return loaded

    monkeypatch.setattr(Samples, "load", recorded)
    stream = pipeline.stream(0, 6)
    next(stream)
    for _ in range(3 * 2):
        assert arrived.acquire(timeout=30)
    assert not arrived.acquire(timeout=0.2)
    assert sorted(read) == list(range(6))
    stream.close()


def test_closing_the_stream_ends_its_threads_and_leaves_torch_alone(store: Store) -> None:
    threads = torch.get_num_threads()
    stream = ViewPipeline(store, with_train(num_workers=3), device="cpu").stream(0, 6)
    next(stream)
    assert len(view_threads()) == 1 + 3
    stream.close()
    assert view_threads() == []
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("renderer", ["torch", "native", "dali"])
def test_the_number_of_workers_does_not_change_a_bit(store: Store, renderer: str) -> None:
    if renderer == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed: the dali extra")

    def run(num_workers: int) -> list[ViewBatch]:
        config = with_train(num_workers=num_workers)
        config = dataclasses.replace(
            config, views=dataclasses.replace(config.views, renderer=renderer)
        )
        pipeline = ViewPipeline(store, config, device="cpu")
        assert pipeline.renderer == renderer
        return [batch for batch, _ in pipeline.stream(4, 6)]

    for one, three in zip(run(1), run(3), strict=True):
        assert_same(one, three)


def test_renderers_give_the_same_views(store: Store) -> None:
    def batch(renderer: str) -> ViewBatch:
        views = dataclasses.replace(CONFIG.views, renderer=renderer)
        pipeline = ViewPipeline(store, dataclasses.replace(CONFIG, views=views), device="cpu")
        return pipeline.batch_at(1, 0)

    pytest.importorskip("nvidia.dali", reason="DALI is not installed: the dali extra")
    expected = batch("torch")
    for renderer in ("native", "dali"):
        for name in ("global_VBZYX", "local_VBZYX"):
            error = (getattr(batch(renderer), name) - getattr(expected, name)).abs()
            assert error.max() <= 1e-3
            assert error.mean() <= 1e-5


def damage(store: Store, case: int) -> None:
    path = store.directory / store.cases[case].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_a_store_full_of_damage_stops_the_stream(scans: Path, tmp_path: Path) -> None:
    pack([scans], tmp_path / "store")
    store = Store.open(tmp_path / "store")
    for case in range(len(store.cases)):
        damage(store, case)
    stream = ViewPipeline(store, CONFIG, device="cpu").stream(0, 6)
    with pytest.raises(StoreError, match=r"2 of 4 cases are damaged.*case-"):
        list(stream)
    assert view_threads() == []


def test_a_read_that_hangs_is_done_again_and_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_train(read_timeout=0.5, num_workers=2)
    expected = [batch for batch, _ in ViewPipeline(store, config, device="cpu").stream(4, 6)]
    hang, hung = threading.Event(), threading.Semaphore(2)
    load = Samples.load

    def stuck(samples: Samples, index: int) -> tuple[Sample, NDArray[np.int16]]:
        if index in (17, 22) and hung.acquire(blocking=False):
            hang.wait()
        return load(samples, index)

    monkeypatch.setattr(Samples, "load", stuck)
    monkeypatch.setattr("tapct_fast.data.workers._LAST_SECONDS", 0.2)
    try:
        start = time.monotonic()
        batches = [batch for batch, _ in ViewPipeline(store, config, device="cpu").stream(4, 6)]
        assert time.monotonic() - start < 10
    finally:
        hang.set()
    for batch, other in zip(batches, expected, strict=True):
        assert_same(batch, other)


def test_closing_does_not_wait_for_a_read_that_hangs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang, arrived = threading.Event(), threading.Event()
    load = Samples.load

    def stuck(samples: Samples, index: int) -> tuple[Sample, NDArray[np.int16]]:
        if index >= 4:
            arrived.set()
            hang.wait()
        return load(samples, index)

    monkeypatch.setattr(Samples, "load", stuck)
    monkeypatch.setattr("tapct_fast.data.workers._LAST_SECONDS", 0.2)
    stream = ViewPipeline(store, CONFIG, device="cpu").stream(0, 6)
    try:
        next(stream)
        assert arrived.wait(30)
        start = time.monotonic()
        stream.close()
        assert time.monotonic() - start < 5  # train.read_timeout is 60
    finally:
        hang.set()


def test_an_empty_store_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="pack scans"):
        ViewPipeline(Store(tmp_path, (), "lz4hc", ""), CONFIG, device="cpu")


def test_real_ct_becomes_views_in_the_range_of_the_contract(real_ct: Path, tmp_path: Path) -> None:
    assert pack([real_ct / "nifti" / "ts_ct_3mm_int32.nii.gz"], tmp_path).packed == 1
    views = dataclasses.replace(CONFIG.views, noise_prob=0.0)
    config = dataclasses.replace(CONFIG, views=views, crops=CropConfig())
    batch = ViewPipeline(Store.open(tmp_path), config, device="cpu").batch_at(0, 0)
    low, high = ((end - config.hu.mean) / config.hu.std for end in config.hu.clip)
    for view in [*batch.global_VBZYX.flatten(0, 1), *batch.local_VBZYX.flatten(0, 1)]:
        assert view.min() >= low - 1e-5
        assert view.max() <= high + 1e-5
    assert batch.global_VBZYX.std() > 0.3  # air and tissue: 0.3 is 97 HU

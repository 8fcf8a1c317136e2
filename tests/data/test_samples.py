"""Shape suffixes: V views, B samples, Z Y X voxels."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tapct_fast.config import Config, CropConfig, ViewGroupConfig, ViewsConfig
from tapct_fast.data.phantom import make_phantom
from tapct_fast.data.reference import render
from tapct_fast.data.samples import Sample, Samples
from tapct_fast.errors import StoreError, StoreReadError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack
from tapct_fast.io.store import Store

CONFIG = Config(
    crops=CropConfig(extent_mm_zyx=(60.0, 150.0, 150.0)),
    views=ViewsConfig(
        global_views=ViewGroupConfig(
            num=2, size_zyx=(8, 32, 32), in_plane_scale=(0.05, 0.3), depth_scale=(0.5, 1.0)
        ),
        local_views=ViewGroupConfig(
            num=2,
            size_zyx=(4, 16, 16),
            in_plane_scale=(0.02, 0.1),
            depth_scale=(0.1, 0.3),
            antialias=False,
        ),
    ),
)
NUM = 30  # cases


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for i in range(NUM):
        volume = make_phantom(5, i, shape_zyx=(24, 72, 72)).volume
        write_nifti(folder / f"{i}.nii.gz", volume.hu_ZYX, volume.affine)
    return folder


@pytest.fixture
def store(scans: Path, tmp_path: Path) -> Store:
    assert pack([scans], tmp_path / "store").packed == NUM
    return Store.open(tmp_path / "store")


def fingerprint(sample: Sample) -> bytes:
    """What was drawn for a sample; ids of cases are random per store, so their place counts."""
    arrays = [array.tobytes() for table in sample.tables for array in table]
    return repr((sample.number, sample.crop, sample.region)).encode() + b"".join(arrays)


def damage(store: Store, case: int) -> None:
    """Flip bytes all over a case: which one it is is random, and each region must meet one."""
    path = store.directory / store.cases[case].file
    data = bytearray(path.read_bytes())
    for part in range(1, 32):
        data[len(data) * part // 32] ^= 0xFF
    path.write_bytes(data)


def test_a_thousand_draws_are_the_same_resumed_resharded_and_reordered(store: Store) -> None:
    drawn = [fingerprint(Samples(store, CONFIG).draw(i)) for i in range(1000)]
    assert len(set(drawn)) == 1000
    resumed = Samples(Store.open(store.directory), CONFIG)
    assert [fingerprint(resumed.draw(i)) for i in range(617, 1000)] == drawn[617:]
    ranks = [Samples(store, CONFIG) for _ in range(3)]
    for rank, samples in enumerate(ranks):
        assert [fingerprint(samples.draw(i)) for i in range(rank, 1000, 3)] == drawn[rank::3]
    again = Samples(store, CONFIG)
    for i in np.random.default_rng(0).permutation(1000):
        assert fingerprint(again.draw(int(i))) == drawn[i]


def test_views_from_the_region_are_those_of_the_whole_crop(store: Store) -> None:
    samples = Samples(store, CONFIG)
    smaller = 0
    for index in range(12):
        sample, hu_ZYX = samples.load(index)
        assert hu_ZYX.shape == sample.region.shape_zyx
        smaller += sample.region.shape_zyx != sample.crop.shape_zyx
        crop = sample.crop
        whole_ZYX = store.read_box(crop.case, crop.lo_zyx, crop.shape_zyx)
        shift_3 = np.subtract(sample.region.lo_zyx, crop.lo_zyx).astype(np.float32)
        for group, table in zip(samples.groups, sample.tables, strict=True):
            in_crop = table._replace(lo_V3=table.lo_V3 + shift_3, hi_V3=table.hi_V3 + shift_3)
            expected = render(torch.from_numpy(whole_ZYX), in_crop, group, CONFIG.hu)
            views = render(torch.from_numpy(hu_ZYX), table, group, CONFIG.hu)
            torch.testing.assert_close(views, expected, atol=2e-5, rtol=0)
    assert smaller >= 10  # or this shows nothing


def test_damage_moves_on_to_the_next_case_and_is_told_once(store: Store) -> None:
    before = Samples(store, CONFIG)
    expected = [before.draw(i) for i in range(NUM)]  # every case once
    damage(store, expected[7].region.case)
    told: list[tuple[str, str]] = []
    samples = Samples(store, CONFIG, on_damage=lambda case, reason: told.append((case, reason)))
    loaded = [samples.load(i)[0] for i in range(2 * NUM)]
    assert [fingerprint(s) for i, s in enumerate(loaded[:NUM]) if i != 7] == [
        fingerprint(s) for i, s in enumerate(expected) if i != 7
    ]
    assert loaded[7].region.case == expected[8].region.case
    assert fingerprint(loaded[7]) != fingerprint(expected[8])  # its own draw of that case
    assert [case for case, _ in told] == [expected[7].record.case]
    assert expected[7].record.case in told[0][1]
    # Nothing is remembered: who starts in between gives the same samples.
    late = Samples(store, CONFIG)
    for i in range(7, 2 * NUM):
        assert fingerprint(late.load(i)[0]) == fingerprint(loaded[i])


def test_more_than_a_few_damaged_cases_stop_the_run(store: Store) -> None:
    for case in (3, 11):
        damage(store, case)
    samples = Samples(store, CONFIG)
    with pytest.raises(StoreError, match=r"2 of 30 cases are damaged.*case-.*pack"):
        list(map(samples.load, range(NUM)))


def test_a_read_that_fails_twice_gives_the_same_voxels(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapct_fast.data.samples._PAUSE_SECONDS", 0.01)
    expected = Samples(store, CONFIG).load(4)[1]
    failures = iter([True, True, False])
    read_box = Store.read_box

    def flaky(self: Store, *args: object) -> NDArray[np.int16]:
        if next(failures):
            raise StoreReadError("case-x: Input/output error")
        return read_box(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "read_box", flaky)
    assert np.array_equal(Samples(store, CONFIG).load(4)[1], expected)


def test_a_file_that_is_gone_stops_the_run_by_its_case(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapct_fast.data.samples._PAUSE_SECONDS", 0.01)
    samples = Samples(store, CONFIG)
    record = samples.draw(4).record
    (store.directory / record.file).unlink()
    with pytest.raises(StoreReadError, match=f"{record.case}.*check the disk") as caught:
        samples.load(4)
    assert str(store.directory) not in str(caught.value)


def test_the_config_decides_whether_the_region_is_all_of_the_crop(store: Store) -> None:
    whole = ViewGroupConfig(
        num=2, size_zyx=(8, 32, 32), in_plane_scale=(1.0, 1.0), depth_scale=(1.0, 1.0)
    )
    config = dataclasses.replace(
        CONFIG,
        views=dataclasses.replace(CONFIG.views, global_views=whole, local_views=whole),
    )
    sample = Samples(store, config).draw(0)
    assert sample.region == sample.crop

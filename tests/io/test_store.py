"""The store returns what was packed, bit for bit, or says what is damaged.

Shape suffixes: Z Y X voxels.
"""

import dataclasses
import hashlib
import json
import pickle
import shutil
import stat
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import numpy.typing as npt
import pytest

from tapct_fast import _native
from tapct_fast.errors import InputError, StoreError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import HU_RANGE, PackReport, _locked, locate, pack
from tapct_fast.io.read import read_volume
from tapct_fast.io.store import Store
from tapct_fast.io.store_index import CaseRecord

AFFINE = np.diag([-0.8, -0.7, 2.5, 1.0])
SHAPE_ZYX = (19, 150, 140)  # two chunks per axis, both ragged


def scan(seed: int, shape_zyx: tuple[int, int, int] = SHAPE_ZYX) -> npt.NDArray[np.int16]:
    z, y, x = np.indices(shape_zyx)
    hu = 1500 * np.sin(z / 5 + seed) * np.cos(y / 17) + 900 * np.sin(x / 11) - 300
    noise = np.random.default_rng(seed).normal(0, 20, shape_zyx)
    return (hu + noise).astype(np.int16)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for seed in range(2):
        write_nifti(folder / f"DOE^JOHN_{seed}.nii", scan(seed), AFFINE)
    return folder


@pytest.fixture(scope="module")
def packed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store; tests that change it copy it."""
    directory = tmp_path_factory.mktemp("packed") / "store"
    assert pack([sources], directory) == PackReport(packed=2, skipped=0, quarantined=0)
    return directory


@pytest.fixture
def store_copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.mark.parametrize("codec", ["lz4hc", "zstd"])
def test_a_packed_scan_comes_back_bit_for_bit(sources: Path, tmp_path: Path, codec: str) -> None:
    pack([sources], tmp_path / "store", codec=codec)  # type: ignore[arg-type]
    store = Store.open(tmp_path / "store")
    assert store.codec == codec
    assert len(store.cases) == 2
    for case, record in enumerate(store.cases):
        volume = store.read_volume(case)
        source = read_volume(locate(store.directory, record.case, [sources]))
        np.testing.assert_array_equal(volume.hu_ZYX, np.clip(source.hu_ZYX, *HU_RANGE))
        np.testing.assert_array_equal(volume.affine, source.affine)
        assert volume.spacing_mm == source.spacing_mm == record.spacing_mm
        assert record.shape_zyx == SHAPE_ZYX


def test_values_are_clipped_to_the_stores_range(tmp_path: Path) -> None:
    hu_ZYX = scan(0, (4, 20, 20))
    hu_ZYX[0, 0, :3] = (-3024, 4000, -1025)
    write_nifti(tmp_path / "scan.nii", hu_ZYX, AFFINE)
    pack([tmp_path / "scan.nii"], tmp_path / "store")
    volume = Store.open(tmp_path / "store").read_volume(0)
    assert volume.hu_ZYX[0, 0, :3].tolist() == [-1024, 3071, -1024]


def test_another_blosc2_reader_opens_the_volumes(packed: Path) -> None:
    store = Store.open(packed)
    array = blosc2.open(str(packed / store.cases[1].file), mode="r")
    np.testing.assert_array_equal(array[:], store.read_volume(1).hu_ZYX)
    assert array.chunks == (16, 128, 128)
    assert array.blocks == (4, 64, 64)


def test_threads_and_processes_share_a_store(packed: Path) -> None:
    store = pickle.loads(pickle.dumps(Store.open(packed)))
    whole_ZYX = store.read_volume(0).hu_ZYX
    with ThreadPoolExecutor(4) as pool:
        slices = list(pool.map(lambda z: store.read_box(0, (z, 0, 0), (1, 150, 140)), range(19)))
    np.testing.assert_array_equal(np.concatenate(slices), whole_ZYX)


def test_ids_hide_the_source_and_differ_between_stores(
    packed: Path, sources: Path, tmp_path: Path
) -> None:
    key = packed / ".key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for path in packed.rglob("*"):
        assert "DOE" not in path.name
        assert path.is_dir() or b"DOE" not in path.read_bytes()
    pack([sources], tmp_path / "other")
    here = {record.case for record in Store.open(packed).cases}
    there = {record.case for record in Store.open(tmp_path / "other").cases}
    assert here.isdisjoint(there)
    found = {locate(packed, case, [sources]).name for case in here}
    assert found == {"DOE^JOHN_0.nii", "DOE^JOHN_1.nii"}
    with pytest.raises(InputError, match="none of these sources"):
        locate(packed, next(iter(there)), [sources])


def test_packing_again_packs_only_what_is_missing(store_copy: Path, sources: Path) -> None:
    before = Store.open(store_copy).fingerprint
    assert pack([sources], store_copy) == PackReport(packed=0, skipped=2, quarantined=0)
    assert Store.open(store_copy).fingerprint == before
    # An interrupted run leaves voxels without a record, temporary files and no index.
    next((store_copy / "cases").glob("*.json")).unlink()
    (store_copy / "cases" / ".case-x.b2nd.1234.tmp").write_bytes(b"half")
    (store_copy / "index.json").unlink()
    assert pack([sources], store_copy) == PackReport(packed=1, skipped=1, quarantined=0)
    assert Store.open(store_copy).fingerprint == before


def test_bad_inputs_are_listed_and_the_rest_goes_on(sources: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources, tmp_path / "mixed"))
    whole = (folder / "DOE^JOHN_0.nii").read_bytes()
    (folder / "cut.nii").write_bytes(whole[:-100])
    write_nifti(folder / "mask.nii.gz", (scan(0) > 0).astype(np.uint8), AFFINE)
    store = tmp_path / "store"
    assert pack([folder], store) == PackReport(packed=2, skipped=0, quarantined=2)
    rows = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert {row["field"] for row in rows} == {"dim", "HU"}
    assert {locate(store, row["case"], [folder]).name for row in rows} == {"cut.nii", "mask.nii.gz"}
    assert "cut" not in (store / "quarantine.jsonl").read_text()
    assert len(Store.open(store).cases) == 2
    # Mended, it is packed in the next run and leaves the list; the mask is refused again.
    (folder / "cut.nii").write_bytes(whole)
    assert pack([folder], store) == PackReport(packed=1, skipped=2, quarantined=1)
    assert pack([folder / "cut.nii"], store) == PackReport(packed=0, skipped=1, quarantined=0)
    rows = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert [row["field"] for row in rows] == ["HU"]
    assert pack([folder], store, check_hu=False) == PackReport(packed=1, skipped=3, quarantined=0)
    assert (store / "quarantine.jsonl").read_text() == ""


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_damaged_index_is_rebuilt_by_packing_again(store_copy: Path, sources: Path) -> None:
    before = Store.open(store_copy)
    (store_copy / "index.json").write_text("{")
    with pytest.raises(StoreError, match="tapct-fast pack"):
        Store.open(store_copy)
    pack([sources], store_copy)
    assert Store.open(store_copy) == before


def test_a_store_of_another_version_or_codec_is_refused(store_copy: Path, sources: Path) -> None:
    with pytest.raises(StoreError, match="packed as lz4hc"):
        pack([sources], store_copy, codec="zstd")
    index = json.loads((store_copy / "index.json").read_text())
    (store_copy / "index.json").write_text(json.dumps(index | {"version": 1}))
    message = "written by store version 1; this tapct_fast reads 3: pack again"
    with pytest.raises(StoreError, match=message):
        Store.open(store_copy)
    with pytest.raises(StoreError, match=message):
        pack([sources], store_copy)
    (store_copy / "index.json").write_text('{"format": "other"}')
    with pytest.raises(StoreError, match="not a tapct store"):
        Store.open(store_copy)


def test_what_cannot_be_packed_at_all_is_an_error(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="codec='zfp'"):
        pack([sources], tmp_path / "a", codec="zfp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="input 1"):
        pack([tmp_path / "none"], tmp_path / "a")
    with pytest.raises(StoreError, match="index"):
        Store.open(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        pack([sources], tmp_path / "file")


def test_the_checksums_of_another_case_do_not_fit(packed: Path) -> None:
    store = Store.open(packed)
    first, second = store.cases
    mixed = dataclasses.replace(store, cases=(first._replace(crc32s=second.crc32s), second))
    with pytest.raises(StoreError, match="damaged"):
        mixed.read_box(0, (0, 0, 0), (1, 1, 1))


def test_an_index_is_held_to_its_hash_however_it_is_laid_out(store_copy: Path) -> None:
    path = store_copy / "index.json"
    sealed = path.read_bytes()
    stated = json.loads(sealed)["sha256"]
    body = sealed[: -len(f',"sha256":"{stated}"}}')] + b"}"
    assert hashlib.sha256(body).hexdigest() == stated  # what is hashed is what is written
    store = Store.open(store_copy)
    path.write_text(json.dumps(json.loads(sealed), indent=1))  # as 0.1 wrote it
    assert Store.open(store_copy) == store
    for text in (sealed.decode(), path.read_text()):
        path.write_text(text.replace("lz4hc", "zstd"))
        with pytest.raises(StoreError, match=r"index.json is damaged"):
            Store.open(store_copy)


def test_a_crafted_record_cannot_point_outside_its_store(store_copy: Path) -> None:
    index = json.loads((store_copy / "index.json").read_text())
    del index["sha256"]
    index["cases"][0] |= {"case": "../../x", "file": "cases/../../x.b2nd"}
    text = json.dumps(index, sort_keys=True, separators=(",", ":"))
    index["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (store_copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="outside its store"):
        Store.open(store_copy)


def test_native_arguments_are_checked(packed: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "v.b2nd")
    meta = ((0.0,) * 16, (1.0, 1.0, 1.0), HU_RANGE)
    box = ("lz4hc", 5, (16, 128, 128), (4, 64, 64))
    for array in (np.zeros((2, 2, 2)), np.zeros((4, 4, 4), np.int16)[:, ::2]):
        with pytest.raises(TypeError):
            _native.write_b2nd(path, array, *meta, bytes(32), *box)  # type: ignore
    with pytest.raises(ValueError, match="three axes"):
        _native.write_b2nd(path, np.zeros((2, 2), np.int16), *meta, bytes(32), *box)  # type: ignore
    with pytest.raises(ValueError, match="32 bytes"):
        _native.write_b2nd(path, np.zeros((2, 2, 2), np.int16), *meta, b"", *box)  # type: ignore
    store = Store.open(packed)
    with pytest.raises(InputError, match="out is not int16"):
        store.read_boxes([0], [[0, 0, 0]], (1, 1, 1), out=np.empty((1, 1, 1, 2), np.int16))
    reader = store._reader()
    one = np.zeros(1, np.int64)
    big = (1 << 40, 1 << 40, 1)
    with pytest.raises(ValueError, match="positive"):
        reader.read_boxes(one, np.zeros((1, 3), np.int64), big, np.empty(1, np.int16), None, 1)
    with pytest.raises(ValueError, match="no case 7"):
        reader.read_boxes(
            one + 7, np.zeros((1, 3), np.int64), (1, 1, 1), np.empty(1, np.int16), None, 1
        )
    with pytest.raises(ValueError, match="wrong shape"):
        reader.read_boxes(
            one, np.zeros((1, 3), np.int64), (1, 1, 1), np.empty(1, np.uint16), None, 1
        )


def test_the_file_alone_says_where_the_volume_lies_and_what_it_was(
    packed: Path, sources: Path
) -> None:
    store = Store.open(packed)
    for record in store.cases:
        array = blosc2.open(str(packed / record.file), mode="r")
        meta = array.schunk.meta["tapct"]
        assert meta["version"] == 2
        assert tuple(meta["affine"]) == record.affine
        assert tuple(meta["spacing_mm"]) == record.spacing_mm
        assert tuple(meta["hu_range"]) == HU_RANGE
        source = locate(packed, record.case, [sources]).read_bytes()
        assert meta["source_sha256"].hex() == record.source_sha256
        assert record.source_sha256 == hashlib.sha256(source).hexdigest()
        assert record.source_bytes == len(source)
        crc32s = b"".join(
            zlib.crc32(array.schunk.get_chunk(i)).to_bytes(4, "big")
            for i in range(array.schunk.nchunks)
        )
        assert meta["chunk_crc32"] == crc32s == record.crc32s[:-4]
        assert meta["file_crc32"].to_bytes(4, "big") == record.crc32s[-4:]


def test_the_documents_own_lines_verify_a_file_and_find_damage(store_copy: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    names: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], names)
    path = store_copy / Store.open(store_copy).cases[0].file
    names["verify"](str(path))
    data = path.read_bytes()
    for offset in (30, 300, len(data) // 2, len(data) - 20):
        _overwrite(path, offset, bytes([data[offset] ^ 16]))
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            names["verify"](str(path))
        _overwrite(path, offset, data[offset : offset + 1])


def test_a_damaged_case_of_a_batch_is_named_and_an_open_file_stays_checked(
    store_copy: Path,
) -> None:
    store = Store.open(store_copy)
    lo = np.zeros((8, 3), np.int64)
    whole = store.read_boxes([0, 1] * 4, lo, (8, 64, 64))
    path = store_copy / store.cases[1].file
    data = path.read_bytes()
    start = int.from_bytes(data[11:15], "big") + 200  # in a block of the first chunk
    _overwrite(path, start, bytes([data[start] ^ 1]))
    with pytest.raises(StoreError, match=rf"{store.cases[1].case}: chunk 0 is damaged"):
        store.read_boxes([0, 1] * 4, lo, (8, 64, 64), threads=3)
    _overwrite(path, start, data[start : start + 1])
    np.testing.assert_array_equal(store.read_boxes([0, 1] * 4, lo, (8, 64, 64)), whole)
    with path.open("r+b") as file:
        file.truncate(start)
    with pytest.raises(StoreError, match="damaged"):
        store.read_boxes([1], lo[:1], (8, 64, 64))


def test_the_store_does_not_depend_on_threads_and_a_changed_source_is_packed_again(
    sources: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sources, tmp_path / "in"))
    prints = []
    for threads in (1, 3):
        directory = tmp_path / f"s{threads}"
        directory.mkdir()
        (directory / ".key").write_bytes(bytes(range(32)))
        pack([folder], directory, threads=threads)
        prints.append(Store.open(directory).fingerprint)
    assert prints[0] == prints[1]
    path = folder / "DOE^JOHN_0.nii"
    path.touch()  # another time, the same content
    assert pack([folder], directory) == PackReport(packed=0, skipped=2, quarantined=0)
    assert Store.open(directory).fingerprint == prints[0]
    old = Store.open(directory)
    write_nifti(path, scan(9), AFFINE)
    assert pack([folder], directory) == PackReport(packed=1, skipped=1, quarantined=0)
    store = Store.open(directory)
    [case] = [i for i, r in enumerate(store.cases) if locate(directory, r.case, [folder]) == path]
    np.testing.assert_array_equal(
        store.read_volume(case).hu_ZYX, np.clip(read_volume(path).hu_ZYX, *HU_RANGE)
    )
    with pytest.raises(StoreError, match="not the one in the index"):
        old.read_volume(case)


def test_a_pack_killed_at_any_time_is_finished_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for seed in range(6):
        write_nifti(folder / f"{seed}.nii", scan(seed), AFFINE)
    fingerprints = []
    for name, num_kills in (("whole", 0), ("killed", 4)):
        directory = tmp_path / name
        directory.mkdir()
        (directory / ".key").write_bytes(bytes(range(32)))
        for kill in range(num_kills):
            code = "import sys, pathlib as p, tapct_fast.io.pack as s; print(flush=True); "
            code += "s.pack([p.Path(sys.argv[1])], p.Path(sys.argv[2]))"
            command = [sys.executable, "-c", code, str(folder), str(directory)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()  # the imports are done
                time.sleep(0.03 + 0.06 * kill)
                process.kill()
        report = pack([folder], directory)
        assert report.packed + report.skipped == 6
        Store.open(directory).verify()
        fingerprints.append(Store.open(directory).fingerprint)
        assert not list((directory / "cases").glob(".*"))
    assert fingerprints[0] == fingerprints[1]


def test_a_second_pack_into_one_folder_is_refused(sources: Path, tmp_path: Path) -> None:
    with _locked(tmp_path), pytest.raises(StoreError, match="another pack is writing"):
        pack([sources], tmp_path)
    assert pack([sources], tmp_path).packed == 2


def test_real_scans_pack_and_read_back(real_ct: Path, tmp_path: Path) -> None:
    names = ["ts_ct_sm_int16", "sts003_ct_f32_qform"]
    scans = [real_ct / "nifti" / f"{name}.nii.gz" for name in names]
    refused = real_ct / "nifti" / "ct_pitch_oblique_uint8.nii.gz"
    report = pack([*scans, refused, real_ct / "dicom" / "sts004_implicit_40slices"], tmp_path / "s")
    assert report == PackReport(packed=3, skipped=0, quarantined=1)
    store = Store.open(tmp_path / "s")
    for case, record in enumerate(store.cases):
        source = locate(tmp_path / "s", record.case, [real_ct])
        expected = np.clip(read_volume(source).hu_ZYX, *HU_RANGE)
        np.testing.assert_array_equal(store.read_volume(case).hu_ZYX, expected)


def test_each_series_of_a_folder_is_a_case_of_its_own(real_ct: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    for name in ("sts004_implicit_40slices", "ts_j2k_20slices"):
        for path in (real_ct / "dicom" / name).iterdir():
            (folder / f"{name}-{path.name}").write_bytes(path.read_bytes())
    store = tmp_path / "store"
    assert pack([folder], store) == PackReport(packed=0, skipped=0, quarantined=1)
    assert "--series 1" in (store / "quarantine.jsonl").read_text()
    for series in ("1", "2", "2"):
        pack([folder], store, series=series)
    cases = Store.open(store).cases
    assert sorted(case.shape_zyx[0] for case in cases) == [20, 40]
    assert {locate(store, case.case, [folder], series=s) for case, s in _pairs(store)} == {folder}


def _pairs(store: Path) -> list[tuple[CaseRecord, str]]:
    return [(c, "1" if c.shape_zyx[0] == 20 else "2") for c in Store.open(store).cases]

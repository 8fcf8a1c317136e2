"""Whole archives: each scan exactly once through kills, stalls, retries and replaced files."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.downstream import archive
from tapct_fast.downstream.embed import EmbedReport, embed_scans
from tapct_fast.downstream.features import load_features
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import locate
from tapct_fast.io.read import read_volume

pq = pytest.importorskip("pyarrow.parquet", reason="the manifest is Parquet: needs pyarrow")

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """In memory where there is such a file system: a disk waits 20 ms for each fsync."""
    memory = Path("/dev/shm")
    home = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=home) as folder:
        yield Path(folder)


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    """Three scans in a folder that is called like a patient."""
    folder = tmp_path / "doe_jane"
    folder.mkdir()
    return [write_scan(folder / f"doe_jane_{number}.nii.gz", seed=number) for number in range(3)]


def write_scan(path: Path, *, seed: int, depth: int = 9) -> Path:
    hu_ZYX = np.random.default_rng(seed).integers(-1000, 800, (depth, 20, 24)).astype(np.int16)
    write_nifti(path, hu_ZYX, np.diag([-0.7, -0.8, 5.0, 1.0]))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file but the one that holds times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "progress.json"
    }


def rows_of(out: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(out / "manifest.parquet").to_pylist()
    return rows


def with_key(out: Path) -> Path:
    out.mkdir()
    (out / ".key").write_bytes(bytes(32))
    return out


def killed_embeds(folder: Path, how: str, num_scans: int, rest: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_embeds.py"), str(folder), how, str(num_scans), rest],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_200_scans_and_50_kills_end_as_if_nothing_had_happened(quick_folder: Path) -> None:
    num_scans, num_kills = 200, 50
    found = killed_embeds(quick_folder, "random", num_scans, str(num_kills))
    assert [number for number, _ in found["kills"]] == [9] * num_kills

    whole, broken = quick_folder / "whole", quick_folder / "broken"
    assert files_of(broken) == files_of(whole)
    rows = rows_of(broken)
    assert len({row["case"] for row in rows}) == len(rows) == num_scans
    assert [row["status"] for row in rows] == ["quarantined"] + ["embedded"] * (num_scans - 1)
    names = {path.name for path in (broken / "cases").iterdir()}
    kept = {row["case"] for row in rows[1:]}
    assert names == {f"{case}{end}" for case in kept for end in (".json", ".safetensors")}

    # One worker: a kill costs at most the one scan that it was encoding.
    assert num_scans - 1 <= found["encoded"] <= num_scans - 1 + num_kills
    assert len({records for _, records in found["kills"]}) > 25  # kills met the work

    # Memory over the last 150 scans of the undisturbed run; one scan and its features are 0.1 MiB.
    resident = found["resident_mib"]
    assert len(resident) == num_scans - 1
    assert max(resident[50:]) - resident[50] < 4


@pytest.mark.parametrize("format", ["safetensors", "zarr"])
def test_a_kill_before_any_rename_leaves_nothing_wrong(quick_folder: Path, format: str) -> None:
    found = killed_embeds(quick_folder, "rename", 2, format)
    expected = files_of(quick_folder / "whole")
    assert sum(name.endswith(".json") for name in expected if name.startswith("cases/")) >= 1
    *killed, last = found["outs"]
    assert len(killed) >= 7  # progress, settings, features, record, refusal, three lists, progress
    assert all(statuses == [9, 0] for _, *statuses in killed)
    assert last[1:] == [0, 0]
    for name, *_ in found["outs"]:
        assert files_of(quick_folder / name) == expected


def test_the_manifest_says_of_every_scan_what_became_of_it(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    data = scans[1].read_bytes()
    scans[1].write_bytes(data[: len(data) // 2])
    out = tmp_path / "features"
    report = embed_scans(backbone, [scans[2], scans[0].parent], out)
    assert report == EmbedReport(2, 0, 1)
    rows = rows_of(out)
    assert [row["status"] for row in rows] == ["embedded", "embedded", "quarantined"]
    assert [row["code"] for row in rows] == [None, None, "integrity"]
    assert {row["backbone"] for row in rows} == {backbone.fingerprint()}
    for row, scan in zip(rows, (scans[2], scans[0]), strict=False):
        path = out / str(row["file"])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        assert path.stat().st_size == row["bytes"]
        assert hashlib.sha256(scan.read_bytes()).hexdigest() == row["source_sha256"]
        assert scan.stat().st_size == row["source_bytes"]
        features = load_features(path)
        assert list(features.patches_ZYXC.shape[:3]) == row["grid_zyx"]
        assert features.affine.ravel().tolist() == row["affine"]
        assert list(features.spacing_mm) == row["spacing_mm"]
        assert len(features.cls_ND) == row["num_windows"]
    for path in out.rglob("*"):
        assert path.is_dir() or b"doe" not in path.read_bytes()

    # Other settings of Parquet, or a new release of it, would show here.
    meta = pq.ParquetFile(out / "manifest.parquet").metadata
    assert (meta.num_rows, meta.num_row_groups) == (3, 1)
    assert meta.format_version == "2.6"
    assert meta.row_group(0).column(0).compression == "ZSTD"


def test_a_replaced_scan_is_embedded_again_and_a_touched_one_is_not(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "features"
    embed_scans(backbone, scans, out)
    before = files_of(out)
    hashed = rows_of(out)
    os.utime(scans[0], ns=(1, 1))
    write_scan(scans[1], seed=7, depth=6)
    scans[2].write_bytes(b"no scan any more")
    assert embed_scans(backbone, scans, out) == EmbedReport(1, 1, 1)
    rows = rows_of(out)
    assert rows[0] == hashed[0]
    assert (rows[1]["grid_zyx"], hashed[1]["grid_zyx"]) == ([2, 8, 8], [3, 8, 8])
    assert rows[1]["source_sha256"] == hashlib.sha256(scans[1].read_bytes()).hexdigest()
    assert rows[2]["status"] == "quarantined"
    # The features of what the file held before are gone.
    assert not (out / str(hashed[2]["file"])).exists()

    # Back with its old content, everything is as it was, but for the time of the first file.
    os.utime(scans[0], ns=(2, 2))
    for number in (1, 2):
        write_scan(scans[number], seed=number)
    assert embed_scans(backbone, scans, out) == EmbedReport(2, 1, 0)
    assert files_of(out)["manifest.parquet"] == before["manifest.parquet"]
    assert embed_scans(backbone, scans, out) == EmbedReport(0, 3, 0)


def test_a_scan_that_goes_or_changes_while_it_is_read_is_not_embedded(
    backbone: Backbone, scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(scan: Path, **options: object) -> object:
        volume = real(scan, **options)
        if scan == scans[0]:
            write_scan(scan, seed=9, depth=5)
            scans[1].unlink()  # the search has found it
        return volume

    real = archive.read_volume
    monkeypatch.setattr(archive, "read_volume", disturbed)
    out = tmp_path / "features"
    assert embed_scans(backbone, scans, out, readers=1) == EmbedReport(1, 0, 2)
    assert [row["code"] for row in rows_of(out)] == ["integrity", "input", None]
    reasons = (out / "quarantine.jsonl").read_text()
    assert "changed while it was read" in reasons
    assert "doe" not in reasons
    monkeypatch.setattr(archive, "read_volume", real)
    assert embed_scans(backbone, [scans[0], scans[2]], out) == EmbedReport(1, 1, 0)
    # What an earlier call named stays listed, behind the scans of this one.
    (line,) = (out / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["code"] == "input"


def test_a_refused_scan_is_read_again_only_when_that_may_help(
    backbone: Backbone, scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "features"
    write_nifti(scans[0], np.eye(20, dtype=np.uint8)[None].repeat(4, 0), np.eye(4))  # not HU
    read = []

    def counted(path: Path, **options: object) -> object:
        read.append(path)
        return real(path, **options)

    real = archive.read_volume
    monkeypatch.setattr(archive, "read_volume", counted)
    assert embed_scans(backbone, scans, out) == EmbedReport(2, 0, 1)
    assert len(read) == 3
    assert embed_scans(backbone, scans, out) == EmbedReport(0, 2, 1)
    assert len(read) == 3
    assert [row["code"] for row in rows_of(out)] == ["hu", None, None]
    # What reads it is another: without the check it is a scan.
    assert embed_scans(backbone, scans, out, check_hu=False) == EmbedReport(1, 2, 0)
    assert (out / "quarantine.jsonl").read_text() == ""


def test_a_read_that_stalls_is_left_behind_and_the_rest_goes_on(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    stalled = scans[0].parent / "stalled.nii"
    os.mkfifo(stalled)  # opening it waits for a writer, as a dead server makes one wait
    out = tmp_path / "features"
    report = embed_scans(backbone, [stalled, *scans], out, timeout_s=0.3)
    assert report == EmbedReport(3, 0, 1)
    assert report.progress["quarantined_by_code"] == {"timeout": 1}
    (refused,) = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    assert (refused["code"], refused["field"]) == ("timeout", "read")
    assert refused["case"] == rows_of(out)[0]["case"]
    # Free the thread that was left behind, then make a scan of it: timeouts are tried again.
    threading.Thread(target=lambda: stalled.write_bytes(b""), daemon=True).start()
    stalled.unlink()
    write_scan(stalled.with_suffix(".nii"), seed=5)
    assert embed_scans(backbone, [stalled, *scans], out) == EmbedReport(1, 3, 0)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([errno.EIO] * 2, EmbedReport(3, 0, 0)),
        ([errno.EIO] * 3, EmbedReport(2, 0, 1)),
        ([errno.EACCES], EmbedReport(2, 0, 1)),  # does not pass by itself
    ],
)
def test_a_server_that_fails_is_asked_three_times(
    backbone: Backbone,
    scans: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failures: list[int],
    expected: EmbedReport,
) -> None:
    left = list(failures)

    def failing(scan: Path) -> bytes:
        if scan == scans[1] and left:
            code = left.pop()
            raise OSError(code, os.strerror(code), str(scan))
        return real(scan)

    real = archive.sha256_source
    monkeypatch.setattr(archive, "sha256_source", failing)
    monkeypatch.setattr(archive, "PAUSES_S", (0.01, 0.01))
    out = tmp_path / "features"
    assert embed_scans(backbone, scans, out) == expected
    assert left == []
    assert "doe" not in (out / "quarantine.jsonl").read_text()
    assert embed_scans(backbone, scans, out).quarantined == 0


def test_a_server_that_fails_while_a_slice_is_opened_is_asked_again(
    backbone: Backbone, scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [errno.ESTALE] * 2

    def failing(scan: Path, **options: object) -> object:
        if scan == scans[1] and left:
            code = left.pop()
            cannot = FormatError("file", "file 3 cannot be opened: stale", "input")
            raise cannot from OSError(code, os.strerror(code))
        return read_volume(scan, **options)

    monkeypatch.setattr(archive, "read_volume", failing)
    monkeypatch.setattr(archive, "PAUSES_S", (0.01, 0.01))
    assert embed_scans(backbone, scans, tmp_path / "features") == EmbedReport(3, 0, 0)
    assert left == []


def test_a_link_to_itself_is_a_refusal_like_any_other(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    (scans[0].parent / "doe_jane_loop.nii").symlink_to("doe_jane_loop.nii")
    out = tmp_path / "features"
    assert embed_scans(backbone, [scans[0].parent], out) == EmbedReport(3, 0, 1)
    (refused,) = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    assert refused["code"] == "input"
    assert "symbolic links" in refused["reason"]
    assert "doe" not in json.dumps(refused)


@pytest.mark.parametrize("place", ["read_volume", "embed_volume"])
def test_a_scan_too_large_for_the_memory_is_quarantined(
    backbone: Backbone,
    scans: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    calls = []

    def exhausted(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2 and place == "read_volume":
            np.empty(2**58)
        elif len(calls) == 2:
            torch.empty(2**58)
        return real(*args, **options)

    real = getattr(archive, place)
    monkeypatch.setattr(archive, place, exhausted)
    out = tmp_path / "features"
    assert embed_scans(backbone, scans, out) == EmbedReport(2, 0, 1)
    assert sorted(str(row["code"]) for row in rows_of(out)) == ["None", "None", "memory"]
    assert embed_scans(backbone, scans, out) == EmbedReport(1, 2, 0)


def test_a_scan_whose_features_break_does_not_stop_the_others(
    backbone: Backbone, scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> object:
        features = real(*args, **options)
        if not done:
            features.patches_ZYXC[0, 0, 0, 0] = 1e5  # no float16
        done.append(1)
        return features

    done: list[int] = []
    real = archive.embed_volume
    monkeypatch.setattr(archive, "embed_volume", broken)
    out = tmp_path / "features"
    assert embed_scans(backbone, scans, out) == EmbedReport(2, 0, 1)
    assert [row["code"] for row in rows_of(out)] == ["non_finite", None, None]


def test_a_second_process_is_refused_with_the_first_ones_number(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "features"
    out.mkdir()
    hold = (
        "import fcntl, os, sys; file = open(sys.argv[1], 'a+'); fcntl.flock(file, fcntl.LOCK_EX);"
        "file.write(str(os.getpid())); file.flush(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(out / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"written by process {holder.pid};"):
            embed_scans(backbone, scans, out)
        assert holder.stdin is not None
        holder.stdin.close()
    assert embed_scans(backbone, scans, out) == EmbedReport(3, 0, 0)
    assert (out / ".lock").read_bytes() == b""


def test_zarr_holds_what_safetensors_does_and_its_own_library_reads_it(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    zarr = pytest.importorskip("zarr", reason="the independent reader of the groups")
    write_scan(scans[0], seed=0, depth=90)  # 23 token slices: two chunks, the second padded
    plain, group = with_key(tmp_path / "plain"), with_key(tmp_path / "group")
    assert embed_scans(backbone, scans, plain) == EmbedReport(3, 0, 0)
    assert embed_scans(backbone, scans, group, format="zarr") == EmbedReport(3, 0, 0)
    for row, other in zip(rows_of(plain), rows_of(group), strict=True):
        same = ("case", "status", "grid_zyx", "spacing_mm", "affine", "num_windows")
        assert [row[name] for name in same] == [other[name] for name in same]
        expected, path = load_features(plain / str(row["file"])), group / str(other["file"])
        features, store = load_features(path), zarr.open_group(path, mode="r")
        for name, tensor in (
            ("patches", expected.patches_ZYXC.half()),
            ("cls", expected.cls_ND),
            ("pooled", expected.pooled_D),
        ):
            np.testing.assert_array_equal(store[name][:], tensor.numpy())
        assert torch.equal(features.patches_ZYXC, expected.patches_ZYXC)
        assert torch.equal(features.cls_ND, expected.cls_ND)
        assert store["patches"].metadata.dimension_names == ("z", "y", "x", "channel")
        assert store.attrs["affine"] == row["affine"]
        shell = "find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
        said = subprocess.check_output(["sh", "-c", shell], cwd=path, text=True)
        assert said.split()[0] == other["sha256"]
    assert embed_scans(backbone, scans, group, format="zarr") == EmbedReport(0, 3, 0)
    with pytest.raises(InputError, match="another format"):
        embed_scans(backbone, scans, group)
    (chunk, *_) = sorted(path.rglob("c/0/0/0/0"))
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(ValueError, match="sha256 differs"):
        load_features(path)


def test_progress_is_told_in_lines_and_in_a_file_without_paths(
    backbone: Backbone, scans: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features"
    report = embed_scans(backbone, scans, out, progress=True, every_s=1e-6)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # one per scan, and the last one
    assert lines[0].startswith("embed: 1/3 scans, ")
    assert lines[-1].startswith("embed: 3/3 scans, ")
    assert all("scans/s, ETA 0:00:0" in line and "encoder waiting " in line for line in lines)
    sums = json.loads((out / "progress.json").read_text())
    assert sums == report.progress
    assert (sums["state"], sums["num_scans"], sums["embedded"]) == ("finished", 3, 3)
    shares = [sums[f"{name}_share"] for name in ("waiting", "encoding", "writing")]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert sums["backbone"] == backbone.fingerprint()
    assert (
        sums["settings"]["batch_size"]
        == json.loads((out / "settings.json").read_text())["batch_size"]
    )
    assert "doe" not in json.dumps(sums) + "".join(lines)


def test_the_manifest_tells_the_scans_apart_in_input_order(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    copy = scans[0].with_name("doe_jane_9.nii.gz")
    shutil.copy(scans[0], copy)
    scans[1].write_bytes(b"no scan")
    out = tmp_path / "features"
    assert embed_scans(backbone, [*scans, copy], out) == EmbedReport(3, 0, 1)
    rows = rows_of(out)
    assert [row["status"] == "embedded" for row in rows] == [True, False, True, True]
    first, third, fourth = (
        load_features(out / str(row["file"])).patches_ZYXC for row in (rows[0], *rows[2:])
    )
    assert torch.equal(first, fourth)
    assert not torch.equal(first, third)


def test_a_tree_of_series_and_archives_of_series_is_one_archive(
    backbone: Backbone, tmp_path: Path
) -> None:
    pytest.importorskip("pydicom", reason="writes the series")
    from dicom_series import CANARY, HU_ZYX, write_series

    home = tmp_path / f"{CANARY}_archive"
    for name in ("study-1/series-1", "study-1/series-2", "study-2/series-1"):
        (home / name).mkdir(parents=True)
        write_series(home / name)
    with zipfile.ZipFile(home / "study-2" / "packed.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted((home / "study-2" / "series-1").iterdir()):
            packed.write(path, path.name)
    torn = sorted((home / "study-1" / "series-2").iterdir())[3]
    torn.write_bytes(torn.read_bytes()[:-20])
    out = tmp_path / "features"
    assert embed_scans(backbone, [home], out) == EmbedReport(3, 0, 1)
    rows = rows_of(out)
    assert [row["status"] for row in rows].count("embedded") == 3
    (refused,) = (row for row in rows if row["status"] == "quarantined")
    assert refused["code"] == "integrity"
    found = locate(out, str(refused["case"]), [home])
    assert found == torn.parent
    first = next(row for row in rows if row["status"] == "embedded")
    files = sorted((home / "study-1" / "series-1").iterdir())
    digests = sorted(hashlib.sha256(path.read_bytes()).digest() for path in files)
    assert first["source_sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert first["source_bytes"] == sum(path.stat().st_size for path in files)
    assert first["grid_zyx"] == [len(HU_ZYX) // 4, 8, 8]
    for path in out.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()
    # A slice is added to the first series: another scan now.
    shutil.copy(torn, files[0].parent / "zz.dcm")
    assert embed_scans(backbone, [home], out).skipped == 2


def test_the_page_on_archives_reads_its_folder_back(
    backbone: Backbone, scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas", reason="the page reads the manifest with it")
    embed_scans(backbone, scans, tmp_path / "FEATURES")
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "embed.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["pooled"].shape == (3, 64)
    volume = read_volume(scans[0])
    # A token is 20 / 64 * 8 rows and 24 / 64 * 8 columns of the scan, and 4 slices.
    voxel = [2 * 3 + 1.0, 0 * 2.5 + 0.75, 1 * 4 + 1.5, 1]
    np.testing.assert_allclose(names["place_mm"], (volume.affine @ voxel)[:3])
    for name in re.findall(r"-k (?:\"([^\"]+)\"|(\w+))", page):
        for word in "".join(name).split(" or "):
            assert word in Path(__file__).read_text(), word

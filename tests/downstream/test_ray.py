"""The Ray engine on a local cluster of two workers: the bytes of a lone process, and no secrets."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.downstream import ray_engine
from tapct_fast.downstream.archive import Done, Item, Job
from tapct_fast.downstream.embed import embed_scans
from tapct_fast.downstream.ray_engine import RayCluster
from tapct_fast.errors import InputError
from tapct_fast.io.nifti import write_nifti

pytest.importorskip("ray.data", reason="needs ray[data]")
pytest.importorskip("pyarrow", reason="the manifest is Parquet: needs pyarrow")

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
TIMEOUT_S = 180


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="tapct") as name:
        yield Path(name)


def test_a_worker_stops_where_no_read_ends(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen reads that never ended are refused scans, one more is storage that has gone."""
    import pyarrow
    import ray

    def stalled(_: object, __: object, items: list[Item]) -> Iterator[Done]:
        yield from (Done(item.case, "quarantined", "timeout") for item in items)

    job = Job(tmp_path, "", "safetensors", 0.5, 1, None, True, 7.0, 1, 1)
    monkeypatch.setattr(ray, "get", lambda ref: ref)
    monkeypatch.setattr(ray_engine, "embed_items", stalled)
    worker = ray_engine._Worker(backbone, job, "cpu", 1, 1)
    batch = pyarrow.table({"case": ["case-1"] * 8, "place": [b"/scan"] * 8})
    errors = [worker(batch).column("error").to_pylist() for _ in range(3)]
    assert errors[:2] == [[""] * 8] * 2
    (error,) = errors[2]
    assert error.startswith("24 reads did not end within 7 s each")


def processes_of(session: Path) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if str(session).encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def test_two_workers_write_the_bytes_of_one_process_though_one_is_killed(folder: Path) -> None:
    session = folder / "ray"
    session.mkdir()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "RAY_TMPDIR": str(session),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "ray_embeds.py"), str(folder)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        deadline = time.monotonic() + 20
        while processes_of(session) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(session) == []
    finally:
        for process in processes_of(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    found = json.loads(done.stdout.splitlines()[-1])
    embedded, skipped, quarantined = found["counts"][0]
    # A task whose worker died is done again: what it had finished counts as there before.
    assert embedded + skipped == 23
    assert quarantined == 1
    assert found["counts"][1] == [0, 23, 1]
    assert found["killed"] == 1
    assert (found["progress"]["engine"], found["progress"]["workers"]) == ("ray", 2)

    local, cluster = (
        {
            path.relative_to(out).as_posix(): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and path.name != "progress.json"
        }
        for out in (folder / "local", folder / "cluster")
    )
    assert cluster == local
    secrets = [b"doe_jane", bytes(range(100, 132)), bytes(range(100, 132)).hex().encode()]
    logs = [path for path in session.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "ray-data.log" for path in logs)
    for path in logs:
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), path.name
    assert "doe_jane" not in done.stdout + done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nobody", "127.0.0.1:port"])
def test_a_cluster_that_is_not_there_is_an_error_at_once(
    backbone: Backbone, tmp_path: Path, address: str
) -> None:
    write_nifti(tmp_path / "scan.nii", np.arange(6**3, dtype=np.int16).reshape(6, 6, 6), np.eye(4))
    cluster = RayCluster(address, workers=1)
    began = time.monotonic()
    with pytest.raises(InputError, match="--ray-address"):
        embed_scans(backbone, [tmp_path / "scan.nii"], tmp_path / "out", ray=cluster)
    assert time.monotonic() - began < 60

"""Each tracker with its real library, offline: what was written is read back from its files."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tapct_fast.errors import InputError
from tapct_fast.train.log import RunLog
from tapct_fast.train.trackers import KINDS, Start, Trackers, choose_trackers

SETTINGS = {"vit.dim": 384, "views.local_views.size_zyx": (12, 96, 96), "heads.ibot": None}
NAMES = ["tensorboard", "wandb", "mlflow"]
CANARY = "DOE_JANE_19700101"  # stands for a patient's name in the path of a run


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def row(step: int) -> dict[str, Any]:
    health = {"health/rank": 3.5, "probe/knn": 0.25}
    return {"step": step, "loss": step / 8, "samples_per_s": 2.0, "data_wait": 0.25, **health}


def killed_and_resumed(out: Path, names: list[str]) -> None:
    """Steps 1 to 4, a kill behind the checkpoint of step 2, then steps 3 to 5."""
    for first, last in ((0, 4), (2, 5)):
        with RunLog(
            out, step=first, num_steps=5, progress=False, settings=SETTINGS, track=names
        ) as log:
            for step in range(first + 1, last + 1):
                log.write(row(step))
        if "wandb" in names:
            import wandb

            wandb.teardown()  # a process that resumes has a W&B service of its own


def test_tensorboard_has_every_row_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'tapct-fast[track]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_resumed(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, value in row(1).items():
        if name != "step":
            scalars = [(e.step, e.value) for e in events.Scalars(name)]
            assert [step for step, _ in scalars] == [1, 2, 3, 4, 5]
            assert name == "loss" or {v for _, v in scalars} == {value}
    assert [e.value for e in events.Scalars("loss")] == [step / 8 for step in range(1, 6)]
    (text,) = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val
    assert "| vit.dim | 384 |" in text.decode()


def test_mlflow_has_every_row_once_after_a_resume(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'tapct-fast[track]'")
    killed_and_resumed(tmp_path, ["mlflow"])
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("tapct-fast")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in SETTINGS.items()}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, step / 8) for step in range(1, 6)]
    assert run.data.metrics.keys() == row(5).keys() - {"step"}
    assert run.data.tags.keys() <= {"mlflow.runName"}  # no user, host, source or commit
    assert (run.info.user_id, run.data.tags.get("mlflow.source.name")) == ("unknown", None)


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a W&B file: LevelDB's log format behind 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_has_every_row_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'tapct-fast[track]'")
    killed_and_resumed(tmp_path, ["wandb"])
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    run_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.run_id for run in runs} == {run_id}
    assert {run.project for run in runs} == {"tapct-fast"}
    assert {run.host for run in runs} == {""}
    config = {item.key: item.value_json for run in runs for item in run.config.update}
    assert config["vit.dim"] == "384"
    assert json.loads(config["views.local_views.size_zyx"]) == [12, 96, 96]
    rows = []
    for record in records:
        if record.HasField("history"):
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append(
                {k: v for k, v in items.items() if not k.startswith("_")} | {"step": items["_step"]}
            )
    assert rows == [row(step) for step in range(1, 6)]


def test_the_users_own_settings_of_wandb_and_mlflow_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="pip install 'tapct-fast[track]'")
    mlflow = pytest.importorskip("mlflow", reason="pip install 'tapct-fast[track]'")
    elsewhere = (tmp_path / "elsewhere").as_uri()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    wandb.teardown()  # what it has read of the environment
    killed_and_resumed(tmp_path, ["wandb", "mlflow"])
    assert not list(tmp_path.rglob("*.wandb"))
    assert not (tmp_path / "mlflow").exists()
    client = mlflow.MlflowClient(tracking_uri=elsewhere)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert len(client.get_metric_history(run_id, "loss")) == 5


@pytest.mark.parametrize("name", NAMES)
def test_what_a_tracker_is_told_names_no_host_user_or_path(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name, reason="pip install 'tapct-fast[track]'")
    out = tmp_path / CANARY
    out.mkdir()
    killed_and_resumed(out, [name])
    # The runs' own files, which stay here, hold the run's folder; see docs/scale.md.
    local = {"debug.log", "debug-internal.log", "debug-core.log", "meta.yaml"}
    files = [p for p in out.rglob("*") if p.is_file() and not p.is_symlink()]
    assert len(files) > 2
    for path in files:
        if path.name not in local:
            assert CANARY.encode() not in path.read_bytes(), path.name


def test_a_number_that_is_not_finite_is_no_failure(tmp_path: Path) -> None:
    for name in NAMES:
        pytest.importorskip(name, reason="pip install 'tapct-fast[track]'")
    told: list[str] = []
    trackers = Trackers(NAMES, Start(tmp_path, 0, 0, {}), told.append)
    trackers.write({"step": 1, "loss": math.nan, "koleo": math.inf})
    trackers.write({"step": 2, "loss": 1.0})
    trackers.close()
    assert told == []


def test_a_tracker_that_cannot_be_reached_is_told_of_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="pip install 'tapct-fast[track]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # discard: nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    killed_and_resumed(tmp_path, ["mlflow", "tensorboard"])
    lines = capsys.readouterr().err.splitlines()
    failed = [line for line in lines if "mlflow failed" in line]
    assert len(failed) == 2  # once in each of the two processes that this stands for
    assert "127.0.0.1" not in "".join(failed)
    assert "metrics.jsonl has every row" in failed[0]
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [1, 2, 3, 4, 5]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_disk_that_fails_under_a_tracker_leaves_the_others(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="pip install 'tapct-fast[track]'")
    (tmp_path / "tensorboard").write_text("in the way")
    told: list[str] = []
    trackers = Trackers(["tensorboard", "mlflow"], Start(tmp_path, 0, 0, {}), told.append)
    trackers.write(row(1))
    trackers.close()
    assert [line.split(" and ")[0] for line in told] == ["tensorboard failed (FileExistsError)"]
    assert list((tmp_path / "mlflow").rglob("metrics/loss"))


def test_an_unknown_tracker_is_named_with_those_there_are() -> None:
    with pytest.raises(
        InputError, match="'mlfow' is unknown; trackers: tensorboard, wandb, mlflow"
    ):
        choose_trackers(["mlfow"])
    assert choose_trackers([]) == []
    assert list(KINDS) == NAMES

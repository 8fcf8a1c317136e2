"""The online probe: its scores, and that the run does not notice it."""

import hashlib
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tapct_fast import recipes
from tapct_fast.backbone.export import export_backbone
from tapct_fast.backbone.load import load_backbone
from tapct_fast.config import Config
from tapct_fast.downstream.encode import embed_volume
from tapct_fast.downstream.probe import probe_scans
from tapct_fast.errors import InputError
from tapct_fast.io.read import read_labels, read_volume
from tapct_fast.monitor import probe as online
from tapct_fast.monitor.probe import OnlineProbe
from tapct_fast.train.loop import train

Pairs = list[tuple[Path, Path]]


def build(out: Path, pairs: Pairs, *, num_steps: int = 60, **settings: Any) -> OnlineProbe:
    scans, labels = ([pair[i] for pair in pairs] for i in (0, 1))
    return OnlineProbe(out, scans, labels, num_steps=num_steps, device="cpu", **settings)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "probe.jsonl").read_text().splitlines()]


def without_time(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out)]


@pytest.fixture(scope="module")
def checkpoint(healthy_run: Path) -> Path:
    return healthy_run / "checkpoints" / "step-00000060"


def test_scores_are_those_of_the_exported_teacher(
    checkpoint: Path, pairs: Pairs, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    probe = build(out, pairs[:4])
    probe.saved(60, checkpoint)
    probe.close()
    (row,) = rows(out)

    backbone = load_backbone(export_backbone(checkpoint, tmp_path / "backbone"))
    scans = [
        (embed_volume(backbone, read_volume(scan), batch_size=4), read_labels(labels))
        for scan, labels in pairs[:4]
    ]
    expected = probe_scans(scans)
    for name, result in (("knn", expected.knn), ("linear", expected.linear)):
        found = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
        assert found == [round(v, 4) for v in (result.mean_dice, *result.interval)]
    assert 0.05 < row["knn"] < 1
    assert (row["step"], row["num_scans"]) == (60, 4)
    assert {path.name for path in out.iterdir()} == {"probe.jsonl"}


def test_it_is_deterministic_draws_nothing_and_survives_the_removal_of_the_checkpoint(
    checkpoint: Path, pairs: Pairs, tmp_path: Path
) -> None:
    np.random.seed(5)  # noqa: NPY002  # the global state must not be touched
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    found = []
    for name in ("first", "second"):
        folder = tmp_path / f"copy-{name}"
        shutil.copytree(checkpoint, folder)
        (tmp_path / name).mkdir()
        probe = build(tmp_path / name, pairs[:2])
        probe.saved(60, folder)
        shutil.rmtree(folder)  # as retention does
        probe.close()
        found.append(without_time(tmp_path / name))
    assert found[0] == found[1]
    assert "linear" in found[0][0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


@pytest.mark.gpu
def test_a_device_gives_the_scores_of_the_host_up_to_rounding(
    checkpoint: Path, pairs: Pairs, tmp_path: Path
) -> None:
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        out.mkdir()
        scans, labels = ([pair[i] for pair in pairs[:3]] for i in (0, 1))
        probe = OnlineProbe(out, scans, labels, num_steps=60, device=device)
        probe.saved(60, checkpoint)
        probe.close()
        found += rows(out)
    assert found[1]["linear"] == pytest.approx(found[0]["linear"], abs=0.02)  # bfloat16 products
    assert found[1]["knn"] == pytest.approx(found[0]["knn"], abs=0.02)


def small_config(**settings: str) -> Config:
    from_tests = {
        "train.num_steps": "4",
        "train.batch_size": "4",
        "train.group_size": "4",
        "train.checkpoint_every": "2",
        "train.num_workers": "1",
        "vit.dim": "64",
        "vit.depth": "1",
        "vit.image_zyx": "8,32,32",
        "views.global_views.size_zyx": "8,32,32",
        "views.local_views.size_zyx": "8,16,16",
    }
    return recipes.override(recipes.debug(), from_tests | settings)


def hashes(out: Path) -> dict[str, str]:
    (folder,) = (out / "checkpoints").glob("step-00000004")
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


def test_a_run_has_the_same_bits_with_and_without_it(
    store: Path, pairs: Pairs, tmp_path: Path
) -> None:
    config = small_config()
    train(config, store, tmp_path / "plain", device="cpu")
    probe = build(tmp_path / "probed", pairs[:2], num_steps=4)
    train(config, store, tmp_path / "probed", device="cpu", observers=[probe])
    assert hashes(tmp_path / "plain") == hashes(tmp_path / "probed")
    found = rows(tmp_path / "probed")
    assert [row["step"] for row in found] in ([2, 4], [2])  # in the order of their ends
    assert found[-1]["step"] == 4
    assert "linear" in found[-1]
    text = (tmp_path / "probed" / "probe.jsonl").read_text()
    assert "Mueller" not in text
    assert "/" not in text

    # The same folder again: nothing is scored twice.
    probe = build(tmp_path / "probed", pairs[:2], num_steps=4)
    train(config, store, tmp_path / "probed", device="cpu", observers=[probe])
    probe.saved(4, tmp_path / "probed" / "checkpoints" / "step-00000004")
    probe.close()
    assert rows(tmp_path / "probed") == found


def test_a_checkpoint_that_comes_too_early_is_skipped_and_the_last_is_waited_for(
    checkpoint: Path, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, embed = threading.Event(), online.embed_volume

    def slow(*args: Any, **settings: Any) -> Any:
        may_go_on.wait(30)
        return embed(*args, **settings)

    monkeypatch.setattr(online, "embed_volume", slow)
    probe = build(tmp_path, pairs[:2])
    start = time.monotonic()
    probe.saved(20, checkpoint)
    probe.saved(40, checkpoint)  # 20 is at work
    assert time.monotonic() - start < 5  # it waits 30 s for nobody
    assert rows(tmp_path) == [{"step": 40, "skipped": "the probe of step 20 was still at work"}]
    may_go_on.set()
    probe.saved(60, checkpoint)
    probe.close()
    skipped, first, last = rows(tmp_path)
    assert (skipped["step"], first["step"], last["step"]) == (40, 20, 60)
    assert "linear" in first
    assert "linear" in last


def test_a_run_that_ends_before_its_time_does_not_wait_for_the_scores(
    checkpoint: Path, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = build(tmp_path, pairs[:2])
    is_reading, embed = threading.Event(), online.embed_volume

    def embed_one(*args: Any, **settings: Any) -> Any:
        is_reading.set()
        assert probe._is_stopping.wait(30)
        return embed(*args, **settings)

    monkeypatch.setattr(online, "embed_volume", embed_one)
    probe.saved(20, checkpoint)
    assert is_reading.wait(30)
    probe.close()
    (row,) = without_time(tmp_path)
    assert row == {"step": 20, "skipped": "the run ended before it was done"}


def test_what_goes_wrong_is_a_row_with_a_reason_and_a_number_for_the_scan(
    checkpoint: Path, pairs: Pairs, tmp_path: Path
) -> None:
    bad = tmp_path / "Mueller.nii.gz"
    bad.write_bytes(b"not a scan")
    probe = build(tmp_path, [pairs[0], (bad, pairs[1][1])], num_steps=20)
    probe.saved(20, checkpoint)
    probe.close()
    (row,) = rows(tmp_path)
    assert row["error"].startswith("probe scan 2: ")
    assert "Mueller" not in json.dumps(row)

    damaged = tmp_path / "step-00000040"
    shutil.copytree(checkpoint, damaged)
    weights = bytearray((damaged / "teacher.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "teacher.safetensors").write_bytes(weights)
    probe.saved(40, damaged)
    probe.close()
    assert "teacher.safetensors" in rows(tmp_path)[1]["error"]

    probe.saved(60, tmp_path / "gone")
    probe.close()
    assert "No such file" in rows(tmp_path)[2]["error"]
    assert [row["step"] for row in rows(tmp_path)] == [20, 40, 60]


def test_a_torn_row_of_a_killed_run_is_dropped_and_the_next_is_whole(
    checkpoint: Path, pairs: Pairs, tmp_path: Path
) -> None:
    (tmp_path / "probe.jsonl").write_text('{"step": 20, "linear": 0.5}\n{"step": 40, "lin')
    (tmp_path / ".probe" / "step-00000040").mkdir(parents=True)
    probe = build(tmp_path, pairs[:2])
    probe.saved(20, checkpoint)  # known
    probe.saved(60, checkpoint)
    probe.close()
    assert [row["step"] for row in rows(tmp_path)] == [20, 60]


def test_scans_and_labels_must_be_pairs_and_two_or_more(pairs: Pairs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 --probe-labels for 2 --probe scans"):
        OnlineProbe(tmp_path, [p[0] for p in pairs[:2]], [pairs[0][1]], num_steps=1, device="cpu")
    with pytest.raises(InputError, match="two scans or more"):
        build(tmp_path, pairs[:1])

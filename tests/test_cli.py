"""Every verb in one run from scans to probe; every wrong call is one line with the way out."""

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tapct_fast import cli, demo, recipes
from tapct_fast.cli import main
from tapct_fast.config import (
    Config,
    CropConfig,
    HeadConfig,
    HeadsConfig,
    TrainConfig,
    VitConfig,
    from_json,
)
from tapct_fast.data.phantom import make_phantom
from tapct_fast.io.nifti import write_nifti

CANARY = "DOE_JANE_19700101"  # stands for a patient's name in a path
TINY = [
    *("--vit.dim", "64", "--vit.depth", "1", "--train.num_steps", "3", "--train.batch_size", "4"),
    *("--train.group_size", "4"),
    *("--heads.dino.num_prototypes", "32", "--heads.ibot", "none"),
    *("--train.checkpoint_every", "2", "--views.local_views.num=2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small phantoms with labels, and a file that is no scan."""
    root = tmp_path_factory.mktemp("cli") / CANARY
    (root / "scans").mkdir(parents=True)
    for i in range(3):
        phantom = make_phantom(1, i, shape_zyx=(16, 64, 64), spacing_mm=(12.0, 5.5, 5.5))
        affine = phantom.volume.affine
        write_nifti(root / "scans" / f"{i}.nii.gz", phantom.volume.hu_ZYX, affine)
        write_nifti(root / f"labels-{i}.nii.gz", phantom.labels_ZYX.astype(np.uint8), affine)
    (root / "scans" / "3.nii.gz").write_bytes(b"not a scan")
    return root


def test_every_verb_runs_from_scans_to_probe(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store, run, backbone, features = (str(tmp_path / n) for n in ("store", "run", "bb", "feat"))
    scans = [str(folder / "scans" / f"{i}.nii.gz") for i in range(3)]

    assert main(["pack", str(folder / "scans"), store]) == 0
    assert "packed 3, already there 0, quarantined 1" in capsys.readouterr().out
    assert main(["pack", str(folder / "scans"), store]) == 0
    assert "packed 0, already there 3, quarantined 1" in capsys.readouterr().out
    (refused,) = map(json.loads, (Path(store) / "quarantine.jsonl").read_text().splitlines())
    assert main(["locate", store, refused["case"], str(folder / "scans")]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "scans" / "3.nii.gz")

    labels = [str(folder / f"labels-{i}.nii.gz") for i in range(3)]
    probe = ["--probe", *scans[:2], "--probe-labels", *labels[:2]]
    assert main(["train", "debug", store, "--out", run, "--device", "cpu", *probe, *TINY]) == 0
    rows = [json.loads(row) for row in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) for row in rows)
    scores = [json.loads(row) for row in (Path(run) / "probe.jsonl").read_text().splitlines()]
    assert {row["step"] for row in scores} == {2, 3}
    assert "linear" in scores[-1]
    assert "at step 3 of 3" in (Path(run) / "dashboard.html").read_text()
    capsys.readouterr()
    assert main(["watch", run, "--once"]) == 70  # TINY has fewer steps than the last layer waits
    view = capsys.readouterr().out
    assert view.startswith("step 3 of 3 (100 %), finished")
    assert "bad: learning rate: The last layer never trains" in view

    assert main(["export", run, backbone]) == 0
    assert main(["export", run, f"{backbone}.pth", "--format", "nnunet"]) == 0
    assert main(["export", run, f"{backbone}.bin", "--format", "onnx"]) == 2
    captured = capsys.readouterr()
    assert captured.out.endswith("exported: OUT, nnunet\n")
    assert "name one that ends in .onnx" in captured.err
    assert main(["embed", backbone, *scans, "--out", features]) == 0
    assert "embedded 3, already there 0, quarantined 0" in capsys.readouterr().out
    assert main(["embed", backbone, *scans, "--out", features]) == 0
    assert "embedded 0, already there 3, quarantined 0" in capsys.readouterr().out

    rows = zip(scans, labels, strict=True)
    cases = folder / "cases.csv"
    cases.write_text("scan,labels\n" + "".join(f"{scan},{label}\n" for scan, label in rows))
    probe = ["probe", str(cases), "--backbone", backbone, "--folds", "3", "--out", f"{run}-probe"]
    assert main([*probe, "--backbone", "untrained=random:debug", "intensity"]) == 0
    table = capsys.readouterr().out
    assert "| score" in table
    assert "| untrained" in table
    assert "minus rival, paired over patients" in table
    assert "3 folds over patients." in table
    assert "encoded 9; see report.html" in table
    assert main([*probe, "--shots", "1"]) == 0
    assert "encoded 0; see report.html" in capsys.readouterr().out

    assert main(["doctor"]) == 0
    assert re.search(r"^inflate +(libdeflate|zlib-ng) [0-9]", capsys.readouterr().out, re.M)

    # What was written holds no path, hence no patient's name.
    for path in tmp_path.rglob("*"):
        assert CANARY not in path.name
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()


def test_a_dry_run_prints_the_plan_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "debug", str(tmp_path / "store"), "--out", str(tmp_path / "run"), *TINY]
    command += ["--train.group_size", "1"]
    assert main([*command, "--dry-run", "--world", "2"]) == 0
    assert "its groups can be dealt out to 1, 2, 4\n" in capsys.readouterr().out
    assert main([*command, "--dry-run", "--json", "--distill", str(tmp_path / "large")]) == 0
    made = json.loads(capsys.readouterr().out)
    assert ["--distill" in part for part in made["not_planned"]] == [True]
    assert (made["world"], made["steps"], made["legal_worlds"]) == (1, 3, [1, 2, 4])
    assert main([*command, "--dry-run", "--world", "3"]) == 2
    assert "3 processes cannot share" in capsys.readouterr().err
    assert main([*command, "--world", "2"]) == 2
    assert "go with --dry-run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_demo_writes_one_report_for_synthetic_and_for_given_scans(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = dataclasses.replace(
        recipes.debug(),
        crops=CropConfig(extent_mm_zyx=(60.0, 200.0, 200.0)),
        vit=VitConfig(dim=64, depth=1, image_zyx=(8, 64, 64), layer_scale=0.1, drop_path=0.0),
        heads=HeadsConfig(dino=HeadConfig(num_prototypes=32, hidden_dim=64), ibot=None),
        train=TrainConfig(num_steps=2, batch_size=4, group_size=4, checkpoint_every=2, log_every=1),
    )
    monkeypatch.setattr(recipes, "debug", lambda: tiny)
    for name in ("NUM_TRAIN", "NUM_FIT", "NUM_TEST"):
        monkeypatch.setattr(demo, name, 2)
    monkeypatch.setattr(demo, "NUM_SHOWN", 1)
    for extra in ([], ["--ct", str(folder / "scans" / "0.nii.gz")]):
        out = tmp_path / f"demo{len(extra)}"
        assert main(["demo", "--out", str(out), *extra]) == 0
        printed = capsys.readouterr().out
        assert "right kidney" in printed
        html = (out / "report.html").read_text()
        assert html.count("data:image/png;base64,") >= 2
        assert "http" not in html.replace("http://www.w3.org", "")
        assert CANARY not in html + printed.replace(str(out), "")


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("packed") / "store"
    assert main(["pack", str(folder / "scans" / "0.nii.gz"), str(store)]) == 0
    return store


def _fails(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, str]:
    """Run a call that must fail; return its exit code and its one line."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    lines = capsys.readouterr().err.strip().splitlines()
    error = lines[-1].split("\r")[-1]
    assert all("scan/s]" in line for line in lines[:-1]), lines  # the progress bar
    assert CANARY not in error
    return code, error


def test_a_wrong_argument_is_one_line_and_exit_code_2(
    folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, store, out = str(folder / "missing.nii"), str(packed), str(tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (["packk"], "invalid choice: 'packk'"),
        (["pack"], "see tapct-fast pack --help"),
        (["pack", missing, out], "SRC does not exist"),
        (["pack", str(empty), out], "folder without scans"),
        (["embed", store, missing, missing, "--out", out], "SCAN 1 of 2 does not exist"),
        (["train", "vit-x", store, "--out", out], "recipes: debug, vit-s, vit-b"),
        (
            ["train", "debug", store, "--out", out, "--vit.dpeth", "3"],
            "unknown setting vit.dpeth; nearest is vit.depth",
        ),
        (["train", "debug", store, "--out", out, "--vit.depth"], "--vit.depth has no value"),
        (["train", "debug", store, "--out", out, "--device", "tpu"], "--device"),
        (["train", "debug", missing, "--out", out], "STORE does not exist"),
        (["train", "debug+big", store, "--out", out], "stages: continue, high-res, gram, distill"),
        (["train", "debug", store, "--out", out, "--preset", "all"], "neither auto nor a number"),
        (["train", "debug", store, "--out", out, "--preset", "0"], "fitted to GPUs and scans"),
        (["train", "debug", store, "--out", out, "--probe", missing], "--probe does not exist"),
        (
            ["train", "debug", store, "--out", out, "--probe", store, store],
            "0 --probe-labels for 2 --probe scans",
        ),
        (["watch", str(empty)], "DIR holds no run"),
        (["watch", out, "--every", "0"], "0 is not a positive number"),
        (["embed", missing, str(folder / "scans" / "0.nii.gz"), "--out", out], "hub id"),
        (["probe", missing, "--backbone", "intensity", "--out", out], "DATASET does not exist"),
        (["probe", str(folder), "--backbone", "intensity", "--out", out], "neither a folder with"),
        (["doctor", "--all"], "unrecognized arguments: --all"),
    ]
    for words, message in cases:
        code, error = _fails(capsys, words)
        assert message in error, (words[0], error)
        assert code == 2, (words[0], error)


def test_pack_takes_a_policy_and_threads_and_lists_reasons_with_codes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for i in range(2):
        shutil.copy(folder / "scans" / f"{i}.nii.gz", scans)
    (scans / "bad.nii.gz").write_bytes(b"not a scan")
    cut = (folder / "scans" / "2.nii.gz").read_bytes()[:-9]
    (scans / "cut.nii.gz").write_bytes(cut)
    write_nifti(scans / "mask.nii", np.eye(16 * 64, dtype=np.uint8).reshape(256, 64, 64), np.eye(4))

    def pack(name: str, *options: str) -> tuple[str, dict[str, str]]:
        store = tmp_path / name
        store.mkdir()
        (store / ".key").write_bytes(bytes(32))
        assert main(["pack", str(scans), str(store), *options]) == 0
        lines = (store / "quarantine.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(set(row) == {"case", "field", "reason", "code"} for row in rows)
        return capsys.readouterr().out, {row["case"]: row["code"] for row in rows}

    said, codes = pack("one", "--threads", "1")
    assert "packed 2, already there 0, quarantined 3" in said
    assert sorted(codes.values()) == ["hu", "integrity", "integrity"]
    assert pack("many", "--threads", "3", "--policy", "error") == (said, codes)
    prints = [json.loads((tmp_path / n / "index.json").read_text()) for n in ("one", "many")]
    assert prints[0] == prints[1]

    said, codes = pack("doubtful", "--policy", "warn")
    assert "packed 3, already there 0, quarantined 2" in said
    assert sorted(codes.values()) == ["integrity", "integrity"]
    records = [json.loads(p.read_text()) for p in (tmp_path / "doubtful" / "cases").glob("*.json")]
    assert [record["policy"] for record in records] == ["warn"] * 3
    doubts = [f["code"] for record in records for f in record["report"]["findings"]]
    assert doubts == ["hu"]

    code, error = _fails(capsys, ["pack", str(scans), str(tmp_path / "x"), "--threads", "0"])
    assert (code, "threads=0 is not positive" in error) == (2, True)
    assert _fails(capsys, ["pack", str(scans), str(tmp_path / "x"), "--policy", "trust"])[0] == 2


def test_unusable_data_is_one_line_and_exit_code_65(
    folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    index = json.loads((packed / "index.json").read_text())
    index["version"] = 99
    (other / "index.json").write_text(json.dumps(index))
    code, error = _fails(capsys, ["train", "debug", str(other), "--out", str(tmp_path / "run")])
    assert code == 65
    assert "version 99" in error
    assert "pack again" in error

    labels = str(folder / "labels-0.nii.gz")  # a label map is not CT
    code, error = _fails(capsys, ["demo", "--ct", labels, "--out", str(tmp_path / "demo")])
    assert code == 65
    assert "--no-check-hu" in error or "check_hu" in error

    code, error = _fails(capsys, ["pack", labels, str(tmp_path / "store")])
    assert code == 65
    assert "no input could be used" in error
    row = json.loads((tmp_path / "store" / "quarantine.jsonl").read_text())
    assert "HU" in row["reason"]

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    scan = str(folder / "scans" / "0.nii.gz")
    code, error = _fails(capsys, ["embed", str(weights), scan, "--out", str(tmp_path / "e")])
    assert code == 65


def test_bench_is_forwarded_to_the_repository_from_any_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--help"]) == 0
    assert "rooflines" in capfd.readouterr().out
    assert main(["bench", "compare", "a", "b"]) == 2
    assert "'a' is no row file, no folder and no git revision" in capfd.readouterr().err

    # An installed package without its repository, outside of one.
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "tapct_fast" / "cli.py"))
    assert main(["bench", "list"]) == 2
    assert "clone the repository" in capfd.readouterr().err


def test_a_run_starts_from_the_backbone_of_another_and_a_run_from_that(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, backbone, second, third = (str(tmp_path / n) for n in ("first", "bb", "second", "third"))
    train = ["train", "debug", str(packed), "--device", "cpu", *TINY]
    assert main([*train, "--out", first]) == 0
    assert main(["export", first, backbone]) == 0
    continued = ["train", "debug+continue", *train[2:], "--vit.image_zyx", "8,32,64"]
    assert main([*continued, "--out", second, "--start", backbone]) == 0
    assert "positions are resized from (2, 8, 8) to (2, 4, 8) tokens" in capsys.readouterr().err
    assert main([*train, "--vit.image_zyx", "8,32,64", "--out", third, "--start", second]) == 0
    code, error = _fails(capsys, [*train, "--out", f"{third}x", "--start", str(tmp_path / "none")])
    assert (code, "neither a folder" in error) == (2, True)


@pytest.mark.parametrize(("preset", "num_gpus"), [("auto", 1), ("2", 2)])
def test_a_preset_fits_the_recipe_to_store_and_gpus_and_settings_come_last(
    packed: Path, tmp_path: Path, preset: str, num_gpus: int
) -> None:
    train = ["train", "debug", str(packed), "--out", str(tmp_path), "--device", "cpu"]
    settings = [*TINY, "--train.accumulate", "1"]  # that of the preset is for its larger batch
    assert main([*train, "--preset", preset, *settings]) == 0
    fitted = recipes.recipe("debug", fit=recipes.Fit(num_gpus, num_scans=1))
    assert fitted.schedule != recipes.debug().schedule
    expected = recipes.override(fitted, cli._overrides(settings))
    assert from_json(Config, (tmp_path / "config.json").read_text()) == expected


def test_a_preset_counts_the_gpus_that_torchrun_started(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = argparse.Namespace(preset="auto", store=packed, device="cpu")
    assert cli._fit(args) == recipes.Fit(num_gpus=4, num_scans=1)


def test_help_of_each_verb_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {
        "demo": "--ct PATH",
        "pack": "SRC [SRC ...] DST",
        "locate": "STORE CASE SRC",
        "train": "--schedule.base_lr",
        "replay": "RUN STORE",
        "watch": "[--once] [--json] DIR",
        "export": "RUN OUT",
        "check": "[--slices N] [--json FILE]",
        "embed": "BACKBONE SCAN",
        "probe": "--backbone B [B ...]",
        "doctor": "usage: tapct-fast doctor",
    }
    for verb, words in wanted.items():
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert words in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    page = capsys.readouterr().out
    assert all(verb in page for verb in wanted)


def test_importing_costs_little_beyond_torch_and_help_does_not_wait_for_it() -> None:
    script = (
        "import sys, time; start = time.perf_counter(); import tapct_fast;"
        "spent = time.perf_counter() - start; import tapct_fast.cli;"
        "print(spent, 'torch' in sys.modules)"
    )
    spent, has_torch = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert float(spent) < 0.2
    assert has_torch == "False"


def test_written_weights_are_safetensors(packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "debug", str(packed), "--out", str(run), "--device", "cpu", *TINY]) == 0
    files = [p for p in run.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl", ".html"}
    (student,) = run.glob("checkpoints/step-00000003/student.safetensors")
    with safe_open(student, framework="np") as tensors:
        assert "backbone.cls_token" in tensors.keys()  # noqa: SIM118  # not a mapping

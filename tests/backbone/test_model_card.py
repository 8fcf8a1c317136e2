"""The model card: a header that the hub reads, what the run says, and nothing invented."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tapct_fast import recipes
from tapct_fast.backbone.describe import stated_license
from tapct_fast.backbone.export import export_backbone
from tapct_fast.backbone.load import find_files, load_backbone, load_preprocess
from tapct_fast.backbone.model_card import Statement, is_untouched
from tapct_fast.cli import main
from tapct_fast.data.phantom import make_phantom
from tapct_fast.errors import CheckpointError, FormatError, InputError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack
from tapct_fast.train.loop import train

CANARY = "DOE_JANE_19700101"  # stands for a patient's name in a path
SMALL = {
    "train.num_steps": "4",
    "train.batch_size": "4",
    "train.group_size": "4",
    "train.checkpoint_every": "2",
    "vit.dim": "64",
    "vit.depth": "1",
    "heads.dino.num_prototypes": "32",
    "heads.ibot": "none",
    "views.local_views.num": "2",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("card") / CANARY
    root.mkdir()
    for i in range(2):
        volume = make_phantom(1, i, shape_zyx=(16, 64, 64), spacing_mm=(12.0, 5.5, 5.5)).volume
        write_nifti(root / f"{i}.nii.gz", volume.hu_ZYX, volume.affine)
    pack([root / "0.nii.gz", root / "1.nii.gz"], root / "store")
    config = recipes.override(recipes.debug(), SMALL)
    train(config, root / "store", root / "run", device="cpu", track=[])
    return root / "run"


def header_of(card: Path) -> dict[str, object]:
    front = re.match(r"---\n(.*?)\n---\n", card.read_text(), re.DOTALL)
    assert front is not None
    found = yaml.safe_load(front[1])
    assert isinstance(found, dict)
    return found


def test_the_hub_reads_the_header(run: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the hub's reader is not installed")
    said = Statement(license="cc-by-nc-4.0", base_model="fomofo/tap-ct-b-3d")
    card = export_backbone(run, tmp_path / "out", statement=said) / "README.md"
    data = hub.ModelCard.load(card, ignore_metadata_errors=False).data
    assert isinstance(data, hub.ModelCardData)
    assert data.license == "cc-by-nc-4.0"
    assert data.library_name == "tapct-fast"
    assert data.pipeline_tag == "image-feature-extraction"
    assert data.tags == ["ct", "dinov2", "3d", "medical"]
    assert data.base_model == "fomofo/tap-ct-b-3d"
    assert header_of(card) == data.to_dict()


def test_the_card_says_what_files_and_run_say(run: Path, tmp_path: Path) -> None:
    out = export_backbone(run, tmp_path / "out")
    text = (out / "README.md").read_text()
    preprocess = load_preprocess(out)
    (low, high), hu = preprocess.hu.clip, preprocess.hu
    pad = preprocess.pad_hu
    num = sum(p.numel() for p in load_backbone(out).vit.parameters())
    for line in (
        f"| parameters | {num:,} |",
        "| resize in plane | to 64 x 64 pixels (y, x), bilinear, antialiased; slices stay |",
        f"| pad at the end | with {pad:g} HU, to multiples of 4 x 8 x 8 voxels (z, y, x) |",
        f"| clip | {low:g} to {high:g} HU |",
        f"| mean, standard deviation | {hu.mean:g}, {hu.std:g} HU |",
        "| scans | 2 |",
        "| steps | 4 of 4 |",
        "| batch | 4 samples |",
    ):
        assert line in text
    for name in ("model.safetensors", "config.json", "preprocessor.json"):
        digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
        assert f"| {name} | sha256 `{digest}` |" in text
    manifest = json.loads((run / "checkpoints/step-00000004/manifest.json").read_text())
    assert manifest["files"]["teacher.safetensors"]["sha256"] in text
    assert text.isascii()
    assert CANARY not in text
    assert not re.search(r"(^|[\s`\"(])/\w", text)
    assert "Nothing was measured" in text


def test_a_checkpoint_without_its_run_says_that_the_scans_are_not_recorded(
    run: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints" / alone.name, alone)
    text = (export_backbone(alone, tmp_path / "out") / "README.md").read_text()
    assert "| scans | not recorded |" in text
    assert "| steps | 2 of 4 |" in text


def test_a_damaged_state_is_no_card(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints" / alone.name, alone)
    (alone / "state.json").write_text('{"step": 3}')
    with pytest.raises(CheckpointError, match=r"damaged: state\.json"):
        export_backbone(alone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_licence_is_called_unknown_and_check_shows_a_stated_one(
    run: Path, tmp_path: Path
) -> None:
    out = export_backbone(run, tmp_path / "out")
    assert header_of(out / "README.md")["license"] == "unknown"
    assert "state it before you share" in (out / "README.md").read_text()
    assert stated_license(find_files(out)) is None
    export_backbone(run, out, statement=Statement(license="apache-2.0"))
    assert "state it before" not in (out / "README.md").read_text()
    assert stated_license(find_files(out)) == "apache-2.0 (README.md)"


def test_the_code_of_the_card_runs_on_the_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export_backbone(run, tmp_path / "FOLDER")
    volume = make_phantom(1, 0, shape_zyx=(16, 64, 64), spacing_mm=(12.0, 5.5, 5.5)).volume
    write_nifti(tmp_path / "scan.nii.gz", volume.hu_ZYX, volume.affine)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    features = names["features"]
    assert torch.isfinite(features.patches_ZYXC).all()
    assert features.patches_ZYXC.shape == (4, 8, 8, 64)


def test_measured_numbers_come_from_the_probe_of_the_run(run: Path, tmp_path: Path) -> None:
    rows = [
        {"step": 2, "linear": 0.51, "linear_low": 0.4, "linear_high": 0.6, "knn": 0.3},
        {"step": 3, "error": "no labels"},
        {"step": 6, "linear": 0.9, "linear_low": 0.8, "linear_high": 0.95, "knn": 0.9},
    ]
    probe = tmp_path / "probe.jsonl"
    probe.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lin')
    out = export_backbone(run, tmp_path / "out", statement=Statement(probe=probe))
    text = (out / "README.md").read_text()
    assert (
        "| Dice, linear head | 0.510 | 0.400 to 0.600 |" in text
    )  # of step 2: that of 6 is of later weights
    assert "| Dice, kNN | 0.300 | none |" in text
    assert "0.9" not in text.partition("## Measured")[2].partition("## Limits")[0]
    with pytest.raises(FormatError, match="a run scores its teacher"):
        export_backbone(run, tmp_path / "s", which="student", statement=Statement(probe=probe))
    probe.write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(FormatError, match="no score of step 4 or before"):
        export_backbone(run, tmp_path / "other", statement=Statement(probe=probe))
    assert not (tmp_path / "other").exists()


def test_scores_of_an_evaluation_are_those_of_this_backbone(run: Path, tmp_path: Path) -> None:
    out = export_backbone(run, tmp_path / "out")
    scores = [
        {"name": "dice", "value": 0.5, "low": 0.25, "high": 0.75},
        {"name": "x | <b>y</b>", "value": 0.125, "low": None, "high": None},
        {"name": "hd95 mm", "value": None, "low": None, "high": None},
    ]
    rival = {"name": "rival", "fingerprint": "0" * 64, "scores": [{**scores[0], "value": 0.875}]}
    ours = {"name": "a", "fingerprint": load_backbone(out).fingerprint(), "scores": scores}
    probe = tmp_path / "probe.json"
    content = {"format": "tapct-probe", "version": 1, "task": "segmentation", "num_scans": 12}
    content |= {"num_patients": 9, "results": [rival, ours]}
    probe.write_text(json.dumps(content))
    text = (export_backbone(run, out, statement=Statement(probe=probe)) / "README.md").read_text()
    assert "in segmentation, on 12 held-out scans of 9 patients" in text
    assert "| dice | 0.500 | 0.250 to 0.750 |" in text
    assert "| x ? ?b?y?/b? | 0.125 | none |" in text
    assert "0.875" not in text
    assert "hd95" not in text
    for odd, message in (({"results": [rival]}, "no score of this"), ({"results": 3}, "damaged")):
        probe.write_text(json.dumps(content | odd))
        with pytest.raises(FormatError, match=message):
            export_backbone(run, out, statement=Statement(probe=probe))


def test_a_card_that_was_edited_is_not_replaced(run: Path, tmp_path: Path) -> None:
    out = export_backbone(run, tmp_path / "out")
    first = (out / "README.md").read_bytes()
    assert is_untouched(out / "README.md")
    export_backbone(run, out)
    assert (out / "README.md").read_bytes() == first
    edited = first.replace(b"license: unknown", b"license: mit")
    (out / "README.md").write_bytes(edited)
    with pytest.raises(InputError, match="was edited"):
        export_backbone(run, out)
    assert (out / "README.md").read_bytes() == edited


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--license", "my own\nlicense"], "--license is no identifier"),
        (["--license", "mit: true"], "--license is no identifier"),
        (["--base-model", "../weights"], "--base-model is no hub id"),
        (["--probe", "missing.jsonl"], "--probe is no file"),
        (["--license", "mit", "--format", "onnx"], "are for the card of --format folder"),
    ],
)
def test_what_the_header_cannot_hold_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_line_asks_for_the_licence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "licence of the weights is unknown" in capsys.readouterr().out
    assert main(["export", str(run), str(tmp_path / "out"), "--license", "other"]) == 0
    assert "unknown" not in capsys.readouterr().out
    assert header_of(tmp_path / "out" / "README.md")["license"] == "other"


def test_a_run_that_started_from_other_weights_says_so(run: Path, tmp_path: Path) -> None:
    backbone = export_backbone(run, tmp_path / "backbone")
    config = recipes.override(recipes.debug(), SMALL | {"train.num_steps": "2"})
    second = tmp_path / "second"
    train(config, run.parent / "store", second, start=backbone, device="cpu", track=[])
    digest = hashlib.sha256((backbone / "model.safetensors").read_bytes()).hexdigest()
    text = (export_backbone(second, tmp_path / "out") / "README.md").read_text()
    assert f"weights of sha256 `{digest}` (name them as base_model" in text
    assert "base_model:" not in text
    said = Statement(base_model="owner/name")
    text = (export_backbone(second, tmp_path / "out", statement=said) / "README.md").read_text()
    assert f"weights of sha256 `{digest}` (owner/name)" in text

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tapct_fast.backbone.export import export_backbone, read_teacher, save_backbone
from tapct_fast.backbone.load import load_backbone
from tapct_fast.config import Config, HeadConfig, HeadsConfig, HuConfig, VitConfig
from tapct_fast.errors import CheckpointError, InputError
from tapct_fast.recipes import debug
from tapct_fast.ssl.method import DinoMethod
from tapct_fast.ssl.param_groups import build_optimizer, param_groups
from tapct_fast.train.checkpoint import Run
from tapct_fast.train.checkpoint_writer import save
from tapct_fast.train.guard import start_guard

HEAD = HeadConfig(num_prototypes=8, bottleneck_dim=8, hidden_dim=16)


def make_run(seed: int) -> Run:
    config = dataclasses.replace(
        debug(),
        vit=VitConfig(
            dim=64, depth=2, head_dim=32, image_zyx=(8, 64, 64), num_registers=2, ffn="swiglu"
        ),
        heads=HeadsConfig(dino=HEAD, ibot=None),
        hu=HuConfig(clip=(-1000.0, 500.0), mean=-90.0, std=300.0),
    )
    method = DinoMethod(config.vit, config.heads, config.losses, hu=config.hu, seed=seed)
    with torch.no_grad():  # so that teacher and student differ
        for parameter in method.teacher.parameters():
            parameter.add_(0.25)
    groups = param_groups(method.student, depth=config.vit.depth, config=config.optim)
    optimizer, guard = build_optimizer(groups, config.optim), start_guard(2, "cpu")
    return Run(method, optimizer, config, "store", "cpu fp32", guard)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (1, 2):
        save(make_run(step), tmp_path / "run", step)
    return tmp_path / "run"


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_the_export_computes_what_the_run_computed(
    run_dir: Path, tmp_path: Path, which: str
) -> None:
    out = export_backbone(run_dir, tmp_path / "new" / "out", which=which)
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessor.json",
        "preprocessor_config.json",
        "README.md",
    }
    backbone = load_backbone(out, precision="fp32")
    run = make_run(2)
    assert backbone.vit.config == run.config.vit  # 32-wide heads are in the config, not the tensors
    assert backbone.preprocess.hu == run.config.hu
    assert backbone.preprocess.resize_yx == (64, 64)
    x_BCZYX = torch.randint(-1000, 1000, (1, 1, 8, 64, 64), dtype=torch.int16)
    networks = run.method.teacher if which == "teacher" else run.method.student
    with torch.no_grad():
        expected = networks.backbone(x_BCZYX)
        out_B = backbone(x_BCZYX)
    # For inference LayerScale is inside the weights: the last digits differ, a thousandfold where a
    # cls token as it starts is normed, nearly a constant.
    close = functools.partial(torch.testing.assert_close, atol=1e-3, rtol=1e-3)
    close(out_B.last_hidden_state, expected.patches_BLD)
    close(out_B.pooler_output, expected.cls_BD)


def test_saving_a_loaded_backbone_changes_nothing(run_dir: Path, tmp_path: Path) -> None:
    first = export_backbone(run_dir, tmp_path / "first")
    backbone = load_backbone(first)
    second = save_backbone(backbone, tmp_path / "second")
    assert load_backbone(second).fingerprint() == backbone.fingerprint()
    for name in ("model.safetensors", "config.json", "preprocessor.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_teacher_that_is_read_is_the_one_that_would_be_exported(
    run_dir: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    read = read_teacher(run_dir, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    exported = load_backbone(export_backbone(run_dir, tmp_path / "out"))
    assert read.fingerprint() == exported.fingerprint()
    assert read.preprocess == exported.preprocess
    assert read.precision == exported.precision
    assert not read.training


def test_one_checkpoint_folder_can_be_named(run_dir: Path, tmp_path: Path) -> None:
    step = run_dir / "checkpoints" / "step-00000001"
    backbone = load_backbone(export_backbone(step, tmp_path / "out"))
    expected = make_run(1).method.teacher.backbone.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in backbone.vit.state_dict().items())


@pytest.mark.parametrize("name", ["teacher.safetensors", "config.json", "manifest.json"])
def test_a_flipped_bit_takes_the_checkpoint_before_and_says_so(
    run_dir: Path, tmp_path: Path, name: str
) -> None:
    path = run_dir / "checkpoints" / "step-00000002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"read step-00000001; step-00000002: damaged"):
        out = export_backbone(run_dir, tmp_path / "out")
    expected = make_run(1).method.teacher.backbone.state_dict()
    state = load_backbone(out).vit.state_dict()
    assert torch.equal(state["norm.weight"], expected["norm.weight"])
    with pytest.raises(CheckpointError, match="damaged"):
        export_backbone(path.parent, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_no_intact_checkpoint_is_an_error(run_dir: Path, tmp_path: Path) -> None:
    for step in (run_dir / "checkpoints").glob("step-*"):
        (step / "teacher.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact.*teacher\.safetensors"):
        export_backbone(run_dir, tmp_path / "out")


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        export_backbone(tmp_path, tmp_path / "out")


def test_a_checkpoint_of_another_version_is_refused(run_dir: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "step-00000001")
    path = run_dir / "checkpoints" / "step-00000002" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))
    with pytest.raises(CheckpointError, match="another version"):
        export_backbone(run_dir, tmp_path / "out")


def test_other_files_in_the_output_folder_are_safe(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="other files"):
        export_backbone(run_dir, out)
    assert (out / "thesis.tex").read_text() == "years"
    (out / "thesis.tex").unlink()
    export_backbone(run_dir, out)
    export_backbone(run_dir, out)  # a backbone is replaced


def test_loading_a_backbone_needs_no_training_code() -> None:
    code = (
        "import sys, tapct_fast.backbone.export, tapct_fast.downstream.probe;"
        "print([m for m in sys.modules if m.startswith(('tapct_fast.train', 'tapct_fast.ssl'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_exported_config_is_no_training_config(run_dir: Path, tmp_path: Path) -> None:
    out = export_backbone(run_dir, tmp_path / "out")
    raw = json.loads((out / "config.json").read_text())
    assert raw["format"] == "tapct-backbone"
    assert set(raw["vit"]) == set(VitConfig.__dataclass_fields__)
    assert "train" not in raw
    assert "train" in Config.__dataclass_fields__

"""Checkpoints: what is written comes back bit for bit; damage is seen before a weight is used."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_case import assert_equal, run_of, stepped_run, tensors, with_centers

from tapct_fast.config import Config
from tapct_fast.errors import CheckpointError, TrainError
from tapct_fast.train.checkpoint import load_latest, pointed_to, verify
from tapct_fast.train.checkpoint_writer import save

FILES = {
    "student.safetensors",
    "teacher.safetensors",
    "optimizer.safetensors",
    "config.json",
    "state.json",
    "manifest.json",
}


@pytest.fixture
def config(tiny_config: Config) -> Config:
    return with_centers(tiny_config)


def test_weights_optimizer_and_centers_come_back_bit_for_bit(
    config: Config, tmp_path: Path
) -> None:
    run, fresh, lines = stepped_run(config), run_of(config, seed=1), []
    folder = save(run, tmp_path, 100)
    assert folder == tmp_path / "checkpoints" / "step-00000100"
    assert {path.name for path in folder.iterdir()} == FILES
    assert load_latest(fresh, tmp_path, notify=lines.append) == 100
    assert_equal(tensors(run), tensors(fresh))
    assert lines == []
    for r in (run, fresh):  # and the next update is the same too
        for parameter in r.method.student.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        for group in r.optimizer.param_groups:
            group["lr"] = 0.1
        r.optimizer.step()
    assert_equal(tensors(run), tensors(fresh))


def test_files_have_the_documented_names(config: Config, tmp_path: Path) -> None:
    folder = save(stepped_run(config), tmp_path, 1)
    student, teacher = (
        set(safetensors.torch.load_file(folder / f"{kind}.safetensors"))
        for kind in ("student", "teacher")
    )
    assert {name.split(".")[0] for name in student} == {"backbone", "dino_head", "ibot_head"}
    assert teacher - student == {"dino_center.center_P", "ibot_center.center_P"}
    assert "backbone.patch_embed.proj.weight" in student
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["store"]) == (1, "store")


def test_no_checkpoint_means_step_zero(config: Config, tmp_path: Path) -> None:
    run = run_of(config)
    before = tensors(run)
    assert load_latest(run, tmp_path / "absent", notify=pytest.fail) == 0
    assert_equal(before, tensors(run))


def test_the_oldest_checkpoints_are_removed(config: Config, tmp_path: Path) -> None:
    run = run_of(config)
    for step in range(1, 6):
        save(run, tmp_path, step)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest.json", *(f"step-{step:08d}" for step in (3, 4, 5))]


def test_every_flipped_bit_is_found(config: Config, tmp_path: Path) -> None:
    folder = save(stepped_run(config), tmp_path, 1)
    draw = random.Random(0)
    for path in sorted(folder.iterdir()):
        data = bytearray(path.read_bytes())
        for _ in range(200 // len(FILES) + 1):
            at, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
            data[at] ^= bit
            path.write_bytes(data)
            with pytest.raises(CheckpointError):
                verify(folder)
            data[at] ^= bit
        path.write_bytes(data)
    verify(folder)


def test_every_truncation_is_found(config: Config, tmp_path: Path) -> None:
    folder = save(stepped_run(config), tmp_path, 1)
    draw = random.Random(1)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for size in [0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(9))]:
            # The manifest's last byte is a newline: JSON without it is the same manifest.
            if (path.name, size) == ("manifest.json", len(data) - 1):
                continue
            path.write_bytes(data[:size])
            with pytest.raises(CheckpointError):
                verify(folder)
        path.write_bytes(data)
    verify(folder)


def remove_file(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def add_file(folder: Path) -> None:
    (folder / "more.safetensors").write_bytes(b"")


def swap_files(folder: Path) -> None:
    student, teacher = folder / "student.safetensors", folder / "teacher.safetensors"
    student.rename(folder / "x")
    teacher.rename(student)
    (folder / "x").rename(teacher)


def take_file_of_another_step(folder: Path) -> None:
    other = folder.parent / "step-00000001" / "optimizer.safetensors"
    shutil.copy(other, folder / "optimizer.safetensors")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_file, "optimizer.safetensors is missing"),
        (remove_manifest, "no manifest.json"),
        (add_file, "more.safetensors is not listed"),
        (swap_files, "another size"),
        (take_file_of_another_step, "another sha256"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    config: Config, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    old, lines = stepped_run(config, seed=1), []
    save(old, tmp_path, 1)
    damage(save(stepped_run(config, seed=2), tmp_path, 2))
    run = run_of(config)
    assert load_latest(run, tmp_path, notify=lines.append) == 1
    assert_equal(tensors(run), tensors(old))
    assert len(lines) == 1
    assert "step-00000002 is damaged" in lines[0]
    assert reason in lines[0]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest.json", "step-00000001", "step-00000002.damaged"}
    assert pointed_to(tmp_path) == "step-00000001"


def test_without_an_intact_checkpoint_a_run_does_not_silently_start_again(
    config: Config, tmp_path: Path
) -> None:
    remove_file(save(run_of(config), tmp_path, 1))
    for _ in range(2):  # the refusal does not remove its own reason
        with pytest.raises(CheckpointError, match="none of 1 checkpoints passes"):
            load_latest(run_of(config), tmp_path, notify=lambda _: None)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.num_steps", 7, "train.num_steps = 6, now it is 7"),
        ("losses.koleo_weight", 0.2, "losses.koleo_weight = 0.1, now it is 0.2"),
        ("vit.depth", 3, "vit.depth = 2, now it is 3"),
        ("heads.ibot", None, "heads.ibot.* = .*; give the old setting"),
    ],
)
def test_another_config_is_refused_by_the_first_setting_that_differs(
    config: Config, tmp_path: Path, path: str, value: object, message: str
) -> None:
    save(run_of(config), tmp_path, 1)
    group, name = path.split(".")
    node = dataclasses.replace(getattr(config, group), **{name: value})
    other = run_of(dataclasses.replace(config, **{group: node}))
    before = tensors(other)
    with pytest.raises(CheckpointError, match=message):
        load_latest(other, tmp_path, notify=pytest.fail)
    assert_equal(before, tensors(other))


def test_another_store_is_refused(config: Config, tmp_path: Path) -> None:
    save(run_of(config), tmp_path, 1)
    with pytest.raises(CheckpointError, match="another store"):
        load_latest(run_of(config, fingerprint="def"), tmp_path, notify=pytest.fail)


def test_another_backend_is_announced(config: Config, tmp_path: Path) -> None:
    save(run_of(config), tmp_path, 1)
    lines: list[str] = []
    other = run_of(config)._replace(backend="cuda bfloat16")
    assert load_latest(other, tmp_path, notify=lines.append) == 1
    assert lines == ["resuming, but not bit for bit: backend cpu float32 -> cuda bfloat16"]


def test_a_resume_may_compute_the_logits_anew_and_says_so(config: Config, tmp_path: Path) -> None:
    save(run_of(config), tmp_path, 1)
    losses = dataclasses.replace(config.losses, recompute_ibot_logits=True)
    lines: list[str] = []
    other = run_of(dataclasses.replace(config, losses=losses))
    assert load_latest(other, tmp_path, notify=lines.append) == 1
    assert lines == ["resuming, but not bit for bit: losses.recompute_ibot_logits False -> True"]


def test_a_checkpoint_of_a_later_release_is_refused_and_left_alone(
    config: Config, tmp_path: Path
) -> None:
    save(run_of(config), tmp_path, 1)
    manifest = save(run_of(config), tmp_path, 2) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 3}))
    with pytest.raises(CheckpointError, match="checkpoint version 3; this tapct_fast reads 2"):
        load_latest(run_of(config), tmp_path, notify=pytest.fail)
    assert manifest.exists()


def test_a_state_that_is_not_finite_is_never_written(config: Config, tmp_path: Path) -> None:
    run = stepped_run(config)
    save(run, tmp_path, 1)
    weight = run.method.student.backbone.norm.weight
    run.optimizer.state[weight]["exp_avg_sq"][0] = torch.inf
    with pytest.raises(TrainError, match=r"optimizer backbone.norm.weight.exp_avg_sq"):
        save(run, tmp_path, 2)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest.json", "step-00000001"}


def test_a_folder_that_cannot_be_written_is_one_clear_error(config: Config, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match=r"step 1 cannot be written: .*same command") as error:
        save(run_of(config), tmp_path, 1)
    assert error.value.exit_code == 74


def test_leftovers_of_a_killed_save_are_removed(config: Config, tmp_path: Path) -> None:
    folder = save(run_of(config), tmp_path, 1)
    leftover = folder.parent / ".step-00000002.1a2b3c4d.tmp"
    leftover.mkdir()
    (leftover / "student.safetensors").write_bytes(b"half")
    assert load_latest(run_of(config), tmp_path, notify=pytest.fail) == 1
    assert not leftover.exists()


def test_a_rank_that_is_not_the_first_changes_no_file(config: Config, tmp_path: Path) -> None:
    run, lines = stepped_run(config), []
    save(run, tmp_path, 1)
    save(run, tmp_path, 2)
    remove_file(save(run, tmp_path, 3))
    (tmp_path / "checkpoints" / ".step-00000004.1a2b3c4d.tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    other = run_of(config)
    assert load_latest(other, tmp_path, notify=lines.append, rank=1) == 2
    assert load_latest(other, tmp_path, notify=lines.append, rank=1, at_most=1) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert_equal(tensors(other), tensors(run))
    assert load_latest(other, tmp_path, notify=lines.append, at_most=1) == 1
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest.json", "step-00000001"}
    assert pointed_to(tmp_path) == "step-00000001"


def test_a_run_that_goes_back_keeps_its_memory_and_forgets_later_moments(
    config: Config, tmp_path: Path
) -> None:
    run = stepped_run(config)
    save(run, tmp_path, 1)
    expected = tensors(run)
    for parameter in run.method.student.parameters():  # the mask token too, for the first time
        parameter.grad = torch.full_like(parameter, 0.3)
    run.optimizer.step()
    before = {t.data_ptr() for state in run.optimizer.state.values() for t in state.values()}
    assert load_latest(run, tmp_path, notify=pytest.fail) == 1
    assert_equal(tensors(run), expected)
    after = {t.data_ptr() for state in run.optimizer.state.values() for t in state.values()}
    assert after < before
    assert len(before) - len(after) == 3  # of the mask token

"""Gram anchoring and distillation in whole runs: what they change, and exact resumes."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_case import do_step, engine_of, kept_rows, random_batch, rows, run_of

from tapct_fast.config import Config, GramConfig
from tapct_fast.errors import CheckpointError
from tapct_fast.ssl.gram import gram_loss
from tapct_fast.ssl.schedules import StepValues
from tapct_fast.train.anchor import make_anchor
from tapct_fast.train.loop import train
from tapct_fast.train.step import MicroBatch, train_step

TEACHER = Path("checkpoints", "step-00000006", "teacher.safetensors")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def anchored(tiny_config: Config) -> Config:
    gram = GramConfig(weight=1.5, start_step=2, refresh_every=2, max_refreshes=1, scale=1.0)
    return dataclasses.replace(tiny_config, gram=gram)


def test_the_gram_loss_is_that_of_all_patch_tokens_and_joins_the_total(anchored: Config) -> None:
    run = run_of(anchored)
    method = run.method
    method.anchor = make_anchor(anchored)
    method.anchor.refresh(method.teacher.backbone, 2)
    with torch.no_grad():  # else both are the same network
        for parameter in method.student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    batch = random_batch(1)
    kept = kept_rows(anchored, batch, 1)
    x_NCZYX = batch.global_VBZYX.flatten(0, 1).unsqueeze(1)
    with torch.no_grad():
        seen = method.student.backbone(x_NCZYX, mask_BL=batch.mask_NL, kept_S2N=kept.global_S2N)
        expected = gram_loss(seen.patches_BLD, method.anchor.backbone(x_NCZYX).patches_BLD)
    engine = engine_of(run)
    values = StepValues(0.0, 0.0, 0.0, 1.0, 0.05)  # nothing moves
    batches = [MicroBatch(batch, kept)]
    plain, with_gram = (
        train_step(run, batches, values, engine, is_anchored=is_anchored).read().losses
        for is_anchored in (False, True)
    )
    assert plain["gram"] == 0
    assert with_gram["gram"] == pytest.approx(expected.item(), rel=1e-5)
    assert with_gram["total"] == pytest.approx(plain["total"] + 1.5 * expected.item(), rel=1e-5)
    for name in ("dino_global", "dino_local", "ibot", "koleo"):  # the full last block, equal rows
        assert with_gram[name] == pytest.approx(plain[name], rel=1e-5)


def test_an_anchored_run_resumes_bit_for_bit_between_two_refreshes(
    anchored: Config, tiny_store: Path, tmp_path: Path
) -> None:
    train(anchored, tiny_store, tmp_path / "whole")
    log = rows(tmp_path / "whole")
    assert [row["gram"] > 0 for row in log] == [False, False, True, True, True, True]
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000006")
    train(anchored, tiny_store, tmp_path / "killed")  # the copy of step 2 anchors until step 4
    assert rows(tmp_path / "killed") == log
    assert digest(tmp_path / "killed" / TEACHER) == digest(tmp_path / "whole" / TEACHER)
    saved = load_file(tmp_path / "whole" / TEACHER)
    assert any(name.startswith("anchor.") for name in saved)


def test_a_distilled_run_learns_the_frozen_targets_and_goes_on_with_the_same_guide_only(
    tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    train(tiny_config, tiny_store, tmp_path / "large")
    small = dataclasses.replace(
        tiny_config, vit=dataclasses.replace(tiny_config.vit, depth=1, drop_path=0.0)
    )
    guide = tmp_path / "large"
    train(small, tiny_store, tmp_path / "small", distill=guide)
    teacher = load_file(tmp_path / "small" / TEACHER)
    assert not any("blocks.1." in name for name in teacher)  # its own average, not the guide
    log = rows(tmp_path / "small")
    shutil.rmtree(tmp_path / "small" / "checkpoints" / "step-00000006")
    train(small, tiny_store, tmp_path / "small", distill=guide)
    assert rows(tmp_path / "small") == log
    with pytest.raises(CheckpointError, match="give the same --distill"):
        train(small, tiny_store, tmp_path / "small")


def test_a_guide_gives_the_targets_and_leaves_the_student_unmasked(tiny_config: Config) -> None:
    guide = run_of(tiny_config, seed=9).method.teacher
    run = run_of(tiny_config)
    run.method.guide = guide
    batch = random_batch(1)
    unmasked = batch._replace(mask_NL=torch.zeros_like(batch.mask_NL))
    values = StepValues(0.0, 0.0, 0.0, 1.0, 0.05)
    guided = do_step(run, [MicroBatch(batch, None)], values).losses
    assert do_step(run, [MicroBatch(unmasked, None)], values).losses == guided
    with torch.no_grad():
        wanted = run.method.targets([guide.encode_teacher(batch)], 0.05).of_micro_batches[0]
        losses, _ = run.method.student_losses(unmasked, wanted)
    assert guided["total"] == pytest.approx(losses.total.item(), rel=1e-6)

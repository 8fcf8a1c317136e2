"""Fresh runs that start from other weights: what arrives, what is resized, what is refused."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from with_timm import import_timm

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.export import export_backbone, save_backbone
from tapct_fast.backbone.load import default_preprocess, load_backbone
from tapct_fast.config import Config, HuConfig, VitConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.errors import BackboneError, CheckpointError, ConfigError, InputError
from tapct_fast.io.atomic import sha256_file
from tapct_fast.model.vit import Vit
from tapct_fast.ssl.method import DinoMethod
from tapct_fast.train.guide import load_guide
from tapct_fast.train.loop import init_method, train
from tapct_fast.train.start import read_start, start_from

STEP = Path("checkpoints", "step-00000002")


def silent(line: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {line}")


@pytest.fixture(scope="module")
def run(tiny_config: Config, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps: student, teacher and fresh weights all differ."""
    out = tmp_path_factory.mktemp("run")
    train(with_train(tiny_config, num_steps=2), tiny_store, out)
    return out


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_backbone(run, tmp_path_factory.mktemp("exported") / "backbone")


def with_train(config: Config, **settings: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


def with_vit(config: Config, **settings: Any) -> Config:
    return dataclasses.replace(config, vit=dataclasses.replace(config.vit, **settings))


def started(source: str | Path, config: Config, notify: Any = silent) -> DinoMethod:
    method = init_method(config)
    start_from(method, read_start(source, config, notify=notify))
    return method


def test_a_backbone_goes_into_student_and_teacher_and_the_heads_stay_new(
    exported: Path, run: Path, tiny_config: Config
) -> None:
    method, fresh = started(exported, tiny_config), init_method(tiny_config)
    teacher = load_file(run / STEP / "teacher.safetensors")
    for networks in (method.student, method.teacher):
        for name, tensor in networks.state_dict().items():
            untrained = fresh.student.state_dict()[name]
            expected = teacher[name] if name.startswith("backbone.") else untrained
            assert torch.equal(tensor, expected), name
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())


@pytest.mark.parametrize("place", [".", STEP])
def test_a_run_gives_its_teacher_with_the_heads(
    run: Path, tiny_config: Config, place: str | Path
) -> None:
    start = read_start(run / place, tiny_config, notify=silent)
    assert start.sha256 == sha256_file(run / STEP / "teacher.safetensors")
    method = init_method(tiny_config)
    start_from(method, start)
    teacher = load_file(run / STEP / "teacher.safetensors")
    for networks in (method.student, method.teacher):
        state = networks.state_dict()
        assert state.keys() == teacher.keys()
        assert all(torch.equal(state[name], teacher[name]) for name in teacher)


def test_the_centers_of_softmax_targets_come_with_a_run(
    tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    losses = dataclasses.replace(tiny_config.losses, centering="softmax")
    config = dataclasses.replace(with_train(tiny_config, num_steps=2), losses=losses)
    train(config, tiny_store, tmp_path)
    teacher = load_file(tmp_path / STEP / "teacher.safetensors")
    method = started(tmp_path, config)
    assert teacher["dino_center.center_P"].abs().sum() > 0
    assert torch.equal(method.dino_center.center_P, teacher["dino_center.center_P"])
    assert torch.equal(method.ibot_center.center_P, teacher["ibot_center.center_P"])
    started(tmp_path, tiny_config)  # Sinkhorn has no centers


def test_the_hash_is_that_of_the_weights_and_tells_them_apart(
    exported: Path, run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    start = read_start(exported, tiny_config, notify=silent)
    assert start.sha256 == sha256_file(exported / "model.safetensors")
    other = export_backbone(run, tmp_path / "student", which="student")
    assert read_start(other, tiny_config, notify=silent).sha256 != start.sha256


@torch.no_grad()
def test_positions_fit_another_image_and_that_is_said(exported: Path, tiny_config: Config) -> None:
    said: list[str] = []
    config = with_vit(tiny_config, image_zyx=(12, 24, 32))
    method = started(exported, config, said.append)
    assert said == ["learned positions are resized from (2, 2, 2) to (3, 3, 4) tokens"]
    x_BCZYX = torch.randn(1, 1, 12, 24, 32)
    expected = load_backbone(exported, precision="fp32")(x_BCZYX).last_hidden_state
    got = method.student.backbone(x_BCZYX).patches_BLD
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # other kernels, same numbers
    started(exported.parent / "backbone" / "model.safetensors", config, said.append)
    assert len(said) == 2


def test_a_run_can_go_on_at_another_resolution_with_its_heads(
    run: Path, tiny_config: Config
) -> None:
    said: list[str] = []
    method = started(run, with_vit(tiny_config, image_zyx=(8, 32, 32)), said.append)
    teacher = load_file(run / STEP / "teacher.safetensors")
    weight_v = "dino_head.last_layer.weight_v"
    assert torch.equal(method.student.state_dict()[weight_v], teacher[weight_v])
    assert len(said) == 1


def test_what_does_not_fit_is_refused_with_the_setting(
    exported: Path, run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    head = dataclasses.replace(tiny_config.heads.dino, num_prototypes=64)
    heads = dataclasses.replace(tiny_config.heads, dino=head)
    shared = dataclasses.replace(tiny_config.heads, ibot=None)
    hu = HuConfig(clip=(-1000.0, 1000.0))
    hu_settings = "give --hu.clip -1008.0,822.0 --hu.mean -86.8086 --hu.std 322.6347"
    cases: list[tuple[Path, Config, str]] = [
        (exported, with_vit(tiny_config, depth=3), "give --vit.depth 2"),
        (run, with_vit(tiny_config, num_registers=2), "give --vit.num_registers 4"),
        (exported, with_vit(tiny_config, patch_zyx=(2, 8, 8)), "give --vit.patch_zyx 4,8,8"),
        (exported, dataclasses.replace(tiny_config, hu=hu), hu_settings),
        (run, dataclasses.replace(tiny_config, hu=hu), hu_settings),
        (run, dataclasses.replace(tiny_config, heads=heads), "give --heads.dino.num_prototypes 32"),
        (run, dataclasses.replace(tiny_config, heads=shared), "heads.ibot must be as there"),
    ]
    for source, config, message in cases:
        with pytest.raises(ConfigError, match=re.escape(message)):
            read_start(source, config, notify=silent)
    # A backbone has no heads: those of the run are free.
    read_start(exported, dataclasses.replace(tiny_config, heads=shared), notify=silent)

    with pytest.raises(InputError, match="neither a folder"):
        read_start(tmp_path / "nothing", tiny_config, notify=silent)
    pickle = tmp_path / "weights.pth"
    pickle.write_bytes(b"cos\nsystem\n")
    with pytest.raises(BackboneError, match="a pickle, which can run code"):
        read_start(pickle, tiny_config, notify=silent)
    state = load_file(exported / "model.safetensors")
    del state["model.norm.bias"]
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(exported / "config.json", tmp_path)
    with pytest.raises(BackboneError, match=r"norm\.bias: missing"):
        read_start(tmp_path, tiny_config, notify=silent)


def test_damaged_weights_are_refused(
    exported: Path, run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    for source, name, error in (
        (exported, "model.safetensors", BackboneError),
        (run / STEP, "teacher.safetensors", CheckpointError),
    ):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(error, match="sha256"):
            read_start(folder, tiny_config, notify=silent)


def timm_vit(patch: int) -> Any:
    torch.manual_seed(5)
    model = import_timm().models.VisionTransformer(
        img_size=2 * patch, patch_size=patch, num_classes=3, embed_dim=64, depth=2, num_heads=1,
        reg_tokens=4, init_values=1.0, no_embed_class=True, global_pool="token",
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def test_one_layer_of_a_volume_constant_along_z_is_the_2d_network_on_the_slice(
    tiny_config: Config, tmp_path: Path
) -> None:
    model = timm_vit(8)
    save_file(model.state_dict(), tmp_path / "flat.safetensors")
    said: list[str] = []
    method = started(tmp_path / "flat.safetensors", tiny_config, said.append)
    assert said[0].startswith("the weights are of a 2D network: its patch embedding is inflated")
    slice_YX = torch.randn(16, 16)
    theirs = model.forward_features(slice_YX.expand(1, 3, 16, 16))  # cls, registers, patches
    out = method.student.backbone(slice_YX.expand(1, 1, 4, 16, 16).contiguous())
    ours = torch.cat([out.cls_BD[:, None], out.registers_BRD, out.patches_BLD], 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)  # float32 sums, other order


@torch.no_grad()
@pytest.mark.parametrize("patch", [8, 14])
def test_every_layer_starts_from_the_tokens_of_the_slice(
    tiny_config: Config, tmp_path: Path, patch: int
) -> None:
    """Only before the blocks: attention weighs repeated patches against one cls token."""
    model = timm_vit(patch)
    state = model.state_dict()
    save_file(state, tmp_path / "flat.safetensors")
    method = started(tmp_path / "flat.safetensors", tiny_config, lambda _: None)
    slice_YX = torch.randn(16, 16)
    tokens_TD = method.student.backbone.embed(slice_YX.expand(1, 1, 8, 16, 16).contiguous())[0]
    kernel = state["patch_embed.proj.weight"].double().numpy().sum(1)
    if patch != 8:
        resize = resize_matrix(patch, 8)
        whole = np.linalg.pinv(np.kron(resize, resize).T)  # of all 196 pixels at once
        kernel = (kernel.reshape(64, -1) @ whole.T).reshape(64, 8, 8)
    cut = slice_YX.double().numpy().reshape(2, 8, 2, 8)
    layer = np.einsum("aybx,dyx->abd", cut, kernel).reshape(4, 64)
    layer += state["patch_embed.proj.bias"].double().numpy()
    layer += state["pos_embed"][0].double().numpy()
    expected = np.concatenate([layer, layer])
    np.testing.assert_allclose(tokens_TD[5:].numpy(), expected, atol=1e-4)  # float32 sums
    assert torch.equal(tokens_TD[0], state["cls_token"][0, 0])


def resize_matrix(num_in: int, num_out: int) -> np.ndarray:
    """A triangle as wide as an output pixel, half-pixel centres, rows that sum to 1."""
    scale = num_in / num_out
    distance = np.arange(num_in) + 0.5 - (np.arange(num_out)[:, None] + 0.5) * scale
    weights = np.clip(1 - np.abs(distance) / scale, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@torch.no_grad()
def test_our_own_2d_backbone_is_inflated_with_its_config(
    tiny_config: Config, tmp_path: Path
) -> None:
    flat = VitConfig(dim=64, depth=2, head_dim=32, patch_zyx=(1, 8, 8), image_zyx=(1, 16, 24))
    vit = Vit(flat)
    vit.init_weights(9)
    save_backbone(Backbone(vit, default_preprocess(flat)), tmp_path / "flat")
    config = with_vit(tiny_config, head_dim=32, image_zyx=(8, 16, 24))
    said: list[str] = []
    method = started(tmp_path / "flat", config, said.append)
    assert len(said) == 2  # inflated, resized
    slice_BCZYX: Tensor = torch.randn(1, 1, 1, 16, 24)
    ours = method.student.backbone(slice_BCZYX.repeat(1, 1, 4, 1, 1)).patches_BLD
    torch.testing.assert_close(ours, vit(slice_BCZYX).patches_BLD, atol=1e-5, rtol=1e-4)


def test_a_guide_is_the_frozen_teacher_of_the_other_run(run: Path, tiny_config: Config) -> None:
    # The student is smaller, with heads of another shape: only the targets must fit.
    head = dataclasses.replace(tiny_config.heads.dino, bottleneck_dim=4, hidden_dim=8)
    heads = dataclasses.replace(tiny_config.heads, dino=head)
    config = dataclasses.replace(with_vit(tiny_config, depth=1), heads=heads)
    guide = load_guide(run, config)
    teacher = load_file(run / STEP / "teacher.safetensors")
    state = guide.networks.state_dict()
    assert state.keys() == teacher.keys()
    assert all(torch.equal(state[name], teacher[name]) for name in teacher)
    assert not any(parameter.requires_grad for parameter in guide.networks.parameters())
    assert guide.sha256 == sha256_file(run / STEP / "teacher.safetensors")
    # It takes the place of the teacher: its targets have a row per view and masked token.
    x_BCZYX = torch.randn(4, 1, 8, 16, 16)
    views = ViewBatch(
        x_BCZYX[:, 0].unflatten(0, (2, 2)),
        torch.zeros(0, 2, 4, 8, 8),
        torch.zeros(4, 8, dtype=torch.bool),
        torch.arange(3),
        torch.full((3,), 1 / 3),
        2,
    )
    _, dino, ibot, _ = guide.networks.encode_teacher(views)
    assert dino.logits().shape == (4, 32)
    assert ibot is not None
    assert ibot.logits().shape == (3, 32)


def test_a_guide_whose_targets_do_not_fit_is_refused(run: Path, tiny_config: Config) -> None:
    head = dataclasses.replace(tiny_config.heads.dino, num_prototypes=16)
    both = dataclasses.replace(tiny_config.heads, dino=head, ibot=head)
    only_ibot = dataclasses.replace(tiny_config.heads, ibot=head)
    cases = [
        (dataclasses.replace(tiny_config, heads=both), "give --heads.dino.num_prototypes 32"),
        (dataclasses.replace(tiny_config, heads=only_ibot), "give --heads.ibot.num_prototypes 32"),
        (with_vit(tiny_config, patch_zyx=(2, 8, 8)), "give --vit.patch_zyx 4,8,8"),
        (dataclasses.replace(tiny_config, hu=HuConfig(mean=0.0)), "the guide was trained with"),
    ]
    for config, message in cases:
        with pytest.raises(ConfigError, match=message):
            load_guide(run, config)
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_guide(run / "checkpoints" / "nowhere", tiny_config)


def test_a_started_run_resumes_bit_for_bit_and_only_from_the_same_weights(
    exported: Path, run: Path, tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    schedule = dataclasses.replace(tiny_config.schedule, freeze_backbone_steps=3)
    config = dataclasses.replace(with_train(tiny_config, num_steps=4), schedule=schedule)
    train(config, tiny_store, tmp_path / "run", start=exported)
    folder = tmp_path / "run" / "checkpoints"
    early, late = (load_file(p / "student.safetensors") for p in sorted(folder.glob("step-*")))
    begun = {f"backbone.{k}": t for k, t in load_backbone(exported).vit.state_dict().items()}
    assert all(torch.equal(early[name], begun[name]) for name in begun)
    assert not torch.equal(early["dino_head.mlp.0.weight"], late["dino_head.mlp.0.weight"])
    shutil.rmtree(folder / "step-00000004")
    train(config, tiny_store, tmp_path / "run", start=exported)
    again = load_file(folder / "step-00000004" / "student.safetensors")
    assert all(torch.equal(late[name], again[name]) for name in late)

    other = export_backbone(run, tmp_path / "other", which="student")
    for start in (other, None):
        with pytest.raises(CheckpointError, match="give the same --start"):
            train(config, tiny_store, tmp_path / "run", start=start)

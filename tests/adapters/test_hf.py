import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tapct_fast.backbone.load import default_preprocess, load_backbone
from tapct_fast.config import VitConfig
from tapct_fast.errors import BackboneError, InputError

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.utils import ModelOutput

from tapct_fast.adapters import hf

FORMS = ["released", "exported"]


@pytest.fixture(autouse=True)
def registered() -> None:
    hf.register()
    hf.register()  # a second call changes nothing


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("folder", FORMS, indirect=True)
@torch.no_grad()
def test_auto_classes_compute_what_load_backbone_computes(
    folder: Path, trust: bool | None, hu_BCZYX: Tensor
) -> None:
    backbone = load_backbone(folder, precision="fp32")
    model = AutoModel.from_pretrained(folder, trust_remote_code=trust)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is hf.TAPCTModel
    assert type(processor) is hf.TAPCTProcessor
    assert not model.training
    pixels = processor(hu_BCZYX.numpy(), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, backbone.preprocess.apply(hu_BCZYX))
    out = model(pixels, reshape=True, output_hidden_states=True)
    expected = backbone(pixels, reshape=True, output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(out["pooler_output"], expected.pooler_output)
    assert torch.equal(out.registers, expected.registers)
    assert out.grid == expected.grid == (2, 4, 4)
    assert isinstance(out, ModelOutput)
    assert out[0] is out.last_hidden_state
    assert len(out.hidden_states) == 2
    for hidden, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(hidden, wanted)
    # int16 HU go straight in, as they do into a Backbone.
    assert torch.equal(model(hu_BCZYX).pooler_output, backbone(hu_BCZYX).pooler_output)


@pytest.mark.parametrize("folder", FORMS, indirect=True)
def test_state_dict_has_the_released_keys_and_the_files_values(folder: Path) -> None:
    state = AutoModel.from_pretrained(folder).state_dict()
    stored = load_file(folder / "model.safetensors")
    assert state.keys() == stored.keys()
    assert "model.blocks.1.attn.qkv.weight" in state
    assert all(torch.equal(state[name], stored[name]) for name in stored)


@pytest.mark.parametrize("folder", FORMS, indirect=True)
def test_saving_round_trips_and_load_backbone_reads_it(
    folder: Path, tmp_path: Path, hu_BCZYX: Tensor
) -> None:
    model = AutoModel.from_pretrained(folder)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    assert not list(saved.glob("*.py"))
    assert "auto_map" not in json.loads((saved / "config.json").read_text())
    assert load_backbone(saved).fingerprint() == load_backbone(folder).fingerprint()
    again = AutoModel.from_pretrained(saved)
    assert again.config.vit_config() == model.config.vit_config()
    with torch.no_grad():
        assert torch.equal(again(hu_BCZYX)[0], model(hu_BCZYX)[0])
    processor = AutoImageProcessor.from_pretrained(saved)
    assert processor.steps == model.backbone.preprocess
    processor.resize_dims = (64, 48)
    processor.save_pretrained(tmp_path / "processor")
    again = AutoImageProcessor.from_pretrained(tmp_path / "processor")
    assert again.steps == processor.steps
    assert again(hu_BCZYX)["pixel_values"].shape == (2, 1, 8, 64, 48)


def test_config_states_the_sizes_under_the_usual_names(exported: Path) -> None:
    config = AutoConfig.from_pretrained(exported)
    assert (config.hidden_size, config.num_hidden_layers) == (64, 2)
    assert (config.num_attention_heads, config.num_register_tokens) == (2, 4)
    assert (config.image_size, config.patch_size) == ([8, 32, 32], [4, 8, 8])


@torch.no_grad()
def test_dtype_is_the_precision_of_the_products_and_weights_stay_float32(
    exported: Path, hu_BCZYX: Tensor
) -> None:
    expected = load_backbone(exported, precision="bf16")(hu_BCZYX)
    model = AutoModel.from_pretrained(exported, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model(hu_BCZYX).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("is_inference", [False, True])
def test_a_cast_afterwards_casts_the_weights(
    exported: Path, hu_BCZYX: Tensor, is_inference: bool
) -> None:
    half = AutoModel.from_pretrained(exported).to(torch.bfloat16)
    with torch.set_grad_enabled(not is_inference):
        out = half(hu_BCZYX)
        pixels = half.backbone.preprocess.apply(hu_BCZYX).bfloat16()
        assert torch.equal(half(pixels)[1], half(pixels.float())[1])
    with torch.no_grad():
        expected = load_backbone(exported, precision="fp32")(hu_BCZYX)
    similarity = torch.cosine_similarity(out[0], expected.last_hidden_state, dim=-1)
    assert similarity.min() > 0.99  # bfloat16 has 8 bits


@torch.no_grad()
def test_inference_runs_the_frozen_copy_and_training_does_not(
    exported: Path, hu_BCZYX: Tensor
) -> None:
    model = AutoModel.from_pretrained(exported)
    model(hu_BCZYX)
    assert len(model.backbone._frozen) == 1
    before = model(hu_BCZYX).pooler_output
    model.model.norm.weight.mul_(2)  # a write is seen
    assert not torch.equal(model(hu_BCZYX).pooler_output, before)
    assert model.state_dict().keys() == load_file(exported / "model.safetensors").keys()
    model.train()
    assert model.backbone.training
    model.backbone._frozen.clear()
    model(hu_BCZYX)
    assert not model.backbone._frozen


def test_outputs_as_a_tuple_and_hidden_states_by_config(exported: Path, hu_BCZYX: Tensor) -> None:
    model = AutoModel.from_pretrained(exported, output_hidden_states=True)
    assert len(model(hu_BCZYX).hidden_states) == 2
    out = model(hu_BCZYX, output_hidden_states=False, return_dict=False)
    assert type(out) is tuple
    assert out[1].shape == (2, 64)


def test_a_step_of_training_moves_the_weights_of_the_computation(
    exported: Path, hu_BCZYX: Tensor
) -> None:
    model = AutoModel.from_pretrained(exported).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model(hu_BCZYX).pooler_output.square().mean()
    before.backward()
    assert model.model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    optimizer.step()
    assert model(hu_BCZYX).pooler_output.square().mean() < before


def test_copies_share_no_weights_with_the_original(exported: Path, hu_BCZYX: Tensor) -> None:
    model = AutoModel.from_pretrained(exported)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = model(hu_BCZYX).pooler_output
    for parameter in model.parameters():
        parameter.data.zero_()
    for twin in copies:
        assert twin.backbone.vit is twin.model
        assert torch.equal(twin(hu_BCZYX).pooler_output, expected)


def test_compiles_to_one_graph(exported: Path, hu_BCZYX: Tensor) -> None:
    model = AutoModel.from_pretrained(exported)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(hu_BCZYX)[0], model(hu_BCZYX)[0])


def test_a_model_of_a_config_alone_has_initial_weights() -> None:
    vit = VitConfig(dim=64, depth=1, image_zyx=(8, 32, 32))
    config = hf.TAPCTConfig()
    with pytest.raises(BackboneError, match="does not state the architecture"):
        AutoModel.from_config(config)
    config.state(vit, default_preprocess(vit))
    model = AutoModel.from_config(config)
    assert model.model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(model.model.blocks[0].norm1.weight, torch.ones(64))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: state.pop("model.blocks.1.mlp.fc1.bias"), "blocks.1.mlp.fc1.bias: missing"),
        (lambda state: state.update({"model.head.weight": torch.zeros(1)}), "head.weight: extra"),
        (
            lambda state: state.update({"model.norm.bias": torch.zeros(7)}),
            r"norm.bias: shape \(7,\)",
        ),
        (lambda state: state["model.norm.bias"].fill_(float("nan")), "norm.bias: holds NaN"),
    ],
)
def test_weights_that_do_not_fit_are_errors_and_not_initialised(
    exported: Path, change: object, word: str
) -> None:
    state = load_file(exported / "model.safetensors")
    change(state)
    save_file(state, exported / "model.safetensors")
    with pytest.raises(BackboneError, match=word):
        AutoModel.from_pretrained(exported)


def test_blocks_in_chunks_load(released: Path) -> None:
    state = load_file(released / "model.safetensors")
    save_file(
        {re.sub(r"blocks\.(\d)", r"blocks.\1.\1", k): v for k, v in state.items()},
        released / "model.safetensors",
    )
    loaded = AutoModel.from_pretrained(released).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_pickles_are_never_read(exported: Path) -> None:
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        AutoModel.from_pretrained(exported)
    with pytest.raises(InputError, match="pickle"):
        AutoModel.from_pretrained(exported, use_safetensors=False)


def test_a_config_of_another_architecture_is_refused(exported: Path) -> None:
    config = AutoConfig.from_pretrained(exported)
    config.vit = {**config.vit, "depth": 3}
    with pytest.raises(BackboneError, match="another architecture"):
        AutoModel.from_pretrained(exported, config=config)
    config.vit = {**config.vit, "depth": "three"}
    with pytest.raises(BackboneError, match="vit: "):
        AutoModel.from_pretrained(exported, config=config)


def test_the_processor_names_what_it_does_not_use(released: Path) -> None:
    path = released / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hu_min": -1000}))
    with pytest.warns(UserWarning, match="states hu_min, which is not used"):
        processor = AutoImageProcessor.from_pretrained(released)
    assert processor.resize_dims == (32, 32)
    path.write_text('{"image_processor_type": "TAPCTProcessor"}')
    assert AutoImageProcessor.from_pretrained(released).resize_dims == (224, 224)
    assert AutoImageProcessor.from_pretrained(released, resize_dims=(64, 64)).resize_dims == (
        64,
        64,
    )


def test_the_processor_takes_integers_and_refuses_what_is_not_hu(exported: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(exported)
    hu = np.full((1, 1, 4, 32, 32), -1000, dtype=np.int64)
    out = processor(hu, return_tensors="np")["pixel_values"]
    assert isinstance(out, np.ndarray)
    assert out.min() == pytest.approx((-1000 + 86.8086) / 322.6347, abs=1e-5)
    with pytest.raises(InputError, match="already normalised"):
        processor(np.full((1, 1, 4, 32, 32), 0.5, dtype=np.float32))
    with pytest.raises(InputError, match="a list is not an array"):
        processor([hu])


def test_of_a_repository_only_data_files_are_downloaded(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(repo: str, **arguments: object) -> str:
        asked.update(arguments, repo=repo)
        return str(released)

    monkeypatch.setattr(hf, "snapshot_download", snapshot_download)
    model = hf.TAPCTModel.from_pretrained("owner/name", revision="v1", token="t")
    assert model.config.hidden_size == 128
    assert asked == {
        "repo": "owner/name",
        "revision": "v1",
        "token": "t",
        "allow_patterns": ["model.safetensors", "config.json", "preprocessor.json"],
    }


def test_a_repository_that_is_not_there_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no such folder, and the hub has no"):
        hf.TAPCTModel.from_pretrained("nobody/nothing", local_files_only=True)


def test_without_transformers_the_way_out_is_named() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from tapct_fast.errors import InputError\n"
        "try: import tapct_fast.adapters.hf\n"
        "except InputError as error: sys.stdout.write(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'tapct-fast[hf]'" in done.stdout, done.stderr[-500:]

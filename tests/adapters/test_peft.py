import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_model import TAPCTModel
from torch import Tensor, nn

from tapct_fast.adapters.accelerate import accelerate
from tapct_fast.backbone.backbone import Backbone

pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig, PeftModel, get_peft_model

# "proj" alone also names patch_embed.proj, the projection of voxels, which is no linear layer.
TARGETS = {"target_modules": ["qkv", "proj"], "exclude_modules": ["patch_embed.proj"]}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)  # peft draws its matrices from the global generator


def train_one_step(wrapped: nn.Module, x: Tensor, read: Any) -> None:
    """Take a step and hold to it that the loss falls and only LoRA moves."""
    frozen = {n: p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    moving = {n: p.clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    assert moving
    assert all("lora_" in name for name in moving)
    assert not any("lora_" in name for name in frozen)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    target = torch.randn(1, generator=torch.Generator().manual_seed(5))

    def loss() -> Tensor:
        return (read(wrapped(x)) - target).square().mean()

    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before
    now = dict(wrapped.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    moved = {name for name, value in moving.items() if not torch.equal(now[name], value)}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in moved} == {"qkv", "proj"}


@pytest.mark.parametrize("targets", [TARGETS, {"target_modules": ["attn.qkv", "attn.proj"]}])
def test_lora_on_a_backbone_trains_and_merges(
    targets: dict[str, list[str]], backbone: Backbone, hu_BCZYX: Tensor
) -> None:
    keys = list(backbone.state_dict())
    with torch.no_grad():
        original = backbone(hu_BCZYX).pooler_output
    wrapped = get_peft_model(backbone, LoraConfig(r=4, **targets))
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == 2 * 2
    with torch.no_grad():  # LoRA begins as nothing
        assert torch.equal(wrapped(hu_BCZYX).pooler_output, original)
    train_one_step(wrapped, hu_BCZYX, lambda out: out.pooler_output)
    with torch.no_grad():
        expected = wrapped(hu_BCZYX, reshape=True, output_hidden_states=True)
        merged = wrapped.merge_and_unload()
        out = merged(hu_BCZYX, reshape=True, output_hidden_states=True)
    assert merged is backbone
    assert list(merged.state_dict()) == keys
    assert not torch.allclose(out.pooler_output, original, rtol=1e-3)
    # The same product in two orders, float32.
    torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(out.pooler_output, expected.pooler_output)


def test_the_patch_projection_is_refused_by_peft_and_not_adapted_in_silence(
    backbone: Backbone,
) -> None:
    with pytest.raises(ValueError, match=r"PatchProjection.* is not supported"):
        get_peft_model(backbone, LoraConfig(target_modules=["qkv", "proj"]))


def test_lora_on_the_last_blocks_only(backbone: Backbone) -> None:
    config = LoraConfig(r=2, layers_to_transform=[1], layers_pattern="blocks", **TARGETS)
    wrapped = get_peft_model(backbone, config)
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert len(names) == 4
    assert all(".blocks.1." in name for name in names)


def test_lora_in_bfloat16_has_gradients(backbone: Backbone, hu_BCZYX: Tensor) -> None:
    half = Backbone(backbone.vit, backbone.preprocess, precision="bf16")
    wrapped = get_peft_model(half, LoraConfig(r=4, **TARGETS))
    train_one_step(wrapped, hu_BCZYX, lambda out: out.pooler_output)


def test_adapters_are_saved_and_put_on_another_copy(
    backbone: Backbone, hu_BCZYX: Tensor, tmp_path: Path
) -> None:
    twin = copy.deepcopy(backbone)
    wrapped = get_peft_model(backbone, LoraConfig(r=4, **TARGETS))
    train_one_step(wrapped, hu_BCZYX, lambda out: out.pooler_output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft looks for a config of the base model on the hub
        wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    again = PeftModel.from_pretrained(twin, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(hu_BCZYX).pooler_output, wrapped(hu_BCZYX).pooler_output)


def test_lora_on_the_transformers_model(exported: Path, hu_BCZYX: Tensor) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tapct_fast.adapters.hf import TAPCTModel as TransformersModel

    model = TransformersModel.from_pretrained(exported)
    keys = list(model.state_dict())
    wrapped = get_peft_model(model, LoraConfig(r=4, **TARGETS))
    train_one_step(wrapped, hu_BCZYX, lambda out: out.pooler_output)
    with torch.no_grad():
        expected = wrapped(hu_BCZYX).pooler_output
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(hu_BCZYX).pooler_output, expected)
    assert list(merged.state_dict()) == keys


@pytest.mark.parametrize("first", ["lora", "accelerate"])
def test_lora_and_accelerate_go_together_in_either_order(first: str) -> None:
    x_BCZYX = torch.randn(1, 1, 8, 32, 32)
    model = TAPCTModel().eval()
    config = LoraConfig(r=4, **TARGETS)
    plain = get_peft_model(copy.deepcopy(model), config)
    if first == "accelerate":
        wrapped = get_peft_model(accelerate(model), config)
    else:
        wrapped = get_peft_model(model, config)
        accelerate(wrapped.base_model.model)
    wrapped.load_state_dict(plain.state_dict())
    torch.testing.assert_close(
        wrapped(x_BCZYX)["pooler_output"], plain(x_BCZYX)["pooler_output"], rtol=1e-4, atol=1e-5
    )
    train_one_step(wrapped, x_BCZYX, lambda out: out["pooler_output"])

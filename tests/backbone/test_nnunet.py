import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.load import default_preprocess
from tapct_fast.backbone.nnunet import export_nnunet
from tapct_fast.config import VitConfig
from tapct_fast.errors import InputError
from tapct_fast.model.vit import Vit

TRAINER = Path(__file__).parents[2] / "examples" / "nnunet" / "tapct_trainer.py"
SETTINGS: list[dict[str, Any]] = [
    {},
    {"ffn": "swiglu", "head_dim": 32, "num_registers": 0, "patch_zyx": (8, 8, 8)},
    {"layer_scale": None},
]


def make_backbone(**settings: Any) -> Backbone:
    vit = Vit(VitConfig(dim=64, depth=2, image_zyx=(8, 32, 32), **settings))
    vit.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return Backbone(vit, default_preprocess(vit.config)).eval()


def primus_patches(checkpoint: Mapping[str, Any], x_BCZYX: Tensor) -> Tensor:
    """Compute what Primus without rotary positions computes from weights of these names."""
    weights = checkpoint["network_weights"]
    arch = checkpoint["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"eva.{name}.weight"], weights[f"eva.{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"eva.{name}.weight"], weights[f"eva.{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, arch["norm_eps"])

    stem = [weights[f"down_projection.proj.{name}"] for name in ("weight", "bias")]
    patches = F.conv3d(x_BCZYX, *stem, stride=tuple(arch["patch_embed_size"]))
    x = patches.flatten(2).mT + weights["eva.pos_embed"]
    prefix = weights["eva.prefix_tokens"]
    assert prefix.shape[1] == arch["num_prefix_tokens"]
    x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
    for i in range(arch["encoder_eva_depth"]):
        block = f"blocks.{i}"
        q_bias, v_bias = (weights[f"eva.{block}.attn.{name}_bias"] for name in "qv")
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = F.linear(norm(x, f"{block}.norm1"), weights[f"eva.{block}.attn.qkv.weight"], bias)
        heads = qkv.unflatten(2, (3, arch["encoder_eva_numheads"], -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        gammas = (weights.get(f"eva.{block}.gamma_{k}", torch.tensor(1.0)) for k in (1, 2))
        x = x + next(gammas) * linear(attended, f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        if arch["swiglu_mlp"]:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        assert hidden.shape[2] == arch["mlp_dim"]
        x = x + next(gammas) * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, prefix.shape[1] :]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_weights_compute_the_same_under_their_new_names(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    backbone = make_backbone(**settings)
    file = export_nnunet(backbone, tmp_path / "new" / "a.pth")
    checkpoint = torch.load(file, weights_only=True)
    x_BCZYX = torch.randn(2, 1, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone(x_BCZYX).last_hidden_state
    torch.testing.assert_close(
        primus_patches(checkpoint, x_BCZYX), expected, rtol=1e-5, atol=2e-5
    )  # float32, sums in another order


def test_the_plan_says_what_nnunet_reads(tmp_path: Path) -> None:
    checkpoint = torch.load(export_nnunet(make_backbone(), tmp_path / "a.pth"), weights_only=True)
    plan, weights = checkpoint["nnssl_adaptation_plan"], checkpoint["network_weights"]
    assert json.loads(json.dumps(plan)) == plan  # nnU-Net writes it into its plans file
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["patch_size"] == plan["recommended_downstream_patchsize"] == [8, 32, 32]
    assert configuration["spacing"] is None
    assert plan["pretrain_num_input_channels"] == 1
    assert [f"{name}.weight" in weights for name in plan["keys_to_in_proj"]] == [True]
    assert [n for n in weights if n.startswith(plan["key_to_lpe"])] == [plan["key_to_lpe"]]
    parts = (plan["key_to_encoder"] + ".", plan["key_to_stem"] + ".")
    assert all(name.startswith(parts) for name in weights)
    assert not any("cls_token" in name for name in weights)  # nnU-Net drops what is called so
    assert checkpoint["foreground_intensity_properties_per_channel"]["0"] == {
        "mean": -86.8086,
        "std": 322.6347,
        "percentile_00_5": -1008.0,
        "percentile_99_5": 822.0,
    }


def test_the_file_holds_each_weight_once(tmp_path: Path) -> None:
    backbone = make_backbone()
    file = export_nnunet(backbone, tmp_path / "a.pth")
    num_bytes = sum(4 * p.numel() for p in backbone.vit.parameters())
    assert file.stat().st_size < 1.1 * num_bytes + 30_000  # zip headers of each tensor


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.pth"):
        export_nnunet(make_backbone(), tmp_path / "a.bin")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("slices", [8, 16])
@pytest.mark.parametrize("channels", [1, 2])
def test_nnunet_loads_it_into_the_network_of_our_trainer(
    settings: dict[str, Any], slices: int, channels: int, tmp_path: Path
) -> None:
    pytest.importorskip("nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer",
                        reason="nnU-Net 2.8 is not installed")  # fmt: skip
    spec = importlib.util.spec_from_file_location("tapct_trainer", TRAINER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backbone = make_backbone(**settings)
    file = export_nnunet(backbone, tmp_path / "a.pth")
    plan = torch.load(file, weights_only=True)["nnssl_adaptation_plan"]
    arch, patch_size = plan["architecture_plans"], [slices, 32, 32]
    network = module.TapctTrainer.build_network_architecture(  # as nnU-Net calls it
        architecture_class_name=arch["arch_class_name"],
        arch_init_kwargs=arch["arch_kwargs"],
        arch_init_kwargs_req_import=arch["arch_kwargs_requiring_import"],
        input_patch_size=patch_size,
        num_input_channels=channels,
        num_output_channels=3,
        enable_deep_supervision=False,
    )
    network, _ = module.TapctTrainer.load_pretrained_weights(
        *(network, str(file), plan["pretrain_num_input_channels"], channels),
        *(plan["recommended_downstream_patchsize"], patch_size),
        *(plan["key_to_encoder"], plan["key_to_stem"], tuple(plan["keys_to_in_proj"])),
        plan["key_to_lpe"],
    )
    network.eval()
    x_BCZYX = torch.randn(2, 1, slices, 32, 32, generator=torch.Generator().manual_seed(0))
    repeated = x_BCZYX.repeat(1, channels, 1, 1, 1)  # nnU-Net shares the stem between channels
    with torch.no_grad():
        found, _ = network.eva(network.down_projection(repeated).flatten(2).mT)
        expected = backbone(x_BCZYX).last_hidden_state
        assert network(repeated).shape == (2, 3, slices, 32, 32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

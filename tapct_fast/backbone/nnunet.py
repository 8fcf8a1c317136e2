"""Write a backbone as the checkpoint from which nnU-Net fine-tunes.

nnssl pre-trains, nnU-Net fine-tunes; between them stands one ``.pth``: ``network_weights`` and an
``nnssl_adaptation_plan`` that says which of them are the encoder, the stem and the positions. Known
from nnU-Net 2.8.1 (commit 0e495086): ``experiment_planning/like_nnssl.py`` reads the plan,
``training/nnUNetTrainer/pretraining/pretrainedTrainer.py`` the weights; and from nnssl (7044864):
``adaptation_planning/adaptation_plan.py`` names the plan's fields. Both were read, not copied.

The weights take the names of Primus, the transformer of dynamic-network-architectures 0.4.4
(``building_blocks/eva.py``, blocks of timm). Primus itself differs: it has rotary positions, a norm
in its feed-forward and no cls token. ``docs/export.md`` has the trainer that builds our
architecture from the same parts.

Shape suffixes: L patches, D width, P prefix tokens (cls and registers).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.portable import require_suffix, staged
from tapct_fast.model.block import NORM_EPS

_STEM, _ENCODER = "down_projection", "eva"
_SPACING_STYLE = "noresample"  # spacing is not an input of the backbone

# Ours to timm's EvaBlock; a parameter that is not listed keeps its name.
_TIMM_NAMES = {
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.w12.weight": "mlp.fc1.weight",
    "mlp.w12.bias": "mlp.fc1.bias",
    "mlp.w3.weight": "mlp.fc2.weight",
    "mlp.w3.bias": "mlp.fc2.bias",
}


def export_nnunet(backbone: Backbone, path: Path) -> Path:
    """Write an nnssl checkpoint; ``torch.load(path, weights_only=True)`` reads it.

    Args:
        backbone: What to export, in float32.
        path: File to write, ``.pth``; an existing one is replaced in one step.

    Raises:
        InputError: ``path`` is wrong.
    """
    require_suffix(path, ".pth")
    checkpoint = {
        "network_weights": nnunet_weights(backbone),
        "nnssl_adaptation_plan": _adaptation_plan(backbone),
        "trainer_name": "tapct_fast",
        "citations": [
            {
                "type": "Pretraining Method",
                "name": "TAP-CT",
                "apa_citations": ["TAP-CT, arXiv:2512.00872", "DINOv2, arXiv:2304.07193"],
            }
        ],
        "foreground_intensity_properties_per_channel": _intensities(backbone),
    }
    with staged(path) as file:
        torch.save(checkpoint, file)
    return path


def nnunet_weights(backbone: Backbone) -> dict[str, Tensor]:
    """Return the weights under the names of Primus; the function they compute is the same.

    The position of the cls token is added to it, since ``pos_embed`` there holds patches only, and
    the bias of the keys is left out: it moves all logits of a query alike.
    """
    vit = backbone.vit
    state = {name: tensor.detach().cpu().float() for name, tensor in vit.state_dict().items()}
    prefix_1PD = state["cls_token"] + state["pos_embed"][:, :1]
    if vit.config.num_registers:
        prefix_1PD = torch.cat([prefix_1PD, state["register_tokens"]], dim=1)
    weights = {
        f"{_STEM}.proj.weight": state["patch_embed.proj.weight"],
        f"{_STEM}.proj.bias": state["patch_embed.proj.bias"],
        f"{_ENCODER}.prefix_tokens": prefix_1PD,
        f"{_ENCODER}.pos_embed": state["pos_embed"][:, 1:],
    }
    for name, tensor in state.items():
        group, _, rest = name.partition(".")
        if group == "norm":
            weights[f"{_ENCODER}.{name}"] = tensor
        elif group == "blocks":
            index, _, inner = rest.partition(".")
            where = f"{_ENCODER}.blocks.{index}."
            if inner == "attn.qkv.bias":
                weights[where + "attn.q_bias"], _, weights[where + "attn.v_bias"] = tensor.chunk(3)
            else:
                weights[where + _TIMM_NAMES.get(inner, inner)] = tensor
    return {name: tensor.clone() for name, tensor in weights.items()}  # a view saves its whole base


def _adaptation_plan(backbone: Backbone) -> dict[str, Any]:
    config = backbone.vit.config
    patch_size = list(config.image_zyx)
    return {
        "architecture_plans": {
            "arch_class_name": "TapctVit",  # not Primus: nnU-Net refuses it without our trainer
            "arch_kwargs": {
                "embed_dim": config.dim,
                "patch_embed_size": list(config.patch_zyx),
                "encoder_eva_depth": config.depth,
                "encoder_eva_numheads": config.num_heads,
                "num_prefix_tokens": backbone.vit.num_prefix,
                "mlp_dim": config.mlp_dim,
                "swiglu_mlp": config.ffn == "swiglu",
                "init_values": config.layer_scale,
                "norm_eps": NORM_EPS,
                "scale_attn_inner": False,
            },
            "arch_kwargs_requiring_import": [],
        },
        "pretrain_plan": _pretrain_plan(patch_size),
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": patch_size,
        "key_to_encoder": _ENCODER,
        "key_to_stem": _STEM,
        "keys_to_in_proj": [f"{_STEM}.proj"],
        "key_to_lpe": f"{_ENCODER}.pos_embed",
    }


def _pretrain_plan(patch_size: list[int]) -> dict[str, Any]:
    """Describe the training data in nnssl's fields; nnU-Net reads spacing and patch size."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "tapct_fast",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": _SPACING_STYLE,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": resampling,
        "spacing": None,
        "patch_size": patch_size,
    }
    return {
        "dataset_name": "tapct_fast",
        "plans_name": "tapct_fast",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],  # unknown; nothing reads it
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {_SPACING_STYLE: configuration},
        "experiment_planner_used": "tapct_fast",
    }


def _intensities(backbone: Backbone) -> dict[str, dict[str, float]]:
    """Return the HU constants as the plans file of nnU-Net states them for CTNormalization."""
    hu = backbone.preprocess.hu
    low, high = hu.clip
    values = {"mean": hu.mean, "std": hu.std, "percentile_00_5": low, "percentile_99_5": high}
    return {"0": {name: float(value) for name, value in values.items()}}

"""nnU-Net trainer that fine-tunes from a checkpoint of ``tapct-fast export --format nnunet``.

Put this folder in the environment variable ``nnUNet_extTrainer`` and train with
``-tr TapctTrainer``. It needs nnU-Net 2.8 and not tapct_fast. The network is Primus, the
transformer with a light decoder that nnU-Net has, with our encoder in the place of its own: no
rotary positions, no norm in the feed-forward, and prefix tokens (cls and registers).
"""

from functools import partial
from typing import Any

import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.building_blocks.eva import Eva
from nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer import PretrainedTrainer_Primus
from torch import Tensor, nn


class PrefixEva(Eva):
    """Eva with learned tokens in front of the patches; they are not returned."""

    def __init__(self, num_prefix: int, embed_dim: int, **settings: Any) -> None:
        super().__init__(embed_dim=embed_dim, **settings)
        self.prefix_tokens = nn.Parameter(torch.zeros(1, num_prefix, embed_dim))

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, rope, keep = super()._pos_embed(x)
        return torch.cat([self.prefix_tokens.expand(len(x), -1, -1), x], dim=1), rope, keep

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the normed patch tokens."""
        x, keep = super().forward(x)
        return x[:, self.prefix_tokens.shape[1] :], keep


def build_network(
    arch: dict[str, Any], num_inputs: int, num_outputs: int, patch_size: tuple[int, ...]
) -> Primus:
    """Build the network that ``arch_kwargs`` of the checkpoint's plan describes."""
    dim, depth = arch["embed_dim"], arch["encoder_eva_depth"]
    heads, patch = arch["encoder_eva_numheads"], arch["patch_embed_size"]
    network = Primus(
        num_inputs, dim, patch, num_outputs, 1, heads, patch_size, use_rot_pos_emb=False
    )
    network.eva = PrefixEva(
        arch["num_prefix_tokens"],
        dim,
        depth=depth,
        num_heads=heads,
        qkv_fused=True,
        mlp_ratio=(arch["mlp_dim"] + 0.5) / dim,  # timm rounds the product down
        swiglu_mlp=arch["swiglu_mlp"],
        scale_mlp=False,
        drop_path_rate=0.2,
        norm_layer=partial(nn.LayerNorm, eps=arch["norm_eps"]),
        init_values=arch["init_values"],
        use_rot_pos_emb=False,
        ref_feat_shape=tuple(s // p for s, p in zip(patch_size, patch, strict=True)),
    )
    return network


class TapctTrainer(PretrainedTrainer_Primus):
    """Fine-tune TAP-CT backbones with the schedule that nnU-Net has for transformers."""

    @staticmethod
    def build_network_architecture(
        plans_manager: Any = None,  # noqa: ARG004 - its name tells nnU-Net which form to call
        configuration_manager: Any = None,
        num_input_channels: int = 1,
        num_output_channels: int = 2,
        enable_deep_supervision: bool = False,  # noqa: ARG004
        *,
        architecture_class_name: str = "",  # noqa: ARG004
        arch_init_kwargs: dict[str, Any] | None = None,
        arch_init_kwargs_req_import: list[str] | None = None,  # noqa: ARG004
        input_patch_size: tuple[int, ...] = (),
    ) -> nn.Module:
        """Build the network of the plan, in which nnU-Net puts the weights.

        Inference calls with the managers, fine-tuning with what it took from them.
        """
        if configuration_manager is not None:
            arch_init_kwargs = configuration_manager.network_arch_init_kwargs
            input_patch_size = configuration_manager.patch_size
        assert arch_init_kwargs is not None
        return build_network(
            arch_init_kwargs, num_input_channels, num_output_channels, input_patch_size
        )

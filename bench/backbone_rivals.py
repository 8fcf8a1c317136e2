"""The released backbone by formula, and the strongest form of it that a user can make by hand.

DINOv2 with registers on volumes (arXiv:2304.07193, arXiv:2309.16588, arXiv:2512.00872), plain
PyTorch modules under DINOv2's parameter names, so that a Vit's weights load as they are. How to
attend is an argument: ``explicit`` as the released model does, ``fused`` as a user patches it,
``chunked`` for references whose scores would not fit.
Shape suffixes: B batch, C channels (one), Z Y X voxels, T tokens (cls, registers, patches), Q of
them that are asked for, D width, H heads, K head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Device
from tapct_fast.config import VitConfig

Forward = Callable[[Tensor], Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q_BHQK, k_BHTK, v_BHTK -> out_BHQK
EPS = 1e-6


def explicit(q_BHQK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """Attend with all weights in memory."""
    weight_BHQT = (q_BHQK * q_BHQK.shape[-1] ** -0.5 @ k_BHTK.mT).softmax(-1)
    out_BHQK: Tensor = weight_BHQT @ v_BHTK
    return out_BHQK


def chunked(q_BHQK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """Attend 256 queries at a time."""
    return torch.cat(
        [explicit(part, k_BHTK, v_BHTK) for part in torch.split(q_BHQK, 256, dim=2)], dim=2
    )


def fused(q_BHQK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """Attend by PyTorch's fused operator."""
    return F.scaled_dot_product_attention(q_BHQK, k_BHTK, v_BHTK)


class _Attention(nn.Module):
    def __init__(self, config: VitConfig, attend: Attend) -> None:
        super().__init__()
        self.num_heads, self.attend = config.num_heads, attend
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x_BTD: Tensor, queries_Q: Tensor | None) -> Tensor:
        qkv_BT3HK = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1))
        q_BHTK, k_BHTK, v_BHTK = qkv_BT3HK.permute(2, 0, 3, 1, 4).unbind(0)
        q_BHQK = q_BHTK if queries_Q is None else q_BHTK[:, :, queries_Q]
        out_BQD = self.attend(q_BHQK, k_BHTK, v_BHTK).transpose(1, 2).flatten(2)
        branch_BQD: Tensor = self.proj(out_BQD)
        return branch_BQD


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x_BQD: Tensor) -> Tensor:
        branch_BQD: Tensor = self.fc2(F.gelu(self.fc1(x_BQD)))
        return branch_BQD


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))


class _Block(nn.Module):
    def __init__(self, config: VitConfig, attend: Attend) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=EPS)
        self.attn = _Attention(config, attend)
        self.ls1 = _LayerScale(config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=EPS)
        self.mlp = _Mlp(config.dim, config.mlp_dim)
        self.ls2 = _LayerScale(config.dim)

    def forward(self, x_BTD: Tensor, queries_Q: Tensor | None) -> Tensor:
        x_BQD = x_BTD if queries_Q is None else x_BTD[:, queries_Q]
        x_BQD = x_BQD + self.ls1.gamma * self.attn(self.norm1(x_BTD), queries_Q)
        out_BQD: Tensor = x_BQD + self.ls2.gamma * self.mlp(self.norm2(x_BQD))
        return out_BQD


class _PatchEmbed(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(1, config.dim, config.patch_zyx, stride=config.patch_zyx)

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        patch_BDZYX: Tensor = self.proj(x_BCZYX)
        return patch_BDZYX


class PlainVit(nn.Module):
    """The model whose rivals differ in how they attend, in dtype and in being compiled."""

    def __init__(self, config: VitConfig, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        z, y, x = config.grid_zyx
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + z * y * x, config.dim))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_registers, config.dim))
        self.mask_token = nn.Parameter(torch.empty(1, config.dim))  # of training; in the weights
        self.patch_embed = _PatchEmbed(config)
        self.blocks = nn.ModuleList(_Block(config, attend) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=EPS)

    def forward(self, x_BCZYX: Tensor, queries_Q: Tensor | None = None) -> Tensor:
        """Return normed tokens_BTD, or of the last block only the rows ``queries_Q``."""
        patch_BDZYX = self.patch_embed(x_BCZYX)
        pos_1DZYX = self.pos_embed[:, 1:].mT.reshape(1, -1, *self.config.grid_zyx)
        if patch_BDZYX.shape[2:] != pos_1DZYX.shape[2:]:
            pos_1DZYX = F.interpolate(pos_1DZYX, size=patch_BDZYX.shape[2:], mode="trilinear")
        patch_BLD = (patch_BDZYX + pos_1DZYX).flatten(2).mT
        prefix_1RD = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], 1)
        x_BTD = torch.cat([prefix_1RD.expand(len(patch_BLD), -1, -1), patch_BLD], dim=1)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, queries_Q if i == last else None)
        normed_BTD: Tensor = self.norm(x_BTD)
        return normed_BTD


def plain_vit(
    config: VitConfig, weights: dict[str, Tensor], attend: Attend, dtype: torch.dtype
) -> PlainVit:
    """Return the model with a Vit's weights, on their device."""
    with torch.device("meta"):
        model = PlainVit(config, attend)
    cast = {name: weight.detach().to(dtype) for name, weight in weights.items()}
    model.load_state_dict(cast, assign=True)
    return model.eval().requires_grad_(False)


def compiled(model: PlainVit, device: Device, num_threads: int) -> dict[str, Forward]:
    """Return the model as users compile it, by name: max-autotune, on a CPU also frozen weights."""
    if device == "cuda":
        return {"S": torch.compile(model, mode="max-autotune", dynamic=False)}
    # Graphs of CUDA aside, the mode's own settings; threads are those of the generated code.
    options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    options |= {"cpp.threads": num_threads}
    # Frozen weights are packed for the products; an option of its own keeps the two graphs apart.
    frozen = torch.compile(model, options=options | {"freezing": True}, dynamic=False)

    def call_frozen(x_BCZYX: Tensor) -> Tensor:
        with torch._inductor.config.patch(freezing=True):  # what Dynamo asks while it traces
            tokens_BTD: Tensor = frozen(x_BCZYX)
        return tokens_BTD

    return {"S": torch.compile(model, options=options, dynamic=False), "S, frozen": call_frozen}

"""This library's training step as it was before it was compiled: commit 5b7510c, frozen.

The arrangement of ``bench.train_rivals`` whose parts are the library's ops, run one by one under
autocast: tokens assembled in one pass, a norm computed where the branch before it ends, only used
tokens normed at the end, targets as two vectors, cross-entropies without student logits, one read
of the device per step. A copy, so that the row does not move when the library does; what the ops
have got for the CPU since, ``Eager`` does without.

Shape suffixes: as in ``bench.train_rivals``.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.train_rivals import (
    EPS,
    Arrangement,
    Encoder,
    HeadCall,
    LossNumbers,
    MicroBatches,
    Rival,
    Rows,
    grid_of,
    position_rows,
)
from tapct_fast.model.vit import Vit
from tapct_fast.ssl.schedules import StepValues
from tapct_kernels import (
    SoftTargets,
    attention,
    layer_norm,
    masked_gather,
    patch_embed,
    prototype_cross_entropy,
    residual,
    residual_norm,
    sinkhorn,
)
from tapct_kernels.attention import BackendName


def op_embed(vit: Vit, x_BZYX: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Embed and assemble by one op; under autocast only the product is rounded."""
    weight_DK, device_type = vit.patch_embed.proj.weight.flatten(1), x_BZYX.device.type
    if torch.is_autocast_enabled(device_type):
        weight_DK = weight_DK.to(torch.get_autocast_dtype(device_type))
    prefix_RD = vit.cls_token[0] + vit.pos_embed[0, :1]
    if vit.config.num_registers:
        prefix_RD = torch.cat([prefix_RD, vit.register_tokens[0]])
    tokens_BTD: Tensor = patch_embed(
        x_BZYX,
        weight_DK,
        vit.patch_embed.proj.bias,
        position_rows(vit, grid_of(vit, x_BZYX)),
        vit.mask_token[0],
        mask_BL,
        prefix_RD,
        vit.config.patch_zyx,
        (-1008.0, 822.0, -86.8086, 322.6347),  # read for int16 input only
    )
    return tokens_BTD


def _kept_rows(seed: int, depth: int, batch: int, drop_path: float) -> Tensor:
    """Draw the rows that each branch keeps: 2 * depth of them, in rising order."""
    generator = torch.Generator().manual_seed(seed)
    keep = max(int(batch * (1 - drop_path)), 1)
    order = torch.rand(depth, 2, batch, generator=generator).argsort(dim=-1)
    return order[..., :keep].sort(dim=-1).values.flatten(0, 1)


def product_dtype(x_BTD: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer takes these tokens."""
    device_type = x_BTD.device.type
    is_rounded = torch.is_autocast_enabled(device_type) and x_BTD.dtype == torch.float32
    return torch.get_autocast_dtype(device_type) if is_rounded else x_BTD.dtype


def _fused_blocks(vit: Vit, x_BTD: Tensor, rows: Sequence[Tensor | None]) -> Tensor:
    """Run the blocks; each branch ends in one pass that also norms for the next one."""
    blocks: list[Any] = list(vit.blocks)
    dtype, norm = product_dtype(x_BTD), blocks[0].norm1
    normed_KTD = layer_norm(x_BTD, norm.weight, norm.bias, index_J=rows[0], eps=EPS, dtype=dtype)
    for i, block in enumerate(blocks):
        following = blocks[i + 1].norm1 if i + 1 < len(blocks) else None
        for j, (norm, gamma_D) in enumerate(
            ((block.norm2, block.ls1.gamma), (following, block.ls2.gamma))
        ):
            if j == 0:
                qkv_KT3HK = block.attn.qkv(normed_KTD).unflatten(2, (3, -1, vit.config.head_dim))
                # On a CPU there was PyTorch's kernel only, save in bfloat16 without a gradient.
                is_pytorchs = qkv_KT3HK.device.type == "cpu" and (
                    qkv_KT3HK.requires_grad or qkv_KT3HK.dtype == torch.float32
                )
                backend: BackendName | None = "sdpa flash" if is_pytorchs else None
                out_KTHK = attention(qkv_KT3HK, backend=backend)
                branch_KTD = block.attn.proj(out_KTHK.flatten(2))
            else:
                branch_KTD = block.mlp.fc2(F.gelu(block.mlp.fc1(normed_KTD)))
            rows_K, scale = rows[2 * i + j], x_BTD.shape[0] / branch_KTD.shape[0]
            if norm is None:
                x_BTD = residual(x_BTD, branch_KTD, gamma_D, index_K=rows_K, scale=scale)
                continue
            x_BTD, normed_KTD = residual_norm(
                *(x_BTD, branch_KTD, gamma_D, norm.weight, norm.bias),
                index_K=rows_K,
                next_index_J=rows[2 * i + j + 1],
                scale=scale,
                eps=EPS,
                dtype=dtype,
            )
    return x_BTD


def fused_encoder(vit: Vit, drop_path: float, compiles: bool) -> Encoder:
    """Run blocks of fused ops, one resolution after another."""
    assert not compiles

    def encode(x: list[Tensor], drop_seed: int | None) -> list[Tensor]:
        outs = []
        for i, x_BTD in enumerate(x):
            rows: list[Tensor | None] = [None] * (2 * vit.config.depth + 1)
            if drop_seed is not None and drop_path:
                kept = _kept_rows(
                    2 * drop_seed + i, vit.config.depth, x_BTD.shape[0], drop_path
                ).to(x_BTD.device, non_blocking=True)
                rows = [*kept.unbind(0), None]
            outs.append(_fused_blocks(vit, x_BTD, rows))
        return outs

    return encode


def select_then_norm(vit: Vit, tokens_BTD: Tensor, index_M: Tensor | None) -> Rows:
    """Norm only the tokens that are used."""
    norm = vit.norm
    if index_M is None:
        return Rows(norm(tokens_BTD[:, 0]), None)
    masked_MD = masked_gather(tokens_BTD, index_M, norm.weight, norm.bias, vit.num_prefix, EPS)
    return Rows(norm(tokens_BTD[:, 0]), masked_MD)


def factored_head(head: nn.Module, compiles: bool) -> HeadCall:
    """Return a head to features_NK and prototypes_PK, whose logits need not exist."""
    assert not compiles
    module: Any = head

    def call(x_ND: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(module.mlp(x_ND), dim=-1), module.last_layer()

    return call


def _teacher_logits(features_NK: Tensor, prototypes_PK: Tensor) -> Tensor:
    """Return logits_NP, under autocast in float16: at most the gain, so its range suffices."""
    device_type = features_NK.device.type
    if not torch.is_autocast_enabled(device_type):
        return F.linear(features_NK, prototypes_PK)
    with torch.autocast(device_type, enabled=False):
        return F.linear(features_NK.half(), prototypes_PK.half())


def two_vector_targets(outs: list[Any], temp: Tensor, compiles: bool) -> list[Any]:
    """Balance the logits of features and prototypes without writing to them."""
    assert not compiles
    return list(sinkhorn([_teacher_logits(*out) for out in outs], temp))


def fused_dino(
    targets: SoftTargets, out: tuple[Tensor, Tensor], num_views: int, temp: float
) -> tuple[Tensor, Tensor]:
    """Return the DINO loss; the student's logits are never stored."""
    features_SK, prototypes_PK = out
    batch, device = features_SK.shape[0] // num_views, features_SK.device
    view_V1 = torch.arange(num_views, device=device)[:, None]
    other_J = torch.arange(2, device=device)
    other_VJ = torch.where(view_V1 == 0, 1 - other_J, other_J)
    weight_VJ = (other_VJ != view_V1).to(targets.row_N.dtype) / (batch * (2 * num_views - 2))
    row_VBJ = other_VJ[:, None] * batch + torch.arange(batch, device=device)[:, None]
    loss_S = prototype_cross_entropy(
        features_SK,
        prototypes_PK,
        targets,
        temp=temp,
        target_row_SJ=row_VBJ.flatten(0, 1),
        weight_SJ=weight_VJ.repeat_interleave(batch, dim=0),
    )
    return loss_S[: 2 * batch].sum(), loss_S[2 * batch :].sum()


def fused_ibot(
    targets: SoftTargets, out: tuple[Tensor, Tensor], weight_M: Tensor, temp: float
) -> Tensor:
    """Return the iBOT loss; the student's logits are never stored."""
    row_M1 = torch.arange(out[0].shape[0], device=out[0].device)[:, None]
    loss_M = prototype_cross_entropy(
        *out, targets, temp=temp, target_row_SJ=row_M1, weight_SJ=weight_M[:, None]
    )
    return loss_M.sum()


def read_together(losses: Mapping[str, Tensor], norms: Sequence[Tensor]) -> LossNumbers:
    """Read all numbers of a step at once, and hold them to be finite."""
    numbers = torch.stack([*losses.values(), *norms]).tolist()
    assert all(map(math.isfinite, numbers))
    return dict(zip(losses, numbers, strict=False))


def average_in_one(means: list[Tensor], new: list[Tensor], momentum: float) -> None:
    """Move the teacher in one pass over all parameters."""
    torch._foreach_lerp_(means, new, weight=1 - momentum)


EAGER = Arrangement(
    precision="autocast",
    embed=op_embed,
    encoder=fused_encoder,
    select=select_then_norm,
    head=factored_head,
    center=two_vector_targets,
    dino=fused_dino,
    ibot=fused_ibot,
    read=read_together,
    average=average_in_one,
)


class Eager(Rival):
    """This arrangement, its ``residual_norm`` on a CPU by the eager definition, as it was."""

    def step(self, batches: MicroBatches, values: StepValues) -> LossNumbers:
        """Do one optimizer step in place and return its losses."""
        # The package exports a function of the module's name.
        op = importlib.import_module("tapct_kernels.residual_norm")
        with patch.object(op, "_cpu_kernels", []):
            return super().step(batches, values)

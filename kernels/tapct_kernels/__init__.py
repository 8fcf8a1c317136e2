"""Operations in which a 3D CT vision transformer differs from what PyTorch already does well.

One file per op: formula, eager definition, Triton kernels, registration, fake, autograd.
"""

from tapct_kernels.attention import (
    attention,
    attention_ref,
    attention_varlen,
    choose_backend,
    choose_varlen_backend,
    try_backends,
)
from tapct_kernels.block_masks import (
    BlockLaw,
    BlockMasks,
    block_law,
    block_masks,
    block_masks_ref,
)
from tapct_kernels.masked_gather import masked_gather, masked_gather_ref
from tapct_kernels.patch_embed import patch_embed, patch_embed_ref
from tapct_kernels.prototype_cross_entropy import (
    prototype_cross_entropy,
    prototype_cross_entropy_ref,
)
from tapct_kernels.residual_norm import layer_norm, residual, residual_norm, residual_norm_ref
from tapct_kernels.sinkhorn import sinkhorn, sinkhorn_ref, softmax_targets
from tapct_kernels.soft_targets import Logits, SoftTargets

__all__ = [
    "BlockLaw",
    "BlockMasks",
    "Logits",
    "SoftTargets",
    "attention",
    "attention_ref",
    "attention_varlen",
    "block_law",
    "block_masks",
    "block_masks_ref",
    "choose_backend",
    "choose_varlen_backend",
    "layer_norm",
    "masked_gather",
    "masked_gather_ref",
    "patch_embed",
    "patch_embed_ref",
    "prototype_cross_entropy",
    "prototype_cross_entropy_ref",
    "residual",
    "residual_norm",
    "residual_norm_ref",
    "sinkhorn",
    "sinkhorn_ref",
    "softmax_targets",
    "try_backends",
]

"""What torch's FLOP counter does not know: the products inside the operators of a training step.

Shapes come from the calls, so rows and tokens are counted.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

import tapct_fast.model.block  # noqa: F401
import tapct_kernels  # noqa: F401 - both register operators


def _embed(voxels: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return int(2 * math.prod(voxels) * weight[0])


def _embed_backward(
    _: Any, voxels: Sequence[int], weight: Sequence[int], *__: Any, **___: Any
) -> int:
    return int(2 * math.prod(voxels) * weight[0])  # of the weight alone


def _entropy(features: Sequence[int], prototypes: Sequence[int], *_: Any, **__: Any) -> int:
    return int(2 * features[0] * math.prod(prototypes))


def _entropy_backward(
    _: Any, __: Any, features: Sequence[int], prototypes: Sequence[int], *___: Any, **____: Any
) -> int:
    return int(4 * features[0] * math.prod(prototypes))  # the logits made anew are not counted


def _attention(query: Sequence[int], *_: Any, **__: Any) -> int:
    n, heads, tokens, width = query
    return n * heads * 4 * tokens * tokens * width


def _attention_backward(_: Any, query: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * _attention(query)


def _native_attention(qkv: Sequence[int], *_: Any, **__: Any) -> int:
    n, tokens, _three, heads, width = qkv
    return n * heads * 4 * tokens * tokens * width


def _native_attention_backward(_: Any, qkv: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * _native_attention(qkv)


def _addmm(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * a[0] * b[0] * b[1]


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTED = {
    torch.ops.tapct.patch_embed: _embed,
    torch.ops.tapct.patch_embed_backward: _embed_backward,
    torch.ops.tapct.prototype_cross_entropy: _entropy,
    torch.ops.tapct.prototype_cross_entropy_backward: _entropy_backward,
    torch.ops.tapct.attention_cpu: _native_attention,
    torch.ops.tapct.attention_cpu_backward: _native_attention_backward,
    torch.ops.tapct.addmm_amx: _addmm,
    CPU_ATTENTION: _attention,
    CPU_ATTENTION_BACKWARD: _attention_backward,
}

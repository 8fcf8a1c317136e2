"""Attention on a CPU, natively: in bfloat16 on AMX tiles, in float32 by AVX2 or AVX-512.

Offered to ``tapct_kernels.attention``, which tries a kernel before it chooses it. Forward and
backward take a fused qkv and give one, without the copies that PyTorch's kernel needs, on PyTorch's
own threads, with the same bits for any number of them.

Shape suffixes: N volumes, T tokens, H heads, K head width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast import _native
from tapct_kernels.attention import provide
from tapct_kernels.operator import operator


@operator("tapct::attention_cpu")
def _attention(qkv_NT3HK: Tensor) -> tuple[Tensor, Tensor]:
    """Return out_NTHK and the level_NHT that the backward needs."""
    qkv_NT3HK = qkv_NT3HK.contiguous()
    out_NTHK, level_NHT = _outputs(qkv_NT3HK)
    is_bf16 = qkv_NT3HK.dtype == torch.bfloat16
    kernel = _native.attention_amx if is_bf16 else _native.attention_avx
    _run(kernel, qkv_NT3HK, out_NTHK, level_NHT)
    return out_NTHK, level_NHT


@_attention.register_fake
def _outputs(qkv_NT3HK: Tensor) -> tuple[Tensor, Tensor]:
    volumes, tokens, _, heads, width = qkv_NT3HK.shape
    level_NHT = qkv_NT3HK.new_empty(volumes, heads, tokens, dtype=torch.float32)
    return qkv_NT3HK.new_empty(volumes, tokens, heads, width), level_NHT


@operator("tapct::attention_cpu_backward")
def _attention_backward(
    grad_out_NTHK: Tensor, qkv_NT3HK: Tensor, out_NTHK: Tensor, level_NHT: Tensor
) -> Tensor:
    grad_out_NTHK, qkv_NT3HK = grad_out_NTHK.contiguous(), qkv_NT3HK.contiguous()
    grad_qkv_NT3HK = torch.empty_like(qkv_NT3HK)
    is_bf16 = qkv_NT3HK.dtype == torch.bfloat16
    kernel = _native.attention_amx_backward if is_bf16 else _native.attention_avx_backward
    _run(kernel, grad_out_NTHK, qkv_NT3HK, out_NTHK, level_NHT, grad_qkv_NT3HK)
    return grad_qkv_NT3HK


@_attention_backward.register_fake
def _(_grad_out_NTHK: Tensor, qkv_NT3HK: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(qkv_NT3HK, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out_NTHK: Tensor, _: Tensor) -> Tensor:
    grad_qkv_NT3HK: Tensor = _attention_backward(grad_out_NTHK, *ctx.saved_tensors)
    return grad_qkv_NT3HK


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def attention_cpu(qkv_NT3HK: Tensor) -> Tensor:
    """Return out_NTHK; see ``tapct_kernels.attention``. Head width 64, bfloat16 or float32."""
    out_NTHK: Tensor = _attention(qkv_NT3HK)[0]
    return out_NTHK


def _run(kernel: Callable[..., None], *tensors: Tensor) -> None:
    kernel(*(as_array(t) for t in tensors), torch.get_num_threads())


def as_array(x: Tensor) -> NDArray[Any]:
    """Return an array over the memory of a tensor; bfloat16 as its bits."""
    x = x.detach()
    array: NDArray[Any] = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


def read_array(x: Tensor) -> NDArray[Any]:
    """Return an array to read a tensor by, whose memory stays resizable, as FSDP wants parameters.

    A vector's is contiguous. Not to write: some versions of NumPy make what comes by DLPack
    read-only.
    """
    x = x.detach()
    array: NDArray[Any] = np.from_dlpack(x.contiguous() if x.ndim == 1 else x)
    return array


if _native.has_amx():
    provide("amx", attention_cpu, "tapct_fast")
if _native.has_avx2():
    provide("avx", attention_cpu, "tapct_fast")

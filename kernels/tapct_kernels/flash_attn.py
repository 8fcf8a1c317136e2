"""Attention by the flash-attn packages, major version 2 or 3, where one is installed.

    out[n, t, h] = sum_s p[s] v[n, s, h],   p = softmax_s(q[n, t, h] . k[n, s, h] / sqrt(K))

The packages' operators are called through operations of ours: these compile to one graph whatever
the package does, and the gradient is one buffer whose parts are written in place. A package is
imported when it is first considered, never at start-up, and used only if its operators take exactly
the arguments that are passed here: their signatures have changed between releases.
``tapct_kernels.attention`` is what models call.
Shape suffixes: N volumes, T tokens (of all sequences where they are packed), H heads, K head width.
Source: arXiv:2205.14135 (FlashAttention), arXiv:2407.08608 (FlashAttention-3).
"""

import functools
import importlib
import itertools
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class _Package(NamedTuple):
    """The operators of a flash-attn package, and what they want besides ours."""

    module: str
    distribution: str
    forward: str
    varlen: str
    backward: str
    extra: Mapping[str, Any]
    extra_forward: Mapping[str, Any]


_WHOLE_WINDOW: Mapping[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
_PACKAGES = {
    2: _Package(
        *("flash_attn", "flash-attn"),
        *("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),
        "flash_attn::_flash_attn_backward",
        _WHOLE_WINDOW,
        {"return_softmax": False},
    ),
    3: _Package(
        *("flash_attn_interface", "flash-attn-3"),
        *("flash_attn_3::fwd", "flash_attn_3::fwd", "flash_attn_3::bwd"),
        {},
        {"num_splits": 1},  # never split keys: the same sum whatever else is in the batch
    ),
}


def package_version(major: int) -> str:
    """Return the version of the distribution that flash-attn ``major`` came with."""
    try:
        return metadata.version(_PACKAGES[major].distribution)
    except metadata.PackageNotFoundError:
        return "unknown version"


@functools.cache
def package_refusal(major: int) -> str | None:
    """Import flash-attn ``major`` and hold its operators to the calls made here.

    Returns:
        Why it cannot be used, or None.
    """
    package = _PACKAGES[major]
    if find_spec(package.module) is None:
        return "not installed"
    try:
        importlib.import_module(package.module)
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch
        return f"installed, but its import fails: {error}"
    gradient = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
    packed = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    calls: list[tuple[str, tuple[str, ...], Mapping[str, Any], tuple[str, ...]]] = [
        (package.forward, ("q", "k", "v"), package.extra_forward, ()),
        (package.varlen, ("q", "k", "v"), package.extra_forward, packed),
        (package.backward, gradient, {}, ("deterministic",)),
    ]
    for operator, leading, extra, more in calls:
        names = {*more, *extra, *package.extra, "softmax_scale"}
        if reason := _schema_refusal(operator, leading, names):
            return f"{package.distribution} {package_version(major)}: {reason}"
    return None


def _schema_refusal(operator: str, leading: tuple[str, ...], names: set[str]) -> str | None:
    try:
        arguments = _operator(operator)._schema.arguments
    except AttributeError:
        return f"it has no operator {operator}"
    if tuple(a.name for a in arguments[: len(leading)]) != leading:
        return f"{operator} does not begin with {', '.join(leading)}"
    rest = arguments[len(leading) :]
    if missing := names - {a.name for a in rest}:
        return f"{operator} does not take {', '.join(sorted(missing))}"
    if unknown := [a.name for a in rest if a.name not in names and not a.has_default_value()]:
        return f"{operator} also wants {', '.join(unknown)}"
    return None


def _operator(qualified: str) -> Any:
    namespace, name = qualified.split("::")
    return getattr(getattr(torch.ops, namespace), name).default


def sequence_starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return int32 offsets of packed sequences, and their end."""
    ends = itertools.accumulate(lengths, initial=0)
    return torch.tensor(list(ends), dtype=torch.int32, device=device)


def unit_stride(t: Tensor) -> Tensor:
    """Copy where the last axis is not dense, which no fused kernel takes."""
    return t if t.stride(-1) == 1 else t.contiguous()


@torch.library.custom_op("tapct::flash_attn", mutates_args=())
def flash_attn(qkv_NT3HK: Tensor, major: int) -> tuple[Tensor, Tensor]:
    """Return out_NTHK and the log-sum-exp of the scores by flash-attn ``major`` (2 or 3)."""
    package = _PACKAGES[major]
    q_NTHK, k_NTHK, v_NTHK = unit_stride(qkv_NT3HK).unbind(2)
    out_NTHK, lse_NHT, *_ = _operator(package.forward)(
        *(q_NTHK, k_NTHK, v_NTHK),
        softmax_scale=q_NTHK.shape[-1] ** -0.5,
        **package.extra,
        **package.extra_forward,
    )
    return out_NTHK, lse_NHT


@flash_attn.register_fake
def _(qkv_NT3HK: Tensor, major: int) -> tuple[Tensor, Tensor]:
    N, T, _, H, K = qkv_NT3HK.shape
    return qkv_NT3HK.new_empty(N, T, H, K), qkv_NT3HK.new_empty(N, H, T, dtype=torch.float32)


@torch.library.custom_op("tapct::flash_attn_backward", mutates_args=())
def flash_attn_backward(
    grad_NTHK: Tensor, qkv_NT3HK: Tensor, out_NTHK: Tensor, lse_NHT: Tensor, major: int
) -> Tensor:
    """Return the gradient of qkv, its three parts written in place: no concatenation."""
    package = _PACKAGES[major]
    q_NTHK, k_NTHK, v_NTHK = unit_stride(qkv_NT3HK).unbind(2)
    grad_NT3HK = torch.empty_like(qkv_NT3HK, memory_format=torch.contiguous_format)
    _operator(package.backward)(
        # Contiguous: a broadcast gradient has strides that no kernel takes.
        *(grad_NTHK.contiguous(), q_NTHK, k_NTHK, v_NTHK, out_NTHK, lse_NHT),
        *grad_NT3HK.unbind(2),
        softmax_scale=q_NTHK.shape[-1] ** -0.5,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **package.extra,
    )
    return grad_NT3HK


@flash_attn_backward.register_fake
def _(
    grad_NTHK: Tensor, qkv_NT3HK: Tensor, out_NTHK: Tensor, lse_NHT: Tensor, major: int
) -> Tensor:
    return torch.empty_like(qkv_NT3HK, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv_NT3HK, ctx.major = inputs
    ctx.save_for_backward(qkv_NT3HK, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_NTHK: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return flash_attn_backward(grad_NTHK, *ctx.saved_tensors, ctx.major), None


flash_attn.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("tapct::flash_attn_varlen", mutates_args=())
def flash_attn_varlen(qkv_T3HK: Tensor, lengths: list[int], major: int) -> Tensor:
    """Return out_THK by flash-attn ``major``; no gradient."""
    package = _PACKAGES[major]
    start_N, longest = sequence_starts(lengths, qkv_T3HK.device), max(lengths)
    return cast(
        Tensor,
        _operator(package.varlen)(
            *unit_stride(qkv_T3HK).unbind(1),
            cu_seqlens_q=start_N,
            cu_seqlens_k=start_N,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=qkv_T3HK.shape[-1] ** -0.5,
            **package.extra,
            **package.extra_forward,
        )[0],
    )


@flash_attn_varlen.register_fake
def _(qkv_T3HK: Tensor, lengths: list[int], major: int) -> Tensor:
    T, _, H, K = qkv_T3HK.shape
    return qkv_T3HK.new_empty(T, H, K)

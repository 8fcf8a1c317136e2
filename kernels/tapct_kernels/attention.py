"""Dense softmax attention on a fused qkv, without a mask, by the best kernel that runs here.

    out[n, t, h] = sum_s p[s] v[n, s, h],   p = softmax_s(q[n, t, h] . k[n, s, h] / sqrt(K))

A dispatch, not a kernel of ours: at head width 64 the exponentials bound every published kernel,
and the best of them exist. ``choose_backend`` picks one per device type, dtype, head width and need
of a gradient: the first of a list that computes a small attention correctly. It says which, in what
version, and why every earlier one was passed over; whatever was chosen runs or raises.
On the CPU that is a kernel that was provided, on AMX tiles in bfloat16 or by AVX in float32, or
PyTorch's flash kernel in the dtype given.
flash-attn packages are optional and imported when first considered; see ``flash_attn``.
Shape suffixes: N volumes, T tokens (of all sequences where they are packed), H heads, K head width.
Source: arXiv:2205.14135 (FlashAttention), arXiv:2407.08608 (FlashAttention-3).
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tapct_kernels.flash_attn import (
    flash_attn,
    flash_attn_varlen,
    package_refusal,
    package_version,
    sequence_starts,
    unit_stride,
)
from tapct_kernels.inductor import register_fallbacks

ProvidedName = Literal["amx", "avx"]  # see ``provide``
BackendName = Literal[
    "amx",
    "avx",
    "flash-attn 3",
    "sdpa cudnn",
    "sdpa flash",
    "flash-attn 2",
    "sdpa efficient",
    "sdpa math",
    "sdpa",  # whichever PyTorch takes, on devices that are neither CPU nor CUDA
]
VarlenName = Literal["flash-attn 3", "torch varlen", "flash-attn 2", "dense"]

_DENSE: Mapping[str, tuple[BackendName, ...]] = {
    "cpu": ("amx", "avx", "sdpa flash", "sdpa math"),
    # flash and efficient SDPA follow cuDNN where its version or the GPU is older; the efficient one
    # is the first to take float32, the math one float64.
    "cuda": get_args(BackendName)[2:-1],
}
_VARLEN: Mapping[str, tuple[VarlenName, ...]] = {"cuda": get_args(VarlenName)}
_SDPA = {
    "sdpa cudnn": [SDPBackend.CUDNN_ATTENTION],
    "sdpa flash": [SDPBackend.FLASH_ATTENTION],
    "sdpa efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "sdpa math": [SDPBackend.MATH],
    "sdpa": list(SDPBackend.__members__.values())[1:],  # without ERROR
}


class Backend(NamedTuple):
    """The kernel that was chosen; ``passed_over`` pairs each earlier one with the reason."""

    name: str
    version: str
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.version})"


class Trial(NamedTuple):
    """What became of one backend when it was tried; ``refusal`` is None where it runs."""

    name: BackendName
    version: str  # empty where it was refused
    refusal: str | None


# Kernels for CPUs, which this library, being Python, cannot hold, and what each of them takes.
_provided: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {}
_TAKES: Mapping[str, torch.dtype] = {"amx": torch.bfloat16, "avx": torch.float32}


def provide(name: ProvidedName, kernel: Callable[[Tensor], Tensor], version: str) -> None:
    """Offer a kernel as a backend: qkv_NT3HK of head width 64 to out_NTHK on the CPU.

    In bfloat16 it is ``amx``, in float32 ``avx``. It must have a gradient and, like every backend,
    pass the trial before it is chosen. tapct_fast calls this.
    """
    _provided[name] = (kernel, version)
    choose_backend.cache_clear()
    _dense_refusal.cache_clear()


def _provided_refusal(name: str, dtype: torch.dtype, head_width: int) -> str | None:
    if name not in _provided:
        return (
            f"no kernel was provided: this CPU has no {name.upper()}, or tapct_fast is not imported"
        )
    if dtype != _TAKES[name] or head_width != 64:
        return f"takes {str(_TAKES[name]).removeprefix('torch.')} and a head width of 64"
    return None


_MAJOR = {"flash-attn 2": 2, "flash-attn 3": 3}


def _check(qkv_NT3HK: Tensor) -> None:
    if qkv_NT3HK.ndim != 5 or qkv_NT3HK.shape[2] != 3:
        shape = tuple(qkv_NT3HK.shape)
        raise ValueError(f"attention: qkv has shape {shape}, not (N, T, 3, H, K)")


def _check_lengths(qkv_T3HK: Tensor, lengths: Sequence[int]) -> None:
    if qkv_T3HK.ndim != 4 or qkv_T3HK.shape[1] != 3:
        raise ValueError(
            f"attention_varlen: qkv has shape {tuple(qkv_T3HK.shape)}, not (T, 3, H, K)"
        )
    # An empty sequence hung flash-attn's backward (flash-attention#1254) and has no meaning here.
    if any(length < 1 for length in lengths) or sum(lengths) != qkv_T3HK.shape[0]:
        raise ValueError(
            f"attention_varlen: lengths {list(lengths)} do not cover {qkv_T3HK.shape[0]} tokens"
        )


def attention_ref(qkv_NT3HK: Tensor) -> Tensor:
    """Eager definition; every backend is held to it. Its memory grows with the square of T."""
    sum_dtype = torch.promote_types(qkv_NT3HK.dtype, torch.float32)
    q_NHTK, k_NHTK, v_NHTK = qkv_NT3HK.to(sum_dtype).permute(2, 0, 3, 1, 4).unbind(0)
    weight_NHTT = (q_NHTK @ k_NHTK.mT / q_NHTK.shape[-1] ** 0.5).softmax(-1)
    out_NTHK: Tensor = (weight_NHTT @ v_NHTK).transpose(1, 2)
    return out_NTHK.to(qkv_NT3HK.dtype).contiguous()


def attention(qkv_NT3HK: Tensor, *, backend: BackendName | None = None) -> Tensor:
    """Attend within each volume.

    Args:
        qkv_NT3HK: Queries, keys and values as one linear layer makes them; not copied.
        backend: A backend to use in place of the chosen one.

    Returns:
        out_NTHK in the dtype of qkv.

    Raises:
        ValueError: The shape is another, or ``backend`` cannot run here.
    """
    _check(qkv_NT3HK)
    name = _dense_name(*_facts(qkv_NT3HK), backend)
    return _dense(name, unit_stride(qkv_NT3HK))


def attention_varlen(
    qkv_T3HK: Tensor, lengths: Sequence[int], *, backend: VarlenName | None = None
) -> Tensor:
    """Attend within each of several sequences of different length, packed end to end.

    For mixed window sizes in inference; sequences of one length are faster as a batch.

    Args:
        qkv_T3HK: The sequences, one after another.
        lengths: Tokens of each, at least one; Python integers, so that nothing waits for a device.
        backend: A backend to use in place of the chosen one.

    Returns:
        out_THK, equal to one call of ``attention`` per sequence up to rounding.

    Raises:
        ValueError: The lengths do not add up to T, or ``backend`` cannot run here.
    """
    _check_lengths(qkv_T3HK, lengths)
    name = _varlen_name(*_facts(qkv_T3HK), backend)
    return _varlen(name, unit_stride(qkv_T3HK), lengths)


@functools.cache
def choose_backend(
    device_type: str,
    dtype: torch.dtype,
    head_width: int,
    needs_grad: bool,
    is_deterministic: bool = False,
) -> Backend:
    """Return the backend of ``attention``: the first in the list that runs, and runs correctly.

    Args:
        device_type: "cuda", "cpu" or another of PyTorch's; CUDA means the current device.
        dtype: Of q, k and v.
        head_width: Elements per head.
        needs_grad: Whether a gradient will be asked for.
        is_deterministic: Whether ``torch.use_deterministic_algorithms`` is on.

    Raises:
        RuntimeError: None runs; the message lists the reasons.
    """
    names = _DENSE.get(device_type, ("sdpa",))
    facts = (device_type, dtype, head_width, needs_grad, is_deterministic)
    return _first_usable(names, lambda name: _dense_refusal(cast(BackendName, name), *facts))


def try_backends(
    device_type: str,
    dtype: torch.dtype,
    head_width: int,
    needs_grad: bool,
    is_deterministic: bool = False,
) -> tuple[Trial, ...]:
    """Try every backend of ``attention``, best first; see ``choose_backend``, which takes one."""
    trials = []
    for name in _DENSE.get(device_type, ("sdpa",)):
        refusal = _dense_refusal(name, device_type, dtype, head_width, needs_grad, is_deterministic)
        trials.append(Trial(name, "" if refusal else _version(name), refusal))
    return tuple(trials)


@functools.cache
def choose_varlen_backend(
    device_type: str,
    dtype: torch.dtype,
    head_width: int,
    needs_grad: bool,
    is_deterministic: bool = False,
) -> Backend:
    """Return the backend of ``attention_varlen``; see ``choose_backend``."""
    names = _VARLEN.get(device_type, ("dense",))
    facts = (device_type, dtype, head_width, needs_grad, is_deterministic)
    return _first_usable(names, lambda name: _varlen_refusal(cast(VarlenName, name), *facts))


def _first_usable(names: Sequence[str], refusal: Callable[[str], str | None]) -> Backend:
    passed_over: list[tuple[str, str]] = []
    for name in names:
        reason = refusal(name)
        if reason is None:
            return Backend(name, _version(name), tuple(passed_over))
        passed_over.append((name, reason))
    raise RuntimeError(f"attention: no backend runs here: {passed_over}")


def _version(name: str) -> str:
    if name in _MAJOR:
        return package_version(_MAJOR[name])
    if name in _provided:
        return _provided[name][1]
    version = f"torch {torch.__version__}"
    if name == "sdpa cudnn":
        version += f", cuDNN {torch.backends.cudnn.version()}"
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if active and name in ("sdpa flash", "torch varlen"):
        version += f", flash replaced by {active}"  # activate_flash_attention_impl was called
    return version


def _facts(qkv: Tensor) -> tuple[str, torch.dtype, int, bool, bool]:
    return (
        qkv.device.type,
        qkv.dtype,
        qkv.shape[-1],
        torch.is_grad_enabled() and qkv.requires_grad,
        torch.are_deterministic_algorithms_enabled(),
    )


# Constant, so that a compiled graph holds the choice and not the trial behind it.
@torch.compiler.assume_constant_result
def _dense_name(
    device_type: str,
    dtype: torch.dtype,
    head_width: int,
    needs_grad: bool,
    is_deterministic: bool,
    backend: BackendName | None,
) -> str:
    register_fallbacks()  # here, for this is called while a model is traced, whoever compiles it
    facts = (device_type, dtype, head_width, needs_grad, is_deterministic)
    if backend is None:
        return choose_backend(*facts).name
    if reason := _dense_refusal(backend, *facts):
        raise ValueError(f"attention: backend {backend!r} cannot run here: {reason}")
    return backend


@torch.compiler.assume_constant_result
def _varlen_name(
    device_type: str,
    dtype: torch.dtype,
    head_width: int,
    needs_grad: bool,
    is_deterministic: bool,
    backend: VarlenName | None,
) -> str:
    facts = (device_type, dtype, head_width, needs_grad, is_deterministic)
    if backend is None:
        return choose_varlen_backend(*facts).name
    if reason := _varlen_refusal(backend, *facts):
        raise ValueError(f"attention_varlen: backend {backend!r} cannot run here: {reason}")
    return backend


@functools.cache
def _dense_refusal(
    name: BackendName,
    device_type: str,
    dtype: torch.dtype,
    head_width: int,
    needs_grad: bool,
    is_deterministic: bool,
) -> str | None:
    if name not in _DENSE.get(device_type, ("sdpa",)):
        return f"not a backend of {device_type}"
    if name in _MAJOR and (reason := package_refusal(_MAJOR[name])):
        return reason
    if name in _TAKES and (reason := _provided_refusal(name, dtype, head_width)):
        return reason
    if device_type == "meta":  # shapes without values
        return None

    def trial() -> str | None:
        qkv_NT3HK = _trial_input(device_type, dtype, head_width)
        return _trial(lambda qkv: _dense(name, qkv), attention_ref, qkv_NT3HK, needs_grad)

    return _without_modes(trial)


@functools.cache
def _varlen_refusal(
    name: VarlenName,
    device_type: str,
    dtype: torch.dtype,
    head_width: int,
    needs_grad: bool,
    is_deterministic: bool,
) -> str | None:
    if name == "dense":
        return None
    if name not in _VARLEN.get(device_type, ("dense",)):
        return f"not a backend of {device_type}"
    if needs_grad:
        return "for inference only"
    if name in _MAJOR and (reason := package_refusal(_MAJOR[name])):
        return reason
    if name == "torch varlen" and find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    lengths = [5, 32]

    def expected(qkv_T3HK: Tensor) -> Tensor:
        parts = torch.split(qkv_T3HK, lengths)
        return torch.cat([attention_ref(part[None])[0] for part in parts])

    def trial() -> str | None:
        qkv_T3HK = _trial_input(device_type, dtype, head_width)[0]
        return _trial(lambda qkv: _varlen(name, qkv, lengths), expected, qkv_T3HK, needs_grad)

    return _without_modes(trial)


def _trial_input(device_type: str, dtype: torch.dtype, head_width: int) -> Tensor:
    """Return qkv_NT3HK of 37 tokens (no multiple of any tile) by formula: no draw is disturbed."""
    values = torch.arange(37 * 3 * 2 * head_width, dtype=torch.float64).mul(0.37).sin()
    return values.view(1, 37, 3, 2, head_width).to(device_type, dtype)


def _without_modes(call: Callable[[], str | None]) -> str | None:
    """Call in a thread of its own, which no inference mode, autocast, tracer or counter reaches."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> str | None:
        if device is not None:  # a new thread begins on the first
            torch.cuda.set_device(device)
        return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _trial(
    call: Callable[[Tensor], Tensor],
    expected: Callable[[Tensor], Tensor],
    qkv: Tensor,
    needs_grad: bool,
) -> str | None:
    """Run ``call`` once; return what keeps it from running or from being right."""

    def run(f: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_(needs_grad)
        out = f(x)
        return [out.detach(), *(torch.autograd.grad(out, x, out.cos()) if needs_grad else ())]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = run(call, qkv)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reasons = [str(w.message).split(" (Triggered")[0].strip() for w in caught]
            # PyTorch warns of every backend, also of those nobody asked for.
            kept = [
                r for r in reasons if "not used because" not in r and "runtime disabled" not in r
            ]
            return " ".join(dict.fromkeys(kept)) or str(error).splitlines()[0]
    wanted = run(expected, qkv.double())
    for out, exact in zip(found, wanted, strict=True):
        distance = float((out.double() - exact).norm() / exact.norm())
        if not distance <= 2e-2:  # bfloat16 keeps 8 bits; NaN fails too
            return f"wrong result: relative error {distance:.2g}"
    return None


def _dense(name: str, qkv_NT3HK: Tensor) -> Tensor:
    if name in _MAJOR:
        out_NTHK: Tensor = flash_attn(qkv_NT3HK, _MAJOR[name])[0]
        return out_NTHK
    if name in _provided:
        return _provided[name][0](qkv_NT3HK)
    q_NHTK, k_NHTK, v_NHTK = qkv_NT3HK.permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(_SDPA[name]):  # one backend: it runs, or it raises
        out_NHTK = F.scaled_dot_product_attention(q_NHTK, k_NHTK, v_NHTK)
    return out_NHTK.transpose(1, 2)


def _varlen(name: str, qkv_T3HK: Tensor, lengths: Sequence[int]) -> Tensor:
    if name in _MAJOR:
        out_THK: Tensor = flash_attn_varlen(qkv_T3HK, list(lengths), _MAJOR[name])
        return out_THK
    if name == "torch varlen":
        from torch.nn.attention.varlen import varlen_attn

        start_N, longest = sequence_starts(lengths, qkv_T3HK.device), max(lengths)
        q_THK, k_THK, v_THK = qkv_T3HK.unbind(1)
        return cast(Tensor, varlen_attn(q_THK, k_THK, v_THK, start_N, start_N, longest, longest))
    outs: list[Tensor] = []
    begin = 0
    for length, same in itertools.groupby(lengths):  # neighbours of one length are one batch
        count = len(list(same))
        part_T3HK = qkv_T3HK[begin : begin + count * length]
        outs.append(attention(part_T3HK.unflatten(0, (count, length))).flatten(0, 1))
        begin += count * length
    return torch.cat(outs)

"""Every attention backend that runs here, beside the dispatch and the eager formula.

On CUDA in bfloat16: views of 437 tokens (local), 2,357 (global), and whole volumes of 12,549 and
35,285 (64 and 180 slices), at both widths. A step is the forward and the gradient of qkv; its FLOPs
are the seven products that are executed, one of them a recomputation. ``absent`` says why a backend
did not run. Eager and compiled stop where their scores would take gigabytes.
On the CPU one volume, width 384 (two heads of it at 12,549 tokens), in float32 and bfloat16, the
latter on AMX tiles where this CPU has them, with PyTorch's kernel as a rival in both, in inference
beside another: chunks of queries by bfloat16 products, softmax in between. They share a row, so all
operands are bfloat16 numbers and the errors differ with the arithmetic alone. Views of a training
run on a CPU are short and many: 64 of 37 tokens.
The packed rows compare ``attention_varlen`` with one dense call per window.
Shape suffixes: N volumes, T tokens, H heads, K head width, C queries of one chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from bench.harness import Case, Device, Work, compiled, op_bench
from tapct_fast.model import cpu_attention  # noqa: F401 - provides "amx" and "avx"
from tapct_kernels.attention import (
    BackendName,
    VarlenName,
    _dense_refusal,
    _varlen_refusal,
    attention,
    attention_ref,
    attention_varlen,
    choose_backend,
    choose_varlen_backend,
)

HEAD_WIDTH = 64
SHAPES = {  # (N, T), the most valuable first
    "cuda": [(64, 2357), (256, 437), (4, 12549), (1, 35285)],
    "cpu": [(1, 437), (1, 2357), (1, 12549), (64, 37)],
}
WINDOWS = {"cuda": (2357, 1181, 437, 2357, 437, 1181) * 8, "cpu": (437, 1181, 437)}
MOST_SCORES = {"cuda": 2**30, "cpu": 2**24}  # of the eager formula: 4 GiB and 64 MiB

Call = Callable[[Tensor], Tensor]


def chunked(qkv_NT3HK: Tensor, num_queries: int) -> Tensor:
    """Attend by matrix products and a softmax, some queries at a time; no gradient."""
    N, T, _, H, K = qkv_NT3HK.shape
    # Compact heads: the products of strided ones took up to six times as long on the CPU.
    qkv_3NHTK = qkv_NT3HK.permute(2, 0, 3, 1, 4).contiguous()
    q_GTK, k_GTK, v_GTK = qkv_3NHTK.flatten(1, 2).unbind(0)
    q_GTK, out_GTK = q_GTK * K**-0.5, torch.empty_like(q_GTK)
    # Allocated once: fresh pages for every chunk cost more than the products.
    score_GCT = q_GTK.new_empty(N * H, min(num_queries, T), T)
    weight_GCT = torch.empty_like(score_GCT)
    for begin in range(0, T, num_queries):
        rows = slice(begin, min(begin + num_queries, T))
        count = rows.stop - begin
        torch.bmm(q_GTK[:, rows], k_GTK.mT, out=score_GCT[:, :count])
        torch.softmax(score_GCT[:, :count], -1, out=weight_GCT[:, :count])
        torch.bmm(weight_GCT[:, :count], v_GTK, out=out_GTK[:, rows])
    return out_GTK.reshape(N, H, T, K).transpose(1, 2)


def exact(qkv_NT3HK: Tensor, grad_NTHK: Tensor | None, num_queries: int = 512) -> Tensor:
    """Return the output in float64, or the gradient of qkv, without all scores at once."""
    out_NT3HK = torch.zeros_like(qkv_NT3HK, dtype=torch.float64)
    out_NTHK = out_NT3HK.new_empty(qkv_NT3HK[:, :, 0].shape)
    scale = qkv_NT3HK.shape[-1] ** -0.5
    for n, qkv_T3HK in enumerate(qkv_NT3HK):
        q, k, v = qkv_T3HK.double().permute(1, 2, 0, 3).unbind(0)  # each HTK
        dq, dk, dv = out_NT3HK[n].permute(1, 2, 0, 3).unbind(0)
        for begin in range(0, q.shape[1], num_queries):
            rows = slice(begin, begin + num_queries)
            p_HCT = (q[:, rows] @ k.mT * scale).softmax(-1)
            o_HCK = p_HCT @ v
            if grad_NTHK is None:
                out_NTHK[n, rows] = o_HCK.transpose(0, 1)
                continue
            g_HCK = grad_NTHK[n, rows].double().transpose(0, 1)
            s_HCT = p_HCT * (g_HCK @ v.mT - (g_HCK * o_HCK).sum(-1, keepdim=True)) * scale
            dq[:, rows] = s_HCT @ k
            dk += s_HCT.mT @ q[:, rows]
            dv += p_HCT.mT @ g_HCK
    return out_NTHK if grad_NTHK is None else out_NT3HK


def draw_qkv(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Tensor:
    """Draw bfloat16 numbers, held in ``dtype``."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(shape, generator=generator, device=device)
    return values.bfloat16().to(dtype).requires_grad_()


@torch.no_grad()
def _forward(call: Call, qkv: Tensor) -> Sequence[Tensor]:
    return [call(qkv)]


def _step(call: Call, qkv: Tensor, grad: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(call(qkv), [qkv], grad.to(qkv.dtype))


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield every length, forward and step, and packed windows forward."""
    shapes = [(2, 20)] if is_tiny else SHAPES[device]
    all_heads = (2,) if is_tiny else (12, 6) if device == "cuda" else (6,)
    for N, T in shapes:
        is_long = (device, T) == ("cpu", 12549)  # seconds a call: two heads, and no step
        for H in (2,) if is_long else all_heads:
            for kind in ("forward",) if is_long else ("forward", "step"):
                name = f"{N}x{T}x{H}x{HEAD_WIDTH} {kind}"
                yield Case(name, partial(_work, (N, T, H), device, is_tiny, kind))
    lengths = (5, 7, 7) if is_tiny else WINDOWS[device]
    for H in all_heads:
        name = f"packed {len(lengths)} windows of {sum(lengths)}x{H}x{HEAD_WIDTH} forward"
        yield Case(name, partial(_packed_work, lengths, H, device))


def _work(shape_NTH: tuple[int, int, int], device: Device, is_tiny: bool, kind: str) -> Work:
    N, T, H = shape_NTH
    is_step = kind == "step"
    qkv = draw_qkv((N, T, 3, H, HEAD_WIDTH), torch.bfloat16, device)
    qkv_float = qkv.detach().float().requires_grad_()
    chosen = choose_backend(device, torch.bfloat16, HEAD_WIDTH, is_step)
    calls: dict[str, tuple[Call, Tensor]] = {"tapct attention": (attention, qkv)}
    absent = {}
    if device == "cpu":
        calls["tapct attention, float32"] = (attention, qkv_float)
        calls["sdpa flash, float32"] = (partial(attention, backend="sdpa flash"), qkv_float)
        if chosen.name != "sdpa flash":
            calls["sdpa flash"] = (partial(attention, backend="sdpa flash"), qkv)
        if not is_step:
            calls["bf16 products, 256 queries"] = (partial(chunked, num_queries=256), qkv)
    else:
        for backend in get_args(BackendName)[:-1]:
            facts = (device, torch.bfloat16, HEAD_WIDTH, is_step, False)
            if reason := _dense_refusal(backend, *facts):
                absent[backend] = reason
            elif backend not in (chosen.name, "sdpa math"):
                calls[backend] = (partial(attention, backend=backend), qkv)
    if MOST_SCORES[device] >= N * H * T * T:
        calls["eager"] = (attention_ref, qkv)
        if not is_tiny:
            for name, call in compiled(attention_ref, device).items():
                calls[name] = (call, qkv)
    else:
        absent["eager, torch.compile"] = f"{N * H * T * T / 2**20:,.0f} Mi scores"
    if is_step:
        grad = torch.randn((N, T, H, HEAD_WIDTH), device=device).bfloat16()
        expected = exact(qkv.detach(), grad)
        variants = {name: partial(_step, call, x, grad) for name, (call, x) in calls.items()}
    else:
        expected = exact(qkv.detach(), None)
        variants = {name: partial(_forward, call, x) for name, (call, x) in calls.items()}
    product = 2 * N * H * T * T * HEAD_WIDTH
    return Work(
        variants,
        [expected],
        tolerance=2e-2,  # bf16: probabilities and results of 8 bits
        # qkv read and out written; in the backward qkv, out and its gradient read, one written
        bytes=qkv.nbytes * 4 // 3 + (qkv.nbytes * 8 // 3 if is_step else 0),
        flops=product * (7 if is_step else 2),
        dtype=torch.bfloat16,
        backend=str(chosen),
        absent=absent,
        values={"passed_over": chosen.passed_over},
    )


def _per_window(call: Call, x_T3HK: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([call(part[None])[0] for part in torch.split(x_T3HK, list(lengths))])


def _packed_work(lengths: tuple[int, ...], num_heads: int, device: Device) -> Work:
    qkv_T3HK = draw_qkv((sum(lengths), 3, num_heads, HEAD_WIDTH), torch.bfloat16, device)
    chosen = choose_varlen_backend(device, torch.bfloat16, HEAD_WIDTH, False)
    calls: dict[str, Call] = {"tapct attention_varlen": lambda x: attention_varlen(x, lengths)}
    absent = {}
    for backend in get_args(VarlenName):
        facts = (device, torch.bfloat16, HEAD_WIDTH, False, False)
        if reason := _varlen_refusal(backend, *facts):
            absent[backend] = reason
        elif backend != chosen.name:
            calls[backend] = partial(attention_varlen, lengths=lengths, backend=backend)
    calls["one call per window"] = lambda x: _per_window(attention, x, lengths)
    expected = _per_window(lambda x: exact(x, None), qkv_T3HK.detach(), lengths)
    return Work(
        {name: partial(_forward, call, qkv_T3HK) for name, call in calls.items()},
        [expected],
        tolerance=2e-2,
        bytes=qkv_T3HK.nbytes * 4 // 3,
        flops=sum(4 * num_heads * length**2 * HEAD_WIDTH for length in lengths),
        dtype=torch.bfloat16,
        backend=str(chosen),
        absent=absent,
        values={"passed_over": chosen.passed_over},
    )


SOURCES = [
    *("kernels/tapct_kernels/attention.py", "kernels/tapct_kernels/flash_attn.py"),
    *("csrc/vit_ops.cpp", "csrc/attention_avx.cpp", "csrc/team.cpp"),  # amx and avx
]
main = op_bench(__file__, SOURCES, cases)

if __name__ == "__main__":
    main()

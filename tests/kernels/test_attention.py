"""The attention dispatch: every backend against a formula in float64, and the choice among them."""

import math
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tapct_kernels import (
    attention,
    attention_ref,
    attention_varlen,
    choose_backend,
    choose_varlen_backend,
    try_backends,
)
from tapct_kernels.attention import (
    _DENSE,
    _VARLEN,
    _dense,
    _dense_refusal,
    _trial,
    _trial_input,
    _varlen_refusal,
)

CACHED = (choose_backend, choose_varlen_backend, _dense_refusal, _varlen_refusal)
# Without those that tapct_fast provides and tests in tests/model/test_cpu_attention.py.
TORCH_ON_CPU = _DENSE["cpu"][2:]


def sample(
    num_tokens: int, num_heads: int = 2, head_width: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (2, num_tokens, 3, num_heads, head_width)
    return torch.randn(shape, generator=generator).to(dtype)


def formula(qkv_NT3HK: Tensor) -> Tensor:
    """One query, one head at a time, in float64."""
    N, T, _, H, K = qkv_NT3HK.shape
    q, k, v = qkv_NT3HK.double().unbind(2)
    out_NTHK = torch.empty(N, T, H, K, dtype=torch.float64)
    for n in range(N):
        for h in range(H):
            for t in range(T):
                weight_T = torch.exp((k[n, :, h] * q[n, t, h]).sum(1) / math.sqrt(K))
                out_NTHK[n, t, h] = (weight_T[:, None] * v[n, :, h]).sum(0) / weight_T.sum()
    return out_NTHK


# 3e-2: values and probabilities of 8 bits, summed in float32
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)],
    ids=str,
)
@pytest.mark.parametrize("backend", [None, *TORCH_ON_CPU])
@pytest.mark.parametrize(("num_tokens", "head_width"), [(1, 64), (21, 64), (33, 8), (16, 12)])
def test_every_backend_of_the_cpu_matches_the_formula_in_float64(
    num_tokens: int, head_width: int, backend: Any, dtype: torch.dtype, tolerance: float
) -> None:
    qkv_NT3HK = sample(num_tokens, head_width=head_width, dtype=dtype)
    out_NTHK = attention(qkv_NT3HK, backend=backend)
    assert out_NTHK.dtype == dtype
    torch.testing.assert_close(
        out_NTHK.double(), formula(qkv_NT3HK), rtol=tolerance, atol=tolerance
    )


def test_eager_definition_matches_the_formula() -> None:
    qkv_NT3HK = sample(9, dtype=torch.float64)
    torch.testing.assert_close(attention_ref(qkv_NT3HK), formula(qkv_NT3HK), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "stride 0"])
def test_views_give_the_result_of_copies(layout: str) -> None:
    qkv_NT3HK = sample(9)
    if layout == "transposed":
        qkv_NT3HK = qkv_NT3HK.transpose(1, 4).contiguous().transpose(1, 4)
    else:
        qkv_NT3HK = qkv_NT3HK[:1].expand(2, -1, -1, -1, -1)
    expected = attention(qkv_NT3HK.contiguous())
    torch.testing.assert_close(attention(qkv_NT3HK), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", TORCH_ON_CPU)
def test_gradients_match_finite_differences_in_float64(backend: Any) -> None:
    qkv_NT3HK = sample(4, 2, 8, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, backend=backend), qkv_NT3HK)


def test_dispatch_compiles_to_one_graph_with_equal_gradients() -> None:
    _clear()  # the first choice of a process may be made while it compiles
    qkv_NT3HK = sample(9).requires_grad_()

    def loss_of(qkv: Tensor) -> Tensor:
        return attention(qkv).square().mean() + attention_varlen(qkv[0], (4, 5)).square().mean()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(qkv_NT3HK), qkv_NT3HK)
    (expected,) = torch.autograd.grad(loss_of(qkv_NT3HK), qkv_NT3HK)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_first_choice_ignores_the_modes_around_it_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    _clear()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        attention(sample(5))
    _clear()
    with FlopCounterMode(display=False) as counter:
        attention(sample(5), backend="sdpa math")
    assert counter.get_total_flops() == 2 * 2 * (2 * 2 * 5 * 5 * 64)
    attention(sample(5).requires_grad_()).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


class Dispatch(torch.nn.Module):
    def forward(self, qkv_NT3HK: Tensor) -> Tensor:
        return attention(qkv_NT3HK)


def test_dispatch_exports_and_takes_tensors_without_values() -> None:
    _clear()
    qkv_NT3HK = sample(5)
    exported = torch.export.export(Dispatch(), (qkv_NT3HK,)).module()
    torch.testing.assert_close(exported(qkv_NT3HK), attention(qkv_NT3HK), rtol=0, atol=0)
    assert attention(qkv_NT3HK.to("meta")).shape == (2, 5, 2, 64)


@pytest.mark.parametrize("lengths", [(21,), (1, 5, 15), (7, 7, 7), (4, 4, 13)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences_get_what_each_gets_alone(
    lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    qkv_T3HK = sample(21, dtype=dtype)[0]
    alone = [attention(part[None])[0] for part in qkv_T3HK.split(lengths)]
    found = attention_varlen(qkv_T3HK, lengths)
    # one batch or several calls: the same rows in the same order, but not the same tiles
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(found, torch.cat(alone), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda qkv: attention(qkv[0]), r"not \(N, T, 3, H, K\)"),
        (lambda qkv: attention(qkv.transpose(1, 2)), r"not \(N, T, 3, H, K\)"),
        (lambda qkv: attention(qkv.cpu(), backend="sdpa cudnn"), "not a backend of cpu"),
        (lambda qkv: attention(qkv.cpu(), backend="flash-attn 3"), "not a backend of cpu"),
        (lambda qkv: attention_varlen(qkv, (5,)), r"not \(T, 3, H, K\)"),
        (lambda qkv: attention_varlen(qkv[0], (2, 2)), r"lengths \[2, 2\] do not cover 5 tokens"),
        (lambda qkv: attention_varlen(qkv[0], (5, 0)), "do not cover"),
        (lambda qkv: attention_varlen(qkv[0].cpu(), (5,), backend="torch varlen"), "of cpu"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(sample(5))


def test_choice_on_the_cpu_is_recorded_and_made_once() -> None:
    for needs_grad in (False, True):
        chosen = choose_backend("cpu", torch.float32, 32, needs_grad)
        assert chosen.name == "sdpa flash"
        assert str(chosen) == f"sdpa flash (torch {torch.__version__})"
        assert [name for name, _ in chosen.passed_over] == ["amx", "avx"]
        assert choose_backend("cpu", torch.float32, 32, needs_grad) is chosen
    assert choose_varlen_backend("cpu", torch.float32, 64, False).name == "dense"


def test_every_backend_is_tried_in_the_order_of_choice() -> None:
    trials = try_backends("cpu", torch.float32, 32, False)
    assert [trial.name for trial in trials] == list(_DENSE["cpu"])
    chosen = choose_backend("cpu", torch.float32, 32, False)
    usable = [trial for trial in trials if trial.refusal is None]
    assert (usable[0].name, usable[0].version) == (chosen.name, chosen.version)
    assert [(t.name, t.refusal) for t in trials if t.refusal] == list(chosen.passed_over)
    assert [t.name for t in usable] == ["sdpa flash", "sdpa math"]


def test_backend_that_fails_or_errs_is_passed_over_with_the_reason() -> None:
    qkv_NT3HK = _trial_input("cpu", torch.float32, 64)

    def refuse(_: Tensor) -> Tensor:
        warnings.warn("Memory efficient kernel not used because:", stacklevel=2)
        warnings.warn("Head width 64 is cursed. (Triggered internally at x.cpp:1.)", stacklevel=2)
        raise RuntimeError("No available kernel. Aborting execution.")

    def break_down(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory is no property of a backend")

    assert _trial(attention_ref, attention_ref, qkv_NT3HK, True) is None
    assert _trial(refuse, attention_ref, qkv_NT3HK, False) == "Head width 64 is cursed."
    wrong = _trial(lambda qkv: 1.1 * attention_ref(qkv), attention_ref, qkv_NT3HK, False)
    assert wrong == "wrong result: relative error 0.1"
    not_finite = _trial(lambda qkv: qkv[:, :, 0] * math.nan, attention_ref, qkv_NT3HK, False)
    assert not_finite == "wrong result: relative error nan"
    with pytest.raises(torch.OutOfMemoryError):
        _trial(break_down, attention_ref, qkv_NT3HK, False)


def test_sdpa_backend_that_cannot_run_raises() -> None:
    with pytest.raises(RuntimeError, match=r"No .*(backend|kernel)"):
        _dense("sdpa efficient", sample(5).cpu())


def _clear() -> None:
    for function in CACHED:
        function.cache_clear()


def test_no_optional_package_is_imported_with_the_library() -> None:
    code = (
        "import sys, tapct_kernels; names = {m.split('.')[0] for m in sys.modules}; "
        "assert not names & {'flash_attn', 'flash_attn_interface', 'flash_attn_3', 'xformers'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def eager(qkv_NT3HK: Tensor) -> Tensor:
    """Compute in the dtype given, scores and probabilities rounded to it as any eager code does."""
    q_NHTK, k_NHTK, v_NHTK = qkv_NT3HK.permute(2, 0, 3, 1, 4).unbind(0)
    weight_NHTT = (q_NHTK @ k_NHTK.mT * q_NHTK.shape[-1] ** -0.5).softmax(-1)
    return (weight_NHTT @ v_NHTK).transpose(1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", _DENSE["cuda"])
@pytest.mark.parametrize("num_tokens", [437, 2357])
def test_backend_on_the_gpu_errs_at_most_twice_as_much_as_eager(
    backend: Any, num_tokens: int
) -> None:
    if _dense_refusal(backend, "cuda", torch.bfloat16, 64, True, False):
        with pytest.raises(ValueError, match="cannot run here"):
            attention(sample(5, dtype=torch.bfloat16).cuda().requires_grad_(), backend=backend)
        return
    for seed in range(20):
        generator = torch.Generator("cuda").manual_seed(seed)
        qkv = torch.randn(1, num_tokens, 3, 6, 64, generator=generator, device="cuda").bfloat16()
        grad = torch.randn(1, num_tokens, 6, 64, generator=generator, device="cuda").bfloat16()
        results = []
        for call, dtype in (
            (attention_ref, torch.float64),
            (eager, torch.bfloat16),
            (lambda x: attention(x, backend=backend), torch.bfloat16),
        ):
            x = qkv.to(dtype).requires_grad_()
            out = call(x)
            results.append([out.detach(), *torch.autograd.grad(out, x, grad.to(dtype))])
        for exact, plain, found in zip(*results, strict=True):
            assert (found.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", _DENSE["cuda"])
def test_forward_on_the_gpu_repeats_bit_for_bit(backend: Any) -> None:
    if _dense_refusal(backend, "cuda", torch.bfloat16, 64, False, False):
        return  # that this raises is tested above
    qkv_NT3HK = sample(437, 6, 64, torch.bfloat16).cuda()
    first = attention(qkv_NT3HK, backend=backend)
    assert all(torch.equal(attention(qkv_NT3HK, backend=backend), first) for _ in range(100))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", _VARLEN["cuda"])
def test_packed_sequences_on_the_gpu_get_what_each_gets_alone(backend: Any) -> None:
    if _varlen_refusal(backend, "cuda", torch.bfloat16, 64, False, False):
        with pytest.raises(ValueError, match="cannot run here"):
            attention_varlen(sample(5, dtype=torch.bfloat16)[0].cuda(), (5,), backend=backend)
        return
    lengths = (437, 5, 1181, 437)
    qkv_T3HK = torch.randn(sum(lengths), 3, 6, 64, device="cuda").bfloat16()
    alone = torch.cat([attention(part[None])[0] for part in qkv_T3HK.split(lengths)])
    found = attention_varlen(qkv_T3HK, lengths, backend=backend)
    torch.testing.assert_close(found, alone, rtol=1.6e-2, atol=8e-3)


@pytest.mark.gpu
def test_choice_on_the_gpu_is_a_fused_kernel_and_compiles() -> None:
    chosen = choose_backend("cuda", torch.bfloat16, 64, True)
    assert chosen.name not in ("sdpa efficient", "sdpa math"), chosen
    assert choose_backend("cuda", torch.float32, 64, True).name == "sdpa efficient"
    assert choose_backend("cuda", torch.float64, 64, True).name == "sdpa math"
    qkv_NT3HK = sample(437, 6, 64, torch.bfloat16).cuda().requires_grad_()
    compiled = torch.compile(attention, fullgraph=True)
    found, expected = compiled(qkv_NT3HK), attention(qkv_NT3HK)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.square().mean().backward()

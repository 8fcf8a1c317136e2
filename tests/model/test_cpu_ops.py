"""Shape suffixes: N volumes or rows, T tokens, H heads, K head width, D width."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct_fast import _native
from tapct_fast.model import cpu_ops
from tapct_kernels import attention
from tapct_kernels.attention import attention_ref, choose_backend, provide_amx

needs_amx = pytest.mark.skipif(not _native.has_amx(), reason="this CPU has no AMX tiles")
needs_avx512 = pytest.mark.skipif(
    not _native.has_avx512_bf16(), reason="this CPU has no AVX-512 with bfloat16"
)


def qkv_of(num: int, tokens: int, heads: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(num, tokens, 3, heads, 64, generator=generator).mul(scale).bfloat16()


TOKENS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 288, 511, 513, 2357]


def gradient(call: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
    qkv = qkv.detach().requires_grad_()
    out = call(qkv)
    grad_out = torch.arange(out.numel(), dtype=torch.float64).mul(0.7).sin().reshape(out.shape)
    return torch.autograd.grad(out, qkv, grad_out.bfloat16().to(out.dtype))[0]


def norms(qkv: Tensor) -> Tensor:
    """Return those of query, key and value."""
    return torch.linalg.vector_norm(qkv, dim=(0, 1, 3, 4))


@needs_amx
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_is_the_softmax_at_every_edge_of_a_tile(tokens: int) -> None:
    for num, heads, scale in ((1, 1, 1.0), (2, 3, 4.0)):
        qkv = qkv_of(num, tokens, heads, scale)
        expected = attention_ref(qkv.double())
        ours = cpu_ops.attention_amx(qkv)
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - expected).norm() / expected.norm()
        theirs = attention(qkv, backend="sdpa flash")
        their_error = (theirs.double() - expected).norm() / expected.norm()
        assert error < 3e-3
        assert error < 1.1 * their_error + 1e-4


@needs_amx
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_gradient_is_that_of_the_softmax_at_every_edge_of_a_tile(tokens: int) -> None:
    for num, heads, scale in ((1, 1, 1.0), (2, 3, 4.0)):
        qkv = qkv_of(num, tokens, heads, scale)
        expected = gradient(attention_ref, qkv.double())
        ours = gradient(cpu_ops.attention_amx, qkv)
        theirs = gradient(partial(attention, backend="sdpa flash"), qkv)
        assert ours.dtype == torch.bfloat16
        # Of one token the gradients of query and key are zero: no relative error there.
        size = expected.norm() if tokens == 1 else norms(expected)
        error, their_error = (norms(x.double() - expected) / size for x in (ours, theirs))
        assert (error < 1e-2).all()
        assert (error < 1.2 * their_error + 1e-4).all()


@needs_amx
def test_a_gradient_that_is_one_number_is_taken() -> None:
    qkv = qkv_of(2, 40, 2).requires_grad_()
    (found,) = torch.autograd.grad(cpu_ops.attention_amx(qkv).sum(), qkv)
    (expected,) = torch.autograd.grad(attention_ref(qkv.double()).sum(), qkv)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    with pytest.raises(RuntimeError, match="does not require grad"):
        cpu_ops._attention_amx(qkv)[1].sum().backward()  # the level is no result


@needs_amx
def test_scores_of_any_size_neither_overflow_nor_vanish() -> None:
    qkv = qkv_of(1, 300, 2)
    qkv[:, :, 0] *= 200  # scores of thousands: one key takes all
    expected = attention_ref(qkv.double())
    ours = cpu_ops.attention_amx(qkv)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.double(), expected, atol=0.05, rtol=0.02)
    # All far below zero, where a key that is not there would have the largest score.
    below = qkv_of(1, 37, 1).abs()
    below[:, :, 0] *= -100
    for one in (qkv, below):
        assert gradient(cpu_ops.attention_amx, one).isfinite().all()
    qkv[:, 7, 1] = math.nan  # a key that is not finite reaches every query
    assert cpu_ops.attention_amx(qkv).isnan().all()
    assert gradient(cpu_ops.attention_amx, qkv).isnan().all()


@needs_amx
def test_threads_and_batches_do_not_change_a_bit() -> None:
    qkv, grad_out = qkv_of(3, 700, 3), qkv_of(3, 700, 3)[:, :, 1]

    def results(volumes: slice) -> list[Tensor]:
        part = qkv[volumes].clone().requires_grad_()
        out = cpu_ops.attention_amx(part)
        return [out.detach(), *torch.autograd.grad(out, part, grad_out[volumes])]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(slice(3))
        torch.set_num_threads(3)
        for one, other, of_one in zip(
            results(slice(3)), expected, results(slice(1, 2)), strict=True
        ):
            assert torch.equal(one, other)
            assert torch.equal(of_one, other[1:2])
    finally:
        torch.set_num_threads(before)


@needs_amx
def test_amx_is_chosen_for_bfloat16_only() -> None:
    for needs_grad in (False, True):
        assert choose_backend("cpu", torch.bfloat16, 64, needs_grad).name == "amx"
        assert choose_backend("cpu", torch.float32, 64, needs_grad).name == "sdpa flash"
    with pytest.raises(ValueError, match="takes bfloat16 and a head width of 64"):
        attention(qkv_of(1, 4, 1).float(), backend="amx")


@needs_amx
def test_a_wrong_kernel_is_passed_over() -> None:
    try:
        provide_amx(lambda qkv: qkv[:, :, 0] * 0, "wrong")
        backend = choose_backend("cpu", torch.bfloat16, 64, False)
        assert backend.name == "sdpa flash"
        assert backend.passed_over[0][0] == "amx"
    finally:
        provide_amx(cpu_ops.attention_amx, "tapct_fast")


@needs_avx512
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 48), (65, 384), (130, 768)])
@pytest.mark.parametrize("has_branch", [True, False])
def test_add_norm_is_a_sum_and_a_layer_norm(rows: int, width: int, has_branch: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x_ND = torch.randn(rows, width, generator=generator) * 3 + 1
    branch_ND = torch.randn(rows, width, generator=generator).bfloat16() if has_branch else None
    weight_D, bias_D = torch.randn(2, width, generator=generator)
    sum_ND = x_ND if branch_ND is None else x_ND + branch_ND
    expected_ND = F.layer_norm(sum_ND.double(), (width,), weight_D.double(), bias_D.double(), 1e-6)
    ours_ND = x_ND.clone()
    normed_ND = cpu_ops.add_norm(ours_ND, branch_ND, weight_D, bias_D, 1e-6)
    assert torch.equal(ours_ND, sum_ND)
    # Half a step of bfloat16, and what float32 sums are off.
    torch.testing.assert_close(normed_ND.double(), expected_ND, rtol=2**-8, atol=1e-5)


@needs_avx512
def test_gelu_is_the_nearest_bfloat16_for_every_bfloat16() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    expected = x.double() / 2 * torch.special.erfc(-x.double() / 2**0.5)
    expected[x == 0] = x[x == 0].double()
    ours = x.clone()
    cpu_ops.gelu_(ours)
    assert torch.equal(ours.isnan(), expected.isnan())
    is_number = ~expected.isnan()
    assert torch.equal(ours[is_number], expected.float().bfloat16()[is_number])
    odd = x[7:44].clone()  # no multiple of what a register holds
    cpu_ops.gelu_(odd)
    assert torch.equal(odd.view(torch.int16), ours[7:44].view(torch.int16))


@needs_avx512
def test_a_packed_weight_multiplies_as_a_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(96, 64, generator=generator).bfloat16()
    bias_O = torch.randn(96, generator=generator).bfloat16()
    packed = cpu_ops.pack(weight_OI, bias_O)
    assert packed is not None
    for shape in ((1, 64), (2, 37, 64), (300, 64)):
        x = torch.randn(shape, generator=generator).bfloat16()
        found = cpu_ops.packed_linear(x, packed, bias_O)
        expected = F.linear(x.double(), weight_OI.double(), bias_O.double())
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=0.05)


def test_a_torch_without_the_operators_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, bias_O = torch.ones(8, 8).bfloat16(), torch.ones(8).bfloat16()
    monkeypatch.setattr(cpu_ops, "packed_linear", lambda x, *_: x * 0)  # computes otherwise
    assert cpu_ops.pack(weight_OI, bias_O) is None


@needs_amx
def test_the_operators_keep_what_they_tell_a_compiler() -> None:
    torch.library.opcheck(cpu_ops._attention_amx, (qkv_of(2, 37, 2),))
    # opcheck itself cannot compare gradients where an output has none.
    kept = ("test_schema", "test_autograd_registration", "test_faketensor")
    qkv = qkv_of(2, 37, 2).requires_grad_()
    torch.library.opcheck(cpu_ops._attention_amx, (qkv,), test_utils=kept)
    compiled = torch.compile(cpu_ops.attention_amx, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled, qkv), gradient(cpu_ops.attention_amx, qkv))
    x = torch.randn(2, 5, 32)
    branch = torch.randn(2, 5, 32).bfloat16()
    torch.library.opcheck(cpu_ops.add_norm, (x, branch, torch.ones(32), torch.zeros(32), 1e-6))
    torch.library.opcheck(cpu_ops.gelu_, (branch,))


def test_the_native_functions_refuse_what_they_cannot_take() -> None:
    bits = qkv_of(1, 4, 2).view(torch.uint16).numpy()
    out, level = bits[:, :, 0].copy(), torch.zeros(1, 2, 4).numpy()
    with pytest.raises(ValueError, match="attention_amx"):
        _native.attention_amx(bits, out[:, :, :1].copy(), level, 1)
    with pytest.raises(ValueError, match="attention_amx"):
        _native.attention_amx(bits, out, level[:, :1].copy(), 1)
    for wrong in ((out[:, :3].copy(), bits), (out, bits[:, :3].copy())):
        with pytest.raises(ValueError, match="attention_amx"):
            _native.attention_amx_backward(wrong[0], bits, out, level, wrong[1], 1)
    x = torch.zeros(2, 16).numpy()
    with pytest.raises(ValueError, match="one shape"):
        _native.add_norm(x, None, x[0], x[0, :8].copy(), 1e-6, bits[0, :2, 0, 0, :16].copy(), 1)

"""Shape suffixes: N volumes or rows, T tokens, H heads, K head width, D width."""

import math

import pytest
import torch
import torch.nn.functional as F

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


@needs_amx
@pytest.mark.parametrize(
    "tokens", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 288, 511, 513, 2357]
)
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
def test_scores_of_any_size_neither_overflow_nor_vanish() -> None:
    qkv = qkv_of(1, 300, 2)
    qkv[:, :, 0] *= 200  # scores of thousands: one key takes all
    expected = attention_ref(qkv.double())
    ours = cpu_ops.attention_amx(qkv)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.double(), expected, atol=0.05, rtol=0.02)
    qkv[:, 7, 1] = math.nan  # a key that is not finite reaches every query
    assert cpu_ops.attention_amx(qkv).isnan().all()


@needs_amx
def test_threads_and_batches_do_not_change_a_bit() -> None:
    qkv = qkv_of(3, 700, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu_ops.attention_amx(qkv)
        torch.set_num_threads(3)
        assert torch.equal(cpu_ops.attention_amx(qkv), one)
        assert torch.equal(cpu_ops.attention_amx(qkv[1:2].contiguous()), one[1:2])
    finally:
        torch.set_num_threads(before)


@needs_amx
def test_amx_is_chosen_for_bfloat16_inference_only() -> None:
    assert choose_backend("cpu", torch.bfloat16, 64, False).name == "amx"
    assert choose_backend("cpu", torch.bfloat16, 64, True).name == "sdpa flash"
    assert choose_backend("cpu", torch.float32, 64, False).name == "sdpa flash"
    with pytest.raises(ValueError, match="for inference only"):
        attention(qkv_of(1, 4, 1).requires_grad_(), backend="amx")


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


@needs_amx
def test_the_operators_keep_what_they_tell_a_compiler() -> None:
    torch.library.opcheck(cpu_ops.attention_amx, (qkv_of(2, 37, 2),))
    x = torch.randn(2, 5, 32)
    branch = torch.randn(2, 5, 32).bfloat16()
    torch.library.opcheck(cpu_ops.add_norm, (x, branch, torch.ones(32), torch.zeros(32), 1e-6))
    torch.library.opcheck(cpu_ops.gelu_, (branch,))


def test_the_native_functions_refuse_what_they_cannot_take() -> None:
    bits = qkv_of(1, 4, 2).view(torch.uint16).numpy()
    with pytest.raises(ValueError, match="attention_amx"):
        _native.attention_amx(bits, bits[:, :, 0, :1].copy(), 1)
    x = torch.zeros(2, 16).numpy()
    with pytest.raises(ValueError, match="one shape"):
        _native.add_norm(x, None, x[0], x[0, :8].copy(), 1e-6, bits[0, :2, 0, 0, :16].copy(), 1)

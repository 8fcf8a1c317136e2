"""Shape suffixes: N rows, D width, I input width, O output width."""

import pytest
import torch
import torch.nn.functional as F

from tapct_fast import _native
from tapct_fast.model import cpu_ops

needs_avx512 = pytest.mark.skipif(
    not _native.has_avx512_bf16(), reason="this CPU has no AVX-512 with bfloat16"
)


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


@needs_avx512
def test_the_operators_keep_what_they_tell_a_compiler() -> None:
    x = torch.randn(2, 5, 32)
    branch = torch.randn(2, 5, 32).bfloat16()
    torch.library.opcheck(cpu_ops.add_norm, (x, branch, torch.ones(32), torch.zeros(32), 1e-6))
    torch.library.opcheck(cpu_ops.gelu_, (branch,))


def test_the_native_functions_refuse_what_they_cannot_take() -> None:
    x = torch.zeros(2, 16).numpy()
    with pytest.raises(ValueError, match="one shape"):
        _native.add_norm(
            x, None, x[0], x[0, :8].copy(), 1e-6, torch.zeros(2, 16, dtype=torch.uint16).numpy(), 1
        )

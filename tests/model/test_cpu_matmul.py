"""Products of float32 on AMX tiles against float64; see ``tapct_fast.model.cpu_matmul``.

Shape suffixes: as there.
"""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast import _native
from tapct_fast.model import cpu_matmul
from tapct_fast.model.block import Mlp
from tapct_fast.model.cpu_matmul import addmm, fits
from tapct_fast.model.linear import linear, product

needs_amx = pytest.mark.skipif(not _native.has_amx(), reason="this CPU has no AMX tiles")
SHAPES = [  # around tiles, panels, steps between stores, and columns and steps packed at a time
    *((1, 1, 1), (16, 32, 16), (17, 33, 15), (31, 63, 33), (32, 64, 32), (129, 70, 65)),
    *((40, 511, 48), (33, 513, 31), (65, 2049, 40), (70, 40, 1537), (300, 1100, 200)),
]


@pytest.fixture
def _restored() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def factors_of(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a_MK, b_KN and bias_N of magnitudes from 1e-6 to 1e6."""
    (M, K, N), generator = shape, torch.Generator().manual_seed(sum(shape))
    drawn = [torch.randn(size, generator=generator) for size in ((M, K), (K, N), (N,))]
    powers = [10 ** torch.randn(x.shape, generator=generator).clamp(-3, 3) for x in drawn[:2]]
    return drawn[0] * powers[0], drawn[1] * powers[1], drawn[2]


def native(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None, pieces: int, threads: int) -> Tensor:
    out_MN = torch.full((a_MK.shape[0], b_KN.shape[1]), math.nan)
    bias = None if bias_N is None else bias_N.numpy()
    _native.matmul_amx(a_MK.numpy(), b_KN.numpy(), bias, out_MN.numpy(), pieces, threads)
    return out_MN


def error(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None) -> Tensor:
    """Return the error of every element as a share of the magnitudes that were summed."""
    a_MK, b_KN = a_MK.double(), b_KN.double()
    exact_MN, size_MN = a_MK @ b_KN, a_MK.abs() @ b_KN.abs()
    if bias_N is not None:
        exact_MN, size_MN = exact_MN + bias_N, size_MN + bias_N.abs()
    return (out_MN - exact_MN).abs() / size_MN


@needs_amx
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["as they are", "left turned", "right turned", "both turned"])
def test_a_product_is_as_exact_as_float32(shape: tuple[int, int, int], layout: str) -> None:
    a_MK, b_KN, bias_N = factors_of(shape)
    a_MK = a_MK.t().contiguous().t() if layout in ("left turned", "both turned") else a_MK
    b_KN = b_KN.t().contiguous().t() if layout in ("right turned", "both turned") else b_KN
    for bias in (None, bias_N):
        three, two = (native(a_MK, b_KN, bias, pieces, 2) for pieces in (3, 2))
        found = error(three, a_MK, b_KN, bias)
        theirs = error(a_MK @ b_KN if bias is None else a_MK @ b_KN + bias, a_MK, b_KN, bias)
        # Six products per step of the sum are rounded, up or down, and two pairs are left out.
        assert found.max() < 2**-24 * (6 * shape[1]) ** 0.5 + 2.1 * 2**-24
        assert found.square().mean() ** 0.5 < 2 * theirs.square().mean() ** 0.5 + 2**-25
        # Either number misses up to 2**-16 of itself, and the product of second pieces is left out.
        assert error(two, a_MK, b_KN, bias).max() < 3.1 * 2**-16


@needs_amx
def test_numbers_of_24_bits_are_kept_whole() -> None:
    # Ones with a last bit: a piece that is lost shows.
    a_MK = torch.eye(64) * (1 + 2**-23)
    b_KN = 1 + torch.arange(64 * 64).reshape(64, 64) * 2**-23
    exact_MN = (a_MK.double() @ b_KN.double()).float()
    assert torch.equal(native(torch.eye(64), b_KN, None, 3, 1), b_KN)
    torch.testing.assert_close(native(a_MK, b_KN, None, 3, 1), exact_MN, rtol=2**-23, atol=0)


@needs_amx
def test_what_is_not_finite_reaches_its_row_and_no_other() -> None:
    all_bits = torch.tensor([-1], dtype=torch.int32).view(torch.float32).item()  # a NaN: rounded, 0
    for value, pieces in itertools.product((math.nan, math.inf, all_bits), (3, 2)):
        a_MK, b_KN, _ = factors_of((50, 40, 33))
        a_MK[7, 3] = value
        out_MN = native(a_MK, b_KN, None, pieces, 1)
        assert out_MN[7].isnan().all()
        assert out_MN[torch.arange(50) != 7].isfinite().all()


@needs_amx
@pytest.mark.parametrize("shape", [(700, 600, 200), (150, 600, 700)])  # the latter by parts
def test_neither_threads_nor_other_rows_change_a_bit(shape: tuple[int, int, int]) -> None:
    a_MK, b_KN, bias_N = factors_of(shape)
    expected = native(a_MK, b_KN, bias_N, 3, 1)
    assert torch.equal(native(a_MK, b_KN, bias_N, 3, 3), expected)
    assert torch.equal(native(a_MK[100:133], b_KN, bias_N, 3, 2), expected[100:133])


@needs_amx
@pytest.mark.usefixtures("_restored")
def test_pytorchs_precision_says_how_many_pieces_there_are() -> None:
    a_MK, b_KN, _ = factors_of((1024, 200, 130))
    for precision, pieces in (("highest", 3), ("high", 2), ("medium", 2)):
        torch.set_float32_matmul_precision(precision)
        found = addmm(None, a_MK, b_KN)
        assert torch.equal(found, native(a_MK, b_KN, None, pieces, torch.get_num_threads()))


@needs_amx
@pytest.mark.parametrize("rows", [160, 1024, 1100])  # by PyTorch, or on tiles
def test_gradients_of_a_layer_are_those_in_float64(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x_ND = torch.randn(rows // 11, 11, 400, generator=generator)
    if rows != 1100:
        x_ND = torch.randn(rows, 400, generator=generator)
    layer = nn.Linear(400, 1200)
    grad_NE = torch.randn(*x_ND.shape[:-1], 1200, generator=generator)
    inputs = [x_ND.requires_grad_(), layer.weight, layer.bias]
    found = torch.autograd.grad(linear(x_ND, layer), inputs, grad_NE)
    doubles = [i.detach().double().requires_grad_() for i in inputs]
    expected = torch.autograd.grad(F.linear(*doubles), doubles, grad_NE.double())
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 2e-6 * other.norm()
        assert one.is_contiguous()
    # A gradient that is one number, of no stride.
    (slope,) = torch.autograd.grad(linear(x_ND, layer).sum(), [layer.weight])
    expected_ED = doubles[0].detach().flatten(0, -2).sum(0).expand(1200, 400)
    assert (slope - expected_ED).norm() < 2e-6 * expected_ED.norm()


@needs_amx
def test_only_what_it_may_and_should_takes_the_tiles() -> None:
    x_ND, weight_ED = torch.randn(1024, 128), torch.randn(128, 128)
    assert fits(x_ND, weight_ED)
    assert fits(x_ND.reshape(4, 256, 128), weight_ED)
    assert not fits(x_ND[:400], weight_ED)
    assert not fits(x_ND, weight_ED[:100])
    assert not fits(x_ND[:, :100], weight_ED[:, :100])
    assert not fits(x_ND.double(), weight_ED.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits(x_ND, weight_ED)
        assert product(x_ND, weight_ED).dtype == torch.bfloat16
    layer, seen = nn.Linear(128, 128), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    linear(x_ND, layer)
    assert seen == [1]


def test_a_layer_elsewhere_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "_HAS_AMX", False)
    x_ND, layer = torch.randn(1100, 130), nn.Linear(130, 140)
    assert torch.equal(linear(x_ND, layer), layer(x_ND))


@needs_amx
def test_the_operator_keeps_what_it_tells_a_compiler_and_no_export_holds_it() -> None:
    for a_MK in (torch.randn(1030, 130), torch.randn(130, 1030).t()):
        # Small: a compiler hands on other strides, for which the sums have another order.
        inputs = (torch.randn(400), a_MK * 0.1, torch.randn(400, 130).t() * 0.1)
        torch.library.opcheck(addmm.op, tuple(i.requires_grad_() for i in inputs))
    mlp, x_NTD = Mlp(128, 512), torch.randn(8, 150, 128)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_NTD), mlp(x_NTD))
    assert "tapct" not in torch.export.export(mlp, (x_NTD,)).graph_module.code


def test_a_parameter_stays_resizable() -> None:
    weight_ED = nn.Parameter(torch.randn(256, 128))
    cpu_matmul.linear(torch.randn(1024, 128), weight_ED, None)
    assert weight_ED.untyped_storage().resizable()


@needs_amx
def test_the_native_function_refuses_what_it_cannot_take() -> None:
    a_MK, b_KN, out_MN = (torch.zeros(s).numpy() for s in ((4, 6), (6, 5), (4, 5)))
    for wrong in ((a_MK, a_MK, None, out_MN), (a_MK, b_KN, out_MN[0, :3].copy(), out_MN)):
        with pytest.raises(ValueError, match=r"not \(M, K\), \(K, N\)"):
            _native.matmul_amx(*wrong, 3, 1)
    with pytest.raises(ValueError, match="one contiguous axis"):
        _native.matmul_amx(torch.zeros(8, 12)[::2, ::2].numpy(), b_KN, None, out_MN, 3, 1)
    with pytest.raises(ValueError, match="pieces must be 2 or 3"):
        _native.matmul_amx(a_MK, b_KN, None, out_MN, 1, 1)
    with pytest.raises(ValueError, match="a sum of nothing"):
        _native.matmul_amx(a_MK[:, :0], b_KN[:0], None, out_MN, 3, 1)

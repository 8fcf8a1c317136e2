"""The float32 kernels of training on the CPU: values and gradients against float64."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast import _native
from tapct_fast.model.cpu_training import bias_gelu
from tapct_fast.model.linear import linear_gelu

# The package exports a function of the module's name.
op = importlib.import_module("tapct_kernels.residual_norm")

SCALE, EPS = 1.5, 1e-6
FORMS = (
    *("all rows", "row subset", "no gamma", "residual", "residual without gamma", "layer_norm"),
    *("layer_norm of all", "no norm listed", "no tokens"),
)


@pytest.fixture
def _nan_outputs() -> Iterator[None]:
    """Fill new tensors with NaN, so that a row the kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gelu_ref(x: Tensor) -> Tensor:
    """Return the GELU in float64, without cancellation in the left tail."""
    x = x.double()
    return x / 2 * torch.special.erfc(-x / 2**0.5)


def gelu_slope_ref(x: Tensor) -> Tensor:
    x = x.double()
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    return torch.special.erfc(-x / 2**0.5) / 2 + x * density


def slope_of(x_ND: Tensor) -> Tensor:
    x_ND = x_ND.clone().requires_grad_()
    bias_gelu(x_ND, torch.zeros(x_ND.shape[-1])).sum().backward()
    assert x_ND.grad is not None
    return x_ND.grad


def dense_range() -> Tensor:
    powers = torch.logspace(-45, 1.2, 2**17, dtype=torch.float64).float()
    return torch.cat([torch.linspace(-15, 15, 2**21 - 2**18), powers, -powers]).reshape(-1, 2**10)


def test_gelu_errs_by_two_roundings_at_most_over_the_dense_range() -> None:
    x_ND = dense_range()
    expected_ND = gelu_ref(x_ND)
    error_ND = bias_gelu(x_ND, torch.zeros(2**10)).double().sub(expected_ND).abs()
    assert (error_ND / expected_ND.abs().clamp(min=1)).max() < 2e-7  # 1.2e-7 with AVX-512
    # In the left tail the rounding of x^2 / 2 counts: at -5 it is 12 * 2^-24.
    assert (error_ND / expected_ND.abs().clamp(min=1e-6)).max() < 1e-6


def test_the_slope_of_gelu_errs_by_two_roundings_at_most_over_the_dense_range() -> None:
    x_ND = dense_range()
    error_ND = slope_of(x_ND).double().sub(gelu_slope_ref(x_ND)).abs()
    assert error_ND.max() < 2.5e-7  # 1.9e-7 with AVX-512; PyTorch's own 2.8e-7


def test_gelu_of_what_is_not_finite_or_tiny_is_its_limit_or_nan() -> None:
    inf, nan, tiny, step = float("inf"), float("nan"), 1e-40, 2**-149
    x_N = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e30, -1e30, 3e38, -3e38, tiny, -tiny])
    # PyTorch too has NaN at minus infinity, a product with zero.
    expected_N = torch.tensor([inf, nan, nan, 0, 0, 1e30, 0, 3e38, 0, tiny / 2, -tiny / 2])
    slopes_N = torch.tensor([nan, nan, nan, 0.5, 0.5, 1, 0, 1, 0, 0.5, 0.5])
    for x_ND in (x_N[None], x_N[:, None]):  # one row, and rows of one
        found_ND = bias_gelu(x_ND, torch.zeros(x_ND.shape[1]))
        torch.testing.assert_close(
            found_ND.flatten(), expected_N, rtol=0, atol=step, equal_nan=True
        )
        found_ND = slope_of(x_ND)
        torch.testing.assert_close(found_ND.flatten(), slopes_N, rtol=0, atol=1e-7, equal_nan=True)


@pytest.mark.usefixtures("_nan_outputs")
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (37, 130), (2, 33, 48), (0, 16), (70, 0)])
def test_gelu_with_a_bias_and_its_gradients_match_float64(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x_ND = torch.randn(shape, generator=generator).mul(2).requires_grad_()
    bias_D = torch.randn(shape[-1], generator=generator).requires_grad_()
    grad_ND = torch.randn(shape, generator=generator)
    out_ND = bias_gelu(x_ND, bias_D)
    found = (out_ND, *torch.autograd.grad(out_ND, (x_ND, bias_D), grad_ND))
    sum_ND = x_ND.detach().double() + bias_D.detach().double()
    grad_x_ND = grad_ND * gelu_slope_ref(sum_ND)
    expected = (gelu_ref(sum_ND), grad_x_ND, grad_x_ND.flatten(0, -2).sum(0))
    for one, other in zip(found, expected, strict=True):
        # 1e-6: the sum of x and bias is rounded; the bias's gradient is a sum of up to 66 values
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=4e-6)


def test_gradients_of_a_linear_layer_with_gelu_match_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND, linear = torch.randn(2, 7, 12, generator=generator), nn.Linear(12, 20)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = [x_ND.requires_grad_(), linear.weight, linear.bias]
    weights_ND = torch.randn(2, 7, 20, generator=generator)
    found = torch.autograd.grad((linear_gelu(x_ND, linear) * weights_ND).sum(), inputs)

    def loss(*values: Tensor) -> float:
        return float((gelu_ref(F.linear(*values)) * weights_ND).sum())

    doubles = [i.detach().double() for i in inputs]
    for i, grad in enumerate(found):
        step = torch.randn(grad.shape, generator=generator, dtype=torch.float64) * 1e-5
        up, down = ([*doubles[:i], doubles[i] + s, *doubles[i + 1 :]] for s in (step, -step))
        slope = (loss(*up) - loss(*down)) / 2
        assert float((grad.double() * step).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_gradients_of_any_layout_are_taken() -> None:
    x_ND = torch.linspace(-3, 3, 66).reshape(11, 6).t().requires_grad_()  # (6, 11), transposed
    bias_D = torch.linspace(-1, 1, 11, requires_grad=True)
    for grad_ND in (torch.ones(()).expand(6, 11), torch.linspace(0, 1, 66).reshape(11, 6).t()):
        found = torch.autograd.grad(bias_gelu(x_ND, bias_D), (x_ND, bias_D), grad_ND)
        expected = torch.autograd.grad(F.gelu(x_ND + bias_D), (x_ND, bias_D), grad_ND)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def sample(form: str, width: int, tokens: int = 5) -> list[Any]:
    """Operands of the op: four samples, of which three have a branch and two others a norm."""
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x_NTD, weight_D, bias_D = 2 * normal(4, tokens, width) + 0.5, normal(width), normal(width)
    gamma_D, branch_NTD = normal(width), normal(4, tokens, width)
    index_K, next_index_J = torch.tensor([3, 0, 1]), torch.tensor([2, 1])
    norm = [weight_D, bias_D]
    operands = {
        "all rows": [x_NTD, branch_NTD, gamma_D, *norm, None, None],
        "row subset": [x_NTD, branch_NTD[:3], gamma_D, *norm, index_K, next_index_J],
        "no gamma": [x_NTD, branch_NTD[:3], None, *norm, index_K, None],
        "residual": [x_NTD, branch_NTD[:3], gamma_D, None, None, index_K, None],
        "residual without gamma": [x_NTD, branch_NTD, None, None, None, None, None],
        "layer_norm": [x_NTD, None, None, *norm, None, next_index_J],
        "layer_norm of all": [x_NTD, None, None, *norm, None, None],
        "no norm listed": [x_NTD, branch_NTD[:0], gamma_D, *norm, index_K[:0], index_K[:0]],
        "no tokens": [x_NTD[:, :0], branch_NTD[:, :0], gamma_D, *norm, None, None],
    }
    return [*operands[form], SCALE, EPS, torch.float32]


def is_native(inputs: list[Any]) -> bool:
    x_NTD, branch_KTD, *parameters = inputs[:5]
    return bool(op._goes_native([x_NTD, *parameters], branch_KTD, inputs[-1]))


def in_float64(inputs: list[Any]) -> list[Any]:
    doubles = [i.double() if torch.is_tensor(i) and i.is_floating_point() else i for i in inputs]
    return [*doubles[:-1], torch.float64]


def results(forward: Any, backward: Any, inputs: list[Any]) -> list[Tensor]:
    """Return both outputs and all gradients for upstream gradients given by a formula."""
    x_NTD, branch_KTD, gamma_D, weight_D, _, index_K, next_index_J, *_ = inputs
    out_NTD, normed_JTD = forward(*inputs)
    grads = [
        torch.linspace(-9, 9, t.numel()).sin().reshape(t.shape).to(t.dtype)
        for t in (out_NTD, normed_JTD)
    ]
    read_NTD = x_NTD if branch_KTD is None else out_NTD
    saved = (read_NTD, branch_KTD, gamma_D, weight_D, index_K, next_index_J)
    return [out_NTD, normed_JTD, *backward(*grads, *saved, SCALE, EPS)]


@pytest.mark.usefixtures("_nan_outputs")
@pytest.mark.parametrize(("width", "tokens"), [(1, 2), (20, 5), (65, 3), (384, 41)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_residual_norm_matches_the_definition_in_float64(
    form: str, width: int, tokens: int
) -> None:
    inputs = sample(form, width, tokens)
    assert is_native(inputs)
    found = results(op._op, op._backward_op, inputs)
    expected = results(op.residual_norm_ref, op._backward_ref, in_float64(inputs))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.is_contiguous()
        # As eager float32: statistics of values of order 1; gradients of parameters are sums of
        # up to 164. A row of one value has no deviation: its gradient is rounding over EPS.
        if width > 1:
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=4e-5)
        else:
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("_nan_outputs")
@pytest.mark.parametrize("width", [20, 384])
@pytest.mark.parametrize("form", FORMS)
def test_branch_and_norm_may_be_bfloat16(form: str, width: int) -> None:
    inputs = sample(form, width, 41)
    if inputs[1] is not None:
        inputs[1] = inputs[1].bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        inputs[-1] = dtype
        assert is_native(inputs)
        found = results(op._op, op._backward_op, inputs)
        eager = results(op.residual_norm_ref, op._backward_ref, inputs)
        for one, other in zip(found, eager, strict=True):
            assert one.dtype == other.dtype
            assert one.is_contiguous()
            # A sum that lies between two bfloat16 may end as either.
            rtol = 2**-7 if one.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(one, other, rtol=rtol, atol=4e-5)
            if one.dtype == torch.bfloat16:
                assert (one != other).sum() <= one.numel() / 100


def test_what_is_not_finite_stays_so_in_bfloat16() -> None:
    inputs = sample("all rows", 32)
    inputs[1], inputs[-1] = inputs[1].bfloat16(), torch.bfloat16
    # The NaN whose rounding would end in zero, and the sum that rounds up to infinity.
    inputs[0].view(torch.int32)[0, 0, 0] = 0x7FFFFFFF
    inputs[4][:] = 3.4e38
    normed_NTD = op._op(*inputs)[1]
    assert normed_NTD[0, 0].isnan().all()
    assert normed_NTD[1:].isinf().all()


@pytest.mark.parametrize("layout", ["transposed", "stride 0"])
def test_residual_norm_takes_gradients_of_any_layout(layout: str) -> None:
    inputs = sample("row subset", 24)
    leaves = [i.requires_grad_() for i in inputs[:5]]
    for forward in (op._op, op.residual_norm_ref):
        out_NTD, normed_JTD = forward(*inputs)
        if layout == "stride 0":
            grads = [torch.ones(()).expand_as(t) for t in (out_NTD, normed_JTD)]
        else:
            grads = [
                torch.linspace(-1, 1, t.numel()).reshape(t.mT.shape).mT
                for t in (out_NTD, normed_JTD)
            ]
        found = torch.autograd.grad((out_NTD, normed_JTD), leaves, grads)
        if forward is op._op:
            ours = found
    for one, other in zip(ours, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_a_nan_stays_in_its_row_and_reaches_the_sums() -> None:
    inputs = sample("all rows", 48)
    inputs[0][1, 2, 7] = torch.nan
    out_NTD, normed_JTD, grad_x_NTD, grad_branch_KTD, grads_3D = results(
        op._op, op._backward_op, inputs
    )
    for rows_NTD in (normed_JTD, grad_x_NTD, grad_branch_KTD):
        is_nan_NT = rows_NTD.isnan().any(-1)
        assert is_nan_NT.sum() == 1
        assert rows_NTD[1, 2].isnan().all()
    assert out_NTD.isnan().sum() == 1
    assert grads_3D[:2].isnan().all()
    assert not grads_3D[2].isnan().any()
    x_ND, bias_D = torch.ones(3, 5, requires_grad=True), torch.zeros(5, requires_grad=True)
    with torch.no_grad():
        x_ND[1, 4] = torch.nan
    gelu_ND = bias_gelu(x_ND, bias_D)
    grad_x_ND, grad_bias_D = torch.autograd.grad(gelu_ND.sum(), (x_ND, bias_D))
    for found_ND in (gelu_ND, grad_x_ND):
        assert found_ND.isnan().nonzero().tolist() == [[1, 4]]
    assert grad_bias_D.isnan().tolist() == [False] * 4 + [True]


@pytest.mark.usefixtures("_threads")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.randn(2500, 72, generator=generator).requires_grad_()
    bias_D = torch.randn(72, generator=generator).requires_grad_()
    grad_ND = torch.randn(2500, 72, generator=generator)
    inputs = sample("row subset", 40, tokens=701)

    def outputs() -> list[Tensor]:
        out_ND = bias_gelu(x_ND, bias_D)
        grads = torch.autograd.grad(out_ND, (x_ND, bias_D), grad_ND)
        return [out_ND, *grads, *results(op._op, op._backward_op, inputs)]

    torch.set_num_threads(1)
    expected = outputs()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for _ in range(20):
            for one, other in zip(outputs(), expected, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("stream", "norm"),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_other_dtypes_take_the_eager_definition(stream: torch.dtype, norm: torch.dtype) -> None:
    inputs = sample("row subset", 24)
    inputs = [i.to(stream) if torch.is_tensor(i) and i.is_floating_point() else i for i in inputs]
    inputs[-1] = norm
    assert not is_native(inputs)
    found = results(op._op, op._backward_op, inputs)
    expected = results(op.residual_norm_ref, op._backward_ref, inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_an_index_beyond_the_samples_is_an_error() -> None:
    inputs = sample("row subset", 24)
    for place, index in ((5, [3, 0, 4]), (6, [1, -1])):
        wrong = [*inputs[:place], torch.tensor(index), *inputs[place + 1 :]]
        with pytest.raises(IndexError, match=f"lists sample {index[-1]} of 4"):
            op._op(*wrong)


def test_the_operators_keep_what_they_tell_a_compiler() -> None:
    x_NTD, bias_D = torch.randn(2, 5, 24), torch.randn(24)
    torch.library.opcheck(bias_gelu.op, (x_NTD.requires_grad_(), bias_D.requires_grad_()))
    torch.library.opcheck(
        bias_gelu.op, (x_NTD.detach().mT.contiguous().mT.requires_grad_(), bias_D)
    )
    for form in FORMS[:6]:
        inputs = sample(form, 24)
        leaves = [i.requires_grad_() if torch.is_tensor(i) else i for i in inputs[:5]]
        torch.library.opcheck(op._op.op, (*leaves, *inputs[5:]))


class Doubled(nn.Linear):
    """An adapter in a layer's place: what it does to the product must not be skipped."""

    def forward(self, x_ND: Tensor) -> Tensor:
        return 2 * super().forward(x_ND)


def test_an_adapter_or_a_hook_of_a_layer_is_called() -> None:
    x_ND, adapted = torch.randn(3, 8), Doubled(8, 4)
    assert torch.equal(linear_gelu(x_ND, adapted), F.gelu(adapted(x_ND)))
    linear, seen = nn.Linear(8, 4), []
    hooks = (
        (linear.register_forward_hook, lambda *_: seen.append("forward")),
        (linear.register_forward_pre_hook, lambda *_: seen.append("before")),
        (linear.register_full_backward_hook, lambda *_: seen.append("backward")),
    )
    for register, hook in hooks:
        handle = register(hook)
        linear_gelu(x_ND.requires_grad_(), linear).sum().backward()
        handle.remove()
    assert seen == ["forward", "before", "backward"]


def test_linear_gelu_is_the_layer_and_gelu_where_it_does_not_fuse() -> None:
    x_ND, linear = torch.randn(5, 16), nn.Linear(16, 24)
    fused_ND, plain_ND = linear_gelu(x_ND, linear), F.gelu(linear(x_ND))
    assert fused_ND.grad_fn.name() != plain_ND.grad_fn.name()
    torch.testing.assert_close(fused_ND, plain_ND, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_ND = linear_gelu(x_ND, linear)
        assert found_ND.dtype == torch.bfloat16
        assert torch.equal(found_ND, F.gelu(linear(x_ND)))
    double = nn.Linear(16, 24).double()
    assert torch.equal(linear_gelu(x_ND.double(), double), F.gelu(double(x_ND.double())))


class Hidden(nn.Module):
    """A layer with its GELU, as a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 24)

    def forward(self, x_ND: Tensor) -> Tensor:
        return linear_gelu(x_ND, self.layer)


def test_a_compiled_graph_fuses_and_an_exported_one_holds_no_operator_of_ours() -> None:
    x_ND, hidden = torch.randn(5, 16), Hidden()
    compiled = torch.compile(hidden, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_ND), hidden(x_ND))
    gradients = []
    for module in (hidden, compiled):
        hidden.zero_grad()
        module(x_ND).square().sum().backward()
        gradients.append(hidden.layer.bias.grad)
    assert torch.equal(*gradients)
    program = torch.export.export(hidden, (x_ND,))
    assert "tapct" not in program.graph_module.code
    found_ND, expected_ND = program.module()(x_ND), F.gelu(hidden.layer(x_ND))
    torch.testing.assert_close(found_ND, expected_ND, rtol=0, atol=0)


def test_the_native_functions_refuse_what_they_cannot_take() -> None:
    x_ND = torch.zeros(4, 8).numpy()
    with pytest.raises(ValueError, match="bias_gelu: the arrays"):
        _native.bias_gelu(x_ND, x_ND[0, :4].copy(), x_ND.copy(), 1)
    with pytest.raises(ValueError, match="bias_gelu_backward: the arrays"):
        _native.bias_gelu_backward(x_ND, x_ND, x_ND[0], x_ND[:2].copy(), x_ND[0].copy(), 1)
    with pytest.raises(TypeError):
        _native.bias_gelu(x_ND.astype("float64"), x_ND[0], x_ND.copy(), 1)
    x_NTD, empty = x_ND[None], (None,) * 4
    with pytest.raises(ValueError, match="residual_norm: the arrays"):
        _native.residual_norm(
            x_NTD, x_NTD[:, :2].copy(), *empty[:3], None, None, 1, 0, x_NTD, None, 1
        )
    with pytest.raises(ValueError, match="residual_norm_backward: the arrays"):
        _native.residual_norm_backward(
            *(None, None, x_NTD, None, None, x_ND[0], None, None, 1, 0, x_NTD, None, x_ND[:3], 1)
        )

"""Residual, LayerScale, drop path's rows and the next norm: kernels and gradients in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tapct_kernels import layer_norm, residual, residual_norm, residual_norm_ref, tuning
from tapct_kernels.residual_norm import _backward_ref, _backward_triton, _forward_triton, _op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes CPU tensors
SCALE, EPS = 1.5, 1e-6
FORMS = ("all rows", "row subset", "no gamma", "residual", "layer_norm", "no norm listed")


def sample(
    form: str = "row subset",
    *,
    width: int = 20,
    tokens: int = 5,
    dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype | None = None,
    seed: int = 2,
) -> list[Any]:
    """Operands of the op: three samples; two have a branch and two others of them a norm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x_NTD, weight_D, bias_D = 2 * normal(3, tokens, width) + 0.5, normal(width), normal(width)
    gamma_D, branch_NTD = normal(width), normal(3, tokens, width)
    index_K, next_index_J = torch.tensor([2, 0]), torch.tensor([1, 2])
    rest = [SCALE, EPS, norm_dtype or dtype]
    operands = {
        "all rows": [x_NTD, branch_NTD, gamma_D, weight_D, bias_D, None, None],
        "row subset": [x_NTD, branch_NTD[:2], gamma_D, weight_D, bias_D, index_K, next_index_J],
        "no gamma": [x_NTD, branch_NTD[:2], None, weight_D, bias_D, index_K, None],
        "residual": [x_NTD, branch_NTD[:1], gamma_D, None, None, index_K[:1], None],
        "layer_norm": [x_NTD, None, None, weight_D, bias_D, None, next_index_J],
        "no norm listed": [
            x_NTD, branch_NTD[:0], gamma_D, weight_D, bias_D, index_K[:0], next_index_J[:0],
        ],
    }  # fmt: skip
    return operands[form] + rest


def on_device(inputs: list[Any]) -> list[Any]:
    return [i.to(DEVICE) if isinstance(i, Tensor) else i for i in inputs]


def in_float64(inputs: list[Any]) -> list[Any]:
    doubles = [i.double() if torch.is_tensor(i) and i.is_floating_point() else i for i in inputs]
    return [*doubles[:-1], torch.float64]


def results(forward: Any, backward: Any, inputs: list[Any]) -> list[Tensor]:
    """Return both outputs and all gradients for upstream gradients given by a formula."""
    x_NTD, branch_KTD, gamma_D, weight_D, _, index_K, next_index_J, *_ = inputs
    out_NTD, normed_JTD = forward(*inputs)
    grads = [
        torch.linspace(-1, 1, t.numel(), device=t.device).sin().reshape(t.shape).to(t.dtype)
        for t in (out_NTD, normed_JTD)
    ]
    read_NTD = x_NTD if branch_KTD is None else out_NTD
    saved = (read_NTD, branch_KTD, gamma_D, weight_D, index_K, next_index_J)
    return [out_NTD, normed_JTD, *backward(*grads, *saved, SCALE, EPS)]


@pytest.fixture
def _nan_outputs() -> Any:
    """Fill new tensors with NaN, so that a row the kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FORMS)
def test_op_matches_the_formula_in_float64(form: str) -> None:
    inputs = sample(form)
    x_NTD, branch_KTD, gamma_D, weight_D, bias_D, index_K, next_index_J, *_ = in_float64(inputs)
    out_NTD = x_NTD.clone()
    if branch_KTD is not None:
        for k, n in enumerate(range(3) if index_K is None else index_K.tolist()):
            out_NTD[n] += SCALE * branch_KTD[k] * (1 if gamma_D is None else gamma_D)
    found_NTD, normed_JTD = _op(*inputs)
    if branch_KTD is None:
        assert found_NTD.numel() == 0
    else:
        torch.testing.assert_close(found_NTD.double(), out_NTD, rtol=1e-5, atol=1e-5)
    if weight_D is None:
        assert normed_JTD.numel() == 0
        return
    listed = range(3) if next_index_J is None else next_index_J.tolist()
    assert normed_JTD.shape == (len(listed), 5, 20)
    for normed_TD, n in zip(normed_JTD.double(), listed, strict=True):
        for found_D, row_D in zip(normed_TD, out_NTD[n], strict=True):
            deviation = (row_D.var(correction=0) + EPS).sqrt()
            expected_D = (row_D - row_D.mean()) / deviation * weight_D + bias_D
            # 1e-5: float32 statistics of 20 values of order 1
            torch.testing.assert_close(found_D, expected_D, rtol=1e-5, atol=1e-5)


def test_public_functions_are_the_forms_of_the_op() -> None:
    x, branch, gamma, weight, bias, index, next_index, *_ = inputs = sample()
    norm: dict[str, Any] = {"eps": EPS, "dtype": torch.float16}
    found = residual_norm(
        *(x, branch, gamma, weight, bias),
        index_K=index, next_index_J=next_index, scale=SCALE, **norm,
    )  # fmt: skip
    inputs[-1] = torch.float16
    for one, other in zip(found, _op(*inputs), strict=True):
        assert torch.equal(one, other)
    # A CPU kernel, where one was provided, takes the form whose norm is not float16: rounding.
    out = residual(x, branch, gamma, index_K=index, scale=SCALE)
    torch.testing.assert_close(out, found[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(layer_norm(found[0], weight, bias, index_J=next_index, **norm), found[1])
    assert found[1].dtype == torch.float16


@pytest.mark.usefixtures("_nan_outputs")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "tokens"), [(48, 4), (64, 5), (5, 1)], ids=str)
def test_kernels_match_the_eager_definition(
    width: int, tokens: int, form: str, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = on_device(sample(form, width=width, tokens=tokens, dtype=dtype))
    expected = results(residual_norm_ref, _backward_ref, inputs)
    run = partial(results, _forward_triton, _backward_triton, inputs)
    for _, _, outputs in tuning.each_config(run):
        for found, wanted in zip(outputs, expected, strict=True):
            assert found.dtype == wanted.dtype
            # twice: gradients of parameters are sums
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("splits", [1, 4])
def test_gradients_of_parameters_add_up_over_programs_that_loop(splits: int) -> None:
    inputs = on_device(sample(tokens=6))
    expected = results(residual_norm_ref, _backward_ref, inputs)
    config = {"BLOCK_T": 4, "SPLITS": splits, "STAGES": 3, "num_warps": 4}
    with tuning.forced("residual_norm.backward", config):
        found = results(_forward_triton, _backward_triton, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_float32_stream_takes_and_gives_16_bit_branches() -> None:
    inputs = sample(width=48, norm_dtype=torch.float16)
    inputs[1] = inputs[1].half()
    expected = results(residual_norm_ref, _backward_ref, inputs)
    found = results(_forward_triton, _backward_triton, on_device(inputs))
    wanted = [torch.float32, torch.float16, torch.float32, torch.float16, torch.float32]
    assert [t.dtype for t in found] == [t.dtype for t in expected] == wanted
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to("cpu"), other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS[:5])
def test_gradients_match_finite_differences_in_float64(form: str) -> None:
    inputs = sample(form, width=4, tokens=2, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in inputs[:5] if t is not None)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        operands = [None if t is None else next(given) for t in inputs[:5]]
        return tuple(t for t in _op(*operands, *inputs[5:]) if t.numel())

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("layout", ["compact", "transposed", "stride 0"])
@pytest.mark.parametrize("form", ["row subset", "residual", "layer_norm"])
def test_op_passes_opcheck(form: str, layout: str) -> None:
    inputs = sample(form, width=6)
    for i in (0, 1):
        if inputs[i] is not None and layout == "transposed":
            inputs[i] = inputs[i].transpose(0, 2).contiguous().transpose(0, 2)
        elif inputs[i] is not None and layout == "stride 0":
            inputs[i] = inputs[i][:1].expand_as(inputs[i])
    inputs[:5] = [None if t is None else t.detach().requires_grad_() for t in inputs[:5]]
    torch.library.opcheck(_op.op, tuple(inputs))


@pytest.mark.parametrize("layout", ["transposed", "stride 0"])
def test_gradients_of_any_layout_are_taken(layout: str) -> None:
    inputs = sample("all rows", width=6)
    leaves = [t.requires_grad_() for t in inputs[:5]]
    like = torch.randn(6, 5, 3).transpose(0, 2) if layout == "transposed" else torch.randn(6)
    grads = [like.expand(3, 5, 6)] * 2
    found = torch.autograd.grad(_op(*inputs), leaves, grads)
    compact = [g.contiguous() for g in grads]
    expected = torch.autograd.grad(_op(*inputs), leaves, compact)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    inputs = [i.detach() if torch.is_tensor(i) else i for i in on_device(inputs)]
    x, branch, gamma, weight, *_ = inputs
    saved = (x, branch, gamma, weight, None, None, SCALE, EPS)
    for one, other in zip(
        _backward_triton(*on_device(grads), *saved), _backward_ref(*on_device(grads), *saved),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_op_compiles_to_one_graph_with_equal_gradients() -> None:
    inputs = sample(width=16)
    leaves = [t.requires_grad_() for t in inputs[:5]]

    def loss_of(*arguments: Any) -> Tensor:
        out_NTD, normed_JTD = _op(*arguments)
        return out_NTD.square().mean() + normed_JTD.sin().mean()

    expected = torch.autograd.grad(loss_of(*inputs), leaves)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), leaves)
    for grad, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 20), r"x of shape \(3, 20\) is not \(N, T, D\)"),
        (1, torch.zeros(3, 5, 20), r"branch has shape \(3, 5, 20\), not \(2, 5, 20\)"),
        (2, torch.zeros(7), "gamma has shape"),
        (3, torch.zeros(7), "weight has shape"),
        (4, torch.zeros(20, 1), "bias has shape"),
        (5, torch.zeros(2, dtype=torch.int32), "index is torch.int32"),
        (6, torch.zeros(2, 1, dtype=torch.int64), "next_index is torch.int64 of 2 dimensions"),
    ],
)
def test_wrong_arguments_are_named(position: int, value: Any, message: str) -> None:
    inputs = sample()
    inputs[position] = value
    with pytest.raises(ValueError, match=message):
        _op(*inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_kernels_in_bfloat16_err_at_most_twice_as_much_as_eager(
    hold_to_eager: Any, stream: torch.dtype, form: str
) -> None:
    def draw(seed: int) -> list[Any]:
        inputs = sample(form, width=768, tokens=37, dtype=torch.bfloat16, seed=seed)
        inputs[0] = inputs[0].to(stream)
        return on_device(inputs)

    hold_to_eager(
        draw,
        partial(results, _forward_triton, _backward_triton),
        partial(results, residual_norm_ref, _backward_ref),
        lambda inputs: results(residual_norm_ref, _backward_ref, in_float64(inputs)),
    )

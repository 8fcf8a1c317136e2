"""The gather with LayerNorm, its kernels and its gradients against formulas in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tapct_kernels import masked_gather, masked_gather_ref, tuning
from tapct_kernels.masked_gather import _backward_ref, _backward_triton, _forward_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes CPU tensors
EPS = 1e-6


def sample(
    width: int,
    num_listed: int,
    *,
    dtype: torch.dtype = torch.float32,
    num_prefix: int = 3,
    seed: int = 2,
) -> list[Any]:
    """Three views of seven patches; the listed ones in no order, each once."""
    generator = torch.Generator().manual_seed(seed)
    x_NTD = 2 * torch.randn(3, num_prefix + 7, width, generator=generator) + 0.5
    index_M = torch.randperm(21, generator=generator)[:num_listed]
    weight_D, bias_D = torch.randn(2, width, generator=generator)
    return [x_NTD.to(dtype), index_M, weight_D.to(dtype), bias_D.to(dtype), num_prefix, EPS]


def on_device(inputs: list[Any]) -> list[Any]:
    return [i.to(DEVICE) if isinstance(i, Tensor) else i for i in inputs]


@pytest.fixture
def _nan_outputs() -> Any:
    """Fill new tensors with NaN, so that a row the kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_op_matches_the_formula_in_float64(num_prefix: int) -> None:
    x_NTD, index_M, weight_D, bias_D, *_ = inputs = sample(20, 9, num_prefix=num_prefix)
    rows = [x_NTD[i // 7, num_prefix + i % 7].double() for i in index_M.tolist()]
    expected = [
        (row - row.mean()) / (row.var(correction=0) + EPS).sqrt() * weight_D + bias_D
        for row in rows
    ]
    # 1e-5: float32 statistics of 20 values of order 1
    torch.testing.assert_close(
        masked_gather(*inputs).double(), torch.stack(expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("_nan_outputs")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize(
    ("width", "num_listed"), [(48, 9), (64, 8), (100, 21), (5, 1), (16, 0)], ids=str
)
def test_kernels_match_the_eager_definition(
    width: int, num_listed: int, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = on_device(sample(width, num_listed, dtype=dtype))
    expected = masked_gather_ref(*inputs)
    for _, _, rows_MD in tuning.each_config(lambda: _forward_triton(*inputs)):
        torch.testing.assert_close(rows_MD, expected, rtol=tolerance, atol=tolerance)

    grad = torch.randn_like(expected)
    x_NTD, index_M, weight_D, _, num_prefix, eps = inputs
    arguments = (grad, x_NTD, index_M, weight_D, num_prefix, eps)
    wanted = _backward_ref(*arguments)
    for _, _, grads in tuning.each_config(lambda: _backward_triton(*arguments)):
        torch.testing.assert_close(grads, wanted, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.usefixtures("_nan_outputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("width", "num_listed"), [(48, 9), (5, 1), (16, 0)], ids=str)
def test_without_a_norm_rows_and_gradients_are_copied(
    width: int, num_listed: int, dtype: torch.dtype
) -> None:
    x_NTD, index_M, _, _, num_prefix, eps = on_device(sample(width, num_listed, dtype=dtype))
    expected = torch.stack(
        [x_NTD[i // 7, num_prefix + i % 7] for i in index_M.tolist()] or [x_NTD[0, 0]]
    )
    expected = expected[:num_listed]
    arguments = (x_NTD, index_M, None, None, num_prefix, eps)
    assert torch.equal(masked_gather(*arguments), expected)
    for _, _, rows_MD in tuning.each_config(lambda: _forward_triton(*arguments)):
        assert torch.equal(rows_MD, expected)
    grad_MD = torch.randn_like(expected)
    scattered = torch.zeros_like(x_NTD)
    for grad_D, i in zip(grad_MD, index_M.tolist(), strict=True):
        scattered[i // 7, num_prefix + i % 7] = grad_D
    backward = (grad_MD, x_NTD, index_M, None, num_prefix, eps)
    assert torch.equal(_backward_ref(*backward)[0], scattered)
    for _, _, grads in tuning.each_config(lambda: _backward_triton(*backward)):
        assert torch.equal(grads[0], scattered)
    x_NTD.requires_grad_()
    masked_gather(*arguments).backward(grad_MD)
    assert torch.equal(x_NTD.grad, scattered)
    torch.library.opcheck(masked_gather.op, arguments)


def test_gradients_match_finite_differences_in_float64() -> None:
    x_NTD, index_M, weight_D, bias_D, *rest = sample(6, 5, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in (x_NTD, weight_D, bias_D))
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: masked_gather(x, index_M, weight, bias, *rest), leaves
    )


def test_unlisted_rows_get_no_gradient() -> None:
    x_NTD, index_M, *rest = sample(8, 4)
    x_NTD.requires_grad_()
    masked_gather(x_NTD, index_M, *rest).square().sum().backward()
    has_grad_NL = x_NTD.grad[:, 3:].abs().sum(-1) > 0
    assert has_grad_NL.flatten().nonzero().flatten().tolist() == sorted(index_M.tolist())
    assert x_NTD.grad[:, :3].abs().sum() == 0


@pytest.mark.parametrize("layout", ["compact", "transposed", "stride 0"])
def test_op_passes_opcheck(layout: str) -> None:
    inputs = sample(6, 5)
    if layout == "transposed":
        inputs[0] = inputs[0].transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "stride 0":
        inputs[0] = inputs[0][:1].expand(3, -1, -1)
    for i in (0, 2, 3):
        inputs[i] = inputs[i].detach().requires_grad_()
    torch.library.opcheck(masked_gather.op, tuple(inputs))


def test_op_compiles_to_one_graph_with_equal_gradients() -> None:
    inputs = sample(16, 5)
    leaves = [inputs[i].requires_grad_() for i in (0, 2, 3)]

    def loss_of(*arguments: Any) -> Tensor:
        return masked_gather(*arguments).square().mean()

    expected = torch.autograd.grad(loss_of(*inputs), leaves)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), leaves)
    for grad, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, torch.zeros(3, dtype=torch.int32), "not int64"),
        (2, torch.zeros(7), "have shapes"),
        (2, None, "come together"),
        (4, 10, "leaves no patch"),
    ],
)
def test_wrong_arguments_are_named(position: int, value: Any, message: str) -> None:
    inputs = sample(8, 4)
    inputs[position] = value
    with pytest.raises(ValueError, match=message):
        masked_gather(*inputs)


@pytest.mark.gpu
def test_kernels_in_bfloat16_err_at_most_twice_as_much_as_eager(hold_to_eager: Any) -> None:
    def draw(seed: int) -> list[Any]:
        return on_device(sample(768, 21, dtype=torch.bfloat16, seed=seed))

    def run(forward: Any, backward: Any, inputs: list[Any]) -> list[Tensor]:
        x_NTD, index_M, weight_D, _, *rest = inputs
        rows_MD = forward(*inputs)
        grad_MD = torch.linspace(-1, 1, rows_MD.numel(), device=DEVICE).reshape(rows_MD.shape)
        return [rows_MD, *backward(grad_MD.to(x_NTD.dtype), x_NTD, index_M, weight_D, *rest)]

    def exact(inputs: list[Any]) -> list[Tensor]:
        doubles = [
            i.double() if torch.is_tensor(i) and i.is_floating_point() else i for i in inputs
        ]
        return run(masked_gather_ref, _backward_ref, doubles)

    hold_to_eager(
        draw,
        partial(run, _forward_triton, _backward_triton),
        partial(run, masked_gather_ref, _backward_ref),
        exact,
    )

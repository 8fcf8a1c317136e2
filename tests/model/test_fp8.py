"""Float8 linears against float64, and the fast product against the eager definition."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tapct_fast.config import VitConfig
from tapct_fast.model.block import Block, Mlp
from tapct_fast.model.fp8 import fp8_linear, product, product_ref, refusal, use_fp8

# An operand errs by at most 2^-4 of itself (e4m3 has 3 bits behind the point), evenly spread: by
# 2^-4 / sqrt(3) in the mean square. Signs are random, so errors add up over a row as the products
# do and do not average out; there are two operands.
FP8_ERROR = math.sqrt(2 / 3) * 2**-4
# Both operands and the result are rounded to 2^-8, evenly spread.
BF16_ERROR = 2**-8
PRODUCTS = pytest.mark.parametrize("multiply", [product, product_ref])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

Product = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _can_multiply(request: pytest.FixtureRequest) -> None:
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    is_fast = params.get("multiply", product) is product and params.keys() & {"multiply", "device"}
    if is_fast and params.get("device", "cpu") == "cpu":
        request.getfixturevalue("fp8_on_cpu")


def error(out: Tensor, expected: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return ((out.double() - expected).norm() / expected.norm()).item()


def activations(rows: int, width: int, *, seed: int = 0) -> Tensor:
    """Normed tokens with what trained ViTs show: some wide channels, some wide tokens."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(rows, width, generator=generator)
    x_ND[:, ::61] *= 50
    x_ND[::37] *= 200
    return x_ND.bfloat16()


def weights(width_out: int, width: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w_ED = 0.02 * torch.randn(width_out, width, generator=generator)
    w_ED[::17] *= 10
    return w_ED


def linear_of(width: int, width_out: int) -> nn.Linear:
    linear = nn.Linear(width, width_out)
    linear.weight.data.copy_(weights(width_out, width))
    return linear


@PRODUCTS
@DEVICES
@pytest.mark.parametrize("widths", [(384, 1152), (384, 384), (768, 3072), (3072, 768), (176, 64)])
def test_output_and_gradients_are_those_of_float64_up_to_rounding(
    widths: tuple[int, int], multiply: Product, device: str
) -> None:
    linear = linear_of(*widths).to(device)
    x_ND = activations(203, widths[0]).to(device).requires_grad_()
    # Gradients of a loss that is a mean are small, and differ by token.
    decades_N1 = torch.logspace(-9, -4, 203, device=device)[:, None]
    grad_NE = (activations(203, widths[1], seed=2).to(device) * decades_N1).bfloat16()
    out_NE = fp8_linear(x_ND, linear=linear, multiply=multiply)
    out_NE.backward(grad_NE)
    assert out_NE.dtype == torch.bfloat16
    assert x_ND.grad is not None
    x_64, w_64, grad_64 = x_ND.detach().double(), linear.weight.detach().double(), grad_NE.double()
    bias_64 = linear.bias.detach().double()
    assert error(out_NE.detach(), x_64 @ w_64.T + bias_64) < FP8_ERROR
    assert error(out_NE.detach(), x_64 @ w_64.T + bias_64) > BF16_ERROR  # it is not bfloat16
    assert error(x_ND.grad, grad_64 @ w_64) < FP8_ERROR
    assert error(linear.weight.grad, grad_64.T @ x_64) < BF16_ERROR
    assert error(linear.bias.grad, grad_64.sum(0)) < BF16_ERROR
    # No token is drowned by those with larger gradients. A row has fewer elements than the whole.
    rows = zip(x_ND.grad, grad_64 @ w_64, strict=True)
    assert max(error(*row) for row in rows) < 1.5 * FP8_ERROR


@PRODUCTS
def test_no_element_errs_by_more_than_the_format_allows(multiply: Product) -> None:
    x_ND, w_ED = activations(64, 384).double(), weights(96, 384).double()
    unit, subnormal = 2**-4, 2**-10 / 448  # half a step below 2^-6 of a row scaled to 448
    size_x, size_w = x_ND.abs(), w_ED.abs()
    most_x = unit * size_x + subnormal * size_x.amax(1, keepdim=True)
    most_w = unit * size_w + subnormal * size_w.amax(1, keepdim=True)
    bound_NE = most_x @ size_w.T + size_x @ most_w.T + most_x @ most_w.T
    out_NE = multiply(x_ND.float(), w_ED.float()).double()
    assert bool(((out_NE - x_ND @ w_ED.T).abs() <= bound_NE + 2**-8 * out_NE.abs()).all())


@DEVICES
@pytest.mark.parametrize("shape", [(1, 64, 16), (5, 384, 1536), (203, 176, 64), (256, 768, 768)])
def test_the_fast_product_is_the_definition(shape: tuple[int, int, int], device: str) -> None:
    x_ND, w_ED = activations(*shape[:2]).to(device), weights(shape[2], shape[1]).to(device)
    expected_NE = product_ref(x_ND, w_ED)
    # Sums in another order, before a rounding to 2^-8.
    assert error(product(x_ND, w_ED), expected_NE.double()) < 2**-8
    transposed_ED = w_ED.t().contiguous().t()  # as the backward pass gives it
    assert torch.equal(product(x_ND, transposed_ED), product(x_ND, w_ED))


@PRODUCTS
@DEVICES
def test_huge_and_tiny_rows_give_the_same_bits_scaled(multiply: Product, device: str) -> None:
    x_ND, w_ED = activations(5, 128).to(device).float(), weights(32, 128).to(device)
    by_N1 = 2.0 ** torch.tensor([-90, -40, 0, 40, 80], device=device)[:, None]
    by_E1 = 2.0 ** torch.tensor([-24, 0, 8, 24], device=device).repeat(8)[:, None]
    out_NE = multiply(x_ND * by_N1, w_ED * by_E1)
    assert torch.equal(out_NE.float(), multiply(x_ND, w_ED).float() * by_N1 * by_E1.T)
    assert out_NE.isfinite().all()


@PRODUCTS
@DEVICES
def test_rows_of_zeros_give_the_bias(multiply: Product, device: str) -> None:
    linear = linear_of(64, 32).to(device)
    linear.weight.data[3] = 0
    x_ND = torch.cat([torch.zeros(2, 64), activations(2, 64).float()]).to(device).requires_grad_()
    out_NE = fp8_linear(x_ND, linear=linear, multiply=multiply)
    out_NE.backward(torch.zeros_like(out_NE))
    assert torch.equal(out_NE[:2], linear.bias.bfloat16().expand(2, 32))
    assert torch.equal(out_NE[:, 3], linear.bias[3].bfloat16().expand(4))
    assert torch.equal(x_ND.grad, torch.zeros_like(x_ND))


@PRODUCTS
@DEVICES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_row_and_in_no_other(
    multiply: Product, device: str, value: float
) -> None:
    x_ND, w_ED = activations(4, 64).to(device), weights(16, 64).to(device)
    expected_NE = torch.zeros(4, 16, dtype=torch.bool, device=device)
    x_ND[1, 5], expected_NE[1] = value, True
    assert torch.equal(multiply(x_ND, w_ED).isnan(), expected_NE)
    w_ED[7, 0], expected_NE[:, 7] = value, True
    assert torch.equal(multiply(x_ND, w_ED).isnan(), expected_NE)


@PRODUCTS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_reaches_every_gradient(
    multiply: Product, value: float
) -> None:
    linear = linear_of(64, 32)
    x_ND = activations(4, 64).requires_grad_()
    grad_NE = torch.ones(4, 32, dtype=torch.bfloat16)
    grad_NE[2, 3] = value
    fp8_linear(x_ND, linear=linear, multiply=multiply).backward(grad_NE)
    assert x_ND.grad is not None
    assert x_ND.grad.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert not linear.weight.grad[3].isfinite().any()
    assert not linear.bias.grad[3].isfinite()


@PRODUCTS
def test_autocast_changes_no_bit(multiply: Product) -> None:
    linear, x_NTD = linear_of(64, 48), activations(6, 64).unflatten(0, (2, 3))
    plain = fp8_linear(x_NTD, linear=linear, multiply=multiply)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8_linear(x_NTD, linear=linear, multiply=multiply), plain)
    assert plain.shape == (2, 3, 48)


@PRODUCTS
def test_a_compiled_layer_is_one_graph_and_gives_the_eager_numbers(multiply: Product) -> None:
    mlp = Mlp(64, 96)
    use_fp8([mlp], multiply)
    numbers = []
    for forward in (mlp, torch.compile(mlp, fullgraph=True, dynamic=False)):
        mlp.zero_grad()
        x_NTD = activations(6, 64).unflatten(0, (2, 3)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out_NTD = forward(x_NTD)
        out_NTD.float().square().sum().backward()
        numbers.append([out_NTD.detach(), x_NTD.grad, *(p.grad for p in mlp.parameters())])
    for eager, compiled in zip(*numbers, strict=True):
        assert compiled.dtype == eager.dtype
        # The compiler rounds to bfloat16 less often, and what is then quantised differs a little.
        assert error(compiled, eager.double()) < FP8_ERROR


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_the_four_products_of_a_block_are_replaced_and_no_name_changes(ffn: str) -> None:
    block = Block(VitConfig(dim=64, ffn=ffn))  # type: ignore[arg-type]
    names = list(block.state_dict())
    called: list[tuple[int, ...]] = []

    def multiply(x_ND: Tensor, w_ED: Tensor) -> Tensor:
        called.append(tuple(w_ED.shape))
        return product_ref(x_ND, w_ED)

    use_fp8([block], multiply)
    # float32 without autocast: bias and GELU must not be fused around the layer.
    x_BTD = activations(6, 64).float().unflatten(0, (2, 3))
    block(x_BTD, x_BTD)
    hidden = {"mlp": [(256, 64), (64, 256)], "swiglu": [(352, 64), (64, 176)]}[ffn]
    assert called == [(192, 64), (64, 64), *hidden]
    assert list(block.state_dict()) == names


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process", "fp8_on_cpu")
def test_a_sharded_layer_gives_the_same_bits() -> None:
    numbers = []
    for is_sharded in (False, True):
        torch.manual_seed(0)
        mlp = Mlp(64, 96)
        if is_sharded:
            fully_shard(mlp, mesh=init_device_mesh("cpu", (1,)))
        use_fp8([mlp])
        out_ND = mlp(activations(6, 64))
        out_ND.float().sum().backward()
        grads = [p.grad for p in mlp.parameters()]
        numbers.append([out_ND, *(g.full_tensor() if is_sharded else g for g in grads)])
    assert all(map(torch.equal, *numbers))


def test_the_cpu_is_refused() -> None:
    assert "no float8 units" in refusal(torch.device("cpu"))


@pytest.mark.gpu
def test_a_device_with_float8_units_is_taken() -> None:
    has_units = torch.cuda.get_device_capability() >= (8, 9)
    assert (refusal(torch.device("cuda")) == "") is has_units

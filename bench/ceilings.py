"""What the device allows: the rate of a large copy and of matrix products at the model's shapes.

These rows are the denominators of every other bench: ``bench.harness`` divides bytes by the fastest
copy and FLOPs by the fastest product of the same dtype. M is the tokens of one training step's
global crops (batch 32, 2,357 tokens each) on CUDA, of one volume on the CPU. dX and dW are the two
products of a linear layer's backward. Nothing here is ours: the variants are
two ways to ask the library for the same, and the faster one counts.
Shape suffixes: M rows, K inner and N outer width of the product.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Device, Results, Work, op_bench

NUM_TOKENS = 2357  # 12 x 224 x 224 in patches of 4 x 8 x 8, and five prefix rows
COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}  # far beyond any cache
SQUARE = {"cuda": 8192, "cpu": 2048}


class Operands(NamedTuple):
    """Tokens, a linear layer with its weight stored both ways, and the gradient of its output."""

    x_MK: Tensor
    weight_NK: Tensor
    weight_KN: Tensor
    bias_N: Tensor
    grad_MN: Tensor


PRODUCTS: dict[str, dict[str, Callable[[Operands], Tensor]]] = {
    "forward": {
        "x @ weight.T + bias": lambda t: F.linear(t.x_MK, t.weight_NK, t.bias_N),
        "weight stored transposed": lambda t: torch.addmm(t.bias_N, t.x_MK, t.weight_KN),
    },
    "dX": {
        "grad @ weight": lambda t: t.grad_MN @ t.weight_NK,
        "weight stored transposed": lambda t: t.grad_MN @ t.weight_KN.T,
    },
    "dW": {
        "grad.T @ x": lambda t: t.grad_MN.T @ t.x_MK,
        "(x.T @ grad).T": lambda t: (t.x_MK.T @ t.grad_MN).T,
    },
}


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield the copy, a square product, and the model's, in the order of their worth."""
    num_bytes = 2**16 if is_tiny else COPY_BYTES[device]
    yield Case(f"copy {num_bytes / 2**20:g} MiB", partial(_copy, num_bytes, device))
    M = 16 if is_tiny else NUM_TOKENS * (32 if device == "cuda" else 1)
    square = 32 if is_tiny else SQUARE[device]
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        yield _product_case("square", "forward", (square, square, square), dtype, device)
    for width in (32,) if is_tiny else (768, 384):
        shapes = {
            "qkv": (width, 3 * width),
            "proj": (width, width),
            "fc1": (width, 4 * width),
            "fc2": (4 * width, width),
        }
        for dtype in dtypes:
            for layer, (K, N) in shapes.items():
                for kind in PRODUCTS:
                    yield _product_case(layer, kind, (M, K, N), dtype, device)


def _product_case(
    layer: str, kind: str, shape_MKN: tuple[int, int, int], dtype: torch.dtype, device: Device
) -> Case:
    shape = "x".join(map(str, shape_MKN))
    name = f"gemm {layer} {shape} {str(dtype).removeprefix('torch.')} {kind}"
    return Case(name, partial(_product, kind, shape_MKN, dtype, device))


def _copy(num_bytes: int, device: Device) -> Work:
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Work(
        {
            "Tensor.copy_": lambda: [target.copy_(source)],
            "x * 1": lambda: [torch.mul(source, 1.0, out=target)],
        },
        [source],  # not in float64: a copy is equal or wrong
        tolerance=0.0,
        bytes=2 * num_bytes,
        dtype=source.dtype,
        backend="torch",
    )


def _product(
    kind: str, shape_MKN: tuple[int, int, int], dtype: torch.dtype, device: Device
) -> Work:
    M, K, N = shape_MKN
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    weight_NK = normal(N, K)
    operands = Operands(normal(M, K), weight_NK, weight_NK.T.contiguous(), normal(N), normal(M, N))
    exact = next(iter(PRODUCTS[kind].values()))(Operands(*(t.double() for t in operands)))
    touched = [operands.x_MK, operands.weight_NK, operands.grad_MN]  # two read, one written
    return Work(
        {name: _call(product, operands) for name, product in PRODUCTS[kind].items()},
        [exact],
        # The rounding of one result; float32 also sums up to 8,192 products.
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,
        bytes=sum(t.nbytes for t in touched) + (kind == "forward") * operands.bias_N.nbytes,
        flops=2 * M * K * N,
        dtype=dtype,
        backend="torch",
    )


def _call(product: Callable[[Operands], Tensor], operands: Operands) -> Results:
    return lambda: [product(operands)]


main = op_bench(__file__, [], cases)

if __name__ == "__main__":
    main()

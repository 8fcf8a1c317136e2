"""The products of a linear layer in float32 on a CPU with AMX tiles, beside oneMKL's.

Forward, gradient of the input and gradient of the weight of the layers of ViT-S (a batch of 2,344
tokens, as in the bench of a training step), of one volume of 437 tokens, of the ``debug`` recipe
(4,256 tokens), and of the heads' MLP on 402 rows. ``tapct linear`` takes PyTorch's product where it
measured faster; after ``set_float32_matmul_precision("high")`` its numbers have 16 bits, and
oneMKL's stay as they are.
Shape suffixes: N rows, D input width, E output width.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Device, Work, op_bench
from tapct_fast import _native
from tapct_fast.model.linear import product

SHAPES = [  # (N, D, E)
    *((2344, 384, 1152), (2344, 384, 1536), (2344, 1536, 384), (2344, 384, 384), (437, 384, 1536)),
    *((4256, 128, 384), (4256, 128, 512), (4256, 512, 128), (402, 2048, 2048)),
]
KINDS = ("forward", "gradient of x", "gradient of weight")


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield every shape, forward and both gradients; none on CUDA, which has no such products."""
    if device == "cuda" or not _native.has_amx():
        return
    for shape in [(1024, 128, 384)] if is_tiny else SHAPES:
        for kind in KINDS:
            name = f"{'x'.join(map(str, shape))} float32 {kind}"
            yield Case(name, partial(_work, shape, kind))


def _call(kind: str, precision: str, x_ND: Tensor, weight_ED: Tensor, y_NE: Tensor) -> list[Tensor]:
    """Return a result of the layer through ``product``, the op whose factors are these."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return [product(*_factors(kind, x_ND, weight_ED, y_NE))]
    finally:
        torch.set_float32_matmul_precision(before)


def _factors(kind: str, x_ND: Tensor, weight_ED: Tensor, y_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b of the result ``a b^T``."""
    if kind == "forward":
        return x_ND, weight_ED
    return (y_NE, weight_ED.t()) if kind == "gradient of x" else (y_NE.t(), x_ND.t())


@torch.no_grad()
def _work(shape: tuple[int, int, int], kind: str) -> Work:
    (N, D, E), generator = shape, torch.Generator().manual_seed(0)
    x_ND, weight_ED, y_NE = (
        torch.randn(size, generator=generator) for size in ((N, D), (E, D), (N, E))
    )
    a, b = _factors(kind, x_ND, weight_ED, y_NE)
    operands = (x_ND, weight_ED, y_NE)
    variants: dict[str, Callable[[], Sequence[Tensor]]] = {
        "tapct linear": partial(_call, kind, "highest", *operands),
        "oneMKL": lambda: [F.linear(a, b)],
        'tapct linear, precision "high"': partial(_call, kind, "high", *operands),
    }
    expected: Sequence[Tensor] = [a.double() @ b.double().t()]
    return Work(
        variants,
        expected,
        tolerance=1e-5,  # of "high", whose numbers have 16 bits
        bytes=sum(t.nbytes for t in operands),
        flops=2 * N * D * E,
        dtype=torch.float32,
        backend="AMX tiles",
    )


SOURCES = [
    *("csrc/matmul_amx.cpp", "csrc/include/tapct/amx.hpp", "csrc/team.cpp"),
    *("tapct_fast/model/cpu_matmul.py", "tapct_fast/model/linear.py"),
]
main = op_bench(__file__, SOURCES, cases)

if __name__ == "__main__":
    main()

"""The norm of the listed tokens against the ways to get it from stock operations.

Rivals: DINOv2's order (norm of every token, then index_select), and index_select, then norm, eager
and compiled. A step is the forward and the gradients of tokens, weight and bias; the gradient of
the tokens is dense, zero where nothing is listed. Bytes are the floor: every listed row read once,
every result written once. Listed are 15 % of the patches (DINOv3's expectation at probability 0.5
and ratio 0.1 to 0.5), drawn uniformly and sorted: real masks are blocks, but a row is 768 bytes or
more, so neighbours do not matter.
Shape suffixes: N views, R prefix rows, L patches, T = R + L, D width, M listed tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Device, Work, compiled, op_bench
from tapct_kernels import masked_gather, masked_gather_ref

NUM_PREFIX = 5  # cls and four registers
EPS = 1e-6
SHARE = 0.15  # of the patch tokens

Forward = Callable[["Inputs"], Tensor]


class Inputs(NamedTuple):
    """Operands of ``masked_gather``, and the rows of x that the index lists."""

    x_NTD: Tensor
    index_M: Tensor
    weight_D: Tensor
    bias_D: Tensor
    row_M: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        """Operands with a gradient."""
        return [self.x_NTD, self.weight_D, self.bias_D]


def draw_inputs(
    num_views: int, num_patches: int, width: int, dtype: torch.dtype, device: Device
) -> Inputs:
    """Draw random operands of one shape."""
    generator = torch.Generator(device).manual_seed(0)
    total = num_views * num_patches
    index_M = torch.randperm(total, generator=generator, device=device)[: int(SHARE * total)]
    index_M = index_M.sort().values
    row_M = index_M // num_patches * (NUM_PREFIX + num_patches) + NUM_PREFIX + index_M % num_patches

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return values.to(dtype).requires_grad_()

    x_NTD = normal(num_views, NUM_PREFIX + num_patches, width)
    return Inputs(x_NTD, index_M, normal(width), normal(width), row_M)


def op(inputs: Inputs) -> Tensor:
    """Call the op under test."""
    rows_MD: Tensor = masked_gather(*inputs[:4], NUM_PREFIX, EPS)
    return rows_MD


def norm_then_select(inputs: Inputs) -> Tensor:
    """Norm every token, then pick: the order of DINOv2's training code."""
    x_NTD, _, weight_D, bias_D, row_M = inputs
    normed_NTD = F.layer_norm(x_NTD, weight_D.shape, weight_D, bias_D, EPS)
    return normed_NTD.flatten(0, 1).index_select(0, row_M)


def select_then_norm(inputs: Inputs) -> Tensor:
    """Pick, then norm what was picked."""
    x_NTD, _, weight_D, bias_D, row_M = inputs
    x_MD = x_NTD.flatten(0, 1).index_select(0, row_M)
    return F.layer_norm(x_MD, weight_D.shape, weight_D, bias_D, EPS)


def _step(forward: Forward, inputs: Inputs, grad_MD: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(forward(inputs), inputs.parameters, grad_MD)


@torch.no_grad()
def _forward(forward: Forward, inputs: Inputs) -> Sequence[Tensor]:
    return [forward(inputs)]


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield both widths, forward and step."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    num_views = 64 if device == "cuda" else 4
    num_patches = 20 if is_tiny else 2352  # 3 x 28 x 28
    for width in (16,) if is_tiny else (384, 768):
        for kind in ("forward", "step"):
            shape = f"{num_views}x{NUM_PREFIX + num_patches}x{width}"
            listed = int(SHARE * num_views * num_patches)
            name = f"{shape} M={listed} {str(dtype).removeprefix('torch.')} {kind}"
            draw = partial(draw_inputs, num_views, num_patches, width, dtype, device)
            yield Case(name, partial(_work, draw, device, is_tiny, kind))


def _work(draw: Callable[[], Inputs], device: Device, is_tiny: bool, kind: str) -> Work:
    inputs = draw()
    x_NTD, index_M, weight_D, bias_D, _ = inputs
    forwards: dict[str, Forward] = {
        "tapct masked_gather": op,
        "eager norm, select": norm_then_select,
        "eager select, norm": select_then_norm,
    }
    if not is_tiny:
        for name, call in compiled(select_then_norm, device).items():
            forwards[f"{name} select, norm"] = call
    doubles = [t.detach().double().requires_grad_() for t in inputs.parameters]
    x, weight, bias = doubles
    exact_MD = masked_gather_ref(x, index_M, weight, bias, NUM_PREFIX, EPS)
    grad_MD = torch.randn_like(exact_MD).to(x_NTD.dtype)
    num_bytes = 2 * grad_MD.nbytes + index_M.nbytes + weight_D.nbytes + bias_D.nbytes
    if kind == "forward":
        expected: Sequence[Tensor] = [exact_MD.detach()]
        variants = {name: partial(_forward, f, inputs) for name, f in forwards.items()}
    else:
        expected = torch.autograd.grad(exact_MD, doubles, grad_MD.double())
        variants = {name: partial(_step, f, inputs, grad_MD) for name, f in forwards.items()}
        num_bytes = 2 * num_bytes + x_NTD.nbytes
    return Work(
        variants,
        expected,
        # bf16: operands and results are rounded to 8 bits, in the gradients before long sums too
        tolerance=2e-2 if x_NTD.dtype == torch.bfloat16 else 1e-5,
        bytes=num_bytes,
        dtype=x_NTD.dtype,
        backend="Triton kernel" if device == "cuda" else "eager definition",
    )


main = op_bench(__file__, ["kernels/tapct_kernels/masked_gather.py"], cases)

if __name__ == "__main__":
    main()

"""The feed-forward: is a fused kernel for fc1, bias and GELU worth writing?

A fused kernel saves the pass of the GELU over fc1's output and pays with a matrix product that is
not cuBLAS's. It breaks even where that product reaches 68 % of cuBLAS's rate at width 768 and about
50 % at 384 (arithmetic at nominal rates). ``torch.compile max-autotune, Triton only`` is that
kernel as Inductor writes it, bias and exact GELU in the epilogue: where it beats eager in the fc1
case, fusion pays. No kernel is written before a GPU's row says so.
``cuBLASLt epilogue`` is ``aten::_addmm_activation``: on CUDA the tanh approximation of GELU, which
differs from the exact one by up to 4.7e-4, and without a derivative. Like ``eager, tanh`` it is
another function: a rival to know of, not one to replace the model's.
Shape suffixes: M rows (tokens), D width, F hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Device, Work, compiled, op_bench

NUM_TOKENS = 2357  # 12 x 224 x 224 in patches of 4 x 8 x 8, and five prefix rows


class Inputs(NamedTuple):
    """Tokens and the two linear layers."""

    x_MD: Tensor
    weight_FD: Tensor
    bias_F: Tensor
    weight_DF: Tensor
    bias_D: Tensor


Forward = Callable[[Inputs], Tensor]


def fc1(inputs: Inputs, approximate: str = "none") -> Tensor:
    """Linear, then GELU, exact unless asked otherwise."""
    return F.gelu(F.linear(inputs.x_MD, inputs.weight_FD, inputs.bias_F), approximate=approximate)


def fc1_epilogue(inputs: Inputs) -> Tensor:
    """Linear and GELU in one call of the library (tanh on CUDA); has no derivative."""
    operator = torch.ops.aten._addmm_activation.default
    out_MF: Tensor = operator(inputs.bias_F, inputs.x_MD, inputs.weight_FD.T, use_gelu=True)
    return out_MF


def mlp(inputs: Inputs, approximate: str = "none") -> Tensor:
    """Linear, GELU, linear."""
    return F.linear(fc1(inputs, approximate), inputs.weight_DF, inputs.bias_D)


def mlp_epilogue(inputs: Inputs) -> Tensor:
    """The same with ``fc1_epilogue``."""
    return F.linear(fc1_epilogue(inputs), inputs.weight_DF, inputs.bias_D)


def _forwards(eager: Callable[..., Tensor], device: Device, is_tiny: bool) -> dict[str, Forward]:
    forwards: dict[str, Forward] = {
        "eager": eager,
        "eager, tanh": partial(eager, approximate="tanh"),
    }
    if not is_tiny:
        forwards |= compiled(eager, device)
        if device == "cuda":
            options: dict[str, Any] = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}
            forwards["torch.compile max-autotune, Triton only"] = torch.compile(
                eager, fullgraph=True, dynamic=False, options=options
            )
    return forwards


def draw_inputs(num_tokens: int, width: int, dtype: torch.dtype, device: Device) -> Inputs:
    """Draw operands of trained size: activations of order one, weights that keep it."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = std * torch.randn(*shape, generator=generator, device=device)
        return values.to(dtype).requires_grad_()

    hidden = 4 * width
    return Inputs(
        normal(num_tokens, width),
        normal(hidden, width, std=width**-0.5),
        normal(hidden),
        normal(width, hidden, std=hidden**-0.5),
        normal(width),
    )


def _step(forward: Forward, inputs: Inputs, grad_MD: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(forward(inputs), inputs, grad_MD)


@torch.no_grad()
def _forward(forward: Forward, inputs: Inputs) -> Sequence[Tensor]:
    return [forward(inputs)]


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield both widths: fc1 with GELU, the whole feed-forward, and its step."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    num_tokens = 16 if is_tiny else NUM_TOKENS * (32 if device == "cuda" else 1)
    for kind in ("fc1 gelu forward", "mlp forward", "mlp step"):
        for width in (16,) if is_tiny else (768, 384):
            name = f"{num_tokens}x{width} {str(dtype).removeprefix('torch.')} {kind}"
            draw = partial(draw_inputs, num_tokens, width, dtype, device)
            yield Case(name, partial(_work, draw, device, is_tiny, kind))


def _work(draw: Callable[[], Inputs], device: Device, is_tiny: bool, kind: str) -> Work:
    inputs = draw()
    eager: Callable[..., Tensor]
    eager, epilogue = (fc1, fc1_epilogue) if kind == "fc1 gelu forward" else (mlp, mlp_epilogue)
    forwards = _forwards(eager, device, is_tiny)
    doubles = Inputs(*(t.detach().double().requires_grad_() for t in inputs))
    exact = eager(doubles)
    num_products = 1 if kind == "fc1 gelu forward" else 2
    flops = num_products * 2 * inputs.x_MD.numel() * inputs.weight_FD.shape[0]
    operands = inputs[: 1 + 2 * num_products]
    num_bytes = sum(t.nbytes for t in operands) + exact.numel() * inputs.x_MD.element_size()
    absent: dict[str, str] = {}
    if kind == "mlp step":
        grad_MD = torch.randn_like(exact).to(inputs.x_MD.dtype)
        expected: Sequence[Tensor] = torch.autograd.grad(exact, doubles, grad_MD.double())
        variants = {name: partial(_step, f, inputs, grad_MD) for name, f in forwards.items()}
        num_bytes, flops = 2 * num_bytes, 3 * flops  # operands again, and a gradient of each
        absent["cuBLASLt epilogue"] = "aten::_addmm_activation has no derivative"
    else:
        forwards["cuBLASLt epilogue (tanh)" if device == "cuda" else "_addmm_activation"] = epilogue
        expected = [exact.detach()]
        variants = {name: partial(_forward, f, inputs) for name, f in forwards.items()}
    return Work(
        variants,
        expected,
        # bf16: the hidden activations are rounded to 8 bits before the second product;
        # float32: the tanh approximation, whose gradient differs more than its value
        tolerance=2e-2 if inputs.x_MD.dtype == torch.bfloat16 else 2e-3,
        bytes=num_bytes,
        flops=flops,
        dtype=inputs.x_MD.dtype,
        backend="torch",
        absent=absent,
    )


main = op_bench(__file__, [], cases)

if __name__ == "__main__":
    main()

"""Residual, LayerScale and the next LayerNorm against the ways to get them from stock operations.

Three forms: ``residual_norm`` on every view; the same under drop path .3, where branch and norm run
on two different subsets of the views; ``layer_norm`` alone. Rivals: eager, which under drop path is
DINOv2's order (index_add, then a gather for the next branch); torch.compile of it; the LayerNorm of
Liger-Kernel and of quack behind an eager residual, CUDA only and where installed. A step is the
forward and all gradients. Bytes are the floor: every operand read once, every result written once.
Streams: float32 tokens with bfloat16 branches and norms, as under autocast, and all bfloat16; the
CPU has float32 only.
Shape suffixes: N views, T tokens, D width, K views with a branch, J views whose norm is wanted.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Device, Work, compiled, op_bench
from tapct_fast.model import cpu_training  # noqa: F401 - provides the kernels for the CPU
from tapct_kernels import layer_norm, residual_norm, residual_norm_ref

EPS = 1e-6
DROP_PATH = 0.3
FORMS = ("residual_norm", "drop path", "layer_norm")

Results = Sequence[Tensor]
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


class Inputs(NamedTuple):
    """Operands of one form; no branch means the norm alone."""

    x_NTD: Tensor
    branch_KTD: Tensor | None
    gamma_D: Tensor | None
    weight_D: Tensor
    bias_D: Tensor
    index_K: Tensor | None
    next_index_J: Tensor | None
    scale: float
    dtype: torch.dtype  # of branch and norm

    @property
    def leaves(self) -> list[Tensor]:
        """Operands with a gradient."""
        return [t for t in self[:5] if isinstance(t, Tensor)]


def draw_inputs(
    form: str, shape: tuple[int, int, int], stream: torch.dtype, dtype: torch.dtype, device: Device
) -> Inputs:
    """Draw random operands; parameters have the stream's dtype."""
    N, T, D = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = stream) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device)
        return values.to(dtype).requires_grad_()

    def rows() -> Tensor:
        order = torch.randperm(N, generator=generator, device=device)
        return order[: int(N * (1 - DROP_PATH))].sort().values

    index_K, next_index_J = (rows(), rows()) if form == "drop path" else (None, None)
    kept = N if index_K is None else index_K.numel()
    has_branch = form != "layer_norm"
    branch_KTD = normal(kept, T, D, dtype=dtype) if has_branch else None
    gamma_D = normal(D) if has_branch else None
    tail = (index_K, next_index_J, N / kept, dtype)
    return Inputs(normal(N, T, D), branch_KTD, gamma_D, normal(D), normal(D), *tail)


def op(inputs: Inputs) -> Results:
    """Call the op under test."""
    x_NTD, branch_KTD, gamma_D, weight_D, bias_D, index_K, next_index_J, scale, dtype = inputs
    if branch_KTD is None:
        return [layer_norm(x_NTD, weight_D, bias_D, eps=EPS, dtype=dtype)]
    return residual_norm(
        *(x_NTD, branch_KTD, gamma_D, weight_D, bias_D),
        index_K=index_K,
        next_index_J=next_index_J,
        scale=scale,
        eps=EPS,
        dtype=dtype,
    )


def stock(inputs: Inputs, norm: Norm | None = None) -> Results:
    """Add the branch and norm with stock operations, the norm by a rival where one is given."""
    x_NTD, branch_KTD, gamma_D, weight_D, bias_D, index_K, next_index_J, scale, dtype = inputs
    out_NTD = x_NTD
    if branch_KTD is not None and gamma_D is not None:
        branch_KTD = (branch_KTD * gamma_D).to(x_NTD.dtype)
        if index_K is None:
            out_NTD = x_NTD + branch_KTD
        else:
            out_NTD = x_NTD.index_add(0, index_K, branch_KTD, alpha=scale)
    read_JTD = out_NTD if next_index_J is None else out_NTD[next_index_J]
    if norm is None:
        normed_JTD = F.layer_norm(read_JTD, weight_D.shape, weight_D, bias_D, EPS)
    else:
        normed_JTD = norm(read_JTD.flatten(0, 1), weight_D, bias_D).reshape(read_JTD.shape)
    normed_JTD = normed_JTD.to(dtype)
    return [normed_JTD] if branch_KTD is None else [out_NTD, normed_JTD]


def liger_norm() -> Norm:
    """Return Liger-Kernel's LayerNorm."""
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x_MD, weight_D, bias_D: function.apply(x_MD, weight_D, bias_D, EPS)


def quack_norm() -> Norm:
    """Return quack's LayerNorm, whose forward and backward come without an autograd function."""
    quack = importlib.import_module("quack.rmsnorm")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_MD: Tensor, weight_D: Tensor, bias_D: Tensor) -> Tensor:
            out_MD, rstd_M, mean_M = quack.layernorm_fwd(
                x_MD, weight_D, bias_D, EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(x_MD, weight_D, rstd_M, mean_M)
            normed_MD: Tensor = out_MD
            return normed_MD

        @staticmethod
        def backward(ctx: Any, grad_MD: Tensor) -> Any:
            x_MD, weight_D, rstd_M, mean_M = ctx.saved_tensors
            return quack.layernorm_bwd(x_MD, weight_D, grad_MD.contiguous(), rstd_M, mean_M)

    # It takes float32 parameters only.
    return lambda x, weight, bias: Function.apply(x, weight.float(), bias.float())  # type: ignore[no-untyped-call]


PUBLIC = {"liger-kernel": liger_norm, "quack-kernels": quack_norm}


def public_norms(device: Device) -> tuple[dict[str, Norm], dict[str, str]]:
    """Return the norms of installed packages by name and version, and why others are absent."""
    if device == "cpu":
        return {}, dict.fromkeys(PUBLIC, "CUDA only")
    found, absent = {}, {}
    for package, load in PUBLIC.items():
        try:
            found[f"{package} {metadata.version(package)}"] = load()
        except ImportError as error:  # a package that is missing is a PackageNotFoundError
            absent[package] = str(error) or "not installed"
    return found, absent


def _step(forward: Callable[[Inputs], Results], inputs: Inputs, grads: Results) -> Results:
    return torch.autograd.grad(forward(inputs), inputs.leaves, grads)


@torch.no_grad()
def _forward(forward: Callable[[Inputs], Results], inputs: Inputs) -> Results:
    return forward(inputs)


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield every form for both widths and the streams of the device, forward and step."""
    shape = (4, 20) if is_tiny else (64, 2357) if device == "cuda" else (8, 2357)
    low = torch.bfloat16 if device == "cuda" else torch.float32
    for width in (16,) if is_tiny else (384, 768):
        for form in FORMS:
            for stream in (torch.float32, low) if device == "cuda" else (low,):
                for kind in ("forward", "step"):
                    name = f"{form} {'x'.join(map(str, (*shape, width)))} {stream} {kind}"
                    draw = partial(draw_inputs, form, (*shape, width), stream, low, device)
                    make = partial(_work, draw, device, is_tiny, kind)
                    yield Case(name.replace("torch.", ""), make)


def _work(draw: Callable[[], Inputs], device: Device, is_tiny: bool, kind: str) -> Work:
    inputs = draw()
    ours = "tapct layer_norm" if inputs.branch_KTD is None else "tapct residual_norm"
    forwards: dict[str, Callable[[Inputs], Results]] = {ours: op, "eager": stock}
    if not is_tiny:
        forwards |= compiled(stock, device)
    norms, absent = public_norms(device)
    if inputs.index_K is None:
        forwards |= {name: partial(stock, norm=norm) for name, norm in norms.items()}

    doubles = [None if t is None else t.detach().double().requires_grad_() for t in inputs[:5]]
    operands: list[Any] = [*doubles, *inputs[5:8], EPS, torch.float64]
    exact = residual_norm_ref(*operands)
    outputs = [t for t in exact if t.numel()]
    dtypes = [inputs.x_NTD.dtype, inputs.dtype][-len(outputs) :]
    grads = [torch.randn_like(t).to(d) for t, d in zip(outputs, dtypes, strict=True)]
    num_bytes = sum(t.nbytes for t in (*grads, *inputs.leaves))
    if kind == "forward":
        expected: Results = [t.detach() for t in outputs]
        variants = {name: partial(_forward, f, inputs) for name, f in forwards.items()}
    else:
        leaves = [t for t in doubles if t is not None]
        expected = torch.autograd.grad(outputs, leaves, [g.double() for g in grads])
        variants = {name: partial(_step, f, inputs, grads) for name, f in forwards.items()}
        # The backward reads gradients, branch and what was normed, and writes a gradient of each.
        normed_samples = outputs[-1].shape[0]
        num_bytes = 2 * num_bytes + inputs.x_NTD[:normed_samples].nbytes
        num_bytes += 0 if inputs.branch_KTD is None else inputs.branch_KTD.nbytes
    return Work(
        variants,
        expected,
        # bf16: operands and results are rounded to 8 bits, in the gradients before long sums too
        tolerance=2e-2 if inputs.dtype == torch.bfloat16 else 1e-5,
        bytes=num_bytes,
        dtype=inputs.dtype,
        backend="Triton kernel" if device == "cuda" else "tapct_fast",
        absent=absent,
    )


SOURCES = [
    "kernels/tapct_kernels/residual_norm.py",
    *("tapct_fast/model/cpu_training.py", "csrc/training_ops.cpp"),
]
main = op_bench(__file__, SOURCES, cases)

if __name__ == "__main__":
    main()

"""The cross-entropy of student rows against prototypes and soft targets, without logits in memory.

Rivals: the eager definition, with every logit in memory, eager and compiled; Liger-Kernel's scheme
in plain torch (logits and their gradient for a chunk of rows at a time, weight gradient summed over
chunks); on CUDA its own fused_linear_jsd. That one knows no Sinkhorn targets: it takes the
teacher's features and prototypes, so that the product for the teacher's logits is in its time only.
To have one gradient for all, the targets here are a softmax at the student's temperature, and
all weights are equal; no time depends on either. A step is forward and backward down to the
gradients of features and prototypes, float32 for the latter. Float64 values are from the op's own
float64 path, which tests hold to scalar formulas: dense they would not fit. Bytes are the floor:
the teacher's logits once per pass, features and prototypes, and every result. FLOPs are the three
products of a step; the op does a fourth, since it computes the logits again.
Shapes: the iBOT and DINO heads at batch 32; on the CPU 4,096 rows, where the peak of extra memory
counts, and 1,024.
Shape suffixes: S student rows, N target rows, J pairs, K bottleneck width, P prototypes, C chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Device, Work, compiled, op_bench, relative_errors, version
from tapct_kernels import SoftTargets, prototype_cross_entropy, prototype_cross_entropy_ref

TEMP = 0.1
LIGER = "liger-kernel"


class Inputs(NamedTuple):
    """Operands of the op, and what the teacher's logits came from."""

    features_SK: Tensor
    prototypes_PK: Tensor
    targets: SoftTargets
    target_row_SJ: Tensor
    weight_SJ: Tensor
    teacher_NK: Tensor
    teacher_PK: Tensor


class Shape(NamedTuple):
    """Sizes of a case."""

    name: str
    num_rows: int
    num_targets: int
    num_pairs: int
    num_prototypes: int
    width: int
    dtype: torch.dtype
    has_rivals: bool = True  # besides the eager definition


Call = Callable[[Inputs], Sequence[Tensor]]
Loss = Callable[..., Tensor]


def draw_inputs(shape: Shape, device: Device) -> Inputs:
    """Draw unit features and prototypes, and the targets of a teacher near the student."""
    generator = torch.Generator(device).manual_seed(0)
    _, S, N, J, P, K, dtype, _ = shape

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, K, generator=generator, device=device), dim=1)

    teacher_NK, teacher_PK = unit(N).to(dtype), unit(P).to(dtype)
    storage = torch.float32 if dtype == torch.float32 else torch.float16
    logits_NP = F.linear(teacher_NK.to(storage), teacher_PK.to(storage))
    row_N = torch.empty(N, device=device)
    for n in range(0, N, 1024):
        row_N[n : n + 1024] = -torch.logsumexp(logits_NP[n : n + 1024].float() / TEMP, 1)
    zeros_P, temp = row_N.new_zeros(P), row_N.new_full((), TEMP)
    row_S1 = torch.arange(S, device=device)[:, None]
    return Inputs(
        unit(S).to(dtype).requires_grad_(),
        (teacher_PK.float() + 0.5 * unit(P)).requires_grad_(),
        SoftTargets(logits_NP, None, zeros_P, row_N, temp),
        (row_S1 + torch.arange(J, device=device) * (N // J)) % N,
        row_N.new_full((S, J), 1 / S),
        teacher_NK,
        teacher_PK,
    )


def _loss(loss: Loss, inputs: Inputs) -> Tensor:
    features_SK, prototypes_PK, targets, target_row_SJ, weight_SJ, *_ = inputs
    return loss(
        *(features_SK, prototypes_PK, targets),
        temp=TEMP,
        target_row_SJ=target_row_SJ,
        weight_SJ=weight_SJ,
    )


@torch.no_grad()
def _forward(loss: Loss, inputs: Inputs) -> Sequence[Tensor]:
    return [_loss(loss, inputs)]


def _step(loss: Loss, inputs: Inputs) -> Sequence[Tensor]:
    return torch.autograd.grad(_loss(loss, inputs).sum(), inputs[:2])


@torch.no_grad()
def chunked_step(inputs: Inputs) -> Sequence[Tensor]:
    """Do as Liger-Kernel's fused_linear_jsd, with its chunks: as many as prototypes per width."""
    x_SK, prototypes_PK, targets, row_SJ, weight_SJ, *_ = inputs
    (S, K), P = x_SK.shape, prototypes_PK.shape[0]
    w_PK = prototypes_PK.to(x_SK.dtype)
    rows = max(128, 2 ** (-(-S // -(-P // K)) - 1).bit_length())
    grad_x_SK = torch.empty_like(x_SK)
    grad_w_PK = torch.zeros_like(prototypes_PK)
    for first in range(0, S, rows):
        chunk = slice(first, first + rows)
        x_CK, row_CJ, weight_CJ = x_SK[chunk], row_SJ[chunk], weight_SJ[chunk]
        grad_CP = torch.softmax((x_CK @ w_PK.T).float() / TEMP, 1)
        grad_CP *= weight_CJ.sum(1, keepdim=True)
        for row_C, weight_C in zip(row_CJ.unbind(1), weight_CJ.unbind(1), strict=True):
            of_rows = targets._replace(rows_NX=targets.rows_NX[row_C], row_N=targets.row_N[row_C])
            grad_CP -= of_rows.dense() * weight_C[:, None]
        grad_CP = (grad_CP / TEMP).to(x_SK.dtype)
        grad_x_SK[chunk] = grad_CP @ w_PK
        grad_w_PK += grad_CP.T @ x_CK
    return grad_x_SK, grad_w_PK


def liger_step(inputs: Inputs) -> Sequence[Tensor]:
    """Call Liger-Kernel's kernels: the mean over rows of KL(teacher, student)."""
    functional = import_module("liger_kernel.transformers.functional")
    features_SK, prototypes_PK = inputs[:2]
    w_PK = prototypes_PK.to(features_SK.dtype)
    loss = functional.liger_fused_linear_jsd(
        *(features_SK, w_PK, inputs.teacher_NK, inputs.teacher_PK), jsd_beta=0.0, temperature=TEMP
    )
    return torch.autograd.grad(loss, inputs[:2])


def _exact(inputs: Inputs, kind: str) -> Sequence[Tensor]:
    features_SK, prototypes_PK, targets, *rest = inputs
    x_SK, w_PK = (t.detach().double().requires_grad_() for t in (features_SK, prototypes_PK))
    logits_NP, _, *vectors = targets
    doubles = SoftTargets(logits_NP, None, *(v.double() for v in vectors))
    inputs = Inputs(x_SK, w_PK, doubles, *rest)
    measured = _forward if kind == "forward" else _step
    return measured(prototype_cross_entropy, inputs)


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield both heads on CUDA; on the CPU a step of two sizes."""
    K = 256
    if is_tiny:
        dtype = torch.float32
        shapes = [Shape("ibot", 20, 20, 1, 64, 16, dtype), Shape("dino", 30, 6, 2, 64, 16, dtype)]
    elif device == "cuda":
        dtype = torch.bfloat16
        shapes = [
            Shape("ibot", 22_579, 22_579, 1, 65_536, K, dtype),
            Shape("dino", 320, 64, 2, 65_536, K, dtype),
        ]
    else:
        shapes = [
            Shape("ibot", 4_096, 4_096, 1, 65_536, K, torch.float32, has_rivals=False),
            Shape("ibot", 1_024, 1_024, 1, 65_536, K, torch.bfloat16),
        ]
    for shape in shapes:
        dtype_name = str(shape.dtype).removeprefix("torch.")
        sizes = f"{shape.num_rows}x{shape.num_prototypes} K={shape.width} J={shape.num_pairs}"
        for kind in ("forward", "step") if device == "cuda" or is_tiny else ("step",):
            name = f"{shape.name} {sizes} {dtype_name} {kind}"
            yield Case(name, partial(_work, shape, device, is_tiny, kind))


def _work(shape: Shape, device: Device, is_tiny: bool, kind: str) -> Work:
    inputs = draw_inputs(shape, device)
    expected = _exact(inputs, kind)
    # bf16: rounded operands, and by all but the kernels logits of order 1 / TEMP
    tolerance = 2e-2 if shape.dtype == torch.bfloat16 else 1e-4
    losses: dict[str, Loss] = {
        "tapct prototype_cross_entropy": prototype_cross_entropy,
        "eager": prototype_cross_entropy_ref,
    }
    if shape.has_rivals and not is_tiny:
        losses |= compiled(prototype_cross_entropy_ref, device)
    call = _forward if kind == "forward" else _step
    variants: dict[str, Callable[[], Sequence[Tensor]]] = {
        name: partial(call, loss, inputs) for name, loss in losses.items()
    }
    absent = {}
    if kind == "step" and shape.has_rivals:
        variants["chunks of rows, eager"] = partial(chunked_step, inputs)
        liger = f"{LIGER} {version(LIGER)} fused_linear_jsd"
        absent = {LIGER: _reason_without_liger(inputs, expected, device, tolerance)}
        if not absent[LIGER]:
            absent = {}
            variants[liger] = partial(liger_step, inputs)
    S, P, K = shape.num_rows, shape.num_prototypes, shape.width
    results = sum(t.nbytes for t in expected) * 4 // 8
    operands = (
        inputs.targets.rows_NX.nbytes + inputs.features_SK.nbytes + inputs.prototypes_PK.nbytes
    )
    return Work(
        variants,
        expected,
        tolerance,
        bytes=operands * (1 if kind == "forward" else 2) + results,
        flops=2 * S * P * K * (1 if kind == "forward" else 3),
        dtype=shape.dtype,
        backend="Triton kernel" if device == "cuda" else "tiled torch",
        absent=absent,
        measures_memory=not is_tiny,
    )


def _reason_without_liger(
    inputs: Inputs, expected: Sequence[Tensor], device: Device, tolerance: float
) -> str:
    """Return why its kernels cannot be compared here, or nothing."""
    if device != "cuda":
        return "CUDA only"
    if inputs.weight_SJ.shape[1] != 1:
        return "one teacher row for each student row only"
    if find_spec("liger_kernel") is None:
        return "not installed"
    errors = relative_errors({LIGER: partial(liger_step, inputs)}, expected, tolerance=float("inf"))
    return f"off by {errors[LIGER]:g}" if errors[LIGER] > tolerance else ""


main = op_bench(__file__, ["kernels/tapct_kernels/prototype_cross_entropy.py"], cases)

if __name__ == "__main__":
    main()

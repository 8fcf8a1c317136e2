"""Token assembly from int16 HU against the chains of operations it replaces.

Rivals: cast, clip and z-score in float32, cast, then Conv3d, or unfold and linear (eager and
compiled), mask token, position, concatenation behind the prefix rows. A step is the forward and
all parameter gradients. Bytes are the floor: every operand read once, every result written once.
Shapes: the two global views of a sample, 12x224x224, in patches of 4x8x8, 30 % masked.
Shape suffixes: B batch, Z Y X voxels, K voxels of a patch, L patches, D width, R prefix rows,
T = R + L.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Device, Work, compiled, op_bench
from tapct_kernels import patch_embed, patch_embed_ref

PATCH_ZYX = (4, 8, 8)
HU = (-1008.0, 822.0, -86.8086, 322.6347)  # clip, mean, std of the released TAP-CT processor
NUM_PREFIX = 5  # cls and four registers

Forward = Callable[["Inputs"], Tensor]


class Inputs(NamedTuple):
    """Operands of ``patch_embed``; all but the volume and the mask need gradients."""

    x_BZYX: Tensor
    weight_DK: Tensor
    bias_D: Tensor
    pos_LD: Tensor
    mask_token_D: Tensor
    mask_BL: Tensor
    prefix_RD: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        """Operands with a gradient."""
        return [t for t in self if t.is_floating_point()]


def draw_inputs(
    batch: int, size_zyx: tuple[int, int, int], width: int, dtype: torch.dtype, device: Device
) -> Inputs:
    """Draw random operands of one shape."""
    generator = torch.Generator(device).manual_seed(0)
    num_voxels = math.prod(PATCH_ZYX)
    num_patches = math.prod(size_zyx) // num_voxels

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=generator, device=device)
        return values.to(dtype).requires_grad_()

    return Inputs(
        torch.randint(
            -1024, 3072, (batch, *size_zyx), generator=generator, device=device, dtype=torch.int16
        ),
        normal(width, num_voxels, scale=num_voxels**-0.5),
        normal(width),
        normal(num_patches, width),
        normal(width),
        torch.rand(batch, num_patches, generator=generator, device=device) < 0.3,
        normal(NUM_PREFIX, width),
    )


def op(inputs: Inputs) -> Tensor:
    """Call the op under test."""
    tokens_BTD: Tensor = patch_embed(*inputs, PATCH_ZYX, HU)
    return tokens_BTD


def _normalised(inputs: Inputs) -> Tensor:
    low, high, mean, std = HU
    voxels_BZYX = (inputs.x_BZYX.float().clamp(low, high) - mean) / std
    return voxels_BZYX.to(inputs.weight_DK.dtype)


def _assembled(inputs: Inputs, rows_BLD: Tensor) -> Tensor:
    rows_BLD = torch.where(inputs.mask_BL[..., None], inputs.mask_token_D, rows_BLD)
    prefix_BRD = inputs.prefix_RD.expand(rows_BLD.shape[0], -1, -1)
    return torch.cat([prefix_BRD, rows_BLD + inputs.pos_LD], dim=1)


def conv3d_chain(inputs: Inputs) -> Tensor:
    """Embed by a strided convolution, as DINOv2 ports to 3D do."""
    kernel = inputs.weight_DK.reshape(-1, 1, *PATCH_ZYX)
    grid_BDZYX = F.conv3d(_normalised(inputs)[:, None], kernel, inputs.bias_D, stride=PATCH_ZYX)
    return _assembled(inputs, grid_BDZYX.flatten(2).mT)


def linear_chain(inputs: Inputs) -> Tensor:
    """Embed by unfold and one matrix product."""
    B, Z, Y, X = inputs.x_BZYX.shape
    z, y, x = PATCH_ZYX
    blocks = _normalised(inputs).reshape(B, Z // z, z, Y // y, y, X // x, x)
    rows_BLK = blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 6).flatten(1, 3)
    return _assembled(inputs, F.linear(rows_BLK, inputs.weight_DK, inputs.bias_D))


def _step(forward: Forward, inputs: Inputs, grad_BTD: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(forward(inputs), inputs.parameters, grad_BTD)


@torch.no_grad()
def _forward(forward: Forward, inputs: Inputs) -> Sequence[Tensor]:
    return [forward(inputs)]


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield both widths, forward and step."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = 64 if device == "cuda" else 2
    size_zyx = (8, 16, 16) if is_tiny else (12, 224, 224)
    shape = "x".join(map(str, (batch, *size_zyx)))
    for width in (16,) if is_tiny else (384, 768):
        for kind in ("forward", "step"):
            draw = partial(draw_inputs, batch, size_zyx, width, dtype, device)
            name = f"{shape} D={width} {str(dtype).removeprefix('torch.')} {kind}"
            yield Case(name, partial(_work, draw, device, is_tiny, kind))


def _work(draw: Callable[[], Inputs], device: Device, is_tiny: bool, kind: str) -> Work:
    inputs = draw()
    dtype, (width, num_voxels) = inputs.weight_DK.dtype, inputs.weight_DK.shape
    forwards: dict[str, Forward] = {
        "tapct patch_embed": op,
        "eager conv3d": conv3d_chain,
        "eager unfold, linear": linear_chain,
    }
    if not is_tiny:
        for name, call in compiled(linear_chain, device).items():
            forwards[f"{name} unfold, linear"] = call
    doubles = Inputs(*(_detached_double(t) for t in inputs))
    exact_BTD = patch_embed_ref(*doubles, PATCH_ZYX, HU)
    grad_BTD = torch.randn_like(exact_BTD).to(dtype)
    flops = 2 * inputs.mask_BL.numel() * num_voxels * width
    num_bytes = _num_bytes(inputs) + grad_BTD.nbytes
    if kind == "forward":
        expected: Sequence[Tensor] = [exact_BTD.detach()]
        variants = {name: partial(_forward, f, inputs) for name, f in forwards.items()}
    else:
        expected = torch.autograd.grad(exact_BTD, doubles.parameters, grad_BTD.double())
        variants = {name: partial(_step, f, inputs, grad_BTD) for name, f in forwards.items()}
        flops *= 2
        # The step reads volume, mask and the tokens' gradient again and writes the parameters'.
        num_bytes += _num_bytes(inputs) + grad_BTD.nbytes
    return Work(
        variants,
        expected,
        # bf16: operands and results are rounded to 8 bits, in the gradients before long sums too
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5,
        bytes=num_bytes,
        flops=flops,
        dtype=dtype,
        backend="Triton kernel" if device == "cuda" else "eager definition",
    )


def _detached_double(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_()


main = op_bench(__file__, ["kernels/tapct_kernels/patch_embed.py"], cases)

if __name__ == "__main__":
    main()

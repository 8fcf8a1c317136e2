"""Turn a 2D vision transformer into a 3D one: the patch embedding grows a depth.

Laws:

- channels: summed, what a grey image repeated over the channels gives;
- plane: a kernel of another size is the one whose products with resized patches are, in the least
  squares sense over all patches, those of the old kernel with the patches (``resize_kernel``);
- depth: the kernel is repeated and divided by its depth, so a volume that is constant along z gives
  in each layer of tokens what the slice gives;
- positions: the grid keeps its one layer here; ``fit_state`` resizes it, which in depth repeats it.

So one layer of tokens of such a volume is the 2D network on the slice, to its last token. Several
equal layers are not: softmax weighs each patch as often as it appears, the cls token once.
Names are DINOv2's or timm's. Shape suffixes: C channels, D width, Z Y X voxels, L patch tokens.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tapct_fast.config import Zyx
from tapct_fast.errors import BackboneError

KERNEL = "patch_embed.proj.weight"
_REGISTERS = ("reg_token", "storage_tokens")  # timm's name, DINOv3's
_CLASSIFIER = ("head.weight", "head.bias")


def inflate(named: Mapping[str, Tensor], patch_zyx: Zyx) -> tuple[dict[str, Tensor], Zyx]:
    """Return the tensors of a 3D network, and the size in voxels of the image of its positions.

    Args:
        named: Tensors of a 2D network under DINOv2's or timm's names; a classifier is left out.
        patch_zyx: Patch of the 3D network.

    Raises:
        BackboneError: The kernel is no image kernel, or there is no square grid of learned
            positions.
    """
    tensors = {name: tensor for name, tensor in named.items() if name not in _CLASSIFIER}
    for name in _REGISTERS:
        if name in tensors:
            tensors["register_tokens"] = tensors.pop(name)
    tensors[KERNEL] = inflate_kernel(tensors[KERNEL], patch_zyx)
    if "pos_embed" not in tensors:
        raise BackboneError(
            "pos_embed: missing; a network with rotary positions, such as DINOv3, is no start for "
            "one with learned positions"
        )
    position = tensors["pos_embed"]
    if position.ndim != 3 or position.shape[0] != 1:
        raise BackboneError(f"pos_embed: shape {tuple(position.shape)}, expected (1, positions, D)")
    num_rows = position.shape[1]
    if math.isqrt(num_rows) ** 2 == num_rows:  # timm: the cls token includes its position
        tensors["pos_embed"] = F.pad(position, (0, 0, 1, 0))
        num_rows += 1
    side = math.isqrt(num_rows - 1)
    if side**2 != num_rows - 1:
        raise BackboneError(
            f"pos_embed: {num_rows} positions are no square grid, with or without a cls token"
        )
    z, y, x = patch_zyx
    return tensors, (z, side * y, side * x)


def inflate_kernel(kernel: Tensor, patch_zyx: Zyx) -> Tensor:
    """Return the kernel (D, 1, Z, Y, X) of a 3D patch embedding.

    Args:
        kernel: Of images, (D, C, Y, X), or of single slices, (D, C, 1, Y, X).
        patch_zyx: Its new size.

    Raises:
        BackboneError: It is neither.
    """
    shape = tuple(kernel.shape)
    if len(shape) not in (4, 5) or 0 in shape or (len(shape) == 5 and shape[2] != 1):
        raise BackboneError(f"{KERNEL}: shape {shape}, expected (D, C, Y, X)")
    if not kernel.is_floating_point():
        raise BackboneError(f"{KERNEL}: type {kernel.dtype}, expected a float type")
    z, *size_yx = patch_zyx
    grey_DYX = kernel.double().flatten(1, -3).sum(1)
    resized_DYX = resize_kernel(grey_DYX, (size_yx[0], size_yx[1])) / z
    return resized_DYX[:, None, None].repeat(1, 1, z, 1, 1).float()


def resize_kernel(kernel_DYX: Tensor, size_yx: tuple[int, int]) -> Tensor:
    """Return the kernels for patches of another size.

    With B the linear map that resizes a patch (bilinear, antialiased where it shrinks, as a view
    is), the new kernel is ``pinv(B^T) w``: the least squares solution of ``<new, B x> = <w, x>``
    over all patches x. Exact where the patch grows.

    Source: FlexiViT, arXiv:2212.08013 section 3.4.
    """
    size = tuple(kernel_DYX.shape[1:])
    if size == size_yx:
        return kernel_DYX
    # B is separable, and the pseudo-inverse of a Kronecker product is that of its factors.
    y, x = (_pseudo_inverse(a, b, kernel_DYX) for a, b in zip(size, size_yx, strict=True))
    return y @ kernel_DYX @ x.T


def _pseudo_inverse(num_in: int, num_out: int, like: Tensor) -> Tensor:
    """Return pinv(B^T), (num_out, num_in), of the map B that resizes one axis."""
    # Units as rows of one image: torch 2.13 repeats the first row of an image one pixel wide.
    units = torch.eye(num_in, dtype=like.dtype, device=like.device)[None, None]
    resized = F.interpolate(units, size=(num_in, num_out), mode="bilinear", antialias=True)
    transposed = resized[0, 0]
    inverse: Tensor = torch.linalg.pinv(transposed)
    return inverse

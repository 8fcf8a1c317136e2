"""Token assembly of a 3D ViT from a CT volume: one read of the voxels, one write of the tokens.

For patch row l of volume b, with w the voxels of the patch in z, y, x order::

    v = (clip(w, low, high) - mean) / std                  int16 HU; a float volume is used as it is
    tokens[b, R + l] = (mask[b, l] ? mask_token : weight @ v + bias) + pos[l]
    tokens[b, :R]    = prefix

Masked rows do get their position; prefix rows (cls with its position, registers) come complete.
Shape suffixes: B batch, Z Y X voxels, K voxels of a patch, L patch tokens in z, y, x order,
D width, R prefix rows, T = R + L rows of a volume, N = B * L patch rows of the batch, S splits.
The operands of every product have weight's dtype; sums, bias and position are float32 (float64 for
float64 weights); tokens have pos's dtype. A strided 3D convolution is the same map, but falls to
slow kernels in several cuDNN versions (pytorch#174051).
Source: order of mask, position and prefix as in DINOv2's vision_transformer.py, arXiv:2304.07193.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tapct_kernels.operator import operator
from tapct_kernels.tuning import Config, config_for

# 128 x 128 takes 8 warps: 4 spill at this size.
FORWARD_CONFIGS: tuple[Config, ...] = (
    {"BLOCK_N": 128, "BLOCK_D": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2},
    {"BLOCK_N": 128, "BLOCK_D": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
)
WEIGHT_GRAD_CONFIGS: tuple[Config, ...] = (
    {"BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_N": 128, "BLOCK_D": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
)


def _check(
    x_BZYX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor,
    pos_LD: Tensor,
    mask_token_D: Tensor,
    mask_BL: Tensor | None,
    prefix_RD: Tensor,
    patch_zyx: Sequence[int],
    hu: Sequence[float],
) -> None:
    shape = tuple(x_BZYX.shape)
    if len(shape) != 4 or any(s % p for s, p in zip(shape[1:], patch_zyx, strict=True)):
        raise ValueError(
            f"patch_embed: x of shape {shape} is not (B, Z, Y, X) in whole patches of "
            f"{tuple(patch_zyx)}; pad the volume first"
        )
    if x_BZYX.dtype != torch.int16 and not x_BZYX.is_floating_point():
        raise ValueError(f"patch_embed: x is {x_BZYX.dtype}, not int16 HU or normalised float")
    if len(hu) != 4:
        raise ValueError(f"patch_embed: hu={tuple(hu)} is not (clip_low, clip_high, mean, std)")
    width = weight_DK.shape[0]
    num_patches = math.prod(s // p for s, p in zip(shape[1:], patch_zyx, strict=True))
    expected = [
        ("weight", weight_DK, (width, math.prod(patch_zyx))),
        ("bias", bias_D, (width,)),
        ("pos", pos_LD, (num_patches, width)),
        ("mask_token", mask_token_D, (width,)),
        ("prefix", prefix_RD, (prefix_RD.shape[0], width)),
    ]
    if mask_BL is not None:
        expected.append(("mask", mask_BL, (shape[0], num_patches)))
    for name, tensor, wanted in expected:
        if tuple(tensor.shape) != wanted:
            found = tuple(tensor.shape)
            raise ValueError(f"patch_embed: {name} has shape {found}, not {wanted}")


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _patch_rows(
    x_BZYX: Tensor, patch_zyx: Sequence[int], hu: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Return rows_NK: normalised voxels of every patch, rounded to ``dtype``, in the sum dtype."""
    voxels_BZYX = x_BZYX.to(_sum_dtype(dtype))
    if x_BZYX.dtype == torch.int16:
        low, high, mean, std = hu
        voxels_BZYX.clamp_(low, high).sub_(mean).div_(std)  # in place: a fresh copy
    z, y, x = patch_zyx
    blocks = voxels_BZYX.unflatten(3, (-1, x)).unflatten(2, (-1, y)).unflatten(1, (-1, z))
    rows_NK = blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 6).flatten(0, 3)
    rounded_NK: Tensor = rows_NK.to(dtype).to(_sum_dtype(dtype))
    return rounded_NK


def patch_embed_ref(
    x_BZYX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor,
    pos_LD: Tensor,
    mask_token_D: Tensor,
    mask_BL: Tensor | None,
    prefix_RD: Tensor,
    patch_zyx: Sequence[int],
    hu: Sequence[float],
) -> Tensor:
    """Eager definition; tests hold the kernel to it and benches compare with it."""
    batch, dtype = x_BZYX.shape[0], _sum_dtype(weight_DK.dtype)
    rows_NK = _patch_rows(x_BZYX, patch_zyx, hu, weight_DK.dtype)
    rows_ND = torch.addmm(bias_D.to(dtype), rows_NK, weight_DK.to(dtype).T)
    rows_BLD = rows_ND.unflatten(0, (batch, pos_LD.shape[0]))
    if mask_BL is not None:
        rows_BLD = torch.where(mask_BL[..., None], mask_token_D.to(dtype), rows_BLD)
    rows_BLD = (rows_BLD + pos_LD.to(dtype)).to(pos_LD.dtype)
    return torch.cat([prefix_RD.to(pos_LD.dtype).expand(batch, -1, -1), rows_BLD], dim=1)


@triton.jit
def _voxel_tile(
    x_ptr, n, k, N, low, high, mean, std,
    Y: tl.constexpr, X: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, IS_HU: tl.constexpr,
):  # fmt: skip
    """Load voxel k of int32 patch row n, for index tiles that broadcast; 0 outside both edges."""
    gx = n % (X // PX)
    gy = n // (X // PX) % (Y // PY)
    bz = n // ((X // PX) * (Y // PY))  # volume and depth row at once: volumes are whole patches
    inner = k // (PY * PX) * (Y * X) + (gy * PY + k // PX % PY) * X + gx * PX + k % PX
    offset = bz.to(tl.int64) * (PZ * Y * X) + inner  # a batch of volumes passes 2**31 voxels
    inside = (n < N) & (k < PZ * PY * PX)
    v = tl.load(x_ptr + offset, mask=inside, other=0).to(tl.float32)
    if IS_HU:
        v = (tl.minimum(tl.maximum(v, low), high) - mean) / std
        v = tl.where(inside, v, 0.0)
    return v


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, pos_ptr, mask_token_ptr, mask_ptr, prefix_ptr, out_ptr,
    N, num_tiles, L, D, low, high, mean, std,
    R: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    IS_HU: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = PZ * PY * PX
    num_tiles_D = tl.cdiv(D, BLOCK_D)
    # Tiles of one row block are neighbours: they share its voxels in the L2.
    d = (tl.program_id(0) % num_tiles_D) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    tile = tl.program_id(0) // num_tiles_D
    if tile < num_tiles:
        # Rows are int32, for 64-bit divisions are calls; their offsets are int64.
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        inside = (n < N) & (d < D)
        acc = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            w = tl.load(weight_ptr + d * K + k[None, :], mask=(d < D) & (k[None, :] < K), other=0.0)
            v = _voxel_tile(x_ptr, n, k[:, None], N, low, high, mean, std, Y, X, PZ, PY, PX, IS_HU)
            # The weight is on the left: it comes from memory, and Triton on Hopper has miscompiled
            # left operands that were computed in registers.
            acc = tl.dot(w, v.to(w.dtype), acc, input_precision="ieee")
        acc += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        if HAS_MASK:
            is_masked = tl.load(mask_ptr + n, mask=n < N, other=0) != 0
            token = tl.load(mask_token_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            acc = tl.where(is_masked, token, acc)
        acc += tl.load(pos_ptr + n % L * D + d, mask=inside, other=0.0).to(tl.float32)
        out = out_ptr + (n // L * (R + L) + R + n % L).to(tl.int64) * D + d
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
    elif R > 0:
        m = (tile - num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        inside = (m < N // L * R) & (d < D)
        row = tl.load(prefix_ptr + m % R * D + d, mask=inside, other=0.0)
        out = out_ptr + (m // R * (R + L) + m % R).to(tl.int64) * D + d
        tl.store(out, row.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight_grad_kernel(
    grad_ptr, x_ptr, mask_ptr, out_SDK_ptr,
    N, L, D, low, high, mean, std,
    R: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    IS_HU: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = PZ * PY * PX
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    split = tl.program_id(2)
    acc = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    for n0 in range(0, ROWS, BLOCK_N):
        n = split * ROWS + n0 + tl.arange(0, BLOCK_N)
        g_n = n[None, :]
        kept = g_n < N
        if HAS_MASK:
            kept = kept & (tl.load(mask_ptr + g_n, mask=kept, other=1) == 0)
        row = (g_n // L * (R + L) + R + g_n % L).to(tl.int64)
        g = tl.load(grad_ptr + row * D + d, mask=kept & (d < D), other=0.0)
        v = _voxel_tile(x_ptr, n[:, None], k, N, low, high, mean, std, Y, X, PZ, PY, PX, IS_HU)
        acc = tl.dot(g, v.to(g.dtype), acc, input_precision="ieee")
    tl.store(out_SDK_ptr + (split.to(tl.int64) * D + d) * K + k, acc, mask=(d < D) & (k < K))


@triton.jit
def _row_grad_kernel(
    grad_ptr, mask_ptr, rows_TD_ptr, kept_SD_ptr, masked_SD_ptr,
    B, T, D,
    R: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    # int64: a batch of tokens passes 2**31 elements
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (t < T) & (d < D)
    kept = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    masked = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for b in range(B):
        g = tl.load(grad_ptr + (b * T + t) * D + d, mask=inside, other=0.0).to(tl.float32)
        if HAS_MASK:
            is_patch = (t >= R) & (t < T)
            m = tl.load(mask_ptr + b * (T - R) + t - R, mask=is_patch, other=0) != 0
            masked += tl.where(m, g, 0.0)
            kept += tl.where(m, 0.0, g)
        else:
            kept += g
    tl.store(rows_TD_ptr + t * D + d, kept + masked, mask=inside)
    at = tile * D + d
    patch_kept = tl.where(t >= R, kept, 0.0)  # prefix rows have no bias
    tl.store(kept_SD_ptr + at, tl.sum(patch_kept, axis=0)[None, :], mask=d < D)
    tl.store(masked_SD_ptr + at, tl.sum(masked, axis=0)[None, :], mask=d < D)


def _block(size: int, largest: int) -> int:
    block: int = triton.next_power_of_2(size)
    return min(largest, max(16, block))  # 16: the smallest side of a dot


def _clamped(config: Config, N: int, D: int, K: int) -> dict[str, int]:
    """Return the configuration with no block larger than its side needs."""
    sizes = {"BLOCK_N": N, "BLOCK_D": D, "BLOCK_K": K}
    return {**config, **{name: _block(size, config[name]) for name, size in sizes.items()}}


def _geometry(x_BZYX: Tensor, patch_zyx: Sequence[int]) -> dict[str, int | bool]:
    names = ("Y", "X", "PZ", "PY", "PX")
    sizes = dict(zip(names, (*x_BZYX.shape[2:], *patch_zyx), strict=True))
    return {**sizes, "IS_HU": x_BZYX.dtype == torch.int16}


def _forward_triton(
    x_BZYX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor,
    pos_LD: Tensor,
    mask_token_D: Tensor,
    mask_BL: Tensor | None,
    prefix_RD: Tensor,
    patch_zyx: Sequence[int],
    hu: Sequence[float],
) -> Tensor:
    tensors = (x_BZYX, weight_DK, bias_D, pos_LD, mask_token_D, mask_BL, prefix_RD)
    _check(*tensors, patch_zyx, hu)
    if weight_DK.dtype == torch.float64:  # for verification only: the kernels sum in float32
        return patch_embed_ref(*tensors, patch_zyx, hu)
    x_BZYX = x_BZYX.contiguous()
    (D, K), L, R, B = weight_DK.shape, pos_LD.shape[0], prefix_RD.shape[0], x_BZYX.shape[0]
    out_BTD = pos_LD.new_empty(B, R + L, D)
    config = _clamped(config_for("patch_embed.forward", D, FORWARD_CONFIGS), B * L, D, K)
    block_N = config["BLOCK_N"]
    num_tiles = triton.cdiv(B * L, block_N)
    grid = ((num_tiles + triton.cdiv(B * R, block_N)) * triton.cdiv(D, config["BLOCK_D"]),)
    _forward_kernel[grid](
        x_BZYX,
        weight_DK.contiguous(),
        bias_D.contiguous(),
        pos_LD.contiguous(),
        mask_token_D.contiguous(),
        x_BZYX if mask_BL is None else mask_BL.contiguous(),
        prefix_RD.contiguous(),
        out_BTD,
        *(B * L, num_tiles, L, D, *hu),
        **_geometry(x_BZYX, patch_zyx),
        R=R,
        HAS_MASK=mask_BL is not None,
        **config,
    )
    return out_BTD


def _backward_triton(
    grad_BTD: Tensor,
    x_BZYX: Tensor,
    weight_DK: Tensor,
    mask_BL: Tensor | None,
    patch_zyx: Sequence[int],
    hu: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weight_DK.dtype == torch.float64:  # as in the forward
        return _backward_ref(grad_BTD, x_BZYX, weight_DK, mask_BL, patch_zyx, hu)
    grad_BTD, x_BZYX = grad_BTD.contiguous(), x_BZYX.contiguous()
    mask = x_BZYX if mask_BL is None else mask_BL.contiguous()
    geometry = _geometry(x_BZYX, patch_zyx)
    (B, T, D), K = grad_BTD.shape, weight_DK.shape[1]
    N = x_BZYX.numel() // K
    L = N // B
    has_mask = mask_BL is not None

    # Two stages, both in a fixed order: at most 32 splits keep the partial sums below 25 MB.
    config = _clamped(config_for("patch_embed.weight_grad", D, WEIGHT_GRAD_CONFIGS), N, D, K)
    rows = max(config["BLOCK_N"], triton.next_power_of_2(triton.cdiv(N, 32)))
    splits = triton.cdiv(N, rows)
    weight_SDK = grad_BTD.new_empty(splits, D, K, dtype=torch.float32)
    grid = (triton.cdiv(D, config["BLOCK_D"]), triton.cdiv(K, config["BLOCK_K"]), splits)
    _weight_grad_kernel[grid](
        # Cast here and not in the kernel: its left operand then comes from memory, see the forward.
        *(grad_BTD.to(weight_DK.dtype), x_BZYX, mask, weight_SDK, N, L, D, *hu),
        **geometry,
        R=T - L,
        HAS_MASK=has_mask,
        ROWS=rows,
        **config,
    )
    block_T, block_D = 8, _block(D, 128)
    tiles = triton.cdiv(T, block_T)
    rows_TD = grad_BTD.new_empty(T, D, dtype=torch.float32)
    kept_SD, masked_SD = rows_TD.new_empty(tiles, D), rows_TD.new_empty(tiles, D)
    _row_grad_kernel[(tiles, triton.cdiv(D, block_D))](
        *(grad_BTD, mask, rows_TD, kept_SD, masked_SD, B, T, D),
        R=T - L,
        HAS_MASK=has_mask,
        BLOCK_T=block_T,
        BLOCK_D=block_D,
        num_warps=4,
    )
    return weight_SDK.sum(0), kept_SD.sum(0), masked_SD.sum(0), rows_TD


@operator("tapct::patch_embed")
def patch_embed(
    x_BZYX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor,
    pos_LD: Tensor,
    mask_token_D: Tensor,
    mask_BL: Tensor | None,
    prefix_RD: Tensor,
    patch_zyx: Sequence[int],
    hu: Sequence[float],
) -> Tensor:
    """Return the tokens of volumes; Triton on CUDA, the eager definition elsewhere.

    Args:
        x_BZYX: int16 HU, clipped and z-scored here, or a float volume used as it is.
        weight_DK: Projection; K = voxels of a patch in z, y, x order.
        bias_D: Bias of the projection.
        pos_LD: One position row per patch; its dtype is the output's.
        mask_token_D: Takes the place of the projection where ``mask_BL`` is true.
        mask_BL: Bool, or None where nothing is masked.
        prefix_RD: Rows put in front of every volume's patches as they are.
        patch_zyx: Voxels per patch.
        hu: clip_low, clip_high, mean, std in HU; read for int16 input only.

    Returns:
        tokens_BTD, T = R + L.

    Raises:
        ValueError: A shape or dtype does not fit the others.
    """
    tensors = (x_BZYX, weight_DK, bias_D, pos_LD, mask_token_D, mask_BL, prefix_RD)
    _check(*tensors, patch_zyx, hu)
    return patch_embed_ref(*tensors, patch_zyx, hu)


patch_embed.register_kernel("cuda")(_forward_triton)


@patch_embed.register_fake
def _(
    x_BZYX: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor,
    pos_LD: Tensor,
    mask_token_D: Tensor,
    mask_BL: Tensor | None,
    prefix_RD: Tensor,
    patch_zyx: Sequence[int],
    hu: Sequence[float],
) -> Tensor:
    tensors = (x_BZYX, weight_DK, bias_D, pos_LD, mask_token_D, mask_BL, prefix_RD)
    _check(*tensors, patch_zyx, hu)
    num_rows = prefix_RD.shape[0] + pos_LD.shape[0]
    return pos_LD.new_empty(x_BZYX.shape[0], num_rows, weight_DK.shape[0])


def _backward_ref(
    grad_BTD: Tensor,
    x_BZYX: Tensor,
    weight_DK: Tensor,
    mask_BL: Tensor | None,
    patch_zyx: Sequence[int],
    hu: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_NK = _patch_rows(x_BZYX, patch_zyx, hu, weight_DK.dtype)
    num_patches = rows_NK.shape[0] // grad_BTD.shape[0]
    grad_BTD = grad_BTD.to(rows_NK.dtype)
    grad_ND = grad_BTD[:, grad_BTD.shape[1] - num_patches :].flatten(0, 1)
    grad_mask_token_D = grad_ND.new_zeros(grad_ND.shape[1])
    if mask_BL is not None:
        mask_N = mask_BL.flatten()
        grad_mask_token_D = grad_ND[mask_N].sum(0)
        grad_ND = grad_ND.masked_fill(mask_N[:, None], 0)
    grad_weight_DK = grad_ND.to(weight_DK.dtype).to(grad_ND.dtype).T @ rows_NK
    return grad_weight_DK, grad_ND.sum(0), grad_mask_token_D, grad_BTD.sum(0)


@operator("tapct::patch_embed_backward")
def patch_embed_backward(
    grad_BTD: Tensor,
    x_BZYX: Tensor,
    weight_DK: Tensor,
    mask_BL: Tensor | None,
    patch_zyx: Sequence[int],
    hu: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of weight_DK, bias_D, mask_token_D and rows_TD in the sum dtype.

    ``rows_TD`` sums over the batch: the first R rows belong to the prefix, the rest to pos_LD.
    """
    return _backward_ref(grad_BTD, x_BZYX, weight_DK, mask_BL, patch_zyx, hu)


patch_embed_backward.register_kernel("cuda")(_backward_triton)


@patch_embed_backward.register_fake
def _(
    grad_BTD: Tensor,
    x_BZYX: Tensor,
    weight_DK: Tensor,
    mask_BL: Tensor | None,
    patch_zyx: Sequence[int],
    hu: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D, K = weight_DK.shape
    like = weight_DK.new_empty(0, dtype=_sum_dtype(weight_DK.dtype))
    rows_TD = like.new_empty(grad_BTD.shape[1], D)
    return like.new_empty(D, K), like.new_empty(D), like.new_empty(D), rows_TD


def _voxel_grad(
    grad_BLD: Tensor, x_BZYX: Tensor, weight_DK: Tensor, mask_BL: Tensor | None, zyx: Sequence[int]
) -> Tensor:
    """Return the gradient of a float volume; saliency maps need it, training does not."""
    grad_BLD = grad_BLD.to(_sum_dtype(weight_DK.dtype))
    if mask_BL is not None:
        grad_BLD = grad_BLD.masked_fill(mask_BL[..., None], 0)
    grid_zyx = [s // p for s, p in zip(x_BZYX.shape[1:], zyx, strict=True)]
    grad_BLK = grad_BLD @ weight_DK.to(grad_BLD.dtype)
    blocks = grad_BLK.unflatten(2, list(zyx)).unflatten(1, grid_zyx).permute(0, 1, 4, 2, 5, 3, 6)
    grad_BZYX: Tensor = blocks.flatten(5, 6).flatten(3, 4).flatten(1, 2).to(x_BZYX.dtype)
    return grad_BZYX


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_BZYX, weight_DK, bias_D, pos_LD, mask_token_D, mask_BL, prefix_RD, patch_zyx, hu = inputs
    ctx.save_for_backward(x_BZYX, weight_DK, mask_BL)
    ctx.patch_zyx, ctx.hu, ctx.num_prefix = patch_zyx, hu, prefix_RD.shape[0]
    ctx.dtypes = [t.dtype for t in (weight_DK, bias_D, pos_LD, mask_token_D, prefix_RD)]


def _backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
    x_BZYX, weight_DK, mask_BL = ctx.saved_tensors
    R = ctx.num_prefix
    weight, bias, mask_token, rows_TD = patch_embed_backward(
        grad_BTD, x_BZYX, weight_DK, mask_BL, ctx.patch_zyx, ctx.hu
    )
    grads = (weight, bias, rows_TD[R:], mask_token, rows_TD[:R])
    weight, bias, pos, mask_token, prefix = map(Tensor.to, grads, ctx.dtypes)
    voxels = None
    if ctx.needs_input_grad[0]:
        voxels = _voxel_grad(grad_BTD[:, R:], x_BZYX, weight_DK, mask_BL, ctx.patch_zyx)
    return voxels, weight, bias, pos, mask_token, None, prefix, None, None


patch_embed.register_autograd(_backward, setup_context=_save_for_backward)

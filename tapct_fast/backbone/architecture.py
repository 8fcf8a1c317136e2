"""The architecture of a checkpoint, read off its tensors, and the strict check that they fit it.

Accepted names are DINOv2's, with or without ``model.`` in front, with blocks in chunks or not.
Where no ``config.json`` says so: heads are 64 wide, and the position grid is 28 x 28 in plane where
that divides the number of positions (the released models: 12 x 224 x 224 in patches of 4 x 8 x 8
give 3 x 28 x 28), else the only grid z, s, s with z < s; several such grids are an error, not a
guess.

Shape suffixes: D width.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tapct_fast.backbone.schema import ForeignConfig
from tapct_fast.config import VitConfig, Zyx
from tapct_fast.errors import BackboneError, ConfigError
from tapct_fast.model.vit import Vit

PREFIX = "model."
HEAD_DIM = 64  # DINOv2; B of TAP-CT has 12 heads on 768 channels
RELEASED_PLANE = 28  # tokens along y and x

_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.(.+)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")

Shape = tuple[int, ...]


def canonical_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under ``Vit``'s names.

    Raises:
        BackboneError: Names are mixed, doubled or those of a training checkpoint.
    """
    prefixed = [name.startswith(PREFIX) for name in tensors]
    if any(prefixed) and not all(prefixed):
        odd = next(name for name in tensors if not name.startswith(PREFIX))
        raise BackboneError(f"{odd}: has no prefix {PREFIX!r} while other keys have it")
    if any(name.startswith("backbone.") for name in tensors):
        raise BackboneError(
            "this is a training checkpoint; make a backbone of it: tapct-fast export"
        )
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # In chunks the inner number is already the block's own: each chunk is padded in front.
        short = _CHUNKED.sub(r"blocks.\1.\2", name.removeprefix(PREFIX))
        if short in named:
            raise BackboneError(f"{name}: a second tensor for {short}")
        named[short] = tensor
    return named


def read_architecture(named: Mapping[str, Tensor], foreign: ForeignConfig | None) -> VitConfig:
    """Return the architecture that the tensors have.

    Args:
        named: Tensors under ``Vit``'s names.
        foreign: Sizes stated by another library's config; they must agree.

    Raises:
        BackboneError: A tensor that decides the architecture is missing or has an impossible shape,
            or the position grid is ambiguous.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    patch = _shape(shapes, "patch_embed.proj.weight", "(D, 1, Z, Y, X)", 5)
    if patch[1] != 1 or min(patch) < 1:
        raise BackboneError(
            f"patch_embed.proj.weight: shape {patch} is not (D, 1, Z, Y, X), one input channel"
        )
    dim = _vote(
        (
            patch[0],
            _shape(shapes, "cls_token", "(1, 1, D)", 3)[2],
            _shape(shapes, "norm.weight", "(D,)", 1)[0],
            _shape(shapes, "pos_embed", "(1, 1 + positions, D)", 3)[2],
        )
    )
    blocks = {int(match[1]) for name in shapes if (match := _BLOCK.match(name))}
    if not blocks:
        raise BackboneError("blocks.0.norm1.weight: missing; there are no transformer blocks")
    if len(blocks) != max(blocks) + 1:
        gap = min(set(range(max(blocks))) - blocks)
        raise BackboneError(f"blocks.{gap}.norm1.weight: missing, expected shape ({dim},)")
    is_swiglu = any(name.endswith(".mlp.w12.weight") for name in shapes)
    ffn_key = "mlp.w3.weight" if is_swiglu else "mlp.fc2.weight"
    hidden = _vote(
        shape[-1] for name, shape in shapes.items() if name.endswith(ffn_key) and len(shape) == 2
    )
    registers = shapes.get("register_tokens")
    if registers is not None and (len(registers) != 3 or registers[1] < 1):
        raise BackboneError(f"register_tokens: shape {registers}, expected (1, registers, {dim})")
    patch_zyx = patch[2], patch[3], patch[4]
    image_zyx = _image_zyx(shapes["pos_embed"][1] - 1, patch_zyx, foreign)
    try:
        config = VitConfig(
            dim=dim,
            depth=len(blocks),
            head_dim=HEAD_DIM,
            patch_zyx=patch_zyx,
            image_zyx=image_zyx,
            num_registers=registers[1] if registers else 0,
            mlp_ratio=_mlp_ratio(dim, hidden, is_swiglu=is_swiglu),
            ffn="swiglu" if is_swiglu else "mlp",
            layer_scale=1.0 if any(name.endswith(".ls1.gamma") for name in shapes) else None,
            drop_path=0.0,
        )
    except ConfigError as error:
        raise BackboneError(f"the tensors have no known architecture: {error}") from None
    if foreign is not None:
        for name in ("dim", "depth", "num_heads", "num_registers"):
            stated = getattr(foreign, name)
            if stated is not None and stated != getattr(config, name):
                raise BackboneError(
                    f"config.json states {name} {stated}, the tensors have {getattr(config, name)}"
                )
    return config


def _shape(shapes: Mapping[str, Shape], name: str, form: str, num_axes: int) -> Shape:
    if name not in shapes:
        raise BackboneError(f"{name}: missing, expected shape {form}")
    if len(shapes[name]) != num_axes:
        raise BackboneError(f"{name}: shape {shapes[name]}, expected {form}")
    return shapes[name]


def _vote(sizes: Iterable[int]) -> int:
    """Return the size most tensors have, so that the one bad tensor is the one that gets named."""
    counted = Counter(sizes).most_common(1)
    return counted[0][0] if counted else 0


def _mlp_ratio(dim: int, hidden: int, *, is_swiglu: bool) -> float:
    """Return the ratio whose ``VitConfig.mlp_dim`` is ``hidden``; DINOv2's 4 where that fits."""
    probe = VitConfig(dim=dim, head_dim=dim, ffn="swiglu" if is_swiglu else "mlp")
    if probe.mlp_dim == hidden:
        return probe.mlp_ratio
    # Half a unit above the integer: the division must not round down to the one below.
    wide = (hidden - 7) * 3 / 2 if is_swiglu else hidden
    for width in range(math.floor(wide), math.ceil(wide) + 12):
        ratio = (width + 0.5) / dim
        if ratio > 0 and dataclasses.replace(probe, mlp_ratio=ratio).mlp_dim == hidden:
            return ratio
    return probe.mlp_ratio  # no ratio fits: the shape check names the key


def _image_zyx(num_positions: int, patch_zyx: Zyx, foreign: ForeignConfig | None) -> Zyx:
    if foreign is not None and isinstance(foreign.image_zyx, tuple):
        image_zyx = foreign.image_zyx
        if math.prod(s // p for s, p in zip(image_zyx, patch_zyx, strict=True)) != num_positions:
            raise BackboneError(
                f"config.json states an image of {image_zyx} voxels, which does not give the "
                f"{num_positions} patch positions of pos_embed"
            )
        return image_zyx
    plane = RELEASED_PLANE**2
    if num_positions > 0 and num_positions % plane == 0:
        grids = [(num_positions // plane, RELEASED_PLANE, RELEASED_PLANE)]
    else:
        sides = range(2, math.isqrt(max(num_positions, 0)) + 1)
        grids = [
            (num_positions // s**2, s, s)
            for s in sides
            if num_positions % s**2 == 0 and num_positions // s**2 < s
        ]
    if len(grids) != 1:
        raise BackboneError(
            f"pos_embed: {num_positions} patch positions fit {len(grids)} grids z, s, s; "
            "put the exported config.json beside the weights"
        )
    z, y, x = (g * p for g, p in zip(grids[0], patch_zyx, strict=True))
    return z, y, x


def check_state(config: VitConfig, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the complete float32 state of ``Vit(config)``.

    A mask token may be absent, it plays no part in inference and becomes zero.

    Raises:
        BackboneError: A key is missing, extra, of another shape, not float or not finite; names the
            key and both shapes.
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in Vit(config).state_dict().items()}
    state = {"mask_token": torch.zeros(expected["mask_token"]), **named}
    for name, shape in expected.items():
        if name not in state:
            raise BackboneError(f"{name}: missing, expected shape {shape}")
        if tuple(state[name].shape) != shape:
            raise BackboneError(f"{name}: shape {tuple(state[name].shape)}, expected {shape}")
    for name, tensor in state.items():
        if name not in expected:
            raise BackboneError(f"{name}: extra, shape {tuple(tensor.shape)}, expected no such key")
        if not tensor.is_floating_point():
            raise BackboneError(f"{name}: type {tensor.dtype}, expected a float type")
        state[name] = tensor.float()
        if not state[name].isfinite().all():
            raise BackboneError(f"{name}: holds NaN or infinite values")
    return state

"""Checkpoints under the released key names, built from the published table and not from our Vit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def _released(
    *,
    dim: int = 64,
    depth: int = 4,
    registers: int = 4,
    swiglu: bool = False,
    layer_scale: bool = True,
    mask_token: bool = True,
    prefix: str = "model.",
    num_chunks: int = 0,
    positions: int = 2 * 8 * 8,
    patch: tuple[int, int, int] = (4, 8, 8),
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 0.2, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale + mean

    state = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": draw(1, positions + 1, dim),
        "patch_embed.proj.weight": draw(dim, 1, *patch, scale=0.1),
        "patch_embed.proj.bias": draw(dim),
        "norm.weight": draw(dim, mean=1.0),
        "norm.bias": draw(dim),
    }
    if registers:
        state["register_tokens"] = draw(1, registers, dim)
    if mask_token:
        state["mask_token"] = draw(1, dim)
    hidden = (int(dim * 4 * 2 / 3) + 7) // 8 * 8 if swiglu else 4 * dim
    for i in range(depth):
        where = f"blocks.{i // (depth // num_chunks)}.{i}." if num_chunks else f"blocks.{i}."
        linears = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        if swiglu:
            linears |= {"mlp.w12": (2 * hidden, dim), "mlp.w3": (dim, hidden)}
        else:
            linears |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        for name, (rows, columns) in linears.items():
            state[f"{where}{name}.weight"] = draw(rows, columns)
            state[f"{where}{name}.bias"] = draw(rows)
        for name in ("norm1", "norm2"):
            state[f"{where}{name}.weight"] = draw(dim, mean=1.0)
            state[f"{where}{name}.bias"] = draw(dim)
        if layer_scale:
            state[f"{where}ls1.gamma"] = draw(dim)
            state[f"{where}ls2.gamma"] = draw(dim)
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture
def released() -> Callable[..., dict[str, Any]]:
    """Build a checkpoint with the released key names."""
    return _released

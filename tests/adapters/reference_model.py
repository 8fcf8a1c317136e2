"""What the released models are believed to be: DINOv2's eager ViT on volumes, explicit softmax.

Written from facebookresearch/dinov2 (Apache-2.0), ``models/vision_transformer.py`` and ``layers/``,
as plain torch, sharing nothing with the package.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, attn_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weight = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj_drop(self.proj((weight @ v).transpose(1, 2).reshape(B, N, C)))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLUFFN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, *, swiglu: bool, layer_scale: bool, attn_drop: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, attn_drop)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLUFFN(dim) if swiglu else Mlp(dim)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.sample_drop_ratio = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class BlockChunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        image: tuple[int, int, int] = (8, 32, 32),
        patch: tuple[int, int, int] = (4, 8, 8),
        registers: int = 4,
        num_chunks: int = 0,
        swiglu: bool = False,
        layer_scale: bool = True,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed_dim, self.n_blocks, self.chunked_blocks = dim, depth, num_chunks > 0
        self.grid = tuple(i // p for i, p in zip(image, patch, strict=True))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(1, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        z, y, x = self.grid
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + z * y * x, dim))
        blocks = [
            Block(dim, num_heads, swiglu=swiglu, layer_scale=layer_scale, attn_drop=attn_drop)
            for _ in range(depth)
        ]
        if num_chunks:
            size = depth // num_chunks
            starts = range(0, depth, size)
            blocks = [
                BlockChunk([nn.Identity()] * start + blocks[start : start + size])
                for start in starts
            ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        patches = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        patches = F.interpolate(patches, size=grid, mode="trilinear")
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        x = self.patch_embed.proj(x)
        grid = tuple(x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.positions(grid)
        registers = self.register_tokens.expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), grid


class TAPCTModel(nn.Module):
    """The wrapper, with the ViT at ``model`` and random weights that no branch can hide behind."""

    def __init__(
        self, dim: int = 64, depth: int = 2, num_heads: int = 1, **options: bool | float
    ) -> None:
        super().__init__()
        self.model = VisionTransformer(dim, depth, num_heads, **options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

    def forward(self, pixel_values: Tensor, reshape: bool = False) -> OrderedDict[str, Tensor]:
        tokens, grid = self.model(pixel_values)
        patches = tokens[:, 1 + self.model.register_tokens.shape[1] :]
        if reshape:
            patches = patches.transpose(1, 2).unflatten(2, grid)
        return OrderedDict(last_hidden_state=patches, pooler_output=tokens[:, 0])

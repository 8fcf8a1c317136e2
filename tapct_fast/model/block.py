"""A pre-norm transformer block with LayerScale and drop path as batch subsets.

The norm in front of a branch is computed where the branch before it ends, in the same pass over the
tokens; so a block takes its first norm with its tokens, and returns the next block's with them.
Shape suffixes: B batch, N K J kept rows of the batch (any branch, this one, the next one), T all
tokens of a volume, D width, S block.
Source: drop path on a subset, DINOv2, arXiv:2304.07193 section 5; LayerScale, arXiv:2103.17239.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.config import VitConfig
from tapct_fast.model.attention import Attention
from tapct_fast.model.linear import linear_gelu
from tapct_kernels import layer_norm, residual, residual_norm

NORM_EPS = 1e-6  # DINOv2


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch; None holds no parameter."""

    def __init__(self, dim: int, init: float | None) -> None:
        super().__init__()
        self.gamma = None if init is None else nn.Parameter(torch.full((dim,), init))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return the feed-forward branch."""
        out_NTD: Tensor = self.fc2(linear_gelu(x_NTD, self.fc1))
        return out_NTD


class SwiGlu(nn.Module):
    """Gated feed-forward: ``w3(silu(a) * b)`` with a and b the halves of ``w12(x)``."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return the feed-forward branch."""
        gate, value = self.w12(x_NTD).chunk(2, dim=-1)
        out_NTD: Tensor = self.w3(F.silu(gate) * value)
        return out_NTD


class Stream(NamedTuple):
    """Tokens in front of a branch, and the norm of the rows of the batch on which it runs."""

    x_BTD: Tensor
    normed_KTD: Tensor | None  # None behind the last branch


def start_stream(x_BTD: Tensor, norm: nn.LayerNorm, rows_K: Tensor | None) -> Stream:
    """Norm the tokens for the first branch."""
    dtype = _product_dtype(x_BTD)
    normed_KTD = layer_norm(
        x_BTD, norm.weight, norm.bias, index_J=rows_K, eps=norm.eps, dtype=dtype
    )
    return Stream(x_BTD, normed_KTD)


def add_branch(
    x_BTD: Tensor,
    branch_KTD: Tensor,
    layer_scale: LayerScale,
    rows_K: Tensor | None,
    next_norm: nn.LayerNorm | None,
    next_rows_J: Tensor | None,
) -> Stream:
    """Add a branch that ran on ``rows_K``, scaled up for the others, and norm for the next one."""
    gamma_D, scale = layer_scale.gamma, x_BTD.shape[0] / branch_KTD.shape[0]
    if next_norm is None:
        return Stream(residual(x_BTD, branch_KTD, gamma_D, index_K=rows_K, scale=scale), None)
    return Stream(
        *residual_norm(
            *(x_BTD, branch_KTD, gamma_D, next_norm.weight, next_norm.bias),
            index_K=rows_K,
            next_index_J=next_rows_J,
            scale=scale,
            eps=next_norm.eps,
            dtype=_product_dtype(x_BTD),
        )
    )


def _product_dtype(x_BTD: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer takes these tokens: autocast's, or their own."""
    device_type = x_BTD.device.type
    if torch.is_autocast_enabled(device_type) and x_BTD.dtype == torch.float32:
        return torch.get_autocast_dtype(device_type)
    return x_BTD.dtype


class Block(nn.Module):
    """Attention and feed-forward, each ``x + gamma * branch(norm(x))``."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        dim, scale = config.dim, config.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, config.head_dim)
        self.ls1 = LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        kind = Mlp if config.ffn == "mlp" else SwiGlu
        self.mlp = kind(dim, config.mlp_dim)
        self.ls2 = LayerScale(dim, scale)

    def forward(
        self,
        x_BTD: Tensor,
        normed_KTD: Tensor,
        rows: Sequence[Tensor | None] = (None, None, None),
        next_norm: nn.LayerNorm | None = None,
    ) -> Stream:
        """Return the tokens after this block, normed for the next block.

        Args:
            x_BTD: Tokens.
            normed_KTD: ``norm1`` of the rows on which attention runs.
            rows: Distinct rows of the batch on which attention runs, the feed-forward, and the next
                block's attention; None is all. A branch never sees the others and costs less.
            next_norm: The next block's ``norm1``, or None behind the last block.
        """
        attn_K, mlp_J, next_rows = rows
        branch_KTD = self.attn(normed_KTD)
        x_BTD, normed_JTD = add_branch(x_BTD, branch_KTD, self.ls1, attn_K, self.norm2, mlp_J)
        branch_JTD = self.mlp(normed_JTD)
        return add_branch(x_BTD, branch_JTD, self.ls2, mlp_J, next_norm, next_rows)


def draw_kept_rows(seed: int, *, depth: int, batch: int, drop_path: float) -> Tensor:
    """Draw the rows that each branch of each block keeps, as a pure function of the arguments.

    Returns:
        keep_S2N int64 on the host, N = max(int(batch * (1 - drop_path)), 1) rows in rising order.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = max(int(batch * (1 - drop_path)), 1)
    order = torch.rand(depth, 2, batch, generator=generator).argsort(dim=-1)
    return order[..., :keep].sort(dim=-1).values

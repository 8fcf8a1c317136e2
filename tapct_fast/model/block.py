"""A pre-norm transformer block with LayerScale and drop path as batch subsets.

Shape suffixes: B batch, N kept rows of the batch, T all tokens of a volume, D width, S block.
Source: drop path on a subset, DINOv2, arXiv:2304.07193 section 5; LayerScale, arXiv:2103.17239.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.config import VitConfig
from tapct_fast.model.attention import Attention

NORM_EPS = 1e-6  # DINOv2


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return ``x * gamma``."""
        return x_NTD * self.gamma


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return the feed-forward branch."""
        out_NTD: Tensor = self.fc2(F.gelu(self.fc1(x_NTD)))
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


class Block(nn.Module):
    """Attention and feed-forward, each ``x + gamma * branch(norm(x))``."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        dim, scale = config.dim, config.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, config.head_dim)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        kind = Mlp if config.ffn == "mlp" else SwiGlu
        self.mlp = kind(dim, config.mlp_dim)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)

    def forward(self, x_BTD: Tensor, *, keep_2N: Tensor | None = None) -> Tensor:
        """Return the tokens after this block.

        Args:
            x_BTD: Tokens.
            keep_2N: Distinct rows of the batch whose attention (0) and feed-forward (1) branch
                runs; None runs all.
        """
        if keep_2N is None:
            x_BTD = x_BTD + self.ls1(self.attn(self.norm1(x_BTD)))
            out_BTD: Tensor = x_BTD + self.ls2(self.mlp(self.norm2(x_BTD)))
            return out_BTD
        # The branch never sees the dropped rows, so p of its cost is saved; the rest is scaled up.
        scale = x_BTD.shape[0] / keep_2N.shape[1]
        attn_N, mlp_N = keep_2N.unbind(0)
        branch_NTD = self.ls1(self.attn(self.norm1(x_BTD[attn_N])))
        x_BTD = x_BTD.index_add(0, attn_N, branch_NTD.to(x_BTD.dtype), alpha=scale)
        branch_NTD = self.ls2(self.mlp(self.norm2(x_BTD[mlp_N])))
        return x_BTD.index_add(0, mlp_N, branch_NTD.to(x_BTD.dtype), alpha=scale)


def draw_kept_rows(seed: int, *, depth: int, batch: int, drop_path: float) -> Tensor:
    """Draw the rows that each branch of each block keeps, as a pure function of the arguments.

    Returns:
        keep_S2N int64 on the host, N = max(int(batch * (1 - drop_path)), 1) rows in rising order.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = max(int(batch * (1 - drop_path)), 1)
    order = torch.rand(depth, 2, batch, generator=generator).argsort(dim=-1)
    return order[..., :keep].sort(dim=-1).values

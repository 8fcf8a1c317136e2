"""Multi-head self-attention on a fused qkv, by the fused kernel chosen for the device.

Shape suffixes: N rows (volumes), T all tokens of a volume, D width, H heads, K head width, Q rows
that are read.
"""

from collections.abc import Callable

from torch import Tensor, nn

from tapct_fast.model import cpu_attention  # noqa: F401 - offers its kernels
from tapct_fast.model.linear import linear
from tapct_kernels import attention


class Attention(nn.Module):
    """Dense softmax attention without a mask; memory grows with T, not with its square."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_NTD: Tensor, pick: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the attention branch, before LayerScale and the residual.

        Args:
            x_NTD: Normed tokens.
            pick: Returns the rows_QD, of tokens_NTD, for which the branch is wanted; None is all.
        """
        qkv_NT3HK = linear(x_NTD, self.qkv).view(*x_NTD.shape[:2], 3, -1, self.head_dim)
        out_NTD = attention(qkv_NT3HK).flatten(2)
        branch: Tensor = linear(out_NTD if pick is None else pick(out_NTD), self.proj)
        return branch

"""Multi-head self-attention on a fused qkv, by PyTorch's fused kernels on every device.

Shape suffixes: N rows (volumes), T all tokens of a volume, D width, H heads, K head width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Dense softmax attention without a mask; memory grows with T, not with its square."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return the attention branch, before LayerScale and the residual."""
        qkv_3NHTK = self.qkv(x_NTD).unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q_NHTK, k_NHTK, v_NHTK = qkv_3NHTK.unbind(0)
        out_NHTK = F.scaled_dot_product_attention(q_NHTK, k_NHTK, v_NHTK)
        out_NTD: Tensor = self.proj(out_NHTK.transpose(1, 2).flatten(2))
        return out_NTD

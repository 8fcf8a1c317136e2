"""A pre-norm transformer block with LayerScale and drop path as batch subsets.

The norm in front of a branch is computed where the branch before it ends, in the same pass over the
tokens; so a block takes its first norm with its tokens, and returns the next block's with them.
Shape suffixes: B batch, N K J kept rows of the batch (any branch, this one, the next one), T all
tokens of a volume, D width, S block, Q rows that are read after the last block, G group.
Source: drop path on a subset, DINOv2, arXiv:2304.07193 section 5; LayerScale, arXiv:2103.17239.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tapct_fast.config import VitConfig
from tapct_fast.model.attention import Attention
from tapct_fast.model.linear import linear, linear_gelu
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
        out_NTD: Tensor = linear(linear_gelu(x_NTD, self.fc1), self.fc2)
        return out_NTD


class SwiGlu(nn.Module):
    """Gated feed-forward: ``w3(silu(a) * b)`` with a and b the halves of ``w12(x)``."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return the feed-forward branch."""
        gate, value = linear(x_NTD, self.w12).chunk(2, dim=-1)
        out_NTD: Tensor = linear(F.silu(gate) * value, self.w3)
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
    next_norm: nn.LayerNorm | None,
    *,
    rows_K: Tensor | None = None,
    next_rows_J: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Stream:
    """Add a branch that ran on ``rows_K``, scaled up for the others, and norm for the next one.

    The norm is in ``dtype``, by default the one in which products take it.
    """
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
            dtype=dtype or _product_dtype(x_BTD),
        )
    )


def _product_dtype(x_BTD: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer takes these tokens: autocast's, or their own."""
    device_type = x_BTD.device.type
    if torch.is_autocast_enabled(device_type) and x_BTD.dtype == torch.float32:
        return torch.get_autocast_dtype(device_type)
    return x_BTD.dtype


class Block(nn.Module):
    """Attention and feed-forward, each ``x + gamma * branch(norm(x))``.

    ``checkpointing`` says what the backward computes again: nothing; all but matrix products and
    attention; or the whole block.
    """

    checkpointing: Literal["none", "selective", "full"] = "none"

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
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._forward(x_BTD, normed_KTD, rows, next_norm)
        context: dict[str, Any] = {}
        if self.checkpointing == "selective":
            context["context_fn"] = _keep_products
        stream: Stream = checkpoint(
            *(self._forward, x_BTD, normed_KTD, rows, next_norm), use_reentrant=False, **context
        )
        return stream

    def _forward(
        self,
        x_BTD: Tensor,
        normed_KTD: Tensor,
        rows: Sequence[Tensor | None],
        next_norm: nn.LayerNorm | None,
    ) -> Stream:
        attn_K, mlp_J, next_rows = rows
        branch_KTD = self.attn(normed_KTD)
        x_BTD, normed_JTD = add_branch(
            x_BTD, branch_KTD, self.ls1, self.norm2, rows_K=attn_K, next_rows_J=mlp_J
        )
        branch_JTD = self.mlp(normed_JTD)
        return add_branch(
            x_BTD, branch_JTD, self.ls2, next_norm, rows_K=mlp_J, next_rows_J=next_rows
        )

    def read_rows(
        self,
        x_BTD: Tensor,
        normed_BTD: Tensor,
        pick: Callable[[Tensor], Tensor],
        factors_Q1: Sequence[Tensor] | None,
        final_norm: nn.LayerNorm,
    ) -> Tensor:
        """Return the finally normed rows_QD of the tokens after this block, the last one.

        Args:
            x_BTD: Tokens.
            normed_BTD: ``norm1`` of all of them: each may be attended to.
            pick: Returns the rows that are read, of tokens_BTD.
            factors_Q1: Of drop path, for the rows of either branch: 0 or B / kept; None is 1.
            final_norm: Of the backbone.
        """
        rows_QD = pick(x_BTD)
        attn_Q1, mlp_Q1 = factors_Q1 or (None, None)
        branch_QD = _scaled(self.attn(normed_BTD, pick), attn_Q1)
        rows_1QD, normed_1QD = add_branch(rows_QD[None], branch_QD[None], self.ls1, self.norm2)
        branch_1QD = _scaled(self.mlp(normed_1QD), mlp_Q1)
        # Not rounded to what products take: KoLeo measures these rows.
        _, normed_1QD = add_branch(rows_1QD, branch_1QD, self.ls2, final_norm, dtype=rows_QD.dtype)
        assert normed_1QD is not None
        return normed_1QD[0]


def _keep_products() -> tuple[Any, Any]:
    """Return the contexts of a checkpoint that stores what products and attention gave."""
    aten = torch.ops.aten
    kept = [
        *(aten.mm.default, aten.addmm.default, aten._scaled_mm.default),
        torch.ops.tapct.addmm_amx.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        *(torch.ops.tapct.flash_attn.default, torch.ops.tapct.attention_cpu.default),
    ]
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(kept)  # type: ignore[no-untyped-call]
    return contexts


def _scaled(branch_QD: Tensor, factors_Q1: Tensor | None) -> Tensor:
    return branch_QD if factors_Q1 is None else branch_QD * factors_Q1.to(branch_QD.dtype)


def draw_kept_rows(
    seeds: Sequence[int], *, depth: int, num_views: int, group_size: int, drop_path: float
) -> Tensor:
    """Draw the rows of a batch that each branch of each block keeps, group by group.

    Args:
        seeds: One per group; what a group keeps is a pure function of its own.
        depth: Blocks.
        num_views: Views of a sample in the batch.
        group_size: Samples of a group. The batch is view-major, its samples those of the groups in
            order.
        drop_path: Share of a group's rows that are left out.

    Returns:
        kept_S2N int64 on the host, of every group max(int(rows * (1 - drop_path)), 1) rows.
    """
    rows, num_samples = num_views * group_size, len(seeds) * group_size
    keep = max(int(rows * (1 - drop_path)), 1)
    kept = []
    for group, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        order_S2N = torch.rand(depth, 2, rows, generator=generator).argsort(dim=-1)[..., :keep]
        view_S2N, sample_S2N = order_S2N // group_size, order_S2N % group_size
        kept.append(view_S2N * num_samples + group * group_size + sample_S2N)
    return torch.cat(kept, dim=-1).sort(dim=-1).values

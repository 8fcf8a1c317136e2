"""The teacher's targets: Sinkhorn-Knopp or softmax with a moving center.

Both see the rows of one micro-batch only: with gradient accumulation each micro-batch is balanced
by itself, and the softmax center moves once per micro-batch.
Shape suffixes: N rows, P prototypes.
"""

import torch
from torch import Tensor, nn


def sinkhorn_knopp(logits_NP: Tensor, temp: float, n_iter: int = 3) -> Tensor:
    """Return targets of unit sum per row, balanced over the prototypes.

    ``Q = exp(logits / temp)``, then ``n_iter`` times: every prototype to total weight 1 / P, every
    row to 1 / N; at last times N. DINOv2's division by the total cancels in the first round.

    Args:
        logits_NP: Teacher logits, at least one row.
        temp: Teacher temperature.
        n_iter: Rounds.

    Returns:
        targets_NP float32 (float64 for float64 logits).

    Source: SwAV, arXiv:2006.09882 listing 1; DINOv2, arXiv:2304.07193 section 4.
    """
    num_rows, num_prototypes = logits_NP.shape
    with torch.autocast(logits_NP.device.type, enabled=False):
        scaled_NP = logits_NP.to(torch.promote_types(logits_NP.dtype, torch.float32)) / temp
        # The maximum cancels as the total does; without it exp overflows for gains above 3.5.
        q_NP = scaled_NP.sub_(scaled_NP.max()).exp_()
        # Only the two scalings change, so every round reads Q twice and writes nothing of its size.
        row_N = q_NP.new_ones(num_rows)
        for _ in range(n_iter):
            prototype_P = (num_prototypes * (row_N @ q_NP)).reciprocal()
            row_N = (num_rows * (q_NP @ prototype_P)).reciprocal()
        return q_NP.mul_(prototype_P).mul_(num_rows * row_N[:, None])


class SoftmaxCenter(nn.Module):
    """Softmax of centered logits; the center is a moving average of the teacher's mean logits.

    Source: DINO, arXiv:2104.14294 equation 4.
    """

    center_P: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center_P", torch.zeros(num_prototypes))

    @torch.no_grad()
    def forward(self, logits_NP: Tensor, temp: float) -> Tensor:
        """Return float32 targets_NP under the center of the rows before these, then move it."""
        logits_NP = logits_NP.float()
        targets_NP = torch.softmax((logits_NP - self.center_P) / temp, dim=-1)
        self.center_P.lerp_(logits_NP.mean(dim=0), 1 - self.momentum)
        return targets_NP

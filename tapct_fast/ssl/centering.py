"""The moving center of softmax targets; Sinkhorn-Knopp keeps no state and is an op by itself.

It sees the rows of one micro-batch only: with gradient accumulation it moves once per micro-batch.
Shape suffixes: N rows, P prototypes.
"""

import torch
from torch import Tensor, nn

from tapct_kernels import SoftTargets, softmax_targets


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
    def forward(self, logits_NP: Tensor, temp: float | Tensor) -> SoftTargets:
        """Return targets under the center of the rows before these, then move it."""
        targets = softmax_targets(logits_NP, self.center_P, temp)
        mean_P = logits_NP.mean(dim=0, dtype=self.center_P.dtype)
        self.center_P.lerp_(mean_P, 1 - self.momentum)
        return targets

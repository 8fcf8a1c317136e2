"""The moving center of softmax targets; Sinkhorn-Knopp keeps no state and is an op by itself.

Shape suffixes: N rows, P prototypes.
"""

import torch
from torch import Tensor, nn

from tapct_kernels import Logits, SoftTargets, softmax_targets


class SoftmaxCenter(nn.Module):
    """Softmax of centered logits; the center is a moving average of the teacher's mean logits.

    Source: DINO, arXiv:2104.14294 equation 4.
    """

    center_P: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center_P", torch.zeros(num_prototypes))

    def forward(self, logits: Tensor | Logits, temp: float | Tensor) -> SoftTargets:
        """Return targets under the center of the steps before."""
        return softmax_targets(logits, self.center_P, temp)

    @torch.no_grad()
    def move(self, mean_P: Tensor, is_sound: Tensor) -> None:
        """Move towards the mean logits of a step, in place, where ``is_sound`` says so."""
        moved_P = self.center_P.lerp(mean_P.to(self.center_P.dtype), 1 - self.momentum)
        self.center_P.copy_(torch.where(is_sound, moved_P, self.center_P))

"""The KoLeo regulariser: push each feature away from its nearest neighbour in the batch.

Shape suffixes: B batch, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8  # DINOv2


def koleo_loss(cls_BD: Tensor) -> Tensor:
    """Return the mean of ``-log(distance to the nearest neighbour)`` of unit-length features.

    Finite for equal rows, whose distance counts as 1e-8 sqrt(D), and 0 for a single row, which has
    no neighbour.

    Args:
        cls_BD: cls tokens of one global view of the student, after the final norm, before the head.

    Returns:
        A float32 scalar (float64 for float64 tokens).

    Source: Sablayrolles et al., arXiv:1806.03198 equation 2; DINOv2's koleo_loss.py for the eps.
    """
    with torch.autocast(cls_BD.device.type, enabled=False):
        cls_BD = cls_BD.to(torch.promote_types(cls_BD.dtype, torch.float32))
        if cls_BD.shape[0] < 2:
            return cls_BD.sum() * 0.0
        unit_BD = F.normalize(cls_BD, dim=-1, eps=EPS)
        with torch.no_grad():
            similarity_BB = (unit_BD @ unit_BD.T).fill_diagonal_(-2.0)
            nearest_B = similarity_BB.argmax(dim=1)
        distance_B = F.pairwise_distance(unit_BD, unit_BD[nearest_B], eps=EPS)
        return -torch.log(distance_B + EPS).mean()

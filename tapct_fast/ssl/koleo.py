"""The KoLeo regulariser: push each feature away from its nearest neighbour in the batch.

Shape suffixes: G groups, B samples of a group, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8  # DINOv2


def koleo_loss(cls_GBD: Tensor) -> Tensor:
    """Return the mean of ``-log(distance to the nearest neighbour)`` of unit-length features.

    A neighbour is of the same group. Finite for equal rows, whose distance counts as 1e-8 sqrt(D),
    and 0 for groups of a single row, which has no neighbour.

    Args:
        cls_GBD: cls tokens of one global view of the student, after the final norm, before the
            head.

    Returns:
        A float32 scalar (float64 for float64 tokens).

    Source: Sablayrolles et al., arXiv:1806.03198 equation 2; DINOv2's koleo_loss.py for the eps.
    """
    with torch.autocast(cls_GBD.device.type, enabled=False):
        cls_GBD = cls_GBD.to(torch.promote_types(cls_GBD.dtype, torch.float32))
        if cls_GBD.shape[1] < 2:
            return cls_GBD.sum() * 0.0
        unit_GBD = F.normalize(cls_GBD, dim=-1, eps=EPS)
        with torch.no_grad():
            similarity_GBB = unit_GBD @ unit_GBD.mT
            similarity_GBB.diagonal(dim1=1, dim2=2).fill_(-2.0)
            nearest_GB = similarity_GBB.argmax(dim=2)
        neighbour_GBD = unit_GBD.gather(1, nearest_GB[..., None].expand_as(unit_GBD))
        distance_GB = F.pairwise_distance(unit_GBD, neighbour_GBD, eps=EPS)
        return -torch.log(distance_GB + EPS).mean()

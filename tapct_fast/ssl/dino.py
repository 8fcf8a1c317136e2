"""The DINO loss: every student view predicts the teacher's targets of the other global views.

Shape suffixes: V student views, the two global ones first, B batch, K bottleneck width,
P prototypes, J the teacher's views, S = V * B student rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tapct_kernels import SoftTargets, prototype_cross_entropy


class DinoLoss(NamedTuple):
    """The two parts of the loss; they sum to ln P for a student whose logits are all equal."""

    global_views: Tensor
    local_views: Tensor


def dino_loss(
    targets: SoftTargets, features_VBK: Tensor, prototypes_PK: Tensor, *, student_temp: float
) -> DinoLoss:
    """Return the mean cross-entropy over all pairs of a student view and another teacher view.

    With 2 global and 8 local views there are 2 + 16 pairs; the parts are the sums of the batch
    means over the 2 and over the 16, each divided by 18.

    Args:
        targets: Teacher targets of the two global views, 2 * B rows, view-major.
        features_VBK: Student features. A global view meets the other one's targets, a local view,
            of which there may be none, those of both.
        prototypes_PK: The student's prototypes.
        student_temp: Student temperature.

    Source: DINO, arXiv:2104.14294 equation 3, with the scaling of DINOv2's ssl_meta_arch.py.
    """
    V, B = features_VBK.shape[:2]
    assert V >= 2
    assert targets.row_N.shape[0] == 2 * B
    device, dtype = features_VBK.device, targets.row_N.dtype
    view_V1 = torch.arange(V, device=device)[:, None]
    other_J = torch.arange(2, device=device)
    # A pair with the own view comes second and has weight 0: (1, 0), (0, 1), then (0, 1) for all.
    other_VJ = torch.where(view_V1 == 0, 1 - other_J, other_J)
    weight_VJ = (other_VJ != view_V1).to(dtype) / (B * (2 * V - 2))
    row_VBJ = other_VJ[:, None] * B + torch.arange(B, device=device)[:, None]
    loss_S = prototype_cross_entropy(
        features_VBK.flatten(0, 1),
        prototypes_PK,
        targets,
        temp=student_temp,
        target_row_SJ=row_VBJ.flatten(0, 1),
        weight_SJ=weight_VJ.repeat_interleave(B, dim=0),
    )
    return DinoLoss(loss_S[: 2 * B].sum(), loss_S[2 * B :].sum())

"""The iBOT loss: masked patch tokens of the student predict the teacher's targets at their place.

Shape suffixes: M masked tokens, K bottleneck width, P prototypes.
"""

import torch
from torch import Tensor

from tapct_kernels import SoftTargets, prototype_cross_entropy


def ibot_loss(
    targets: SoftTargets,
    features_MK: Tensor,
    prototypes_PK: Tensor,
    weight_M: Tensor,
    *,
    num_views: int,
    student_temp: float,
) -> Tensor:
    """Return the mean over the global views of the mean cross-entropy of their masked tokens.

    Args:
        targets: Teacher targets of the masked tokens.
        features_MK: Student features of the same tokens.
        prototypes_PK: The student's prototypes.
        weight_M: 1 / number of masked tokens in the token's own view.
        num_views: All global views of the batch. Unmasked ones count, so with half of the views
            masked a student whose logits are all equal gives 0.5 ln P.
        student_temp: Student temperature.

    Source: iBOT, arXiv:2111.07832 equation 2, with the scaling of DINOv2's ibot_patch_loss.py.
    """
    loss_M = prototype_cross_entropy(
        features_MK,
        prototypes_PK,
        targets,
        temp=student_temp,
        target_row_SJ=torch.arange(features_MK.shape[0], device=features_MK.device)[:, None],
        weight_SJ=(weight_M / num_views)[:, None],
    )
    return loss_M.sum()

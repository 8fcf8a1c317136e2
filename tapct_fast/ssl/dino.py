"""The DINO loss: every student view predicts the teacher's targets of the other global views.

Shape suffixes: V views, B batch, P prototypes.
"""

from typing import NamedTuple

from torch import Tensor

from tapct_fast.ssl.cross_entropy import cross_entropy


class DinoLoss(NamedTuple):
    """The two parts of the loss; they sum to ln P for a student whose logits are all equal."""

    global_views: Tensor
    local_views: Tensor


def dino_loss(
    targets_VBP: Tensor, global_VBP: Tensor, local_VBP: Tensor, *, student_temp: float
) -> DinoLoss:
    """Return the mean cross-entropy over all pairs of a student view and another teacher view.

    With 2 global and 8 local views there are 2 + 16 pairs; the parts are the sums of the batch
    means over the 2 and over the 16, each divided by 18.

    Args:
        targets_VBP: Teacher targets of the two global views.
        global_VBP: Student logits of the two global views; each meets the other view's targets.
        local_VBP: Student logits of the local views, possibly none; each meets both targets.
        student_temp: Student temperature.

    Source: DINO, arXiv:2104.14294 equation 3, with the scaling of DINOv2's ssl_meta_arch.py.
    """
    num_global, batch = global_VBP.shape[:2]
    assert num_global == targets_VBP.shape[0] == 2
    num_local = local_VBP.shape[0]
    num_pairs = 2 + 2 * num_local
    swapped_VBP = targets_VBP.flip(0)
    global_rows = cross_entropy(swapped_VBP.flatten(0, 1), global_VBP.flatten(0, 1), student_temp)
    # Both teachers at once: the cross-entropy is linear in the targets.
    both_VBP = targets_VBP.sum(dim=0).expand(num_local, -1, -1)
    local_rows = cross_entropy(both_VBP.flatten(0, 1), local_VBP.flatten(0, 1), student_temp)
    scale = 1 / (batch * num_pairs)
    return DinoLoss(global_rows.sum() * scale, local_rows.sum() * scale)

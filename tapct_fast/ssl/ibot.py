"""The iBOT loss: masked patch tokens of the student predict the teacher's targets at their place.

Shape suffixes: M masked tokens, P prototypes.
"""

from torch import Tensor

from tapct_fast.ssl.cross_entropy import cross_entropy


def ibot_loss(
    targets_MP: Tensor, logits_MP: Tensor, weight_M: Tensor, *, num_views: int, student_temp: float
) -> Tensor:
    """Return the mean over the global views of the mean cross-entropy of their masked tokens.

    Args:
        targets_MP: Teacher targets of the masked tokens.
        logits_MP: Student logits of the same tokens.
        weight_M: 1 / number of masked tokens in the token's own view.
        num_views: All global views of the batch. Unmasked ones count, so with half of the views
            masked a student whose logits are all equal gives 0.5 ln P.
        student_temp: Student temperature.

    Source: iBOT, arXiv:2111.07832 equation 2, with the scaling of DINOv2's ibot_patch_loss.py.
    """
    return (cross_entropy(targets_MP, logits_MP, student_temp) * weight_M).sum() / num_views

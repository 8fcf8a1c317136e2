"""Cross-entropy of prototype logits against soft targets.

Shape suffixes: N rows, P prototypes.
"""

import torch
from torch import Tensor


def cross_entropy(targets_NP: Tensor, logits_NP: Tensor, temp: float) -> Tensor:
    """Return ``-sum_p target * log_softmax(logits / temp)`` of each row, float32.

    As ``sum(target) * logsumexp - target . logits / temp``: the log-probabilities, as large as the
    logits, are never stored. A row's targets may sum to any number, such as 2 for two teachers.
    """
    with torch.autocast(logits_NP.device.type, enabled=False):
        dtype = torch.promote_types(logits_NP.dtype, torch.float32)
        targets_NP, scaled_NP = targets_NP.to(dtype), logits_NP.to(dtype) / temp
        weight_N = targets_NP.sum(dim=-1)
        dot_N: Tensor = torch.linalg.vecdot(targets_NP, scaled_NP)
        return weight_N * torch.logsumexp(scaled_NP, dim=-1) - dot_N

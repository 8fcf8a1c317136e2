"""Soft assignments of rows to prototypes, kept as logits and two vectors.

    target[n, p] = exp(logits[n, p] / temp + prototype[p] + row[n])

Sinkhorn-Knopp only ever scales rows and columns of exp(logits / temp), and a softmax is one scaling
of its rows, so the dense targets, as large as the logits, need not exist.
Shape suffixes: N rows, P prototypes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SoftTargets(NamedTuple):
    """Targets whose rows sum to 1.

    Attributes:
        logits_NP: Teacher logits, float16, bfloat16 or float32 (float64 for verification).
        prototype_P: Logarithm of each prototype's factor, in the sum dtype (float32).
        row_N: Logarithm of each row's factor, in the sum dtype.
        temp: Teacher temperature, a tensor without dimensions in the sum dtype, so that a schedule
            neither recompiles a graph nor synchronises with the host.
    """

    logits_NP: Tensor
    prototype_P: Tensor
    row_N: Tensor
    temp: Tensor

    def dense(self) -> Tensor:
        """Return targets_NP in the sum dtype."""
        scaled_NP = self.logits_NP.to(self.row_N.dtype) / self.temp
        return torch.exp(scaled_NP + self.prototype_P + self.row_N[:, None])

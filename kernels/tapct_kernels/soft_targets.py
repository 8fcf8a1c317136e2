"""Soft assignments of rows to prototypes, kept as logits and two vectors.

    target[n, p] = exp(logits[n, p] / temp + prototype[p] + row[n])

Sinkhorn-Knopp only ever scales rows and columns of exp(logits / temp), and a softmax is one scaling
of its rows, so the dense targets, as large as the logits, need not exist. Nor need the logits: they
are products of features, and are either stored or computed anew wherever they are read.
Shape suffixes: N rows, P prototypes, K bottleneck width, X either of the two, M some rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PRODUCTS = {"cuda": 2**27, "cpu": 2**24, "meta": 2**27}  # logits that exist at a time: 256, 64 MiB


class Logits(NamedTuple):
    """Teacher logits of some rows, stored or as a product.

    Attributes:
        rows_NX: The logits; with weights the features whose products with these they are. float16,
            bfloat16 or float32 (float64 for verification).
        weights_PK: Prototypes in the features' dtype; None for stored logits.
    """

    rows_NX: Tensor
    weights_PK: Tensor | None = None

    @property
    def num_prototypes(self) -> int:
        """P."""
        return self.rows_NX.shape[1] if self.weights_PK is None else self.weights_PK.shape[0]

    def parts(self) -> list[slice]:
        """Return the rows whose logits are taken at a time: all where they are stored."""
        num_rows = self.rows_NX.shape[0]
        size = max(1, PRODUCTS[self.rows_NX.device.type] // max(1, self.num_prototypes))
        if self.weights_PK is None or size >= num_rows:
            return [slice(0, num_rows)]
        return [slice(first, first + size) for first in range(0, num_rows, size)]

    def of(self, rows: slice | Tensor | None = None, prototypes: slice | None = None) -> Tensor:
        """Return logits_MP of some rows, by number or in sequence, and some prototypes."""
        rows_NX, weights_PK = self
        if prototypes is not None and weights_PK is None:
            rows_NX = rows_NX[:, prototypes]
        if prototypes is not None and weights_PK is not None:
            weights_PK = weights_PK[prototypes]
        if rows is not None:
            rows_NX = rows_NX[rows] if isinstance(rows, slice) else rows_NX.index_select(0, rows)
        if weights_PK is None:
            return rows_NX
        with torch.autocast(rows_NX.device.type, enabled=False):
            return F.linear(rows_NX, weights_PK)

    def stored(self, dtype: torch.dtype) -> Tensor:
        """Return logits_NP in a dtype; one other than the features' costs no copy in theirs."""
        if dtype == self.rows_NX.dtype:
            return self.of()
        shape = self.rows_NX.shape[0], self.num_prototypes
        logits_NP = self.rows_NX.new_empty(shape, dtype=dtype)
        for part in self.parts():
            logits_NP[part] = self.of(part)
        return logits_NP


class SoftTargets(NamedTuple):
    """Targets whose rows sum to 1.

    Attributes:
        rows_NX: See ``Logits``.
        weights_PK: See ``Logits``.
        prototype_P: Logarithm of each prototype's factor, in the sum dtype (float32).
        row_N: Logarithm of each row's factor, in the sum dtype.
        temp: Teacher temperature, a tensor without dimensions in the sum dtype, so that a schedule
            neither recompiles a graph nor synchronises with the host.
    """

    rows_NX: Tensor
    weights_PK: Tensor | None
    prototype_P: Tensor
    row_N: Tensor
    temp: Tensor

    @property
    def logits(self) -> Logits:
        """The teacher's logits."""
        return Logits(self.rows_NX, self.weights_PK)

    def dense(self) -> Tensor:
        """Return targets_NP in the sum dtype."""
        scaled_NP = self.logits.of().to(self.row_N.dtype) / self.temp
        return torch.exp(scaled_NP + self.prototype_P + self.row_N[:, None])

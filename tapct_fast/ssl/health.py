"""Whether features and targets are healthy, measured on what a step has computed anyway.

Nothing here waits for the device or draws a random number, and no cost grows with the batch: rows
are thinned to ``MAX_ROWS``, spread evenly. Judging the numbers is for ``monitor.verdict``.
Shape suffixes: N rows (two global views, view-major), B samples, L patch tokens, D width,
R thinned rows, P prototypes, G the shorter side of a table of features.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tapct_kernels import SoftTargets

MAX_ROWS = 256  # 64 MB of float32 targets at 65,536 prototypes, three such tables at a time
_DEGREE = 48  # matrix products; effective ranks from 1 to 256 then err by less than 0.2 %

MEANINGS = {
    "teacher_entropy_dino": "mean entropy of one target of the DINO head, in nats",
    "teacher_entropy_dino_share": "the same, as a share of ln P",
    "teacher_entropy_ibot": "mean entropy of one target of the iBOT head, in nats",
    "teacher_entropy_ibot_share": "the same, as a share of ln P",
    "prototype_usage_dino": "prototypes the cls tokens are assigned to: 0 one, 1 as many as can be",
    "prototype_usage_ibot": "the same of the masked patch tokens",
    "effective_rank": "directions the teacher's cls tokens use; 1 if all are equal",
    "koleo_distance": "mean distance of a student's cls token to its nearest neighbour, 0 to 2",
    "patch_similarity": "mean cosine of two patch tokens of one view; 1 if all are equal",
    "cls_agreement": "mean cosine of the student's and the teacher's cls token of one view",
}


class Evidence(NamedTuple):
    """What one step of this rank leaves to be measured, detached.

    Attributes:
        teacher_cls_ND: Normed cls tokens of the two global views, view-major.
        student_cls_ND: The same of the student.
        patches_NLD: The teacher's normed patch tokens of a few global views.
        dino: The teacher's targets of the global views.
        ibot: Those of the masked tokens; None without any.
    """

    teacher_cls_ND: Tensor
    student_cls_ND: Tensor
    patches_NLD: Tensor
    dino: SoftTargets
    ibot: SoftTargets | None


@torch.no_grad()
def measure(evidence: Evidence) -> dict[str, Tensor]:
    """Return the numbers of ``MEANINGS``, float32 scalars on the device.

    What does not exist is left out: iBOT without masks, the neighbour of a single sample, two
    patches of a view that has one.
    """
    student_cls_ND, patches_NLD = evidence.student_cls_ND, evidence.patches_NLD
    # Autocast would round what is told apart here.
    with torch.autocast(student_cls_ND.device.type, enabled=False):
        found = _of_targets("dino", evidence.dino)
        if evidence.ibot is not None:
            found |= _of_targets("ibot", evidence.ibot)
        found["effective_rank"] = effective_rank(evidence.teacher_cls_ND)
        if student_cls_ND.shape[0] > 2:
            found["koleo_distance"] = koleo_distance(student_cls_ND)
        if patches_NLD.shape[1] > 1:
            found["patch_similarity"] = patch_similarity(patches_NLD)
        agreement_N = F.cosine_similarity(
            student_cls_ND.float(), evidence.teacher_cls_ND.float(), dim=1
        )
        found["cls_agreement"] = agreement_N.mean()
    return {name: value.float() for name, value in found.items()}


def _of_targets(head: str, targets: SoftTargets) -> dict[str, Tensor]:
    thinned = targets._replace(rows_NX=thin(targets.rows_NX), row_N=thin(targets.row_N)).dense()
    entropy = target_entropy(thinned)
    return {
        f"teacher_entropy_{head}": entropy,
        f"teacher_entropy_{head}_share": entropy / np.log(thinned.shape[1]),
        f"prototype_usage_{head}": prototype_usage(thinned),
    }


def thin(rows_N: Tensor) -> Tensor:
    """Return at most ``MAX_ROWS`` rows, evenly spread: neighbours come from one view."""
    stride = -(-rows_N.shape[0] // MAX_ROWS)
    return rows_N[::stride]


def target_entropy(targets_RP: Tensor) -> Tensor:
    """Return the mean entropy of a row in nats: 0 for one-hot rows, ln P for uniform ones."""
    entropy: Tensor = torch.special.entr(targets_RP).sum(1).mean()
    return entropy


def prototype_usage(targets_RP: Tensor) -> Tensor:
    """Return how many prototypes the rows are assigned to, from 0 (one) to 1 (as many as can be).

    The number is the perplexity of the assignments, each row's largest target. The mean target
    itself says nothing: Sinkhorn makes it uniform whatever the features.
    """
    best_R = targets_RP.argmax(1)
    # Rows with the same assignment, itself included: no histogram over P is needed.
    count_R = (best_R[:, None] == best_R).sum(1)
    num_rows, num_prototypes = targets_RP.shape
    perplexity = torch.exp(-(count_R / num_rows).log().mean())
    usage: Tensor = (perplexity - 1) / max(1, min(num_rows, num_prototypes) - 1)
    return usage


def koleo_distance(cls_ND: Tensor) -> Tensor:
    """Return the mean distance of a unit-length cls token to its nearest one in the same view."""
    unit_2BD = F.normalize(cls_ND.float(), dim=1).unflatten(0, (2, -1))  # type: ignore[no-untyped-call]
    similarity_2BB = unit_2BD @ unit_2BD.mT
    similarity_2BB.diagonal(dim1=1, dim2=2).fill_(-2.0)
    nearest_2B = similarity_2BB.argmax(2)
    # The difference, not sqrt(2 - 2 cos): that is rounding below 1e-3.
    neighbour_2BD = torch.take_along_dim(unit_2BD, nearest_2B[..., None], dim=1)
    distance: Tensor = (unit_2BD - neighbour_2BD).norm(dim=2).mean()
    return distance


def patch_similarity(patches_NLD: Tensor) -> Tensor:
    """Return the mean cosine over pairs of different patches of one view."""
    L = patches_NLD.shape[1]
    sum_ND = F.normalize(patches_NLD.float(), dim=2).sum(1)
    return ((sum_ND.square().sum(1) - L) / (L * (L - 1))).mean()


def effective_rank(cls_ND: Tensor) -> Tensor:
    """Return exp of the entropy of the normalised eigenvalues of the second moment of unit rows.

    Not centred: of equal tokens only rounding would be left, and that has full rank.

    Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007, for a positive matrix.
    """
    # float64: no TF32, and a recurrence of 48 products.
    unit_RD = F.normalize(thin(cls_ND).double(), dim=1)
    if unit_RD.shape[0] > unit_RD.shape[1]:  # both sides have the same eigenvalues above 0
        unit_RD = unit_RD.T
    gram_GG = unit_RD @ unit_RD.T
    return torch.exp(_spectral_entropy(gram_GG / gram_GG.trace()))


def _spectral_entropy(matrix_GG: Tensor) -> Tensor:
    """Return -sum(x ln x) over the eigenvalues of a positive matrix of trace 1.

    By a Chebyshev series, whose traces need products only: ``eigvalsh`` would wait for the device.
    With T_m T_n = (T_{m+n} + T_{|m-n|}) / 2, each product gives two traces.
    """
    scale = matrix_GG.norm()  # no eigenvalue is larger, and few are much smaller
    eye_GG = torch.eye(matrix_GG.shape[0], dtype=matrix_GG.dtype, device=matrix_GG.device)
    x_GG = matrix_GG * (2 / scale) - eye_GG
    before_GG, now_GG = eye_GG, x_GG
    first, second = eye_GG.trace(), x_GG.trace()
    # Weights are numbers of the host: a tensor of them would have to be copied, which waits.
    series = _ENTROPY_SERIES[0] * first + _ENTROPY_SERIES[1] * second
    for even, odd in zip(_ENTROPY_SERIES[2::2], _ENTROPY_SERIES[3::2], strict=True):
        series = series + even * (2 * now_GG.square().sum() - first)
        before_GG, now_GG, last_GG = now_GG, 2 * x_GG @ now_GG - before_GG, now_GG
        series = series + odd * (2 * (last_GG * now_GG).sum() - second)
    entropy: Tensor = scale * series - scale.log()
    return entropy


def _entropy_series(degree: int) -> NDArray[np.float64]:
    """Return the Chebyshev coefficients of -y ln y over y = (x + 1) / 2.

    Exact at both ends of the range: most eigenvalues of a collapsed batch are 0.
    """
    x_N = np.polynomial.chebyshev.chebpts2(degree + 1)
    y_N = np.maximum((x_N + 1) / 2, np.finfo(np.float64).tiny)
    series: NDArray[np.float64] = np.polynomial.chebyshev.chebfit(x_N, -y_N * np.log(y_N), degree)
    return series


_ENTROPY_SERIES: list[float] = _entropy_series(2 * _DEGREE + 1).tolist()

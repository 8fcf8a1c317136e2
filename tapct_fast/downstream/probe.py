"""What frozen patch features know about labels: kNN and a linear head, scored as segmentation.

Shape suffixes: N rows (tokens), D width, K classes, J neighbours, S scans.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.downstream.dice import ProbeResult, confusion_matrix, summarise
from tapct_fast.downstream.features import Features
from tapct_fast.downstream.neighbours import vote
from tapct_fast.downstream.resample import check_classes, classify_voxels, labelled_tokens
from tapct_fast.errors import InputError
from tapct_fast.io.volume import Volume

Scan = tuple[Features, Volume]  # the volume holds class numbers, 0 for background

NUM_NEIGHBOURS, TEMP = 20, 0.07  # DINOv2's kNN evaluation
LINEAR_TOKENS, KNN_TOKENS = 65536, 16384  # training rows; seconds on 2 cores at width 384
LBFGS_STEPS = 150
WEIGHT_DECAY = 1e-4  # on standardised features; best of 1e-2..1e-4 on held-out phantoms


def knn(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_ND: Tensor,
    *,
    k: int = NUM_NEIGHBOURS,
    temp: float = TEMP,
) -> Tensor:
    """Classify rows by their nearest neighbours in cosine similarity.

    Args:
        train_ND: Features with known labels.
        train_labels_N: Any integers.
        test_ND: Features to classify.
        k: Neighbours that vote, at most the training rows.
        temp: A neighbour's vote weighs exp(similarity / temp).

    Returns:
        One label per test row; among equal votes the smallest label.

    Raises:
        InputError: The shapes do not fit, or ``k`` or ``temp`` is not positive.

    Source: DINOv2, arXiv:2304.07193; Wu et al., arXiv:1805.01978 section 3.4.
    """
    if train_ND.ndim != 2 or test_ND.ndim != 2 or train_ND.shape[1] != test_ND.shape[1]:
        raise InputError(
            f"knn: features of shapes {tuple(train_ND.shape)} and {tuple(test_ND.shape)} are not "
            "two tables of equal width"
        )
    if train_labels_N.shape != train_ND.shape[:1] or len(train_ND) == 0:
        raise InputError(
            f"knn: labels of shape {tuple(train_labels_N.shape)} for {len(train_ND)} training rows"
        )
    if k < 1 or temp <= 0:
        raise InputError(f"knn: k={k} and temp={temp} must be positive")
    classes_K, labels_N = torch.unique(train_labels_N, return_inverse=True)
    target_NK = F.one_hot(labels_N, len(classes_K)).float()
    best_N = vote(train_ND, target_NK, test_ND, k=k, temp=temp).argmax(1)
    labels: Tensor = classes_K[best_N]
    return labels


def linear_segmentation(
    train: Sequence[Scan],
    test: Sequence[Scan],
    *,
    num_classes: int,
    seed: int = 0,
    label_names: Sequence[str] | None = None,
) -> ProbeResult:
    """Fit a linear head on frozen patch tokens and score it on other scans.

    Multinomial logistic regression on standardised features by full-batch L-BFGS from zero. A
    token's target is the share of each class among its label voxels; classes weigh by the inverse
    square root of their share. The problem is convex and starts without drawn values, so the same
    input gives the same result. Scores are interpolated trilinearly to the label grid.

    Args:
        train: Features with label maps whose voxels are class numbers below ``num_classes``, 0
            being background.
        test: Held-out scans.
        num_classes: Including background.
        seed: Draws the training tokens where there are more than 65536, and the bootstrap.
        label_names: One per class; by default their numbers.

    Raises:
        InputError: No scans, labels out of range, or a label map that lies outside its scan.
    """
    names = _names(label_names, num_classes)
    confusions_SKK = _confusions(fit_linear_head, LINEAR_TOKENS, train, test, num_classes, seed)
    return summarise("linear head", names, confusions_SKK, seed=seed)


def knn_segmentation(
    train: Sequence[Scan],
    test: Sequence[Scan],
    *,
    num_classes: int,
    seed: int = 0,
    label_names: Sequence[str] | None = None,
) -> ProbeResult:
    """Score patch tokens by their nearest training tokens; arguments as ``linear_segmentation``.

    Raises:
        InputError: No scans, labels out of range, or a label map that lies outside its scan.
    """
    names = _names(label_names, num_classes)
    confusions_SKK = _confusions(_fit_knn, KNN_TOKENS, train, test, num_classes, seed)
    return summarise("kNN", names, confusions_SKK, seed=seed)


Head = Callable[[Tensor], Tensor]  # x_ND -> scores_NK


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """A linear layer on standardised features; call it with rows."""

    weight_DK: Tensor
    bias_K: Tensor
    mean_D: Tensor
    std_D: Tensor

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return scores_NK, finite; a class that was not seen in training scores lowest."""
        return ((x_ND - self.mean_D) / self.std_D) @ self.weight_DK + self.bias_K


def fit_linear_head(x_ND: Tensor, share_NK: Tensor) -> LinearHead:
    """Fit the head of ``linear_segmentation`` on rows.

    Args:
        x_ND: Features of tokens, float32.
        share_NK: Share of each class among a token's label voxels; rows sum to 1.
    """
    mean_D, std_D = x_ND.mean(0), x_ND.std(0, correction=0).clamp_min(1e-6)
    x_ND = (x_ND - mean_D) / std_D
    mean_K = share_NK.mean(0)
    present_K = mean_K > 0
    balance_K = torch.where(present_K, mean_K.clamp_min(1e-12).rsqrt(), 0.0)
    target_NK = share_NK * (balance_K / (mean_K * balance_K).sum())
    # (K, D): its gradient is a product of short rows, faster than that of (D, K).
    weight_KD = torch.zeros(len(mean_K), x_ND.shape[1], requires_grad=True)
    bias_K = torch.zeros(len(mean_K), requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight_KD, bias_K], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        log_p_NK = torch.log_softmax(F.linear(x_ND, weight_KD, bias_K), dim=1)
        loss = WEIGHT_DECAY * weight_KD.square().sum() - (target_NK * log_p_NK).sum(1).mean()
        torch.autograd.backward(loss)
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]  # torch does not annotate it
    # A class without training tokens must never win; finite, so that interpolation stays finite.
    offset_K = torch.where(present_K, bias_K.detach(), -1e4)
    return LinearHead(weight_KD.detach().T.contiguous(), offset_K, mean_D, std_D)


def _fit_knn(x_ND: Tensor, share_NK: Tensor) -> Head:
    return lambda rows_ND: vote(x_ND, share_NK, rows_ND, k=NUM_NEIGHBOURS, temp=TEMP)


def _names(label_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    names = tuple(label_names or map(str, range(num_classes)))
    if num_classes < 2 or len(names) != num_classes:
        raise InputError(f"num_classes={num_classes} with {len(names)} names; at least 2, as many")
    return names


def segment(
    train: Sequence[Scan], scans: Sequence[Scan], *, num_classes: int, seed: int = 0
) -> list[NDArray[np.int64]]:
    """Return the classes that the head of ``linear_segmentation`` gives the voxels of scans.

    Args:
        train: As for ``linear_segmentation``.
        scans: Their features are classified; of their label maps only the grids are used.
        num_classes: Including background.
        seed: As for ``linear_segmentation``.

    Returns:
        Per scan class numbers, ZYX, on the grid of its label map.

    Raises:
        InputError: No training scans, labels out of range, or a label map that lies outside its
            scan.
    """
    if not train:
        raise InputError("a probe needs training scans, not 0")
    head = _fit(fit_linear_head, LINEAR_TOKENS, train, num_classes, seed)
    return [
        classify_voxels(head(features.patches_ZYXC.flatten(0, 2)), features, labels)
        for features, labels in scans
    ]


def _fit(
    fit: Callable[[Tensor, Tensor], Head],
    max_tokens: int,
    train: Sequence[Scan],
    num_classes: int,
    seed: int,
) -> Head:
    tables = []
    for number, (features, labels) in enumerate(train, start=1):
        try:
            tables.append(labelled_tokens(features, labels, num_classes))
        except InputError as error:
            raise InputError(f"training label map {number}: {error}") from None
    x_ND, share_NK = torch.cat([t.x_LD for t in tables]), torch.cat([t.share_LK for t in tables])
    if len(x_ND) > max_tokens:
        order = np.random.default_rng(seed).permutation(len(x_ND))[:max_tokens]
        keep = torch.from_numpy(np.sort(order))
        x_ND, share_NK = x_ND[keep], share_NK[keep]
    return fit(x_ND, share_NK)


def _confusions(
    fit: Callable[[Tensor, Tensor], Head],
    max_tokens: int,
    train: Sequence[Scan],
    test: Sequence[Scan],
    num_classes: int,
    seed: int,
) -> NDArray[np.int64]:
    """Fit on some scans and return one confusion matrix, SKK, per other scan."""
    if not train or not test:
        raise InputError(f"a probe needs training and test scans, not {len(train)} and {len(test)}")
    head = _fit(fit, max_tokens, train, num_classes, seed)
    confusions = []
    for number, (features, labels) in enumerate(test, start=1):
        try:
            check_classes(labels, num_classes)
        except InputError as error:
            raise InputError(f"test label map {number}: {error}") from None
        scores_LK = head(features.patches_ZYXC.flatten(0, 2))
        predicted_ZYX = classify_voxels(scores_LK, features, labels)
        confusions.append(confusion_matrix(labels.hu_ZYX, predicted_ZYX, num_classes))
    return np.stack(confusions)


class ScanProbe(NamedTuple):
    """Both probes of the same scans; prints as two tables."""

    knn: ProbeResult
    linear: ProbeResult
    num_folds: int

    def __str__(self) -> str:
        return f"{self.knn}\n\n{self.linear}\n\n{self.num_folds}-fold cross-validation over scans"


def probe_scans(scans: Sequence[Scan], *, folds: int = 4, seed: int = 0) -> ScanProbe:
    """Score features by cross-validation over their scans.

    Args:
        scans: Features with label maps of any values, 0 being background.
        folds: At most; with fewer scans, each is left out once.
        seed: Draws folds, training tokens and the bootstrap.

    Raises:
        InputError: There are fewer than two scans or folds, or no labels but 0.
    """
    if len(scans) < 2 or folds < 2:
        raise InputError(f"{folds} folds of {len(scans)} scans: cross-validation needs 2 of each")
    values = np.unique(np.concatenate([[0], *(np.unique(labels.hu_ZYX) for _, labels in scans)]))
    if len(values) < 2:
        raise InputError("the label maps hold background (0) only")
    scans = [
        (
            features,
            Volume(np.searchsorted(values, m.hu_ZYX).astype(np.int16), m.spacing_mm, m.affine),
        )
        for features, m in scans
    ]
    names = tuple(str(value) for value in values)
    folds = min(folds, len(scans))
    fold_S = np.random.default_rng(seed).permutation(np.arange(len(scans)) % folds)

    def cross_validate(
        name: str, fit: Callable[[Tensor, Tensor], Head], max_tokens: int
    ) -> ProbeResult:
        confusions_SKK = np.zeros((len(scans), len(names), len(names)), dtype=np.int64)
        for fold in range(folds):
            train = [scan for scan, f in zip(scans, fold_S, strict=True) if f != fold]
            test = [scan for scan, f in zip(scans, fold_S, strict=True) if f == fold]
            confusions_SKK[fold_S == fold] = _confusions(
                fit, max_tokens, train, test, len(names), seed
            )
        return summarise(name, names, confusions_SKK, seed=seed)

    return ScanProbe(
        cross_validate("kNN", _fit_knn, KNN_TOKENS),
        cross_validate("linear head", fit_linear_head, LINEAR_TOKENS),
        folds,
    )

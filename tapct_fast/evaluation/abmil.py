"""Attention pooling of a cls bag with a linear head, trained together (ABMIL).

    a_n = softmax_n(w . (tanh(V h_n) * sigmoid(U h_n))),   out = A sum_n a_n h_n + b

With few scans whose features move together, logistic regression on mean pooling can do better:
compare both.

Shape suffixes: S scans, B bags of a batch, N windows, D width, H hidden, K classes or one value.
Source: Ilse et al., arXiv:1802.04712, equations 7 and 9.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tapct_fast.evaluation.heads import inner_folds

Floats = NDArray[np.floating[Any]]

# The same budget for every backbone.
HIDDEN = 128
NUM_STEPS, BATCH_BAGS = 200, 32
CHECK_EVERY, PATIENCE = 10, 10  # steps; checks without a better one
# Not Adam: its first steps have one size in each of D directions, and with fewer scans than that it
# can miss even a shift of the mean.
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-2
# Cross-entropy bends by D / 4 at most where all features move together: stable below 15 / D.
LEARNING_RATE, RATE_TIMES_WIDTH = 0.1, 10.0  # the first at most


class Attended(NamedTuple):
    """One bag's prediction, and which window decided."""

    scores_K: Floats  # probabilities, or one value
    attention_N: Floats  # sums to 1


class GatedAttention(nn.Module):
    """Pool bags by gated attention, and map them linearly.

    Args:
        width: D.
        num_outputs: K.
        hidden: H.
    """

    def __init__(self, width: int, num_outputs: int, *, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.tanh = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.attention = nn.Linear(hidden, 1, bias=False)
        self.head = nn.Linear(width, num_outputs)
        nn.init.zeros_(self.head.weight)  # from a constant, not from a drawn direction
        nn.init.zeros_(self.head.bias)

    def forward(self, bag_BND: Tensor, exists_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return out_BK and attention_BN, which is 0 where no window exists."""
        gated_BNH = torch.tanh(self.tanh(bag_BND)) * torch.sigmoid(self.gate(bag_BND))
        logit_BN = self.attention(gated_BNH)[..., 0].masked_fill(~exists_BN, -torch.inf)
        attention_BN = torch.softmax(logit_BN, dim=1)
        pooled_BD = torch.einsum("bn,bnd->bd", attention_BN, bag_BND)
        return self.head(pooled_BD), attention_BN


def fit_abmil(
    bags: Sequence[Tensor],
    target_SK: Floats,
    weight_S: Floats,
    patients: Sequence[str],
    *,
    seed: int,
) -> Callable[[Tensor], Attended]:
    """Train attention pooling and its head on bags.

    At most 200 steps of gradient descent with momentum on 32 bags each. A fifth of the patients is
    kept out and decides when to stop: the weights of its least loss are kept. With too few patients
    for that, all steps run.
    In float64, so that the order of a sum, which depends on the threads, does not matter.

    Args:
        bags: (N, D) per scan.
        target_SK: One-hot for two classes or more, trained by cross-entropy; or one column of
            values, by squared error.
        weight_S: Weights of the losses.
        patients: One per scan.
        seed: Draws initial weights, batches and the patients kept out.
    """
    is_value = target_SK.shape[1] == 1
    class_S = None if is_value else target_SK.argmax(1)
    windows_ND = torch.cat(list(bags)).double()
    mean_D, std_D = windows_ND.mean(0), windows_ND.std(0, correction=0)
    std_D = torch.where(std_D > 1e-6 * mean_D.abs(), std_D, torch.inf)
    windows_ND.sub_(mean_D).div_(std_D)
    standard = windows_ND.split([len(bag_ND) for bag_ND in bags])  # type: ignore[no-untyped-call]
    offset, scale = (target_SK.mean(), target_SK.std() or 1.0) if is_value else (0.0, 1.0)
    target = torch.from_numpy((target_SK - offset) / scale)
    weight = torch.from_numpy(weight_S).double()

    folds = inner_folds(patients, class_S, seed=seed)
    kept, out = (folds[0].train, folds[0].test) if folds else (range(len(bags)), ())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GatedAttention(len(mean_D), target_SK.shape[1]).double()

    def forward(scans: Sequence[int]) -> tuple[Tensor, Tensor]:
        bag_BND = pad_sequence([standard[s] for s in scans], batch_first=True)
        sizes_B = torch.tensor([len(bags[s]) for s in scans])
        exists_BN = torch.arange(bag_BND.shape[1]) < sizes_B[:, None]
        result: tuple[Tensor, Tensor] = model(bag_BND, exists_BN)
        return result

    def loss(scans: Sequence[int]) -> Tensor:
        out_BK, rows = forward(scans)[0], torch.tensor(scans)
        if is_value:
            loss_B = (out_BK - target[rows]).square().sum(1) / 8  # bends as cross-entropy does
        else:
            loss_B = F.cross_entropy(out_BK, target[rows], reduction="none")
        return (loss_B * weight[rows]).sum()

    rate = min(LEARNING_RATE, RATE_TIMES_WIDTH / len(mean_D))
    solver = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    batches = _batches(kept, seed)
    best, best_loss, checks = copy.deepcopy(model.state_dict()), torch.inf, 0
    for step in range(1, NUM_STEPS + 1):
        scans = next(batches)
        solver.zero_grad()
        torch.autograd.backward(loss(scans) / len(scans))
        solver.step()
        if not out or step % CHECK_EVERY:
            continue
        with torch.no_grad():
            held_out = sum(float(loss(part)) for part in _split(out))
        checks += 1
        if held_out < best_loss:
            best, best_loss, checks = copy.deepcopy(model.state_dict()), held_out, 0
        elif checks == PATIENCE:
            break
    if out:
        model.load_state_dict(best)

    @torch.no_grad()
    def predict(bag_ND: Tensor) -> Attended:
        bag_BND = ((bag_ND - mean_D) / std_D)[None]
        out_BK, attention_BN = model(bag_BND, torch.ones(1, len(bag_ND), dtype=torch.bool))
        scores_BK = out_BK * scale + offset if is_value else torch.softmax(out_BK, dim=1)
        return Attended(scores_BK[0].numpy(), attention_BN[0].numpy())

    return predict


def _batches(scans: Sequence[int], seed: int) -> Iterator[list[int]]:
    """Yield batches without end; each pass over the scans is drawn anew."""
    rng = np.random.default_rng(seed)
    while True:
        yield from _split([scans[i] for i in rng.permutation(len(scans))])


def _split(scans: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(scans), BATCH_BAGS):
        yield list(scans[start : start + BATCH_BAGS])

"""Which steps may update the weights: a pure law on tensors that no host has to wait for.

A step is refused when a number is not finite, or when a loss or a gradient norm is a spike. What is
refused leaves weights, optimizer, teacher and the running means as they were; it is only counted.

Shape suffixes: J losses (the total first), K gradient norms.

Origin of the default limits: in 400 healthy steps of the recipe ``debug`` on its 16 phantoms (seed
0, behind the first 20) the loss rose at most 0.25 nats above its running mean, a gradient norm to
2.1 times its own. The limits, 3 nats and 20 times, are an order of magnitude beyond: a spike that
costs one clipped update is better than a healthy step that is refused.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tapct_fast.config import GuardConfig
from tapct_fast.errors import TrainError
from tapct_fast.ssl.shards import local

MEMORY = 100  # accepted steps over which means run
_LEAST_NORM = 1e-3  # a head that had no tokens so far has a mean of zero


class GuardState(NamedTuple):
    """What the guard remembers, on the run's device; saved with the optimizer as ``guard.*``."""

    accepted: Tensor  # int64, steps that updated
    skipped: Tensor  # int64, steps that did not
    in_a_row: Tensor  # int64, skips since the last update
    loss_mean: Tensor  # float32, of the total
    norm_mean_K: Tensor  # float32
    passed_over: Tensor  # int64, steps' worth of data left out by roll-backs
    rollbacks: Tensor  # int64


class Verdict(NamedTuple):
    """What the host reads of a step, when the next one is under way: values of ``GuardState``."""

    skipped: int
    in_a_row: int

    @classmethod
    def of(cls, state: "GuardState") -> "Verdict":
        """Read a state; the first verdict of a resumed run, which the killed one may not have."""
        return cls(int(state.skipped), int(state.in_a_row))


def start_guard(num_norms: int, device: torch.device | str) -> GuardState:
    """Return the state of a run without steps."""
    count, mean = torch.zeros((), dtype=torch.int64), torch.zeros(())
    zeros = GuardState(count, count, count, mean, torch.zeros(num_norms), count, count)
    # Of their own: a resume copies into each.
    return GuardState(*(tensor.clone().to(device) for tensor in zeros))


def judge(
    state: GuardState,
    losses_J: Tensor,
    norms_K: Tensor,
    config: GuardConfig,
    *,
    is_sound: Tensor | None = None,
) -> tuple[Tensor, GuardState]:
    """Say whether a step may update, and return the state after it.

    Args:
        state: Before the step.
        losses_J: The step's losses, the total first; of all ranks.
        norms_K: Gradient norms before the clip; of all ranks.
        config: The limits.
        is_sound: Bool scalar, what else must hold: finite voxels and moments.

    Returns:
        A bool scalar on the device, and the new state; no tensor of ``state`` is changed.
    """
    losses_J, norms_K = losses_J.detach().float(), norms_K.detach().float()
    is_finite = losses_J.isfinite().all() & norms_K.isfinite().all()
    if is_sound is not None:
        is_finite = is_finite & is_sound
    is_spike = (losses_J[0] > state.loss_mean + config.spike_loss) | (
        norms_K > config.spike_norm * state.norm_mean_K.clamp(min=_LEAST_NORM)
    ).any()
    ok = is_finite & ~(is_spike & (state.accepted >= config.warmup_steps))
    accepted = state.accepted + ok
    # The plain mean of the first steps, then an exponential one.
    weight = 1.0 / accepted.clamp(min=1, max=MEMORY)
    loss_mean = state.loss_mean + weight * (losses_J[0] - state.loss_mean)
    norm_mean_K = state.norm_mean_K + weight * (norms_K - state.norm_mean_K)
    return ok, state._replace(
        accepted=accepted,
        skipped=state.skipped + ~ok,
        in_a_row=torch.where(ok, 0, state.in_a_row + 1),
        loss_mean=torch.where(ok, loss_mean, state.loss_mean),
        norm_mean_K=torch.where(ok, norm_mean_K, state.norm_mean_K),
    )


def each_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return finite_N on the tensors' device: of each of N, whether it is finite throughout."""
    # A sum also calls damaged what overflows on the way, 3e38, which no weight survives. On two CPU
    # cores 275 MB in 304 tensors take 13 ms by sums, by norms 40 ms, by isfinite longer still; on a
    # GPU norms of all are few kernels.
    tensors = [t.detach() for t in tensors]
    if all(t.device.type == "cpu" for t in tensors):
        return torch.stack([t.sum() for t in tensors]).isfinite()
    return torch.stack(torch._foreach_norm(tensors, ord=1)).isfinite()


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return on the device whether every number of floating-point ``tensors`` is finite.

    Of shards, this looks at those of this process.
    """
    return each_finite([local(tensor) for tensor in tensors]).all()


class RefusedError(TrainError):
    """A step that was refused, with its numbers."""

    def __init__(
        self, message: str, losses: Mapping[str, float], grad_norms: Mapping[str, float]
    ) -> None:
        super().__init__(message)
        self.losses = losses
        self.grad_norms = grad_norms


def explain(
    losses: Mapping[str, float],
    grad_norms: Mapping[str, float],
    *,
    voxels: float,
    networks: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> str:
    """Say in plain words why a step was refused; the host reads weights, so only then.

    All processes call this together: each looks at its shards.

    Args:
        losses: Of the step.
        grad_norms: Of the step, before the clip.
        voxels: Finite if and only if every voxel of the views is.
        networks: Student and teacher by name.
        optimizer: Its moments are looked at.
        mean: Over the processes; None for one.
    """
    named = {f"loss {name}": value for name, value in losses.items()}
    named |= {f"gradient of the {name}": value for name, value in grad_norms.items()}
    bad = [name for name, value in named.items() if not math.isfinite(value)]
    looked_at = {f"weights of {name}": all_finite(m.parameters()) for name, m in networks.items()}
    looked_at["moments of the optimizer"] = moments_finite(optimizer)
    shares = torch.stack([*looked_at.values()]).float()
    shares = shares if mean is None else mean(shares)
    damaged = [name for name, share in zip(looked_at, shares.tolist(), strict=True) if share < 1]
    if not math.isfinite(voxels):
        bad = bad or ["views"]
        cause = "the views hold NaN or infinity; check the settings under hu and views"
    elif damaged:
        bad = bad or damaged
        cause = f"{' and '.join(damaged)} are damaged; resume from a checkpoint"
    elif bad:
        cause = (
            "views and weights are finite, so the numbers overflowed on the way; "
            "begin a new run with a lower schedule.base_lr or train.precision=fp32"
        )
    else:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in named.items())
        return (
            f"a spike: {numbers}. Nothing was updated. Far above the mean of the steps before; "
            "look at the samples of this step, or raise guard.spike_loss or guard.spike_norm"
        )
    return f"not finite: {', '.join(bad)}. Nothing was updated. {cause}"


def moments_finite(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return on the device whether the optimizer's moments are finite; True before any step.

    Of shards, this looks at those of this process.
    Losses and gradients do not show a damaged moment, yet the next update would spread it.
    """
    return all_finite(_moments(optimizer))


def _moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    device = optimizer.param_groups[0]["params"][0].device
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return moments or [torch.zeros((), device=device)]

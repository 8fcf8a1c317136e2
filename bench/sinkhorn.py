"""The teacher's targets as factors of stored logits against dense targets divided in place.

Rivals: DINOv2's in-place Sinkhorn-Knopp, eager and compiled, and our factors from torch.logsumexp,
compiled; for the center, DINO's softmax, eager and compiled. Temperature 0.05, three rounds.
Ours returns two vectors and the rivals the dense targets, which the losses of either side read.
Bytes are the floor of the iteration: one read of the 16-bit logits per half round (one for the
softmax). Everything is held to float64 on the first 64 rows. No public kernel handles thousands of
prototypes; those for mixtures of experts and residual streams keep 4 to 8 in registers.
Shapes: iBOT's 22,579 x 65,536 and DINO's 64 x 65,536 at batch 32; on a CPU 4,096 rows.
Shape suffixes: N rows, P prototypes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import Case, Device, Results, Work, compiled, op_bench
from tapct_kernels import SoftTargets, sinkhorn, sinkhorn_ref, softmax_targets
from tapct_kernels.sinkhorn import prototype_logsumexp_ref, row_logsumexp_ref

TEMP, ROUNDS = 0.05, 3
CHECKED = 64  # rows: float64 copies of all targets would take 24 GB on the largest shape

Dense = Callable[[Tensor], Tensor]


def factors_from_logsumexp(logits_NP: Tensor) -> Tensor:
    """Return the rows' factors by the same iteration in stock operations."""
    temp, row_N = logits_NP.new_full((), TEMP, dtype=torch.float32), None
    for _ in range(ROUNDS):
        prototype_P = -prototype_logsumexp_ref(logits_NP, row_N, temp)
        row_N = -row_logsumexp_ref(logits_NP, prototype_P, temp)
    assert row_N is not None
    return torch.cat([prototype_P, row_N])


def softmax_dense(logits_NP: Tensor, center_P: Tensor) -> Tensor:
    """Return DINO's dense targets."""
    return torch.softmax((logits_NP.float() - center_P) / TEMP, dim=1)


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield both losses' Sinkhorn-Knopp and the larger one's softmax."""
    num_prototypes = 300 if is_tiny else 65_536
    masked = 70 if is_tiny else 22_579 if device == "cuda" else 4096
    for kind, rows in (("sinkhorn", masked), ("sinkhorn", 64), ("softmax", masked)):
        make = _sinkhorn if kind == "sinkhorn" else _softmax
        name = f"{kind} {rows}x{num_prototypes} float16"
        yield Case(name, partial(make, rows, num_prototypes, device, is_tiny))


def _draw(rows: int, num_prototypes: int, device: Device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    logits_NP = torch.empty(rows, num_prototypes, dtype=torch.float16, device=device)
    return logits_NP.uniform_(-1, 1, generator=generator)


def _sinkhorn(rows: int, num_prototypes: int, device: Device, is_tiny: bool) -> Work:
    logits_NP = _draw(rows, num_prototypes, device)

    def ours() -> SoftTargets:
        return sinkhorn([logits_NP], TEMP, num_iter=ROUNDS)[0]

    def of_factors(call: Dense) -> list[Tensor]:
        factors = call(logits_NP)
        prototype_P, row_N = factors[:num_prototypes], factors[num_prototypes:]
        return [
            _checked(SoftTargets(logits_NP, None, prototype_P, row_N, factors.new_full((), TEMP)))
        ]

    dense: dict[str, Dense] = {"eager in place": partial(sinkhorn_ref, temp=TEMP, num_iter=ROUNDS)}
    factors: dict[str, Dense] = {}
    absent: dict[str, str] = {}
    if device == "cuda" and not is_tiny:
        for name, call in compiled(dense["eager in place"], device).items():
            dense[f"{name} in place"] = call
    elif device == "cpu":
        absent["torch.compile in place"] = "on a CPU as slow as eager, and minutes long"
    if not is_tiny:
        for name, call in compiled(factors_from_logsumexp, device).items():
            factors[f"{name} logsumexp"] = call
    variants: dict[str, Results] = {"tapct sinkhorn": lambda: _vectors(ours())}
    variants |= {name: partial(_all, f, logits_NP) for name, f in (dense | factors).items()}
    checks: dict[str, Results] = {"tapct sinkhorn": lambda: [_checked(ours())]}
    checks |= {name: partial(_first, f, logits_NP) for name, f in dense.items()}
    checks |= {name: partial(of_factors, f) for name, f in factors.items()}
    (exact,) = sinkhorn([logits_NP.double()], TEMP, num_iter=ROUNDS)
    return Work(
        variants,
        [_checked(exact)],
        tolerance=1e-4,  # exponents of 20 in float32, in a dozen operations
        bytes=2 * ROUNDS * logits_NP.nbytes,
        dtype=logits_NP.dtype,
        backend=_backend(device),
        checks=checks,
        absent=absent,
        measures_memory=True,
    )


def _softmax(rows: int, num_prototypes: int, device: Device, is_tiny: bool) -> Work:
    logits_NP = _draw(rows, num_prototypes, device)
    center_P = torch.linspace(-0.3, 0.3, num_prototypes, device=device)

    def ours() -> SoftTargets:
        return softmax_targets(logits_NP, center_P, TEMP)

    rivals: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"eager softmax": softmax_dense}
    if not is_tiny:
        for name, call in compiled(softmax_dense, device).items():
            rivals[f"{name} softmax"] = call
    variants: dict[str, Results] = {"tapct softmax_targets": lambda: _vectors(ours())}
    variants |= {name: partial(_all, f, logits_NP, center_P) for name, f in rivals.items()}
    checks: dict[str, Results] = {"tapct softmax_targets": lambda: [_checked(ours())]}
    checks |= {name: partial(_first, f, logits_NP, center_P) for name, f in rivals.items()}
    some = logits_NP[:CHECKED].double()
    return Work(
        variants,
        [torch.softmax((some - center_P.double()) / TEMP, dim=1)],
        tolerance=1e-4,
        bytes=logits_NP.nbytes,
        dtype=logits_NP.dtype,
        backend=_backend(device),
        checks=checks,
        measures_memory=True,
    )


def _all(call: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
    return [call(*operands)]


def _first(call: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
    return [call(*operands)[:CHECKED]]


def _vectors(targets: SoftTargets) -> list[Tensor]:
    return [targets.prototype_P, targets.row_N]


def _checked(targets: SoftTargets) -> Tensor:
    some = targets._replace(rows_NX=targets.rows_NX[:CHECKED], row_N=targets.row_N[:CHECKED])
    return some.dense()


def _backend(device: Device) -> str:
    return "Triton kernels" if device == "cuda" else "chunks in stock operations"


main = op_bench(
    __file__,
    ["kernels/tapct_kernels/sinkhorn.py", "kernels/tapct_kernels/soft_targets.py"],
    cases,
)

if __name__ == "__main__":
    main()

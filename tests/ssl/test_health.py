"""Each health number beside its formula in float64 numpy, and at the states it must tell apart."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tapct_fast.ssl.health import (
    MAX_ROWS,
    MEANINGS,
    Evidence,
    effective_rank,
    koleo_distance,
    measure,
    patch_similarity,
    prototype_usage,
    target_entropy,
    thin,
)
from tapct_kernels import SoftTargets, sinkhorn, softmax_targets

Floats = NDArray[np.float64]


def unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def draw(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape)).float()


def targets(logits_NP: torch.Tensor, temp: float = 0.1) -> SoftTargets:
    return softmax_targets(logits_NP, torch.zeros(logits_NP.shape[1]), temp)


def evidence(
    rng: np.random.Generator, *, samples: int = 6, rows: int = 9, has_ibot: bool = True
) -> Evidence:
    return Evidence(
        draw(rng, 2 * samples, 16) + 0.5,
        draw(rng, 2 * samples, 16) + 0.5,
        draw(rng, 3, 10, 16) + 0.5,
        targets(0.3 * draw(rng, 2 * samples, 12)),
        targets(0.3 * draw(rng, rows, 12)) if has_ibot else None,
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def numpy_rank(cls_ND: Floats) -> float:
    singular = np.linalg.svd(unit(cls_ND), compute_uv=False)
    share = singular**2 / (singular**2).sum()
    share = share[share > 1e-30]
    return float(np.exp(-(share * np.log(share)).sum()))


def test_measured_numbers_are_their_formulas(rng: np.random.Generator) -> None:
    given = evidence(rng)
    found = measure(given)
    assert set(found) == set(MEANINGS)
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in found.values())

    expected: dict[str, float] = {}
    for name, soft in (("dino", given.dino), ("ibot", given.ibot)):
        assert soft is not None
        scaled = soft.rows_NX.double().numpy() / 0.1
        p = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
        entropy = -(p * np.log(p)).sum(1).mean()
        expected[f"teacher_entropy_{name}"] = entropy
        expected[f"teacher_entropy_{name}_share"] = entropy / math.log(12)
        _, counts = np.unique(p.argmax(1), return_counts=True)
        share = counts / len(p)
        perplexity = np.exp(-(share * np.log(share)).sum())
        expected[f"prototype_usage_{name}"] = (perplexity - 1) / (min(len(p), 12) - 1)
    student, teacher = (
        unit(rows.double().numpy()) for rows in (given.student_cls_ND, given.teacher_cls_ND)
    )
    nearest = []
    for view in np.split(student, 2):
        distance = np.linalg.norm(view[:, None] - view, axis=2)
        np.fill_diagonal(distance, np.inf)
        nearest.append(distance.min(1).mean())
    expected["koleo_distance"] = float(np.mean(nearest))
    patches = unit(given.patches_NLD.double().numpy())
    cosine = patches @ patches.transpose(0, 2, 1)
    expected["patch_similarity"] = cosine[:, ~np.eye(10, dtype=bool)].mean()
    expected["cls_agreement"] = (student * teacher).sum(1).mean()
    expected["effective_rank"] = numpy_rank(given.teacher_cls_ND.double().numpy())
    for name, value in expected.items():
        # float32 sums; the rank is a series (see below)
        assert float(found[name]) == pytest.approx(value, rel=2e-5 if "rank" not in name else 2e-3)


@pytest.mark.parametrize(("N", "D"), [(2, 8), (32, 128), (256, 64), (128, 384)])
@pytest.mark.parametrize("kind", ["independent", "decaying", "shifted", "two kinds"])
def test_the_effective_rank_is_that_of_an_eigendecomposition(
    rng: np.random.Generator, N: int, D: int, kind: str
) -> None:
    cls_ND = rng.normal(size=(N, D))
    if kind == "decaying":
        cls_ND *= np.arange(1, D + 1) ** -1.5
    elif kind == "shifted":
        cls_ND += 2
    elif kind == "two kinds":
        cls_ND = cls_ND[np.arange(N) % 2]
    found = float(effective_rank(torch.from_numpy(cls_ND)))
    assert found == pytest.approx(numpy_rank(cls_ND), rel=2e-3)  # what _DEGREE states


def test_equal_tokens_have_rank_one_distance_zero_and_similarity_one() -> None:
    same_ND = torch.ones(8, 16) * torch.linspace(1, 2, 16)
    noisy_ND = same_ND + 1e-6 * torch.randn(8, 16)
    assert float(effective_rank(noisy_ND)) == pytest.approx(1, abs=1e-5)
    assert float(koleo_distance(same_ND)) == 0
    assert float(koleo_distance(noisy_ND)) == pytest.approx(0, abs=1e-5)
    assert float(patch_similarity(same_ND[None])) == pytest.approx(1, abs=1e-6)


def test_orthogonal_tokens_have_full_rank_and_similarity_zero() -> None:
    eye_ND = torch.eye(8)
    assert float(effective_rank(eye_ND)) == pytest.approx(8, rel=1e-5)
    assert float(koleo_distance(eye_ND)) == pytest.approx(math.sqrt(2))
    assert float(patch_similarity(eye_ND[None])) == pytest.approx(0, abs=1e-6)


def test_entropy_and_usage_tell_one_prototype_from_all_and_from_none() -> None:
    one_hot_RP = torch.eye(4)
    assert float(target_entropy(one_hot_RP)) == 0
    assert float(prototype_usage(one_hot_RP)) == pytest.approx(1)
    assert float(prototype_usage(one_hot_RP[[0, 0, 0, 0]])) == pytest.approx(0)
    # Three and one of four rows: the perplexity is 4 / 3**0.75, one prototype counts as zero.
    assert float(prototype_usage(one_hot_RP[[0, 0, 0, 3]])) == pytest.approx(
        (4 / 3**0.75 - 1) / 3, rel=1e-6
    )
    assert float(target_entropy(torch.full((3, 5), 0.2))) == pytest.approx(math.log(5))


def test_sinkhorn_turns_equal_logits_into_uniform_targets() -> None:
    # This is what a collapsed teacher looks like under Sinkhorn: ln P, not one prototype.
    equal_NP = torch.randn(1, 32).expand(16, 32).contiguous()
    (soft,) = sinkhorn([equal_NP], 0.04)
    found = measure(Evidence(*(torch.ones(16, 4),) * 2, torch.ones(1, 3, 4), soft, None))
    assert float(found["teacher_entropy_dino_share"]) == pytest.approx(1, abs=1e-4)


def test_what_does_not_exist_is_left_out(rng: np.random.Generator) -> None:
    given = evidence(rng, samples=1, has_ibot=False)
    found = measure(given._replace(patches_NLD=given.patches_NLD[:, :1]))
    absent = {"koleo_distance", "patch_similarity"}
    assert set(found) == {n for n in MEANINGS if n not in absent and "ibot" not in n}
    assert all(bool(value.isfinite()) for value in found.values())


@pytest.mark.parametrize("num_rows", [1, MAX_ROWS, MAX_ROWS + 1, 5 * MAX_ROWS - 3])
def test_thinned_rows_are_few_and_spread_over_all(num_rows: int) -> None:
    rows_N = thin(torch.arange(num_rows))
    assert MAX_ROWS / 2 < len(rows_N) <= MAX_ROWS or len(rows_N) == num_rows
    assert int(rows_N[-1]) >= num_rows * (1 - 2 / len(rows_N))
    assert rows_N.diff().unique().numel() <= 1


def test_autocast_rounds_nothing_and_random_state_is_untouched(rng: np.random.Generator) -> None:
    given = evidence(rng)
    before = torch.get_rng_state()
    plain = measure(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = measure(given)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
def test_nothing_waits_for_the_device(rng: np.random.Generator) -> None:
    def moved(value: Any) -> Any:
        if value is None or isinstance(value, torch.Tensor):
            return value if value is None else value.cuda()
        return type(value)(*map(moved, value))

    given = moved(evidence(rng))
    measure(given)  # the first call may load kernels
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        measure(given)
    finally:
        torch.cuda.set_sync_debug_mode(mode)

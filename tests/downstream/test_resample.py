import itertools

import numpy as np
import pytest
import torch

from tapct_fast.downstream.features import Features
from tapct_fast.downstream.resample import classify_voxels, labelled_tokens
from tapct_fast.errors import InputError
from tapct_fast.io.orient import spacing_of
from tapct_fast.io.volume import Volume


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(4)
    matrix[:2, :2] = [[c, -s], [s, c]]
    return matrix


@pytest.fixture
def grids() -> tuple[Features, Volume]:
    """A token grid, and a label grid of other spacing and direction that partly leaves it."""
    token_affine = np.diag([-8.0, -9.0, 12.0, 1.0])
    token_affine[:3, 3] = [20.0, 30.0, -40.0]
    features = Features(
        torch.randn(3, 5, 4, 2), token_affine, (12.0, 9.0, 8.0), torch.zeros(1, 2), torch.zeros(2)
    )
    label_affine = rotation(20.0) @ np.diag([-3.0, -3.5, 5.0, 1.0])
    label_affine[:3, 3] = [22.0, 28.0, -46.0]
    labels = np.random.default_rng(0).integers(0, 3, (9, 12, 11)).astype(np.int16)
    return features, Volume(labels, spacing_of(label_affine), label_affine)


def token_places(features: Features, labels: Volume) -> dict[tuple[int, int, int], np.ndarray]:
    inverse = np.linalg.inv(features.affine)
    return {
        (z, y, x): (inverse @ (labels.affine @ [x, y, z, 1]))[2::-1]
        for z, y, x in itertools.product(*map(range, labels.hu_ZYX.shape))
    }


@pytest.mark.parametrize("slab_voxels", [1, 1 << 18])
def test_token_shares_match_counting_voxel_by_voxel(
    grids: tuple[Features, Volume], monkeypatch: pytest.MonkeyPatch, slab_voxels: int
) -> None:
    monkeypatch.setattr("tapct_fast.downstream.resample.SLAB_VOXELS", slab_voxels)
    features, labels = grids
    counts: dict[tuple[int, ...], np.ndarray] = {}
    for voxel, place in token_places(features, labels).items():
        token = tuple(int(np.floor(p + 0.5)) for p in place)
        if all(0 <= t < n for t, n in zip(token, (3, 5, 4), strict=True)):
            counts.setdefault(token, np.zeros(3))[labels.hu_ZYX[voxel]] += 1
    table = labelled_tokens(features, labels, 3)
    held = sorted(counts)
    assert 0 < len(held) < 60  # some tokens hold no voxel, some voxels no token
    expected = torch.from_numpy(np.stack([counts[t] / counts[t].sum() for t in held])).float()
    torch.testing.assert_close(table.share_LK, expected)
    assert torch.equal(table.x_LD, torch.stack([features.patches_ZYXC[t] for t in held]))


def test_voxel_classes_match_trilinear_interpolation_by_hand(
    grids: tuple[Features, Volume],
) -> None:
    features, labels = grids
    scores_ZYXK = torch.randn(3, 5, 4, 3).double().numpy()
    predicted = classify_voxels(
        torch.from_numpy(scores_ZYXK).float().reshape(-1, 3), features, labels
    )
    limit = np.array([2, 4, 3])
    unsure = 0
    for voxel, place in token_places(features, labels).items():
        place = np.clip(place, 0, limit)
        low = np.minimum(np.floor(place).astype(int), limit - 1)
        part = place - low
        score = np.zeros(3)
        for corner in itertools.product((0, 1), repeat=3):
            weight = np.prod(np.where(corner, part, 1 - part))
            score += weight * scores_ZYXK[tuple(low + corner)]
        best, second = np.sort(score)[:-3:-1]
        if best - second < 1e-4:  # float32 places
            unsure += 1
            continue
        assert predicted[voxel] == score.argmax()
    assert unsure < 10


def test_labels_beside_the_scan_or_out_of_range_are_refused(
    grids: tuple[Features, Volume],
) -> None:
    features, labels = grids
    away = labels.affine.copy()
    away[0, 3] += 1000.0
    with pytest.raises(InputError, match="outside its scan"):
        labelled_tokens(features, Volume(labels.hu_ZYX, labels.spacing_mm, away), 3)
    with pytest.raises(InputError, match=r"0\.\.2, not 0\.\.1"):
        labelled_tokens(features, labels, 2)

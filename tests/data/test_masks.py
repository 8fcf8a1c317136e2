"""Shape suffixes: N views, L tokens, Z Y X tokens."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from tapct_fast.config import MaskConfig, Zyx
from tapct_fast.data.masks import mask_law, masked_counts
from tapct_fast.errors import ConfigError
from tapct_kernels import block_masks
from tapct_kernels.block_masks import _draw_block, _Law

GRIDS = [(1, 28, 28), (2, 8, 8), (3, 28, 28), (3, 1, 1), (1, 1, 1), (2, 1, 9), (1, 2, 2), (5, 3, 2)]
RATIOS = [(0.1, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.3, 0.3), (0.99, 1.0)]


def draw_masks(config: MaskConfig, grid_zyx: Zyx, num_images: int, *, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    law = mask_law(config, grid_zyx, num_images, device="cpu")
    mask: np.ndarray = block_masks(law, torch.tensor(seed)).mask_NL.numpy()  # type: ignore[type-arg]
    return mask


def test_counts_are_the_upper_edges_of_equal_ratio_bins() -> None:
    config = MaskConfig(prob=0.5, ratio=(0.1, 0.5))
    # four bins of 0.1 .. 0.5 end at 0.2, 0.3, 0.4, 0.5 of 2352 tokens
    assert masked_counts(config, 8, 2352) == (0, 0, 0, 0, 470, 705, 940, 1176)
    assert masked_counts(config, 2, 100) == (0, 50)
    assert masked_counts(config, 1, 100) == (0,)
    assert masked_counts(MaskConfig(prob=1.0), 3, 10) == (2, 3, 5)
    assert masked_counts(MaskConfig(prob=0.0), 3, 10) == (0, 0, 0)


@pytest.mark.parametrize(("grid_zyx", "ratio"), list(itertools.product(GRIDS, RATIOS)))
def test_every_batch_has_exactly_the_stated_counts(
    grid_zyx: Zyx, ratio: tuple[float, float]
) -> None:
    num_tokens = math.prod(grid_zyx)
    for num_images, prob in [(1, 1.0), (2, 0.5), (7, 0.5), (6, 1.0)]:
        config = MaskConfig(prob=prob, ratio=ratio)
        counts = masked_counts(config, num_images, num_tokens)
        for index in range(6):
            mask_NL = draw_masks(config, grid_zyx, num_images, seed=index)
            assert mask_NL.dtype == np.bool_
            assert mask_NL.shape == (num_images, num_tokens)
            assert sorted(mask_NL.sum(1)) == list(counts)


def test_ratios_are_stratified_over_the_batch_and_dealt_to_any_view() -> None:
    config, grid = MaskConfig(), (2, 8, 8)
    drawn = np.stack([draw_masks(config, grid, 8, seed=i).sum(1) for i in range(400)])
    assert (np.sort(drawn, axis=1) == masked_counts(config, 8, 128)).all()
    for count in set(masked_counts(config, 8, 128)) - {0}:
        where = (drawn == count).sum(0)  # 400 batches over 8 places
        assert ((where - 50) ** 2 / 50).sum() < 24.3  # chi-square 0.999, 7 degrees of freedom


def test_every_token_is_masked_and_kept_at_times_and_the_plane_is_treated_alike() -> None:
    config, grid = MaskConfig(prob=1.0, ratio=(0.3, 0.3)), (3, 12, 12)
    masks = np.concatenate([draw_masks(config, grid, 8, seed=i) for i in range(250)])
    share_ZYX = masks.mean(0).reshape(grid)
    assert share_ZYX.min() > 0.02  # corners are reached least, as in DINOv2: few blocks touch them
    assert share_ZYX.max() < 0.7  # and the middle most
    # y and x are exchangeable, and so are the two ends of each axis
    error = 5 * np.sqrt(0.25 / len(masks))
    assert np.abs(share_ZYX - share_ZYX.transpose(0, 2, 1)).max() < error
    assert np.abs(share_ZYX - share_ZYX[:, ::-1, ::-1]).max() < error
    assert np.abs(share_ZYX - share_ZYX[::-1]).max() < error


def neighbours_agree(mask_ZYX: np.ndarray) -> tuple[float, float]:  # type: ignore[type-arg]
    plane = np.mean(mask_ZYX[:, 1:] == mask_ZYX[:, :-1])
    depth = np.mean(mask_ZYX[1:] == mask_ZYX[:-1])
    return float(plane), float(depth)


def test_masks_are_blocks_in_plane_and_across_slices() -> None:
    config, grid = MaskConfig(prob=1.0, ratio=(0.3, 0.3)), (3, 28, 28)
    masks = draw_masks(config, grid, 64, seed=0).reshape(64, *grid)
    plane, depth = np.mean([neighbours_agree(mask) for mask in masks], axis=0)
    # Tokens masked one by one would agree in 0.3**2 + 0.7**2 = 58 % of the pairs.
    assert plane > 0.9
    assert 0.7 < depth < 0.95  # some blocks are thin, some span the slab


def test_a_block_may_span_the_full_depth_but_never_the_plane() -> None:
    # On this grid and count one block is all: either 4 in plane and 3 deep, or thinner ones.
    config = MaskConfig(prob=1.0, ratio=(0.25, 0.25), min_block=4)
    grid = (3, 4, 4)
    masks = draw_masks(config, grid, 600, seed=1).reshape(600, *grid)
    full_depth = [m for m in masks if (m[0] == m[1]).all() and (m[1] == m[2]).all()]
    assert len(full_depth) > 60  # a third of first blocks are 3 deep, some of them 4 in plane
    assert all(m[0].sum() == 4 for m in full_depth)
    assert masks.reshape(600, 3, 16).all(2).mean() < 0.01  # 12 tokens could not fill a slice


@pytest.mark.parametrize("grid_zyx", [(2, 2, 2), (2, 1, 2), (1, 4, 4), (3, 28, 28)])
def test_no_single_block_hides_a_slice(grid_zyx: Zyx) -> None:
    missing = math.prod(grid_zyx)
    law = mask_law(MaskConfig(min_block=1), grid_zyx, 1, device="cpu")
    blocks = [
        _draw_block(0, draw, 0, missing, _Law(law.aspect_2A.numpy(), grid_zyx, 1))
        for draw in range(2000)
    ]
    sizes = {tuple(s.stop - s.start for s in block) for block in blocks if block is not None}
    assert {z for z, _, _ in sizes} == set(range(1, grid_zyx[0] + 1))
    assert all((y, x) != grid_zyx[1:] for _, y, x in sizes)
    assert all(z * y * x <= missing for z, y, x in sizes)


def test_drawing_again_gives_the_same_masks_and_another_stream_does_not() -> None:
    config = MaskConfig()
    first = draw_masks(config, (3, 28, 28), 8, seed=4)
    assert (first == draw_masks(config, (3, 28, 28), 8, seed=4)).all()
    assert (first != draw_masks(config, (3, 28, 28), 8, seed=5)).any()


def test_masks_of_a_known_batch_keep_their_golden_values() -> None:
    mask_NL = draw_masks(MaskConfig(), (2, 4, 4), 4, seed=5)
    assert ["".join(".#"[int(m)] for m in mask_L) for mask_L in mask_NL] == [
        "....########......#.............",
        "................................",
        ".##########..#.......###.##.....",
        "................................",
    ]


def test_min_block_above_the_grid_still_gives_exact_counts() -> None:
    config = dataclasses.replace(MaskConfig(prob=1.0), min_block=10_000)
    mask_NL = draw_masks(config, (2, 4, 4), 4, seed=0)
    assert sorted(mask_NL.sum(1)) == list(masked_counts(config, 4, 32))


def test_a_view_of_too_many_tokens_is_refused_by_the_setting_that_says_so() -> None:
    with pytest.raises(ConfigError, match="size_zyx gives 65600 tokens"):
        mask_law(MaskConfig(), (41, 40, 40), 2, device="cpu")

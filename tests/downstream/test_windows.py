import itertools

import pytest
import torch

from tapct_fast.downstream.windows import Blend, blend_weight_ZYX, starts, tile
from tapct_fast.errors import InputError


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9])
def test_windows_cover_every_axis_and_overlap_as_asked(overlap: float) -> None:
    for length, window in itertools.product(range(1, 60), range(1, 14)):
        first = starts(length, window, overlap)
        width = min(window, length)
        covered = {t for s in first for t in range(s, s + width)}
        assert covered == set(range(length))
        assert first == sorted(set(first))
        assert first[-1] + width == length
        steps = [b - a for a, b in itertools.pairwise(first)]
        # A window moves by one token at least, whatever overlap is asked for.
        assert all(s == 1 or window - s >= overlap * window - 1e-6 for s in steps)


def test_the_released_window_moves_by_one_token_at_half_overlap() -> None:
    assert starts(5, 3, 0.5) == [0, 1, 2]
    assert starts(5, 3, 0.25) == [0, 2]
    assert starts(7, 3, 0.0) == [0, 3, 4]


def test_gaussian_weights_are_the_formula() -> None:
    weight_ZYX = blend_weight_ZYX((3, 1, 4), "gaussian")
    for z, x in itertools.product(range(3), range(4)):
        squared = ((z - 1) / (0.125 * 3)) ** 2 + ((x - 1.5) / (0.125 * 4)) ** 2
        expected = torch.exp(torch.tensor(-0.5 * squared))
        torch.testing.assert_close(weight_ZYX[z, 0, x], expected)
    assert blend_weight_ZYX((3, 28, 28), "gaussian").min() > 0


def test_blending_divides_by_the_weights_that_arrived() -> None:
    grid_zyx, window_zyx = (5, 9, 4), (3, 4, 4)
    blend = Blend(grid_zyx, window_zyx, "gaussian", torch.device("cpu"))
    total_ZYX = torch.zeros(grid_zyx, dtype=torch.float64)
    sum_ZYXC = torch.zeros(*grid_zyx, 2, dtype=torch.float64)
    weight_ZYX = blend_weight_ZYX(window_zyx, "gaussian").double()
    for start in tile(grid_zyx, window_zyx, 0.5):
        tokens_ZYXC = torch.randn(*window_zyx, 2)
        blend.add(start, tokens_ZYXC)
        for z, y, x in itertools.product(*map(range, window_zyx)):
            there = (start[0] + z, start[1] + y, start[2] + x)
            total_ZYX[there] += weight_ZYX[z, y, x]
            sum_ZYXC[there] += weight_ZYX[z, y, x] * tokens_ZYXC[z, y, x]
    torch.testing.assert_close(blend.total_ZYX.double(), total_ZYX)
    expected = (sum_ZYXC / total_ZYX[..., None]).float()
    torch.testing.assert_close(blend.mean_ZYXC(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overlap", [-0.1, 0.95, 1.0, float("nan")])
def test_an_overlap_that_never_ends_is_refused(overlap: float) -> None:
    with pytest.raises(InputError, match="overlap"):
        tile((4, 4, 4), (2, 2, 2), overlap)

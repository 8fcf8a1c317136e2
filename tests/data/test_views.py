import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from tapct_fast.config import HuConfig, ViewGroupConfig, ViewsConfig
from tapct_fast.data.rng import Stream, generator
from tapct_fast.data.views import ViewTable, draw_views

NUM = 20_000
SHAPE = (40, 320, 320)
HU = HuConfig()
CONFIG = ViewsConfig(
    flip_prob_zyx=(0.1, 0.3, 0.5),
    quarter_turn_prob=0.3,
    window_prob=0.6,
    contrast_prob=0.4,
    thick_slice_prob=0.2,
    noise_std=(0.02, 0.1),
)
GROUP = ViewGroupConfig(
    num=NUM, size_zyx=(12, 96, 96), in_plane_scale=(0.05, 0.32), depth_scale=(0.2, 0.5)
)


@pytest.fixture(scope="module")
def table() -> ViewTable:
    return draw(GROUP)


def draw(
    group: ViewGroupConfig,
    *,
    config: ViewsConfig = CONFIG,
    shape_zyx: tuple[int, int, int] = SHAPE,
    spacing_mm: tuple[float, float, float] = (5.0, 0.8, 0.8),
    seed: int = 0,
) -> ViewTable:
    rng = generator(seed, Stream.VIEWS, 0, 0)
    return draw_views(config, group, HU, shape_zyx, spacing_mm=spacing_mm, rng=rng)


def extents(table: ViewTable) -> NDArray[np.float64]:
    return np.abs(table.hi_V3.astype(np.float64) - table.lo_V3)


def assert_uniform(values: NDArray[np.floating], low: float, high: float) -> None:
    """Kolmogorov-Smirnov at p = 0.001; the seeds are fixed, so it passes always or never."""
    u = np.sort((values.astype(np.float64) - low) / (high - low))
    assert u[0] > -1e-5
    assert u[-1] < 1 + 1e-5
    steps = np.arange(len(u) + 1) / len(u)
    distance = max(np.abs(u - steps[1:]).max(), np.abs(u - steps[:-1]).max())
    assert distance < 1.95 / np.sqrt(len(u))


def assert_share(chosen: NDArray[np.bool_], probability: float) -> None:
    assert abs(chosen.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / NUM)


def test_depth_and_area_are_uniform_shares_of_the_box(table: ViewTable) -> None:
    extent_V3 = extents(table)
    assert_uniform(extent_V3[:, 0] / 40, 0.2, 0.5)
    assert_uniform(extent_V3[:, 1] * extent_V3[:, 2] / 320**2, 0.05, 0.32)


def test_aspect_is_log_uniform(table: ViewTable) -> None:
    extent_V3 = extents(table)
    assert_uniform(np.log(extent_V3[:, 1] / extent_V3[:, 2]), np.log(3 / 4), np.log(4 / 3))


def test_aspect_is_measured_in_millimetres() -> None:
    extent_V3 = extents(draw(GROUP, spacing_mm=(5.0, 2.0, 1.0)))
    assert_uniform(np.log(2 * extent_V3[:, 1] / extent_V3[:, 2]), np.log(3 / 4), np.log(4 / 3))


def test_views_lie_uniformly_inside_the_box(table: ViewTable) -> None:
    extent_V3 = extents(table)
    low_V3 = np.minimum(table.lo_V3, table.hi_V3)
    assert (low_V3 >= 0).all()
    assert (np.maximum(table.lo_V3, table.hi_V3) <= SHAPE).all()
    for axis in range(3):
        assert_uniform(low_V3[:, axis] / (SHAPE[axis] - extent_V3[:, axis]), 0, 1)


def test_large_views_keep_the_law_of_their_area_and_stay_inside() -> None:
    # At 90 % of the area few aspects fit: rejection would favour small areas.
    group = dataclasses.replace(GROUP, in_plane_scale=(0.32, 1.0), depth_scale=(1.0, 1.0))
    table = draw(group)
    extent_V3 = extents(table)
    assert_uniform(extent_V3[:, 1] * extent_V3[:, 2] / 320**2, 0.32, 1.0)
    assert (np.maximum(table.lo_V3, table.hi_V3) <= SHAPE).all()
    assert (extent_V3[:, 0] == 40).all()
    ratio_V = extent_V3[:, 1] / extent_V3[:, 2]
    assert (ratio_V > 3 / 4 - 1e-4).all()
    assert (ratio_V < 4 / 3 + 1e-4).all()
    assert abs(np.log(ratio_V).mean()) < 4 * np.log(ratio_V).std() / np.sqrt(NUM)


@pytest.mark.parametrize("shape_zyx", [(1, 1, 1), (3, 400, 20), (3, 20, 400)])
def test_a_box_that_fits_no_aspect_gives_the_nearest_one(shape_zyx: tuple[int, int, int]) -> None:
    group = dataclasses.replace(GROUP, in_plane_scale=(0.5, 1.0))
    table = draw(group, shape_zyx=shape_zyx)
    extent_V3 = extents(table)
    _, y, x = shape_zyx
    assert_uniform(extent_V3[:, 1] * extent_V3[:, 2] / (y * x), 0.5, 1.0)
    assert (np.maximum(table.lo_V3, table.hi_V3) <= shape_zyx).all()
    assert (np.minimum(table.lo_V3, table.hi_V3) >= 0).all()
    if y > x:
        np.testing.assert_allclose(extent_V3[:, 2], x, rtol=1e-6)
    if x > y:
        np.testing.assert_allclose(extent_V3[:, 1], y, rtol=1e-6)


def test_each_axis_flips_with_its_own_probability(table: ViewTable) -> None:
    flip_V3 = table.lo_V3 > table.hi_V3
    for axis, probability in enumerate(CONFIG.flip_prob_zyx):
        assert_share(flip_V3[:, axis], probability)
    assert np.abs(np.corrcoef(flip_V3.T)[~np.eye(3, dtype=bool)]).max() < 4 / np.sqrt(NUM)


def test_window_ends_move_independently_by_a_uniform_share_of_the_clip_range(
    table: ViewTable,
) -> None:
    shift_V2 = (table.window_V2 - np.array(HU.clip, dtype=np.float32)) / (HU.clip[1] - HU.clip[0])
    moved_V = (shift_V2 != 0).any(1)
    assert_share(moved_V, 0.6)
    assert (table.window_V2[~moved_V] == HU.clip).all()
    assert_uniform(shift_V2[moved_V, 0], -0.1, 0.1)
    assert_uniform(shift_V2[moved_V, 1], -0.1, 0.1)
    assert abs(np.corrcoef(shift_V2[moved_V].T)[0, 1]) < 4 / np.sqrt(moved_V.sum())


def test_gamma_blur_and_noise_follow_their_laws(table: ViewTable) -> None:
    changed_V = table.gamma_V != 1
    assert_share(changed_V, 0.25)
    assert_uniform(np.log(table.gamma_V[changed_V]), np.log(0.8), np.log(1.25))
    sigma_V = table.sigma_V3[:, 1]
    assert (sigma_V == table.sigma_V3[:, 2]).all()
    assert_share(sigma_V > 0, 0.25)
    assert_uniform(sigma_V[sigma_V > 0], 0.3, 1.0)
    assert_share(table.noise_std_V > 0, 0.25)
    assert_uniform(table.noise_std_V[table.noise_std_V > 0], 0.02, 0.1)


def test_contrast_is_uniform_and_turns_are_equally_likely(table: ViewTable) -> None:
    changed_V = table.contrast_V != 1
    assert_share(changed_V, 0.4)
    assert_uniform(table.contrast_V[changed_V], 0.75, 1.25)
    assert_share(table.turns_V > 0, 0.3)
    for turns in (1, 2, 3):
        assert_share(table.turns_V == turns, 0.1)
    assert table.turns_V.max() == 3


def test_thick_slices_are_uniform_in_width_and_add_to_the_blurs_variance(table: ViewTable) -> None:
    thick_V = table.sigma_V3[:, 0].astype(np.float64)
    only_V = (table.sigma_V3[:, 1] == 0) & (thick_V > 0)
    assert_share(table.sigma_V3[:, 0] > table.sigma_V3[:, 1], 0.2)
    assert_uniform(thick_V[only_V] * 2 * np.sqrt(2 * np.log(2)), 1.0, 3.0)
    both_V = (table.sigma_V3[:, 1] > 0) & (table.sigma_V3[:, 0] > table.sigma_V3[:, 1])
    sigma_V3 = table.sigma_V3[both_V].astype(np.float64)
    width_V = np.sqrt(np.square(sigma_V3[:, 0]) - np.square(sigma_V3[:, 1]))
    assert_uniform(width_V * 2 * np.sqrt(2 * np.log(2)), 1.0, 3.0)


@pytest.mark.parametrize(("as_released", "expected"), [(False, (1.0, 0.1)), (True, (0.0, 0.9))])
def test_dinov2s_blur_can_be_as_meant_or_as_released(
    as_released: bool, expected: tuple[float, float]
) -> None:
    group = dataclasses.replace(GROUP, blur_prob=(1.0, 0.1))
    config = dataclasses.replace(CONFIG, blur_as_released=as_released)
    blurred_V = draw(group, config=config).sigma_V3[:, 1] > 0
    assert blurred_V[0] == (expected[0] == 1)
    assert_share(blurred_V[1:], expected[1])


def test_columns_are_independent_and_noise_keys_unique(table: ViewTable) -> None:
    columns = [
        extents(table)[:, 0],
        np.prod(extents(table)[:, 1:], axis=1),
        np.log(extents(table)[:, 1] / extents(table)[:, 2]),
        table.lo_V3[:, 0] > table.hi_V3[:, 0],
        table.window_V2[:, 0],
        table.gamma_V,
        table.contrast_V,
        table.turns_V,
        table.sigma_V3[:, 1],
        table.sigma_V3[:, 0] > table.sigma_V3[:, 1],
        table.noise_std_V,
        table.noise_key_V.astype(np.float64),
    ]
    correlation = np.corrcoef(np.stack(columns).astype(np.float64))
    assert np.abs(correlation - np.eye(len(columns))).max() < 4.5 / np.sqrt(NUM)
    assert len(np.unique(table.noise_key_V)) == NUM
    assert_uniform(table.noise_key_V.astype(np.float64), 0, 2.0**64)


def test_probability_zero_and_one_are_exact() -> None:
    off = ViewsConfig(
        flip_prob_zyx=(0, 0, 0),
        window_prob=0,
        gamma_prob=0,
        contrast_prob=0,
        thick_slice_prob=0,
        noise_prob=0,
    )
    plain = draw(dataclasses.replace(GROUP, blur_prob=(0, 0)), config=off)
    assert (plain.lo_V3 < plain.hi_V3).all()
    assert (plain.window_V2 == HU.clip).all()
    assert (plain.gamma_V == 1).all()
    assert (plain.contrast_V == 1).all()
    assert not plain.turns_V.any()
    assert not plain.sigma_V3.any()
    assert not plain.noise_std_V.any()
    on = ViewsConfig(
        flip_prob_zyx=(1, 1, 1),
        quarter_turn_prob=1,
        window_prob=1,
        gamma_prob=1,
        contrast_prob=1,
        thick_slice_prob=1,
        noise_prob=1,
    )
    full = draw(dataclasses.replace(GROUP, blur_prob=(1, 1)), config=on)
    assert (full.lo_V3 > full.hi_V3).all()
    assert (full.window_V2 != HU.clip).any(1).all()
    assert (full.turns_V > 0).all()
    assert (full.sigma_V3 > 0).all()
    assert (full.sigma_V3[:, 0] > full.sigma_V3[:, 1]).all()


def test_a_switched_off_change_leaves_the_other_columns_as_they_are(table: ViewTable) -> None:
    other = draw(GROUP, config=dataclasses.replace(CONFIG, gamma_prob=0.0, flip_prob_zyx=(0, 0, 0)))
    np.testing.assert_array_equal(np.minimum(table.lo_V3, table.hi_V3), other.lo_V3)
    for name in ("window_V2", "contrast_V", "sigma_V3", "noise_std_V", "noise_key_V"):
        np.testing.assert_array_equal(getattr(table, name), getattr(other, name))


def test_drawing_again_gives_the_same_bytes_and_another_stream_does_not() -> None:
    group = dataclasses.replace(GROUP, num=4)
    first, again, other = draw(group), draw(group), draw(group, seed=1)
    for name in ViewTable._fields:
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert first.lo_V3.tobytes() != other.lo_V3.tobytes()
    assert draw(dataclasses.replace(GROUP, num=0)).lo_V3.shape == (0, 3)


def test_views_of_a_known_sample_keep_their_golden_values() -> None:
    config, shape, spacing = ViewsConfig(), (40, 300, 320), (1.5, 0.8, 0.8)
    table = draw_views(
        config, config.global_views, HU, shape, spacing_mm=spacing, rng=generator(1, 2, 3, 0)
    )
    # rtol: exp and log may differ in the last float64 bit between platforms
    np.testing.assert_allclose(
        table.lo_V3, [[2.7571833, 29.569757, 8.654503], [11.156325, 5.6253867, 105.622444]], 2e-7
    )
    np.testing.assert_allclose(
        table.hi_V3, [[33.244644, 280.7407, 310.3826], [32.470306, 210.65033, 300.3971]], 2e-7
    )
    np.testing.assert_allclose(table.noise_std_V, [0, 0.028839465], 2e-7)
    assert table.noise_key_V.tolist() == [16213466030934259521, 13939780255571368175]
    local = draw_views(
        config, config.local_views, HU, shape, spacing_mm=spacing, rng=generator(1, 2, 3, 1)
    )
    np.testing.assert_allclose(local.lo_V3[0], [15.427025, 122.37448, 271.56845], 2e-7)
    np.testing.assert_allclose(local.hi_V3[0], [33.009468, 206.87926, 184.71533], 2e-7)
    np.testing.assert_allclose(
        local.window_V2[:2], [[-1062.1084, 679.08344], [-903.81604, 656.0835]], 2e-7
    )
    np.testing.assert_allclose(local.gamma_V[:2], [0.8687084, 1], 2e-7)

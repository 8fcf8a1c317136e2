"""Shape suffixes: V views, Z Y X voxels, 3 axes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.config import HuConfig, ViewGroupConfig, ViewsConfig, Zyx
from tapct_fast.data.reference import gaussian_noise, render
from tapct_fast.data.rng import generator
from tapct_fast.data.views import ViewTable, draw_views

HU = HuConfig()
# float32 against float64, in z-scores of values up to 3000 HU; measured over 240 views: 1.8e-6.
ATOL = 1e-5


def plain_table(
    lo: list[float],
    hi: list[float],
    *,
    window: tuple[float, float] = HU.clip,
    turns: int = 0,
    gamma: float = 1.0,
    contrast: float = 1.0,
    sigma: float = 0.0,
    sigma_z: float | None = None,
    noise_std: float = 0.0,
    noise_key: int = 0,
) -> ViewTable:
    return ViewTable(
        lo_V3=np.array([lo], dtype=np.float32),
        hi_V3=np.array([hi], dtype=np.float32),
        turns_V=np.array([turns], dtype=np.uint8),
        window_V2=np.array([window], dtype=np.float32),
        gamma_V=np.array([gamma], dtype=np.float32),
        contrast_V=np.array([contrast], dtype=np.float32),
        sigma_V3=np.array(
            [[sigma if sigma_z is None else sigma_z, sigma, sigma]], dtype=np.float32
        ),
        noise_std_V=np.array([noise_std], dtype=np.float32),
        noise_key_V=np.array([noise_key], dtype=np.uint64),
    )


def group_of(size_zyx: Zyx, *, antialias: bool = True) -> ViewGroupConfig:
    return ViewGroupConfig(
        num=1,
        size_zyx=size_zyx,
        in_plane_scale=(1.0, 1.0),
        depth_scale=(1.0, 1.0),
        antialias=antialias,
    )


def random_hu(shape_zyx: Zyx, seed: int = 0) -> Tensor:
    return torch.from_numpy(generator(seed).integers(-1024, 3072, shape_zyx).astype(np.int16))


def render_hu(hu_ZYX: Tensor, table: ViewTable, size_zyx: Zyx, hu: HuConfig = HU) -> Tensor:
    """Render one view and undo the z-score."""
    return render(hu_ZYX, table, group_of(size_zyx), hu)[0].double() * hu.std + hu.mean


# The oracle: float64, one loop per axis, written from the contract and not from the renderer.


def oracle_axis(
    x: NDArray[np.float64], axis: int, lo: float, hi: float, n: int, *, antialias: bool
) -> NDArray[np.float64]:
    x = np.moveaxis(x, axis, 0)
    rows = []
    for i in range(n):
        source = lo + (i + 0.5) / n * (hi - lo) - 0.5
        width = max(abs(hi - lo) / n, 1.0) if antialias else 1.0
        total, row = 0.0, np.zeros(x.shape[1:])
        for j in range(math.floor(source - width) - 1, math.ceil(source + width) + 2):
            weight = 1 - abs(j - source) / width
            if weight > 0:
                row += weight * x[min(max(j, 0), len(x) - 1)]
                total += weight
        rows.append(row / total)
    return np.moveaxis(np.stack(rows), 0, axis)


def oracle_blur(x: NDArray[np.float64], axis: int, sigma: float) -> NDArray[np.float64]:
    radius = math.ceil(3 * sigma)
    kernel = np.array([math.exp(-(t**2) / (2 * sigma**2)) for t in range(-radius, radius + 1)])
    pad = [(0, 0)] * 3
    pad[axis] = (radius, radius)
    padded = np.pad(x, pad, mode="reflect")  # numpy mirrors repeatedly, without the edge voxel
    return np.apply_along_axis(np.convolve, axis, padded, kernel / kernel.sum(), mode="valid")


def philox4x64(counter: int, key: int) -> list[int]:
    """Return four 64-bit words; ten rounds with the constants of Salmon et al. 2011."""
    word = (1 << 64) - 1
    c = [counter & word, 0, 0, 0]
    k = [key & word, 0]
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(right >> 64) ^ c[1] ^ k[0], right & word, (left >> 64) ^ c[3] ^ k[1], left & word]
        k = [(k[0] + 0x9E3779B97F4A7C15) & word, (k[1] + 0xBB67AE8584CAA73B) & word]
    return c


def oracle_noise(key: int, num_voxels: int) -> NDArray[np.float64]:
    noise = []
    for n in range(num_voxels):
        word = philox4x64(1 + n // 2 // 4, key)[n // 2 % 4]
        radius = math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32))
        angle = 2 * math.pi * (word & 0xFFFFFFFF) / 2**32
        noise.append(radius * (math.sin(angle) if n % 2 else math.cos(angle)))
    return np.array(noise)


def oracle_render(hu_ZYX: Tensor, table: ViewTable, group: ViewGroupConfig) -> NDArray[np.float64]:
    views = []
    for v in range(len(table.gamma_V)):
        x = hu_ZYX.numpy().astype(np.float64)
        for axis in range(3):
            lo, hi = float(table.lo_V3[v, axis]), float(table.hi_V3[v, axis])
            x = oracle_axis(x, axis, lo, hi, group.size_zyx[axis], antialias=group.antialias)
        for _ in range(int(table.turns_V[v])):
            x = x.transpose(0, 2, 1)[:, ::-1]
        low, high = table.window_V2[v].astype(np.float64)
        x = np.clip((x - low) / (high - low), 0, 1) ** float(table.gamma_V[v])
        x = np.clip((x - 0.5) * float(table.contrast_V[v]) + 0.5, 0, 1)
        for axis in range(3):
            if table.sigma_V3[v, axis]:
                x = oracle_blur(x, axis, float(table.sigma_V3[v, axis]))
        x = (HU.clip[0] + x * (HU.clip[1] - HU.clip[0]) - HU.mean) / HU.std
        if table.noise_std_V[v]:
            noise = oracle_noise(int(table.noise_key_V[v]), x.size).reshape(x.shape)
            x = x + float(table.noise_std_V[v]) * noise
        views.append(x)
    return np.stack(views)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("shape_zyx", "size_zyx"),
    [
        ((9, 40, 37), (4, 16, 16)),  # shrinks
        ((3, 12, 14), (8, 40, 24)),  # enlarges
        ((30, 11, 50), (5, 33, 20)),  # both; sizes that no block divides
        ((1, 1, 1), (4, 8, 8)),
        ((1, 30, 2), (2, 8, 8)),
    ],
)
def test_rendering_matches_the_float64_oracle(
    shape_zyx: Zyx, size_zyx: Zyx, antialias: bool
) -> None:
    config = ViewsConfig(
        flip_prob_zyx=(0.5, 0.5, 0.5),
        quarter_turn_prob=0.7 if size_zyx[1] == size_zyx[2] else 0.0,
        gamma_prob=0.7,
        contrast_prob=0.7,
        thick_slice_prob=0.5,
        noise_prob=0.5,
    )
    group = ViewGroupConfig(
        num=8,
        size_zyx=size_zyx,
        in_plane_scale=(0.1, 1.0),
        depth_scale=(0.3, 1.0),
        antialias=antialias,
        blur_prob=(0.7, 0.7),
    )
    table = draw_views(
        config, group, HU, shape_zyx, spacing_mm=(2.0, 1.0, 1.0), rng=generator(1, *shape_zyx)
    )
    hu_ZYX = random_hu(shape_zyx)
    views = render(hu_ZYX, table, group, HU)
    assert views.dtype == torch.float32
    assert views.shape == (8, *size_zyx)
    np.testing.assert_allclose(views.numpy(), oracle_render(hu_ZYX, table, group), atol=ATOL)


def test_the_oracles_philox_gives_the_published_answer() -> None:
    # Random123 kat_vectors: philox4x64 10, counter 0, key 0
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64(0, 0) == expected


def test_enlarging_the_whole_box_is_trilinear_interpolation() -> None:
    hu_ZYX = random_hu((5, 20, 17)).clamp(-1000, 800)
    expected = F.interpolate(hu_ZYX[None, None].double(), (12, 48, 40), mode="trilinear")[0, 0]
    actual = render_hu(hu_ZYX, plain_table([0, 0, 0], [5, 20, 17]), (12, 48, 40))
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0)  # HU; float32 of up to 1000


def test_a_view_between_voxels_matches_grid_sample() -> None:
    hu_ZYX = random_hu((6, 20, 20)).clamp(-1000, 800)
    lo, hi, size = [1.25, 15.5, 3.3], [4.75, 4.25, 11.1], (8, 16, 16)
    axes = [
        (a + (torch.arange(n).double() + 0.5) / n * (b - a)) / s * 2 - 1
        for a, b, n, s in zip(lo, hi, size, hu_ZYX.shape, strict=True)
    ]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([x, y, z], dim=-1)[None]
    expected = F.grid_sample(
        hu_ZYX[None, None].double(), grid, align_corners=False, padding_mode="border"
    )[0, 0]
    actual = render_hu(hu_ZYX, plain_table(lo, hi), size)
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0)


def test_shrinking_is_antialiased_as_in_torch_away_from_the_edge() -> None:
    hu_ZYX = random_hu((1, 90, 77)).clamp(-1000, 800)
    expected = F.interpolate(hu_ZYX[None].double(), (30, 22), mode="bilinear", antialias=True)[0]
    actual = render_hu(hu_ZYX, plain_table([0, 0, 0], [1, 90, 77]), (1, 30, 22))
    # At the edge torch drops the weights outside, the contract repeats the edge voxel.
    torch.testing.assert_close(actual[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=2e-3, rtol=0)


@pytest.mark.parametrize("sigma", [0.0, 0.8])
def test_a_constant_stays_constant(sigma: float) -> None:
    hu_ZYX = torch.full((7, 33, 29), 40, dtype=torch.int16)
    table = plain_table([0.5, 30.2, 1.1], [6.4, 3.3, 28.0], sigma=sigma)
    views = render(hu_ZYX, table, group_of((12, 24, 16)), HU)
    torch.testing.assert_close(
        views, torch.full_like(views, (40 - HU.mean) / HU.std), atol=ATOL, rtol=0
    )


@pytest.mark.parametrize("size_zyx", [(12, 64, 60), (3, 8, 5), (6, 16, 15)])
def test_a_linear_ramp_is_reproduced_exactly_inside(size_zyx: Zyx) -> None:
    # Enlarging and whole factors: for these a sampled triangle has the centre it should have.
    z, y, x = np.meshgrid(np.arange(18), np.arange(48), np.arange(45), indexing="ij")
    hu_ZYX = torch.from_numpy((8 * z - 6 * y + 4 * x).astype(np.int16))
    lo, hi = np.array([4.0, 12.0, 10.0]), np.array([10.0, 44.0, 25.0])
    hu = HuConfig(clip=(-2000.0, 2000.0))
    view_ZYX = render_hu(hu_ZYX, plain_table([*lo], [*hi], window=hu.clip), size_zyx, hu)
    at = [a + (np.arange(n) + 0.5) / n * (b - a) - 0.5 for a, b, n in zip(lo, hi, size_zyx)]  # noqa: B905
    grid_z, grid_y, grid_x = np.meshgrid(*at, indexing="ij")
    np.testing.assert_allclose(view_ZYX, 8 * grid_z - 6 * grid_y + 4 * grid_x, atol=2e-3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_reversed_bounds_flip_and_a_flip_of_a_flip_is_the_view(axis: int) -> None:
    hu_ZYX = random_hu((9, 40, 50))
    lo, hi = [1.3, 4.7, 6.1], [8.2, 35.5, 41.9]
    straight = render(hu_ZYX, plain_table(lo, hi), group_of((8, 24, 16)), HU)
    lo[axis], hi[axis] = hi[axis], lo[axis]
    flipped = render(hu_ZYX, plain_table(lo, hi), group_of((8, 24, 16)), HU)
    assert not torch.allclose(flipped, straight)
    torch.testing.assert_close(flipped.flip(axis + 1), straight, atol=ATOL, rtol=0)
    size = hu_ZYX.shape[axis]
    lo[axis], hi[axis] = size - hi[axis], size - lo[axis]  # reversed bounds in a reversed box
    twice = render(hu_ZYX.flip(axis), plain_table(lo, hi), group_of((8, 24, 16)), HU)
    torch.testing.assert_close(twice, straight, atol=ATOL, rtol=0)


def test_a_view_of_the_voxels_themselves_is_the_clipped_z_score() -> None:
    hu_ZYX = random_hu((4, 16, 24))
    views = render(hu_ZYX[:, 2:10], plain_table([0, 0, 4], [4, 8, 20]), group_of((4, 8, 16)), HU)
    expected = (hu_ZYX[:, 2:10, 4:20].clamp(*map(int, HU.clip)).double() - HU.mean) / HU.std
    torch.testing.assert_close(views[0].double(), expected, atol=ATOL, rtol=0)


def test_the_window_is_stretched_over_the_clip_range_and_gamma_acts_inside_it() -> None:
    hu_ZYX = torch.tensor([[[-1024, -400, -100, 200, 600, 3071]]], dtype=torch.int16)
    table = plain_table([0, 0, 0], [1, 1, 6], window=(-400.0, 600.0), gamma=2.0)
    unit = (render_hu(hu_ZYX, table, (1, 1, 6)) - HU.clip[0]) / (HU.clip[1] - HU.clip[0])
    expected = torch.tensor([0, 0, 0.09, 0.36, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(unit.flatten(), expected, atol=1e-6, rtol=0)


def test_contrast_turns_about_the_middle_of_the_clip_range() -> None:
    middle = (HU.clip[0] + HU.clip[1]) / 2
    hu_ZYX = torch.tensor([[[-1008, -593, -93, 407, 822]]], dtype=torch.int16)
    views = render_hu(hu_ZYX, plain_table([0, 0, 0], [1, 1, 5], contrast=1.5), (1, 1, 5))
    expected = (middle + 1.5 * (hu_ZYX.double() - middle)).clamp(*HU.clip)
    torch.testing.assert_close(views, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_view_is_the_view_turned_and_its_noise_stays(turns: int) -> None:
    hu_ZYX, size_zyx = random_hu((4, 30, 30)), (4, 16, 16)
    lo, hi = [0.0, 3.0, 2.0], [4.0, 25.0, 28.0]
    straight = render_hu(hu_ZYX, plain_table(lo, hi, sigma=0.7, sigma_z=1.2), size_zyx)
    table = plain_table(lo, hi, sigma=0.7, sigma_z=1.2, turns=turns, noise_std=0.1, noise_key=3)
    noise = gaussian_noise(3, 4 * 16 * 16).view(size_zyx).double() * 0.1 * HU.std
    torch.testing.assert_close(
        render_hu(hu_ZYX, table, size_zyx) - noise,
        straight.rot90(turns, dims=(1, 2)),
        atol=5e-3,
        rtol=0,
    )


def test_a_thick_slice_blurs_across_slices_only() -> None:
    hu_ZYX = torch.full((9, 15, 15), -1008, dtype=torch.int16)
    hu_ZYX[4, 7, 7] = 822
    table = plain_table([0, 0, 0], [9, 15, 15], sigma=0.0, sigma_z=0.9)
    unit_ZYX = (render_hu(hu_ZYX, table, (9, 15, 15)) + 1008) / 1830
    assert unit_ZYX[:, 7, 7].sum().item() == pytest.approx(1.0, abs=1e-5)
    near = unit_ZYX[5, 7, 7] / unit_ZYX[4, 7, 7]
    assert near.item() == pytest.approx(math.exp(-0.5 / 0.81), rel=1e-4)
    assert unit_ZYX[4, 7, 6].abs() < 1e-6


def test_blur_spreads_a_point_like_a_gaussian_and_keeps_its_mass() -> None:
    hu_ZYX = torch.full((9, 15, 15), -1008, dtype=torch.int16)
    hu_ZYX[4, 7, 7] = 822
    unit_ZYX = (
        render_hu(hu_ZYX, plain_table([0, 0, 0], [9, 15, 15], sigma=0.9), (9, 15, 15)) + 1008
    ) / 1830
    # float32 keeps zero as -1008 HU to 6e-5 HU; the sum over 2025 voxels adds that up
    assert unit_ZYX.sum().item() == pytest.approx(1.0, abs=1e-4)
    for step in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        near = unit_ZYX[4 + step[0], 7 + step[1], 7 + step[2]] / unit_ZYX[4, 7, 7]
        assert near.item() == pytest.approx(math.exp(-0.5 / 0.81), rel=1e-4)
    assert unit_ZYX[4, 7, 7 + 3] > 0  # radius ceil(3 * 0.9) = 3
    assert unit_ZYX[4, 7, 7 + 4].abs() < 1e-6


def test_noise_is_addressed_by_key_and_voxel() -> None:
    key = 16213466030934259521
    np.testing.assert_allclose(gaussian_noise(key, 101), oracle_noise(key, 101), atol=2e-6)
    torch.testing.assert_close(gaussian_noise(key, 1000)[:101], gaussian_noise(key, 101))


def test_noise_is_standard_normal_and_independent_between_keys() -> None:
    n = 200_000
    a, b = (gaussian_noise(key, n).double().numpy() for key in (1, 2))
    assert abs(a.mean()) < 4 / math.sqrt(n)
    assert abs(a.std() - 1) < 4 / math.sqrt(2 * n)
    for other in (b, np.roll(a, 1), np.roll(a, 2)):
        assert abs((a * other).mean()) < 4 / math.sqrt(n)
    u = np.sort([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in a])
    assert np.abs(u - np.arange(n) / n).max() < 1.95 / math.sqrt(n)  # KS at p = 0.001


def test_noise_is_added_last_and_does_not_follow_the_flip() -> None:
    hu_ZYX = random_hu((4, 16, 16))
    lo, hi = [0.0, 0, 0], [4.0, 16, 16]
    noisy = plain_table(lo, hi, noise_std=0.1, noise_key=9)
    noise = render(hu_ZYX, noisy, group_of((4, 16, 16)), HU) - render(
        hu_ZYX, plain_table(lo, hi), group_of((4, 16, 16)), HU
    )
    torch.testing.assert_close(noise.flatten(), 0.1 * gaussian_noise(9, 1024), atol=ATOL, rtol=0)


def test_the_same_arguments_give_the_same_bytes_on_any_number_of_threads() -> None:
    config = ViewsConfig(gamma_prob=1, contrast_prob=1, thick_slice_prob=1, noise_prob=1)
    group = ViewGroupConfig(
        num=2,
        size_zyx=(12, 96, 96),
        in_plane_scale=(0.3, 1),
        depth_scale=(0.5, 1),
        blur_prob=(1, 1),
    )
    shape_zyx = (30, 200, 210)
    table = draw_views(config, group, HU, shape_zyx, spacing_mm=(2.0, 1.0, 1.0), rng=generator(0))
    hu_ZYX = random_hu(shape_zyx)
    before = hu_ZYX.clone()
    first = render(hu_ZYX, table, group, HU)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(render(hu_ZYX, table, group, HU), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(hu_ZYX, before)


def test_a_view_does_not_depend_on_the_views_beside_it() -> None:
    config = ViewsConfig(gamma_prob=0.5, contrast_prob=0.5, noise_prob=0.5)
    group = ViewGroupConfig(
        num=6, size_zyx=(4, 16, 16), in_plane_scale=(0.1, 1), depth_scale=(0.3, 1)
    )
    table = draw_views(config, group, HU, (9, 40, 40), spacing_mm=(1, 1, 1), rng=generator(2))
    hu_ZYX = random_hu((9, 40, 40))
    together = render(hu_ZYX, table, group, HU)
    for v in range(6):
        alone = ViewTable(*(column[v : v + 1] for column in table))
        assert torch.equal(render(hu_ZYX, alone, group, HU)[0], together[v])


@pytest.mark.parametrize("fill", [-32768, -1024, 3071, 32767])
def test_no_legal_setting_makes_a_view_that_is_not_finite(fill: int) -> None:
    config = ViewsConfig(
        window_prob=1,
        window_shift=0.499,
        gamma_prob=1,
        gamma=(0.1, 10.0),
        contrast_prob=1,
        contrast=(0.1, 10.0),
        thick_slice_prob=1,
        thick_slices=(0.1, 20.0),
        blur_sigma=(0.01, 10.0),
        noise_prob=1,
        noise_std=(0.0, 10.0),
    )
    group = ViewGroupConfig(
        num=40,
        size_zyx=(3, 7, 5),
        in_plane_scale=(1e-4, 1.0),
        depth_scale=(1e-4, 1.0),
        blur_prob=(1, 1),
    )
    for shape_zyx in [(1, 1, 1), (2, 50, 1), (40, 3, 9)]:
        hu_ZYX = torch.full(shape_zyx, fill, dtype=torch.int16)
        hu_ZYX[0, 0, 0] = 0
        table = draw_views(
            config, group, HU, shape_zyx, spacing_mm=(1, 1, 1), rng=generator(*shape_zyx)
        )
        assert torch.isfinite(render(hu_ZYX, table, group, HU)).all()


@pytest.mark.gpu
def test_rendering_on_a_gpu_matches_the_cpu() -> None:
    config = ViewsConfig(gamma_prob=0.5, contrast_prob=0.5, noise_prob=0.5)
    group = ViewGroupConfig(
        num=8, size_zyx=(12, 96, 96), in_plane_scale=(0.1, 1), depth_scale=(0.3, 1)
    )
    table = draw_views(config, group, HU, (30, 200, 210), spacing_mm=(2, 1, 1), rng=generator(0))
    hu_ZYX = random_hu((30, 200, 210))
    views = render(hu_ZYX.cuda(), table, group, HU)
    expected = render(hu_ZYX, table, group, HU)
    torch.testing.assert_close(views.cpu(), expected, atol=ATOL, rtol=0)

"""Slices put on an even grid stay where the patient was: held to fields and spheres in the world."""

import math
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.orient import shear_deg, spacing_of
from tapct_fast.io.regrid import AIR_HU, EvenGrid, even_grid, straighten

PIXEL = (0.8, 0.6)  # y, x mm
TILT = math.tan(math.radians(18.5))
UNEVEN = np.array([0.0, 1.0, 2.0, 3.5, 5.0, 6.0, 9.0, 10.0, 11.25])
GE_GAPS = np.repeat([1.081, 4.002, 6.999], [2, 15, 10])  # of a real tilted head CT of 28 slices


def lean(position_N: np.ndarray, y: float = TILT, x: float = 0.0) -> np.ndarray:
    return np.stack([position_N * y, position_N * x], axis=1)


def scan(field, position_N: np.ndarray, shift_N2: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return what slices at these places measure of a field of z, y, x millimetres."""
    y_Y, x_X = (np.arange(num) * mm for num, mm in zip(size, PIXEL, strict=True))
    slices = [
        np.rint(field(z, (y_Y + y)[:, None], (x_X + x)[None, :]))
        for z, (y, x) in zip(position_N, shift_N2, strict=True)
    ]
    return np.stack(slices).astype(np.int16)


def places(grid: EvenGrid, shift_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the world z, y, x millimetres of every voxel of the grid."""
    origin = np.array(grid.offset_zyx_mm) + (0.0, *shift_N2[0])
    return tuple(
        o + s * i
        for o, s, i in zip(origin, grid.spacing_mm, np.indices(grid.hu_ZYX.shape), strict=True)
    )


def reference(hu_ZYX, position_N, shift_N2, zyx_mm) -> tuple[np.ndarray, np.ndarray]:
    """Sample the slices point by point in float64; say which points were measured."""
    z, y, x = (axis.ravel() for axis in zyx_mm)
    below = np.clip(np.searchsorted(position_N, z, side="right") - 1, 0, len(position_N) - 2)
    w = (z - position_N[below]) / (position_N[below + 1] - position_N[below])
    values, measured = np.zeros(z.size), np.ones(z.size, bool)
    for k, weight in ((below, 1 - w), (below + 1, w)):
        row, column = (y - shift_N2[k, 0]) / PIXEL[0], (x - shift_N2[k, 1]) / PIXEL[1]
        inside = np.ones(z.size, bool)
        for place, size in ((row, hu_ZYX.shape[1]), (column, hu_ZYX.shape[2])):
            inside &= (place > -1e-6) & (place < size - 1 + 1e-6)
        measured &= inside | (weight < 1e-6)
        y0 = np.clip(np.floor(row + 1e-6).astype(int), 0, hu_ZYX.shape[1] - 2)
        x0 = np.clip(np.floor(column + 1e-6).astype(int), 0, hu_ZYX.shape[2] - 2)
        fy, fx = row - y0, column - x0
        for dy, wy in ((0, 1 - fy), (1, fy)):
            for dx, wx in ((0, 1 - fx), (1, fx)):
                values += weight * wy * wx * hu_ZYX[k, y0 + dy, x0 + dx]
    shape = zyx_mm[0].shape
    return values.reshape(shape), measured.reshape(shape)


def test_an_even_upright_stack_is_returned_itself() -> None:
    hu_ZYX = np.arange(60, dtype=np.int16).reshape(5, 3, 4)
    grid = even_grid(
        hu_ZYX,
        position_mm_N=-7.0 + 2.5 * np.arange(5),
        shift_yx_mm_N2=np.tile([3.0, -2.0], (5, 1)),
        pixel_spacing_mm=PIXEL,
    )
    assert grid.hu_ZYX is hu_ZYX
    assert grid.spacing_mm == pytest.approx((2.5, 0.8, 0.6))
    assert grid.offset_zyx_mm == (0.0, 0.0, 0.0)
    assert grid.num_filled == 0


@pytest.mark.parametrize("position_N", [UNEVEN, np.r_[0.0, np.cumsum(GE_GAPS)]])
@pytest.mark.parametrize("leans", [(0.0, 0.0), (TILT, 0.0), (-TILT, 0.0), (0.2137, -0.1311)])
def test_every_voxel_equals_a_float64_reference_or_is_air_and_counted(position_N, leans) -> None:
    shift_N2 = lean(position_N, *leans)
    hu_ZYX = np.random.default_rng(3).integers(-1000, 2000, (len(position_N), 14, 11), np.int16)
    grid = even_grid(
        hu_ZYX, position_mm_N=position_N, shift_yx_mm_N2=shift_N2, pixel_spacing_mm=PIXEL
    )
    values, measured = reference(hu_ZYX, position_N, shift_N2, places(grid, shift_N2))
    assert measured.any()
    np.testing.assert_array_equal(grid.hu_ZYX[~measured], AIR_HU)
    assert grid.num_filled == (~measured).sum()
    # A value within rounding of one half may fall to either side.
    error = np.abs(grid.hu_ZYX[measured] - values[measured])
    assert error.max() <= 0.5 + 1e-9


@pytest.mark.parametrize("leans", [(0.0, 0.0), (TILT, 0.1)])
def test_a_linear_field_is_exact_up_to_its_rounding(leans) -> None:
    def field(z, y, x):
        return 30.0 * z - 11.0 * y + 5.0 * x - 200.0

    shift_N2 = lean(UNEVEN, *leans)
    grid = even_grid(
        scan(field, UNEVEN, shift_N2, (20, 24)),
        position_mm_N=UNEVEN,
        shift_yx_mm_N2=shift_N2,
        pixel_spacing_mm=PIXEL,
    )
    zyx_mm = places(grid, shift_N2)
    _, measured = reference(np.zeros((9, 20, 24), np.int16), UNEVEN, shift_N2, zyx_mm)
    # Half a unit from rounding the slices, half from rounding the result.
    error = np.abs(grid.hu_ZYX - field(*zyx_mm))[measured]
    assert error.max() <= 1.0


def test_the_first_and_last_slice_and_all_pixel_centres_are_inside() -> None:
    shift_N2 = lean(UNEVEN, -TILT)
    hu_ZYX = np.full((9, 8, 8), 77, np.int16)
    grid = even_grid(hu_ZYX, position_mm_N=UNEVEN, shift_yx_mm_N2=shift_N2, pixel_spacing_mm=PIXEL)
    assert grid.spacing_mm[0] * (len(grid.hu_ZYX) - 1) == pytest.approx(11.25)
    z, y, x = places(grid, shift_N2)
    y_centres = shift_N2[:, :1] + 0.8 * np.arange(8)
    assert y.min() <= y_centres.min() + 1e-9
    assert y.max() >= y_centres.max() - 1e-9
    assert (z.min(), z.max(), x.min()) == pytest.approx((0.0, 11.25, 0.0))
    # The first slice has the largest shift and is met exactly; the last lies at the grid's start.
    assert (grid.hu_ZYX[-1, :8] == 77).all()
    assert (grid.hu_ZYX[0] == 77).sum() == 7 * 8  # between pixel centres: one row fewer
    assert set(np.unique(grid.hu_ZYX)) == {AIR_HU, 77}


@pytest.mark.parametrize("leans", [(0.0, 0.0), (TILT, 0.0)])
def test_a_sphere_keeps_its_centre_and_volume(leans) -> None:
    centre, radius = np.array([15.0, 18.0, 14.0]), 9.0

    def field(z, y, x):
        distance = np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)
        return 1000.0 * np.clip(radius - distance + 0.5, 0, 1)  # edges as wide as a pixel

    position_N = np.cumsum(np.random.default_rng(1).uniform(0.7, 1.3, 30))
    shift_N2 = lean(position_N, *leans) - (4.0 if leans[0] else 0.0)
    grid = even_grid(
        scan(field, position_N, shift_N2, (48, 50)),
        position_mm_N=position_N,
        shift_yx_mm_N2=shift_N2,
        pixel_spacing_mm=PIXEL,
    )
    z, y, x = places(grid, shift_N2)
    mass_ZYX = np.maximum(grid.hu_ZYX, 0) / 1000.0
    volume = mass_ZYX.sum() * math.prod(grid.spacing_mm)
    found = [(mass_ZYX * axis).sum() / mass_ZYX.sum() for axis in (z + position_N[0], y, x)]
    assert volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.01)
    np.testing.assert_allclose(found, centre, atol=0.05)


@pytest.mark.parametrize(
    ("gaps", "num", "step"),
    [
        ([1.0, 1.0, 2.0, 1.0], 6, 1.0),  # the smallest gap fits
        ([0.9, 1.0, 2.0, 1.0], 7, 4.9 / 6),  # made a little smaller to meet the last slice
        (list(GE_GAPS), 35, GE_GAPS.sum() / 34),  # 1.081 mm would be 122 slices: the median
        ([1.0, 1.0, 1.0, 100.0], 5, 103 / 4),  # even the median is too fine: as many as before
        ([1e-9, 3.0, 3.0], 3, 3.0),
    ],
)
def test_the_slice_spacing_loses_no_detail_unless_it_doubles_the_slices(gaps, num, step) -> None:
    position_N = np.r_[0.0, np.cumsum(gaps)]
    hu_ZYX = np.zeros((len(position_N), 4, 4), np.int16)
    grid = even_grid(
        hu_ZYX,
        position_mm_N=position_N,
        shift_yx_mm_N2=np.zeros((len(position_N), 2)),
        pixel_spacing_mm=PIXEL,
    )
    assert len(grid.hu_ZYX) == num
    assert grid.spacing_mm[0] == pytest.approx(step)


def test_a_wanted_slice_spacing_is_kept_and_nothing_lies_beyond_the_last_slice() -> None:
    hu_ZYX = np.arange(9, dtype=np.int16)[:, None, None] * np.ones((1, 4, 4), np.int16)
    grid = even_grid(
        hu_ZYX,
        position_mm_N=UNEVEN,
        shift_yx_mm_N2=np.zeros((9, 2)),
        pixel_spacing_mm=PIXEL,
        slice_spacing_mm=2.5,
    )
    assert grid.spacing_mm[0] == 2.5
    assert grid.num_filled == 0
    # At 2.5, 5, 7.5, 10 mm: 2.5 lies a third of the way from slice 2 to 3, and so on.
    np.testing.assert_array_equal(grid.hu_ZYX[:, 0, 0], np.rint([0, 2.333, 4, 5.5, 7]))


def test_halves_are_rounded_to_even() -> None:
    hu_ZYX = np.array([[[0, 1, -1, 2]], [[1, 2, -2, 5]]], np.int16) * np.ones((1, 2, 1), np.int16)
    grid = even_grid(
        hu_ZYX,
        position_mm_N=np.array([0.0, 2.0]),
        shift_yx_mm_N2=np.zeros((2, 2)),
        pixel_spacing_mm=PIXEL,
        slice_spacing_mm=1.0,
    )
    np.testing.assert_array_equal(grid.hu_ZYX[1, 0], [0, 2, -2, 4])  # of 0.5, 1.5, -1.5, 3.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_mm_N": np.array([0.0, 2.0, 1.0])}, "increase"),
        ({"position_mm_N": np.array([0.0, 1.0, 1.0])}, "increase"),
        ({"position_mm_N": np.array([0.0, 1.0, np.nan])}, "finite"),
        ({"position_mm_N": np.arange(4.0)}, "one position"),
        ({"shift_yx_mm_N2": np.full((3, 2), np.inf)}, "finite"),
        ({"pixel_spacing_mm": (0.0, 1.0)}, "positive"),
        ({"slice_spacing_mm": -1.0}, "positive"),
        ({"slice_spacing_mm": 0.0}, "positive"),
    ],
)
def test_arguments_that_are_no_stack_of_slices_are_refused(change, words) -> None:
    good = {
        "position_mm_N": np.arange(3.0),
        "shift_yx_mm_N2": np.zeros((3, 2)),
        "pixel_spacing_mm": PIXEL,
    }
    with pytest.raises(InputError, match=words):
        even_grid(np.zeros((3, 4, 4), np.int16), **{**good, **change})


@pytest.mark.parametrize("far", [1e6, 1e300])
def test_a_grid_larger_than_any_scan_is_refused_before_it_is_made(far: float) -> None:
    tracemalloc.start()
    with pytest.raises(FormatError, match="too many") as caught:
        even_grid(
            np.zeros((3, 64, 64), np.int16),
            position_mm_N=np.arange(3.0),
            shift_yx_mm_N2=np.array([[0.0, 0.0], [0.0, 0.0], [far, far]]),
            pixel_spacing_mm=PIXEL,
        )
    assert caught.value.code == "limit"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_memory_beyond_the_result_is_a_few_slices() -> None:
    hu_ZYX = np.zeros((40, 256, 256), np.int16)
    position_N = np.arange(40.0) + 0.2 * (np.arange(40) % 2)
    tracemalloc.start()
    grid = even_grid(
        hu_ZYX,
        position_mm_N=position_N,
        shift_yx_mm_N2=lean(position_N),
        pixel_spacing_mm=PIXEL,
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - grid.hu_ZYX.nbytes < 8 * 8 * 256 * 256  # float64


def sheared_affine(lean_xyz_mm: tuple[float, float, float]) -> np.ndarray:
    """Return an oblique left-handed affine (as LPS arrays have) whose z axis leans."""
    angle = math.radians(16.5)
    turn = np.array(
        [[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]]
    )
    own = np.array([[-0.6, 0, lean_xyz_mm[0]], [0, -0.8, lean_xyz_mm[1]], [0, 0, lean_xyz_mm[2]]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ own
    affine[:3, 3] = 12.0, -30.0, 7.0
    return affine


@pytest.mark.parametrize("lean_mm", [(0.0, 2.0 * TILT, 2.0), (0.3, -0.4, 1.5), (0.2, 0.5, -2.0)])
def test_a_straightened_volume_shows_the_same_field_at_the_same_world_points(lean_mm) -> None:
    affine = sheared_affine(lean_mm)
    gradient = np.array([4.0, -7.0, 9.0])  # HU per mm along world x, y, z
    z, y, x = np.indices((9, 22, 20))
    index_ZYX4 = np.stack([x, y, z, np.ones_like(x)], axis=-1)
    hu_ZYX = np.rint((index_ZYX4 @ affine.T)[..., :3] @ gradient).astype(np.int16)

    got = straighten(hu_ZYX, affine)

    assert shear_deg(got.affine) < 1e-9
    assert np.linalg.det(got.affine[:3, :3]) * np.linalg.det(affine[:3, :3]) > 0
    np.testing.assert_allclose(got.affine[:3, :2], affine[:3, :2])
    z, y, x = np.indices(got.hu_ZYX.shape)
    world = (np.stack([x, y, z, np.ones_like(x)], axis=-1) @ got.affine.T)[..., :3]
    is_air = got.hu_ZYX == AIR_HU
    assert is_air.sum() == got.num_filled < 0.5 * got.hu_ZYX.size
    error = np.abs(got.hu_ZYX - world @ gradient)[~is_air]
    assert error.max() <= 1.0  # two roundings


@pytest.mark.parametrize(
    ("affine", "code"),
    [
        (sheared_affine((0.0, 0.0, 0.0)), "orientation"),  # no length
        (sheared_affine((0.5, 0.2, 0.0)), "orientation"),  # z within the plane
        (np.full((4, 4), np.nan), "orientation"),
        (np.eye(3), "orientation"),
        (np.diag([0.0, 1.0, 1.0, 1.0]), "orientation"),
        (
            np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
            "shear",
        ),
    ],
)
def test_an_affine_that_no_tilt_makes_is_refused(affine, code) -> None:
    with pytest.raises(FormatError) as caught:
        straighten(np.zeros((3, 4, 4), np.int16), affine)
    assert caught.value.field == "sform"
    assert caught.value.code == code


def test_one_slice_cannot_be_straightened() -> None:
    with pytest.raises(FormatError, match="one slice"):
        straighten(np.zeros((1, 4, 4), np.int16), np.eye(4))


def test_the_sheared_phantom_stands_upright_at_the_same_world_points(real_ct: Path) -> None:
    path = real_ct / "nifti" / "philips_phantom_sheared_sform_tilt-18.5_int16.nii.gz"
    image = nibabel.load(path)
    hu_ZYX = np.ascontiguousarray(np.asanyarray(image.dataobj).T).astype(np.int16)
    affine = np.array(image.affine)
    assert shear_deg(affine) == pytest.approx(18.5, abs=0.1)

    got = straighten(hu_ZYX, affine)

    assert shear_deg(got.affine) < 1e-6
    assert len(got.hu_ZYX) == len(hu_ZYX)
    assert spacing_of(got.affine)[1:] == pytest.approx(spacing_of(affine)[1:])
    # Points in the world, drawn inside the scan, read from the old and the new grid by nearest
    # voxel along z (whose planes coincide) and linear interpolation within the plane.
    rng = np.random.default_rng(0)
    for z in range(len(hu_ZYX)):
        xy = rng.uniform(40, 470, (200, 2))
        world = np.c_[xy, np.full(200, z), np.ones(200)] @ affine.T
        new = (world @ np.linalg.inv(got.affine).T)[:, :3]
        np.testing.assert_allclose(new[:, 2], z, atol=1e-6)
        before = in_plane(hu_ZYX[z], xy[:, 1], xy[:, 0])
        after = in_plane(got.hu_ZYX[z], new[:, 1], new[:, 0])
        # Interpolating twice smooths noise; the mean over the points stays.
        assert abs((before - after).mean()) < 8.0
        assert np.corrcoef(before, after)[0, 1] > 0.97


def in_plane(hu_SS: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    y, x = np.floor(row).astype(int), np.floor(column).astype(int)
    fy, fx = row - y, column - x
    top = hu_SS[y, x] * (1 - fx) + hu_SS[y, x + 1] * fx
    return top * (1 - fy) + (hu_SS[y + 1, x] * (1 - fx) + hu_SS[y + 1, x + 1] * fx) * fy

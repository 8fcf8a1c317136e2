import itertools

import numpy as np
import pytest

from tapct_fast.errors import FormatError
from tapct_fast.io.orient import check_affine, shear_deg, spacing_of, to_lps

RNG = np.random.default_rng(0)
SPACING_XYZ = (0.7, 0.9, 3.0)

# Every way an axial-first array can be stored: 6 orders of the axes times 8 flips.
LAYOUTS = list(
    itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
)


def rotation(angles_deg: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(angles_deg)):
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def stored(order: tuple[int, ...], signs: tuple[int, ...], angles_deg=(0.0, 0.0, 0.0)):
    """Return an array and the affine of one storage layout; world axis order[i] is voxel axis i."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for voxel, world in enumerate(order):
        affine[world, voxel] = signs[voxel] * SPACING_XYZ[voxel]
    affine[:3, :3] = rotation(angles_deg) @ affine[:3, :3]
    affine[:3, 3] = (11.0, -7.0, 5.0)
    return RNG.integers(-1000, 1000, (4, 5, 6)).astype(np.int16), affine


@pytest.mark.parametrize(("order", "signs"), LAYOUTS)
@pytest.mark.parametrize("angles_deg", [(0.0, 0.0, 0.0), (14.0, -9.0, 21.0)])
def test_every_layout_turns_to_lps_with_each_voxel_in_its_place(
    order: tuple[int, ...], signs: tuple[int, ...], angles_deg: tuple[float, float, float]
) -> None:
    array_zyx, affine = stored(order, signs, angles_deg)
    turned_ZYX, lps = to_lps(array_zyx, affine)
    assert turned_ZYX.flags.c_contiguous
    assert sorted(turned_ZYX.shape) == sorted(array_zyx.shape)

    # Independent of permutations: every voxel is found again through the world.
    z, y, x = np.indices(turned_ZYX.shape).reshape(3, -1)
    world = lps @ np.stack([x, y, z, np.ones_like(x)])
    old_x, old_y, old_z = np.rint(np.linalg.inv(affine) @ world)[:3].astype(int)
    np.testing.assert_array_equal(turned_ZYX[z, y, x], array_zyx[old_z, old_y, old_x])
    np.testing.assert_allclose(affine @ [*np.stack([old_x, old_y, old_z]), np.ones_like(x)], world)
    # To Left, Posterior, Superior, and never a mirror image.
    assert (np.diag(lps)[:3] * (-1, -1, 1) > 0).all()
    assert np.linalg.det(lps[:3, :3]) > 0


def test_a_canonical_axial_scan_is_left_as_it_is() -> None:
    array_zyx = RNG.integers(0, 9, (2, 3, 4)).astype(np.int16)
    affine = np.diag([-0.7, -0.8, 2.0, 1.0])
    turned_ZYX, lps = to_lps(array_zyx, affine)
    np.testing.assert_array_equal(turned_ZYX, array_zyx)
    np.testing.assert_array_equal(lps, affine)
    assert spacing_of(lps) == (2.0, 0.8, 0.7)


def test_shear_is_measured_in_degrees() -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[1, 2] = 3 * np.tan(np.radians(18.5))
    assert shear_deg(affine) == pytest.approx(18.5)
    with pytest.raises(FormatError, match=r"sform: sheared by 18.50 degrees.*resample"):
        check_affine(affine, field="sform")
    affine[1, 2] = 3 * np.tan(np.radians(0.09))
    check_affine(affine)


def _with(place: tuple[int, int], value: float) -> np.ndarray:
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[place] = value
    return affine


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.eye(3), "not \\(4, 4\\)"),
        (_with((0, 3), np.nan), "NaN"),
        (_with((1, 1), np.inf), "NaN"),
        (_with((2, 2), 0.0), "singular"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "singular"),
        (_with((3, 0), 1.0), "last row"),
        (_with((0, 0), 0.0008), "0.0008 mm is not that of a CT"),
        (_with((2, 2), 500.0), "500 x 1 x 1 mm is not"),
    ],
)
def test_an_affine_without_a_regular_grid_is_refused(affine: np.ndarray, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        check_affine(affine)

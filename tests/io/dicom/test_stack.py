import re

import numpy as np
import pytest

from tapct_fast.io.dicom.stack import stack_slices


def oblique_stack(num: int, step_mm: float, angle_deg: float = 20.0):
    """Return positions, orientations and pixel spacings of a stack turned about x."""
    angle = np.radians(angle_deg)
    row, column = np.array([1.0, 0, 0]), np.array([0, np.cos(angle), np.sin(angle)])
    normal = np.array([0, -np.sin(angle), np.cos(angle)])
    position_N3 = np.array([10.0, 20, 30]) + step_mm * np.arange(num)[:, None] * normal
    orientation_N6 = np.tile(np.concatenate([row, column]), (num, 1))
    return position_N3, orientation_N6, np.tile([0.8, 0.6], (num, 1))


def test_the_affine_places_each_pixel_as_the_standard_says() -> None:
    position_N3, orientation_N6, spacing_N2 = oblique_stack(5, 2.0)
    shuffle = [3, 0, 4, 1, 2]
    stack = stack_slices(position_N3[shuffle], orientation_N6, spacing_N2)
    assert [shuffle[index] for index in stack.order] == [0, 1, 2, 3, 4]
    # PS3.3 C.7.6.2.1-1: P = S + X * dj * j + Y * di * i, in LPS; RAS negates x and y.
    for z, y, x in [(0, 0, 0), (4, 3, 2), (2, 7, 11)]:
        lps = position_N3[z] + orientation_N6[0, :3] * 0.6 * x + orientation_N6[0, 3:] * 0.8 * y
        ras = stack.affine @ [x, y, z, 1]
        np.testing.assert_allclose(ras[:3], lps * (-1, -1, 1), atol=1e-9)


def test_positions_rounded_to_two_digits_still_form_a_grid() -> None:
    position_N3, orientation_N6, spacing_N2 = oblique_stack(200, 0.625, angle_deg=0.0)
    stack = stack_slices(position_N3.round(2), orientation_N6, spacing_N2)
    assert stack.affine[2, 2] == pytest.approx(0.625, abs=1e-4)


def test_one_missing_slice_of_many_is_found() -> None:
    position_N3, orientation_N6, spacing_N2 = oblique_stack(300, 1.0)
    for missing in (1, 150, 298):
        keep = np.delete(np.arange(300), missing)
        stack = stack_slices(position_N3[keep], orientation_N6[keep], spacing_N2[keep])
        (problem,) = stack.problems
        assert (problem.severity, problem.code) == ("refuse", "missing_slices")
        assert re.search(rf"1 slice.* 2.000 mm after slice {missing} of 299", problem.reason)


def test_a_tilt_is_named_with_its_angle_and_a_trace_of_it_passes() -> None:
    position_N3, orientation_N6, spacing_N2 = oblique_stack(10, 5.0, angle_deg=0.0)
    for tilt_deg, is_refused in [(0.05, False), (0.5, True), (-18.5, True)]:
        leaning_N3 = position_N3.copy()
        leaning_N3[:, 1] += np.tan(np.radians(tilt_deg)) * 5.0 * np.arange(10)
        problems = stack_slices(leaning_N3, orientation_N6, spacing_N2).problems
        if is_refused:
            assert [(p.severity, p.code) for p in problems] == [("mend", "tilt")]
            assert f"leans {abs(tilt_deg):.2f} degrees" in problems[0].reason
        else:
            assert problems == ()


def test_all_faults_of_the_positions_are_told_at_once() -> None:
    position_N3, orientation_N6, spacing_N2 = oblique_stack(6, 5.0, angle_deg=0.0)
    position_N3[4:, 2] += 1.7
    position_N3[:, 1] += 0.4 * position_N3[:, 2]
    tilt, uneven = stack_slices(position_N3, orientation_N6, spacing_N2).problems
    assert "gantry tilt" in tilt.reason
    assert "uneven slice spacing, 5.000 to 6.700 mm" in uneven.reason
    assert (uneven.severity, uneven.code) == ("mend", "uneven_spacing")

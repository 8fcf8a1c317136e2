import numpy as np
import pytest

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.volume import Volume, to_int16


def test_a_volume_refuses_parts_that_do_not_fit() -> None:
    hu_ZYX = np.zeros((2, 3, 4), np.int16)
    Volume(hu_ZYX=hu_ZYX, spacing_mm=(1.0, 1.0, 1.0), affine=np.eye(4))
    for wrong, words in [
        ({"hu_ZYX": hu_ZYX.astype(np.float32)}, "give int16"),
        ({"hu_ZYX": hu_ZYX[0]}, "2 axes"),
        ({"hu_ZYX": hu_ZYX.transpose(2, 1, 0)}, "ascontiguousarray"),
        ({"affine": np.eye(3)}, r"\(4, 4\)"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "positive"),
        ({"spacing_mm": (1.0, float("nan"), 1.0)}, "positive"),
    ]:
        parts = {"hu_ZYX": hu_ZYX, "spacing_mm": (1.0, 1.0, 1.0), "affine": np.eye(4), **wrong}
        with pytest.raises(InputError, match=words):
            Volume(**parts)


def test_values_are_rounded_to_the_nearest_integer() -> None:
    values = np.array([-1024.4, -0.6, 0.4, 3071.7, 32767.4, -32768.4])
    expected = [-1024, -1, 0, 3072, 32767, -32768]
    for dtype in (np.float64, np.float32):
        result = to_int16(values.astype(dtype), "voxels")
        assert result.dtype == np.int16
        assert result.tolist() == expected
    assert to_int16(np.array([0, 40, 32767], np.uint16), "voxels").tolist() == [0, 40, 32767]


@pytest.mark.parametrize(
    ("values", "words", "code"),
    [
        ([0.0, np.nan], "NaN or infinite", "non_finite"),
        ([0.0, -np.inf], "NaN or infinite", "non_finite"),
        ([0.0, 32767.5], "do not fit", "hu"),
        ([-32768.6, 0.0], "do not fit", "hu"),
        ([1 + 2j], "not real", "dtype"),
        ([True], "not real", "dtype"),
        ([], "no voxels", "dims"),
    ],
)
def test_values_that_cannot_be_hu_are_refused(values: list[float], words: str, code: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        to_int16(np.array(values), "voxels")
    assert (caught.value.field, caught.value.code) == ("voxels", code)
    with pytest.raises(FormatError, match=r"0\.\.65535 do not fit"):
        to_int16(np.array([0, 65535], np.uint16), "voxels")

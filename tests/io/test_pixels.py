import numpy as np
import pytest

from tapct_fast.config import HuConfig
from tapct_fast.errors import InputError
from tapct_fast.io.pixels import hu_to_pixels

HU = HuConfig()


def pixels(hu_ZYX: np.ndarray, shape: tuple[int, int, int], **options) -> np.ndarray:
    out_ZYX = np.full(shape, np.nan, np.float32)
    hu_to_pixels(hu_ZYX, out_ZYX, **{"resize_yx": None, "hu": HU, **options})
    return out_ZYX


def test_native_resolution_is_the_formula_bit_for_bit_with_air_around() -> None:
    hu_ZYX = np.random.default_rng(0).integers(-3024, 3072, (3, 5, 9)).astype(np.int16)
    found_ZYX = pixels(hu_ZYX, (4, 8, 16))
    padded = np.full((4, 8, 16), -1024, np.float32)
    padded[:3, :5, :9] = hu_ZYX
    expected = (padded.clip(-1008, 822) - np.float32(HU.mean)) / np.float32(HU.std)
    np.testing.assert_array_equal(found_ZYX, expected)


def test_a_range_of_slices_is_the_range_of_the_whole() -> None:
    hu_ZYX = np.random.default_rng(0).integers(-1000, 1000, (9, 20, 30)).astype(np.int16)
    whole = pixels(hu_ZYX, (9, 16, 8), resize_yx=(16, 8), antialias=True)
    part = pixels(hu_ZYX[2:7], (5, 16, 8), resize_yx=(16, 8), antialias=True, num_threads=2)
    np.testing.assert_array_equal(part, whole[2:7])


def test_arrays_that_do_not_fit_are_refused() -> None:
    hu_ZYX = np.zeros((4, 8, 8), np.int16)
    read_only = np.zeros((4, 8, 8), np.float32)
    read_only.flags.writeable = False
    for hu, out, words in [
        (hu_ZYX.astype(np.float32), np.zeros((4, 8, 8), np.float32), "int16"),
        (hu_ZYX[:, ::2], np.zeros((4, 8, 8), np.float32), "C-contiguous int16"),
        (hu_ZYX[0], np.zeros((4, 8, 8), np.float32), "three axes"),
        (hu_ZYX[:0], np.zeros((4, 8, 8), np.float32), "cannot hold"),
        (hu_ZYX, np.zeros((4, 8, 8), np.float64), "float32 or uint16"),
        (hu_ZYX, np.zeros((4, 8, 16), np.float32)[:, :, ::2], "C-contiguous and writeable"),
        (hu_ZYX, read_only, "writeable"),
        (hu_ZYX, np.zeros((4, 8, 7), np.float32), "cannot hold"),
        (hu_ZYX, hu_ZYX.view(np.uint16), "overlaps"),
    ]:
        with pytest.raises(InputError, match=words):
            hu_to_pixels(hu, out, resize_yx=None, hu=HU)
    with pytest.raises(InputError, match="num_threads=0"):
        pixels(hu_ZYX, (4, 8, 8), num_threads=0)
    with pytest.raises(InputError, match="cannot hold"):
        pixels(hu_ZYX, (4, 8, 8), resize_yx=(0, 8))

"""The fused loader against its oracle, ``Preprocess.apply`` on the volume that was read."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from tapct_fast.backbone.load_scans import load_for_tapct
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import HuConfig, Zyx
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.read import read_volume

LPS = np.diag([-0.7, -0.8, 2.0, 1.0])
# Sums of float32 numbers up to 3072 HU in another order: about 4 roundings of 6e-8 * 3072 / 323.
# Where torch has no FMA its weights differ from ours by up to 4e-6 (of steps of 6000 HU).
TOLERANCE = 1e-4 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 1e-5


def write_scan(
    folder: Path, shape_zyx: Zyx, *, seed: int = 0, affine: np.ndarray = LPS, name: str = "scan"
) -> Path:
    rng = np.random.default_rng(seed)
    hu_ZYX = rng.integers(-3024, 3072, shape_zyx).astype(np.int16)
    hu_ZYX.flat[:2] = hu_ZYX.flat[-2:] = (-1000, 40)[: hu_ZYX.size]  # air and tissue, to be a CT
    path = folder / f"{name}{seed}.nii.gz"
    write_nifti(path, hu_ZYX, affine)
    return path


def assert_equal(pixels: torch.Tensor, expected: torch.Tensor) -> None:
    assert pixels.shape == expected.shape
    if pixels.dtype == torch.float32:
        torch.testing.assert_close(pixels, expected, rtol=0, atol=TOLERANCE)
        return
    # One step of bfloat16 is at most 2^-7 of the value; near 0 it is finer than float32 sums.
    torch.testing.assert_close(
        pixels.float(), expected.bfloat16().float(), rtol=2**-7, atol=TOLERANCE
    )
    assert (pixels != expected.bfloat16()).float().mean() < 1e-3  # a step apart, but rarely


SHAPES = [(5, 17, 30), (4, 224, 224), (1, 2, 2), (13, 300, 225), (3, 223, 448), (8, 40, 1)]


@pytest.mark.parametrize("shape_zyx", SHAPES)
@pytest.mark.parametrize("resize_yx", [(224, 224), (8, 16), None])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_those_of_preprocess(
    tmp_path: Path,
    shape_zyx: Zyx,
    resize_yx: tuple[int, int] | None,
    antialias: bool,
    dtype: torch.dtype,
) -> None:
    path = write_scan(tmp_path, shape_zyx)
    preprocess = Preprocess(resize_yx=resize_yx, antialias=antialias)
    volume = read_volume(path)
    found = load_for_tapct([path], preprocess=preprocess, dtype=dtype)
    assert found.pixels_BCZYX.dtype == dtype
    assert_equal(found.pixels_BCZYX, preprocess.apply(volume))
    [scan] = found.scans
    assert scan.shape_zyx == volume.hu_ZYX.shape == shape_zyx
    assert scan.pixels_zyx == (shape_zyx[0], *(resize_yx or shape_zyx[1:]))
    assert scan.spacing_mm == volume.spacing_mm
    np.testing.assert_array_equal(scan.affine, volume.affine)
    assert scan.report == volume.report


def test_a_plane_of_one_pixel_is_spread(tmp_path: Path) -> None:
    path = tmp_path / "thin.nii.gz"
    hu_ZYX = np.array([-1000, -500, 0, 500, 40], np.int16)[:, None, None]
    write_nifti(path, hu_ZYX, LPS)
    found = load_for_tapct([path], dtype=torch.float32).pixels_BCZYX
    assert found.shape == (1, 1, 8, 224, 224)
    assert_equal(found, Preprocess().apply(read_volume(path)))


def test_constants_of_the_preprocessing_count(tmp_path: Path) -> None:
    preprocess = Preprocess(
        resize_yx=(16, 32),
        plane_multiple=16,
        depth_multiple=3,
        pad_hu=-200.0,
        hu=HuConfig(clip=(-150.0, 250.0), mean=50.0, std=100.0),
    )
    path = write_scan(tmp_path, (4, 20, 20))
    found = load_for_tapct([path], preprocess=preprocess, dtype=torch.float32).pixels_BCZYX
    assert_equal(found, preprocess.apply(read_volume(path)))
    assert (found[:, :, 4:] == -2).all()


def test_the_released_processor_and_bfloat16_are_the_defaults(tmp_path: Path) -> None:
    found = load_for_tapct([write_scan(tmp_path, (5, 30, 20))])
    assert found.pixels_BCZYX.shape == (1, 1, 8, 224, 224)
    assert found.pixels_BCZYX.dtype == torch.bfloat16
    assert inspect.signature(load_for_tapct).parameters["policy"].default == "error"


@pytest.mark.parametrize("threads", [1, 2, 3, 5, None])
def test_a_batch_holds_its_scans_in_order_with_air_behind(
    tmp_path: Path, threads: int | None
) -> None:
    shapes = [(5, 17, 30), (12, 40, 9), (1, 50, 8)]
    paths = [write_scan(tmp_path, shape, seed=seed) for seed, shape in enumerate(shapes)]
    for resize_yx, expected_zyx in (((24, 16), (12, 24, 16)), (None, (12, 56, 32))):
        preprocess = Preprocess(resize_yx=resize_yx)
        batch = load_for_tapct(paths, preprocess=preprocess, dtype=torch.float32, threads=threads)
        assert batch.pixels_BCZYX.shape == (3, 1, *expected_zyx)
        for pixels_CZYX, scan, path in zip(batch.pixels_BCZYX, batch.scans, paths, strict=True):
            alone = preprocess.apply(read_volume(path))[0]
            z, y, x = alone.shape[1:]
            assert_equal(pixels_CZYX[:, :z, :y, :x], alone)
            beyond = torch.ones_like(pixels_CZYX, dtype=torch.bool)
            z, y, x = scan.pixels_zyx
            beyond[:, :z, :y, :x] = False
            torch.testing.assert_close(
                pixels_CZYX[beyond], torch.full((int(beyond.sum()),), preprocess.air)
            )


def test_out_is_filled_whole_and_returned(tmp_path: Path) -> None:
    paths = [write_scan(tmp_path, (5, 17, 30)), write_scan(tmp_path, (3, 20, 20), seed=1)]
    preprocess = Preprocess(resize_yx=(8, 16))
    out = torch.full((2, 1, 12, 8, 16), torch.nan, dtype=torch.bfloat16)
    found = load_for_tapct(paths, preprocess=preprocess, out=out, threads=2)
    assert found.pixels_BCZYX is out
    fresh = load_for_tapct(paths, preprocess=preprocess).pixels_BCZYX
    assert torch.equal(out[:, :, :8], fresh)
    assert (out[:, :, 8:] == torch.tensor(preprocess.air).bfloat16()).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.float16}, "dtype torch.float16 is not one of"),
        ({"threads": 0}, "threads=0 is not positive"),
        ({"policy": "ignore"}, "input 1 of 1: policy='ignore' is not one of"),
        ({"series": "0" * 8}, "input 1 of 1: series= is for DICOM folders"),
        ({"out": torch.zeros(1, 1, 8, 224, 224)}, "out is not a plain torch.bfloat16"),
        ({"out": torch.zeros(2, 1, 8, 224, 224).bfloat16()}, r"not a contiguous \(1, 1"),
        ({"out": torch.zeros(1, 1, 8, 224, 448).bfloat16()[..., ::2]}, "contiguous"),
        ({"out": torch.zeros(1, 1, 4, 224, 224).bfloat16()}, r"out has room for \(4, 224, 224\)"),
        (
            {"preprocess": Preprocess(resize_yx=(80000, 80000))},
            "input 1 of 1.*are more than 2147483648; set a smaller preprocess.resize_yx",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, options: dict, words: str) -> None:
    path = write_scan(tmp_path, (5, 17, 30))
    with pytest.raises(InputError, match=words):
        load_for_tapct([path], **options)


def test_paths_must_be_a_list_of_scans(tmp_path: Path) -> None:
    path = write_scan(tmp_path, (5, 17, 30))
    for paths in ([], path, str(path)):
        with pytest.raises(InputError, match=r"give \[path\]"):
            load_for_tapct(paths)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_scan_that_cannot_be_read_is_named_by_position_only(tmp_path: Path, threads: int) -> None:
    folder = tmp_path / "Mustermann_Erika_1234567"
    folder.mkdir()
    good, bad = write_scan(folder, (5, 17, 30)), write_scan(folder, (5, 17, 30), seed=1)
    content = bytearray(bad.read_bytes())
    content[-8] ^= 1  # the CRC-32
    bad.write_bytes(content)
    with pytest.raises(FormatError, match=r"\(input 2 of 3\)") as damaged:
        load_for_tapct([good, bad, good], threads=threads)
    assert damaged.value.field == "gzip"
    with pytest.raises(InputError, match="input 3 of 3: the scan cannot be opened") as missing:
        load_for_tapct([good, good, folder / "absent.nii.gz"], threads=threads)
    for caught in (damaged, missing):
        text = str(caught.value) + repr(caught.value) + str(caught.value.__context__ or "")
        for secret in ("Mustermann", "1234567", "scan1", "absent"):
            assert secret not in text


def test_values_that_are_not_hu_need_a_word(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii.gz"
    write_nifti(path, np.arange(64, dtype=np.int16).reshape(4, 4, 4), LPS)
    with pytest.raises(FormatError, match=r"HU: .*input 1 of 1"):
        load_for_tapct([path])
    for options in ({"check_hu": False}, {"policy": "warn"}):
        found = load_for_tapct([path], **options)
        assert found.pixels_BCZYX.shape == (1, 1, 4, 224, 224)


def test_orientation_does_not_change_the_pixels(tmp_path: Path) -> None:
    path = write_scan(tmp_path, (5, 17, 30))
    volume = read_volume(path)
    turned = tmp_path / "ras.nii.gz"
    affine = volume.affine @ np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = (volume.affine @ [29, 16, 0, 1])[:3]
    write_nifti(turned, volume.hu_ZYX[:, ::-1, ::-1], affine)
    one, other = load_for_tapct([path]), load_for_tapct([turned])
    assert torch.equal(one.pixels_BCZYX, other.pixels_BCZYX)
    np.testing.assert_allclose(one.scans[0].affine, other.scans[0].affine, atol=1e-5)


def test_a_real_chest_has_the_pixels_of_preprocess(real_ct: Path) -> None:
    [path] = (real_ct / "nifti").glob("lidc0314*.nii.gz")
    found = load_for_tapct([path], dtype=torch.float32, threads=1)
    assert_equal(found.pixels_BCZYX, Preprocess().apply(read_volume(path)))


@pytest.mark.gpu
def test_pinned_memory_is_pinned(tmp_path: Path) -> None:
    paths = [write_scan(tmp_path, (5, 17, 30), seed=seed) for seed in (0, 1)]
    for some in (paths, paths[:1]):
        assert load_for_tapct(some, pin_memory=True).pixels_BCZYX.is_pinned()

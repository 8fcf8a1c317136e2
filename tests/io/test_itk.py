import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.itk import read_itk, read_itk_labels

SHAPE_ZYX = (5, 6, 7)
HU_ZYX = np.fromfunction(lambda z, y, x: 50 * z + 7 * y - 3 * x - 1000, SHAPE_ZYX).astype(np.int16)
CANARY = "CANARY"


def oblique_image(array_ZYX: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(array_ZYX)
    image.SetSpacing((0.75, 0.875, 2.5))
    image.SetOrigin((-100.0, 50.0, 12.5))
    angle = np.radians(17.0)
    image.SetDirection((1, 0, 0, 0, np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle)))
    return image


def write(folder: Path, suffix: str, array_ZYX: np.ndarray = HU_ZYX, *, packed: bool) -> Path:
    path = folder / f"{CANARY}{suffix}"
    sitk.WriteImage(oblique_image(array_ZYX), str(path), useCompression=packed)
    return path


def assert_refused(path: Path, field: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        read_itk(path)
    assert caught.value.field == field
    assert CANARY not in str(caught.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_voxels_and_places_survive_every_container(
    tmp_path: Path, suffix: str, packed: bool, dtype: type
) -> None:
    path = write(tmp_path, suffix, HU_ZYX.astype(dtype), packed=packed)
    volume = read_itk(path)
    np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX)
    image = oblique_image(HU_ZYX)
    for index_xyz in [(0, 0, 0), (6, 0, 0), (3, 5, 4)]:
        lps = np.array(image.TransformIndexToPhysicalPoint(index_xyz))
        np.testing.assert_allclose((volume.affine @ [*index_xyz, 1])[:3], lps * (-1, -1, 1))
    assert volume.spacing_mm == pytest.approx((2.5, 0.875, 0.75))


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "ASL", "RPI", "PIR"])
def test_any_orientation_comes_out_as_lps(tmp_path: Path, orientation: str) -> None:
    image = sitk.GetImageFromArray(HU_ZYX)
    image.SetSpacing((0.75, 0.875, 2.5))
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(tmp_path / "a.mha"))
    volume = read_itk(tmp_path / "a.mha")
    np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX)
    np.testing.assert_allclose(volume.affine, np.diag([-0.75, -0.875, 2.5, 1.0]), atol=1e-12)


def test_a_nrrd_in_ras_space_agrees_with_the_same_in_lps(tmp_path: Path) -> None:
    path = write(tmp_path, ".nrrd", packed=False)
    expected = read_itk(path).affine
    text = path.read_bytes()
    text = text.replace(b"left-posterior-superior", b"right-anterior-superior")
    path.write_bytes(text)
    affine = read_itk(path).affine
    # x and y of the world are negated, so the same voxels lie mirrored and are flipped back.
    np.testing.assert_allclose(np.abs(affine[:3, :3]), np.abs(expected[:3, :3]), atol=1e-9)
    corner = affine @ [SHAPE_ZYX[2] - 1, SHAPE_ZYX[1] - 1, 0, 1]
    np.testing.assert_allclose(corner[:3], [-100.0, 50.0, 12.5], atol=1e-6)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("packed", [False, True])
def test_data_cut_short_or_too_long_are_refused(
    tmp_path: Path, suffix: str, packed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, suffix, packed=packed)
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-60], whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(FormatError) as caught:
            read_itk(path)
        assert caught.value.field in ("data", "CompressedDataSize")
        assert CANARY not in str(caught.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_every_flipped_bit_of_a_compressed_stream_is_found(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, packed=True)
    whole = path.read_bytes()
    pack = b"\x1f\x8b" if suffix == ".nrrd" else b"ElementDataFile = LOCAL\n"
    start = whole.index(pack) + len(pack)
    start += 8 if suffix == ".nrrd" else 0  # the time and name in a gzip header are not data
    places = range(start, len(whole), 5)
    num_refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            volume = read_itk(path)
        except FormatError:
            num_refused += 1
        else:  # a bit that carries nothing
            np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX)
    assert num_refused > 0.95 * len(places)


@pytest.mark.parametrize(
    ("suffix", "old", "new", "field", "words"),
    [
        (".nrrd", "sizes: 7 6 5", "sizes: 7 6 50", "data", "420 bytes where"),
        (".nrrd", "sizes: 7 6 5", "sizes: 70000 60000 50", "size", "more voxels than any CT"),
        (".nrrd", "sizes: 7 6 5", "sizes: 7 6", "size", "three numbers"),
        (".nrrd", "sizes: 7 6 5", "sizes: 7 -6 5", "size", "three numbers"),
        (".nrrd", "dimension: 3", "dimension: 4", "dimension", "not 3"),
        (".nrrd", "space: left-posterior-superior\n", "", "space", "missing"),
        (".nrrd", "left-posterior-superior", "scanner-xyz", "space", "which way"),
        (".nrrd", "space origin: (-100,50,12.5)\n", "", "spaceorigin", "missing"),
        (".nrrd", "directions: (0.75", "directions: (nan", "spacedirections", "finite"),
        (".nrrd", "directions: (0.75,0", "directions: (0.75,0.4", "spacing, direction", "sheared"),
        (".nrrd", "directions: (0.75", "directions: (0", "spacing, direction", "singular"),
        (".nrrd", "kinds: domain", "kinds: vector", "kinds", "not one of space"),
        (".nrrd", "encoding: raw", "encoding: ascii", "encoding", "not raw or gzip"),
        (".nrrd", "encoding: raw", "encoding: raw\nbyte skip: 4", "byteskip", "is set"),
        (".nrrd", "encoding: raw", "encoding: raw\nspace units: \"m\"", "space units", "mm"),
        (".nrrd", "encoding: raw", "encoding: raw\nsizes: 7 6 5", "header", "twice"),
        (".nrrd", "type: short", "type: block", "type", "one of"),
        (".nrrd", "type: short", f"type: {CANARY}", "type", "one of"),
        (".nhdr", "CANARY.raw", "../CANARY.raw", "data file", "one plain file name"),
        (".nhdr", "CANARY.raw", "LIST", "data file", "one plain file name"),
        (".nhdr", "CANARY.raw", "CANARY2.raw", "data file", "not beside it"),
        (".mha", "DimSize = 7 6 5", "DimSize = 7 6 50", "data", "420 bytes where"),
        (".mha", "DimSize = 7 6 5", "DimSize = 32767 32767 32767", "size", "more voxels"),
        (".mha", "NDims = 3", "NDims = 4", "NDims", "not 3"),
        (".mha", "ElementSpacing = 0.75 0.875 2.5\n", "", "ElementSpacing", "missing"),
        (".mha", "ElementSpacing = 0.75", "ElementSpacing = 0", "ElementSpacing", "not positive"),
        (".mha", "ElementSpacing = 0.75", "ElementSpacing = nan", "ElementSpacing", "finite"),
        (".mha", "TransformMatrix = 1 0", "TransformMatrix = 1 0.5", "TransformMatrix", "unit"),
        (".mha", "TransformMatrix = 1", f"Comment = {CANARY} 1", "TransformMatrix", "missing"),
        (".mha", "Offset = ", "Offset = x ", "Offset", "3 finite"),
        (".mha", "MET_SHORT", "MET_SHORT_ARRAY", "ElementType", "one of"),
        (".mha", "BinaryData = True", "BinaryData = False", "BinaryData", "not True"),
        (".mha", "DimSize", "ElementNumberOfChannels = 3\nDimSize", "ElementNumberOfChannels", "1"),
        (".mhd", "CANARY.raw", "slice%03d.raw 1 5 1", "data file", "one plain file name"),
        (".mha", "ElementDataFile = LOCAL", "", "ElementDataFile", "missing"),
    ],
)  # fmt: skip
def test_a_header_that_lies_or_is_silent_is_refused_by_field(
    tmp_path: Path,
    suffix: str,
    old: str,
    new: str,
    field: str,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, suffix, packed=False)
    whole = path.read_bytes()
    assert old.encode() in whole
    path.write_bytes(whole.replace(old.encode(), new.encode(), 1))
    assert_refused(path, field, words, capfd)


def test_a_bomb_is_refused_after_the_declared_size(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, ".nrrd", packed=True)
    head = path.read_bytes().partition(b"\n\n")[0] + b"\n\n"
    path.write_bytes(head + gzip.compress(bytes(2**26)))
    assert_refused(path, "data", "inflate to more bytes where the header needs 420", capfd)
    mha = write(tmp_path, ".mha", packed=True)
    head = mha.read_bytes().partition(b"LOCAL\n")[0] + b"LOCAL\n"
    bomb = zlib.compress(bytes(2**26))
    size = len(mha.read_bytes()) - len(head)
    head = head.replace(f"DataSize = {size}".encode(), f"DataSize = {len(bomb)}".encode())
    mha.write_bytes(head + bomb)
    assert_refused(mha, "data", "inflate to more", capfd)


def test_voxels_that_are_no_hu_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = HU_ZYX.astype(np.float32)
    values[2, 3, 4] = np.nan
    assert_refused(write(tmp_path, ".nrrd", values, packed=False), "voxels", "NaN", capfd)
    values[2, 3, 4] = 1e6
    assert_refused(write(tmp_path, ".mha", values, packed=True), "voxels", "int16", capfd)


def test_labels_must_be_whole_numbers(tmp_path: Path) -> None:
    labels = np.arange(210).reshape(SHAPE_ZYX) % 4
    path = write(tmp_path, ".nrrd", labels.astype(np.uint8), packed=True)
    np.testing.assert_array_equal(read_itk_labels(path).hu_ZYX, labels)
    path = write(tmp_path, ".nrrd", labels.astype(np.float32) + 0.5, packed=True)
    with pytest.raises(FormatError, match="not whole numbers") as caught:
        read_itk_labels(path)
    assert (caught.value.field, caught.value.code) == ("voxels", "dtype")


def test_a_missing_file_is_an_input_error_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened: No such file") as caught:
        read_itk(tmp_path / f"{CANARY}.nrrd")
    assert CANARY not in str(caught.value)

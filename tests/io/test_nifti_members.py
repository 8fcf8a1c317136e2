"""Files of many gzip members, and reading within one block of memory.

Oracles: Python's gzip, nibabel, SimpleITK, medrs and MONAI open what we write; every damaged file
is refused or gives the right voxels, whatever the number of threads.
"""

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.nifti import read_nifti, write_nifti

LPS = np.diag([-0.8, -0.7, 2.5, 1.0])
MEMBER = 8 << 20  # voxel bytes per member


def hu(shape_zyx: tuple[int, int, int], seed: int = 0) -> npt.NDArray[np.int16]:
    noise = np.random.default_rng(seed).integers(-8, 8, shape_zyx, dtype=np.int16)
    return noise + (np.arange(shape_zyx[2]) % 90 * 20 - 1000).astype(np.int16)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of four members: the header, 8 MiB twice, and the rest."""
    path = tmp_path_factory.mktemp("large") / "scan.nii.gz"
    write_nifti(path, hu((40, 512, 512)), LPS, level=1)
    return path


def members_of(data: bytes) -> list[bytes]:
    """Split by the sizes that the headers state."""
    members = []
    while data:
        assert data[:4] == b"\x1f\x8b\x08\x04"
        assert data[10:16] == b"\x0c\0TF\x08\0"
        size = struct.unpack_from("<Q", data, 16)[0]
        members.append(data[:size])
        data = data[size:]
    return members


def test_members_hold_8_mib_and_state_their_size(large: Path) -> None:
    members = members_of(large.read_bytes())
    raw = [gzip.decompress(member) for member in members]
    assert [len(part) for part in raw] == [352, MEMBER, MEMBER, 40 * 512 * 512 * 2 - 2 * MEMBER]
    np.testing.assert_array_equal(np.frombuffer(b"".join(raw[1:]), "<i2"), hu((40, 512, 512)).flat)
    assert gzip.decompress(large.read_bytes()) == b"".join(raw)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_reads_and_writes_the_same(
    tmp_path: Path, large: Path, threads: int
) -> None:
    expected = hu((40, 512, 512))
    np.testing.assert_array_equal(read_nifti(large, threads=threads).hu_ZYX, expected)
    write_nifti(tmp_path / "scan.nii.gz", expected, LPS, threads=threads, level=1)
    assert (tmp_path / "scan.nii.gz").read_bytes() == large.read_bytes()


def test_other_readers_open_it(large: Path) -> None:
    expected = hu((40, 512, 512))
    image = nib.load(large)
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, expected)
    np.testing.assert_allclose(image.affine, LPS, rtol=1e-6)
    sitk = pytest.importorskip("SimpleITK", reason="needs the itk extra")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(large)), expected)


def test_medrs_opens_it(large: Path) -> None:
    medrs = pytest.importorskip("medrs", reason="medrs is not installed")
    read = np.asarray(medrs.load(str(large)).to_numpy())
    expected = hu((40, 512, 512))
    assert read.shape in (expected.shape, expected.shape[::-1])
    np.testing.assert_array_equal(read if read.shape == expected.shape else read.T, expected)


def test_monai_opens_it(large: Path) -> None:
    transforms = pytest.importorskip("monai.transforms", reason="MONAI is not installed")
    array = transforms.LoadImage(image_only=True, dtype=np.int16)(large)
    np.testing.assert_array_equal(np.asarray(array).T, hu((40, 512, 512)))


@pytest.mark.parametrize(
    "name", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64", "int64"]
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_type_is_written_as_nibabel_reads_it(tmp_path: Path, name: str, suffix: str) -> None:
    array_ZYX = np.random.default_rng(3).integers(0, 120, (3, 4, 5)).astype(name)
    write_nifti(tmp_path / f"out{suffix}", array_ZYX, LPS)
    image = nib.load(tmp_path / f"out{suffix}")
    assert image.get_data_dtype() == np.dtype(name)
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, array_ZYX)
    np.testing.assert_array_equal(read_nifti(tmp_path / f"out{suffix}").hu_ZYX, array_ZYX)


def bgzf(data: bytes, block: int = 1000) -> bytes:
    """Members with BGZF's BC subfield (SAM specification, 4.1)."""
    out = b""
    for start in range(0, len(data), block):
        body = gzip.compress(data[start : start + block], mtime=0)
        size = len(body) + 8
        out += body[:3] + b"\x04" + body[4:10] + b"\x06\0BC\x02\0" + struct.pack("<H", size - 1)
        out += body[10:]
    return out


@pytest.mark.parametrize("threads", [1, 2])
def test_bgzf_is_read(tmp_path: Path, threads: int) -> None:
    write_nifti(tmp_path / "a.nii", hu((3, 20, 30)), LPS)
    (tmp_path / "a.gz").write_bytes(bgzf((tmp_path / "a.nii").read_bytes()))
    volume = read_nifti(tmp_path / "a.gz", threads=threads)
    np.testing.assert_array_equal(volume.hu_ZYX, hu((3, 20, 30)))


@pytest.mark.parametrize("threads", [1, 2])
def test_every_flipped_bit_of_an_indexed_file_is_refused_or_harmless(
    tmp_path: Path, threads: int
) -> None:
    expected = hu((1, 6, 7))
    path = tmp_path / "scan.nii.gz"
    write_nifti(path, expected, LPS)
    whole = path.read_bytes()
    num_refused = 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            np.testing.assert_array_equal(read_nifti(path, threads=threads).hu_ZYX, expected)
        except FormatError:
            num_refused += 1
    # Harmless: time, level, system and index, 13 bytes of two headers, and a few unused bits.
    assert num_refused > 8 * (len(whole) - 2 * 24)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lie", [0, 1, 24, 60, 2**32, 2**64 - 1])
def test_an_index_that_lies_changes_nothing(
    tmp_path: Path, large: Path, lie: int, threads: int
) -> None:
    data = bytearray(large.read_bytes())
    struct.pack_into("<Q", data, len(members_of(bytes(data))[0]) + 16, lie)
    (tmp_path / "lie").write_bytes(data)
    volume = read_nifti(tmp_path / "lie", threads=threads)
    np.testing.assert_array_equal(volume.hu_ZYX, hu((40, 512, 512)))


@pytest.mark.parametrize("threads", [1, 2])
def test_damaged_members_are_refused(tmp_path: Path, large: Path, threads: int) -> None:
    members = members_of(large.read_bytes())
    flipped = bytearray(members[1])
    flipped[5000] ^= 4
    shorter = gzip.compress(bytes(100))
    for changed in (
        [members[0], bytes(flipped), *members[2:]],
        [members[0], *members[2:]],
        [*members, members[1]],
        [*members, shorter],
        [*members[:3], members[3][:-1]],
        [*members[:3], members[3][:-8] + bytes(8)],
    ):
        (tmp_path / "damaged").write_bytes(b"".join(changed))
        with pytest.raises(FormatError) as caught:
            read_nifti(tmp_path / "damaged", threads=threads)
        assert caught.value.field == "gzip"


@pytest.mark.parametrize("name", ["int16", "float32", "uint8", "int32"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("signs", [(-1, -1, 1), (1, 1, 1), (1, -1, -1)])
def test_a_callers_buffer_holds_the_voxels(
    tmp_path: Path, name: str, suffix: str, odd: int, signs: tuple[int, int, int]
) -> None:
    array_ZYX = np.random.default_rng(3).integers(0, 120, (3, 4, 5)).astype(name)
    path = tmp_path / f"out{suffix}"
    write_nifti(path, array_ZYX, np.diag([*np.array(signs) * 0.8, 1.0]))
    expected = read_nifti(path).hu_ZYX
    lead = 352 if suffix == ".nii.gz" else 0
    needed = odd + lead + array_ZYX.size * max(2, array_ZYX.itemsize)
    whole = np.zeros(needed + 8, np.uint8)
    base = whole.ctypes.data % 2
    buffer = whole[base + odd : base + odd + needed]
    volume = read_nifti(path, buffer=buffer)
    np.testing.assert_array_equal(volume.hu_ZYX, expected)
    assert np.shares_memory(volume.hu_ZYX, buffer)
    with pytest.raises(InputError, match=rf"holds 10 bytes, this scan needs {needed}"):
        read_nifti(path, buffer=buffer[:10])


def test_a_permuted_scan_also_lands_in_the_buffer(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[[2, 0, 1]]
    write_nifti(tmp_path / "a.nii.gz", hu((3, 4, 5)), affine)
    buffer = np.zeros(500, np.int16)
    volume = read_nifti(tmp_path / "a.nii.gz", buffer=buffer)
    np.testing.assert_array_equal(volume.hu_ZYX, read_nifti(tmp_path / "a.nii.gz").hu_ZYX)
    assert np.shares_memory(volume.hu_ZYX, buffer)


def test_buffers_that_cannot_be_written_are_input_errors(tmp_path: Path, large: Path) -> None:
    frozen = np.zeros(1000, np.uint8)
    frozen.flags.writeable = False
    for buffer in (frozen, np.zeros((9, 9))[:, ::2], np.zeros(9, object)):
        with pytest.raises(InputError, match="writable C-contiguous"):
            read_nifti(large, buffer=buffer)
    with pytest.raises(InputError, match="threads=0"):
        read_nifti(large, threads=0)
    with pytest.raises(InputError, match="level=0"):
        write_nifti(tmp_path / "a.nii.gz", hu((1, 2, 3)), LPS, level=0)


READ_AND_MEASURE = """
import resource, sys
from pathlib import Path
from tapct_fast.io.nifti import read_nifti
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
read_nifti(Path(sys.argv[1]))
before = peak()
volume = read_nifti(Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.parametrize("name", ["int16", "float32", "uint8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_read_peaks_at_its_larger_form_and_the_compressed_file(
    tmp_path: Path, name: str, suffix: str
) -> None:
    array = (hu((64, 512, 512)) % 100).astype(name)
    small, path = tmp_path / "small.nii.gz", tmp_path / f"scan{suffix}"
    write_nifti(small, array[:1, :8, :8], LPS)
    write_nifti(path, array, np.diag([0.8, 0.7, 2.5, 1.0]), level=1)  # RAS: turned in place
    result = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, str(small), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    compressed = path.stat().st_size if suffix == ".nii.gz" else 0
    assert float(result.stdout) <= 1.1 * max(array.nbytes, 2 * array.size) + compressed

"""One file of every class on which public NIfTI readers crash, guess or return a wrong volume.

``FILES`` are whole files, ``HEADERS`` are lies of the header, each tried plain and gzipped. A case
names the field and reason code with which it is refused; without them it gives right voxels in
their right place.
"""

import gzip
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from tapct_fast.errors import FormatError
from tapct_fast.io.findings import CODES, Inspection, Policy, code_of
from tapct_fast.io.nifti import read_nifti

AFFINE = np.array(
    [[-0.8, 0, 0, 100.0], [0, -0.7, 0, 80.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]], dtype=np.float64
)
HU_ZYX = np.random.default_rng(0).integers(-1000, 1500, (12, 20, 24)).astype(np.int16)
SROW, QUATERN, QOFFSET, PIXDIM, DIM = 280, 256, 268, 76, 40
OK = ("", "")


class Case(NamedTuple):
    name: str
    refused: tuple[str, str]  # field and code; OK where the scan is right
    make: Callable[[bytes], bytes]  # from the bytes of a sound NIfTI-1 file


def sound() -> bytes:
    image = nib.Nifti1Image(HU_ZYX.transpose(2, 1, 0), AFFINE)
    image.header.set_xyzt_units("mm")
    image.set_sform(AFFINE, code=1)
    image.set_qform(AFFINE, code=1)
    return put(image.to_bytes(), 112, "2f", 1, 0)


def put(data: bytes, offset: int, layout: str, *values: float | bytes) -> bytes:
    copy = bytearray(data)
    struct.pack_into(f"<{layout}", copy, offset, *values)
    return bytes(copy)


def only(data: bytes, sform_code: int, qform_code: int) -> bytes:
    return put(data, 252, "2h", qform_code, sform_code)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def with_trailer(data: bytes, change: Callable[[int, int], tuple[int, int]]) -> bytes:
    packed = gzip.compress(data, mtime=0)
    return packed[:-8] + struct.pack("<2I", *change(*struct.unpack("<2I", packed[-8:])))


def bomb(start: bytes, num_mib: int) -> bytes:
    """Return a gzip stream of zeros after a start; 1 : 1000."""
    packer = zlib.compressobj(level=1, wbits=31)
    body = packer.compress(start)
    return body + b"".join(packer.compress(bytes(1 << 20)) for _ in range(num_mib)) + packer.flush()


def stored(
    voxels_ZYX: npt.NDArray[np.generic],
    kind: type[nib.Nifti1Image] = nib.Nifti1Image,
    byte_order: str = "<",
) -> bytes:
    header = kind.header_class(endianness=byte_order)
    image = kind(voxels_ZYX.transpose(2, 1, 0), AFFINE, header=header, dtype=voxels_ZYX.dtype)
    return bytes(image.to_bytes())


def one_voxel(value: float) -> bytes:
    voxels = HU_ZYX.astype(np.float32)
    voxels[5, 7, 11] = value
    return stored(voxels)


def extended(data: bytes, size: int) -> bytes:
    """Insert an extension that says it has that size, and has 32 bytes."""
    block = b"\1\0\0\0" + struct.pack("<2i", size, 6) + b"comment".ljust(24, b"\0")
    return put(data[:348] + block + data[352:], 108, "f", 384.0)


FILES = [
    Case("gzip cut in half", ("gzip", "integrity"), lambda d: gzip.compress(d)[: len(d) // 3]),
    Case("gzip without its last byte", ("gzip", "integrity"), lambda d: gzip.compress(d)[:-1]),
    Case("gzip without its last 4 bytes", ("gzip", "integrity"), lambda d: gzip.compress(d)[:-4]),
    Case("gzip without its trailer", ("gzip", "integrity"), lambda d: gzip.compress(d)[:-8]),
    Case("gzip of a head only", ("gzip", "integrity"), lambda d: gzip.compress(d)[:10]),
    Case("one flipped bit", ("gzip", "integrity"), lambda d: flipped(gzip.compress(d), 9000)),
    Case(
        "bad CRC in the trailer",
        ("gzip", "integrity"),
        lambda d: with_trailer(d, lambda crc, size: (crc ^ 1, size)),
    ),
    Case(
        "bad size in the trailer",
        ("gzip", "integrity"),
        lambda d: with_trailer(d, lambda crc, size: (crc, size - 2)),
    ),
    Case(
        "valid gzip of half a scan",
        ("gzip", "integrity"),
        lambda d: gzip.compress(d[: len(d) // 2]),
    ),
    Case(
        "valid gzip of a scan less a voxel", ("gzip", "integrity"), lambda d: gzip.compress(d[:-2])
    ),
    Case("valid gzip of a header", ("gzip", "integrity"), lambda d: gzip.compress(d[:352])),
    Case("valid gzip of nothing", ("header", "integrity"), lambda _: gzip.compress(b"")),
    Case("header only", ("dim", "dims"), lambda d: d[:352]),
    Case("half a header", ("header", "integrity"), lambda d: d[:200]),
    Case("plain file cut in half", ("dim", "dims"), lambda d: d[: len(d) // 2]),
    Case("plain file less a byte", ("dim", "dims"), lambda d: d[:-1]),
    Case("plain file and a byte", ("vox_offset", "header"), lambda d: d + b"\0"),
    Case("two scans in one stream", ("gzip", "integrity"), lambda d: gzip.compress(d + d)),
    Case("empty file", ("header", "integrity"), lambda _: b""),
    Case("zeros after the stream", ("gzip", "integrity"), lambda d: gzip.compress(d) + bytes(512)),
    Case("garbage after the stream", ("gzip", "integrity"), lambda d: gzip.compress(d) + b"junk"),
    Case(
        "half a stream after the stream",
        ("gzip", "integrity"),
        lambda d: gzip.compress(d) + gzip.compress(d)[:300],
    ),
    Case(
        "a second scan after the stream",
        ("gzip", "integrity"),
        lambda d: gzip.compress(d) + gzip.compress(d),
    ),
    Case("nested gzip", ("sizeof_hdr", "header"), lambda d: gzip.compress(gzip.compress(d))),
    Case(
        "bomb that declares 12 GiB",
        ("dim", "limit"),
        lambda d: gzip.compress(put(d, DIM + 2, "3h", 1861, 1861, 1861)),
    ),
    Case(
        "bomb that declares 2 GiB",
        ("dim", "dims"),
        lambda d: gzip.compress(put(d, DIM + 2, "3h", 1024, 1024, 1024)),
    ),
    Case("bomb of 256 MiB behind a scan", ("gzip", "integrity"), lambda d: bomb(d, 256)),
    Case(
        "bomb in a second member",
        ("gzip", "integrity"),
        lambda d: gzip.compress(d) + bomb(b"", 64),
    ),
    Case(
        "NIfTI-2 with the magic of NIfTI-1",
        ("magic", "unsupported"),
        lambda _: put(stored(HU_ZYX, nib.Nifti2Image), 4, "4s", b"n+1\0"),
    ),
    Case(
        "NIfTI-2 of two files",
        ("magic", "unsupported"),
        lambda _: put(stored(HU_ZYX, nib.Nifti2Image), 4, "4s", b"ni2\0"),
    ),
    Case(
        "NIfTI-2 dims that overflow 64 bits",
        ("dim", "dims"),
        lambda _: put(stored(HU_ZYX, nib.Nifti2Image), 24, "3q", *[2**62] * 3),
    ),
    Case(
        "little-endian header said to be big-endian",
        ("bitpix", "dtype"),
        lambda d: put(d, 0, "4s", d[:4][::-1]),
    ),
    Case("NaN voxel", ("voxels", "non_finite"), lambda _: one_voxel(np.nan)),
    Case("Inf voxel", ("voxels", "non_finite"), lambda _: one_voxel(np.inf)),
    Case("-Inf voxel", ("voxels", "non_finite"), lambda _: one_voxel(-np.inf)),
    Case("voxel beyond int16", ("voxels", "hu"), lambda _: one_voxel(40000.0)),
    Case("extension longer than the file", OK, lambda d: extended(d, 2**30)),
    Case("extension of negative size", OK, lambda d: extended(d, -16)),
    Case("multi-member", OK, lambda d: b"".join(map(gzip.compress, (d[:90], d[90:999], d[999:])))),
    Case("extension", OK, lambda d: extended(d, 32)),
    Case("big-endian", OK, lambda _: stored(HU_ZYX, byte_order=">")),
    Case("NIfTI-2", OK, lambda _: stored(HU_ZYX, nib.Nifti2Image)),
    Case("big-endian NIfTI-2", OK, lambda _: stored(HU_ZYX, nib.Nifti2Image, ">")),
    Case("int64", OK, lambda _: stored(HU_ZYX.astype(np.int64))),
    Case("int32", OK, lambda _: stored(HU_ZYX.astype(np.int32))),
    Case("float64", OK, lambda _: stored(HU_ZYX.astype(np.float64))),
    Case("4D with one volume", OK, lambda d: put(d, DIM, "5h", 4, 24, 20, 12, 1)),
    Case("qform only", OK, lambda d: only(d, 0, 1)),
    Case("sform only", OK, lambda d: only(d, 1, 0)),
    Case("slope 0 with inter 0", OK, lambda d: put(d, 112, "2f", 0, 0)),
    Case("plain file named .nii.gz", OK, lambda d: d),
    Case("gzip named .nii", OK, gzip.compress),
]

HEADERS = [
    Case("negative dim", ("dim[2]", "dims"), lambda d: put(d, DIM + 4, "h", -20)),
    Case("zero dim", ("dim[2]", "dims"), lambda d: put(d, DIM + 4, "h", 0)),
    Case("dim[0] = 0", ("dim[0]", "dims"), lambda d: put(d, DIM, "h", 0)),
    Case("dim[0] = 2", ("dim[0]", "unsupported"), lambda d: put(d, DIM, "h", 2)),
    Case("dim[0] = 9", ("dim[0]", "dims"), lambda d: put(d, DIM, "h", 9)),
    Case("dims larger than the data", ("dim", "dims"), lambda d: put(d, DIM + 6, "h", 24)),
    Case("dims smaller than the data", ("vox_offset", "header"), lambda d: put(d, DIM + 6, "h", 6)),
    Case("32767^3 dims", ("dim", "limit"), lambda d: put(d, DIM + 2, "3h", *[32767] * 3)),
    Case("4D", ("dim[4]", "unsupported"), lambda d: put(d, DIM, "5h", 4, 24, 20, 6, 2)),
    Case("vox_offset beyond the file", ("dim", "dims"), lambda d: put(d, 108, "f", 1e6)),
    Case("vox_offset NaN", ("vox_offset", "header"), lambda d: put(d, 108, "f", np.nan)),
    Case("vox_offset infinite", ("vox_offset", "header"), lambda d: put(d, 108, "f", np.inf)),
    Case("vox_offset negative", ("vox_offset", "header"), lambda d: put(d, 108, "f", -352)),
    Case("vox_offset 0", ("vox_offset", "header"), lambda d: put(d, 108, "f", 0)),
    Case("vox_offset fractional", ("vox_offset", "header"), lambda d: put(d, 108, "f", 352.5)),
    Case("datatype unknown", ("datatype", "unsupported"), lambda d: put(d, 70, "h", 77)),
    Case("complex", ("datatype", "unsupported"), lambda d: put(d, 70, "2h", 32, 64)),
    Case("RGB", ("datatype", "unsupported"), lambda d: put(d, 70, "2h", 128, 24)),
    Case("RGBA", ("datatype", "unsupported"), lambda d: put(d, 70, "2h", 2304, 32)),
    Case("bitpix of another type", ("bitpix", "dtype"), lambda d: put(d, 72, "h", 8)),
    Case("slope NaN", ("scl_slope", "rescale"), lambda d: put(d, 112, "f", np.nan)),
    Case("slope infinite", ("scl_slope", "rescale"), lambda d: put(d, 112, "f", np.inf)),
    Case("inter infinite", ("scl_inter", "rescale"), lambda d: put(d, 116, "f", np.inf)),
    Case(
        "slope 0 with inter 5",
        ("scl_slope, scl_inter", "rescale"),
        lambda d: put(d, 112, "2f", 0, 5),
    ),
    Case("slope that leaves int16", ("voxels", "hu"), lambda d: put(d, 112, "f", 1e4)),
    Case("ni1: two files", ("magic", "unsupported"), lambda d: put(d, 344, "4s", b"ni1\0")),
    Case("Analyze", ("magic", "unsupported"), lambda d: put(d, 344, "4s", bytes(4))),
    Case("magic unknown", ("magic", "unsupported"), lambda d: put(d, 344, "4s", b"n+9\0")),
    Case("not NIfTI", ("sizeof_hdr", "header"), lambda d: b"PK\3\4" + d[4:]),
    Case("sizeof_hdr of NIfTI-2", ("magic", "unsupported"), lambda d: put(d, 0, "i", 540)),
    Case(
        "no orientation",
        ("sform_code, qform_code", "orientation"),
        lambda d: put(d, 252, "2h", 0, 0),
    ),
    Case("sform code 9", ("sform_code", "orientation"), lambda d: put(d, 254, "h", 9)),
    Case("qform code -1", ("qform_code", "orientation"), lambda d: put(d, 252, "h", -1)),
    Case("sform zero", ("sform", "orientation"), lambda d: put(d, SROW, "12f", *[0.0] * 12)),
    Case(
        "sform singular",
        ("sform", "orientation"),
        lambda d: put(only(d, 1, 0), SROW, "12f", -0.8, -0.7, 0, 0, *[0] * 6, 2.5, 0),
    ),
    Case("sform NaN", ("sform", "orientation"), lambda d: put(d, SROW, "f", np.nan)),
    Case("sform infinite", ("sform", "orientation"), lambda d: put(d, SROW + 12, "f", np.inf)),
    Case(
        "sform sheared, no qform",
        ("sform", "tilt"),
        lambda d: put(only(d, 1, 0), SROW + 16, "8f", 0, -0.7, 0.8, 0, 0, 0, 2.368, 0),
    ),
    Case(
        "sform sheared, qform straight",
        ("sform, qform", "form_conflict"),
        lambda d: put(d, SROW + 16, "8f", 0, -0.7, 0.8, 80, 0, 0, 2.368, -300),
    ),
    Case(
        "pixdim and sform disagree",
        ("pixdim, sform", "form_conflict"),
        lambda d: put(d, SROW, "f", -0.9),
    ),
    Case("sform mirrored", ("sform, qform", "form_conflict"), lambda d: put(d, SROW, "f", 0.8)),
    Case(
        "sform elsewhere", ("sform, qform", "form_conflict"), lambda d: put(d, SROW + 12, "f", 101)
    ),
    Case(
        "qform turned",
        ("sform, qform", "form_conflict"),
        lambda d: put(d, QUATERN, "3f", 0.0, 0.1, 0.99),
    ),
    Case("quaternion too long", ("qform", "orientation"), lambda d: put(d, QUATERN, "3f", 1, 1, 0)),
    Case("quaternion NaN", ("qform", "orientation"), lambda d: put(d, QUATERN, "f", np.nan)),
    Case("qoffset infinite", ("qform", "orientation"), lambda d: put(d, QOFFSET, "f", np.inf)),
    Case("qfac 0.5", ("pixdim[0]", "orientation"), lambda d: put(d, PIXDIM, "f", 0.5)),
    Case(
        "pixdim 0, qform only",
        ("pixdim", "spacing"),
        lambda d: put(only(d, 0, 1), PIXDIM + 4, "f", 0),
    ),
    Case(
        "pixdim negative, qform only",
        ("pixdim", "spacing"),
        lambda d: put(only(d, 0, 1), PIXDIM + 4, "f", -0.8),
    ),
    Case(
        "pixdim NaN, qform only",
        ("pixdim", "spacing"),
        lambda d: put(only(d, 0, 1), PIXDIM + 4, "f", np.nan),
    ),
    Case(
        "spacing of no CT",
        ("qform", "spacing"),
        lambda d: put(only(d, 0, 1), PIXDIM + 4, "f", 800),
    ),
    Case("xyzt_units = metre", ("xyzt_units", "units"), lambda d: put(d, 123, "B", 1)),
    Case("xyzt_units = micron", ("xyzt_units", "units"), lambda d: put(d, 123, "B", 3)),
    Case("xyzt_units unknown", ("xyzt_units", "units"), lambda d: put(d, 123, "B", 7)),
]
# Where the stream and the header disagree on the size, the stream is named: it has a checksum.
ZIPPED = {
    "dims larger than the data": ("gzip", "integrity"),
    "dims smaller than the data": ("gzip", "integrity"),
    "vox_offset beyond the file": ("gzip", "integrity"),
}
# Doubts and what can be mended: the policy "repair" reads them; the rest no policy does.
MENDED = {
    "slope 0 with inter 5",
    "sform sheared, no qform",
    "sform sheared, qform straight",
    "pixdim and sform disagree",
    "sform mirrored",
    "sform elsewhere",
    "qform turned",
    "xyzt_units = metre",
    "xyzt_units = micron",
}
NAMES = {"plain file named .nii.gz": "scan.nii.gz", "gzip named .nii": "scan.nii"}


def test_the_classes_are_counted() -> None:
    names = [case.name for case in (*FILES, *HEADERS)]
    assert len(set(names)) == len(names) >= 70


def assert_judged(path: Path, case: Case, refused: tuple[str, str]) -> None:
    if refused == OK:
        volume = read_nifti(path)
        np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX)
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)  # float32 header
        assert volume.spacing_mm == pytest.approx((2.5, 0.7, 0.8), rel=1e-6)
        return
    policies = ("error",) if case.name in MENDED else get_args(Policy)
    for policy in policies:
        with pytest.raises(FormatError) as caught:
            read_nifti(path, Inspection(policy))
        assert (caught.value.field, code_of(caught.value)) == refused
    assert refused[1] in CODES
    if case.name in MENDED:
        read_nifti(path, Inspection("repair"))  # to what: test_nifti_fields.py


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_a_file_is_right_or_refused_by_field(tmp_path: Path, case: Case) -> None:
    path = tmp_path / NAMES.get(case.name, "scan")
    path.write_bytes(case.make(sound()))
    assert_judged(path, case, case.refused)


@pytest.mark.parametrize("case", HEADERS, ids=lambda case: case.name)
def test_a_header_that_lies_is_refused_by_field(tmp_path: Path, case: Case) -> None:
    data = case.make(sound())
    (tmp_path / "plain").write_bytes(data)
    assert_judged(tmp_path / "plain", case, case.refused)
    (tmp_path / "zipped").write_bytes(gzip.compress(data))
    assert_judged(tmp_path / "zipped", case, ZIPPED.get(case.name, case.refused))


READ_AND_MEASURE = """
import resource, sys, time
from pathlib import Path
from tapct_fast.errors import FormatError
from tapct_fast.io.nifti import read_nifti
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
slowest, num_refused = 0.0, 0
read_nifti(Path(sys.argv[1], "sound"))
before = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    start = time.perf_counter()
    try:
        read_nifti(path)
    except FormatError:
        num_refused += 1
    slowest = max(slowest, time.perf_counter() - start)
print(peak() - before, slowest, num_refused)
"""


@pytest.mark.cases(len(FILES) + 2 * len(HEADERS))
def test_all_classes_together_take_neither_memory_nor_time(tmp_path: Path) -> None:
    (tmp_path / "sound").write_bytes(sound())
    for number, case in enumerate((*FILES, *HEADERS)):
        data = case.make(sound())
        (tmp_path / f"{number}").write_bytes(data)
        if number >= len(FILES):
            (tmp_path / f"{number}.gz").write_bytes(gzip.compress(data))
    # A process of its own: the peak of this one may be past what a bomb would add.
    result = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown_kib, slowest_s, num_refused = map(float, result.stdout.split())
    assert grown_kib < 64 << 10  # facts/reliability S3: the declared voxels and 64 MB
    assert slowest_s < 1.0
    assert num_refused == sum(case.refused != OK for case in FILES) + 2 * len(HEADERS)

"""Every field of the NIfTI header at its extremes, and findings by policy."""

import struct
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from tapct_fast.errors import FormatError
from tapct_fast.io.findings import CODES, Inspection, Policy, code_of
from tapct_fast.io.nifti import read_nifti, read_nifti_labels

SHAPE_ZYX = (4, 6, 8)
AFFINE = np.array(
    [[-0.8, 0, 0, 100.0], [0, -0.7, 0, 80.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]], dtype=np.float64
)
HU_ZYX = np.random.default_rng(0).integers(-1000, 1500, SHAPE_ZYX).astype(np.int16)

# Offset, type and number of values in NIfTI-1 and NIfTI-2; all fields of nifti1.h and nifti2.h.
FIELDS_1 = {
    "sizeof_hdr": (0, "i", 1),
    "data_type": (4, "B", 10),
    "dim_info": (39, "B", 1),
    "dim": (40, "h", 8),
    "intent": (56, "f", 3),
    "intent_code": (68, "h", 1),
    "datatype": (70, "h", 1),
    "bitpix": (72, "h", 1),
    "slice_start": (74, "h", 1),
    "pixdim": (76, "f", 8),
    "vox_offset": (108, "f", 1),
    "scl_slope": (112, "f", 1),
    "scl_inter": (116, "f", 1),
    "slice_end": (120, "h", 1),
    "slice_code": (122, "B", 1),
    "xyzt_units": (123, "B", 1),
    "cal": (124, "f", 4),
    "glmax": (140, "i", 2),
    "qform_code": (252, "h", 1),
    "sform_code": (254, "h", 1),
    "quatern": (256, "f", 3),
    "qoffset": (268, "f", 3),
    "srow": (280, "f", 12),
    "magic": (344, "B", 4),
}
FIELDS_2 = {
    "sizeof_hdr": (0, "i", 1),
    "magic": (4, "B", 8),
    "datatype": (12, "h", 1),
    "bitpix": (14, "h", 1),
    "dim": (16, "q", 8),
    "intent": (80, "d", 3),
    "pixdim": (104, "d", 8),
    "vox_offset": (168, "q", 1),
    "scl_slope": (176, "d", 1),
    "scl_inter": (184, "d", 1),
    "cal": (192, "d", 4),
    "slice_start": (224, "q", 2),
    "qform_code": (344, "i", 1),
    "sform_code": (348, "i", 1),
    "quatern": (352, "d", 3),
    "qoffset": (376, "d", 3),
    "srow": (400, "d", 12),
    "slice_code": (496, "i", 1),
    "xyzt_units": (500, "i", 1),
}
# Which fields an error may name when that field lies; a lie in any other field is harmless.
NAMED = {
    "sizeof_hdr": {"sizeof_hdr", "magic"},
    "magic": {"magic"},
    "dim": {"dim", *(f"dim[{i}]" for i in range(8)), "vox_offset"},  # fewer voxels leave bytes over
    "datatype": {"datatype", "bitpix"},
    "bitpix": {"bitpix"},
    "pixdim": {"pixdim", "pixdim[0]", "pixdim, sform", "sform, qform"},
    "vox_offset": {"vox_offset", "dim"},
    "scl_slope": {"scl_slope", "voxels"},
    "scl_inter": {"scl_inter", "voxels"},
    "xyzt_units": {"xyzt_units"},
    "qform_code": {"qform_code"},
    "sform_code": {"sform_code"},
    "quatern": {"qform", "sform, qform"},
    "qoffset": {"qform", "sform, qform"},
    "srow": {"sform", "pixdim, sform", "sform, qform"},
}
BITS = {"B": 8, "h": 15, "i": 31, "q": 63}
CASES = [
    (version, name, i)
    for version, fields in ((1, FIELDS_1), (2, FIELDS_2))
    for name, (_, _, num) in fields.items()
    for i in range(num)
]


def good(version: int) -> bytearray:
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    image = kind(HU_ZYX.transpose(2, 1, 0), AFFINE)
    image.header.set_xyzt_units("mm")
    image.set_sform(AFFINE, code=1)
    image.set_qform(AFFINE, code=1)
    data = bytearray(image.to_bytes())
    fields = FIELDS_1 if version == 1 else FIELDS_2
    for name, value in (("scl_slope", 1.0), ("scl_inter", 0.0)):
        offset, kind_of_value, _ = fields[name]
        struct.pack_into(f"<{kind_of_value}", data, offset, value)
    return data


@pytest.mark.cases(150)
@pytest.mark.parametrize("version", [1, 2])
def test_every_field_at_0_minus_1_max_nan_and_infinity(tmp_path: Path, version: int) -> None:
    whole = good(version)
    fields = FIELDS_1 if version == 1 else FIELDS_2
    num_read = 0
    refused: list[tuple[str, FormatError]] = []
    for of_version, name, i in CASES:
        if of_version != version:
            continue
        offset, kind, _ = fields[name]
        values: list[float] = [0, -1, float(np.finfo("f4").max), np.nan, np.inf]
        if kind in BITS:
            values = [0, 255 if kind == "B" else -1, 2 ** BITS[kind] - 1]
        for value in values:
            data = bytearray(whole)
            struct.pack_into(f"<{kind}", data, offset + i * struct.calcsize(kind), value)
            path = tmp_path / "scan"
            path.write_bytes(data)
            began = time.perf_counter()
            try:
                volume = read_nifti(path)
            except FormatError as error:
                refused.append((name, error))
            else:
                num_read += 1
                # A negative slope or an intercept of -1 is legal, and says which voxels are right.
                slope = value if name == "scl_slope" and value else 1
                inter = value if name == "scl_inter" else 0
                np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX * slope + inter, f"{name} {i}")
                np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4, err_msg=f"{name} {i}")
            assert time.perf_counter() - began < 1.0
    for name, error in refused:
        assert error.field in NAMED.get(name, ()), f"{name}: {error}"
        assert code_of(error) in CODES
    assert len(refused) > 50
    assert num_read + len(refused) > 150


def with_(changes: dict[str, tuple[float, ...]]) -> bytes:
    data = good(1)
    for name, values in changes.items():
        offset, kind, _ = FIELDS_1[name]
        struct.pack_into(f"<{len(values)}{kind}", data, offset, *values)
    return bytes(data)


def srow_of(affine: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(affine[:3].ravel().tolist())


def leaning(degrees: float) -> npt.NDArray[np.float64]:
    affine = AFFINE.copy()
    affine[1, 2] = 2.5 * np.sin(np.radians(degrees))
    affine[2, 2] = 2.5 * np.cos(np.radians(degrees))
    return affine


ONLY_SFORM = {"qform_code": (0,), "sform_code": (1,)}
# Name, changed fields, severity, code, named field.
FINDINGS: list[tuple[str, dict[str, tuple[float, ...]], str, str, str]] = [
    ("forms disagree", {"qoffset": (105, 80, -300)}, "doubt", "form_conflict", "sform, qform"),
    (
        "pixdim disagrees",
        {**ONLY_SFORM, "pixdim": (1, 0.9, 0.7, 2.5)},
        "doubt",
        "form_conflict",
        "pixdim, sform",
    ),
    (
        "a lone intercept",
        {"scl_slope": (0,), "scl_inter": (5,)},
        "doubt",
        "rescale",
        "scl_slope, scl_inter",
    ),
    ("called metres", {"xyzt_units": (1,)}, "mend", "units", "xyzt_units"),
    ("called micrometres", {"xyzt_units": (3,)}, "mend", "units", "xyzt_units"),
    (
        "a shear of rounding",
        {**ONLY_SFORM, "srow": srow_of(leaning(0.8))},
        "mend",
        "shear",
        "sform",
    ),
    ("a tilted gantry", {**ONLY_SFORM, "srow": srow_of(leaning(18.5))}, "mend", "tilt", "sform"),
    (
        "no orientation",
        {"qform_code": (0,), "sform_code": (0,)},
        "refuse",
        "orientation",
        "sform_code, qform_code",
    ),
    ("NaN", {"srow": (np.nan,)}, "refuse", "orientation", "sform"),
    ("singular", {"srow": (0.0,) * 12}, "refuse", "orientation", "sform"),
    ("4D", {"dim": (4, 8, 6, 2, 2)}, "refuse", "unsupported", "dim[4]"),
    ("RGB", {"datatype": (128,), "bitpix": (24,)}, "refuse", "unsupported", "datatype"),
    ("too short", {"dim": (3, 8, 6, 5)}, "refuse", "dims", "dim"),
]


@pytest.mark.parametrize(
    ("changes", "severity", "code", "field"),
    [pytest.param(*rest, id=name) for name, *rest in FINDINGS],
)
def test_the_policy_decides_what_becomes_of_a_finding(
    tmp_path: Path, changes: dict[str, tuple[float, ...]], severity: str, code: str, field: str
) -> None:
    path = tmp_path / "scan"
    path.write_bytes(with_(changes))
    accepting: dict[str, tuple[Policy, ...]] = {
        "doubt": ("warn", "repair"),
        "mend": ("repair",),
        "refuse": (),
    }
    policies: tuple[Policy, ...] = ("error", "warn", "repair")
    for policy in policies:
        inspection = Inspection(policy)
        if policy in accepting[severity]:
            volume = read_nifti(path, inspection)
            found = inspection.report().findings[0]
            assert (found.severity, found.code, found.field) == (severity, code, field)
            if code != "tilt":
                np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX)
            if code in ("form_conflict", "rescale", "units"):  # the sform is followed
                np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
        else:
            with pytest.raises(FormatError) as caught:
                read_nifti(path, inspection)
            assert (code_of(caught.value), caught.value.field) == (code, field)
    if severity == "mend":
        with pytest.raises(FormatError):
            read_nifti_labels(path)


def test_a_mended_shear_keeps_centre_and_spacing_and_moves_voxels_little(tmp_path: Path) -> None:
    path = tmp_path / "scan"
    path.write_bytes(with_({**ONLY_SFORM, "srow": srow_of(leaning(0.8))}))
    volume = read_nifti(path, Inspection("repair"))
    axes = volume.affine[:3, :3]
    np.testing.assert_allclose(np.linalg.norm(axes, axis=0), (0.8, 0.7, 2.5), rtol=1e-6)
    np.testing.assert_allclose(axes.T @ axes, np.diag((0.64, 0.49, 6.25)), atol=1e-5)
    centre = np.array([3.5, 2.5, 1.5, 1.0])
    np.testing.assert_allclose(volume.affine @ centre, leaning(0.8) @ centre, atol=1e-4)
    corner = np.array([7.0, 5.0, 3.0, 1.0])
    assert np.linalg.norm((volume.affine - leaning(0.8)) @ corner) < 0.35


def test_non_finite_voxels_are_counted(tmp_path: Path) -> None:
    voxels = HU_ZYX.astype(np.float32)
    voxels[0, 0, :3] = np.nan, np.inf, -np.inf
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), AFFINE), tmp_path / "scan.nii")
    with pytest.raises(FormatError, match=f"3 of {HU_ZYX.size} are NaN") as caught:
        read_nifti(tmp_path / "scan.nii", Inspection("repair"))
    assert caught.value.code == "non_finite"


def test_facts_say_what_was_stored(tmp_path: Path) -> None:
    ras = np.diag([0.8, 0.7, 2.5, 1.0])
    image = nib.Nifti2Image(
        HU_ZYX.astype(np.float32).transpose(2, 1, 0) + 0.25,
        ras,
        header=nib.Nifti2Header(endianness=">"),
    )
    nib.save(image, tmp_path / "scan.nii.gz")
    inspection = Inspection()
    read_nifti(tmp_path / "scan.nii.gz", inspection)
    assert inspection.facts | {"spacing_mm": None} == {
        "format": "NIfTI-2",
        "stored_type": "float32",
        "byte_order": "big",
        "gzip_members": 1,
        "shape_zyx": list(SHAPE_ZYX),
        "affine_source": "sform",
        "stored_axes": "RAS",
        "spacing_mm": None,
    }
    [found] = inspection.report().findings
    assert (found.severity, found.code) == ("note", "dtype")


def test_the_real_sheared_scan_is_straightened(real_ct: Path) -> None:
    path = real_ct / "nifti" / "philips_phantom_sheared_sform_tilt-18.5_int16.nii.gz"
    with pytest.raises(FormatError) as caught:
        read_nifti(path, Inspection("warn"))
    assert caught.value.code == "tilt"
    inspection = Inspection("repair")
    volume = read_nifti(path, inspection)
    codes = [(f.severity, f.code) for f in inspection.report().findings]
    assert codes[:2] == [("doubt", "form_conflict"), ("mend", "tilt")]
    axes = volume.affine[:3, :3] / volume.spacing_mm[::-1]
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=2e-3)  # MAX_SHEAR_DEG
    assert volume.hu_ZYX.min() == -1024

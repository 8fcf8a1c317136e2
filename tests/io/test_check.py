"""Reports of scans, policies, and what only some formats take, through the one door."""

import json
import struct
import zipfile
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import AFFINE as DICOM_AFFINE
from dicom_series import HU_ZYX as DICOM_HU_ZYX
from dicom_series import SPACING, Z_MM, change, write_series

from tapct_fast.errors import FormatError, InputError, Policy
from tapct_fast.io.findings import Finding, Report
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.read import check_series, check_volume, find_scans, read_volume

AFFINE = np.array([[-0.8, 0, 0, 100.0], [0, -0.7, 0, 80.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]])
HU_ZYX = np.random.default_rng(0).normal(0, 300, (6, 20, 24)).clip(-1000, 1500).astype(np.int16)


def write(path: Path, hu_ZYX: np.ndarray = HU_ZYX, **changes: tuple[int, str, float]) -> Path:
    image = nib.Nifti1Image(hu_ZYX.transpose(2, 1, 0), AFFINE)
    image.set_sform(AFFINE, code=1)
    image.set_qform(AFFINE, code=1)
    data = bytearray(image.to_bytes())
    for offset, layout, value in changes.values():
        struct.pack_into(f"<{layout}", data, offset, value)
    path.write_bytes(data)
    return path


INTERCEPT = {"slope": (112, "f", 0.0), "inter": (116, "f", 5.0)}
FORMS = {"qoffset_x": (268, "f", 105.0)}
METRES = {"xyzt_units": (123, "B", 1)}
DOUBTS = [
    ("doubt", "rescale", "scl_slope, scl_inter"),
    ("doubt", "form_conflict", "sform, qform"),
    ("doubt", "hu", "HU"),
]


def named(report: Report) -> list[tuple[str, str, str]]:
    return [finding[:3] for finding in report.findings]


def assert_read_as_reported(path: Path, report: Report) -> None:
    """Hold ``refusal`` of each policy to what ``read_volume`` does."""
    for policy in get_args(Policy):
        refusal = report.refusal(policy)
        if refusal is None:
            read_volume(path, policy=policy)
            continue
        with pytest.raises(FormatError) as caught:
            read_volume(path, policy=policy)
        assert (caught.value.field, caught.value.reason) == (refusal.field, refusal.reason)


def test_a_sound_scan_has_no_findings(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii")
    report = check_volume(path)
    assert report.findings == ()
    assert [report.refusal(policy) for policy in get_args(Policy)] == [None] * 3
    assert read_volume(path).report == report


def test_a_report_lists_all_doubts_of_a_scan(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii", HU_ZYX.clip(0, 200), **INTERCEPT, **FORMS)
    report = check_volume(path)
    assert named(report) == DOUBTS
    assert report.refusal("error") == report.findings[0]
    assert report.refusal("warn") is None
    assert_read_as_reported(path, report)
    volume = read_volume(path, policy="warn")
    np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX.clip(0, 200))
    assert volume.report == report
    assert named(check_volume(path, check_hu=False)) == DOUBTS[:2]


def test_a_policy_stops_at_the_first_finding_beyond_it(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii", **INTERCEPT, **METRES)
    report = check_volume(path)
    assert named(report) == [DOUBTS[0], ("mend", "units", "xyzt_units")]
    assert report.refusal("error") == report.findings[0]
    assert report.refusal("warn") == report.findings[1]
    assert report.refusal("repair") is None
    assert_read_as_reported(path, report)
    np.testing.assert_allclose(read_volume(path, policy="repair").affine, AFFINE, atol=1e-4)


def test_damage_ends_the_report_for_every_policy(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii", **INTERCEPT)
    path.write_bytes(path.read_bytes()[:-1])
    report = check_volume(path)
    assert named(report) == [("refuse", "dims", "dim")]
    for policy in get_args(Policy):
        assert report.refusal(policy) == report.findings[0]
    assert_read_as_reported(path, report)


def test_a_series_tells_all_refusals_in_the_order_of_reading(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "series")
    change(paths[1], RescaleSlope="0")
    change(paths[2], HighBit=3)
    report = check_series(tmp_path / "series")
    assert {f.field for f in report.findings} == {"RescaleSlope", "HighBit"}
    assert len(report.findings) == 2
    assert_read_as_reported(tmp_path / "series", report)


def test_a_series_tells_what_can_be_mended(tmp_path: Path) -> None:
    write_series(tmp_path / "series", [(z * 1.01**n, 0.3 * z) for n, z in enumerate(Z_MM)])
    report = check_series(tmp_path / "series", check_hu=False)
    assert {("mend", "tilt"), ("mend", "uneven_spacing")} <= {f[:2] for f in report.findings}
    assert report.refusal("repair") is None
    refusal = report.refusal("warn")
    assert isinstance(refusal, Finding)
    assert refusal.severity == "mend"


def test_what_is_no_series_and_what_is_not_there_are_input_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii")
    with pytest.raises(InputError, match="use check_volume"):
        check_series(path)
    for check in (check_volume, check_series):
        with pytest.raises(InputError, match="No such file"):
            check(tmp_path / "absent")
    with pytest.raises(InputError, match="policy='lenient' is not one of error, warn, repair"):
        read_volume(path, policy="lenient")  # type: ignore[arg-type]


def test_a_buffer_holds_the_voxels_of_nifti_and_is_refused_elsewhere(tmp_path: Path) -> None:
    buffer = np.empty(HU_ZYX.size + 512, np.int16)
    volume = read_volume(write(tmp_path / "scan.nii"), buffer=buffer)
    np.testing.assert_array_equal(volume.hu_ZYX, HU_ZYX)
    assert np.shares_memory(volume.hu_ZYX, buffer)
    write_series(tmp_path / "series")
    sitk.WriteImage(sitk.GetImageFromArray(HU_ZYX), tmp_path / "scan.mha")
    for path in (tmp_path / "series", tmp_path / "scan.mha"):
        with pytest.raises(InputError, match="buffer= is for NIfTI files"):
            read_volume(path, buffer=buffer)


def test_threads_change_nothing_but_time(tmp_path: Path) -> None:
    hu_ZYX = np.random.default_rng(1).integers(-1000, 1500, (20, 512, 512)).astype(np.int16)
    write_nifti(tmp_path / "scan.nii.gz", hu_ZYX, AFFINE, level=1)
    for threads in (1, 3):
        volume = read_volume(tmp_path / "scan.nii.gz", threads=threads)
        np.testing.assert_array_equal(volume.hu_ZYX, hu_ZYX)
        assert volume.report is not None
        assert volume.report.facts["gzip_members"] == 3
    with pytest.raises(InputError, match="threads=0 is not positive"):
        read_volume(tmp_path / "scan.nii.gz", threads=0)


def test_archives_are_found_and_read(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "made")
    (tmp_path / "scans").mkdir()
    nifti = write(tmp_path / "scans" / "b.nii")
    archive = tmp_path / "scans" / "a.ZIP"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in paths:
            file.write(path, f"deep/{path.name}")
    assert find_scans([tmp_path / "scans"]) == [archive, nifti]
    volume = read_volume(archive, check_hu=False)
    np.testing.assert_array_equal(volume.hu_ZYX, DICOM_HU_ZYX)
    np.testing.assert_allclose(volume.affine, DICOM_AFFINE, atol=1e-9)
    assert check_series(archive, check_hu=False) == volume.report


@pytest.mark.parametrize("kind", ["NIfTI-1", "NRRD", "MetaImage", "DICOM"])
def test_facts_of_every_format_say_what_was_stored(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"scan.{ {'NIfTI-1': 'nii', 'NRRD': 'nrrd'}.get(kind, 'mha') }"
    if kind == "DICOM":
        path = tmp_path / "series"
        hu_ZYX, spacing = DICOM_HU_ZYX, SPACING
        write_series(path)
    else:
        hu_ZYX, spacing = HU_ZYX, (2.5, 0.7, 0.8)
        image = sitk.GetImageFromArray(HU_ZYX[:, :, ::-1])  # to the right: stored axes RPS
        image.SetSpacing((0.8, 0.7, 2.5))
        image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
        sitk.WriteImage(image, path)
    volume = read_volume(path, policy="warn")
    np.testing.assert_array_equal(volume.hu_ZYX, hu_ZYX)
    assert volume.report is not None
    facts = json.loads(json.dumps(volume.report.to_json()))["facts"]
    assert facts["format"] == kind
    assert facts["shape_zyx"] == list(hu_ZYX.shape)
    assert facts["spacing_mm"] == pytest.approx(spacing, rel=1e-6)
    assert facts["stored_axes"] == ("LPS" if kind == "DICOM" else "RPS")
    assert facts["hu_range"] == [hu_ZYX.min(), hu_ZYX.max()]
    if kind in ("NIfTI-1", "DICOM"):
        assert facts["stored_type"] == "int16"

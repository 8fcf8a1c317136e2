"""Every real scan loads as two other readers load it, or is refused for its reason, by policy.

Shape suffixes: Z Y X voxels.
"""

from pathlib import Path
from typing import NamedTuple, get_args

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread

from tapct_fast.errors import FormatError, Policy
from tapct_fast.io.dicom.read import list_series
from tapct_fast.io.findings import code_of
from tapct_fast.io.read import check_volume, read_volume
from tapct_fast.io.volume import Volume


class Outcome(NamedTuple):
    """Field and code with which each policy refuses; None where it loads."""

    error: tuple[str, str] | None = None
    warn: tuple[str, str] | None = None
    repair: tuple[str, str] | None = None


LOADS = Outcome()
NO_HU = Outcome(error=("HU", "hu"))  # label maps and an 8-bit image: kept as they are by "warn"


def always(field: str, code: str) -> Outcome:
    return Outcome(*[(field, code)] * 3)


EXPECTED = {
    "nifti/crlm1004_abdomen_native_slope1_inter-1024_int16.nii.gz": LOADS,
    "nifti/ct_pitch_oblique_uint8.nii.gz": NO_HU,
    "nifti/lidc0314_chest_native_z120-139_int16.nii.gz": LOADS,
    "nifti/philips_phantom_4d_2kernels_int16.nii.gz": always("dim[4]", "unsupported"),
    "nifti/philips_phantom_sheared_sform_tilt-18.5_int16.nii.gz": Outcome(
        error=("sform, qform", "form_conflict"), warn=("sform", "tilt")
    ),
    "nifti/sts003_ct_f32_qform.nii.gz": LOADS,
    "nifti/sts003_tumour_mask.nii.gz": NO_HU,
    "nifti/ts_ct_3mm_int32.nii.gz": LOADS,
    "nifti/ts_ct_3mm_seg62.nii.gz": NO_HU,
    "nifti/ts_ct_sm_int16.nii.gz": LOADS,
    "nifti/ts_ct_sm_seg42.nii.gz": NO_HU,
    "nifti/ts_label_names.json": always("file", "unsupported"),
    "dicom/crlm1004_syntaxes/deflate": LOADS,
    "dicom/crlm1004_syntaxes/explicit": LOADS,
    "dicom/crlm1004_syntaxes/j2k": LOADS,
    "dicom/crlm1004_syntaxes/jpegls": LOADS,
    "dicom/crlm1004_syntaxes/jpll": LOADS,
    "dicom/crlm1004_syntaxes/rle": LOADS,
    "dicom/ge_tilt18.5_uneven_jpegls": Outcome(
        *[("ImagePositionPatient", "tilt")] * 2  # repaired: see hostile/test_dicom_real.py
    ),
    "dicom/oddities": always("SeriesInstanceUID", "foreign_slices"),
    "dicom/sts004_implicit_40slices": LOADS,
    "dicom/ts_j2k_20slices": LOADS,
    "dicom/ts_j2k_20slices_seg32.nii.gz": NO_HU,
}


def test_every_file_and_folder_has_its_outcome(real_ct: Path) -> None:
    files = [path for path in (real_ct / "nifti").iterdir() if path.is_file()]
    for path in (real_ct / "dicom").rglob("*"):
        if path.is_file():
            files.append(path if path.parent.name == "dicom" else path.parent)
    assert {path.relative_to(real_ct).as_posix() for path in files} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_real_scan_loads_right_or_is_refused_for_its_reason(real_ct: Path, name: str) -> None:
    path = real_ct / name
    report = check_volume(path)
    for policy in get_args(Policy):
        refused = getattr(EXPECTED[name], policy)
        refusal = report.refusal(policy)
        assert (refusal and (refusal.field, refusal.code)) == refused
        if refused:
            with pytest.raises(FormatError) as caught:
                read_volume(path, policy=policy)
            assert (caught.value.field, code_of(caught.value)) == refused
            continue
        volume = read_volume(path, policy=policy)
        if any(finding.severity == "mend" for finding in report.findings):
            continue  # resampled: no other reader's grid
        if path.is_dir():
            assert_as_pydicom_reads(volume, path)
        else:
            assert_as_nibabel_reads(volume, path)
        assert_as_simpleitk_reads(volume, path)


def assert_as_nibabel_reads(volume: Volume, path: Path) -> None:
    canonical = nib.as_closest_canonical(nib.load(path))
    hu_ZYX = np.rint(np.asarray(canonical.dataobj)[::-1, ::-1]).transpose(2, 1, 0)
    np.testing.assert_array_equal(volume.hu_ZYX, hu_ZYX)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])  # index x and y run the other way
    flip[:2, 3] = np.array(volume.hu_ZYX.shape[:0:-1]) - 1
    np.testing.assert_allclose(volume.affine, canonical.affine @ flip, atol=1e-3)


def assert_as_pydicom_reads(volume: Volume, folder: Path) -> None:
    slices = [dcmread(path) for path in folder.iterdir()]
    slices.sort(key=lambda dataset: dataset.ImagePositionPatient[2])
    hu = [d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in slices]
    np.testing.assert_array_equal(volume.hu_ZYX, np.stack(hu))
    first, last = (np.array(slices[n].ImagePositionPatient, float) for n in (0, -1))
    step = (last - first) / (len(slices) - 1)
    np.testing.assert_allclose(volume.affine[:3, 3], first * (-1, -1, 1), atol=1e-6)
    np.testing.assert_allclose(volume.affine[:3, 2], step * (-1, -1, 1), atol=1e-3)
    assert volume.spacing_mm[1:] == pytest.approx([float(mm) for mm in slices[0].PixelSpacing])


def assert_as_simpleitk_reads(volume: Volume, path: Path) -> None:
    source: str | tuple[str, ...] = str(path)
    if path.is_dir():
        source = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
    image = sitk.DICOMOrient(sitk.ReadImage(source), "LPS")
    np.testing.assert_array_equal(volume.hu_ZYX, np.rint(sitk.GetArrayFromImage(image)))
    for index_xyz in ([0, 0, 0], [n - 1 for n in image.GetSize()], [3, 1, 1]):
        lps = np.array(image.TransformIndexToPhysicalPoint(index_xyz))
        ras = (volume.affine @ [*index_xyz, 1])[:3]
        # SimpleITK's spacing of DICOM slices is rounded to two digits.
        np.testing.assert_allclose(ras, lps * (-1, -1, 1), atol=1e-2 if path.is_dir() else 2e-3)


def test_the_sheared_scan_is_resampled_where_its_sform_says(real_ct: Path) -> None:
    path = real_ct / "nifti" / "philips_phantom_sheared_sform_tilt-18.5_int16.nii.gz"
    volume = read_volume(path, policy="repair")
    image = nib.load(path)
    stored_xyz = np.maximum(np.asarray(image.dataobj), -1024)
    to_stored = np.linalg.inv(image.get_sform()) @ volume.affine
    num_compared = 0
    for index_zyx in np.random.default_rng(0).integers(0, volume.hu_ZYX.shape, (3000, 3)):
        at = (to_stored @ [*index_zyx[::-1], 1])[:3]
        low = np.floor(at + 1e-6).astype(int)
        if (low < 0).any() or (low + 1 >= stored_xyz.shape).any():
            continue
        expected = stored_xyz[tuple(slice(n, n + 2) for n in low)].astype(float)
        for fraction in at - low:  # trilinear
            expected = (1 - fraction) * expected[0] + fraction * expected[1]
        # Blends below a thousandth of a pixel count as none: 4000 HU x 1e-3, and the rounding.
        assert abs(volume.hu_ZYX[tuple(index_zyx)] - expected) <= 5.0
        num_compared += 1
    assert num_compared > 1000


@pytest.mark.parametrize("policy", get_args(Policy))
def test_each_oddity_is_read_or_refused(real_ct: Path, policy: Policy) -> None:
    folder = real_ct / "dicom" / "oddities"
    found = list_series(folder)
    assert sorted(info.num_slices for info in found) == [1, 1, 2]
    for info in found:
        if info.num_slices == 2:  # one object; its voxels: hostile/test_dicom_real.py
            volume = read_volume(folder, series=info.key, policy=policy, check_hu=False)
            assert volume.hu_ZYX.shape[0] == 2
            continue
        with pytest.raises(FormatError, match="one slice") as caught:
            read_volume(folder, series=info.key, policy=policy, check_hu=False)
        assert (caught.value.field, caught.value.code) == ("ImagePositionPatient", "missing_slices")

"""Conversions against the libraries' own readers and writers, in every storage layout."""

import importlib.util
import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io import convert
from tapct_fast.io.convert import (
    from_monai,
    from_nibabel,
    from_numpy,
    from_simpleitk,
    save_nifti,
    to_monai,
    to_nibabel,
    to_simpleitk,
)
from tapct_fast.io.orient import StoredGrid
from tapct_fast.io.read import read_labels, read_volume
from tapct_fast.io.volume import Volume

sitk = pytest.importorskip("SimpleITK")

SPACING_XYZ = (0.7, 0.9, 3.0)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
LAYOUTS = list(
    itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
)
UPRIGHT, OBLIQUE = (0.0, 0.0, 0.0), (14.0, -9.0, 21.0)
NAMED = {  # world axis and sign of the stored x, y, z
    "RAS": ((0, 1, 2), (1, 1, 1)),
    "LAS": ((0, 1, 2), (-1, 1, 1)),
    "LPS": ((0, 1, 2), (-1, -1, 1)),
    "PSR": ((1, 2, 0), (-1, 1, 1)),
    "IRA": ((2, 0, 1), (-1, 1, 1)),
}


@pytest.fixture
def monai_data():
    return pytest.importorskip("monai.data", reason="MONAI is optional and not installed")


def stored(order, signs, angles_deg=UPRIGHT):
    """Return HU [z, y, x] and the affine of one storage layout."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for voxel, world in enumerate(order):
        affine[world, voxel] = signs[voxel] * SPACING_XYZ[voxel]
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(angles_deg)):
        i, j = (k for k in range(3) if k != axis)
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, 3] = (11.0, -7.0, 5.0)
    rng = np.random.default_rng(0)
    return rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16), affine


def assert_same(found: Volume, expected: Volume, *, atol: float = 1e-9) -> None:
    np.testing.assert_array_equal(found.hu_ZYX, expected.hu_ZYX)
    np.testing.assert_allclose(found.affine, expected.affine, atol=atol)
    np.testing.assert_allclose(found.spacing_mm, expected.spacing_mm, rtol=1e-6)


def own(order=(0, 1, 2), signs=(-1, -1, 1), angles_deg=UPRIGHT) -> Volume:
    return from_numpy(*stored(order, signs, angles_deg))


@pytest.mark.parametrize(("order", "signs"), LAYOUTS)
@pytest.mark.parametrize("angles_deg", [UPRIGHT, OBLIQUE])
def test_every_layout_comes_in_alike_from_every_library(order, signs, angles_deg, tmp_path) -> None:
    hu_zyx, affine = stored(order, signs, angles_deg)
    before = hu_zyx.copy()
    volume = from_numpy(hu_zyx, affine)
    np.testing.assert_array_equal(hu_zyx, before)  # never turned in place
    # The file that nibabel writes is the reference; a sform holds float32.
    image = nibabel.Nifti1Image(hu_zyx.T, affine)
    nibabel.save(image, tmp_path / "scan.nii")
    expected = read_volume(tmp_path / "scan.nii")
    assert_same(volume, expected, atol=1e-5)
    assert_same(from_nibabel(image), expected, atol=1e-5)
    assert_same(from_nibabel(nibabel.load(tmp_path / "scan.nii")), expected)
    # ITK's world is LPS; it reads this file on its own.
    assert_same(from_simpleitk(sitk.ReadImage(tmp_path / "scan.nii")), expected, atol=1e-4)
    for turned in (from_nibabel(to_nibabel(volume)), from_simpleitk(to_simpleitk(volume))):
        assert_same(turned, volume)


@pytest.mark.parametrize("angles_deg", [UPRIGHT, OBLIQUE])
@pytest.mark.parametrize(("order", "signs"), NAMED.values(), ids=NAMED)
def test_what_goes_out_is_what_the_library_reads_from_our_file(
    order, signs, angles_deg, tmp_path
) -> None:
    volume = own(order, signs, angles_deg)
    save_nifti(tmp_path / "lps.nii", volume.hu_ZYX, volume, frame="lps")
    ours, theirs = to_nibabel(volume), nibabel.load(tmp_path / "lps.nii")
    np.testing.assert_array_equal(ours.dataobj, theirs.dataobj)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
    assert ours.header.get_xyzt_units()[0] == "mm"
    assert nibabel.aff2axcodes(ours.affine) == ("L", "P", "S")

    ours, theirs = to_simpleitk(volume), sitk.ReadImage(tmp_path / "lps.nii")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(ours.GetSpacing(), theirs.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(ours.GetOrigin(), theirs.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(ours.GetDirection(), theirs.GetDirection(), atol=1e-6)
    for index in ((0, 0, 0), (5, 4, 3), (1, 2, 3)):
        z, y, x = index[::-1]
        if z < volume.hu_ZYX.shape[0] and y < volume.hu_ZYX.shape[1]:
            world_ras = volume.affine @ [x, y, z, 1]
            place = ours.TransformIndexToPhysicalPoint((x, y, z))
            np.testing.assert_allclose((LPS_TO_RAS @ world_ras)[:3], place, atol=1e-9)


def test_images_written_by_the_libraries_come_back_from_disk(tmp_path) -> None:
    volume = own(*NAMED["PSR"], OBLIQUE)
    nibabel.save(to_nibabel(volume), tmp_path / "n.nii.gz")
    assert_same(read_volume(tmp_path / "n.nii.gz"), volume, atol=1e-5)
    for name in ("s.nii.gz", "s.nrrd", "s.mha"):
        sitk.WriteImage(to_simpleitk(volume), tmp_path / name)
        assert_same(read_volume(tmp_path / name), volume, atol=1e-4)


def test_memory_is_shared_where_it_can_be() -> None:
    hu_zyx, affine = stored(*NAMED["LPS"])
    volume = from_numpy(hu_zyx, affine)
    assert volume.hu_ZYX is hu_zyx or np.shares_memory(volume.hu_ZYX, hu_zyx)
    image = to_nibabel(volume)
    assert np.shares_memory(np.asanyarray(image.dataobj), hu_zyx)
    again = from_nibabel(image)
    again.hu_ZYX[1, 2, 3] = 77
    assert hu_zyx[1, 2, 3] == 77 == image.dataobj[3, 2, 1]
    copied = to_simpleitk(volume)
    hu_zyx[1, 2, 3] = 5
    assert copied[3, 2, 1] == 77  # SimpleITK's memory is its own
    turned = from_numpy(*stored(*NAMED["RAS"]))
    assert not np.shares_memory(turned.hu_ZYX, stored(*NAMED["RAS"])[0])


def test_a_simpleitk_image_may_go_away_and_may_change() -> None:
    hu_zyx, affine = stored(*NAMED["LPS"])
    image = to_simpleitk(from_numpy(hu_zyx, affine))
    view = sitk.GetArrayViewFromImage(image)  # asked for later, it would be of a copy
    volume = from_simpleitk(image)
    assert np.shares_memory(volume.hu_ZYX, view)
    del view
    image += 1  # frees what the image held
    image[0, 0, 0] = 99
    del image
    rest = [sitk.Image(6, 5, 4, sitk.sitkInt16) + n for n in range(50)]  # would reuse the memory
    np.testing.assert_array_equal(volume.hu_ZYX, hu_zyx)
    assert len(rest) == 50


@pytest.mark.parametrize(("order", "signs"), LAYOUTS)
@pytest.mark.parametrize("angles_deg", [UPRIGHT, OBLIQUE])
def test_every_layout_comes_in_from_monai(monai_data, order, signs, angles_deg) -> None:
    hu_zyx, affine = stored(order, signs, angles_deg)
    expected = from_numpy(hu_zyx, affine)
    assert_same(from_monai(to_monai(expected)), expected)
    tensor = monai_data.MetaTensor(hu_zyx.T[None].astype(np.float32), affine=affine)
    assert_same(from_monai(tensor), expected)
    assert_same(from_monai(tensor[0]), expected)  # without channels
    lps = monai_data.MetaTensor(
        hu_zyx.T[None].copy(), affine=LPS_TO_RAS @ affine, meta={"space": "LPS"}
    )
    assert_same(from_monai(lps), expected)


@pytest.mark.parametrize("reader", ["NibabelReader", "ITKReader"])
@pytest.mark.parametrize(("order", "signs"), NAMED.values(), ids=NAMED)
@pytest.mark.usefixtures("monai_data")
def test_monai_tensors_are_as_load_image_gives(reader, order, signs, tmp_path) -> None:
    if reader == "ITKReader" and importlib.util.find_spec("itk") is None:
        pytest.skip("MONAI's ITKReader needs itk")
    load = pytest.importorskip("monai.transforms").LoadImage(reader, ensure_channel_first=True)
    hu_zyx, affine = stored(order, signs, OBLIQUE)
    nibabel.save(nibabel.Nifti1Image(hu_zyx.T, affine), tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert_same(from_monai(load(tmp_path / "scan.nii.gz")), volume, atol=1e-4)
    # Our file in canonical LPS: LoadImage gives the tensor that to_monai makes.
    save_nifti(tmp_path / "lps.nii.gz", volume.hu_ZYX, volume, frame="lps")
    ours, theirs = to_monai(volume), load(tmp_path / "lps.nii.gz")
    assert ours.shape == theirs.shape == (1, *volume.hu_ZYX.shape[::-1])
    np.testing.assert_array_equal(ours.float().numpy(), theirs.numpy())
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    assert ours.meta["space"] == theirs.meta["space"]
    assert tuple(ours.meta["spatial_shape"]) == tuple(theirs.meta["spatial_shape"])


@pytest.mark.usefixtures("monai_data")
def test_monai_shares_int16_and_rounds_floats() -> None:
    volume = own()
    tensor = to_monai(volume)
    assert tensor.is_floating_point() is False
    assert np.shares_memory(tensor.as_tensor().numpy(), volume.hu_ZYX)
    assert np.shares_memory(from_monai(tensor).hu_ZYX, volume.hu_ZYX)
    assert not np.shares_memory(tensor.affine.numpy(), volume.affine)
    assert_same(from_monai(tensor.float() + 0.25), volume)


def test_monai_tensors_that_are_not_one_scan_are_refused(monai_data) -> None:
    tensor = to_monai(own())
    batch = monai_data.MetaTensor(tensor.as_tensor()[None].repeat(2, 1, 1, 1, 1))
    with pytest.raises(InputError, match="not a MetaTensor; use from_numpy"):
        from_monai(tensor.as_tensor())
    with pytest.raises(InputError, match=r"not \(1, X, Y, Z\)"):
        from_monai(batch)
    with pytest.raises(InputError, match="bfloat16 cannot hold HU"):
        from_monai(tensor.bfloat16())
    batch.is_batch = True
    with pytest.raises(InputError, match="is a batch"):
        from_monai(batch)


def nan_affine() -> np.ndarray:
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[0, 3] = np.nan
    return affine


def sheared() -> np.ndarray:
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[1, 2] = 0.6
    return affine


LPS = np.diag([-1.0, -1.0, 2.0, 1.0])
HU = np.arange(-1000, 1000, 2000 // 60 + 1, dtype=np.int16).reshape(-1, 1, 1).repeat(4, 2)


@pytest.mark.parametrize(
    ("array", "affine", "words"),
    [
        (HU, nan_affine(), "NaN"),
        (HU, sheared(), "sheared"),
        (HU, np.eye(3), "shape"),
        (HU[0], LPS, "three axes"),
        (HU[:0], LPS, "three axes"),
        (np.where(HU > 900, np.nan, HU), LPS, "NaN"),
        (HU.astype(np.int32) + 40000, LPS, "do not fit int16"),
        (HU.astype(np.complex64), LPS, "not real"),
        (np.abs(HU % 7), LPS, "HU: .*check_hu=False"),
    ],
)
def test_arrays_are_judged_as_files_are(array, affine, words) -> None:
    with pytest.raises(FormatError, match=words):
        from_numpy(array, affine)


def test_doubts_follow_the_policy() -> None:
    labels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert from_numpy(labels, LPS, check_hu=False).hu_ZYX.tolist() == labels.tolist()
    volume = from_numpy(labels, LPS, policy="warn")
    assert volume.report is not None
    assert [finding.code for finding in volume.report.findings] == ["hu"]


def test_nibabel_headers_are_judged_as_files_are() -> None:
    hu_zyx, affine = stored(*NAMED["RAS"])

    def image(**changes):
        made = nibabel.Nifti1Image(hu_zyx.T, affine)
        made.set_qform(affine, code=1)
        for name, arguments in changes.items():
            getattr(made, name)(*arguments)
        return made

    assert_same(from_nibabel(image()), from_numpy(hu_zyx, affine))
    moved = affine.copy()
    moved[0, 3] += 5
    conflict = image(set_qform=(moved, 1))
    with pytest.raises(FormatError, match="up to 5 mm apart"):
        from_nibabel(conflict)
    kept = from_nibabel(conflict, policy="warn")
    assert_same(kept, from_numpy(hu_zyx, affine))
    assert kept.report is not None
    assert [finding.code for finding in kept.report.findings] == ["form_conflict"]
    with pytest.raises(FormatError, match="both are 0"):
        from_nibabel(image(set_sform=(affine, 0), set_qform=(affine, 0)))
    metres = nibabel.Nifti1Image(hu_zyx.T, np.diag([0.001, 0.001, 0.001, 1.0]) @ affine)
    metres.header.set_xyzt_units("meter")
    assert_same(from_nibabel(metres), from_numpy(hu_zyx, affine), atol=1e-5)
    series = nibabel.Nifti1Image(np.stack([hu_zyx.T] * 2, -1), affine)
    with pytest.raises(FormatError, match="three axes"):
        from_nibabel(series)
    assert_same(from_nibabel(series.slicer[..., :1]), from_numpy(hu_zyx, affine))


def test_nibabel_scaling_is_applied_and_rounded(tmp_path) -> None:
    hu_zyx, affine = stored(*NAMED["LPS"])
    image = nibabel.Nifti1Image(hu_zyx.T + 1024, affine)
    image.header.set_slope_inter(1, -1024)
    image.to_filename(tmp_path / "scaled.nii")
    loaded = nibabel.load(tmp_path / "scaled.nii")
    assert_same(from_nibabel(loaded), read_volume(tmp_path / "scaled.nii"))


def test_simpleitk_images_that_are_not_one_scan_are_refused() -> None:
    for image in (
        sitk.Image(4, 4, sitk.sitkInt16),
        sitk.Image((4, 4, 4, 2), sitk.sitkInt16),
        sitk.Image((4, 4, 4), sitk.sitkVectorInt16, 3),
    ):
        with pytest.raises(FormatError, match="not 3D and scalar"):
            from_simpleitk(image)


@pytest.mark.parametrize(
    ("call", "module"),
    [
        (lambda: to_nibabel(own()), "nibabel"),
        (lambda: from_nibabel(None), "nibabel"),
        (lambda: to_simpleitk(own()), "SimpleITK"),
        (lambda: from_simpleitk(None), "SimpleITK"),
        (lambda: to_monai(own()), "monai"),
        (lambda: from_monai(None), "monai"),
    ],
)
def test_a_missing_library_is_named_and_a_wrong_type_refused(call, module, monkeypatch) -> None:
    if importlib.util.find_spec(module) is not None and "from" in call.__code__.co_names[0]:
        with pytest.raises(InputError, match="NoneType is not a"):
            call()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        convert, "find_spec", lambda name: None if name == module else find_spec(name)
    )
    with pytest.raises(InputError, match=f"pip install {module}"):
        call()


@pytest.mark.parametrize("angles_deg", [UPRIGHT, OBLIQUE])
@pytest.mark.parametrize(("order", "signs"), LAYOUTS)
def test_a_label_map_overlays_the_file_voxel_for_voxel(order, signs, angles_deg, tmp_path) -> None:
    hu_zyx, affine = stored(order, signs, angles_deg)
    nibabel.save(nibabel.Nifti1Image(hu_zyx.T, affine), tmp_path / "scan.nii.gz")
    scan = nibabel.load(tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    labels_ZYX = (volume.hu_ZYX > 300).astype(np.uint8)
    save_nifti(tmp_path / "labels.nii.gz", labels_ZYX, volume)
    labels = nibabel.load(tmp_path / "labels.nii.gz")
    assert labels.shape == scan.shape
    np.testing.assert_array_equal(labels.affine, scan.affine)
    np.testing.assert_array_equal(np.asarray(labels.dataobj), np.asarray(scan.dataobj) > 300)
    # ITK must agree on the place of the voxels, not nibabel alone.
    itk_scan = sitk.ReadImage(tmp_path / "scan.nii.gz")
    itk_labels = sitk.ReadImage(tmp_path / "labels.nii.gz")
    np.testing.assert_allclose(itk_labels.GetOrigin(), itk_scan.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(itk_labels.GetDirection(), itk_scan.GetDirection(), atol=1e-5)
    # And back: read as labels, the map lies on the volume.
    again = read_labels(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(again.hu_ZYX, labels_ZYX)
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-9)


def test_the_frame_may_be_canonical_and_the_scan_of_any_kind(tmp_path) -> None:
    image = to_simpleitk(own(*NAMED["RAS"], OBLIQUE))
    image = sitk.DICOMOrient(image, "SAL")
    sitk.WriteImage(image, tmp_path / "scan.nrrd")
    volume = read_volume(tmp_path / "scan.nrrd")
    mask_ZYX = volume.hu_ZYX < 0
    save_nifti(str(tmp_path / "scan_frame.nii"), mask_ZYX, volume)
    found = sitk.ReadImage(tmp_path / "scan_frame.nii")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(image) < 0)
    np.testing.assert_allclose(found.GetOrigin(), image.GetOrigin(), atol=1e-4)
    save_nifti(tmp_path / "lps.nii", mask_ZYX, volume, frame="lps")
    found = nibabel.load(tmp_path / "lps.nii")
    np.testing.assert_array_equal(np.asarray(found.dataobj), mask_ZYX.T)
    np.testing.assert_allclose(found.affine, volume.affine, atol=1e-5)
    # A volume without a file of its own has its own axes.
    bare = Volume(volume.hu_ZYX, volume.spacing_mm, volume.affine)
    save_nifti(tmp_path / "bare.nii", mask_ZYX, bare)
    assert (tmp_path / "bare.nii").read_bytes() == (tmp_path / "lps.nii").read_bytes()


@pytest.mark.parametrize("angles_deg", [UPRIGHT, OBLIQUE])
@pytest.mark.parametrize(("order", "signs"), NAMED.values(), ids=NAMED)
def test_features_keep_their_place_and_channels(order, signs, angles_deg, tmp_path) -> None:
    volume = own(order, signs, angles_deg)
    # A token grid with patches of (2, 2, 3) voxels: centres lie between voxels.
    grid = np.diag([3.0, 2.0, 2.0, 1.0])
    grid[:3, 3] = (1.0, 0.5, 0.5)
    affine = volume.affine @ grid
    features_CZYX = np.random.default_rng(1).normal(size=(7, 2, 3, 2)).astype(np.float32)
    for frame in ("scan", "lps"):
        path = tmp_path / f"{frame}.nii.gz"
        save_nifti(path, features_CZYX, volume, affine=affine, frame=frame)
        found = nibabel.load(path)
        codes = nibabel.aff2axcodes(found.affine)
        file_affine = stored(order, signs, angles_deg)[1]
        wanted = nibabel.aff2axcodes(file_affine if frame == "scan" else volume.affine)
        assert codes == wanted
        data_xyzc = np.asarray(found.dataobj)
        assert data_xyzc.shape[3] == 7
        # Each token is found again through the world.
        for index_xyz in np.ndindex(data_xyzc.shape[:3]):
            world = found.affine @ [*index_xyz, 1]
            token = np.linalg.solve(affine, world)[:3]
            x, y, z = np.rint(token).astype(int)
            np.testing.assert_allclose(token, (x, y, z), atol=1e-4)
            np.testing.assert_array_equal(data_xyzc[index_xyz], features_CZYX[:, z, y, x])


def test_a_real_label_map_is_written_back_as_it_was(real_ct: Path, tmp_path) -> None:
    folder = real_ct / "nifti"
    for scan, labels in [
        ("ts_ct_sm_int16", "ts_ct_sm_seg42"),
        ("ts_ct_3mm_int32", "ts_ct_3mm_seg62"),
        ("sts003_ct_f32_qform", "sts003_tumour_mask"),
    ]:
        volume = read_volume(folder / f"{scan}.nii.gz")
        map_ZYX = read_labels(folder / f"{labels}.nii.gz").hu_ZYX
        save_nifti(tmp_path / "labels.nii.gz", map_ZYX, volume)
        found, original = (
            nibabel.load(path) for path in (tmp_path / "labels.nii.gz", folder / f"{labels}.nii.gz")
        )
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(original.dataobj))
        np.testing.assert_allclose(found.affine, original.affine, atol=1e-4)


def test_what_does_not_fit_the_scan_is_not_written(tmp_path) -> None:
    volume = own(*NAMED["RAS"])
    path = tmp_path / "labels.nii.gz"
    for array, options, words in [
        (np.zeros((4, 5, 5), np.uint8), {}, "does not lie on the voxels"),
        (np.zeros((5, 6), np.uint8), {}, r"not \(Z, Y, X\)"),
        (np.zeros((4, 5, 6), np.uint8), {"frame": "ras"}, "frame='ras'"),
        (np.zeros((4, 5, 6), np.complex64), {}, "complex64"),
        (np.zeros((4, 5, 6), np.uint8), {"affine": sheared()}, "sheared"),
    ]:
        with pytest.raises((InputError, FormatError), match=words):
            save_nifti(path, array, volume, **options)
    with pytest.raises(InputError, match="must end in"):
        save_nifti(tmp_path / "labels.mha", volume.hu_ZYX, volume)
    assert not list(tmp_path.iterdir())


def test_a_volume_refuses_a_stored_grid_that_is_not_its_own() -> None:
    volume = own(*NAMED["IRA"], OBLIQUE)
    assert volume.stored is not None
    parts = (volume.hu_ZYX, volume.spacing_mm, volume.affine, None)
    Volume(*parts, volume.stored)
    moved = volume.stored.affine.copy()
    moved[0, 3] += 0.01
    for wrong in (
        StoredGrid((4, 5, 7), volume.stored.affine),
        StoredGrid(volume.stored.shape_zyx, moved),
        StoredGrid(volume.stored.shape_zyx, volume.stored.affine @ np.diag([2.0, 1.0, 1.0, 1.0])),
    ):
        with pytest.raises(InputError, match="give stored=None"):
            Volume(*parts, wrong)

"""What is written of a scan: world millimetres in other readers, pictures, errors, privacy."""

import dataclasses
import json
import re
import shutil
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from body_case import LANDMARK_MM, NAME, Body
from numpy.typing import NDArray

from tapct_fast import cli
from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.export import save_backbone
from tapct_fast.backbone.load import load_backbone
from tapct_fast.downstream.encode import embed_with_attention
from tapct_fast.downstream.probe import fit_linear_head
from tapct_fast.downstream.resample import labelled_tokens
from tapct_fast.errors import FormatError, InputError
from tapct_fast.evaluation.segmentation import SegmentationHead, save_head
from tapct_fast.io.convert import from_nibabel
from tapct_fast.io.volume import Volume
from tapct_fast.view import LabelMap, label_map_of, read_label_names, write_view
from tapct_fast.view.page import render_view
from tapct_fast.view.pictures import GAP, HEIGHT, pictures, write_niftis
from tapct_fast.view.scene import Scene, label_color, make_scene


@pytest.fixture(scope="module")
def scene(body: Body, backbone: Backbone) -> Scene:
    features, attention_ZYXH = embed_with_attention(backbone, body.volume)
    labels = LabelMap("labels", body.labels_volume.hu_ZYX, {1: "bone"})
    return make_scene(body.volume, features, attention_ZYXH.numpy(), (labels,))


def places(path: Path, is_it) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """World millimetres (RAS) of the centre of some voxels, as nibabel and SimpleITK see it."""
    image = nibabel.load(path)
    index = np.argwhere(is_it(np.asanyarray(image.dataobj))).mean(axis=0)
    other = sitk.ReadImage(str(path))
    z, y, x = np.argwhere(is_it(sitk.GetArrayFromImage(other))).mean(axis=0)
    lps = other.TransformContinuousIndexToPhysicalPoint((x, y, z))
    return image.affine[:3, :3] @ index + image.affine[:3, 3], np.array(lps) * (-1, -1, 1)


def test_a_label_map_lies_on_its_scan_in_other_readers(
    scene: Scene, body: Body, tmp_path: Path
) -> None:
    write_niftis(tmp_path, scene)
    written = nibabel.load(tmp_path / "labels.nii.gz")
    original = nibabel.load(body.labels)
    assert np.array_equal(written.dataobj, original.dataobj)
    np.testing.assert_allclose(written.affine, original.affine)
    assert written.get_data_dtype() == np.int16
    for place in places(tmp_path / "labels.nii.gz", lambda voxels: voxels == 1):
        # Half a voxel: the cube's border falls between voxels.
        assert np.all(np.abs(place - LANDMARK_MM) <= np.array([2.0, 2.5, 4.0]) / 2 + 1e-3)


def test_a_map_on_the_token_grid_lies_where_its_patches_do(
    scene: Scene, body: Body, tmp_path: Path
) -> None:
    # From the file alone: its world box, cut into 8 x 8 patches in plane and 4 slices in depth.
    # It runs along A, S, R, so its first voxel lies to the back, the feet and the left.
    spacing_xyz = np.array([2.0, 2.5, 4.0])
    size_xyz = np.array(body.file_ijk.shape)[[2, 0, 1]]
    low_xyz = body.file_affine[:3, 3] - spacing_xyz / 2
    patch_mm = np.array([size_xyz[0] * 2.0 / 8, size_xyz[1] * 2.5 / 8, 16.0])
    number_xyz = np.floor((LANDMARK_MM - low_xyz) / patch_mm)
    expected_mm = low_xyz + (number_xyz + 0.5) * patch_mm
    assert np.all(np.abs(expected_mm - LANDMARK_MM) <= patch_mm / 2)

    lit = np.zeros_like(scene.attention_ZYXH)
    lit[int(number_xyz[2]), 7 - int(number_xyz[1]), 7 - int(number_xyz[0])] = 1
    names = write_niftis(tmp_path, scene._replace(attention_ZYXH=lit))
    assert names == [
        *("pca-1.nii.gz", "pca-2.nii.gz", "pca-3.nii.gz"),
        *("attention.nii.gz", "similarity.nii.gz", "labels.nii.gz"),
    ]
    for place in places(tmp_path / "attention.nii.gz", lambda values: values == 1):
        np.testing.assert_allclose(place, expected_mm, atol=1e-3)


def test_maps_of_an_oblique_scan_lie_along_its_axes_and_the_page_says_so(
    body: Body, backbone: Backbone, scene: Scene, tmp_path: Path
) -> None:
    assert "degrees off" not in render_view(scene)
    angle = np.radians(14)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    tilted = nibabel.Nifti1Image(body.file_ijk, turn @ body.file_affine)
    volume = from_nibabel(tilted)
    features, attention_ZYXH = embed_with_attention(backbone, volume)
    oblique = make_scene(volume, features, attention_ZYXH.numpy(), ())
    assert "14 degrees off" in render_view(oblique)

    lit = np.zeros_like(oblique.attention_ZYXH)
    lit[5, 1, 6] = 1
    write_niftis(tmp_path, oblique._replace(attention_ZYXH=lit))
    # Voxels of the file's A, S, R: patches of 7 voxels, 4 slices and 8.75 voxels.
    centre_ijk = (55 - (7 * 1 + 3), 4 * 5 + 1.5, 69 - (8.75 * 6 + 3.875))
    expected_mm = (turn @ body.file_affine @ [*centre_ijk, 1])[:3]
    for place in places(tmp_path / "attention.nii.gz", lambda values: values == 1):
        np.testing.assert_allclose(place, expected_mm, atol=1e-3)


def test_similarity_and_components_are_those_of_the_features(scene: Scene, tmp_path: Path) -> None:
    write_niftis(tmp_path, scene)
    asked = scene.grid.token_at(scene.middle_zyx)
    tokens = scene.features.patches_ZYXC
    expected = torch.cosine_similarity(tokens, tokens[asked], dim=-1).numpy()
    # The file runs along A, S, R; tokens along S, P, L.
    written = nibabel.load(tmp_path / "similarity.nii.gz").get_fdata()
    np.testing.assert_allclose(written.transpose(1, 0, 2)[:, ::-1, ::-1], expected, atol=1e-5)

    in_body = ~scene.is_air_ZYX
    scores = np.stack(
        [nibabel.load(tmp_path / f"pca-{i}.nii.gz").get_fdata() for i in (1, 2, 3)], axis=-1
    ).transpose(1, 0, 2, 3)[:, ::-1, ::-1][in_body]
    centred = tokens[torch.from_numpy(in_body)].double()
    centred = centred - centred.mean(0)
    variances = torch.linalg.svdvals(centred)[:3] ** 2
    np.testing.assert_allclose((scores**2).sum(0), variances, rtol=1e-3)
    assert np.abs(np.corrcoef(scores.T) - np.eye(3)).max() < 1e-3


def test_every_picture_shows_three_planes_at_one_scale(scene: Scene) -> None:
    found = pictures(scene)
    assert list(found) == ["ct", "pca", "attention", "similarity", "labels"]
    # 140 x 140 mm in plane and 120 mm high: the tallest has 400 pixels.
    width = 3 * HEIGHT + 2 * GAP
    assert {image.shape for image in found.values()} == {(HEIGHT, width, 3)}
    high = round(HEIGHT * 120 / 140)
    top = (HEIGHT - high) // 2
    ct = found["ct"]
    assert not ct[: top - 1, HEIGHT:].any()
    assert ct[top : top + high, HEIGHT:].any()


def test_the_landmark_is_right_front_and_top_in_pictures(body: Body, scene: Scene) -> None:
    z, y, x = np.argwhere(body.labels_volume.hu_ZYX == 1).mean(axis=0).round().astype(int)
    image = pictures(scene._replace(middle_zyx=(z, y, x)))["labels"].astype(int)
    red, green, blue = label_color(1)
    # Laid over bone, which is white in the window of soft tissue.
    mixed = [int(0.35 * 255 + 0.65 * value) for value in (red, green, blue)]
    is_cube = (np.abs(image - mixed) <= 2).all(-1)
    for left, (to_right, to_bottom) in (
        (0, (True, False)),  # axial: the patient's left is right, front is top
        (HEIGHT + GAP, (True, False)),  # coronal: left is right, head is top
        (2 * (HEIGHT + GAP), (False, False)),  # sagittal: front is left, head is top
    ):
        rows, columns = np.nonzero(is_cube[:, left : left + HEIGHT])
        assert len(rows) > 500
        assert (columns.mean() > HEIGHT / 2) == to_right
        assert (rows.mean() > HEIGHT / 2) == to_bottom


def test_a_view_is_a_page_pictures_and_nifti_without_a_name_in_them(
    body: Body, backbone: Backbone, tmp_path: Path
) -> None:
    names = write_view(backbone, body.volume, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert sorted(names) == [path.name for path in files]
    assert len(names) == 1 + 4 + 5
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = zlib.decompress(data, 31)
        assert NAME.encode() not in data
    page = (tmp_path / "out" / "view.html").read_text()
    assert not re.search(r"https?:|<link|@import|url\(|file:/|src=", page)
    again = write_view(backbone, body.volume, tmp_path / "again")
    assert again == names
    for name in names:
        first, second = ((tmp_path / n / name).read_bytes() for n in ("out", "again"))
        assert first == second


def test_a_scan_too_large_for_a_page_is_averaged_and_the_page_says_so(scene: Scene) -> None:
    whole, small = render_view(scene), render_view(scene, max_voxels=20_000)
    assert "too large" not in whole
    # 30 x 56 x 70 voxels of 4 x 2.5 x 2 mm: along x, then y, then z.
    assert "too large for a page: 2 x 2 x 2 voxels are averaged to one" in small
    assert "(15 x 28 x 35 voxels)" in small
    assert "of labels the middle one counts" in small
    assert len(small) < len(whole)


def test_a_page_of_as_many_voxels_of_noise_as_fit_stays_below_twenty_megabytes(
    scene: Scene,
) -> None:
    rng = np.random.default_rng(0)
    hu_ZYX = rng.normal(0, 40, (120, 256, 256)).astype(np.int16)
    volume = Volume(hu_ZYX, (1.0, 1.0, 1.0), np.diag([-1.0, -1.0, 1.0, 1.0]))
    tokens = torch.from_numpy(rng.standard_normal((30, 32, 32, 128)).astype(np.float32))
    affine = np.diag([-8.0, -8.0, 4.0, 1.0])
    affine[:3, 3] = (-3.5, -3.5, 1.5)
    nothing = torch.zeros(1, 128)
    features = type(scene.features)(tokens, affine, (4.0, 8.0, 8.0), nothing, nothing[0])
    attention = rng.random((30, 32, 32, 12)).astype(np.float32)
    page = render_view(make_scene(volume, features, attention, ()))
    assert "too large for a page" not in page
    assert 10e6 < len(page) < 20e6


def test_label_maps_that_cannot_be_shown_are_refused(
    body: Body, backbone: Backbone, tmp_path: Path
) -> None:
    labels = body.labels_volume

    def view(label_map: LabelMap) -> None:
        write_view(backbone, body.volume, tmp_path, label_maps=(label_map,))

    with pytest.raises(InputError, match=r"labels: \(30, 56, 69\) voxels \(z, y, x\) do not lie"):
        view(LabelMap("labels", labels.hu_ZYX[:, :, 1:]))
    with pytest.raises(InputError, match="labels: label -1 is below 0"):
        view(LabelMap("labels", labels.hu_ZYX - np.int16(1)))
    many = np.arange(labels.hu_ZYX.size, dtype=np.int16).reshape(labels.hu_ZYX.shape) % 257
    with pytest.raises(InputError, match="more than 255 labels"):
        view(LabelMap("labels", many.astype(np.int16)))
    for title in ("pca", "../labels", "Labels", ""):
        with pytest.raises(InputError, match="a label map's title names its files"):
            view(LabelMap(title, labels.hu_ZYX))
    moved = labels.affine.copy()
    moved[0, 3] += 2
    elsewhere = Volume(labels.hu_ZYX, labels.spacing_mm, moved)
    with pytest.raises(InputError, match="labels: lies up to 2 mm off the scan"):
        label_map_of("labels", elsewhere, body.volume)
    assert list(tmp_path.iterdir()) == []


def test_a_scan_of_air_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    hu_ZYX = np.full((8, 16, 16), -1000, np.int16)
    volume = Volume(hu_ZYX, (4.0, 2.0, 2.0), np.diag([-2.0, -2.0, 4.0, 1.0]))
    with pytest.raises(InputError, match="fewer than two patches hold anything but air"):
        write_view(backbone, volume, tmp_path)


def test_an_out_that_is_a_file_is_refused(body: Body, backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="--out cannot be written"):
        write_view(backbone, body.volume, tmp_path / "out")


@pytest.mark.parametrize(
    "found",
    [
        {"1": "liver", "5": "spleen"},
        {"labels": {"background": 0, "liver": 1, "spleen": 5}, "name": "set"},
        {"labels": {"0": "background", "1": "liver", "5": "spleen"}},
    ],
)
def test_names_are_read_from_nnunet_or_a_plain_object(found, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(found))
    names = read_label_names(tmp_path / "names.json")
    assert (names[1], names[5]) == ("liver", "spleen")


@pytest.mark.parametrize("found", [[], {"liver": 1}, {"1": 2}, {"labels": {"a": [1, 2]}}])
def test_other_names_are_refused(found, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"--label-names is neither nnU-Net's dataset\.json"):
        read_label_names(tmp_path / "names.json")
    with pytest.raises(FormatError, match=r"there is no other\.json"):
        read_label_names(tmp_path / "other.json")


def test_label_colors_differ_and_none_is_dark() -> None:
    colors = np.array([label_color(label) for label in range(1, 41)]).astype(int)
    apart = np.abs(colors[:, None] - colors).sum(-1) + 1000 * np.eye(40, dtype=int)
    assert apart.min() >= 50
    assert colors.max(axis=1).min() > 150


def test_the_command_line_writes_a_view(
    body: Body, backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_backbone(backbone, tmp_path / "backbone")
    names = tmp_path / "names.json"
    names.write_text('{"1": "bone"}')
    words = ["view", str(body.scan), "--backbone", str(tmp_path / "backbone")]
    words += ["--labels", str(body.labels), "--out", str(tmp_path / "out"), "--plane", "96"]
    assert cli.main([*words, "--label-names", str(names)]) == 0
    assert "written: view.html, ct.png, pca.png" in capsys.readouterr().out
    assert nibabel.load(tmp_path / "out" / "pca-1.nii.gz").shape == (12, 8, 12)
    page = (tmp_path / "out" / "view.html").read_text()
    assert '"name": "bone"' in page
    assert '"name": "label 7"' in page
    assert NAME not in page

    assert cli.main([*words[:-1], "95"]) == 2
    assert "preprocess.resize_yx=(95, 95) is not a multiple" in capsys.readouterr().err
    words = [*words[:4], "--out", str(tmp_path / "new")]
    assert cli.main([*words, "--label-names", str(names)]) == 2
    assert "--label-names goes with --labels" in capsys.readouterr().err
    assert cli.main([*words, "--head", str(tmp_path / "head")]) == 2
    assert "--head does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_example_of_the_documentation_runs(
    body: Body, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_backbone(backbone, tmp_path / "backbone")
    shutil.copy(body.scan, tmp_path / "scan.nii.gz")
    shutil.copy(body.labels, tmp_path / "labels.nii.gz")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "view.md").read_text()
    (example,) = re.findall(r"```python\n(from tapct_fast [^`]*)```", page)
    exec(example, {})
    assert {"view.html", "labels.png", "pca-3.nii.gz"} <= {p.name for p in Path("view").iterdir()}


def test_a_probe_head_segments_the_scan(
    body: Body, scene: Scene, backbone: Backbone, tmp_path: Path
) -> None:
    save_backbone(backbone, tmp_path / "backbone")
    value_K = (0, 1, 7)
    classes = dataclasses.replace(
        body.labels_volume,
        hu_ZYX=np.searchsorted(value_K, body.labels_volume.hu_ZYX).astype(np.int16),
    )
    rows = labelled_tokens(scene.features, classes, 3)
    head = SegmentationHead(
        linear=fit_linear_head(rows.x_LD, rows.share_LK),
        label_names=("background", "bone", "fat"),
        label_values=value_K,
        encoder="tapct",
        fingerprint="",
    )
    save_head(head, tmp_path / "head.safetensors")
    words = ["view", str(body.scan), "--backbone", str(tmp_path / "backbone")]
    words += ["--head", str(tmp_path / "head.safetensors"), "--labels", str(body.labels)]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    written = np.asarray(nibabel.load(out / "segmentation.nii.gz").dataobj)
    truth = np.asarray(nibabel.load(body.labels).dataobj)
    assert set(np.unique(written)) <= {0, 1, 7}
    # Fitted on this scan: it finds most of the ball, whose patches are 16 x 17 mm.
    assert 2 * ((written == 7) & (truth == 7)).sum() / (
        (written == 7).sum() + (truth == 7).sum()
    ) == pytest.approx(1, abs=0.4)
    scores_LK = head.linear(scene.features.patches_ZYXC.flatten(0, 2))
    token = scene.grid.token_at((10, 36, 20))
    index = np.ravel_multi_index(token, scene.grid.shape_zyx)
    centre = np.rint(scene.grid.scale_zyx * token + scene.grid.shift_zyx).astype(int)
    at_centre = written[55 - centre[1], centre[0], 69 - centre[2]]
    assert at_centre == value_K[int(scores_LK[index].argmax())]
    found = json.loads(
        re.search(r'id="data-meta">([^<]*)<', (out / "view.html").read_text()).group(1)
    )
    titles = [label_map["title"] for label_map in found["labelMaps"]]
    assert titles == ["segmentation", "labels"]
    assert {"value": 7, "name": "fat", "color": list(label_color(7))} in (
        found["labelMaps"][0]["labels"]
    )
    assert (out / "segmentation.png").exists()
    other, own = "tokens of another backbone, or", "tokens of this backbone<"
    assert other in (out / "view.html").read_text()

    loaded = load_backbone(tmp_path / "backbone")
    head = dataclasses.replace(head, fingerprint=loaded.fingerprint())
    write_view(loaded, body.volume, tmp_path / "own", head=head)
    page = (tmp_path / "own" / "view.html").read_text()
    assert own in page
    assert other not in page

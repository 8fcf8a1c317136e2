import dataclasses
import itertools
import json
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.downstream.embed import EmbedReport, embed_scans
from tapct_fast.downstream.encode import embed_volume
from tapct_fast.downstream.features import load_features
from tapct_fast.errors import InputError
from tapct_fast.io.pack import locate
from tapct_fast.io.read import read_volume
from tapct_fast.io.volume import Volume

pq = pytest.importorskip("pyarrow.parquet", reason="the manifest is Parquet: needs pyarrow")


def make_volume(
    shape_zyx: tuple[int, int, int],
    spacing_mm: tuple[float, float, float] = (5.0, 0.8, 0.7),
    seed: int = 0,
) -> Volume:
    hu_ZYX = np.random.default_rng(seed).integers(-1000, 800, shape_zyx).astype(np.int16)
    affine = np.diag([-spacing_mm[2], -spacing_mm[1], spacing_mm[0], 1.0])
    affine[:3, 3] = [120.0, 80.0, -300.0]
    return Volume(hu_ZYX, spacing_mm, affine)


def oracle(
    backbone: Backbone, volume: Volume, window_zyx: tuple[int, int, int], step_zyx: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Blend windows in float64 by the formula, one token and one window at a time."""
    pixels = backbone.preprocess.apply(volume)
    patch = backbone.vit.config.patch_zyx
    grid = [s // p for s, p in zip(pixels.shape[2:], patch, strict=True)]
    size = [min(g, w) for g, w in zip(grid, window_zyx, strict=True)]
    axes = []
    for g, s, step in zip(grid, size, step_zyx, strict=True):
        first = list(range(0, g - s + 1, step))
        if first[-1] != g - s:
            first.append(g - s)
        axes.append(first)
    total = torch.zeros(*grid, 1, dtype=torch.float64)
    values = torch.zeros(*grid, backbone.vit.config.dim, dtype=torch.float64)
    cls = []
    for z, y, x in itertools.product(*axes):
        box = pixels[
            :,
            :,
            z * patch[0] : (z + size[0]) * patch[0],
            y * patch[1] : (y + size[1]) * patch[1],
            x * patch[2] : (x + size[2]) * patch[2],
        ]
        with torch.no_grad():
            out = backbone(box)
        cls.append(out.pooler_output[0])
        tokens = out.last_hidden_state[0].double().reshape(*size, -1)
        for k, j, i in itertools.product(*map(range, size)):
            squared = sum(
                ((t - (s - 1) / 2) / (0.125 * s)) ** 2 for t, s in zip((k, j, i), size, strict=True)
            )
            weight = math.exp(-0.5 * squared)
            total[z + k, y + j, x + i] += weight
            values[z + k, y + j, x + i] += weight * tokens[k, j, i]
    return values / total, torch.stack(cls)


@pytest.mark.parametrize("depth", [1, 3, 11, 12, 13, 50])
def test_depth_windows_match_a_float64_formula(backbone: Backbone, depth: int) -> None:
    volume = make_volume((depth, 30, 40))
    features = embed_volume(backbone, volume, overlap=0.5, batch_size=3)
    assert features.patches_ZYXC.shape == (math.ceil(depth / 4), 8, 8, 64)
    patches, cls = oracle(backbone, volume, (3, 8, 8), (1, 1, 1))
    close = {"rtol": 1e-4, "atol": 1e-4}  # float32 against float64 blending, other batch sizes
    torch.testing.assert_close(features.patches_ZYXC.double(), patches, **close)
    torch.testing.assert_close(features.cls_ND, cls, **close)
    torch.testing.assert_close(features.pooled_D, cls.mean(0), **close)


def test_native_resolution_tiles_in_plane_too(backbone: Backbone) -> None:
    native = Backbone(backbone.vit, Preprocess(resize_yx=None))
    volume = make_volume((14, 100, 60))
    features = embed_volume(native, volume, overlap=0.25)
    assert features.patches_ZYXC.shape == (4, 13, 8, 64)  # ceil of 14/4, 100/8, 60/8
    patches, cls = oracle(native, volume, (3, 8, 8), (2, 6, 6))
    torch.testing.assert_close(features.patches_ZYXC.double(), patches, rtol=1e-4, atol=1e-4)
    assert len(features.cls_ND) == len(cls) == 4


def test_a_plane_that_is_resized_is_one_window(backbone: Backbone) -> None:
    wide = Backbone(backbone.vit, Preprocess(resize_yx=(96, 80)))
    features = embed_volume(wide, make_volume((4, 30, 40)))
    assert features.patches_ZYXC.shape == (1, 12, 10, 64)
    assert len(features.cls_ND) == 1


def test_tokens_of_padding_alone_do_not_exist(local_backbone: Backbone) -> None:
    coarse = Backbone(
        local_backbone.vit, Preprocess(resize_yx=None, depth_multiple=16, plane_multiple=32)
    )
    volume = make_volume((5, 33, 20))
    features = embed_volume(coarse, volume)
    assert features.patches_ZYXC.shape[:3] == (2, 5, 3)
    expected = embed_volume(local_backbone, volume)
    torch.testing.assert_close(features.patches_ZYXC, expected.patches_ZYXC)


def test_a_constant_scan_blends_to_the_single_window(local_backbone: Backbone) -> None:
    volume = dataclasses.replace(
        make_volume((40, 96, 96)), hu_ZYX=np.full((40, 96, 96), 37, np.int16)
    )
    features = embed_volume(local_backbone, volume, overlap=0.5)
    with torch.no_grad():
        single = local_backbone(torch.full((1, 1, 12, 64, 64), 37, dtype=torch.int16))
    expected = single.last_hidden_state[0, 0].expand_as(features.patches_ZYXC)
    torch.testing.assert_close(features.patches_ZYXC, expected)
    torch.testing.assert_close(features.pooled_D, single.pooler_output[0])


def landmark_mm(features_of: Backbone, volume: Volume) -> np.ndarray:
    """World place of the token that differs most from the median token."""
    features = embed_volume(features_of, volume)
    tokens = features.patches_ZYXC
    distance = (tokens - tokens.flatten(0, 2).median(0).values).norm(dim=-1)
    z, y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return (features.affine @ [x, y, z, 1])[:3]


ORIENTATIONS = ["LPS", "RAS", "LAS", "PIR", "SAL"]


@pytest.mark.parametrize("resize_yx", [None, (64, 64)])
@pytest.mark.parametrize("tilt_deg", [0.0, 10.0])
def test_a_landmark_stays_at_its_place_in_the_patient(
    local_backbone: Backbone,
    tmp_path: Path,
    resize_yx: tuple[int, int] | None,
    tilt_deg: float,
) -> None:
    backbone = Backbone(local_backbone.vit, Preprocess(resize_yx=resize_yx))
    data_xyz = np.full((96, 128, 24), -1000, np.int16)
    data_xyz[40:48, 88:96, 12:16] = 700  # one patch of bone at native resolution
    spin = np.eye(4)
    c, s = np.cos(np.radians(tilt_deg)), np.sin(np.radians(tilt_deg))
    spin[1:3, 1:3] = [[c, -s], [s, c]]
    affine = spin @ np.diag([-0.8, -0.8, 3.0, 1.0])
    affine[:3, 3] = [31.0, 17.0, -250.0]
    truth_mm = (affine @ [43.5, 91.5, 13.5, 1])[:3]
    source = nibabel.Nifti1Image(data_xyz, affine)
    source.header.set_xyzt_units("mm")

    here = nibabel.orientations.io_orientation(affine)
    found = []
    for axes in ORIENTATIONS:
        turn = nibabel.orientations.ornt_transform(
            here, nibabel.orientations.axcodes2ornt(tuple(axes))
        )
        path = tmp_path / f"{axes}.nii.gz"
        nibabel.save(source.as_reoriented(turn), path)
        found.append(landmark_mm(backbone, read_volume(path)))
    for place_mm in found[1:]:
        np.testing.assert_allclose(place_mm, found[0], atol=1e-3)
    # A token of the resized plane spans 12 x 16 x 4 voxels: the landmark lies within half of it.
    reach_mm = 1e-3 if resize_yx is None else 0.8 * 8 + 1e-3
    assert np.abs(found[0] - truth_mm).max() < reach_mm


def test_the_token_affine_is_the_mean_place_of_its_voxels(backbone: Backbone) -> None:
    volume = make_volume((12, 128, 192))  # 16 x 24 voxels to a token of the 64 x 64 plane
    features = embed_volume(backbone, volume)
    assert features.spacing_mm == pytest.approx((20.0, 0.8 * 16, 0.7 * 24))
    for token in ((0, 0, 0), (2, 7, 5)):
        z, y, x = (t * n + (n - 1) / 2 for t, n in zip(token, (4, 16, 24), strict=True))
        np.testing.assert_allclose(
            features.affine @ [token[2], token[1], token[0], 1], volume.affine @ [x, y, z, 1]
        )


@pytest.mark.parametrize("setting", [{"window_slices": 6}, {"window_slices": 0}, {"batch_size": 0}])
def test_a_wrong_setting_is_refused(backbone: Backbone, setting: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        embed_volume(backbone, make_volume((12, 16, 16)), **setting)


def test_real_ct_gives_the_same_features_from_any_orientation(
    backbone: Backbone, real_ct: Path, tmp_path: Path
) -> None:
    path = real_ct / "nifti" / "ts_ct_sm_int16.nii.gz"
    image = nibabel.load(path)
    turn = nibabel.orientations.axcodes2ornt(("P", "S", "R"))
    here = nibabel.orientations.io_orientation(image.affine)
    turned = image.as_reoriented(nibabel.orientations.ornt_transform(here, turn))
    nibabel.save(turned, tmp_path / "PSR.nii.gz")
    expected = embed_volume(backbone, read_volume(path))
    features = embed_volume(backbone, read_volume(tmp_path / "PSR.nii.gz"))
    assert torch.equal(features.patches_ZYXC, expected.patches_ZYXC)
    np.testing.assert_allclose(features.affine, expected.affine, atol=1e-3)
    assert features.patches_ZYXC.std() > 0.1


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    """Three scans, the second damaged."""
    folder = tmp_path / "doe_jane"
    folder.mkdir()
    paths = []
    for number in range(3):
        volume = make_volume((9, 20, 24), seed=number)
        paths.append(folder / f"doe_jane_{number}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(volume.hu_ZYX.T, volume.affine), paths[-1])
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[: len(data) // 2])
    return paths


def test_a_folder_of_features_is_resumed_and_names_nobody(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "features"
    assert embed_scans(backbone, scans[:1], out) == EmbedReport(1, 0, 0)
    (first,) = (out / "cases").glob("*.safetensors")
    written_at = first.stat().st_mtime_ns
    # Listed out of order: the manifest follows the call.
    order = [scans[2], scans[1], scans[0]]
    assert embed_scans(backbone, order, out) == EmbedReport(1, 1, 1)
    assert first.stat().st_mtime_ns == written_at

    cases = pq.read_table(out / "manifest.parquet").to_pylist()
    assert [row["status"] for row in cases] == ["embedded", "quarantined", "embedded"]
    assert [locate(out, row["case"], scans) for row in cases] == order
    (refused,) = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    assert refused["case"] == cases[1]["case"]
    assert refused["reason"]
    for path in out.rglob("*"):
        assert "doe" not in path.name
        assert path.is_dir() or b"doe" not in path.read_bytes()
    assert (out / ".key").stat().st_mode & 0o077 == 0

    for row, scan in ((cases[0], scans[2]), (cases[2], scans[0])):
        stored = load_features(out / "cases" / f"{row['case']}.safetensors")
        expected = embed_volume(backbone, read_volume(scan))
        # float16 storage: half a unit in the last of 11 bits
        torch.testing.assert_close(
            stored.patches_ZYXC, expected.patches_ZYXC, rtol=2**-11, atol=1e-6
        )
        torch.testing.assert_close(stored.cls_ND, expected.cls_ND)
        np.testing.assert_allclose(stored.affine, expected.affine)


def test_a_half_written_scan_and_a_mended_one_are_embedded_again(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "features"
    embed_scans(backbone, scans, out)
    record = next((out / "cases").glob("*.json"))
    before = record.with_suffix(".safetensors").read_bytes()
    record.unlink()  # as if it was killed between the two files
    scans[1].write_bytes(scans[0].read_bytes())
    assert embed_scans(backbone, scans, out) == EmbedReport(2, 1, 0)
    assert record.with_suffix(".safetensors").read_bytes() == before
    assert (out / "quarantine.jsonl").read_text() == ""


def test_features_of_two_backbones_are_never_mixed(
    backbone: Backbone, local_backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    embed_scans(backbone, scans[:1], tmp_path / "features")
    with pytest.raises(InputError, match="another backbone"):
        embed_scans(local_backbone, scans[:1], tmp_path / "features")
    with pytest.raises(InputError, match="another overlap"):
        embed_scans(backbone, scans[:1], tmp_path / "features", overlap=0.0)


def test_an_empty_folder_and_an_unwritable_one_are_errors(
    backbone: Backbone, scans: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="without scans"):
        embed_scans(backbone, [tmp_path / "empty"], tmp_path / "features")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        embed_scans(backbone, scans, tmp_path / "file")

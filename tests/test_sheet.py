"""Shape suffixes: V views, Z Y X voxels, C red, green, blue."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tapct_fast import cli
from tapct_fast.config import Config, MaskConfig
from tapct_fast.data.phantom import write_phantoms
from tapct_fast.data.pipeline import ViewPipeline
from tapct_fast.data.samples import Samples
from tapct_fast.data.views import ViewTable
from tapct_fast.errors import InputError
from tapct_fast.io.pack import pack
from tapct_fast.io.store import Store
from tapct_fast.recipes import debug
from tapct_fast.sheet import CROP, MASK, _effects, _letters, _planes, _see, write_sheets

pytest.importorskip("PIL", reason="Pillow is not installed: the demo extra")
from PIL import Image


def config() -> Config:
    """The debug recipe with every step on, and all global views masked."""
    recipe = debug()
    views = dataclasses.replace(
        recipe.views,
        flip_prob_zyx=(0.5, 0.5, 0.5),
        quarter_turn_prob=0.7,
        contrast_prob=0.5,
        thick_slice_prob=0.5,
        noise_prob=1.0,
    )
    return dataclasses.replace(recipe, views=views, masks=MaskConfig(prob=1.0))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sheet")
    write_phantoms(folder / "ct", num=2, seed=1)
    pack([folder / "ct" / "scans"], folder / "store")
    return folder / "store"


def table_of(flips: tuple[bool, bool, bool], turns: int) -> ViewTable:
    lo_3 = np.float32([5.0 if flip else 1.0 for flip in flips])
    hi_3 = np.float32([1.0 if flip else 5.0 for flip in flips])
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    return ViewTable(
        lo_V3=lo_3[None],
        hi_V3=hi_3[None],
        turns_V=np.uint8([turns]),
        window_V2=np.float32([[-1008, 822]]),
        gamma_V=one,
        contrast_V=one,
        sigma_V3=np.zeros((1, 3), np.float32),
        noise_std_V=zero,
        noise_key_V=np.uint64([1]),
    )


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flip_y", [False, True])
@pytest.mark.parametrize("flip_x", [False, True])
def test_letters_stand_where_flips_and_turns_put_the_sides(
    flip_y: bool, flip_x: bool, turns: int
) -> None:
    # Numbers in place of anatomy: the patient's right is image left, front is on top.
    sides = torch.tensor([[0, 3, 0], [1, 0, 2], [0, 4, 0]])
    flipped = sides.flip([axis for axis, flip in enumerate((flip_y, flip_x)) if flip])
    turned = flipped.rot90(turns)
    names = {1: "R", 2: "L", 3: "A", 4: "P"}
    expected = [names[int(turned[at])] for at in ((1, 0), (1, 2), (0, 1), (2, 1))]
    assert list(_letters(table_of((False, flip_y, flip_x), turns), 0)) == expected


def test_the_crop_is_outlined_where_it_lies(store: Path) -> None:
    settings = config()
    opened = Store.open(store)
    samples = Samples(opened, settings)
    seen = _see(opened, samples, ViewPipeline(opened, settings, device="cpu").batch_at, settings, 3)
    crop, shape_zyx = seen.sample.crop, seen.scan_ZYX.shape
    for panel, (axis_y, axis_x) in zip(
        _planes(seen, settings.hu), [(1, 2), (0, 2), (0, 1)], strict=True
    ):
        rgb_YXC = panel.rgb_YXC
        is_crop_YX = (rgb_YXC == CROP).all(-1)
        if axis_y == 0:
            is_crop_YX = is_crop_YX[::-1]  # slices count from the feet
        for axis, length, across in ((axis_y, 0, 1), (axis_x, 1, 0)):
            at = np.flatnonzero(is_crop_YX.sum(axis=across) > 10)
            scale = rgb_YXC.shape[length] / shape_zyx[axis]
            assert at[0] == pytest.approx(crop.lo_zyx[axis] * scale, abs=3)
            end = (crop.lo_zyx[axis] + crop.shape_zyx[axis]) * scale
            assert at[-1] == pytest.approx(end, abs=3)


def test_the_table_says_how_much_noise_changed_the_view(store: Path) -> None:
    settings = config()
    opened = Store.open(store)
    samples = Samples(opened, settings)
    seen = _see(opened, samples, ViewPipeline(opened, settings, device="cpu").batch_at, settings, 0)
    group, table = settings.views.global_views, seen.sample.tables[0]
    effects = _effects(seen, table, group, settings.hu)
    for v in range(group.num):
        # The mean of the absolute value of Gaussian noise.
        expected = np.sqrt(2 / np.pi) * table.noise_std_V[v] * settings.hu.std
        assert effects["noise"][v] == pytest.approx(expected, rel=0.02)
        for step, is_off in (
            ("gamma", table.gamma_V[v] == 1),
            ("contrast", table.contrast_V[v] == 1),
            ("blur", not table.sigma_V3[v].any()),
        ):
            assert (effects[step][v] == 0) == is_off


def test_the_sheet_of_a_store_is_one_page_and_a_picture_per_sample(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["views", str(store), "--out", str(tmp_path / "out"), "--recipe", "debug"]
    words += [
        "--sample",
        "0",
        "17",
        "--train.batch_size",
        "4",
        "--train.group_size",
        "4",
        "--masks.prob",
        "1",
    ]
    assert cli.main(words) == 0
    assert "views.html and a PNG for each of 2 samples" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["sample-000000.png", "sample-000017.png", "views.html"]
    with Image.open(tmp_path / "out" / names[0]) as image:
        rgb_YXC = np.asarray(image)
    assert rgb_YXC.shape[1] > 1000
    green_YX = rgb_YXC[..., 1].astype(int) - rgb_YXC[..., [0, 2]].max(-1)
    assert (green_YX > 50).sum() > 300  # the crop's outline, made smaller
    # Blue as nothing else: masked tokens are tinted over CT, which is grey.
    blue_YX = rgb_YXC[..., 2].astype(int) - rgb_YXC[..., 0]
    assert (blue_YX == round(0.55 * (MASK[2] - MASK[0]))).sum() > 1000
    page = (tmp_path / "out" / "views.html").read_text()
    assert not re.search(r"https?:|<script|<link|src=\"(?!data:image/png)", page)
    assert str(tmp_path) not in page
    assert page.count("<tr><td>global") == 2 * 2
    assert page.count("<tr><td>local") == 2 * 4
    assert "case-" in page


def test_the_sheet_shows_the_same_whatever_the_renderer(store: Path, tmp_path: Path) -> None:
    for renderer in ("torch", "native"):
        settings = config()
        settings = dataclasses.replace(
            settings, views=dataclasses.replace(settings.views, renderer=renderer)
        )
        write_sheets(store, settings, tmp_path / renderer, [5], recipe="debug")
    one, other = (
        np.asarray(Image.open(tmp_path / renderer / "sample-000005.png")).astype(int)
        for renderer in ("torch", "native")
    )
    assert abs(one - other).max() <= 1  # a grey that was between two values


@pytest.mark.parametrize("number", [-1, 180 * 16])
def test_a_sample_that_the_run_does_not_have_is_refused(
    store: Path, tmp_path: Path, number: int
) -> None:
    with pytest.raises(InputError, match=f"--sample {number}: the run has samples 0 to 2879"):
        write_sheets(store, debug(), tmp_path / "out", [0, number], recipe="debug")
    assert not (tmp_path / "out").exists()


def test_a_missing_pillow_says_how_to_get_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"pip install 'tapct-fast\[demo\]'"):
        write_sheets(store, debug(), tmp_path, [0], recipe="debug")


def test_a_real_scan_is_shown_in_the_range_of_ct(real_ct: Path, tmp_path: Path) -> None:
    scan = real_ct / "nifti" / "lidc0314_chest_native_z120-139_int16.nii.gz"
    assert pack([scan], tmp_path / "store").packed == 1
    settings = debug()
    write_sheets(tmp_path / "store", settings, tmp_path / "out", [0], recipe="debug")
    page = (tmp_path / "out" / "views.html").read_text()
    shown = re.findall(r"<td>(-?\d+), (-?\d+), (-?\d+)</td></tr>", page)
    assert len(shown) == 2 + 4
    darkest, _, brightest = np.array(shown, dtype=int).T
    assert darkest.min() < -900  # lung and air
    assert brightest.max() > 200  # bone

"""The page in a real browser: its numbers and pixels beside Python's, its letters, its keys."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from body_case import Body
from browser import Browser
from numpy.typing import NDArray
from PIL import Image

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.downstream.encode import embed_with_attention
from tapct_fast.view import LabelMap
from tapct_fast.view.page import render_view
from tapct_fast.view.scene import Scene, label_color, make_scene

READY = "document.getElementById('viewer')?.dataset.ready == 'yes'"
DATA = "({...document.getElementById('viewer').dataset})"
CANVAS = "document.querySelector('[data-plane={}] canvas')"


@pytest.fixture(scope="module")
def scene(body: Body, backbone: Backbone) -> Scene:
    features, attention_ZYXH = embed_with_attention(backbone, body.volume)
    names = {1: "bone", 7: "<b>fat"}
    labels = LabelMap("labels", body.labels_volume.hu_ZYX, names)
    return make_scene(body.volume, features, attention_ZYXH.numpy(), (labels,))


@pytest.fixture(scope="module")
def page(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "view.html"
    path.write_text(render_view(scene))
    return path


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    """The page in a window of 1280 x 900; a complaint of the browser fails the test."""
    browser.open(page, 1280, 900)
    browser.wait(READY)
    yield browser
    assert browser.errors == []
    assert {url.partition("#")[0] for url in browser.requests} == {page.as_uri()}


def drawn(browser: Browser, action: str, event: str = "input") -> None:
    """Do something in the page and wait until the event it leads to has been drawn."""
    script = (
        f"new Promise(done => {{addEventListener('{event}', () => requestAnimationFrame(() => "
        f"requestAnimationFrame(done)), {{once: true}}); {action}}})"
    )
    browser("Runtime.evaluate", expression=script, awaitPromise=True)


def go(browser: Browser, address: str) -> dict[str, str]:
    """Set the state by the address and return the page's numbers."""
    assert browser.value("location.hash.slice(1)") != address
    drawn(browser, f"location.hash = {json.dumps(address)}", "hashchange")
    data: dict[str, str] = browser.value(DATA)
    return data


def pixels(browser: Browser, plane: str) -> NDArray[np.int64]:
    """Return what a pane shows, (Y, X, 3)."""
    # By way of a PNG: the browser warns of getImageData.
    url = browser.value(f"{CANVAS.format(plane)}.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image)[..., :3].astype(np.int64)


def click(browser: Browser, plane: str, part: tuple[float, float]) -> None:
    """Click at a part of a pane's width and height."""
    box = browser.value(f"(r => [r.x, r.y, r.width, r.height])({CANVAS.format(plane)}"
                        ".getBoundingClientRect())")  # fmt: skip
    x, y = box[0] + part[0] * box[2], box[1] + part[1] * box[3]
    mouse = {"x": x, "y": y, "button": "left", "clickCount": 1, "buttons": 1}
    browser("Input.dispatchMouseEvent", type="mousePressed", **mouse)
    browser("Input.dispatchMouseEvent", type="mouseReleased", **mouse)


def press(browser: Browser, key: str, modifiers: int = 0) -> None:
    browser("Input.dispatchKeyEvent", type="keyDown", key=key, modifiers=modifiers)
    browser("Input.dispatchKeyEvent", type="keyUp", key=key)


def at_place(body: Body, z: int, y: int, x: int) -> tuple[int, list[int], NDArray[np.float64]]:
    """HU, file voxel and world mm of a voxel of the volume, from the file alone (A, S, R)."""
    ijk = [56 - 1 - y, z, 70 - 1 - x]
    world = body.file_affine @ [*ijk, 1]
    return int(body.file_ijk[tuple(ijk)]), ijk, world[:3]


@pytest.mark.parametrize("place", [(0, 0, 0), (29, 55, 69), (17, 20, 31), (8, 40, 12)])
def test_the_numbers_at_a_place_are_those_of_the_file(
    opened: Browser, body: Body, scene: Scene, place: tuple[int, int, int]
) -> None:
    z, y, x = place
    data = go(opened, f"z={z}&y={y}&x={x}&patch=3,4,5")
    hu, ijk, world = at_place(body, z, y, x)
    assert int(data["hu"]) == hu
    assert [int(i) for i in data["file"].split(",")] == ijk
    np.testing.assert_allclose([float(mm) for mm in data["ras"].split(",")], world, atol=2e-3)
    token = (z // 4, y * 8 // 56, x * 8 // 70)  # 4 slices; 8 x 8 patches in plane
    assert tuple(int(t) for t in data["token"].split(",")) == token
    tokens = scene.features.patches_ZYXC
    exact = torch.cosine_similarity(tokens[token], tokens[3, 4, 5], dim=0)
    stated = json.loads(opened.value("document.getElementById('data-meta').textContent"))["error"]
    assert stated < 0.02
    assert float(data["similarity"]) == pytest.approx(float(exact), abs=stated + 1e-5)
    attention = scene.attention_ZYXH[token]
    assert float(data["attention"]) == pytest.approx(attention.mean(), rel=1e-3, abs=1e-3)
    one = go(opened, f"z={z}&y={y}&x={x}&layer=attention&head=head-2")
    assert float(one["attention"]) == pytest.approx(attention[1], rel=1e-3, abs=1e-3)
    shown = opened.value("document.getElementById('readout').innerText")
    ends = [("LR", world[0]), ("PA", world[1]), ("IS", world[2])]
    for letters, mm in ends:
        assert f"{letters[int(mm >= 0)]} {abs(mm):.1f}" in shown


def test_letters_say_where_the_patient_lies(opened: Browser, body: Body) -> None:
    z, y, x = np.argwhere(body.labels_volume.hu_ZYX == 1).mean(axis=0).round().astype(int)
    go(opened, f"z={z}&y={y}&x={x}&layer=ct&window=700,200")
    drawn(opened, "document.getElementById('cross').click()")
    # Left, right, top, bottom of each pane; then on which side of it the bone cube is seen:
    # it lies to the patient's left, in front, near the head.
    expected = {
        "axial": ("RLAP", "L", "A"),
        "coronal": ("RLSI", "L", "S"),
        "sagittal": ("APSI", "A", "S"),
    }
    for plane, (letters, across, up) in expected.items():
        data = opened.value(f"({{...{CANVAS.format(plane)}.parentElement.dataset}})")
        left, right, top, bottom = (data[side] for side in ("left", "right", "top", "bottom"))
        assert left + right + top + bottom == letters
        image = pixels(opened, plane)
        height, width, _ = image.shape
        is_white = (image > 250).all(-1)
        rows, columns = np.nonzero(is_white)
        assert len(rows) > 100
        assert (right if columns.mean() > width / 2 else left) == across
        assert (bottom if rows.mean() > height / 2 else top) == up


def test_a_cube_keeps_its_true_proportions(opened: Browser, body: Body) -> None:
    # 18 mm along each axis, in voxels of 4 x 2.5 x 2 mm.
    mask = body.labels_volume.hu_ZYX == 1
    z, y, x = np.argwhere(mask).mean(axis=0).round().astype(int)
    go(opened, f"z={z}&y={y}&x={x}&layer=labels&opacity=100")
    for plane, axes in (("axial", (1, 2)), ("coronal", (0, 2)), ("sagittal", (0, 1))):
        is_cube = (np.abs(pixels(opened, plane) - label_color(1)) <= 3).all(-1)
        rows, columns = np.nonzero(is_cube)
        pixels_yx = np.array([np.ptp(rows) + 1, np.ptp(columns) + 1])
        sizes = [len(np.unique(np.argwhere(mask)[:, a])) for a in axes]
        mm_yx = np.array([n * body.volume.spacing_mm[a] for n, a in zip(sizes, axes, strict=True)])
        scale = pixels_yx / mm_yx
        assert scale[0] == pytest.approx(scale[1], rel=0.03)


def test_layers_have_the_colours_of_python(opened: Browser, scene: Scene) -> None:
    token = (4, 3, 3)
    z, y, x = 4 * 4 + 1, 3 * 7 + 3, 3 * 9 + 2  # inside of that patch
    colors = scene.colors.paint_tokens(scene.features, scene.is_air_ZYX)
    go(opened, f"z={z}&y={y}&x={x}&layer=pca&opacity=100")
    image = pixels(opened, "axial")
    height, width, _ = image.shape
    # The crosshair leaves the place itself free; the scan is in the middle of the pane.
    scale = min((width - 42) / 140, (height - 42) / 140)
    row = round(height / 2 + ((y + 0.5) * 2.5 - 70) * scale)
    column = round(width / 2 + ((x + 0.5) * 2.0 - 70) * scale)
    assert image[row, column].tolist() == colors[token].tolist()
    half = go(opened, f"z={z}&y={y}&x={x}&layer=pca&opacity=50&window=soft")
    grey = np.clip((int(half["hu"]) + 160) * 255 / 400, 0, 255)
    # The CT is smooth between voxels, whose noise is 6 HU: 4 grey values.
    mixed = pixels(opened, "axial")[row, column]
    assert np.abs(mixed - (colors[token] + grey) / 2).max() < 8
    go(opened, f"z={z}&y={y}&x={x}&layer=similarity&opacity=100&patch=4,3,3")
    # The asked patch is most like itself: the last colour.
    assert pixels(opened, "axial")[row, column].tolist() == [255, 248, 190]


def test_windows_map_hu_to_grey(opened: Browser, body: Body) -> None:
    z, y, x = np.argwhere(body.labels_volume.hu_ZYX == 7).mean(axis=0).round().astype(int)
    fat = body.volume.hu_ZYX[body.labels_volume.hu_ZYX == 7].mean()
    for window, (level, width) in {
        "lung": (-600, 1500),
        "soft": (40, 400),
        "bone": (400, 1800),
        "-100,100": (-100, 100),
    }.items():
        go(opened, f"z={z}&y={y}&x={x}&layer=ct&window={window}")
        image = pixels(opened, "axial")
        height, wide, _ = image.shape
        scale = min((wide - 42) / 140, (height - 42) / 140)
        row = round(height / 2 + ((y + 0.5) * 2.5 - 70) * scale)
        column = round(wide / 2 + ((x + 0.5) * 2.0 - 70) * scale)
        around = image[row - 5 : row + 6, column - 5 : column + 6].mean()
        expected = np.clip((fat - level + width / 2) * 255 / width, 0, 255)
        assert around == pytest.approx(expected, abs=8 * 255 / width + 2)
        pressed = opened.value(
            "[...document.querySelectorAll('#presets [aria-pressed=true]')].map(b => b.value)"
        )
        assert pressed == ([window] if window in ("lung", "soft", "bone") else [])


def test_a_click_asks_about_its_patch_and_the_wheel_and_keys_move(
    opened: Browser, scene: Scene
) -> None:
    go(opened, "z=15&y=30&x=35&layer=similarity")
    click(opened, "axial", (0.4, 0.6))
    opened.wait(f"{DATA}.similarity > 0.999 && {DATA}.token != '3,4,4'")
    data = opened.value(DATA)
    asked = tuple(int(t) for t in data["token"].split(","))
    assert asked[2] < 4 < asked[1] + 1  # to the left and below the middle of the picture
    before = [int(i) for i in data["file"].split(",")]

    for key, (axis, change) in {
        "ArrowLeft": (2, 1),  # screen left is the patient's right, along which the file runs
        "ArrowRight": (2, -1),
        "ArrowUp": (0, 1),  # front
        "PageUp": (1, 1),  # head
        "PageDown": (1, -1),
    }.items():
        press(opened, key)
        after = list(before)
        after[axis] += change
        opened.wait(f"{DATA}.file == '{','.join(map(str, after))}'")
        before = after
    press(opened, "ArrowRight", 8)  # with Shift: ten
    before[2] -= 10
    opened.wait(f"{DATA}.file == '{','.join(map(str, before))}'")
    # The asked patch has stayed.
    data = opened.value(DATA)
    here = tuple(int(t) for t in data["token"].split(","))
    tokens = scene.features.patches_ZYXC
    exact = float(torch.cosine_similarity(tokens[here], tokens[asked], dim=0))
    assert float(data["similarity"]) == pytest.approx(exact, abs=0.02)
    press(opened, "Enter")
    opened.wait(f"{DATA}.similarity > 0.999")

    opened.value(
        f"{CANVAS.format('coronal')}.dispatchEvent(new WheelEvent('wheel', "
        "{deltaY: -100, cancelable: true}))"
    )
    before[0] -= 1  # toward the back: the file runs to the front
    opened.wait(f"{DATA}.file == '{','.join(map(str, before))}'")
    # The address has followed, and gives the same again.
    opened.wait(f"location.hash.includes('x={69 - before[2]}&')")
    address = opened.value("location.hash.slice(1)")
    go(opened, "z=1&y=1&x=1")
    assert go(opened, address)["file"] == ",".join(map(str, before))


def test_labels_have_names_that_lead_to_them(opened: Browser) -> None:
    data = go(opened, "z=1&y=1&x=1&layer=labels")
    assert data["labels"] == "background"
    names = opened.value("[...document.querySelectorAll('#names button')].map(b => b.innerText)")
    assert names == ["bone", "<b>fat"]
    assert opened.value("document.querySelectorAll('#names b').length") == 0
    for i, name in enumerate(names):
        opened.value(f"document.querySelectorAll('#names button')[{i}].click()")
        opened.wait(f"{DATA}.labels == '{name}'")


def test_a_plane_can_be_shown_alone(opened: Browser) -> None:
    width = opened.value(f"{CANVAS.format('axial')}.clientWidth")
    opened.value(f"{CANVAS.format('axial')}.focus()")
    press(opened, "f")
    opened.wait(f"{CANVAS.format('axial')}.clientWidth > {1.5 * width}")
    assert opened.value(f"{CANVAS.format('coronal')}.clientWidth") == 0
    press(opened, "f")
    opened.wait(f"{CANVAS.format('axial')}.clientWidth == {width}")


@pytest.mark.parametrize("width", [1280, 800, 500])
def test_nothing_overlaps_or_leaves_the_window(opened: Browser, width: int) -> None:
    opened.resize(width, 900)
    go(opened, "z=15&y=30&x=35&layer=labels")
    assert opened.value("document.documentElement.scrollWidth <= innerWidth")
    boxes = opened.value(
        "[...document.querySelectorAll('.controls > :not([hidden]), .pane')].map(e => "
        "(r => [r.left, r.top, r.right, r.bottom])(e.getBoundingClientRect()))"
    )
    assert len(boxes) == 3 + 4
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert right - left > 150
        assert bottom - top > 100
        for other in boxes[:i]:
            is_apart = right <= other[0] or other[2] <= left
            assert is_apart or bottom <= other[1] or other[3] <= top


def test_a_thinned_scan_keeps_its_places(
    browser: Browser, scene: Scene, body: Body, tmp_path: Path
) -> None:
    path = tmp_path / "view.html"
    path.write_text(render_view(scene, max_voxels=20_000))  # boxes of 2 x 2 x 2 voxels
    browser.open(path, 1280, 900)
    browser.wait(READY)
    data = go(browser, "z=15&y=31&x=40")
    box = body.volume.hu_ZYX[14:16, 30:32, 40:42]
    assert float(data["hu"]) == pytest.approx(box.mean(), abs=0.51)
    corners = [at_place(body, z, y, x)[2] for z in (14, 15) for y in (30, 31) for x in (40, 41)]
    ras = [float(mm) for mm in data["ras"].split(",")]
    np.testing.assert_allclose(ras, np.mean(corners, axis=0), atol=2e-3)
    assert tuple(int(t) for t in data["token"].split(",")) == (3, 4, 4)
    assert browser.errors == []

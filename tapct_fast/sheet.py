"""Contact sheets: what the model sees of chosen samples of a run, for a person to look at.

One PNG per sample and one page for all of them: the scan with its crop and the outlines of all
views, the views slice by slice without and with their masks, and a table of what was drawn for each
view and how much each step changed it. Scans are shown as in radiology: the patient's right on the
left, front on top; letters at the edges of a view say where its flips and turns have put them.

Shape suffixes: V views, Z Y X voxels, C red, green, blue.
"""

import html
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast import __version__
from tapct_fast.config import Config, HuConfig, ViewGroupConfig
from tapct_fast.data.pipeline import ViewBatch, ViewPipeline
from tapct_fast.data.reference import render
from tapct_fast.data.samples import Sample, Samples
from tapct_fast.data.views import ViewTable
from tapct_fast.errors import InputError
from tapct_fast.figures import paint_ct
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.store import Store
from tapct_fast.report import (
    Figure,
    Panel,
    Pixels,
    Rgb,
    facts_list,
    figures_html,
    legend_html,
    png,
    render_page,
)

PAGE = "views.html"
CROP, LOCAL, MASK = (90, 220, 120), (190, 190, 190), (31, 111, 235)
GLOBALS: tuple[Rgb, ...] = ((255, 176, 32), (80, 200, 255))
LEGEND: Sequence[tuple[str, Rgb]] = (
    ("crop", CROP),
    *((f"global view {v + 1}", color) for v, color in enumerate(GLOBALS)),
    ("local views", LOCAL),
    ("masked for the student", MASK),
)
CELL = 288  # pixels: width of a picture
TALLEST = 420
_SPACE, _LINE = 12, 18  # pixels between pictures, and of a line of text


class Seen(NamedTuple):
    """A sample and what a training step gets of it."""

    sample: Sample
    scan_ZYX: NDArray[np.int16]  # the whole scan
    hu_ZYX: NDArray[np.int16]  # of the sample's region
    views: tuple[Tensor, Tensor]  # VZYX, global and local, z-scored
    mask_VZYX: NDArray[np.bool_]  # of the tokens of the global views


def write_sheets(
    store_dir: Path, config: Config, out: Path, numbers: Sequence[int], *, recipe: str
) -> None:
    """Write ``views.html`` and a PNG for each of some samples of a run.

    The views are rendered as in training on the CPU, with the masks of the sample's micro-batch.

    Args:
        store_dir: Folder written by ``pack``.
        config: The run.
        out: Folder, made if absent.
        numbers: Which samples, counted from 0 over the run.
        recipe: Name of the recipe, for the page.

    Raises:
        InputError: Pillow is missing, a number is not of this run, or ``out`` cannot be written.
        StoreError: The store is missing, empty or damaged.
    """
    _require_pillow()
    most = config.train.num_steps * config.train.batch_size
    for number in numbers:
        if not 0 <= number < most:
            raise InputError(f"--sample {number}: the run has samples 0 to {most - 1}")
    store = Store.open(store_dir)
    pipeline = ViewPipeline(store, config, device="cpu")
    samples = Samples(store, config)
    # Samples side by side are of one micro-batch: it is rendered once.
    batch_at = lru_cache(maxsize=1)(pipeline.batch_at)
    sections, tables = [], []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            seen = _see(store, samples, batch_at, config, number)
            figures = _figures(seen, config)
            write_atomic(out / f"sample-{number:06d}.png", png(_mosaic(figures)))
            sections.append((f"Sample {number}", _lead(seen), figures_html(figures)))
            tables.append((f"Sample {number}: the numbers", "", _table(seen, config)))
        page = _page(config, recipe, pipeline.renderer, len(numbers), [*sections, *tables])
        write_atomic(out / PAGE, page.encode())
    except OSError as error:
        raise InputError(f"--out cannot be written: {error.strerror}") from None


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise InputError("contact sheets need Pillow; pip install 'tapct-fast[demo]'") from None


def _see(
    store: Store,
    samples: Samples,
    batch_at: Callable[[int, int], ViewBatch],
    config: Config,
    number: int,
) -> Seen:
    step, place = divmod(number, config.train.batch_size)
    micro_size = config.train.batch_size // config.train.accumulate
    micro, b = divmod(place, micro_size)
    batch = batch_at(step, micro)
    sample, hu_ZYX = samples.load(number)
    group = config.views.global_views
    grid_zyx = (s // p for s, p in zip(group.size_zyx, config.vit.patch_zyx, strict=True))
    mask_VZYX = batch.mask_NL.view(group.num, micro_size, *grid_zyx)[:, b]
    scan_ZYX = store.read_volume(sample.crop.case).hu_ZYX
    views = (batch.global_VBZYX[:, b], batch.local_VBZYX[:, b])
    return Seen(sample, scan_ZYX, hu_ZYX, views, mask_VZYX.numpy())


def _figures(seen: Seen, config: Config) -> list[Figure]:
    figures = [Figure("Where the views look", [_planes(seen, config.hu)])]
    spacing_mm, tables = seen.sample.record.spacing_mm, seen.sample.tables
    for v, (view_ZYX, mask_ZYX) in enumerate(zip(seen.views[0], seen.mask_VZYX, strict=True)):
        told = _describe(tables[0], v, spacing_mm, config.hu)
        rows = [_view_row(view_ZYX, tables[0], v, spacing_mm, config.hu)]
        if mask_ZYX.any():
            voxels_ZYX = mask_ZYX
            for axis, size in enumerate(config.vit.patch_zyx):
                voxels_ZYX = voxels_ZYX.repeat(size, axis)
            rows.append(_view_row(view_ZYX, tables[0], v, spacing_mm, config.hu, voxels_ZYX))
            told += f"; {mask_ZYX.mean():.0%} masked"
        figures.append(Figure(f"Global view {v + 1}: {told}", rows))
    panels = []
    for v, view_ZYX in enumerate(seen.views[1]):
        z, y, x = _extent_mm(tables[1], v, spacing_mm)
        before = f"local {v + 1}, {z:.0f} x {y:.0f} x {x:.0f} mm, "
        panels.append(_axial_panel(view_ZYX, len(view_ZYX) // 2, tables[1], v, config.hu, before))
    if panels:
        rows = [panels[start : start + 4] for start in range(0, len(panels), 4)]
        figures.append(Figure("Local views: the middle slice of each", rows))
    return figures


def _planes(seen: Seen, hu: HuConfig) -> list[Panel]:
    """Cut the scan through the middle of the crop, with the outlines of crop and views."""
    crop, region = seen.sample.crop, seen.sample.region
    boxes = [(np.array([crop.lo_zyx, np.add(crop.lo_zyx, crop.shape_zyx)]), CROP)]
    for g, table in reversed(list(enumerate(seen.sample.tables))):
        for v, (lo_3, hi_3) in enumerate(zip(table.lo_V3, table.hi_V3, strict=True)):
            ends = np.array([np.minimum(lo_3, hi_3), np.maximum(lo_3, hi_3)]) + region.lo_zyx
            boxes.append((ends, GLOBALS[v] if g == 0 else LOCAL))
    at_zyx = np.add(crop.lo_zyx, np.array(crop.shape_zyx) // 2)
    panels = []
    for name, axis, letters in (
        ("axial", 0, "RLAP"),
        ("frontal", 1, "RLSI"),
        ("lateral", 2, "APSI"),
    ):
        rows, columns = (a for a in range(3) if a != axis)
        mm = seen.sample.record.spacing_mm
        grey_YX = np.take(seen.scan_ZYX, at_zyx[axis], axis)
        height, width = (grey_YX.shape[i] * mm[a] for i, a in enumerate((rows, columns)))
        scale = min(2 * CELL / width, 2 * TALLEST / height)
        size = (max(round(scale * height), 1), max(round(scale * width), 1))
        flip = axis != 0  # slices count from the feet
        outlines = []
        for ends, color in boxes:
            y, x = (ends[:, a] * mm[a] * scale for a in (rows, columns))
            y = size[0] - y[::-1] if flip else y
            outlines.append(((x[0], y[0], x[1], y[1]), color))
        shown = _grey(grey_YX[::-1] if flip else grey_YX, hu)
        panels.append(
            _panel(
                f"{name}, through the middle of the crop", shown, size, letters, outlines=outlines
            )
        )
    return panels


def _view_row(
    view_ZYX: Tensor,
    table: ViewTable,
    v: int,
    spacing_mm: Sequence[float],
    hu: HuConfig,
    mask_ZYX: NDArray[np.bool_] | None = None,
) -> list[Panel]:
    """Show three axial slices of a view and a plane across them."""
    depth, height, _ = view_ZYX.shape
    slices = sorted({(2 * k + 1) * depth // 6 for k in range(3)})
    panels = [_axial_panel(view_ZYX, z, table, v, hu, "", mask_ZYX) for z in slices]
    size_z, size_y, size_x = _extent_mm(table, v, spacing_mm)
    across = size_y if table.turns_V[v] % 2 else size_x
    grey_ZX = (view_ZYX[:, height // 2].numpy() * hu.std + hu.mean)[::-1]
    rgb_ZXC = _grey(grey_ZX, hu)
    if mask_ZYX is not None:
        rgb_ZXC = _tint(rgb_ZXC, mask_ZYX[::-1, height // 2])
    left, right, _, _ = _letters(table, v)
    top_bottom = "SI" if table.hi_V3[v, 0] > table.lo_V3[v, 0] else "IS"
    size = (max(round(CELL * size_z / across), 1), CELL)
    panels.append(_panel("across slices, in mm", rgb_ZXC, size, (left, right, *top_bottom)))
    return panels


def _axial_panel(
    view_ZYX: Tensor,
    z: int,
    table: ViewTable,
    v: int,
    hu: HuConfig,
    before: str,
    mask_ZYX: NDArray[np.bool_] | None = None,
) -> Panel:
    rgb_YXC = _grey(view_ZYX[z].numpy() * hu.std + hu.mean, hu)
    if mask_ZYX is not None:
        rgb_YXC = _tint(rgb_YXC, mask_ZYX[z])
    height, width = rgb_YXC.shape[:2]
    size = (round(CELL * height / width), CELL)
    after = "" if mask_ZYX is None else ", masked"
    caption = f"{before}slice {z + 1} of {len(view_ZYX)}{after}"
    return _panel(caption, rgb_YXC, size, _letters(table, v))


def _letters(table: ViewTable, v: int) -> tuple[str, str, str, str]:
    """Return what lies left, right, on top and at the bottom of an axial slice of a view."""
    _, down, right = table.hi_V3[v] > table.lo_V3[v]
    sides = ["R", "P", "L", "A"]  # left, bottom, right, top: counterclockwise
    if not right:
        sides[0], sides[2] = sides[2], sides[0]
    if not down:
        sides[1], sides[3] = sides[3], sides[1]
    turns = int(table.turns_V[v])
    left, bottom, right_side, top = (sides[(i - turns) % 4] for i in range(4))
    return left, right_side, top, bottom


def _grey(hu_YX: NDArray[Any], hu: HuConfig) -> Pixels:
    low, high = hu.clip
    return paint_ct(hu_YX, center=(low + high) / 2, width=high - low)


def _tint(rgb_YXC: Pixels, mask_YX: NDArray[np.bool_]) -> Pixels:
    mixed_YXC = (0.45 * rgb_YXC + 0.55 * np.array(MASK)).astype(np.uint8)
    return np.where(mask_YX[..., None], mixed_YXC, rgb_YXC)


def _panel(
    caption: str,
    rgb_YXC: Pixels,
    size_yx: tuple[int, int],
    letters: Sequence[str],
    outlines: Sequence[tuple[tuple[float, float, float, float], Rgb]] = (),
) -> Panel:
    """Draw a picture of some size with its outlines (x, y, x, y) and the letters of its edges.

    Args:
        caption: Plain text.
        rgb_YXC: The pixels.
        size_yx: Pixels to show.
        letters: Of the left, right, upper and lower edge.
        outlines: Rectangles and their colours.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = size_yx
    # Enlarged pixels stay visible as what they are.
    way = Image.Resampling.NEAREST if width > rgb_YXC.shape[1] else Image.Resampling.LANCZOS
    image = Image.fromarray(rgb_YXC).resize((width, height), way)
    draw = ImageDraw.Draw(image)
    for (x0, y0, x1, y1), color in outlines:
        ends = (min(x0, width - 1), min(y0, height - 1), min(x1, width - 1), min(y1, height - 1))
        draw.rectangle(ends, outline=color, width=3 if color == CROP else 2)
    letter_size = max(14, width // 20)
    font = ImageFont.load_default(letter_size)
    left, right, top, bottom = letters
    middle_x, middle_y = width / 2, height / 2
    places = [(left, (4.0, middle_y), "lm"), (right, (width - 4.0, middle_y), "rm")]
    if height > 3 * letter_size:  # or they would touch
        places += [(top, (middle_x, 3.0), "mt"), (bottom, (middle_x, height - 3.0), "mb")]
    for letter, at, anchor in places:
        draw.text(at, letter, (255, 214, 90), font, anchor, stroke_width=1, stroke_fill=(0, 0, 0))
    return Panel(caption, np.asarray(image), (height, width))


def _mosaic(figures: Sequence[Figure]) -> Pixels:
    """Lay figures under one another, with their titles and captions."""
    from PIL import Image, ImageDraw, ImageFont

    title_font, font = ImageFont.load_default(15), ImageFont.load_default(12)
    width = 4 * CELL + 5 * _SPACE
    strips = []
    for figure in figures:
        strip = Image.new("RGB", (width, 2 * _LINE), "white")
        ImageDraw.Draw(strip).text((_SPACE, _LINE), figure.title, (29, 39, 51), title_font, "lm")
        strips.append(strip)
        for row in figure.rows:
            images = [Image.fromarray(panel.rgb_YXC) for panel in row]
            for image in images:
                image.thumbnail((CELL, TALLEST))
            strip = Image.new("RGB", (width, max(i.height for i in images) + 2 * _LINE), "white")
            draw = ImageDraw.Draw(strip)
            for column, (image, panel) in enumerate(zip(images, row, strict=True)):
                x = _SPACE + column * (CELL + _SPACE)
                strip.paste(image, (x, 0))
                draw.text((x, image.height + 4), panel.caption, (93, 107, 122), font)
            strips.append(strip)
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return np.asarray(sheet)


def _extent_mm(table: ViewTable, v: int, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    extent_3: NDArray[np.float64] = np.abs(table.hi_V3[v] - table.lo_V3[v]) * np.array(spacing_mm)
    return extent_3


def _describe(table: ViewTable, v: int, spacing_mm: Sequence[float], hu: HuConfig) -> str:
    """Say in a line what a view shows and what was done to it."""
    z, y, x = _extent_mm(table, v, spacing_mm)
    done = [f"{name} {text}" for name, text in _drawn(table, v, hu).items() if text]
    return ", ".join([f"{z:.0f} x {y:.0f} x {x:.0f} mm", *done])


def _drawn(table: ViewTable, v: int, hu: HuConfig) -> dict[str, str]:
    """Say what was drawn for each step; empty where a step leaves the view alone."""
    flips = [
        axis for axis, lo, hi in zip("zyx", table.lo_V3[v], table.hi_V3[v], strict=True) if lo > hi
    ]
    low, high = table.window_V2[v]
    sigma_z, sigma_y, _ = table.sigma_V3[v]
    return {
        "flip": " ".join(flips),
        "turn": f"{90 * int(table.turns_V[v])} deg" if table.turns_V[v] else "",
        "window": "" if (low, high) == hu.clip else f"{low:.0f} to {high:.0f} HU",
        "gamma": "" if table.gamma_V[v] == 1 else f"{table.gamma_V[v]:.2f}",
        "contrast": "" if table.contrast_V[v] == 1 else f"{table.contrast_V[v]:.2f}",
        "blur": f"{sigma_z:.2f} z, {sigma_y:.2f} yx" if table.sigma_V3[v].any() else "",
        "noise": f"{hu.std * table.noise_std_V[v]:.0f} HU" if table.noise_std_V[v] else "",
    }


def _effects(
    seen: Seen, table: ViewTable, group: ViewGroupConfig, hu: HuConfig
) -> dict[str, NDArray[np.float64]]:
    """Return, per step, the mean absolute HU by which each view would differ without it."""
    num = group.num
    without: dict[str, dict[str, Any]] = {
        "window": {"window_V2": np.tile(np.array(hu.clip, np.float32), (num, 1))},
        "gamma": {"gamma_V": np.ones(num, np.float32)},
        "contrast": {"contrast_V": np.ones(num, np.float32)},
        "blur": {"sigma_V3": np.zeros((num, 3), np.float32)},
        "noise": {"noise_std_V": np.zeros(num, np.float32)},
    }
    box_ZYX = torch.from_numpy(seen.hu_ZYX)
    whole_VZYX = render(box_ZYX, table, group, hu)
    return {
        step: hu.std
        * (render(box_ZYX, table._replace(**fields), group, hu) - whole_VZYX)
        .abs()
        .mean((1, 2, 3))
        .double()
        .numpy()
        for step, fields in without.items()
    }


def _table(seen: Seen, config: Config) -> str:
    """Return the HTML table of what was drawn for each view, and what it did."""
    hu, spacing_mm = config.hu, seen.sample.record.spacing_mm
    steps = ("flip", "turn", "window", "gamma", "contrast", "blur", "noise")
    names = ("view", "shows, mm", "pixel, mm", *steps, "HU at 1, 50, 99 %")
    rows = []
    for title, group, table, views_VZYX in zip(
        ("global", "local"),
        (config.views.global_views, config.views.local_views),
        seen.sample.tables,
        seen.views,
        strict=True,
    ):
        effects = _effects(seen, table, group, hu) if group.num else {}
        for v in range(group.num):
            extent_3 = _extent_mm(table, v, spacing_mm)
            cells = [f"{title} {v + 1}", " x ".join(f"{e:.0f}" for e in extent_3)]
            # Before its turns: the axes are those of the scan.
            sizes = group.size_zyx
            cells.append(" x ".join(f"{e / n:.2f}" for e, n in zip(extent_3, sizes, strict=True)))
            cells = [html.escape(cell) for cell in cells]
            for step, text in _drawn(table, v, hu).items():
                did = f"<br><small>{effects[step][v]:.0f} HU</small>" if step in effects else ""
                cells.append(html.escape(text) + did if text else "")
            hu_N = views_VZYX[v].numpy().ravel() * hu.std + hu.mean
            cells.append(", ".join(f"{p:.0f}" for p in np.percentile(hu_N, (1, 50, 99))))
            rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="drawn"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _lead(seen: Seen) -> str:
    crop, record = seen.sample.crop, seen.sample.record
    z, y, x = (n * mm for n, mm in zip(crop.shape_zyx, record.spacing_mm, strict=True))
    share = np.prod(seen.sample.region.shape_zyx) / np.prod(crop.shape_zyx)
    return (
        f"{record.case}: a crop of {z:.0f} x {y:.0f} x {x:.0f} mm (depth, height, width) of a scan "
        f"with {' x '.join(f'{mm:g}' for mm in record.spacing_mm)} mm voxels; its views look at "
        f"{share:.0%} of it, and only that is read."
    )


def _page(
    config: Config, recipe: str, renderer: str, num: int, sections: list[tuple[str, str, str]]
) -> str:
    views = config.views
    tiles = [
        ("samples", f"{num}", f"recipe {recipe}"),
        *(
            (name, f"{group.num}", " x ".join(map(str, group.size_zyx)) + " pixels")
            for name, group in (
                ("global views", views.global_views),
                ("local views", views.local_views),
            )
        ),
        ("renderer", renderer, "all give the same views"),
    ]
    low, high = config.hu.clip
    facts = [
        ("tapct-fast", __version__),
        ("seed", str(config.train.seed)),
        ("HU", f"{low:g} to {high:g} from black to white, as the model gets them"),
        ("orientation", "the patient's right on the left, front on top, before flips and turns"),
        ("below a setting", "mean HU by which the view would differ without the step"),
        ("blur", "Gaussian sigma in pixels of the view; across slices with the slice profile"),
    ]
    return render_page(
        "What the model sees",
        "Views and masks of samples of a run, as a training step gets them.",
        tiles,
        [("Key", "", legend_html(LEGEND) + facts_list(facts)), *sections],
        style=_STYLE,
    )


_STYLE = """
.drawn{font-size:13px;font-variant-numeric:tabular-nums}
.drawn td,.drawn th{vertical-align:top;padding-right:8px}.drawn small{color:var(--soft)}
"""

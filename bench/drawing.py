"""One drawing, written as SVG and, by Pillow, as PNG.

A drawing is a list of lines, areas, marks and texts. Colours are roles: the SVG resolves them by
CSS, light or dark; the PNG is light. Sizes are in pixels, y grows downwards.
"""

import functools
import html
import io
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]
Shape = Literal["circle", "square", "diamond", "triangle", "cross"]

# Role: light, dark. Told apart by lightness too, so that they survive a grey printer.
COLORS: dict[str, tuple[str, str]] = {
    "paper": ("#fbfcfd", "#12171d"),
    "panel": ("#ffffff", "#1a2129"),
    "ink": ("#1d2733", "#e8edf2"),
    "soft": ("#5d6b7a", "#9aa8b7"),
    "faint": ("#e4e8ed", "#2b3540"),
    "ours": ("#1f6feb", "#5b9dff"),
    "eager": ("#7d8894", "#8b98a5"),
    "compile": ("#c2410c", "#fb8a4c"),
    "rival-a": ("#0f766e", "#34c3b3"),
    "rival-b": ("#7c3aed", "#b794ff"),
    "rival-c": ("#a16207", "#e0b13a"),
    "rival-d": ("#be185d", "#ff7fb0"),
}
SCALE = 2  # pixels of the PNG per unit
FINE = 3 * SCALE  # at which it is drawn, for Pillow smooths nothing but text


class Line(NamedTuple):
    """A polyline."""

    points: Sequence[Point]
    role: str
    width: float = 1.0
    dash: float = 0.0


class Area(NamedTuple):
    """A filled polygon."""

    points: Sequence[Point]
    role: str
    opacity: float = 1.0


class Mark(NamedTuple):
    """One measured point; ``title`` is what a pointer over it shows."""

    at: Point
    shape: Shape
    role: str
    size: float
    title: str


class Text(NamedTuple):
    """One line of text, turned counter-clockwise; ``href`` only leads somewhere inside a page."""

    at: Point
    text: str
    role: str = "soft"
    size: float = 12
    anchor: Anchor = "start"
    is_bold: bool = False
    turn_degrees: float = 0
    href: str = ""


class Drawing(NamedTuple):
    """What is drawn, in order; ``title`` and ``text`` say it to those who do not see it."""

    width: int
    height: int
    title: str
    text: str
    items: list[Line | Area | Mark | Text]


def svg(drawing: Drawing, *, is_file: bool = False) -> str:
    """Return the drawing as SVG; as a file of its own it brings its colours and its ground."""
    size = f'viewBox="0 0 {drawing.width} {drawing.height}"'
    name = f"{html.escape(drawing.title)}</title><desc>{html.escape(drawing.text)}"
    start = f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" {size} role="img"'
    if is_file:
        start += f' width="{drawing.width}" height="{drawing.height}"'
        ground = f"<style>{STYLE}</style>" + '<rect class="f-paper" width="100%" height="100%"/>'
    else:
        ground = ""
    body = "".join(map(_svg_item, drawing.items))
    return f"{start}><title>{name}</desc>{ground}{body}</svg>"


def _style() -> str:
    light, dark = (
        ";".join(f"--{role}:{colors[theme]}" for role, colors in COLORS.items()) for theme in (0, 1)
    )
    rules = "".join(
        f".s-{role}{{stroke:var(--{role})}}.f-{role}{{fill:var(--{role})}}" for role in COLORS
    )
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f"{rules}.drawing{{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',"
        "Arial,sans-serif;font-variant-numeric:tabular-nums}"
        ".line{fill:none;stroke-linejoin:round;stroke-linecap:round}"
        ".mark{stroke:var(--paper);stroke-width:1}"
        ".halo{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}"
    )


STYLE = _style()


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg_item(item: Line | Area | Mark | Text) -> str:
    match item:
        case Line(points, role, width, dash):
            dashed = f' stroke-dasharray="{dash:g} {dash:g}"' if dash else ""
            return (
                f'<polyline class="line s-{role}" stroke-width="{width:g}"{dashed} '
                f'points="{_path(points)}"/>'
            )
        case Area(points, role, opacity):
            return f'<polygon class="f-{role}" opacity="{opacity:g}" points="{_path(points)}"/>'
        case Mark((x, y), shape, role, size, title):
            name = f"<title>{html.escape(title)}</title>" if title else ""
            if shape == "circle":
                place = f'cx="{x:.1f}" cy="{y:.1f}" r="{size / 2:g}"'
                return f'<circle class="mark f-{role}" {place}>{name}</circle>'
            corners = _path(_outline(item))
            return f'<polygon class="mark f-{role}" points="{corners}">{name}</polygon>'
        case Text((x, y), text, role, size, anchor, is_bold, turn, href):
            place = f'x="{x:.1f}" y="{y:.1f}"'
            if turn:
                place += f' transform="rotate({-turn:.1f} {x:.1f} {y:.1f})"'
            weight = ' font-weight="600"' if is_bold else ""
            line = (
                f'<text class="halo" style="fill:var(--{role});font-size:{size:g}px" '
                f'{place} text-anchor="{anchor}"{weight}>{html.escape(text)}</text>'
            )
            return f'<a href="{html.escape(href)}">{line}</a>' if href else line


def _outline(mark: Mark) -> list[Point]:
    """Return the corners of a mark; all shapes cover about the same area."""
    x, y = mark.at
    r = mark.size / 2
    corners: dict[Shape, Sequence[Point]] = {
        "circle": [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * np.pi, 48)[:-1]],
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "triangle": [(0, -1.2), (1.15, 0.9), (-1.15, 0.9)],
        "cross": [
            *((-1.1, -0.7), (-0.7, -1.1), (0, -0.4), (0.7, -1.1), (1.1, -0.7), (0.4, 0)),
            *((1.1, 0.7), (0.7, 1.1), (0, 0.4), (-0.7, 1.1), (-1.1, 0.7), (-0.4, 0)),
        ],
    }
    return [(x + r * dx, y + r * dy) for dx, dy in corners[mark.shape]]


def png_bytes(drawing: Drawing) -> bytes:
    """Return the drawing as PNG, two pixels per unit, light."""
    image = Image.new("RGB", (FINE * drawing.width, FINE * drawing.height), _rgb("paper"))
    draw = ImageDraw.Draw(image, "RGBA")  # blends what it draws
    for item in drawing.items:
        match item:
            case Line(points, role, width, dash):
                for piece in _dashes(points, 2 * dash) if dash else [points]:
                    _line(draw, piece, width, role)
            case Area(points, role, opacity):
                draw.polygon(_fine(points), (*_rgb(role), round(255 * opacity)))
            case Mark():
                corners = _outline(item)
                _line(draw, [*corners, *corners[:2]], 2, "paper")
                draw.polygon(_fine(corners), _rgb(item.role))
            case Text():
                _text(image, draw, item)
    size = (SCALE * drawing.width, SCALE * drawing.height)
    data = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(data, "PNG", optimize=True)
    return data.getvalue()


def _rgb(role: str) -> tuple[int, int, int]:
    value = int(COLORS[role][0][1:], 16)
    return value >> 16, value >> 8 & 255, value & 255


def _fine(points: Sequence[Point]) -> list[Point]:
    return [(FINE * x, FINE * y) for x, y in points]


def _line(draw: ImageDraw.ImageDraw, points: Sequence[Point], width: float, role: str) -> None:
    """Draw a line with round ends."""
    fine, radius = _fine(points), FINE * width / 2
    draw.line(fine, _rgb(role), round(2 * radius), joint="curve")
    for x, y in (fine[0], fine[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), _rgb(role))


def _dashes(points: Sequence[Point], period: float) -> list[list[Point]]:
    pieces: list[list[Point]] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        for start in np.arange(0, length, period):
            ends = (start / length, min(start + period / 2, length) / length)
            pieces.append([(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in ends])
    return pieces


@functools.cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # so it is wherever Pillow comes as a wheel
    return font


def text_width(text: str, size: float) -> float:
    """Return how wide a text is at most, in pixels: a page may show it in a wider font."""
    return 1.15 * _font(FINE * size).getlength(text) / FINE  # 1.15: DejaVu Sans


def _text(image: Image.Image, draw: ImageDraw.ImageDraw, text: Text) -> None:
    """Draw a text on a halo of the ground."""
    place = (FINE * text.at[0], FINE * text.at[1])
    if text.turn_degrees:  # on a sheet of its own, which turns around the text's place
        reach = math.ceil(FINE * (text_width(text.text, text.size) + 2 * text.size))
        sheet = Image.new("RGBA", (2 * reach, 2 * reach), (*_rgb("paper"), 0))
        _letters(ImageDraw.Draw(sheet), (reach, reach), text)
        sheet = sheet.rotate(text.turn_degrees, Image.Resampling.BICUBIC)
        image.paste(sheet, (round(place[0]) - reach, round(place[1]) - reach), sheet)
    else:
        _letters(draw, place, text)


def _letters(draw: ImageDraw.ImageDraw, place: Point, text: Text) -> None:
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[text.anchor]
    weight = FINE * text.size / 50 if text.is_bold else 0  # Pillow brings no bold font
    for role, stroke in (("paper", weight + 1.5 * FINE), (text.role, weight)):
        draw.text(
            place,
            text.text,
            _rgb(role),
            _font(FINE * text.size),
            anchor,
            stroke_width=round(stroke),
            stroke_fill=_rgb(role),
        )

"""One drawing, written as SVG and as PNG, without a plotting library.

A drawing is a list of lines, areas, marks and texts. Colours are roles: the SVG resolves them by
CSS, light or dark; the PNG is light. In the PNG text is drawn with the strokes below, because no
font is at hand. Sizes are in pixels, y grows downwards.
"""

import html
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.report import Rgb, png

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
        "circle": [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * np.pi, 24)[:-1]],
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
    rgb_YXC = np.empty((SCALE * drawing.height, SCALE * drawing.width, 3))
    rgb_YXC[:] = _rgb("paper")
    for item in drawing.items:
        match item:
            case Line(points, role, width, dash):
                pieces = _dashes(points, 2 * dash) if dash else [points]
                _paint(rgb_YXC, pieces, width, _rgb(role))
            case Area(points, role, opacity):
                _fill(rgb_YXC, points, _rgb(role), opacity)
            case Mark():
                corners = _outline(item)
                _paint(rgb_YXC, [[*corners, corners[0]]], 2, _rgb("paper"))
                _fill(rgb_YXC, corners, _rgb(item.role), 1)
            case Text():
                strokes = _strokes(item)
                weight = item.size * (0.125 if item.is_bold else 0.085)
                _paint(rgb_YXC, strokes, weight + 3, _rgb("paper"))
                _paint(rgb_YXC, strokes, weight, _rgb(item.role))
    return png(np.rint(rgb_YXC).astype(np.uint8))


def _rgb(role: str) -> Rgb:
    value = int(COLORS[role][0][1:], 16)
    return value >> 16, value >> 8 & 255, value & 255


def _dashes(points: Sequence[Point], period: float) -> list[list[Point]]:
    pieces: list[list[Point]] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        for start in np.arange(0, length, period):
            ends = (start / length, min(start + period / 2, length) / length)
            pieces.append([(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in ends])
    return pieces


def _window(
    rgb_YXC: NDArray[np.float64], points_N2: NDArray[np.float64], margin: float
) -> tuple[slice, slice] | None:
    """Return the pixels near some points, None if they lie outside."""
    low = np.maximum(np.floor(points_N2.min(0) - margin), 0).astype(int)
    high = np.minimum(np.ceil(points_N2.max(0) + margin), rgb_YXC.shape[1::-1]).astype(int)
    if (high <= low).any():
        return None
    return slice(low[1], high[1]), slice(low[0], high[0])


def _blend(
    rgb_YXC: NDArray[np.float64],
    window: tuple[slice, slice],
    cover_YX: NDArray[np.float64],
    color: Rgb,
) -> None:
    part = rgb_YXC[window]
    part += cover_YX[..., None] * (np.array(color) - part)


def _paint(
    rgb_YXC: NDArray[np.float64], paths: Sequence[Sequence[Point]], width: float, color: Rgb
) -> None:
    """Draw lines with round ends; what several of one call cover is covered once."""
    if not any(paths):
        return
    reach = SCALE * width / 2 + 0.5
    window = _window(rgb_YXC, SCALE * np.array([p for path in paths for p in path]), reach)
    if window is None:
        return
    top, left = window[0].start, window[1].start
    cover_YX = np.zeros(rgb_YXC[window].shape[:2])
    for path in paths:
        points_N2 = SCALE * np.array(path, float)
        if len(points_N2) == 1:
            points_N2 = np.repeat(points_N2, 2, axis=0)
        for a_2, b_2 in itertools.pairwise(points_N2):
            near = _window(rgb_YXC, np.array([a_2, b_2]), reach)
            if near is None:
                continue
            y_Y1 = np.arange(near[0].start, near[0].stop)[:, None] + 0.5
            x_1X = np.arange(near[1].start, near[1].stop)[None] + 0.5
            along_2 = b_2 - a_2
            length2 = float(along_2 @ along_2) or 1.0
            t_YX = ((x_1X - a_2[0]) * along_2[0] + (y_Y1 - a_2[1]) * along_2[1]) / length2
            t_YX = np.clip(t_YX, 0, 1)
            distance_YX = np.hypot(
                x_1X - a_2[0] - t_YX * along_2[0], y_Y1 - a_2[1] - t_YX * along_2[1]
            )
            part = cover_YX[
                near[0].start - top : near[0].stop - top, near[1].start - left : near[1].stop - left
            ]
            np.maximum(part, np.clip(reach - distance_YX, 0, 1), out=part)
    _blend(rgb_YXC, window, cover_YX, color)


def _fill(
    rgb_YXC: NDArray[np.float64], points: Sequence[Point], color: Rgb, opacity: float
) -> None:
    """Fill a polygon (even-odd) from sixteen samples per pixel."""
    points_N2 = SCALE * np.array(points)
    window = _window(rgb_YXC, points_N2, 1)
    if window is None:
        return
    samples = (np.arange(4) + 0.5) / 4
    y_Y1 = (np.arange(window[0].start, window[0].stop)[:, None] + samples).reshape(-1, 1)
    x_1X = (np.arange(window[1].start, window[1].stop)[:, None] + samples).reshape(1, -1)
    is_in_YX = np.zeros((y_Y1.size, x_1X.size), bool)
    for (x0, y0), (x1, y1) in zip(points_N2, np.roll(points_N2, -1, axis=0), strict=True):
        if y0 != y1:
            crosses_Y1 = (y_Y1 < y0) != (y_Y1 < y1)
            is_in_YX ^= crosses_Y1 & (x_1X < x0 + (y_Y1 - y0) * (x1 - x0) / (y1 - y0))
    cover_YX = is_in_YX.reshape(y_Y1.size // 4, 4, x_1X.size // 4, 4).mean((1, 3))
    _blend(rgb_YXC, window, opacity * cover_YX, color)


def text_width(text: str, size: float) -> float:
    """Return about how wide a text is, in pixels."""
    return sum(_glyph(letter)[0] for letter in text) * size / _EM


def _strokes(text: Text) -> list[list[Point]]:
    """Return the lines of a text at its place."""
    unit = text.size / _EM
    c, s = math.cos(math.radians(text.turn_degrees)), math.sin(math.radians(text.turn_degrees))
    pen = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.anchor] * -text_width(text.text, text.size)
    strokes = []
    for letter in text.text:
        advance, paths = _glyph(letter)
        for path in paths:
            flat = [(pen + x * unit, -y * unit) for x, y in path]
            strokes.append(
                [(text.at[0] + x * c + y * s, text.at[1] - x * s + y * c) for x, y in flat]
            )
        pen += advance * unit
    return strokes


_EM = 10.0  # a capital is 7 of 10 high
# Paths on a grid, two digits a point: x, and y with the baseline at 2. ~ rounds the corners, o also
# closes the path.
# fmt: off
_GLYPHS = {
    "A": "02 39 62,14 54", "B": "02 09,~09 49 46 06,~06 56 52 02", "C": "~57 59 09 02 52 54",
    "D": "02 09,~09 59 52 02", "E": "49 09 02 42,06 36", "F": "49 09 02,06 36",
    "G": "~57 59 09 02 52 55,52 55 35", "H": "09 02,59 52,06 56", "I": "09 02", "J": "~39 32 02 04",
    "K": "09 02,59 05,26 52", "L": "09 02 42", "M": "02 09 34 69 62", "N": "02 09 52 59",
    "O": "o02 62 69 09", "P": "02 09,~09 59 55 05", "Q": "o02 62 69 09,44 62",
    "R": "02 09,~09 59 55 05,25 52", "S": "~57 59 09 05 56 52 02 04", "T": "09 69,39 32",
    "U": "~09 02 52 59", "V": "09 32 69", "W": "09 22 48 62 89", "X": "09 52,02 59",
    "Y": "09 35 69,35 32", "Z": "09 59 02 52", "a": "o02 42 47 07,47 42", "b": "09 02,o02 42 47 07",
    "c": "~46 47 07 02 42 43", "d": "49 42,o02 42 47 07", "e": "05 45,~45 47 07 02 42 43",
    "f": "~39 19 16,16 12,07 37", "g": "o02 42 47 07,47 43,~43 40 00 01", "i": "07 02,09",
    "h": "09 02,~05 07 47 44,44 42", "j": "17 12,~12 10 00,19", "k": "09 02,37 04,15 42",
    "l": "09 02", "m": "07 02,~05 07 37 34,34 32,~35 37 67 64,64 62",
    "n": "07 02,~05 07 47 44,44 42", "o": "o02 42 47 07", "p": "07 00,o02 42 47 07",
    "q": "47 40,o02 42 47 07", "r": "07 02,~04 07 37", "s": "~46 47 07 04 45 42 02 03",
    "t": "~19 12 32,07 37", "u": "~07 02 42 45,47 42", "v": "07 22 47", "w": "07 12 36 52 67",
    "x": "07 42,02 47", "y": "07 22,47 10", "z": "07 47 02 42", "0": "o02 42 49 09",
    "1": "07 29 22", "2": "~07 09 49 46 02,02 42", "3": "~07 09 49 46 16,~16 46 42 02 04",
    "4": "32 39 04 44", "5": "49 09 06,~06 46 42 02 03", "6": "~49 09 04,o02 42 46 06",
    "7": "09 49 12", "8": "o06 46 49 09,o02 42 46 06", "9": "o05 45 49 09,~47 42 02", ".": "02",
    ",": "12 01", ":": "02,06", ";": "12 01,16", "-": "05 35", "+": "05 45,23 27", "/": "01 39",
    "(": "~29 07 02 20", ")": "~09 27 22 00", "=": "04 44,06 46", "_": "01 41",
    "%": "02 69,o07 27 29 09,o42 62 64 44", "<": "47 05 43", ">": "07 45 03", "|": "00 09",
    "'": "09 07", '"': "09 07,29 27", "[": "29 09 00 20", "]": "09 29 20 00", "!": "09 04,02",
    "?": "~07 09 49 46 24,22", "*": "25 29,06 48,08 46", "#": "12 29,42 59,05 65,07 67",
    "~": "~04 17 34 47", "&": "52 18,~18 19 39 36 05,~05 02 42 54",
    "@": "o24 54 57 27,~57 54 74 79 09 02 62",
}
# fmt: on


def _glyph(letter: str) -> tuple[float, list[list[Point]]]:
    """Return the advance and the paths of a letter; one that is not drawn here is a box."""
    if letter == " ":
        return 4.0, []
    source = _GLYPHS.get(letter, "02 42 49 09 02")
    paths = [_drawn(path) for path in source.split(",")]
    width = max(int(word.strip("~o")[0]) for path in source.split(",") for word in path.split())
    if letter.isdigit():
        width = 4  # digits line up
    return width + 2.0, paths


def _drawn(path: str) -> list[Point]:
    points = [(float(word[0]), float(word[1]) - 2) for word in path.lstrip("~o").split()]
    if path[0] not in "~o":
        return points
    for _ in range(3):  # Chaikin: each corner becomes two, and in the end a curve
        ring = [*points, points[0]] if path[0] == "o" else points
        cut = [
            (a * t + b * (1 - t), c * t + d * (1 - t))
            for (a, c), (b, d) in itertools.pairwise(ring)
            for t in (0.75, 0.25)
        ]
        points = cut if path[0] == "o" else [points[0], *cut[1:-1], points[-1]]
    return [*points, points[0]] if path[0] == "o" else points

"""The pictures of the benchmarks: a roofline, times relative to ours, and a history per case."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from bench.drawing import Anchor, Area, Drawing, Line, Mark, Point, Shape, Text, text_width
from bench.rows import FLOOR_SUBJECT, Ceilings, Row, Times, flop_rate, number
from bench.rows import Point as Measured

WIDTH = 1032
OURS = "this library"
# Five shapes and four colours: twenty rivals before two look alike.
SHAPES: tuple[Shape, ...] = ("diamond", "triangle", "cross", "square", "circle")
RIVALS = ("rival-a", "rival-b", "rival-c", "rival-d")
Items = list[Line | Area | Mark | Text]


class Look(NamedTuple):
    """How a kind of variant is drawn."""

    name: str
    role: str
    shape: Shape


def kind(variant: str) -> str:
    """Return what a variant is drawn and listed as: ours, eager, compile, or a rival by name."""
    if variant.startswith("tapct"):
        return OURS
    if "compile" in variant:
        return "torch.compile"
    if variant.startswith("eager"):
        return "eager"
    return re.split(r",| \(| \+ ", variant)[0].strip()


def looks(rows: Iterable[Row]) -> dict[str, Look]:
    """Return the looks of all kinds among some rows, the same for the same set of names."""
    fixed = {
        OURS: Look(OURS, "ours", "circle"),
        "eager": Look("eager", "eager", "square"),
        "torch.compile": Look("torch.compile", "compile", "diamond"),
    }
    kinds = sorted({kind(variant) for row in rows for variant in row.times_ms})
    rivals = [name for name in kinds if name not in fixed]
    others = {
        name: Look(name, RIVALS[i % len(RIVALS)], SHAPES[i % len(SHAPES)])
        for i, name in enumerate(rivals)
    }
    return {name: look for name, look in {**fixed, **others}.items() if name in kinds}


class _Log(NamedTuple):
    """A logarithmic axis: values from ``low`` to ``high`` between two pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + (self.end - self.start) * part

    def ticks(self, steps: Sequence[int] = (1,)) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return [v for v in values if self.low <= v * 1.0001 and v <= self.high * 1.0001]


def _legend(shown: Iterable[Look], left: float, top: float, right: float) -> tuple[Items, float]:
    """Draw marks and names in lines; return them and the height used."""
    items: Items = []
    x, y = left, top
    for look in shown:
        width = text_width(look.name, 13) + 40
        if x + width > right and x > left:
            x, y = left, y + 20
        items.append(Mark((x + 6, y - 4), look.shape, look.role, 10, ""))
        items.append(Text((x + 18, y), look.name, size=13))
        x += width
    return items, y - top + 20


def roofline(device: str, rows: Sequence[Row], ceilings: Ceilings) -> Drawing | None:
    """Draw achieved rate over arithmetic intensity; None if no row states bytes and FLOPs.

    Intensity is that of the floor (FLOPs and bytes that the case needs), so the variants of a case
    stand above each other, and the distance to the roof is what a variant leaves unused.
    """
    cases = numbered(rows)
    if not cases:
        return None
    intensity = {row.key: _intensity(row) for _, row in cases}
    rates = [row.tflop_per_s(v) or 1 for _, row in cases for v in row.times_ms]
    top_rate = max([*rates, ceilings.tflop_per_s or 0])
    slope = (ceilings.gb_per_s or 0) / 1e3  # TFLOP/s per FLOP/byte
    ridge = (ceilings.tflop_per_s or top_rate) / slope if slope else max(intensity.values())
    height, left, right, bottom = 560, 76, WIDTH - 24, 500
    shown = looks(row for _, row in cases)
    legend, used = _legend(shown.values(), 24, 46, right)
    top = 46 + used
    x = _Log(10 ** math.floor(math.log10(min(*intensity.values(), ridge / 2) / 1.6)),
             max(max(intensity.values()) * 2.5, ridge * 6), left, right)  # fmt: skip
    least = min([*rates, ceilings.tflop_per_s or top_rate])
    y = _Log(least / 1.8, top_rate * 2.2, bottom, top)

    items: Items = [Text((24, 20), f"Roofline, {device}", "ink", 17, is_bold=True), *legend]
    roof = _roof(x, y, slope, ceilings.tflop_per_s)
    if len(roof) > 1:
        items.append(Area([*roof, (roof[-1][0], bottom), (roof[0][0], bottom)], "ours", 0.045))
    items += _axes(x, y, "FLOP per byte that the case needs", "FLOP/s")
    if len(roof) > 1:
        items.append(Line(roof, "ink", 1.8))
        items += _roof_labels(x, y, slope, ceilings)
    columns: list[list[tuple[int, Row]]] = []
    for index, row in sorted(cases, key=lambda case: intensity[case[1].key]):
        at_x = x.at(intensity[row.key])
        heights = {v: y.at(row.tflop_per_s(v) or y.low) for v in row.times_ms}
        items.append(
            Line([(at_x, min(heights.values())), (at_x, max(heights.values()))], "faint", 1.5)
        )
        for variant in _ours_last(row):
            look = shown[kind(variant)]
            size = 12 if variant == row.ours else 9.5
            title = _title(row, variant)
            items.append(Mark((at_x, heights[variant]), look.shape, look.role, size, title))
        last = columns[-1][-1][1] if columns else row
        if columns and at_x - x.at(intensity[last.key]) < 4:
            columns[-1].append((index, row))
        else:
            columns.append([(index, row)])
    items += _numbers(columns, intensity, x, y)
    text = (
        f"{len(cases)} cases. Numbers above the marks are those of the table beside the picture. "
        + ceilings_text(ceilings)
    )
    return Drawing(WIDTH, height, f"Roofline, {device}", text, items)


def _numbers(
    columns: Sequence[Sequence[tuple[int, Row]]],
    intensity: Mapping[tuple[str, str, str], float],
    x: _Log,
    y: _Log,
) -> Items:
    """Draw the numbers of cases above their marks, or below them where the place is taken."""
    items: Items = []
    taken: list[tuple[float, float, float]] = []  # left, right, y
    for column in columns:
        rows = [row for _, row in column]
        heights = [y.at(row.tflop_per_s(v) or y.low) for row in rows for v in row.times_ms]
        at_x = x.at(intensity[rows[0].key])
        text = ", ".join(str(index) for index, _ in sorted(column, key=lambda case: case[0]))
        half = text_width(text, 12) / 2 + 3
        left, right = at_x - half, at_x + half
        for at_y in (min(heights) - 11, max(heights) + 19, *range(int(min(heights)) - 24, 0, -13)):
            if all(left > b or right < a or abs(at_y - c) > 12 for a, b, c in taken):
                break
        taken.append((left, right, at_y))
        href = f"#{slug(rows[0])}"
        items.append(Text((at_x, at_y), text, "ink", 12, "middle", is_bold=True, href=href))
    return items


def numbered(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Return the rows of a roofline with their numbers; ceilings are its roof, not its marks."""
    fit = [row for row in rows if row.bytes and row.flops and row.subject != FLOOR_SUBJECT]
    return list(enumerate(fit, start=1))


def _intensity(row: Row) -> float:
    return (row.flops or 1) / (row.bytes or 1)


def _roof(x: _Log, y: _Log, slope: float, flat: float | None) -> list[Point]:
    """Return the corners of min(slope * intensity, flat) inside the axes."""
    if not slope:
        return [(x.start, y.at(flat)), (x.end, y.at(flat))] if flat else []
    enter = max(x.low, y.low / slope)
    leave = min(x.high, (flat or y.high) / slope)
    corners = [(enter, enter * slope), (leave, leave * slope)]
    if flat and leave < x.high:
        corners.append((x.high, flat))
    return [(x.at(a), y.at(b)) for a, b in corners]


def _roof_labels(x: _Log, y: _Log, slope: float, ceilings: Ceilings) -> Items:
    items: Items = []
    if ceilings.tflop_per_s:
        text = f"best matrix product {flop_rate(ceilings.tflop_per_s)}FLOP/s"
        items.append(Text((x.end - 4, y.at(ceilings.tflop_per_s) - 8), text, "ink", 12.5, "end"))
    if slope:
        enter = max(x.low, y.low / slope)
        start = (x.at(enter), y.at(enter * slope))
        rise, run = start[1] - y.at(enter * slope * 10), x.at(enter * 10) - start[0]
        turn = math.degrees(math.atan2(rise, run))
        shift = (28 * math.cos(math.radians(turn)) - 8 * math.sin(math.radians(turn)),
                 -28 * math.sin(math.radians(turn)) - 8 * math.cos(math.radians(turn)))  # fmt: skip
        at = (start[0] + shift[0], start[1] + shift[1])
        text = f"copy {number(slope)} TB/s" if slope >= 1 else f"copy {number(1e3 * slope)} GB/s"
        items.append(Text(at, text, "ink", 12.5, turn_degrees=turn))
    return items


def ceilings_text(ceilings: Ceilings) -> str:
    """Say what the roof is made of."""
    if not ceilings.gb_per_s and not ceilings.tflop_per_s:
        return "The ceilings of this device are not measured, so there is no roof."
    copy = f"copy {number(ceilings.gb_per_s)} GB/s" if ceilings.gb_per_s else "copy not measured"
    product = (
        f"matrix product {flop_rate(ceilings.tflop_per_s)}FLOP/s"
        if ceilings.tflop_per_s
        else "matrix product not measured"
    )
    return f"The roof is the best measured here: {copy}, {product}."


def _axes(x: _Log, y: _Log, x_name: str, y_name: str) -> Items:
    items: Items = []
    for tick in x.ticks(_steps(x)):
        items.append(Line([(x.at(tick), y.start), (x.at(tick), y.end)], "faint"))
        items.append(Text((x.at(tick), y.start + 20), _tick(tick), anchor="middle"))
    for tick in y.ticks(_steps(y)):
        items.append(Line([(x.start, y.at(tick)), (x.end, y.at(tick))], "faint"))
        items.append(Text((x.start - 9, y.at(tick) + 4), _power(tick), anchor="end"))
    middle = ((x.start + x.end) / 2, (y.start + y.end) / 2)
    items.append(Text((middle[0], y.start + 44), x_name, size=13, anchor="middle"))
    items.append(Text((22, middle[1]), y_name, size=13, anchor="middle", turn_degrees=90))
    items.append(Line([(x.start, y.end), (x.start, y.start), (x.end, y.start)], "soft", 1.2))
    return items


def _power(tflop_per_s: float) -> str:
    """Return a round rate with its prefix."""
    scale, prefix = next(s for s in ((1, "T"), (1e3, "G"), (1e6, "M")) if tflop_per_s * s[0] > 0.99)
    return f"{round(tflop_per_s * scale):,} {prefix}"


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _steps(axis: _Log) -> Sequence[int]:
    """Return which multiples of a power of ten to label."""
    return (1,) if axis.high / axis.low > 300 else (1, 2, 5)


def _title(row: Row, variant: str) -> str:
    times = row.times_ms[variant]
    share = row.share(variant)
    gb, tflop = row.gb_per_s(variant), row.tflop_per_s(variant)
    rates = [*([f"{number(gb)} GB/s"] if gb else []), f"{flop_rate(tflop)}FLOP/s" if tflop else ""]
    return "\n".join(
        [
            f"{row.subject}, {row.case}",
            variant,
            f"{number(times.p50)} ms (p20 {number(times.p20)}, p80 {number(times.p80)})",
            f"{row.ratio(variant):.2f} times ours",
            *filter(None, [", ".join(filter(None, rates))]),
            *([f"{100 * share:.0f} % of the attainable rate"] if share else []),
        ]
    )


def overview(device: str, rows: Sequence[Row]) -> Drawing | None:
    """Draw the time of every variant of every case relative to ours; None if none is ours."""
    rows = [row for row in rows if kind(row.ours) == OURS]
    if not rows:
        return None
    return _strips(
        f"Time relative to ours, {device}",
        rows,
        lambda row, time_ms: time_ms / row.times_ms[row.ours].p50,
        unit="x",
        axis="time / time of this library; right of 1x is slower; bars span p20 to p80",
        line=(1.0, "ours", ""),
    )


def bandwidth(device: str, rows: Sequence[Row], ceilings: Ceilings) -> Drawing | None:
    """Draw the achieved bandwidth of ops without a matrix product; None if there are none."""
    rows = [row for row in rows if not row.flops and row.bytes and "dtype" in row.values]
    rows = [row for row in rows if row.subject != FLOOR_SUBJECT]
    if not rows:
        return None
    copy = ceilings.gb_per_s
    return _strips(
        f"Bandwidth, {device}",
        rows,
        lambda row, time_ms: (row.bytes or 0) / time_ms / 1e6,
        unit="",
        axis="GB/s of the bytes that the case needs; bars span p20 to p80",
        line=(copy, "ink", f"copy {number(copy)} GB/s") if copy else None,
    )


def _strips(
    title: str,
    rows: Sequence[Row],
    value: Callable[[Row, float], float],
    *,
    unit: str,
    axis: str,
    line: tuple[float, str, str] | None,
) -> Drawing:
    """Draw one line per case: its variants on a shared logarithmic axis, ours on top."""
    shown = looks(rows)
    left = min(372, 48 + max(text_width(row.case, 13) for row in rows))
    right = WIDTH - 24
    legend, used = _legend(shown.values(), 24, 46, right)
    top = 46 + used + 26
    every = [value(r, t) for r in rows for times in r.times_ms.values() for t in times]
    every += [line[0], 2.2 * line[0]] if line else []
    x = _Log(min(every) / 1.25, max(every) * 1.2, left, right)
    items: Items = []
    lines: Items = []
    y, last = top - 16.0, ""
    for row in rows:
        if row.subject != last:
            y += 34
            last = row.subject
            items.append(Text((24, y), row.subject, "ink", 14, is_bold=True))
        y += 24
        name = _cut(row.case, left - 40, 13)
        items.append(Text((24, y + 4), name, size=13, href=f"#{slug(row)}"))
        lines.append(Line([(left, y), (right, y)], "faint"))
        for variant in _ours_last(row):
            look = shown[kind(variant)]
            p20, p50, p80 = (x.at(value(row, t)) for t in row.times_ms[variant])
            size = 12 if variant == row.ours else 9.5
            if max(abs(p20 - p50), abs(p80 - p50)) > size / 2 + 4:  # else the mark hides it
                items.append(Line([(p20, y), (p80, y)], look.role, 3))
            items.append(Mark((p50, y), look.shape, look.role, size, _title(row, variant)))
    bottom = y + 22
    ground: Items = [Text((24, 20), title, "ink", 17, is_bold=True), *legend, *lines]
    for tick in x.ticks((1, 2, 5)):
        ground.append(Line([(x.at(tick), top), (x.at(tick), bottom)], "faint"))
        for at_y in (top - 8, bottom + 18):
            ground.append(Text((x.at(tick), at_y), _tick(tick) + unit, anchor="middle"))
    if line:
        at_x = x.at(line[0])
        ground.append(Line([(at_x, top), (at_x, bottom)], line[1], 1.6))
        side: tuple[float, Anchor] = (6, "start")
        if at_x + 6 + text_width(line[2], 12.5) > right:
            side = (-6, "end")
        ground.append(Text((at_x + side[0], top + 12), line[2], "ink", 12.5, side[1]))
    text = Text((right, bottom + 42), axis, size=12.5, anchor="end")
    said = f"{len(rows)} cases; every number is in the tables of the page."
    return Drawing(WIDTH, int(bottom + 56), title, said, [*ground, *items, text])


def _ours_last(row: Row) -> list[str]:
    """Return the variants in the order in which to draw them, so that ours is on top."""
    return sorted(row.times_ms, key=lambda v: (kind(v) == OURS, v == row.ours))


def _cut(text: str, width: float, size: float) -> str:
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "...", size) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def whisker(times: Times, longest: float, role: str, floor_ms: float | None) -> Drawing:
    """Draw a time as a bar with its range, and the floor as a dashed line."""
    width, height = 220, 20

    def at(value: float) -> float:
        return 1 + (width - 4) * min(value / longest, 1)

    y = height / 2
    items: Items = [
        Area([(1, 4), (at(times.p50), 4), (at(times.p50), 16), (1, 16)], role, 0.28),
        Line([(at(times.p20), y), (at(times.p80), y)], role, 1.5),
        Line([(at(times.p50), 4), (at(times.p50), 16)], role, 2.5),
    ]
    if floor_ms:
        items.append(Line([(at(floor_ms), 1), (at(floor_ms), height - 1)], "ink", 1.2, 2.5))
    text = f"p20 {times.p20:g}, p50 {times.p50:g}, p80 {times.p80:g}"
    return Drawing(width, height, f"{number(times.p50)} ms", text, items)


def timeline(points: Sequence[Measured], shown: dict[str, Look]) -> Drawing:
    """Draw the time of every variant of one case over the commits that were measured."""
    width, height, left, right, top, bottom = 500, 236, 58, 484, 16, 186
    times = [t for point in points for ts in point.row.times_ms.values() for t in ts]
    y = _Log(min(times) / 1.15, max(times) * 1.15, bottom, top)
    step = (right - left - 40) / max(len(points) - 1, 1)
    xs = [left + 20 + i * step for i in range(len(points))]
    items: Items = []
    ticks = (
        y.ticks((1, 2, 5))
        if y.high / y.low > 2.2
        else [_round(y.low * 1.16), _round(y.high / 1.16)]
    )
    for tick in ticks:
        items.append(Line([(left, y.at(tick)), (right, y.at(tick))], "faint"))
        items.append(Text((left - 8, y.at(tick) + 4), f"{tick:g}", anchor="end"))
    every = math.ceil(len(points) / 6)
    for i, (x, point) in enumerate(zip(xs, points, strict=True)):
        if i % every == 0:
            items.append(Text((x, bottom + 20), point.row.commit[:7], size=11.5, anchor="middle"))
        if i in (0, len(points) - 1) and point.day:
            items.append(Text((x, bottom + 36), point.day, size=11.5, anchor="middle"))
    items.append(Text((16, (top + bottom) / 2), "ms", size=12.5, anchor="middle", turn_degrees=90))
    variants = dict.fromkeys(v for point in points for v in point.row.times_ms)
    for variant in sorted(variants, key=lambda v: kind(v) == OURS):
        look = shown[kind(variant)]
        seen = [
            (x, p.row.times_ms[variant])
            for x, p in zip(xs, points, strict=True)
            if variant in p.row.times_ms
        ]
        if len(seen) > 1:
            upper = [(x, y.at(t.p80)) for x, t in seen]
            lower = [(x, y.at(t.p20)) for x, t in reversed(seen)]
            items.append(Area([*upper, *lower], look.role, 0.14))
            items.append(Line([(x, y.at(t.p50)) for x, t in seen], look.role, 2.0))
        for x, t in seen:
            items.append(
                Mark((x, y.at(t.p50)), look.shape, look.role, 8.5, f"{variant}\n{number(t.p50)} ms")
            )
    for x, (old, new) in zip(xs[1:], pairwise(points), strict=True):
        if old.row.versions_text != new.row.versions_text:
            items.insert(0, Line([(x - step / 2, top), (x - step / 2, bottom)], "soft", 1, 2))
    items.append(Line([(left, top), (left, bottom), (right, bottom)], "soft", 1.2))
    row = points[-1].row
    text = "A dotted line: torch, triton, CUDA or the driver changed. Numbers in the table below."
    return Drawing(width, height, f"{row.subject}, {row.case} over commits", text, items)


def _round(value: float) -> float:
    return float(f"{value:.2g}")


def slug(row: Row) -> str:
    """Return the anchor of a case."""
    text = "-".join(row.key).lower()
    return "".join(c if c.isalnum() else "-" for c in text)


def share_text(share: Any) -> str:
    """Return a share as percent, a dash where it is unknown."""
    return f"{100 * share:.0f} %" if share else "-"

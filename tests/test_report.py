import base64
import dataclasses
import math
import os
import platform
import re
import socket
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tapct_fast.demo_report import Report, Score, render_report, write_report
from tapct_fast.io.findings import CODES
from tapct_fast.reasons import MEANINGS
from tapct_fast.report import (
    MAX_POINTS,
    Curve,
    Figure,
    Interval,
    Panel,
    Table,
    environment_facts,
    intervals_html,
    png,
    table_html,
)

VOID = {"meta", "img", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Tags with their attributes, text, and the tags left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and kind in (None, a.get("class"))]


def decode_png(data: bytes) -> np.ndarray:
    """Independent of the writer: walks the chunks as the PNG specification lays them out."""
    assert data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    at, chunks = 8, {}
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        (check,) = struct.unpack_from(">I", data, at + 8 + size)
        assert check == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, color, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, color) == (8, 2)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


@pytest.fixture
def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (5, 7, 3), np.uint8)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def report(picture: np.ndarray) -> Report:
    return Report(
        title="tapct_fast demo",
        lead="A tiny backbone.",
        tiles=[("Time", "12 s", "two cores")],
        figures_text="Slices.",
        figures=[Figure("scan 1", [[Panel("axial", picture, (100.0, 140.0))]])],
        legend=[("liver", (1, 2, 255))],
        curves_text="Losses.",
        curves=[Curve("DINO", [0, 1, 2, 3], [6.3, 6.1, 6.0, 5.5], 6.2383, "uniform: ln 512")],
        scores_text="Dice.",
        scores=[
            Score(
                "liver",
                "spleen",
                (1, 2, 255),
                trained=Interval(0.8, 0.7, 0.9),
                untrained=Interval(0.25, 0.2, 0.3),
            )
        ],
        stages=[("train", 9.0), ("probe", 3.0)],
        facts=[("torch", "2.11")],
        limits=["Not a medical device."],
    )


def test_png_decodes_to_the_same_pixels(picture: np.ndarray) -> None:
    assert np.array_equal(decode_png(png(picture)), picture)


def test_the_page_is_well_formed_and_shows_everything(report: Report, picture: np.ndarray) -> None:
    page = Page(render_report(report))
    assert not page.open
    for text in ("scan 1", "axial", "0.80", "0.70 to 0.90", "0.25", "9.0 s", "2.11", "medical"):
        assert text in page.text
    (image,) = page.all("img")
    prefix, data = (image["src"] or "").split(",", 1)
    assert prefix == "data:image/png;base64"
    assert np.array_equal(decode_png(base64.b64decode(data)), picture)
    assert "aspect-ratio:140/100" in (image["style"] or "")


def test_the_page_refers_to_nothing_outside(report: Report) -> None:
    text = render_report(report)
    page = Page(text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|@import|url\(|file:", text)
    assert all((a.get("src") or "data:").startswith("data:") for _, a in page.tags)


def test_text_cannot_become_markup(report: Report) -> None:
    evil = '<script>alert("x")</script>&'
    figure = Figure(evil, [[report.figures[0].rows[0][0]._replace(caption=evil)]])
    text = render_report(
        dataclasses.replace(
            report,
            title=evil,
            lead=evil,
            tiles=[(evil, evil, evil)],
            figures=[figure],
            legend=[(evil, (0, 0, 0))],
            curves=[report.curves[0]._replace(title=evil, uniform_text=evil, remark=evil)],
            scores=[report.scores[0]._replace(name=evil, beside=evil)],
            stages=[(evil, 1.0)],
            facts=[(evil, evil)],
            limits=[evil],
            figures_text=evil,
            curves_text=evil,
            scores_text=evil,
        )
    )
    assert "<script" not in text
    page = Page(text)
    assert not page.open
    assert page.text.count(evil) == 21


def test_a_curve_puts_values_and_the_uniform_constant_on_one_scale(report: Report) -> None:
    page = Page(render_report(report))
    (raw,) = page.all("polyline", "raw")
    points = np.array([p.split(",") for p in (raw["points"] or "").split()], float)
    (uniform,) = page.all("line", "uniform")
    x, y = points.T
    assert np.allclose(np.diff(x), x[1] - x[0], atol=0.11)  # coordinates have one decimal
    # Linear in value, falling down the page: the third point fixes no freedom that two leave.
    slope = (y[3] - y[0]) / (5.5 - 6.3)
    assert slope < 0
    assert y[1] == pytest.approx(y[0] + slope * (6.1 - 6.3), abs=0.11)
    assert float(uniform["y1"] or 0) == pytest.approx(y[0] + slope * (6.2383 - 6.3), abs=0.11)


def test_a_long_curve_is_thinned_and_keeps_its_extremes(report: Report) -> None:
    value_N = np.random.default_rng(0).normal(size=20_000)
    value_N[[777, 12_345]] = -9, 11
    curve = Curve("DINO", list(range(20_000)), value_N.tolist(), remark="of 20,000 steps")
    page = Page(render_report(dataclasses.replace(report, curves=[curve])))
    assert "of 20,000 steps" in page.text
    (raw,) = page.all("polyline", "raw")
    x, y = np.array([p.split(",") for p in (raw["points"] or "").split()], float).T
    assert len(x) <= MAX_POINTS
    assert (np.diff(x) >= 0).all()
    # The two outliers are the lowest and the highest point, at their steps.
    assert x[y.argmax()] == pytest.approx(x[0] + (x[-1] - x[0]) * 777 / 19_999, abs=1)
    assert x[y.argmin()] == pytest.approx(x[0] + (x[-1] - x[0]) * 12_345 / 19_999, abs=1)


def test_intervals_of_a_curve_stand_at_their_values_and_widen_the_scale(report: Report) -> None:
    interval_N2 = [(0.3, 0.7), (math.nan, math.nan), (0.5, 0.9)]
    curve = Curve("Dice", [0, 1, 2], [0.5, 0.6, 0.7], interval_N2=interval_N2)
    page = Page(render_report(dataclasses.replace(report, curves=[curve])))
    (raw,) = page.all("polyline", "raw")
    x, y = np.array([p.split(",") for p in (raw["points"] or "").split()], float).T
    slope = (y[2] - y[0]) / 0.2
    found = [
        [float(line[k] or 0) for k in ("x1", "y1", "y2")] for line in page.all("line", "interval")
    ]
    expected = [
        [x[i], y[0] + slope * (a - 0.5), y[0] + slope * (b - 0.5)]
        for i, a, b in ((0, 0.3, 0.7), (2, 0.5, 0.9))
    ]
    assert np.allclose(found, expected, atol=0.3)  # coordinates have one decimal
    assert 0 < min(min(row[1:]) for row in found) < max(max(row[1:]) for row in found) < 250


def test_values_that_are_no_numbers_are_left_out_of_a_curve(report: Report) -> None:
    curve = Curve("DINO", [0, 1, 2, 3], [1.0, float("nan"), 2.0, float("inf")])
    page = Page(render_report(dataclasses.replace(report, curves=[curve])))
    (raw,) = page.all("polyline", "raw")
    assert len((raw["points"] or "").split()) == 2
    empty = curve._replace(value_N=[float("nan")] * 4)
    assert "polyline" not in render_report(dataclasses.replace(report, curves=[empty]))


def test_whiskers_stand_where_the_interval_says(report: Report) -> None:
    page = Page(render_report(report))
    (dot,) = page.all("circle", "trained")
    (line,) = page.all("line", "trained")
    ends = [float(line["x1"] or 0), float(line["x2"] or 0)]
    assert (float(dot["cx"] or 0), *ends) == (160.0, 140.0, 180.0)


def test_a_part_without_content_is_left_out(report: Report) -> None:
    text = render_report(dataclasses.replace(report, scores=[], curves=[], figures=[], legend=[]))
    assert "Linear probe" not in text
    assert "Training" not in text
    assert "Features" not in text


def test_the_written_file_is_the_page(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    assert (tmp_path / "report.html").read_text() == render_report(report)


def test_a_table_shows_text_numbers_and_intervals() -> None:
    rows = [
        ("liver", Interval(0.8, 0.7, 0.9), 12345, 0.12345678),
        ("spleen", Interval(0.5, math.nan, math.nan), None, math.nan),
    ]
    page = Page(
        table_html(Table("Dice", ("label", "score", "voxels", "share"), rows, "of 6 scans"))
    )
    assert not page.open
    for text in ("Dice", "label", "0.80", "0.70 to 0.90", "12,345", "0.1235", "0.50", "of 6 scans"):
        assert text in page.text
    assert "nan" not in page.text
    far = table_html(Table("", ("hd95 mm",), [(Interval(17.25, 15.125, 19.0),)]))
    assert re.sub("<[^>]+>", "", far) == "hd95 mm17.2 15.1 to 19.0"
    # The two numbers that there are not.
    assert page.text.count("-") == 2
    # Numbers stand right-aligned below their names; text and intervals do not.
    assert [a.get("class") for a in page.all("th")] == [None, None, "number right", "number right"]
    assert len(page.all("td", "number right")) == 4


def test_a_table_escapes_its_text_and_is_left_out_without_rows() -> None:
    evil = '<script>alert("x")</script>&'
    text = table_html(Table(evil, (evil,), [(evil,)], evil))
    assert "<script" not in text
    assert Page(text).text.count(evil) == 4
    named = intervals_html(evil, [(evil, Interval(0.5, 0.4, 0.6))])
    assert "<script" not in named
    assert Page(named).text.count(evil) == 2
    assert table_html(Table("empty", ("a", "b"), [])) == ""
    assert intervals_html("empty", []) == ""


def test_intervals_stand_on_one_scale_and_do_not_leave_it() -> None:
    rows = [
        ("recall", Interval(3.0, 2.5, 3.5)),
        ("alone", Interval(2.0, math.nan, math.nan)),
        ("far", Interval(5.0, 1.0, 9.0)),
        ("none", Interval(math.nan, math.nan, math.nan)),
    ]
    page = Page(intervals_html("Scores", rows, low=2.0, high=4.0))
    assert not page.open
    dots = [float(dot["cx"] or 0) for dot in page.all("circle", "trained")]
    assert dots == [100.0, 0.0, 200.0]
    lines = [
        (float(line["x1"] or 0), float(line["x2"] or 0)) for line in page.all("line", "trained")
    ]
    assert lines == [(50.0, 150.0), (0.0, 200.0)]
    assert "2.50 to 3.50" in page.text
    assert "nan" not in page.text


def test_the_environment_says_what_ran_and_nothing_of_who_and_where() -> None:
    facts = dict(environment_facts())
    assert list(facts) == ["tapct-fast", "torch", "python", "device", "cores", "native build"]
    assert platform.python_version() in facts["python"]
    assert facts["cores"] == str(os.cpu_count())
    text = " ".join(facts.values())
    assert socket.gethostname() not in text
    assert Path.home().as_posix() not in text
    assert not re.search(r"(^|\s)/\w", text)


def test_every_code_of_a_refusal_has_its_words() -> None:
    assert set(MEANINGS) == set(CODES)

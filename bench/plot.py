"""Pictures of all rows, and one HTML file that holds tables, rooflines and history.

The page stands alone: no network, no framework. ``roofline-<device>`` and ``times-<device>`` are
written beside it as SVG and PNG.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.drawing import STYLE, Drawing, Mark, png_bytes, svg
from bench.figures import (
    Look,
    bandwidth,
    ceilings_text,
    kind,
    looks,
    numbered,
    overview,
    roofline,
    share_text,
    slug,
    timeline,
    whisker,
)
from bench.rows import FLOOR_SUBJECT, Ceilings, Point, Row, ceilings, flop_rate, number
from tapct_fast.io.atomic import write_atomic
from tapct_fast.report import Table, facts_list, render_page, table_html

Key = tuple[str, str, str]


def write_plots(out: Path, points: Mapping[Key, Sequence[Point]]) -> list[Path]:
    """Write the page and its pictures.

    Args:
        out: Folder, made if absent.
        points: Every row by case, oldest first; the last of a case is its current row.

    Returns:
        What was written, the page first.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.html"]
    write_atomic(written[0], page(points).encode())
    for device, rows in by_device(points).items():
        for name, drawing in pictures(device, rows).items():
            for suffix, data in (
                ("svg", svg(drawing, is_file=True).encode()),
                ("png", png_bytes(drawing)),
            ):
                written.append(out / f"{name}-{device}.{suffix}")
                write_atomic(written[-1], data)
    return written


def by_device(points: Mapping[Key, Sequence[Point]]) -> dict[str, list[Row]]:
    """Return the current row of every case, in the order of subjects, GPUs first."""
    found: dict[str, list[Row]] = {}
    for key in sorted(points, key=lambda key: (key[0].startswith(("amd", "intel")), *key[:2])):
        found.setdefault(key[0], []).append(points[key][-1].row)
    return found


def pictures(device: str, rows: Sequence[Row]) -> dict[str, Drawing]:
    """Return the pictures of one device by the name of their files."""
    roof = ceilings(rows).get(device, Ceilings())
    found = {
        "roofline": roofline(device, rows, roof),
        "bandwidth": bandwidth(device, rows, roof),
        "times": overview(device, rows),
    }
    return {name: drawing for name, drawing in found.items() if drawing}


def page(points: Mapping[Key, Sequence[Point]]) -> str:
    """Return the page as HTML."""
    devices = by_device(points)
    every = [row for rows in devices.values() for row in rows]
    newest = max((p for ps in points.values() for p in ps), key=lambda p: p.day)
    tiles = [
        ("devices", str(len(devices)), ", ".join(devices)),
        ("cases", str(len(every)), f"{len({row.subject for row in every})} subjects"),
        ("measurements", str(sum(map(len, points.values()))), "rows over all commits"),
        ("newest commit", newest.row.commit, newest.day or "date unknown"),
    ]
    sections = [
        (device, rows[-1].versions_text, _device(device, rows, points))
        for device, rows in devices.items()
    ]
    lead = (
        "Every variant of a case ran on the same inputs, in turn, in one process, after its result "
        "was compared with a float64 or reference value. Times are p50 in milliseconds, with the "
        "range from p20 to p80."
    )
    sections += [
        (
            "Environment",
            "What the current rows were measured with, and at which commits of this repository.",
            table_html(_environment(every)),
        ),
        ("How to read this", "", facts_list(_READING)),
    ]
    text = render_page("Benchmarks", lead, tiles, sections, style=STYLE + _STYLE)
    return text.replace("<section>", _FILTER + "<section>", 1).replace("</main>", _SCRIPT, 1)


def _environment(rows: Sequence[Row]) -> Table:
    """Return machines and versions behind rows, with commits and the cases of each."""
    found: dict[tuple[str, ...], dict[str, int]] = {}
    for row in rows:
        threads = row.values.get("torch_threads")
        place = (
            row.device,
            *(str(row.values.get(name) or "-") for name in ("python", "numpy")),
            row.versions_text,
            "-" if threads is None else str(threads),
        )
        commits = found.setdefault(place, {})
        commits[row.commit] = commits.get(row.commit, 0) + 1
    columns = ("device", "python", "numpy", "torch and driver", "threads", "cases", "commits")
    return Table(
        "",
        columns,
        [
            (
                *place,
                sum(commits.values()),
                ", ".join(f"{commit} ({num})" for commit, num in commits.items()),
            )
            for place, commits in found.items()
        ],
    )


def _device(device: str, rows: Sequence[Row], points: Mapping[Key, Sequence[Point]]) -> str:
    drawn = {
        name: f'<figure class="wide">{svg(drawing)}</figure>'
        for name, drawing in pictures(device, rows).items()
    }
    if "roofline" in drawn:
        drawn["roofline"] += _intensities(rows, ceilings(rows).get(device, Ceilings()))
    measured = [row for row in rows if row.subject == FLOOR_SUBJECT]
    parts = [*drawn.values(), *([_ceilings(measured)] if measured else [])]
    last = None
    for row in rows:
        if row.subject == FLOOR_SUBJECT:
            continue
        if row.subject != last:
            last = row.subject
            parts.append(f"<h3>{html.escape(row.subject)}</h3>")
        parts.append(_case(row, points[row.key]))
    return "".join(parts)


def _ceilings(rows: Sequence[Row]) -> str:
    """Return what the device allows at most, one line per measurement."""
    body = "".join(
        f'<tr id="{slug(row)}"><th scope="row">{html.escape(row.case)}</th>'
        f"<td>{html.escape(variant)}</td><td>{number(times.p50)}</td>"
        f"<td>{number(times.p20)} to {number(times.p80)}</td>"
        f"<td>{_rate(row.gb_per_s(variant))}</td><td>{flop_rate(row.tflop_per_s(variant))}</td></tr>"
        for row in rows
        for variant, times in row.times_ms.items()
    )
    return (
        '<details class="ceilings"><summary>Ceilings: what this device allows</summary>'
        '<div class="scroll"><table><thead><tr><th>what</th><th>by</th><th>p50, ms</th>'
        "<th>p20 to p80</th><th>GB/s</th><th>FLOP/s</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _intensities(rows: Sequence[Row], roof: Ceilings) -> str:
    body = "".join(
        f'<tr><td class="number">{index}</td><td><a href="#{slug(row)}">'
        f"{html.escape(row.subject)}, {html.escape(row.case)}</a></td>"
        f"<td>{number((row.flops or 0) / (row.bytes or 1))}</td>"
        f"<td>{flop_rate(row.tflop_per_s(row.ours))}</td>"
        f"<td>{share_text(row.share(row.ours))}</td></tr>"
        for index, row in numbered(rows)
    )
    return (
        f"<p>{html.escape(ceilings_text(roof))}</p>"
        '<details class="numbers"><summary>The roofline as a table</summary><table><thead><tr>'
        "<th>no.</th><th>case</th><th>FLOP/byte</th><th>FLOP/s of ours</th>"
        f"<th>of the attainable</th></tr></thead><tbody>{body}</tbody></table></details>"
    )


def _case(row: Row, points: Sequence[Point]) -> str:
    shown = looks([point.row for point in points])
    longest = max(times.p80 for times in row.times_ms.values())
    floor_ms = row.floor_ms
    body = "".join(
        f'<tr{_ours(row, variant)}><th scope="row">{_swatch(shown[kind(variant)])}'
        f"{html.escape(variant)}</th>"
        f"<td>{number(times.p50)}</td><td>{number(times.p20)} to {number(times.p80)}</td>"
        f"<td>{row.ratio(variant):.2f}x</td>"
        f"<td>{_rate(row.gb_per_s(variant))}</td><td>{flop_rate(row.tflop_per_s(variant))}</td>"
        f"<td>{share_text(row.share(variant))}</td>"
        f'<td class="bar">{svg(whisker(times, longest, shown[kind(variant)].role, floor_ms))}</td>'
        "</tr>"
        for variant, times in row.times_ms.items()
    )
    needs = [
        f"{number(amount / scale)} {unit}"
        for amount, scale, unit in ((row.bytes, 1e6, "MB"), (row.flops, 1e9, "GFLOP"))
        if amount
    ]
    if floor_ms:
        needs.append(f"floor {number(floor_ms)} ms")
    table = (
        '<div class="scroll"><table><thead><tr><th>variant</th><th>p50, ms</th>'
        "<th>p20 to p80</th><th>to ours</th>"
        '<th>GB/s</th><th>FLOP/s</th><th>of floor</th><th class="bar">time</th>'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )
    return (
        f'<article class="case" id="{slug(row)}"><h4>{html.escape(row.case)}</h4>'
        f'<p class="needs">{html.escape(", ".join(needs))}</p>{table}'
        f"{_history(points, shown)}</article>"
    )


def _history(points: Sequence[Point], shown: Mapping[str, Look]) -> str:
    row = points[-1].row
    command = row.values.get("command", "")
    origin = f"{command}, commit {row.commit}, {points[-1].day or 'date unknown'}"
    said = f'<p class="origin">{html.escape(origin)}</p>'
    if len(points) == 1:
        return said
    variants = list(dict.fromkeys(v for point in points for v in point.row.times_ms))
    head = "".join(f"<th>{html.escape(variant)}</th>" for variant in variants)
    body = "".join(
        f"<tr><td>{html.escape(p.row.commit)}</td><td>{p.day}</td>"
        + "".join(
            f"<td>{number(p.row.times_ms[v].p50) if v in p.row.times_ms else '-'}</td>"
            for v in variants
        )
        + f"<td>{html.escape(p.row.versions_text)}</td></tr>"
        for p in reversed(points)
    )
    return (
        f'{said}<details class="history"><summary>History: {len(points)} commits</summary>'
        f'<div class="beside"><figure>{svg(timeline(points, dict(shown)))}</figure>'
        f'<div class="scroll"><table><thead><tr><th>commit</th><th>day</th>{head}<th>versions</th>'
        f"</tr></thead><tbody>{body}</tbody></table></div></div></details>"
    )


def _ours(row: Row, variant: str) -> str:
    return ' class="ours"' if variant == row.ours else ""


def _rate(rate: float | None) -> str:
    return number(rate) if rate else "-"


def _swatch(look: Look) -> str:
    mark = Mark((7, 7), look.shape, look.role, 10, "")
    drawing = Drawing(14, 14, look.name, "", [mark])
    return svg(drawing).replace('class="drawing"', 'class="drawing swatch" aria-hidden="true"')


_READING = (
    ("to ours", "time of the variant over the time of this library; above 1 it is slower"),
    ("GB/s, FLOP/s", "bytes and FLOPs that the case needs, over the time: not what was moved"),
    ("of floor", "time that bytes and FLOPs need at the measured ceilings, over the time"),
    ("dashed line", "the floor, in a bar"),
    ("dotted line", "torch, triton, CUDA or the driver changed, in a history"),
)
_FILTER = (
    '<label class="filter"><span>Show cases with</span>'
    '<input type="search" placeholder="sinkhorn bf16" autocomplete="off"></label>'
)
# Without script the page shows everything.
_SCRIPT = """</main><script>
const field = document.querySelector(".filter input");
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const section of document.querySelectorAll("section")) {
    let heading = null, shown = 0;
    const close = () => { if (heading) heading.hidden = !shown; shown = 0; };
    for (const node of section.children) {
      if (node.tagName === "H3") { close(); heading = node; }
      if (!node.classList.contains("case")) continue;
      const text = (heading.textContent + " " + node.textContent).toLowerCase();
      node.hidden = !words.every(word => text.includes(word));
      shown += !node.hidden;
    }
    close();
  }
});
const open = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  const history = target && target.querySelector("details");
  if (history) history.open = true;
};
addEventListener("hashchange", open);
open();
</script>"""
_STYLE = """
:root{--blue:var(--ours);--red:var(--compile)}
body{background:var(--paper)}.tile,.case{background:var(--panel)}
.tile b{overflow-wrap:anywhere}
a{color:var(--ours);text-decoration:none}a:hover{text-decoration:underline}
section>h2{font-size:26px}
h3{font-size:19px;margin:40px 0 4px;letter-spacing:-.01em}
h4{font-size:15px;font-weight:600;margin:0}
figure.wide{margin:22px 0 14px;overflow-x:auto}figure.wide svg{min-width:760px}
svg text{fill:var(--soft)}svg a:hover text{text-decoration:underline}
.mark:hover{stroke:var(--ink);stroke-width:1.6}
.case{border:1px solid var(--faint);border-radius:8px;padding:16px 18px 12px;margin-top:12px;
scroll-margin-top:16px}
.case:target{border-color:var(--ours)}
.needs,.origin{font-size:13px;margin:0 0 8px;max-width:none;font-variant-numeric:tabular-nums}
.origin{margin:8px 0 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;white-space:nowrap}
thead th{border-bottom-color:var(--soft)}
tbody tr:last-child>*{border-bottom:0}
td{text-align:right}thead th{text-align:right}thead th:first-child,thead th.bar{text-align:left}
td:nth-child(2){color:var(--ink)}
.case tbody th{color:var(--ink);font-size:14px}
.case>.scroll td:nth-child(3){color:var(--soft)}
tr.ours th,tr.ours td:nth-child(2){font-weight:600}
.bar{width:228px;padding-right:0}td.bar svg{width:220px;height:20px}
svg.swatch{display:inline-block;width:14px;height:14px;margin-right:8px;vertical-align:-2px}
summary{cursor:pointer;font-size:13px;color:var(--soft);padding:6px 0}
summary:hover{color:var(--ink)}
.numbers td:nth-child(2),.numbers th:nth-child(2){text-align:left}
.ceilings td:nth-child(2),.ceilings th:nth-child(2){text-align:left}.numbers td{color:var(--ink)}
.ceilings tbody th{color:var(--ink)}
.numbers table{margin:4px 0 18px}
.beside{display:grid;grid-template-columns:minmax(0,500px) minmax(0,1fr);gap:20px;align-items:start}
.beside table{font-size:12.5px}.beside :is(td,th):nth-child(-n+2),.beside :is(td,th):last-child
{text-align:left}
.filter{display:flex;gap:12px;align-items:center;margin-top:36px;font-size:14px;color:var(--soft)}
.filter input{flex:1;max-width:360px;font:inherit;color:var(--ink);background:var(--panel);
border:1px solid var(--faint);border-radius:8px;padding:7px 12px}
.filter input:focus{outline:2px solid var(--ours);outline-offset:1px}
.plain :is(td,th){text-align:left;white-space:normal}
[hidden]{display:none!important}
@media (max-width:820px){.beside{grid-template-columns:1fr}}
@media print{.filter{display:none}.case{break-inside:avoid}}
"""

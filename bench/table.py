"""The table of measured ops in kernels/README.md, from the rows in ``bench/results``.

One line per op, case and device: ours, the eager definition, the fastest rival. Rows whose sources
have changed since are left out: they measured other code.
"""

from collections.abc import Iterator

from bench.catalogue import digest, subjects
from bench.rows import REPOSITORY, RESULTS, Row, latest, number, parse

README = REPOSITORY / "kernels" / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->"
HEAD = """| op | case | device | ours, ms | eager | fastest rival | of the floor | memory |
|---|---|---|---|---|---|---|---|
"""


def current() -> list[Row]:
    """Return the last row of every case of every op and device, GPUs first, if it is current."""
    rows = [
        row
        for path in (REPOSITORY / RESULTS).glob("*.jsonl")
        for row in latest(parse(path.read_text())).values()
    ]
    rows.sort(key=lambda row: ("cuda" not in row.values, row.device))  # cases keep their order
    ops = [s for s in subjects() if (README.parent / "tapct_kernels" / f"{s.name}.py").exists()]
    return [
        row
        for op in ops
        for row in rows
        if row.subject == op.name and row.values["sources"] == digest(op)
    ]


def table(rows: list[Row]) -> str:
    """Return rows as a table, and say where none is of a GPU."""
    body = "".join(f"| {' | '.join(_cells(row))} |\n" for row in rows)
    is_bare = all("cuda" not in row.values for row in rows)
    return (HEAD + body if rows else "") + ("\nNo row of a GPU yet.\n" if is_bare else "")


def _cells(row: Row) -> Iterator[str]:
    rivals = [v for v in row.times_ms if not v.startswith("tapct")]
    eager = next((v for v in rivals if v.startswith("eager")), "")
    fastest = min(rivals, key=row.ratio, default="")
    memory = row.values.get("extra_bytes", {})
    share = row.share(row.ours)
    yield f"`{row.subject}`"
    yield row.case.replace("|", "\\|")
    yield row.device
    yield number(row.times_ms[row.ours].p50)
    yield _beside(row, eager)
    yield f"{fastest}: {_beside(row, fastest)}" if fastest != eager else "-"
    yield f"{100 * share:.0f} %" if share else "-"
    yield f"{100 * memory[row.ours] / memory[eager]:.2g} %" if memory.get(eager) else "-"


def _beside(row: Row, rival: str) -> str:
    return f"{number(row.times_ms[rival].p50)} ({row.ratio(rival):.2f}x)" if rival else "-"


def parts() -> tuple[str, str, str]:
    """Return the page before the table, the table, and the page after it."""
    before, rest = README.read_text().split(BEGIN)
    inside, after = rest.split(END)
    return before + BEGIN, inside, END + after


def write_table() -> int:
    """Write the table between its two marks and return how many lines it has."""
    rows = current()
    before, _, after = parts()
    README.write_text(before + table(rows) + after)
    return len(rows)

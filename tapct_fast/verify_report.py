"""The page of ``tapct-fast verify``: how many scans are usable, and what is wrong with the rest."""

import html
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tapct_fast import __version__
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.verify import Row, Verification
from tapct_fast.reasons import reasons_html
from tapct_fast.report import facts_list, render_page

MAX_LISTED = 2000  # findings; a page of more is slow to open, and report.json has them all


def write_verify_report(path: Path, verification: Verification) -> None:
    """Write the page; the file appears whole or not at all."""
    write_atomic(path, render_verify_report(verification).encode())


def render_verify_report(verification: Verification) -> str:
    """Return the page as HTML."""
    rows = verification.rows
    num, num_refused = len(rows), verification.num_refused
    refused = [row for row in rows if not row.is_accepted]
    remarked = [row for row in rows if row.is_accepted and row.report["findings"]]
    seconds = sum(row.seconds for row in rows)
    tiles = [
        ("scans", f"{num:,}", f"{verification.num_resumed:,} sources from an earlier run"),
        ("accepted", f"{num - num_refused:,}", f"with policy {verification.policy}"),
        ("refused", f"{num_refused:,}", f"{num_refused / num:.1%} of all" if num else ""),
        ("reading", f"{seconds:,.1f} s", "summed over scans"),
    ]
    return render_page(
        "Archive check",
        "Every scan was read to its end: checksums, sizes, geometry and values.",
        tiles,
        [
            (
                "Reasons",
                "Refused scans by the first reason.",
                reasons_html(Counter(row.code for row in refused)),
            ),
            (
                "Refused scans",
                "A scan is named by its case id; tapct-fast locate finds its source again.",
                _findings(refused),
            ),
            ("Accepted with remarks", "", _findings(remarked)),
            (
                "Run",
                "",
                facts_list([("tapct-fast", __version__), ("policy", verification.policy)]),
            ),
        ],
    )


def _findings(rows: Iterable[Row]) -> str:
    lines = [
        "<tr>"
        + "".join(
            f"<td>{html.escape(text)}</td>"
            for text in (row.case, f["severity"], f["code"], f"{f['field']}: {f['reason']}")
        )
        + "</tr>"
        for row in rows
        for f in row.report["findings"]
    ]
    if not lines:
        return ""
    rest = len(lines) - MAX_LISTED
    more = f"<p>{rest:,} more are in report.json.</p>" if rest > 0 else ""
    return (
        '<table class="findings"><thead><tr><th>case</th><th>severity</th><th>code</th>'
        f"<th>finding</th></tr></thead><tbody>{''.join(lines[:MAX_LISTED])}</tbody></table>{more}"
    )

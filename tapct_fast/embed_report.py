"""``report.html`` of an output folder of embed: counts, speed, reasons, what the scans are, hashes.

It reads ``progress.json``, ``manifest.parquet`` and ``quarantine.jsonl`` there, so that it can be
written at any time, on any machine. No scan is named, not even by its id.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.downstream.embed import SETTINGS_FILE
from tapct_fast.downstream.manifest import MANIFEST_FILE, require_pyarrow
from tapct_fast.downstream.progress import PROGRESS_FILE
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.atomic import read_json, sha256_file, write_atomic
from tapct_fast.io.quarantine import QUARANTINE_FILE
from tapct_fast.reasons import reasons_html
from tapct_fast.report import Table, bars_html, facts_list, render_page, table_html

PAGE = "report.html"
NUM_BINS = 8


class Geometry(NamedTuple):
    """Numbers of the embedded scans, one per scan; of tokens, which are the patches of a scan."""

    spacing_z_mm: NDArray[np.float64]
    spacing_x_mm: NDArray[np.float64]
    tokens_z: NDArray[np.float64]
    windows: NDArray[np.float64]
    bytes: NDArray[np.float64]


def is_embedded(out: Path) -> bool:
    """Say whether ``out`` is an output folder of embed."""
    return (out / PROGRESS_FILE).is_file()


def write_embed_report(out: Path) -> Path:
    """Write the page of an output folder of embed into it.

    Raises:
        InputError: It is no such folder, or cannot be written.
        FormatError: A file in it is damaged.
    """
    try:
        write_atomic(out / PAGE, render_embed_report(out).encode())
    except OSError as error:
        raise InputError(f"the output folder cannot be written: {error.strerror}") from None
    return out / PAGE


def render_embed_report(out: Path) -> str:
    """Return the page as HTML.

    Raises:
        InputError: ``out`` is no output folder of embed.
        FormatError: A file in it is damaged.
    """
    if not is_embedded(out):
        raise InputError("DIR holds no features (no progress.json); name an output folder of embed")
    sums = read_json(out / PROGRESS_FILE, "embed progress")
    if not isinstance(sums, dict):
        raise FormatError("embed progress", "progress.json is damaged; embed again")
    geometry = _geometry(out / MANIFEST_FILE)
    sections = [
        (
            "Refused scans",
            "By reason. quarantine.jsonl names each by its keyed id, with field and reason; "
            "tapct-fast locate finds its source again.",
            reasons_html(sums.get("quarantined_by_code", {})),
        ),
        (
            "Embedded scans",
            "As manifest.parquet lists them. A token is a patch of the scan after resizing.",
            "" if geometry is None else _distributions(geometry),
        ),
        ("Speed", "", facts_list(_speed(sums)) + _shares(sums)),
        (
            "Hashes",
            "The same backbone, settings and scans give the same bytes; manifest.parquet holds the "
            "hash of every feature file and of its source.",
            _hashes(out, sums),
        ),
        ("Settings and environment", "", facts_list(_environment(sums))),
        (
            "What this is not",
            "",
            '<ul class="limits"><li>Features are numbers of a network, not findings; whether they '
            "are of use for a task is what tapct-fast probe measures.</li><li>Ids are keyed "
            "hashes, but features can tell much of a scan: share them as you would share the "
            "scans.</li><li>Not a medical device; not for diagnosis.</li></ul>",
        ),
    ]
    return render_page("Features", _lead(sums), _tiles(sums, geometry), sections)


def _lead(sums: Mapping[str, Any]) -> str:
    states = {
        "finished": "Every scan was embedded or refused with a reason.",
        "running": "At work; this page is of an earlier moment.",
        "stopped": "Stopped before the end; the same command goes on.",
    }
    return states.get(str(sums.get("state")), "The state of this folder is not known.")


def _tiles(sums: Mapping[str, Any], geometry: Geometry | None) -> list[tuple[str, str, str]]:
    num, embedded, skipped, refused = (
        int(sums.get(name, 0)) for name in ("num_scans", "embedded", "skipped", "quarantined")
    )
    size = "" if geometry is None else f"{geometry.bytes.sum() / 2**20:,.1f} MiB of features"
    return [
        ("scans", f"{num:,}", "named by the last call"),
        ("embedded", f"{embedded + skipped:,}", f"{skipped:,} were there before"),
        ("refused", f"{refused:,}", f"{refused / num:.1%} of all" if num else ""),
        ("scans per second", f"{sums.get('scans_per_s', 0):.3g}", size),
    ]


def _geometry(manifest: Path) -> Geometry | None:
    """Read the columns of the embedded scans, a row group at a time; None without a manifest."""
    if not manifest.exists():
        return None
    try:
        return _columns(manifest)
    except (ValueError, KeyError):  # pyarrow's are both
        raise FormatError("embed manifest", "manifest.parquet is damaged; embed again") from None


def _columns(manifest: Path) -> Geometry | None:
    parquet = require_pyarrow()
    names = ["status", "spacing_mm", "grid_zyx", "num_windows", "bytes"]
    parts = []
    with parquet.ParquetFile(manifest) as file:
        for batch in file.iter_batches(columns=names):
            kept = batch.filter([status == "embedded" for status in batch["status"].to_pylist()])
            if not kept.num_rows:
                continue
            spacing_N3 = np.array(kept["spacing_mm"].to_pylist(), np.float64)
            grid_N3 = np.array(kept["grid_zyx"].to_pylist(), np.float64)
            windows, size = (
                np.array(kept[name].to_pylist(), np.float64) for name in ("num_windows", "bytes")
            )
            parts.append((spacing_N3[:, 0], spacing_N3[:, 2], grid_N3[:, 0], windows, size))
    if not parts:
        return None
    return Geometry(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _distributions(geometry: Geometry) -> str:
    length_mm = geometry.tokens_z * geometry.spacing_z_mm
    parts = [
        histogram_html("Token spacing along z, mm", geometry.spacing_z_mm),
        histogram_html("Token spacing in plane, mm", geometry.spacing_x_mm),
        histogram_html("Length along z, mm", length_mm),
        histogram_html("Windows per scan", geometry.windows),
    ]
    return f'<div class="histograms">{"".join(parts)}</div>'


def histogram_html(title: str, value_N: NDArray[np.float64]) -> str:
    """Return how often values fall into at most ``NUM_BINS`` parts with round ends, as bars.

    Few distinct values are counted one by one.
    """
    distinct, num = np.unique(value_N.round(3), return_counts=True)
    if distinct.size <= NUM_BINS:
        rows = [(f"{v:g}", f"{n:,}", float(n)) for v, n in zip(distinct, num, strict=True)]
        return f"<div>{bars_html(rows, title)}</div>"
    num, edges = np.histogram(value_N, bins=_round_edges(float(distinct[0]), float(distinct[-1])))
    rows = [
        (f"{low:g} to {high:g}", f"{n:,}", float(n))
        for low, high, n in zip(edges[:-1], edges[1:], num, strict=True)
    ]
    return f"<div>{bars_html(rows, title)}</div>"


def _round_edges(low: float, high: float) -> NDArray[np.float64]:
    """Return ends of equal parts that are multiples of 1, 2 or 5 times a power of ten."""
    scale = 10.0 ** np.floor(np.log10((high - low) / NUM_BINS))
    for step in scale * np.array([1, 2, 5, 10, 20]):
        first, last = np.floor(low / step), np.ceil(high / step)
        if last - first <= NUM_BINS:
            break
    edges: NDArray[np.float64] = (np.arange(first, last + 1) * step).round(6)
    return edges


def _speed(sums: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("time of the last call", f"{sums.get('seconds', 0):,.1f} s"),
        ("scans per second", f"{sums.get('scans_per_s', 0):.4g}, those there before left out"),
        (
            "workers",
            f"{sums.get('workers') or 'one per GPU or core'}, engine {sums.get('engine', 'local')}",
        ),
    ]


def _shares(sums: Mapping[str, Any]) -> str:
    shares = (
        ("encoder waits for scans", "waiting_share"),
        ("encoding", "encoding_share"),
        ("writing", "writing_share"),
    )
    return bars_html(
        [(name, f"{sums.get(key, 0):.0%}", float(sums.get(key, 0))) for name, key in shares],
        "Where the time of the workers went",
    )


def _hashes(out: Path, sums: Mapping[str, Any]) -> str:
    rows = [("backbone and its preprocessing", str(sums.get("backbone", "unknown")))]
    rows += [
        (name, sha256_file(out / name))
        for name in (MANIFEST_FILE, QUARANTINE_FILE, SETTINGS_FILE)
        if (out / name).exists()
    ]
    return table_html(Table("", ("what", "sha256"), rows))


def _environment(sums: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    settings = {name.replace("_", " "): value for name, value in sums.get("settings", {}).items()}
    facts = {**settings, "device": sums.get("device", "unknown"), **sums.get("versions", {})}
    return [(name, str(value)) for name, value in facts.items()]

"""kernels/README.md names every op, and its measured table is what the committed rows say."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import tapct_kernels

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY)
    return importlib.import_module("bench.table")


def test_every_public_op_has_a_line_in_the_first_table() -> None:
    text = (REPOSITORY / "kernels" / "README.md").read_text().partition("\n## ")[0]
    named = {
        name
        for line in text.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split(" | ")[0])
    }
    public = {
        name
        for name in tapct_kernels.__all__
        if not isinstance(getattr(tapct_kernels, name), type)  # SoftTargets
        and not name.startswith(("choose_", "try_"))
        and not name.endswith("_ref")
    }
    assert named == public


def test_the_measured_table_is_what_the_committed_rows_say(table: ModuleType) -> None:
    _, inside, _ = table.parts()
    assert inside == table.table(table.current()), "write it anew: tapct-fast bench table"


def test_a_line_holds_ours_eager_the_fastest_rival_and_the_shares(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {
        "tapct masked_gather": 2.0,
        "eager norm, select": 9.0,
        "eager select, norm": 5.0,
        "rival 1.0": 3.0,
    }
    op = next(s for s in table.subjects() if s.name == "masked_gather")
    row = {
        "subject": "masked_gather",
        "case": "1x2",
        "device": "gpu-a",
        "times_ms": {name: [p50, p50, p50] for name, p50 in times.items()},
        "floor_ms": 1.5,
        "extra_bytes": {"tapct masked_gather": 25, "eager norm, select": 100},
        "sources": table.digest(op),
        "cuda": "13.0",
    }
    other = row | {"case": "3x4", "times_ms": {"tapct masked_gather": [2, 2, 2]}}
    stale = row | {"case": "of other code", "sources": "0"}
    cpu = {key: row[key] for key in row if key not in ("cuda", "floor_ms")} | {"device": "a-cpu"}
    for of_device in ([row, stale, other], [cpu]):
        path = tmp_path / "bench" / "results" / f"{of_device[0]['device']}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in of_device))
    monkeypatch.setattr(table, "REPOSITORY", tmp_path)
    line = "| `masked_gather` | 1x2 | {} | 2.000 | 9.000 (4.50x) | rival 1.0: 3.000 (1.50x) |"
    assert table.table(table.current()).splitlines()[2:] == [
        line.format("gpu-a") + " 75 % | 25 % |",
        "| `masked_gather` | 3x4 | gpu-a | 2.000 | - | - | 75 % | - |",
        line.format("a-cpu") + " - | 25 % |",
    ]


def test_the_table_is_written_between_its_marks(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{table.BEGIN}old\n{table.END}\nafter\n")
    monkeypatch.setattr(table, "README", page)
    monkeypatch.setattr(table, "current", list)
    assert table.write_table() == 0
    said = f"before\n{table.BEGIN}\nNo row of a GPU yet.\n{table.END}\nafter\n"
    assert page.read_text() == said

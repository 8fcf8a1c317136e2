"""Every bench runs at a tiny size and writes a row that says how it was made."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHES = sorted(
    path.stem
    for path in (REPOSITORY / "bench").glob("*.py")
    if re.search(r"\b(start|op_bench)\(\s*__file__", path.read_text())
)
RIVALS = {
    "embed_archive": ("pyarrow", "ray"),
    "integrity": ("nibabel", "SimpleITK", "blosc2"),
    "knn": ("faiss",),
    "load_for_tapct": ("nibabel", "SimpleITK"),
    "read_box": ("nibabel", "SimpleITK", "blosc2"),
    "read_dicom": ("pydicom", "SimpleITK", "dcm2niix", "nibabel"),
    "read_nifti": ("nibabel", "SimpleITK"),
    "verify": ("isal",),
}
FIELDS = {
    *("subject", "case", "times_ms", "percentiles", "tiny", "bytes", "sources", "load_1min"),
    *("command", "device", "python", "torch", "triton", "numpy", "commit"),
}


@pytest.fixture(autouse=True)
def _repository_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)


def run(name: str, out: Path, *options: str) -> list[dict[str, Any]]:
    """Run one bench tiny, and return all rows in ``out``."""
    for rival in RIVALS.get(name, ()):
        pytest.importorskip(rival)
    bench = importlib.import_module(f"bench.{name}")
    bench.main(["--tiny", "--out", str(out), *options])
    return [
        json.loads(line)
        for path in sorted(out.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_writes_complete_rows_and_knows_them_again(name: str, tmp_path: Path) -> None:
    rows = run(name, tmp_path)
    for row in rows:
        assert not FIELDS - set(row)
        assert (row["subject"], row["tiny"]) == (name, True)
        assert row["command"] == f"python -m bench.{name} --tiny"
        assert row["bytes"] > 0
        assert "verified" in row or "relative_error" in row
        assert len(row["times_ms"]) >= 2  # ours and a rival
        for p20, p50, p80 in row["times_ms"].values():
            assert 0 < p20 <= p50 <= p80
    assert len({row["case"] for row in rows}) == len(rows) > 0
    assert run(name, tmp_path, "--missing") == rows


def test_a_row_is_stale_when_its_sources_changed(tmp_path: Path) -> None:
    rows = run("masked_gather", tmp_path)
    [path] = tmp_path.glob("*.jsonl")
    path.write_text("".join(json.dumps(row | {"sources": "0" * 64}) + "\n" for row in rows))
    assert len(run("masked_gather", tmp_path, "--missing")) == 2 * len(rows)


def test_a_tiny_row_never_lands_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("masked_gather", REPOSITORY / "bench" / "results")
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_result_is_not_timed(wrong: float) -> None:
    harness = importlib.import_module("bench.harness")
    exact = torch.ones(4, dtype=torch.float64)
    variants = {"right": lambda: [exact.float()], "bent": lambda: [exact + wrong]}
    with pytest.raises(ValueError, match="bent is off by"):
        harness.relative_errors(variants, [exact], tolerance=1e-5)


def test_variants_are_interleaved_and_warmed_up() -> None:
    harness = importlib.import_module("bench.harness")
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = harness.time_ms(variants, device="cpu", rounds=3)
    assert calls == ["a", "b"] * 5
    assert set(times) == {"a", "b"}

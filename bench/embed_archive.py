"""Embedding an archive: one process beside Ray workers, and a run that finds everything done.

Scans are noise of one size and the backbone is random; every process computes on one thread. Times
are of whole calls. ``scans_per_s`` leaves the start out, which for Ray is that of its actors: it
counts from the writing of the first scan to that of the last. A run that finds everything done
looks at every source and record and writes the manifest anew; beside it the search of the folder
alone. Its sources, features and records are links to those of one scan.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.harness import Run, resident_bytes, start, version
from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import VitConfig
from tapct_fast.downstream.embed import EmbedReport, embed_scans
from tapct_fast.downstream.ray_engine import RayCluster
from tapct_fast.io.case_id import case_id
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.read import iter_scans
from tapct_fast.model.vit import Vit

SOURCES = [
    f"tapct_fast/downstream/{name}.py"
    for name in ("archive", "embed", "manifest", "ray_engine", "read_ahead", "records")
]
_KEY = bytes(32)
_MOST_LINKS = 10_000  # to one file; file systems allow 65,000


def main(argv: Sequence[str] | None = None) -> None:
    """Measure engines, then a run with nothing to do."""
    run = start(__file__, SOURCES, argv)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _engines(run, 4 if run.is_tiny else 96)
        _nothing_to_do(run, 50 if run.is_tiny else 100_000)
    finally:
        torch.set_num_threads(num_threads)


def _engines(run: Run, num_scans: int) -> None:
    shape_zyx = (12, 64, 64) if run.is_tiny else (48, 64, 64)
    case = f"{num_scans} scans " + "x".join(map(str, shape_zyx))
    if not run.wants(case, "cpu"):
        return
    backbone = _backbone(64, 1) if run.is_tiny else _backbone(384, 6)
    with tempfile.TemporaryDirectory() as name:
        scans = Path(name, "scans")
        scans.mkdir()
        for number in range(num_scans):
            rng = np.random.default_rng(number)
            hu_ZYX = rng.integers(-1000, 800, shape_zyx).astype(np.int16)
            write_nifti(scans / f"{number}.nii.gz", hu_ZYX, np.diag([-0.8, -0.8, 3.0, 1.0]))
        engines: dict[str, RayCluster | None] = {"tapct_fast, one process": None}
        for workers in (2,) if run.is_tiny else (1, 2):
            # A cluster has a core for every worker; one alone must not get threads of two.
            engines[f"tapct_fast, Ray {workers}"] = RayCluster(workers=workers, threads=1)
        seconds: dict[str, list[float]] = {engine: [] for engine in engines}
        rates: dict[str, list[float]] = {engine: [] for engine in engines}
        expected: dict[str, bytes] = {}
        for _ in range(1 if run.is_tiny else 3):
            for engine, cluster in engines.items():
                out = _new_out(Path(name, "out"))
                began = time.perf_counter()
                report = embed_scans(backbone, [scans], out, ray=cluster)
                seconds[engine].append(time.perf_counter() - began)
                files = _files(out)
                if report.embedded != num_scans or files != (expected or files):
                    raise ValueError(f"{engine} wrote other bytes; not written")
                expected = files
                times = sorted(p.stat().st_mtime_ns for p in (out / "cases").glob("*.json"))
                rates[engine].append((num_scans - 1) * 1e9 / max(1, times[-1] - times[0]))
        run.write(
            case,
            "cpu",
            {engine: _percentiles(times) for engine, times in seconds.items()},
            bytes=num_scans * 2 * int(np.prod(shape_zyx)),
            scans_per_s={
                engine: round(float(np.median(found)), 3) for engine, found in rates.items()
            },
            verified="the same bytes",
            ray=version("ray"),
        )


def _nothing_to_do(run: Run, num_scans: int) -> None:
    case = f"{num_scans} scans that are there"
    if not run.wants(case, "cpu"):
        return
    with tempfile.TemporaryDirectory() as name:
        scans, out = Path(name, "scans"), _new_out(Path(name, "out"))
        scans.mkdir()
        first = scans / "0.nii"
        hu_ZYX = np.random.default_rng(0).integers(-1000, 800, (4, 16, 16)).astype(np.int16)
        write_nifti(first, hu_ZYX, np.eye(4))
        backbone = _backbone(64, 1)
        embed_scans(backbone, [first], out)
        (features,) = (out / "cases").glob("*.safetensors")
        there = [first, features, features.with_suffix(".json")]
        for number in range(1, num_scans):
            scan = scans / f"{number}.nii"
            record = out / "cases" / f"{case_id(scan, _KEY)}.json"
            made = [scan, record.with_suffix(".safetensors"), record]
            is_copied = number % _MOST_LINKS == 0
            for old, new in zip(there, made, strict=True):
                (shutil.copy2 if is_copied else os.link)(old, new)
            there = made if is_copied else there
        before = resident_bytes()
        reports: list[EmbedReport] = []
        calls: dict[str, Callable[[], object]] = {
            "tapct_fast": lambda: reports.append(embed_scans(backbone, [scans], out)),
            "search of the folder": lambda: sum(1 for _ in iter_scans([scans])),
        }
        seconds: dict[str, list[float]] = {call: [] for call in calls}
        for _ in range(1 if run.is_tiny else 3):
            for label, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[label].append(time.perf_counter() - began)
        if any(report.skipped != num_scans for report in reports):
            raise ValueError("not every scan was found done; not written")
        run.write(
            case,
            "cpu",
            {label: _percentiles(times) for label, times in seconds.items()},
            bytes=num_scans * features.stat().st_size,
            resident_bytes=max(0, resident_bytes() - before),
            manifest_bytes=(out / "manifest.parquet").stat().st_size,
            verified="every scan was found done",
        )


def _backbone(dim: int, depth: int) -> Backbone:
    vit = Vit(VitConfig(dim=dim, depth=depth, image_zyx=(12, 64, 64), layer_scale=1.0))
    vit.init_weights(0)
    vit.eval().requires_grad_(False)
    return Backbone(vit, Preprocess(resize_yx=(64, 64))).eval()


def _new_out(out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / ".key").write_bytes(_KEY)
    return out


def _files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "progress.json"
    }


def _percentiles(seconds: Sequence[float]) -> list[float]:
    return [round(1000 * float(t), 4) for t in np.percentile(seconds, (20, 50, 80))]


if __name__ == "__main__":
    main()

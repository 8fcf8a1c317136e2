"""Print the tables of docs/scale.md: 105 thousand to 10 million scans, 8 to 512 GPUs.

    python -m bench.scale            # prints them
    python -m bench.scale --write    # puts them into the page

All of it is arithmetic from the constants below, from shapes, and from rows that were measured and
are named. Nothing here was run on more than one machine.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.rows import REPOSITORY, RESULTS, Row, parse
from tapct_fast import recipes
from tapct_fast.config import Config
from tapct_fast.data.crops import CaseOrder, crop_at
from tapct_fast.data.rng import Stream, generator
from tapct_fast.data.samples import union_region
from tapct_fast.data.views import draw_views
from tapct_fast.io.store import BLOCK_ZYX
from tapct_fast.io.store_index import CaseRecord
from tapct_fast.train.plan import PEAK, count_flops, count_parameters

_DRAWS = 1000  # of one time in the rows of bench.sampling
PAGE = REPOSITORY / "docs" / "scale.md"
SCANS = (105_000, 1_000_000, 10_000_000)
GPUS = (8, 64, 512)
GPUS_PER_NODE = 8
MODELS = {"ViT-S": recipes.vit_s, "ViT-B": recipes.vit_b}
SHARE = 0.4  # of the nominal peak, assumed
SAMPLES_PER_GPU = 32  # of a step, assumed
NETWORK = 50e9  # bytes/s into and out of each GPU: 400 Gb/s, nominal
CASE_BYTES = 70e6  # a scan of 512x512x275 as LZ4HC, docs/store.md
VOXEL_BYTES = CASE_BYTES / (275 * 512 * 512)
DECODED_PER_CORE = 992 * 16 * 256 * 256 / 2  # voxels/s, README: 992 boxes/s on two threads
RENDER_SECONDS = 0.014  # of one core for the views of a sample, README
SCAN = CaseRecord(
    *("case-0", "cases/case-0.b2nd", (275, 512, 512), (1.2, 0.78, 0.78)),
    *(((0, 60, 30), (275, 460, 480)), (0.0,) * 16, b""),
)


def tables() -> dict[str, str]:
    """Return every table of the page by name."""
    return {
        "store": _store(),
        "draws": _draws(),
        "reads": _reads(),
        "collectives": _collectives(),
        "step": _step(),
        "checkpoints": _checkpoints(),
        "epochs": _epochs(),
    }


def bytes_per_sample(config: Config, *, num_draws: int = 1000) -> tuple[float, float]:
    """Return the mean voxels of a sample's region and the bytes of the blocks that hold them.

    By simulation: regions are drawn as in training, from one scan of common size.
    """
    order, groups = CaseOrder(1, seed=0), (config.views.global_views, config.views.local_views)
    voxels, blocks = [], []
    for index in range(num_draws):
        crop = crop_at([SCAN], config.crops, order, index=index)
        drawn = [
            draw_views(
                *(config.views, group, config.hu, crop.shape_zyx),
                spacing_mm=SCAN.spacing_mm,
                rng=generator(0, Stream.VIEWS, index, number),
            )
            for number, group in enumerate(groups)
        ]
        lo_zyx, shape_zyx = union_region(drawn, groups, crop.shape_zyx)
        first = np.add(crop.lo_zyx, lo_zyx)
        touched = (first + shape_zyx - 1) // BLOCK_ZYX - first // BLOCK_ZYX + 1
        voxels.append(np.prod(shape_zyx))
        blocks.append(np.prod(touched))
    return float(np.mean(voxels)), float(np.mean(blocks)) * np.prod(BLOCK_ZYX) * VOXEL_BYTES


def samples_per_s(config: Config) -> float:
    """Return what one GPU does at the assumed share of its peak."""
    return PEAK * SHARE / count_flops(config).total


def _measured() -> dict[str, Row]:
    """Return the last rows of ``bench.sampling`` by case."""
    found = {}
    for path in sorted((REPOSITORY / RESULTS).glob("*.jsonl")):
        for row in parse(path.read_text()):
            if row.subject == "sampling" and not row.values["tiny"]:
                found[row.case] = row
    return found


def _store() -> str:
    row = next(r for case, r in _measured().items() if "105000 cases of" in case)
    index, memory = (row.values[key] / SCANS[0] for key in ("bytes", "resident_bytes"))
    rows = [
        [
            f"{scans:,}",
            f"{scans * CASE_BYTES / 1e12:,.1f} TB",
            f"{scans * index / 1e9:.1f} GB" + (" (refused)" if scans * index > 2**32 else ""),
            f"{scans * memory / 1e9:.1f} GB",
            f"{scans * 4 / 1e6:.1f} MB",
        ]
        for scans in SCANS
    ]
    return _table(["scans", "store", "index", "records, each rank", "an epoch's order"], rows)


def _draws() -> str:
    rows = []
    measured = _measured()
    for scans in SCANS:
        row = measured[f"{_DRAWS} draws of {scans} cases"]
        anew, ours, first = (
            row.times_ms[name].p50
            for name in ("1 draw, order made anew", "tapct_fast", "first of an epoch")
        )
        opened = [r for case, r in measured.items() if f"draw, {scans} cases" in case]
        start = "not measured"
        if opened:
            slices = opened[0].case.split(" of ")[1]
            start = f"{opened[0].times_ms['tapct_fast'].p50 / 1000:.1f} s ({slices})"
        rows.append(
            [
                f"{scans:,}",
                f"{1000 * ours / _DRAWS:.0f} us",
                f"{first:,.1f} ms",
                f"{anew:,.1f} ms",
                start,
            ]
        )
    names = ["scans", "a draw", "an epoch's first", "a draw, order made anew", "open, first draw"]
    return _table(names, rows)


def _reads() -> str:
    rows = []
    for name, recipe in MODELS.items():
        voxels, size = bytes_per_sample(recipe())
        rate = samples_per_s(recipe())
        cores = rate * (voxels / DECODED_PER_CORE + RENDER_SECONDS)
        for gpus in GPUS:
            rows.append(
                [
                    *(name, f"{gpus}", f"{gpus * rate:,.0f}", f"{size / 1e6:.1f} MB"),
                    f"{GPUS_PER_NODE * rate * size / 1e9:.1f} GB/s",
                    *(f"{gpus * rate * size / 1e9:,.0f} GB/s", f"{cores:.1f}"),
                ]
            )
    names = ["model", "GPUs", "samples/s", "a sample", "a node reads", "all read", "cores a GPU"]
    return _table(names, rows)


def _traffic(config: Config, gpus: int) -> dict[str, float]:
    """Return the bytes that each GPU sends in a step, ring algorithms."""
    size = 4 * count_parameters(config).total
    heads = config.heads
    prototypes = heads.dino.num_prototypes + (heads.ibot or heads.dino).num_prototypes
    ring = (gpus - 1) / gpus
    return {
        "all-reduce": 2 * ring * size,  # gradients, float32
        # Weights in bfloat16 before the forward and the backward pass, gradients float32; and the
        # teacher's weights once.
        "sharded": ring * (3 * size / 2 + size),
        "Sinkhorn": 2 * ring * 3 * 2 * 4 * prototypes,  # three rounds of a maximum and a sum
    }


def _collectives() -> str:
    rows = []
    for name, recipe in MODELS.items():
        for gpus in GPUS:
            sent = _traffic(recipe(), gpus)
            rows.append([name, f"{gpus}", *(f"{size / 1e6:,.1f} MB" for size in sent.values())])
    names = ["model", "GPUs", "gradients, all-reduced", "sharded: gathers and scatter", "Sinkhorn"]
    return _table(names, rows)


def _step() -> str:
    rows = []
    for name, recipe in MODELS.items():
        seconds = SAMPLES_PER_GPU / samples_per_s(recipe())
        for gpus in GPUS:
            sent = _traffic(recipe(), gpus)
            times = {key: size / NETWORK for key, size in sent.items()}
            wanted = (sent["all-reduce"] + sent["Sinkhorn"]) / (0.1 * seconds)
            rows.append(
                [
                    *(name, f"{gpus}", f"{1000 * seconds:.0f} ms"),
                    *(f"{1000 * t:.2f} ms ({t / seconds:.1%})" for t in times.values()),
                    f"{8 * wanted / 1e9:.0f} Gb/s",
                ]
            )
    names = ["model", "GPUs", "computing", "all-reduce", "sharded", "Sinkhorn", "for 10 %"]
    return _table(names, rows)


def _checkpoints() -> str:
    rows = []
    for name, recipe in (("vit-s", recipes.vit_s), ("vit-b", recipes.vit_b)):
        row = _measured()[f"checkpoint of {name}"]
        size = row.values["bytes"]
        save, verify = (
            row.times_ms[f"tapct_fast {verb}"].p50 / 1000 for verb in ("save", "verify")
        )
        every = recipe().train.checkpoint_every * SAMPLES_PER_GPU / samples_per_s(recipe())
        rows.append(
            [
                *(name, f"{size / 1e9:.2f} GB", f"{save:.1f} s", f"{verify:.1f} s"),
                *(f"{size / save / 1e6:,.0f} MB/s", f"{save / every:.1%}"),
            ]
        )
    return _table(
        ["recipe", "checkpoint", "save", "verify", "rate of a save", "of the time between"], rows
    )


def _epochs() -> str:
    rows = []
    for name, recipe in MODELS.items():
        for scans in SCANS:
            minutes = [scans / (gpus * samples_per_s(recipe())) / 60 for gpus in GPUS]
            rows.append([name, f"{scans:,}", *(f"{m:,.1f} min" for m in minutes)])
    return _table(["model", "scans", *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: str) -> str:
    """Return a page with its tables replaced: each stands behind a comment with its name."""
    for name, table in tables().items():
        page, count = re.subn(
            rf"(<!-- bench\.scale: {name} -->\n).*?(\n\n|\Z)",
            lambda found, table=table: found[1] + table + found[2],  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name}")
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale")
    parser.add_argument("--write", action="store_true", help="put them into docs/scale.md")
    if parser.parse_args(argv).write:
        PAGE.write_text(fill(PAGE.read_text()))
        return
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()

"""The main job from end to end, small enough for two CPU cores: pack, train, export, embed, probe.

Every stage is the library's own; the backbone is tiny and the labelled scans are synthetic. What is
compared is one architecture with two sets of weights: as the run started and as it ended.
"""

import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tapct_fast import __version__, recipes
from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.export import export_backbone
from tapct_fast.backbone.load import load_backbone
from tapct_fast.config import Config
from tapct_fast.data.phantom import HU_TWINS, LABEL_NAMES, write_phantoms
from tapct_fast.demo_report import Report, Score, write_report
from tapct_fast.downstream.dice import ProbeResult
from tapct_fast.downstream.encode import embed_volume
from tapct_fast.downstream.features import Features
from tapct_fast.downstream.probe import (
    Scan,
    knn_segmentation,
    linear_segmentation,
    segment,
)
from tapct_fast.errors import FormatError, InputError
from tapct_fast.figures import Shown, fit_colors, scan_figure
from tapct_fast.io.pack import pack
from tapct_fast.io.quarantine import last_refusal
from tapct_fast.io.read import find_scans, read_labels, read_volume
from tapct_fast.io.volume import Volume
from tapct_fast.monitor.losses import head_losses
from tapct_fast.report import Figure, Interval, Rgb
from tapct_fast.train.log import METRICS
from tapct_fast.train.loop import init_method, train

NUM_TRAIN, NUM_FIT, NUM_TEST = 16, 8, 8  # phantoms: pretrain, fit the probe (labels), score it
NUM_SHOWN = 3
MAX_SHOWN_SLICES = 96  # of a given scan, about its middle: a long scan must not cost the minute
PIXEL_MM = 3.0  # in plane; between the pixels of the recipe's local and global views
NUM_RESAMPLES = 2000
MARKER = ".tapct-demo"
PARTS = ("phantoms", "store", "run", "backbone")

LABEL_COLORS: tuple[Rgb, ...] = (
    (0, 0, 0),
    (237, 201, 72),
    (255, 157, 60),
    (196, 78, 82),
    (240, 240, 235),
    (86, 180, 233),
    (0, 114, 178),
    (227, 26, 100),
    (156, 107, 60),
    (148, 90, 190),
    (120, 200, 110),
    (20, 128, 70),
    (232, 155, 196),
)


class _Clock:
    """Announces the stages and keeps their seconds."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self.print_line = print_line
        self.stages: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.print_line(f"{name} ...")
        start = time.perf_counter()
        yield
        self.stages.append((name, time.perf_counter() - start))


class _Probes(NamedTuple):
    """Both probes of one set of weights."""

    linear: ProbeResult
    knn: ProbeResult


class _Evaluation(NamedTuple):
    """What the two sets of weights are worth, and pictures of the trained ones."""

    untrained: _Probes
    trained: _Probes
    figures: list[Figure]
    num_parameters: int


def run_demo(
    out: Path,
    ct: Sequence[Path] = (),
    *,
    seed: int = 0,
    config: Config | None = None,
    print_line: Callable[[str], None] | None = None,
) -> Path:
    """Run the whole path and write ``out/report.html``.

    Without ``ct`` the backbone is trained on synthetic phantoms. With it, on those scans alone;
    they have no labels, so the probe still uses phantoms, which that backbone has never seen.

    Args:
        out: A new folder, or that of an earlier demo, whose content is replaced.
        ct: Scan files, DICOM series folders, or folders searched recursively.
        seed: Of the phantoms and of the run.
        config: By default the recipe ``debug``.
        print_line: Gets the stages and the probe table, line by line.

    Returns:
        Path of the report.

    Raises:
        InputError: ``out`` holds something else, or a path holds no scan.
        FormatError: None of the scans can be used.
    """
    scans = find_scans(ct) if ct else []
    _claim(out)
    config = config or recipes.debug()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
    print_line = print_line or _say_nothing
    clock = _Clock(print_line)
    num_phantoms = NUM_FIT + NUM_TEST if scans else NUM_TRAIN + NUM_TEST
    with clock.stage(f"make {num_phantoms} phantoms"):
        pairs = write_phantoms(out / "phantoms", num_phantoms, seed)
    sources = scans or [scan for scan, _ in pairs[:NUM_TRAIN]]
    with clock.stage(f"pack {len(sources)} scans"):
        packed = pack(sources, out / "store").packed
    if not packed:
        raise last_refusal(out / "store")
    with clock.stage(f"train {config.train.num_steps} steps"):
        train(config, out / "store", out / "run", resume="never", progress=True)
    with clock.stage("export the teacher"):
        export_backbone(out / "run", out / "backbone")
    phantoms = [*pairs[:NUM_FIT], *pairs[-NUM_TEST:]]
    found = _evaluate(out / "backbone", config, phantoms, scans, clock)
    rows = [json.loads(row) for row in (out / "run" / METRICS).read_text().splitlines()]
    report = out / "report.html"
    write_report(report, _describe(found, config, rows, packed, bool(scans), clock.stages))
    for line in _table(found):
        print_line(line)
    return report


def _say_nothing(line: str) -> None:
    del line


def _claim(out: Path) -> None:
    """Make ``out`` ours: new, empty, or what an earlier demo left there."""
    if out.exists() and not out.is_dir():
        raise InputError("--out is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise InputError("--out holds files that are not a demo's; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    for part in PARTS:
        shutil.rmtree(out / part, ignore_errors=True)
    (out / "report.html").unlink(missing_ok=True)


def _evaluate(
    folder: Path,
    config: Config,
    phantoms: Sequence[tuple[Path, Path]],
    scans: Sequence[Path],
    clock: _Clock,
) -> _Evaluation:
    """Embed and probe with the exported weights and with those the run started from."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_backbone(folder, device=device)
    start = init_method(config).student.backbone
    untrained = Backbone(start, trained.preprocess, precision=trained.precision).to(device).eval()
    volumes = [read_volume(scan) for scan, _ in phantoms]
    maps = [read_labels(labels) for _, labels in phantoms]
    given = _readable(scans)
    with clock.stage(f"embed {len(volumes)} phantoms untrained"):
        untrained_features = [_embed(untrained, volume) for volume in volumes]
    with clock.stage(f"embed {len(volumes) + len(given)} scans trained"):
        features = [_embed(trained, volume) for volume in volumes]
        shown = {title: Shown(volume, _embed(trained, volume)) for title, volume in given.items()}
    with clock.stage("probe"):
        seed, num_classes = config.train.seed, len(LABEL_NAMES)
        untrained_probes = _probe(list(zip(untrained_features, maps, strict=True)), seed)
        labelled = list(zip(features, maps, strict=True))
        trained_probes = _probe(labelled, seed)
        fitted, to_show = labelled[:NUM_FIT], labelled[NUM_FIT:][: 1 if given else NUM_SHOWN]
        predicted = segment(fitted, to_show, num_classes=num_classes, seed=seed)
    with clock.stage("paint"):
        tokens = [Shown(*pair) for pair in zip(volumes, features, strict=True)]
        colors = fit_colors([*tokens, *shown.values()])
        for number, predicted_ZYX in enumerate(predicted, start=1):
            i = NUM_FIT + number - 1
            shown[f"phantom {number}, not seen in training"] = Shown(
                volumes[i], features[i], maps[i].hu_ZYX, predicted_ZYX.astype(np.int16)
            )
        figures = [scan_figure(title, scan, colors, LABEL_COLORS) for title, scan in shown.items()]
    num_parameters = sum(p.numel() for p in trained.vit.parameters())
    return _Evaluation(untrained_probes, trained_probes, figures, num_parameters)


def _readable(scans: Sequence[Path]) -> dict[str, Volume]:
    """Read the first scans that can be read, cut to their middle slices, with a title each."""
    given: dict[str, Volume] = {}
    for number, scan in enumerate(scans, start=1):
        try:
            volume = read_volume(scan)
        except FormatError:
            continue  # packing listed it with its reason
        given[f"scan {number}"] = _middle(volume)
        if len(given) == NUM_SHOWN:
            break
    return given


def _middle(volume: Volume) -> Volume:
    first = max(0, volume.hu_ZYX.shape[0] - MAX_SHOWN_SLICES) // 2
    affine = volume.affine.copy()
    affine[:3, 3] += first * affine[:3, 2]
    hu_ZYX = volume.hu_ZYX[first : first + MAX_SHOWN_SLICES]
    return Volume(np.ascontiguousarray(hu_ZYX), volume.spacing_mm, affine)


def _embed(backbone: Backbone, volume: Volume) -> Features:
    """Embed at the pixel size the recipe trains on, whatever the scan's own."""
    multiple = backbone.preprocess.plane_multiple
    _, *plane_yx = volume.hu_ZYX.shape
    y, x = (
        max(1, round(size * spacing / PIXEL_MM / multiple)) * multiple
        for size, spacing in zip(plane_yx, volume.spacing_mm[1:], strict=True)
    )
    preprocess = dataclasses.replace(backbone.preprocess, resize_yx=(y, x))
    return embed_volume(
        Backbone(backbone.vit, preprocess, precision=backbone.precision).eval(), volume
    )


def _probe(scans: Sequence[Scan], seed: int) -> _Probes:
    linear, knn = (
        probe(
            scans[:NUM_FIT],
            scans[NUM_FIT:],
            num_classes=len(LABEL_NAMES),
            seed=seed,
            label_names=LABEL_NAMES,
        )
        for probe in (linear_segmentation, knn_segmentation)
    )
    return _Probes(linear, knn)


def _scores(found: _Evaluation) -> list[Score]:
    """Return the rows of the probe table: every label, then the means."""
    untrained, trained = found.untrained.linear, found.trained.linear
    twins = {name: [n for n in group if n != name] for group in HU_TWINS for name in group}
    rows = [
        Score(
            name,
            ", ".join(twins.get(name, [])),
            LABEL_COLORS[k],
            *(Interval(r.dice_K[k], *r.interval_K2[k]) for r in (trained, untrained)),
        )
        for k, name in enumerate(LABEL_NAMES)
        if k > 0
    ]
    for name, kind in (("mean of all", "linear"), ("mean of all, kNN", "knn")):
        pair = (getattr(found.trained, kind), getattr(found.untrained, kind))
        intervals = (Interval(r.mean_dice, *r.interval) for r in pair)
        rows.append(Score(name, "", (255, 255, 255), *intervals))
    return rows


def _gain(trained: ProbeResult, untrained: ProbeResult, seed: int) -> Interval:
    """Return the gain in mean Dice over the same scans, with a paired 95 % bootstrap interval."""
    gain_S = np.nanmean(trained.dice_SK[:, 1:] - untrained.dice_SK[:, 1:], axis=1)
    rng = np.random.default_rng(seed)
    draws = gain_S[rng.integers(gain_S.size, size=(NUM_RESAMPLES, gain_S.size))].mean(1)
    return Interval(float(gain_S.mean()), *map(float, np.percentile(draws, (2.5, 97.5))))


def _table(found: _Evaluation) -> list[str]:
    """Return the probe table as text."""
    lines = [
        f"Dice on {found.trained.linear.num_scans} unseen phantoms, 95 % interval over them",
        f"{'label':<18}{'untrained':<22}{'trained':<22}",
    ]
    for score in _scores(found):
        cells = (
            f"{interval.mean:.2f}  {interval.low:.2f}..{interval.high:.2f}"
            for interval in (score.untrained, score.trained)
        )
        lines.append(f"{score.name:<18}" + "".join(f"{cell:<22}" for cell in cells).rstrip())
    return lines


def _describe(
    found: _Evaluation,
    config: Config,
    rows: list[dict[str, float]],
    num_scans: int,
    is_given: bool,
    stages: Sequence[tuple[str, float]],
) -> Report:
    """Put the run into words and numbers; scans are named by their number only."""
    gain = _gain(found.trained.linear, found.untrained.linear, config.train.seed)
    curves = [loss.curve() for loss in head_losses(config, rows)]
    kind = "given CT scan" if is_given else "synthetic CT phantom"
    data = f"{num_scans} {kind}{'s' if num_scans > 1 else ''}"
    size = f"{found.num_parameters / 1e6:.1f} M parameters"
    tail = max(1, len(rows) // 10)
    num_crops = config.train.num_steps * config.train.batch_size
    tiles = [
        (
            "Dice, linear probe",
            f"{found.trained.linear.mean_dice:.2f}",
            f"untrained {found.untrained.linear.mean_dice:.2f}",
        ),
        ("Gain by training", f"{gain.mean:+.2f}", f"95 %: {gain.low:+.3f} to {gain.high:+.3f}"),
    ]
    for curve in curves:
        last = float(np.mean(curve.value_N[-tail:]))
        tiles.append((f"{curve.title}, at the end", f"{last:.2f}", curve.uniform_text))
    shown = (
        "The first three principal components of the patch tokens of all scans, as red, green and "
        "blue: tokens of like features have like colours. One square is one token; air is black. "
    )
    if is_given:
        shown += "The given scans have no labels; the phantom below them was not seen in training. "
    shown += "Labels are what the phantom was made of; probe is the linear probe's segmentation."
    trained_on = (
        "The backbone was trained on the given scans alone and has never seen a phantom; the given "
        "scans have no labels, so the probe is scored on phantoms. "
        if is_given
        else ""
    )
    return Report(
        title="tapct_fast demo",
        lead=f"A 3D vision transformer of {size}, trained with DINOv2 on {data} for "
        f"{config.train.num_steps} steps, frozen, probed on {NUM_TEST} phantoms not seen before.",
        tiles=tiles,
        figures_text=shown,
        figures=found.figures,
        legend=list(zip(LABEL_NAMES, LABEL_COLORS, strict=True))[1:],
        curves_text="Every step in light blue, a running mean in blue. The dashed line is the loss "
        "of a student whose output says nothing: a run that stays on it has not learned, or has "
        "collapsed.",
        curves=curves,
        scores_text=f"{trained_on}A linear layer on frozen patch tokens, fitted on {NUM_FIT} "
        f"labelled phantoms and scored on {NUM_TEST} others; intervals are 95 % bootstraps over "
        "those. Untrained is the same network as it was before its first step. The labels named "
        "under 'same HU as' share one distribution of HU by construction: only texture and place "
        "tell them apart.",
        scores=_scores(found),
        stages=stages,
        facts=_facts(config),
        limits=(
            "The phantoms are synthetic: ellipsoids under a smooth random warp, at true HU, with "
            "exaggerated texture. They are not anatomy, and no score here says anything about "
            "patients.",
            f"The backbone is tiny and saw {num_crops} crops in all. It shows that every "
            "stage works and learns, and is of no other use; recipes vit-s and vit-b are for more.",
            "The interval is over the test phantoms of one seed; it does not cover the spread over "
            "training runs.",
            "Not a medical device; not for diagnosis.",
        ),
    )


def _facts(config: Config) -> list[tuple[str, str]]:
    is_cuda, settings = torch.cuda.is_available(), config.train
    device = torch.cuda.get_device_name() if is_cuda else f"CPU, {platform.machine()}"
    vit = config.vit
    return [
        ("device", f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"),
        ("tapct_fast", f"{__version__}, commit {_commit() or 'unknown'}"),
        (
            "python, torch, numpy",
            f"{platform.python_version()}, {torch.__version__}, {np.__version__}",
        ),
        (
            "backbone",
            f"width {vit.dim}, {vit.depth} blocks, patches of {vit.patch_zyx} voxels (z, y, x)",
        ),
        (
            "training",
            f"{settings.num_steps} steps of {settings.batch_size} crops, seed {settings.seed}",
        ),
        ("embedding", f"slices resampled to about {PIXEL_MM:g} mm, sliding windows along depth"),
    ]


def _commit() -> str | None:
    """Return the commit of the source tree this runs from, where there is one."""
    git = Path(__file__).resolve().parent.parent / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            head = (git / head.removeprefix("ref: ")).read_text().strip()
    except OSError:
        return None
    return head[:12]

"""Dice of organs on real CT: a backbone pretrained here, the same one untrained, plain intensities.

Two patients are all that is at hand with organ labels (TotalSegmentator's test files; the labels
are TotalSegmentator's own, not an expert's): a torso at 3 mm and 20 slices of an abdomen at 2 mm.
``tapct-fast probe``'s linear decoder is fitted on one and scored on the other, and the other way
round, on the labels that both hold; left and right, ribs and vertebrae are one label each, as a
patch of 12 mm cannot tell them apart. TotalSegmentator's third file, ts_ct_sm, is the top of the
torso voxel by voxel, so it takes no part. The backbone was pretrained for minutes on phantoms and
on other patients, never on these two.

Two patients say nothing about a third: intervals are a 95 % bootstrap over labels, paired for
differences, and speak of these organs in these two scans, and of the seeds' mean. Timed is the
encoding of both scans.
Shape suffixes: E encoders, R seeds, S scans, K labels.
"""

import csv
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.harness import REPOSITORY, Device, Run, start, time_ms
from tapct_fast.backbone.export import export_backbone
from tapct_fast.config import Config, CropConfig
from tapct_fast.data.phantom import LABEL_NAMES, write_phantoms
from tapct_fast.evaluation.encoders import open_encoder
from tapct_fast.evaluation.evaluate import evaluate
from tapct_fast.evaluation.scores import score
from tapct_fast.io.convert import save_nifti
from tapct_fast.io.pack import pack
from tapct_fast.io.read import read_labels, read_volume
from tapct_fast.recipes import debug
from tapct_fast.train.loop import train

SOURCES = [
    "bench/organs.py",
    "tapct_fast/recipes.py",
    "tapct_fast/data/phantom.py",
    "tapct_fast/downstream/probe.py",
    *(f"tapct_fast/evaluation/{name}.py" for name in ("encoders", "evaluate", "segmentation")),
]
DEVICE: Device = "cpu"
NAMES = PRETRAINED, UNTRAINED, INTENSITY = "pretrained here", "untrained", "intensity"
LABELLED = (
    ("nifti/ts_ct_3mm_int32.nii.gz", "nifti/ts_ct_3mm_seg62.nii.gz"),
    ("dicom/ts_j2k_20slices", "dicom/ts_j2k_20slices_seg32.nii.gz"),
)
OTHERS = (  # patients to pretrain on
    "nifti/lidc0314_chest_native_z120-139_int16.nii.gz",
    "nifti/crlm1004_abdomen_native_slope1_inter-1024_int16.nii.gz",
    "nifti/sts003_ct_f32_qform.nii.gz",
    "dicom/sts004_implicit_40slices",
)
_WHICH = r"_(left|right|[CTL]?\d+)(_\d+)?$"  # of a pair or of a row

Floats = NDArray[np.float64]


class Setting(NamedTuple):
    """The one row.

    Attributes:
        name: Of the model.
        config: The run.
        seeds: Of weights, phantoms and views.
        num_phantoms: To pretrain on, beside real scans.
    """

    name: str
    config: Config
    seeds: Sequence[int]
    num_phantoms: int


def full() -> Setting:
    """Return a small ViT on boxes of 32 x 192 x 192 mm: slices of 2 to 4 mm, pixels of 1.3 to 3 mm.

    The probe resizes planes to 224 x 224: pixels of 1.4 and 2.2 mm in the two patients.
    """
    config = debug()
    crops = CropConfig(extent_mm_zyx=(32.0, 192.0, 192.0))
    vit = replace(config.vit, dim=192, depth=6)
    run = replace(config.train, num_steps=300, checkpoint_every=300, log_every=20)
    return Setting("ViT 192x6", replace(config, crops=crops, vit=vit, train=run), (0,), 12)


def tiny() -> Setting:
    """Return a setting of the same paths for tests."""
    config = debug()
    vit = replace(config.vit, dim=64, depth=1)
    run = replace(config.train, num_steps=2, batch_size=4, group_size=4, checkpoint_every=2)
    return Setting("tiny", replace(config, vit=vit, train=run), (0,), 1)


class Scans(NamedTuple):
    """A table of labelled scans, the names of their labels, and other scans to train on."""

    table: Path
    labelled: list[Path]
    names: list[str]
    others: list[Path]


def real_scans(folder: Path) -> Scans | None:
    """Write the two patients' label maps, with shared labels only; None without real CT."""
    home = Path(os.environ.get("TAPCT_TEST_DATA", REPOSITORY / ".." / "shared" / "data" / "ct"))
    if not (home / LABELLED[0][0]).exists():
        print("skipped: no real CT; set TAPCT_TEST_DATA to a folder with nifti/ and dicom/")
        return None
    names = json.loads((home / "nifti" / "ts_label_names.json").read_text())
    merged = {int(value): re.sub(_WHICH, "", name) for value, name in names.items()}
    maps = [read_labels(home / labels) for _, labels in LABELLED]
    present = [{merged[v] for v in np.unique(m.hu_ZYX).tolist() if v in merged} for m in maps]
    shared = sorted(set.intersection(*present))
    class_of = np.zeros(max(merged) + 1, dtype=np.int16)
    for value, name in merged.items():
        class_of[value] = shared.index(name) + 1 if name in shared else 0
    rows = []
    for number, ((scan, _), labels) in enumerate(zip(LABELLED, maps, strict=True), start=1):
        path = folder / f"labels{number}.nii.gz"
        save_nifti(path, class_of[labels.hu_ZYX], labels)
        rows.append([(home / scan).resolve(), path, f"patient {number}"])
    labelled = [home / scan for scan, _ in LABELLED]
    return Scans(_write_table(folder, rows), labelled, shared, [home / scan for scan in OTHERS])


def phantom_scans(folder: Path) -> Scans:
    """Return phantoms in the place of patients, for tests."""
    pairs = write_phantoms(folder / "labelled", 2, seed=9)
    rows = [[scan, labels, f"phantom {i}"] for i, (scan, labels) in enumerate(pairs)]
    labelled = [scan for scan, _ in pairs]
    return Scans(_write_table(folder, rows), labelled, list(LABEL_NAMES[1:]), [])


def _write_table(folder: Path, rows: Sequence[Sequence[Any]]) -> Path:
    table = folder / "scans.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("scan", "labels", "patient"), *rows])
    return table


def _pretrained(setting: Setting, seed: int, scans: Scans, folder: Path) -> Path:
    pairs = write_phantoms(folder / "phantoms", setting.num_phantoms, seed)
    report = pack([*scans.others, *(scan for scan, _ in pairs)], folder / "store", policy="warn")
    assert report.quarantined == 0
    config = replace(setting.config, train=replace(setting.config.train, seed=seed))
    train(config, folder / "store", folder / "run", device=DEVICE)
    return export_backbone(folder / "run", folder / "backbone")


def _specs(backbone: Path) -> list[str]:
    return [f"{PRETRAINED}={backbone}", f"{UNTRAINED}=random:{backbone}", INTENSITY]


def _dice_ESK(scans: Scans, backbone: Path, seed: int, folder: Path) -> Floats:
    """Return the Dice of the pretrained and the untrained backbone and of intensities."""
    found = evaluate(scans.table, _specs(backbone), out=folder / "probe", folds=2, seed=seed)
    dice = [[row["dice"] for row in result.rows] for result in found.results]
    return np.array(dice, dtype=np.float64)


def _encode_ms(scans: Scans, backbone: Path, *, rounds: int) -> dict[str, list[float]]:
    volumes = [read_volume(scan) for scan in scans.labelled]
    encoders = [open_encoder(spec) for spec in _specs(backbone)]
    calls = {e.name: lambda e=e: [e.encode(volume) for volume in volumes] for e in encoders}
    return time_ms(calls, device=DEVICE, rounds=rounds)


def _interval(of_K: Floats) -> list[float]:
    labels = [str(k) for k in range(of_K.size)]
    found = score("", lambda rows: float(of_K[rows].mean()), labels, seed=0)
    return [round(value, 4) for value in found[1:]]


def _measure(run: Run, setting: Setting, case: str) -> None:
    found, seconds = [], []
    with tempfile.TemporaryDirectory() as name:
        scans = phantom_scans(Path(name)) if run.is_tiny else real_scans(Path(name))
        if scans is None:
            return
        for seed in setting.seeds:
            folder = Path(name, str(seed))
            folder.mkdir()
            began = time.perf_counter()
            backbone = _pretrained(setting, seed, scans, folder)
            seconds.append(round(time.perf_counter() - began, 1))
            found.append(_dice_ESK(scans, backbone, seed, folder))
            print(f"organs, seed {seed}: {np.nanmean(found[-1], axis=(1, 2))}", flush=True)
        times = _encode_ms(scans, backbone, rounds=3 if run.is_tiny else 10)
        num_voxels = sum(read_volume(scan).hu_ZYX.size for scan in scans.labelled)
    dice_ERSK = np.stack(found, axis=1)
    dice_ESK = dice_ERSK.mean(1)
    dice_EK = np.nanmean(dice_ESK, axis=1)  # over the two directions
    run.write(
        case,
        DEVICE,
        times,
        bytes=2 * num_voxels,  # int16
        train_seconds=seconds,
        seeds=list(setting.seeds),
        labels=len(scans.names),
        dice={n: _interval(dice_K) for n, dice_K in zip(NAMES, dice_EK, strict=True)},
        gain={n: _interval(dice_EK[0] - dice_EK[e]) for e, n in enumerate(NAMES) if e},
        dice_by_seed={
            n: np.nanmean(of_RSK, axis=(1, 2)).round(4).tolist()
            for n, of_RSK in zip(NAMES, dice_ERSK, strict=True)
        },
        dice_by_direction={
            n: np.nanmean(of_SK, axis=1).round(4).tolist()
            for n, of_SK in zip(NAMES, dice_ESK, strict=True)
        },
        dice_by_label={
            label: [round(float(value), 4) for value in dice_EK[:, k]]
            for k, label in enumerate(scans.names)
        },
        verified="fitted on one patient, scored on the other, both ways",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the one row."""
    run = start(__file__, SOURCES, argv)
    setting = tiny() if run.is_tiny else full()
    case = f"{setting.name}, {setting.config.train.num_steps} steps, {len(setting.seeds)} seeds"
    if run.wants(case, DEVICE):
        _measure(run, setting, case)


if __name__ == "__main__":
    main()

"""A linear probe of twenty scans, ten labels, features cached: everything but encoding.

Phantoms with two of their labels merged into background, five folds by patient, features of a
ViT-S's width of 384 on 4x8x8 patches: a fixed random layer on each patch, for what a probe costs
does not depend on what its features know. Timed is the whole call: reading label maps, fits, scores
with surface distances and 2000 draws, pages. With one thread and with two: both write the same
scores, and nothing is encoded.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.harness import Run, start
from tapct_fast.backbone.preprocess import token_affine
from tapct_fast.data.phantom import LABEL_NAMES, make_phantom
from tapct_fast.downstream.features import Features
from tapct_fast.evaluation.cases import Case, Dataset
from tapct_fast.evaluation.encoders import grid_features
from tapct_fast.evaluation.evaluate import Evaluation, evaluate
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.volume import Volume

SOURCES = [
    *(f"tapct_fast/downstream/{name}.py" for name in ("dice", "features", "probe", "resample")),
    *(
        f"tapct_fast/evaluation/{name}.py"
        for name in (
            *("cache", "evaluate", "measures", "probe_report"),
            *("scores", "segmentation", "surface", "survey"),
        )
    ),
]
NUM_SCANS, WIDTH = 20, 384
MERGED = ("subcutaneous fat", "visceral fat")  # into background: ten labels are left
GRIDS = {  # shape and spacing in mm, z y x
    "48x120x160": ((48, 120, 160), (5.0, 2.2, 2.2)),
    "48x128x128": ((48, 128, 128), (5.0, 2.1, 2.75)),
}


class RandomLayer:
    """tanh of a random linear layer on the HU of each whole 4x8x8 patch."""

    name = "random layer"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weight_ND = torch.randn(256, WIDTH, generator=generator) / 16

    def fingerprint(self) -> str:
        """Return its name: it has no other weights."""
        return self.name

    def encode(self, volume: Volume) -> Features:
        """Return the tokens of whole patches."""
        z, y, x = (size // p for size, p in zip(volume.hu_ZYX.shape, (4, 8, 8), strict=True))
        hu_ZYX = torch.from_numpy(volume.hu_ZYX[: 4 * z, : 8 * y, : 8 * x]).float() / 300
        patches = hu_ZYX.reshape(z, 4, y, 8, x, 8).movedim((1, 3, 5), (3, 4, 5)).flatten(3)
        affine = volume.affine @ token_affine((4, 8, 8))
        return grid_features(torch.tanh(patches @ self._weight_ND), affine)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both grids with one and two threads."""
    run = start(__file__, SOURCES, argv)
    threads_before = torch.get_num_threads()
    try:
        grids = {"12x48x56": ((12, 48, 56), (20.0, 6.0, 6.5))} if run.is_tiny else GRIDS
        for name, (shape_zyx, spacing_mm) in grids.items():
            case = f"{4 if run.is_tiny else NUM_SCANS} scans of {name}, 10 labels, 5 folds"
            if run.wants(case, "cpu"):
                with tempfile.TemporaryDirectory() as folder:
                    _measure(run, case, Path(folder), shape_zyx, spacing_mm)
    finally:
        torch.set_num_threads(threads_before)


def _measure(
    run: Run,
    case: str,
    folder: Path,
    shape_zyx: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
) -> None:
    dataset = _phantoms(folder, 4 if run.is_tiny else NUM_SCANS, shape_zyx, spacing_mm)
    encoder = RandomLayer()

    def probe(threads: int) -> Callable[[], Evaluation]:
        def call() -> Evaluation:
            torch.set_num_threads(threads)
            return evaluate(dataset, [encoder], out=folder / "out", folds=5)

        return call

    variants = {f"tapct probe, {threads} threads": probe(threads) for threads in (1, 2)}
    first = probe(2)()
    times = {}
    for name, call in variants.items():
        began = time.perf_counter()
        again = call()
        # A call takes half a minute: one is all.
        times[name] = [round((time.perf_counter() - began) * 1e3, 4)] * 3
        if again.num_encoded or again.results[0].scores != first.results[0].scores:
            raise ValueError("a second probe encodes again, or scores otherwise")
    cached = (folder / "out" / "cache").rglob("*.safetensors")
    run.write(
        case,
        "cpu",
        times,
        bytes=sum(path.stat().st_size for path in cached),
        verified="nothing encoded, equal scores",
        calls=1,
    )


def _phantoms(
    folder: Path,
    num: int,
    shape_zyx: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
) -> Dataset:
    merged = [LABEL_NAMES.index(name) for name in MERGED]
    cases = []
    for i in range(num):
        phantom = make_phantom(7, i, shape_zyx=shape_zyx, spacing_mm=spacing_mm)
        scan, labels = folder / f"scan-{i}.nii.gz", folder / f"labels-{i}.nii.gz"
        labels_ZYX = np.where(np.isin(phantom.labels_ZYX, merged), 0, phantom.labels_ZYX)
        write_nifti(scan, phantom.volume.hu_ZYX, phantom.volume.affine)
        write_nifti(labels, labels_ZYX.astype(np.uint8), phantom.volume.affine)
        cases.append(Case(scan=scan, labels=labels, patient=str(i)))
    return Dataset(cases=tuple(cases))


if __name__ == "__main__":
    main()

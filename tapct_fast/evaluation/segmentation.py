"""Segmentation by a small decoder on frozen patch tokens: fit, apply, keep, score fold by fold.

The linear decoder is the convex head of ``downstream.probe`` with trilinear upsampling, as in
TAP-CT's protocol as far as that is public; ``conv`` is that of ``conv_decoder``. Each fold is
computed by one thread, so that the number of threads changes no bit; folds run beside each other.

Shape suffixes: N rows, L tokens, D width, K classes, S scans, Z Y X label voxels.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from tapct_fast.downstream.dice import confusion_matrix, dice_of
from tapct_fast.downstream.features import Features
from tapct_fast.downstream.probe import LINEAR_TOKENS, LinearHead, fit_linear_head
from tapct_fast.downstream.resample import LabelledTokens, classify_voxels, labelled_tokens
from tapct_fast.errors import FormatError, InputError
from tapct_fast.evaluation.conv_decoder import fit_conv_head
from tapct_fast.evaluation.splits import Fold
from tapct_fast.evaluation.surface import surface_scores
from tapct_fast.io.atomic import read_json, read_limited, write_atomic, write_json
from tapct_fast.io.volume import Volume

Decoder = Literal["linear", "conv"]
DECODERS: tuple[Decoder, ...] = ("linear", "conv")
Floats = NDArray[np.float64]

FORMAT, VERSION = "tapct-probe-head", 1
MAX_HEAD_BYTES = 1 << 28  # a head of 1000 classes at width 4096 is a sixteenth of this
TOLERANCE_MM = 2.0
MAX_THREADS = 8  # each holds the features of a scan, and a fold's tokens twice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentationHead:
    """A fitted linear decoder.

    Attributes:
        linear: The layer.
        label_names: One per class; class 0 is background.
        label_values: The value of each class in the label maps it was fitted on.
        encoder: Name of the encoder whose tokens it takes.
        fingerprint: Of that encoder; other tokens mean nothing to the head.
    """

    linear: LinearHead
    label_names: tuple[str, ...]
    label_values: tuple[int, ...]
    encoder: str
    fingerprint: str


def apply_head(head: SegmentationHead, features: Features, like: Volume) -> NDArray[np.int16]:
    """Segment a scan from its features.

    Args:
        head: From ``load_head``.
        features: Of the encoder that the head was fitted on.
        like: Of this volume only the grid is used: that of the scan, or any other.

    Returns:
        Class numbers ZYX on that grid, indices into ``head.label_names``; scores are interpolated
        trilinearly between token centres.

    Raises:
        InputError: The features have another width.
    """
    width, num_channels = features.patches_ZYXC.shape[-1], len(head.linear.weight_DK)
    if width != num_channels:
        raise InputError(
            f"the head takes tokens of width {num_channels}, these have {width}; give the features "
            f"of the encoder that it was fitted on ({head.encoder})"
        )
    scores_LK = head.linear(features.patches_ZYXC.flatten(0, 2))
    return classify_voxels(scores_LK, features, like).astype(np.int16)


def save_head(head: SegmentationHead, path: Path) -> None:
    """Write ``path`` (.safetensors) and beside it a .json with labels, encoder and a sha256.

    Raises:
        InputError: The name does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise InputError("a head is written as .safetensors; name the file so")
    data = tensor_bytes({f.name: getattr(head.linear, f.name) for f in fields(LinearHead)})
    write_atomic(path, data)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": head.encoder,
        "fingerprint": head.fingerprint,
        "label_names": list(head.label_names),
        "label_values": list(head.label_values),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(path.with_suffix(".json"), record)


def load_head(path: Path) -> SegmentationHead:
    """Read what ``save_head`` wrote and verify it.

    Raises:
        FormatError: A file is missing, damaged or of another version.
    """
    record = read_json(path.with_suffix(".json"), "probe head")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FormatError("probe head", "the .json is not that of a head; see tapct-fast probe")
    if record.get("version") != VERSION:
        raise FormatError("probe head", f"version {record.get('version')}, this reads {VERSION}")
    data = read_limited(path, "probe head", limit=MAX_HEAD_BYTES)
    try:
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise FormatError("probe head", "sha256 differs, the file is damaged; probe again")
        linear = LinearHead(**load_tensors(data))
        head = SegmentationHead(
            linear=linear,
            label_names=tuple(map(str, record["label_names"])),
            label_values=tuple(map(int, record["label_values"])),
            encoder=str(record["encoder"]),
            fingerprint=str(record["fingerprint"]),
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError("probe head", "damaged record; probe again") from None
    width, num_classes = linear.weight_DK.shape if linear.weight_DK.ndim == 2 else (0, 0)
    shapes = [(num_classes,), (width,), (width,)]
    vectors = (linear.bias_K, linear.mean_D, linear.std_D)
    if [tuple(t.shape) for t in vectors] != shapes or not (
        len(head.label_names) == len(head.label_values) == num_classes
    ):
        raise FormatError("probe head", "its tensors do not fit together; probe again")
    return head


class SegmentationScores(NamedTuple):
    """Held-out scans, in ascending order; NaN where the true label map lacks the class."""

    cases: tuple[int, ...]
    dice_SK: Floats
    nsd_SK: Floats  # surface Dice within TOLERANCE_MM
    hd95_mm_SK: Floats
    everything: LinearHead | None  # of the linear decoder: fitted on all scans, for pictures


def score_segmentation(
    features_of: Callable[[int], Features],
    labels_of: Callable[[int], Volume],
    folds: Sequence[Fold],
    *,
    num_classes: int,
    decoder: Decoder = "linear",
    seed: int = 0,
) -> SegmentationScores:
    """Fit a decoder on the training scans of each fold and score it on its test scans.

    Every training scan of a fold gives the same number of tokens at most, 65536 in all. Features
    and label maps are read scan by scan: memory does not grow with them.

    Args:
        features_of: Reads the features of a case.
        labels_of: Reads its label map; voxels are class numbers, 0 for background.
        folds: Checked for leakage.
        num_classes: Including background.
        decoder: ``linear`` or ``conv``.
        seed: Draws tokens, and the start and the crops of ``conv``.

    Raises:
        InputError: A label map has other values or lies outside its scan; named by position.
    """
    used = sorted({i for fold in folds for i in (*fold.train, *fold.test)})
    fitted_on = {i for fold in folds for i in fold.train}
    fewest = min(len(fold.train) for fold in folds)
    num_threads = min(torch.get_num_threads(), MAX_THREADS)
    with one_thread(), ThreadPoolExecutor(num_threads, "probe") as pool:

        def table(case: int) -> LabelledTokens:
            try:
                tokens = labelled_tokens(features_of(case), labels_of(case), num_classes)
            except InputError as error:
                raise InputError(f"label map of scan {case + 1}: {error}") from None
            most = LINEAR_TOKENS // (fewest if case in fitted_on else len(used))
            return _drawn(tokens, max(1, most), [seed, case])

        tables = dict(zip(used, pool.map(table, used), strict=True))

        def pooled(cases: Sequence[int]) -> LabelledTokens:
            most = max(1, LINEAR_TOKENS // len(cases))
            kept = [_drawn(tables[i], most, [seed, i]) for i in cases]
            return LabelledTokens(
                torch.cat([t.x_LD for t in kept]), torch.cat([t.share_LK for t in kept])
            )

        def fit(cases: Sequence[int]) -> Callable[[Features], Tensor]:
            x_ND, share_NK = pooled(cases)
            if decoder == "conv":
                return fit_conv_head(x_ND, share_NK, cases, features_of, labels_of, seed=seed)
            linear = fit_linear_head(x_ND, share_NK)
            return lambda features: linear(features.patches_ZYXC.flatten(0, 2))

        def score_fold(fold: Fold) -> dict[int, list[Floats]]:
            head = fit(fold.train)
            scores = {}
            for i in fold.test:
                features, truth = features_of(i), labels_of(i)
                predicted_ZYX = classify_voxels(head(features), features, truth)
                scores[i] = _score(truth, predicted_ZYX, num_classes)
            return scores

        def fit_everything() -> LinearHead | None:
            if decoder != "linear":
                return None
            return fit_linear_head(*pooled(used))

        everything = pool.submit(fit_everything)
        by_case = {i: row for fold in pool.map(score_fold, folds) for i, row in fold.items()}
        cases = tuple(i for i in used if i in by_case)
        dice_SK, nsd_SK, hd95_SK = (np.stack([by_case[i][m] for i in cases]) for m in range(3))
        return SegmentationScores(cases, dice_SK, nsd_SK, hd95_SK, everything.result())


def _drawn(tokens: LabelledTokens, most: int, seed: Sequence[int]) -> LabelledTokens:
    """Keep ``most`` rows, drawn by the seed, in their order."""
    num = len(tokens.x_LD)
    if num <= most:
        return tokens
    keep = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(num)[:most]))
    return LabelledTokens(tokens.x_LD[keep], tokens.share_LK[keep])


def _score(truth: Volume, predicted_ZYX: NDArray[Any], num_classes: int) -> list[Floats]:
    confusion_KK = confusion_matrix(truth.hu_ZYX, predicted_ZYX, num_classes)
    surface = surface_scores(
        truth.hu_ZYX, predicted_ZYX, truth.spacing_mm, num_classes, tolerance_mm=TOLERANCE_MM
    )
    return [dice_of(confusion_KK), surface.nsd_K, surface.hd95_mm_K]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute each operation in one thread: how a sum is split changes its bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

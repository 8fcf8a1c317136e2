"""Decoders on frozen tokens: scores against the probe they come from, files, threads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tapct_fast.downstream.features import Features
from tapct_fast.downstream.probe import linear_segmentation
from tapct_fast.downstream.resample import labelled_tokens
from tapct_fast.errors import FormatError, InputError
from tapct_fast.evaluation import segmentation
from tapct_fast.evaluation.segmentation import (
    SegmentationHead,
    apply_head,
    load_head,
    save_head,
    score_segmentation,
)
from tapct_fast.evaluation.splits import Fold, patient_folds
from tapct_fast.evaluation.surface import surface_scores
from tapct_fast.io.volume import Volume

GRID = (4, 9, 8)
NUM_CLASSES = 3


def toy(seed: int) -> tuple[Features, Volume]:
    """Blocks of two classes in background, told by one direction each in noise of 12 channels."""
    rng = np.random.default_rng(seed)
    classes_ZYX = np.zeros(GRID, np.int64)
    y, x = rng.integers(1, 4, 2)
    classes_ZYX[1:3, y : y + 4, x : x + 2] = 1
    classes_ZYX[:2, y : y + 3, x + 2 : x + 4] = 2
    code_KD = np.random.default_rng(99).normal(size=(NUM_CLASSES, 12)) * 2
    tokens = rng.normal(size=(*GRID, 12)) * 0.5 + code_KD[classes_ZYX]
    affine = np.diag([-8.0, -8.0, 12.0, 1.0])
    voxels = np.diag([-2.0, -2.0, 4.0, 1.0])
    voxels[:3, 3] = [3.0, 3.0, -4.0]  # 3 x 4 x 4 voxels share a token's place
    labels = classes_ZYX.repeat(3, 0).repeat(4, 1).repeat(4, 2).astype(np.int16)
    features = Features(
        torch.from_numpy(tokens).float(),
        affine,
        (12.0, 8.0, 8.0),
        torch.zeros(1, 12),
        torch.ones(12),
    )
    return features, Volume(np.ascontiguousarray(labels), (4.0, 2.0, 2.0), voxels)


SCANS = [toy(seed) for seed in range(6)]
FOLDS = patient_folds(list("abcdef"), folds=3, seed=0)


def scored(decoder: segmentation.Decoder, seed: int = 0) -> segmentation.SegmentationScores:
    return score_segmentation(
        lambda i: SCANS[i][0],
        lambda i: SCANS[i][1],
        FOLDS,
        num_classes=NUM_CLASSES,
        decoder=decoder,
        seed=seed,
    )


def test_the_linear_decoder_is_the_probe_fold_by_fold() -> None:
    scores = scored("linear")
    assert scores.cases == tuple(range(6))
    for fold in FOLDS:
        expected = linear_segmentation(
            [SCANS[i] for i in fold.train], [SCANS[i] for i in fold.test], num_classes=NUM_CLASSES
        )
        np.testing.assert_array_equal(scores.dice_SK[list(fold.test)], expected.dice_SK)
    assert np.nanmean(scores.dice_SK[:, 1:]) > 0.8


def test_surface_scores_are_those_of_the_predicted_map() -> None:
    folds = [Fold((0, 1, 2, 3), (4,))]
    scores = score_segmentation(
        lambda i: SCANS[i][0], lambda i: SCANS[i][1], folds, num_classes=NUM_CLASSES
    )
    tables = [labelled_tokens(*SCANS[i], NUM_CLASSES) for i in range(4)]
    linear = segmentation.fit_linear_head(
        torch.cat([t.x_LD for t in tables]), torch.cat([t.share_LK for t in tables])
    )
    head = SegmentationHead(
        linear=linear,
        label_names=("0", "a", "b"),
        label_values=(0, 1, 2),
        encoder="e",
        fingerprint="",
    )
    features, truth = SCANS[4]
    predicted_ZYX = apply_head(head, features, truth)
    expected = surface_scores(truth.hu_ZYX, predicted_ZYX, truth.spacing_mm, NUM_CLASSES)
    np.testing.assert_array_equal(scores.nsd_SK[0], expected.nsd_K)
    np.testing.assert_array_equal(scores.hd95_mm_SK[0], expected.hd95_mm_K)


def test_the_conv_decoder_learns_and_follows_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapct_fast.evaluation.conv_decoder.STEPS", 40)
    scores = scored("conv")
    assert np.nanmean(scores.dice_SK[:, 1:]) > 0.8
    assert scores.everything is None
    np.testing.assert_array_equal(scores.dice_SK, scored("conv").dice_SK)
    assert not np.array_equal(scores.dice_SK, scored("conv", seed=1).dice_SK)


@pytest.mark.parametrize("decoder", ["linear", "conv"])
def test_the_number_of_threads_changes_no_bit(
    decoder: segmentation.Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapct_fast.evaluation.conv_decoder.STEPS", 8)
    one = scored(decoder)
    torch.set_num_threads(2)
    try:
        two = scored(decoder)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(two.dice_SK, one.dice_SK)
    np.testing.assert_array_equal(two.hd95_mm_SK, one.hd95_mm_SK)
    if one.everything is not None and two.everything is not None:
        assert torch.equal(two.everything.weight_DK, one.everything.weight_DK)


def test_each_scan_gives_its_share_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "LINEAR_TOKENS", 400)  # 4 training scans of 288 tokens
    rows: list[int] = []
    fit = segmentation.fit_linear_head

    def counted(x_ND: torch.Tensor, share_NK: torch.Tensor) -> object:
        rows.append(len(x_ND))
        return fit(x_ND, share_NK)

    monkeypatch.setattr(segmentation, "fit_linear_head", counted)
    scores = scored("linear")
    assert sorted(rows) == [6 * 66, 400, 400, 400]
    assert np.nanmean(scores.dice_SK[:, 1:]) > 0.7
    np.testing.assert_array_equal(scores.dice_SK, scored("linear").dice_SK)


def test_folds_of_unequal_size_hold_to_the_bound_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segmentation, "LINEAR_TOKENS", 400)
    rows: list[int] = []
    fit = segmentation.fit_linear_head

    def counted(x_ND: torch.Tensor, share_NK: torch.Tensor) -> object:
        rows.append(len(x_ND))
        return fit(x_ND, share_NK)

    monkeypatch.setattr(segmentation, "fit_linear_head", counted)
    folds = [Fold((0,), (1, 2, 3, 4)), Fold((1, 2, 3, 4, 5), (0,))]
    score_segmentation(lambda i: SCANS[i][0], lambda i: SCANS[i][1], folds, num_classes=NUM_CLASSES)
    assert sorted(rows) == [288, 6 * 66, 5 * 80]  # one scan has 288 tokens


def test_a_wrong_label_map_is_named_by_its_position() -> None:
    labels = SCANS[2][1]
    far = labels.affine.copy()
    far[:3, 3] += 5000
    wrong = Volume(labels.hu_ZYX, labels.spacing_mm, far)
    with pytest.raises(InputError, match="label map of scan 3: it lies outside"):
        score_segmentation(
            lambda i: SCANS[i][0],
            lambda i: wrong if i == 2 else SCANS[i][1],
            [Fold((0, 1), (2,))],
            num_classes=NUM_CLASSES,
        )


def head_of(scores: segmentation.SegmentationScores) -> SegmentationHead:
    assert scores.everything is not None
    return SegmentationHead(
        linear=scores.everything,
        label_names=("background", "a", "b"),
        label_values=(0, 5, 7),
        encoder="toy",
        fingerprint="f" * 64,
    )


def test_a_head_is_kept_and_segments_on_any_grid(tmp_path: Path) -> None:
    head = head_of(scored("linear"))
    save_head(head, tmp_path / "toy.safetensors")
    loaded = load_head(tmp_path / "toy.safetensors")
    assert (loaded.label_names, loaded.label_values) == (head.label_names, head.label_values)
    assert (loaded.encoder, loaded.fingerprint) == ("toy", "f" * 64)
    features, truth = toy(20)
    found_ZYX = apply_head(loaded, features, truth)
    assert found_ZYX.dtype == np.int16
    np.testing.assert_array_equal(found_ZYX, apply_head(head, features, truth))
    at_tokens = Volume(np.zeros(GRID, np.int16), features.spacing_mm, features.affine)
    hits = apply_head(loaded, features, at_tokens) == truth.hu_ZYX[1::3, 1::4, 1::4]
    assert hits.mean() > 0.98
    narrow = Features(
        features.patches_ZYXC[..., :5],
        *[getattr(features, n) for n in ("affine", "spacing_mm", "cls_ND", "pooled_D")],
    )
    with pytest.raises(InputError, match="takes tokens of width 12, these have 5"):
        apply_head(loaded, narrow, truth)


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    with pytest.raises(InputError, match=r"\.safetensors"):
        save_head(head_of(scored("linear")), tmp_path / "toy.bin")
    save_head(head_of(scored("linear")), path)
    record = json.loads(path.with_suffix(".json").read_text())
    data = path.read_bytes()

    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FormatError, match="sha256 differs"):
        load_head(path)
    path.unlink()
    with pytest.raises(FormatError, match=r"there is no toy\.safetensors"):
        load_head(path)

    path.write_bytes(data)
    for change, message in (
        ({"version": 9}, "version 9"),
        ({"format": "other"}, "not that of a head"),
        ({"label_names": ["a"]}, "do not fit"),
        ({"label_values": ["x"]}, "damaged record"),
    ):
        path.with_suffix(".json").write_text(json.dumps({**record, **change}))
        with pytest.raises(FormatError, match=message):
            load_head(path)

    tensors = load_file(path)
    save_file({**tensors, "weight_DK": tensors["weight_DK"][:, :2].contiguous()}, path)
    digest = segmentation.hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({**record, "sha256": digest}))
    with pytest.raises(FormatError, match="do not fit together"):
        load_head(path)

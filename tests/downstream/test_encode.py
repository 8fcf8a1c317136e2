"""The window engine beyond what test_embed holds to a formula. Z Y X tokens, D width."""

from typing import Any

import numpy as np
import pytest
import torch

from tapct_fast.backbone.backbone import Backbone, BackboneOutput
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.downstream import encode
from tapct_fast.downstream.encode import embed_volume, encode_scan
from tapct_fast.errors import InputError
from tapct_fast.io.volume import Volume


def make_volume(*shape_zyx: int) -> Volume:
    hu_ZYX = np.random.default_rng(0).integers(-1000, 800, shape_zyx).astype(np.int16)
    return Volume(hu_ZYX, (5.0, 0.8, 0.7), np.diag([-0.7, -0.8, 5.0, 1.0]))


def fail_above(monkeypatch: pytest.MonkeyPatch, most: int, error: RuntimeError) -> list[int]:
    """Let memory run out in batches of more than ``most`` windows; return the sizes tried."""
    sizes: list[int] = []
    forward = Backbone.forward

    def limited(self: Backbone, pixel_values: torch.Tensor, **words: Any) -> BackboneOutput:
        sizes.append(len(pixel_values))
        if len(pixel_values) > most:
            raise error
        return forward(self, pixel_values, **words)

    monkeypatch.setattr(Backbone, "forward", limited)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    volume = make_volume(50, 30, 40)
    expected = embed_volume(backbone, volume, batch_size=1)
    sizes = fail_above(monkeypatch, 2, error)
    found = embed_volume(backbone, volume, batch_size=8)
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[3:]) == 2  # not tried again
    torch.testing.assert_close(found.patches_ZYXC, expected.patches_ZYXC, atol=1e-4, rtol=1e-4)
    assert len(found.cls_ND) == len(expected.cls_ND)


def test_a_window_that_does_not_fit_and_other_errors_are_raised(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_above(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        embed_volume(backbone, make_volume(20, 30, 40), batch_size=2)
    monkeypatch.undo()
    sizes = fail_above(monkeypatch, 0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        embed_volume(backbone, make_volume(20, 30, 40), batch_size=2)
    assert sizes == [2]


def test_all_slices_go_in_one_pass(backbone: Backbone) -> None:
    volume = make_volume(30, 64, 64)
    features = embed_volume(backbone, volume, window_slices="all")
    with torch.no_grad():
        out = backbone(backbone.preprocess.apply(volume), reshape=True)
    assert len(features.cls_ND) == 1
    torch.testing.assert_close(
        features.patches_ZYXC.permute(3, 0, 1, 2), out.last_hidden_state[0], atol=1e-5, rtol=1e-5
    )


def test_a_resized_scan_is_resized_slab_by_slab(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = make_volume(33, 90, 70)
    expected = backbone.preprocess.apply(volume)[0]
    monkeypatch.setattr(encode, "_SLAB", 7)  # rounded up to whole patches
    assert torch.equal(encode._pixels_CZYX(backbone, volume), expected)


def test_without_overlap_every_slice_is_encoded_once(backbone: Backbone) -> None:
    volume = make_volume(48, 30, 40)
    cheap = embed_volume(backbone, volume, overlap=0.0)
    assert len(cheap.cls_ND) == 4
    uniform = embed_volume(backbone, volume, overlap=0.0, blending="uniform")
    torch.testing.assert_close(cheap.patches_ZYXC, uniform.patches_ZYXC)
    overlapped = embed_volume(backbone, volume, overlap=0.5, blending="uniform")
    assert not torch.allclose(overlapped.patches_ZYXC, cheap.patches_ZYXC)
    with pytest.raises(InputError, match="blending='mean'"):
        embed_volume(backbone, volume, blending="mean")  # type: ignore[arg-type]


def test_a_scan_becomes_a_bag_and_its_poolings(backbone: Backbone) -> None:
    volume = make_volume(40, 30, 40)
    vectors = encode_scan(backbone, volume)
    features = embed_volume(backbone, volume)
    assert torch.equal(vectors.cls_ND, features.cls_ND)
    torch.testing.assert_close(vectors.mean_D, vectors.cls_ND.double().mean(0).float())
    torch.testing.assert_close(
        vectors.std_D.double(), vectors.cls_ND.double().var(0, correction=0).sqrt()
    )
    assert torch.equal(vectors.max_D, vectors.cls_ND.amax(0))
    assert vectors.pooled("mean").shape == (64,)
    assert torch.equal(
        vectors.pooled("mean+std+max"), torch.cat([vectors.mean_D, vectors.std_D, vectors.max_D])
    )
    assert encode_scan(backbone, make_volume(4, 30, 40)).std_D.eq(0).all()
    with pytest.raises(InputError, match="median"):
        vectors.pooled("median")  # type: ignore[arg-type]


def test_stopping_early_gives_the_features_of_that_block(backbone: Backbone) -> None:
    volume = make_volume(8, 64, 64)
    features = embed_volume(backbone, volume, num_blocks=1)
    with torch.no_grad():
        out = backbone(backbone.preprocess.apply(volume), reshape=True, num_blocks=1)
    torch.testing.assert_close(
        features.patches_ZYXC.permute(3, 0, 1, 2), out.last_hidden_state[0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("window_slices", [0, 6, -4, "whole"])
def test_a_window_depth_that_cannot_be_is_named(backbone: Backbone, window_slices: Any) -> None:
    with pytest.raises(InputError, match=f"window_slices={window_slices} .*nor 'all'"):
        embed_volume(backbone, make_volume(20, 30, 40), window_slices=window_slices)


def test_the_batch_follows_free_memory(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = encode._plan(backbone, make_volume(20, 30, 40), None, 0.5)
    each = (3 * 8 * 8 + 5) * 64 * encode._BYTES_PER_VALUE
    for free, expected in ((0, 1), (2 * each / 0.6 + 9, 2), (1e12, 4)):
        monkeypatch.setattr(encode, "free_host_bytes", lambda free=free: int(free))
        assert encode._windows_that_fit(backbone, plan) == expected


def test_native_resolution_stays_int16_until_it_is_embedded(backbone: Backbone) -> None:
    native = Backbone(backbone.vit, Preprocess(resize_yx=None), precision="fp32")
    assert encode._pixels_CZYX(native, make_volume(5, 60, 61)).dtype == torch.int16

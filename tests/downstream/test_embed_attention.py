"""Attention over windows: blended as the features are, beside a plain loop over the windows."""

import numpy as np
import torch

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.cls_attention import forward_with_attention
from tapct_fast.downstream.encode import embed_volume, embed_with_attention
from tapct_fast.io.volume import Volume


def make_volume(num_slices: int) -> Volume:
    hu_ZYX = np.random.default_rng(5).integers(-900, 600, (num_slices, 64, 64)).astype(np.int16)
    return Volume(hu_ZYX, (3.0, 1.0, 1.0), np.diag([-1.0, -1.0, 3.0, 1.0]))


def test_features_are_those_without_attention(backbone: Backbone) -> None:
    volume = make_volume(30)
    features, attention_ZYXH = embed_with_attention(backbone, volume, batch_size=2)
    plain = embed_volume(backbone, volume, batch_size=2)
    torch.testing.assert_close(features.patches_ZYXC, plain.patches_ZYXC)
    torch.testing.assert_close(features.cls_ND, plain.cls_ND)
    assert np.array_equal(features.affine, plain.affine)
    assert attention_ZYXH.shape == (*plain.patches_ZYXC.shape[:3], 1)


def test_windows_are_blended_and_one_is_an_even_share(backbone: Backbone) -> None:
    volume = make_volume(24)  # 6 tokens deep; windows of 3 that move by one
    _, attention_ZYXH = embed_with_attention(backbone, volume, batch_size=1)
    pixels = backbone.preprocess.apply(volume)
    sums, weights = np.zeros((6, 8, 8)), np.zeros((6, 1, 1))
    num_tokens = 1 + 1 + 3 * 8 * 8
    for start in range(4):
        window = pixels[:, :, 4 * start : 4 * start + 12]
        _, attention_BHL = forward_with_attention(backbone, window)
        assert float(attention_BHL.sum()) < 1
        share = attention_BHL[0, 0].reshape(3, 8, 8).numpy() * num_tokens
        # The weight in plane is the same for all windows, and cancels.
        weight = np.exp(-0.5 * ((np.arange(3) - 1) / (0.125 * 3)) ** 2)[:, None, None]
        sums[start : start + 3] += weight * share
        weights[start : start + 3] += weight
    np.testing.assert_allclose(attention_ZYXH[..., 0].numpy(), sums / weights, rtol=1e-4)

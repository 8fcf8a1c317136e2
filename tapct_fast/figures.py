"""Slices of a scan beside its features: principal components as colours, labels as overlays.

Shape suffixes: Z Y X voxels, N tokens, C channels (features, or red, green, blue).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.downstream.features import Features
from tapct_fast.io.volume import Volume
from tapct_fast.report import Figure, Panel, Pixels, Rgb

WINDOW = (20.0, 500.0)  # HU, centre and width: soft tissue, with fat well above black
AIR_HU = -950.0  # lung lies above, at about -800
RANGE_PERCENT = (1.0, 99.0)  # of the tokens; what lies beyond is clipped
PANELS_PER_ROW = 4
LEVELS = (0.27, 0.62)  # of the height: through the abdomen and the chest of a torso
FRONTAL = 0.52  # of the depth from front to back


class Shown(NamedTuple):
    """A scan to show; labels and prediction lie on its own grid and may be absent."""

    volume: Volume
    features: Features
    labels_ZYX: NDArray[np.int16] | None = None
    predicted_ZYX: NDArray[np.int16] | None = None


class FeatureColors(NamedTuple):
    """Maps a feature vector to red, green and blue by three principal components."""

    mean_C: NDArray[np.float32]
    axes_C3: NDArray[np.float32]
    low_3: NDArray[np.float32]
    high_3: NDArray[np.float32]

    def scores(self, features: Features) -> NDArray[np.float32]:
        """Return the three components of every token, (Z, Y, X, 3)."""
        scores_ZYX3: NDArray[np.float32] = (features.patches_ZYXC.numpy() - self.mean_C) @ (
            self.axes_C3
        )
        return scores_ZYX3

    def paint(self, scan: Shown) -> Pixels:
        """Return the colours of every token, (Z, Y, X, 3) uint8; tokens in air are black."""
        return self.paint_tokens(scan.features, is_air(scan))

    def paint_tokens(self, features: Features, is_air_ZYX: NDArray[np.bool_]) -> Pixels:
        """Do the same where the tokens in air are known."""
        unit_ZYX3 = (self.scores(features) - self.low_3) / (self.high_3 - self.low_3)
        # From 40: what is not air stays apart from black.
        colors_ZYX3: Pixels = np.rint(40 + 215 * np.clip(unit_ZYX3, 0, 1)).astype(np.uint8)
        colors_ZYX3[is_air_ZYX] = 0
        return colors_ZYX3


def fit_colors(scans: Sequence[Shown]) -> FeatureColors:
    """Fit the first three principal components of the tokens of all scans, those in air left out.

    Air is most of a scan: with it, the first component would only tell body from air.
    """
    tokens_NC = np.concatenate([s.features.patches_ZYXC.numpy()[~is_air(s)] for s in scans])
    mean_C = tokens_NC.mean(0)
    centred_NC = tokens_NC - mean_C
    _, axes_CC = np.linalg.eigh(centred_NC.T @ centred_NC)  # ascending
    axes_C3 = axes_CC[:, :-4:-1]
    # The sign of an axis is arbitrary: let its largest entry be positive.
    largest_3 = np.take_along_axis(axes_C3, np.abs(axes_C3).argmax(0)[None], axis=0)
    axes_C3 = axes_C3 * np.sign(largest_3)
    low_3, high_3 = np.percentile(centred_NC @ axes_C3, RANGE_PERCENT, axis=0)
    high_3 = np.maximum(high_3, low_3 + 1e-6)
    return FeatureColors(*(np.asarray(a, np.float32) for a in (mean_C, axes_C3, low_3, high_3)))


def is_air(scan: Shown) -> NDArray[np.bool_]:
    """Say of each token, (Z, Y, X), whether the voxels nearest to it are air on average."""
    grid_zyx = scan.features.patches_ZYXC.shape[:3]
    near = nearest_tokens(scan.volume, scan.features)
    # Plane by plane, so that a large scan is not copied: voxels are summed by 0/1 matrices.
    onto_y, onto_x = (
        np.equal.outer(np.arange(grid_zyx[axis]), near[axis]).astype(np.float32) for axis in (1, 2)
    )
    sum_ZYX = np.zeros(grid_zyx)
    for token_z, hu_YX in zip(near[0], scan.volume.hu_ZYX, strict=True):
        sum_ZYX[token_z] += onto_y @ (hu_YX.astype(np.float32) @ onto_x.T)
    count_z, count_y, count_x = (
        np.bincount(tokens, minlength=size) for tokens, size in zip(near, grid_zyx, strict=True)
    )
    count_ZYX = np.multiply.outer(np.outer(count_z, count_y), count_x)
    is_air_ZYX: NDArray[np.bool_] = sum_ZYX / np.maximum(count_ZYX, 1) < AIR_HU
    return is_air_ZYX


def paint_ct(
    hu_YX: NDArray[np.int16], *, center: float = WINDOW[0], width: float = WINDOW[1]
) -> Pixels:
    """Map HU through a window to grey; returns (Y, X, 3) uint8."""
    low = center - width / 2
    grey_YX = np.clip((hu_YX.astype(np.float32) - low) * (255 / width), 0, 255).astype(np.uint8)
    return np.repeat(grey_YX[..., None], 3, axis=-1)


def paint_labels(rgb_YXC: Pixels, labels_YX: NDArray[np.int16], colors: Sequence[Rgb]) -> Pixels:
    """Lay label colours over a picture; label 0 stays clear."""
    color_YXC = np.asarray(colors, np.float32)[labels_YX]
    mixed_YXC = 0.35 * rgb_YXC + 0.65 * color_YXC
    return np.where(labels_YX[..., None] > 0, mixed_YXC, rgb_YXC).astype(np.uint8)


def scan_figure(
    title: str, shown: Shown, feature_colors: FeatureColors, label_colors: Sequence[Rgb]
) -> Figure:
    """Cut two axial planes and a frontal one, each as CT, features and, where given, labels."""
    volume = shown.volume
    tokens_ZYXC = feature_colors.paint(shown)
    near = nearest_tokens(volume, shown.features)
    num_z, num_y, _ = volume.hu_ZYX.shape
    cuts = [("axial", 0, round(level * (num_z - 1))) for level in LEVELS]
    cuts.append(("frontal", 1, round(FRONTAL * (num_y - 1))))
    panels = []
    for name, axis, at in cuts:
        rows, columns = (a for a in range(3) if a != axis)
        height, width = (volume.hu_ZYX.shape[a] * volume.spacing_mm[a] for a in (rows, columns))
        grey = paint_ct(_cut(volume.hu_ZYX, axis, at))
        token_plane = np.take(tokens_ZYXC, near[axis][at], axis=axis)[near[rows]][:, near[columns]]
        pictures = [("CT", grey), ("features", token_plane if axis == 0 else token_plane[::-1])]
        for kind, labels_ZYX in (("labels", shown.labels_ZYX), ("probe", shown.predicted_ZYX)):
            if labels_ZYX is not None:
                pictures.append(
                    (kind, paint_labels(grey, _cut(labels_ZYX, axis, at), label_colors))
                )
        panels += [Panel(f"{name}, {kind}", rgb, (height, width)) for kind, rgb in pictures]
    starts = range(0, len(panels), PANELS_PER_ROW)
    return Figure(title, [panels[start : start + PANELS_PER_ROW] for start in starts])


def _cut(array_ZYX: NDArray[np.int16], axis: int, at: int) -> NDArray[np.int16]:
    """Take an axial (0) or frontal (1) plane, the frontal one with the head on top."""
    return array_ZYX[at] if axis == 0 else array_ZYX[::-1, at]


def nearest_tokens(volume: Volume, features: Features) -> list[NDArray[np.intp]]:
    """Return, along z, y and x, the token nearest to every voxel in world coordinates."""
    # Both grids lie along the scan's own axes, so the map is a scale and a shift per axis.
    to_token = np.linalg.inv(features.affine) @ volume.affine
    assert np.allclose(to_token[:3, :3], np.diag(np.diag(to_token)[:3]), atol=1e-6)
    near = []
    for axis, (count, tokens) in enumerate(
        zip(volume.hu_ZYX.shape, features.patches_ZYXC.shape[:3], strict=True)
    ):
        row = 2 - axis  # affines map x, y, z
        at = to_token[row, row] * np.arange(count) + to_token[row, 3]
        near.append(np.clip(np.rint(at), 0, tokens - 1).astype(np.intp))
    return near

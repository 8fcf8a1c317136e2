"""A scan with everything that is shown of it, and the places at which it is looked at.

Shape suffixes: Z Y X voxels or tokens, H heads, C channels, N tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.config import Zyx
from tapct_fast.downstream.features import Features
from tapct_fast.errors import InputError
from tapct_fast.figures import FeatureColors, Shown, fit_colors, is_air
from tapct_fast.io.atomic import read_json
from tapct_fast.io.body import body_box
from tapct_fast.io.orient import apart_mm
from tapct_fast.io.volume import Volume
from tapct_fast.report import Rgb

MOST_LABELS = 255  # a byte per voxel of the page; 0 is background


class LabelMap(NamedTuple):
    """A segmentation on the scan's voxels; ``names`` may leave labels out."""

    title: str
    labels_ZYX: NDArray[np.int16]
    names: Mapping[int, str] = {}


class TokenGrid(NamedTuple):
    """Where tokens lie: token index t is at voxel ``scale * t + shift`` along each axis."""

    shape_zyx: Zyx
    scale_zyx: NDArray[np.float64]
    shift_zyx: NDArray[np.float64]

    def token_at(self, voxel_zyx: Zyx) -> Zyx:
        """Return the token nearest to a voxel."""
        token_3 = np.rint((np.array(voxel_zyx) - self.shift_zyx) / self.scale_zyx)
        z, y, x = np.clip(token_3, 0, np.array(self.shape_zyx) - 1)
        return int(z), int(y), int(x)


class Scene(NamedTuple):
    """What the page, the pictures and the NIfTI files are made of."""

    volume: Volume
    features: Features
    attention_ZYXH: NDArray[np.float32]  # 1 is an even share
    label_maps: tuple[LabelMap, ...]
    colors: FeatureColors
    is_air_ZYX: NDArray[np.bool_]  # of the tokens
    grid: TokenGrid
    middle_zyx: Zyx  # voxel in the middle of the body
    facts: tuple[tuple[str, str], ...] = ()  # name and value, for the page

    def cosine_to(self, token_zyx: Zyx) -> NDArray[np.float32]:
        """Return the cosine of the angle between one token and each, (Z, Y, X)."""
        tokens_ZYXC = self.features.patches_ZYXC.numpy()
        norm_ZYX = np.maximum(np.linalg.norm(tokens_ZYXC, axis=-1), 1e-12)
        product_ZYX = tokens_ZYXC @ tokens_ZYXC[token_zyx]
        cosine_ZYX: NDArray[np.float32] = product_ZYX / (norm_ZYX * norm_ZYX[token_zyx])
        return cosine_ZYX


def make_scene(
    volume: Volume,
    features: Features,
    attention_ZYXH: NDArray[np.float32],
    label_maps: tuple[LabelMap, ...],
    facts: tuple[tuple[str, str], ...] = (),
) -> Scene:
    """Put a scan and what was made of it together.

    Raises:
        InputError: A label map does not lie on the scan, or has numbers that cannot be shown; or
            the scan is hardly more than air.
    """
    for label_map in label_maps:
        _check_labels(label_map, volume)
    shown = Shown(volume, features)
    is_air_ZYX = is_air(shown)
    if np.count_nonzero(~is_air_ZYX) < 2:
        raise InputError(
            "fewer than two patches hold anything but air: there is nothing to compare; check the "
            "scan's HU"
        )
    # Both grids lie along the scan's own axes: figures.nearest_tokens asserts it.
    to_voxel = np.linalg.inv(volume.affine) @ features.affine
    z, y, x = features.patches_ZYXC.shape[:3]
    scale_zyx, shift_zyx = to_voxel.diagonal()[2::-1], to_voxel[2::-1, 3]
    first_zyx, end_zyx = body_box(volume.hu_ZYX)
    mz, my, mx = ((first + end) // 2 for first, end in zip(first_zyx, end_zyx, strict=True))
    return Scene(
        volume=volume,
        features=features,
        attention_ZYXH=attention_ZYXH,
        label_maps=label_maps,
        colors=fit_colors([shown]),
        is_air_ZYX=is_air_ZYX,
        grid=TokenGrid((z, y, x), scale_zyx, shift_zyx),
        middle_zyx=(mz, my, mx),
        facts=facts,
    )


def label_map_of(
    title: str, labels: Volume, volume: Volume, names: Mapping[int, str] | None = None
) -> LabelMap:
    """Take a label map that was read from a file of its own.

    Raises:
        InputError: It lies elsewhere than the scan.
    """
    if labels.hu_ZYX.shape == volume.hu_ZYX.shape:  # else told with the shapes, by make_scene
        apart = apart_mm(labels.affine, volume.affine, volume.hu_ZYX.shape)
        if apart > 0.5 * min(volume.spacing_mm):
            raise InputError(
                f"{title}: lies up to {apart:.3g} mm off the scan; give the label map of this scan"
            )
    return LabelMap(title, labels.hu_ZYX, names or {})


def _check_labels(label_map: LabelMap, volume: Volume) -> None:
    labels_ZYX, title = label_map.labels_ZYX, label_map.title
    if labels_ZYX.shape != volume.hu_ZYX.shape:
        raise InputError(
            f"{title}: {labels_ZYX.shape} voxels (z, y, x) do not lie on a scan of "
            f"{volume.hu_ZYX.shape}; resample them to the scan's grid first"
        )
    if labels_ZYX.min() < 0:
        raise InputError(f"{title}: label {labels_ZYX.min()} is below 0; 0 is background")
    if np.count_nonzero(np.bincount(labels_ZYX.ravel())[1:]) > MOST_LABELS:
        raise InputError(
            f"{title}: more than {MOST_LABELS} labels cannot be told apart; merge some"
        )


def read_label_names(path: Path) -> dict[int, str]:
    """Read the names of labels: nnU-Net's ``dataset.json``, or an object of number to name.

    Raises:
        FormatError: There is no such file, or it is not JSON.
        InputError: It is neither of the two.
    """
    found = read_json(path, "label names")
    refusal = InputError(
        "--label-names is neither nnU-Net's dataset.json nor an object such as "
        + json.dumps({"1": "liver"})
    )
    if not isinstance(found, dict):
        raise refusal
    pairs = list(found.items())
    if isinstance(found.get("labels"), dict):
        # Old ones map number to name, new ones name to number, or to several in regions.
        pairs = list(found["labels"].items())
        if not all(str(key).isdecimal() for key, _ in pairs):
            pairs = [(value, key) for key, value in pairs]
    if not all(str(key).isdecimal() and isinstance(name, str) for key, name in pairs):
        raise refusal
    return {int(key): name for key, name in pairs}


def label_color(label: int) -> Rgb:
    """Return a colour for a label; the first dozens differ well, and none is dark."""
    # Turns of the golden angle never come close to an earlier one; three tones part neighbours.
    hue = (label * 0.381966) % 1.0
    tone = (1.0, 0.62, 0.8)[label % 3]
    pale = (0.1, 0.5)[(label // 3) % 2]
    r, g, b = (
        tone * (pale + (1 - pale) * min(max(abs((hue + k) % 1.0 * 6 - 3) - 1, 0), 1))
        for k in (0.0, 2 / 3, 1 / 3)
    )
    return round(255 * r), round(255 * g), round(255 * b)

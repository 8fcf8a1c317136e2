"""Synthetic CT of a torso with exact labels. Synthetic: not anatomy.

A phantom is made of ellipsoids under a smooth random warp. It exists to score features, so its
labels come in groups that no threshold on HU can tell apart (``HU_TWINS``): left and right lung,
left and right kidney, fat under the skin and around the organs, muscle, heart and bowel, liver and
spleen. Twins differ in place; liver and spleen differ in texture too. Theirs is a Gaussian field
mapped by rank onto one normal law after all filtering, so that the HU of a voxel says nothing and
only the size of the grain does. The grain is stronger than in a real portal-phase scan.

Shape letters: Z Y X voxels, N values, K knots. Body coordinates: left and posterior in half widths
of the torso, superior in units of 100 mm.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.data.rng import generator
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.volume import Volume

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Xyz = tuple[float, float, float]

LABEL_NAMES = (
    "background",
    "subcutaneous fat",
    "visceral fat",
    "muscle",
    "bone",
    "left lung",
    "right lung",
    "heart",
    "liver",
    "spleen",
    "left kidney",
    "right kidney",
    "bowel",
)
LABEL = {name: index for index, name in enumerate(LABEL_NAMES)}

# Textbook values, HU, in the order of LABEL_NAMES; equal within a group of HU_TWINS.
MEAN_HU = (-1000, -100, -100, 50, 600, -830, -830, 50, 55, 55, 40, 40, 50)

HU_TWINS = (
    ("left lung", "right lung"),
    ("left kidney", "right kidney"),
    ("liver", "spleen"),
    ("subcutaneous fat", "visceral fat"),
    ("muscle", "heart", "bowel"),
)

GRAIN_HU = 18.0  # standard deviation of the liver's and of the spleen's texture
LIVER_GRAIN_MM = (3.0, 1.8, 1.8)  # z, y, x: fine
SPLEEN_GRAIN_MM = (6.0, 7.0, 7.0)  # coarse
NOISE_HU = 12.0  # standard deviation, as in an abdominal scan of 5 mm slices
NOISE_GRAIN_MM = (1.0, 1.3, 1.3)  # a soft-tissue kernel correlates neighbours in plane
STREAM = 1000  # names the phantoms' random streams, apart from those of a training run
DOMES = 0.42  # distance of the two domes of the diaphragm from the midline


@dataclass(frozen=True, slots=True)
class Phantom:
    """One synthetic scan.

    ``labels_ZYX`` holds int16 indices into ``LABEL_NAMES``, on the grid of ``volume``.
    """

    volume: Volume
    labels_ZYX: NDArray[np.int16]


class _Body(NamedTuple):
    """Warped body coordinates of every voxel."""

    left_ZYX: Floats
    posterior_ZYX: Floats
    superior_ZYX: Floats


def make_phantom(
    seed: int,
    index: int = 0,
    *,
    shape_zyx: tuple[int, int, int] = (48, 120, 160),
    spacing_mm: tuple[float, float, float] = (5.0, 2.2, 2.2),
) -> Phantom:
    """Make phantom ``index`` of the cohort ``seed``; synthetic: not anatomy.

    Args:
        seed: Seed of the cohort.
        index: Number of the case; every case has its own size, pose, shape, texture and noise.
        shape_zyx: Voxels.
        spacing_mm: Voxel size in z, y, x; the default grid spans 240 x 264 x 352 mm.

    Returns:
        Phantom in canonical LPS (x to the patient's left, y to posterior, z to superior).
    """
    rng = generator(seed, STREAM, index)
    body = _draw_body(rng, shape_zyx, spacing_mm)
    labels_ZYX, bone_hu_ZYX = _draw_labels(rng, body, spacing_mm)
    hu_ZYX = _draw_hu(rng, labels_ZYX, bone_hu_ZYX, spacing_mm)
    z, y, x = spacing_mm
    affine = np.diag([-x, -y, z, 1.0])
    affine[:3, 3] = [
        half * (count - 1) / 2 for half, count in zip((x, y, -z), reversed(shape_zyx), strict=True)
    ]
    return Phantom(Volume(hu_ZYX=hu_ZYX, spacing_mm=spacing_mm, affine=affine), labels_ZYX)


def write_phantoms(directory: Path, num: int, seed: int) -> list[tuple[Path, Path]]:
    """Write ``num`` phantoms of the default size as NIfTI.

    Returns:
        For every phantom the path of the scan and the path of its label map.
    """
    scans, labels = directory / "scans", directory / "labels"
    scans.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(num):
        phantom = make_phantom(seed, index)
        pair = scans / f"phantom-{index:03d}.nii.gz", labels / f"phantom-{index:03d}.nii.gz"
        write_nifti(pair[0], phantom.volume.hu_ZYX, phantom.volume.affine)
        write_nifti(pair[1], phantom.labels_ZYX.astype(np.uint8), phantom.volume.affine)
        paths.append(pair)
    return paths


def _field(
    rng: np.random.Generator,
    shape_zyx: tuple[int, ...],
    spacing_mm: tuple[float, float, float],
    grain_mm: tuple[float, float, float],
) -> Floats:
    """Draw a Gaussian field: zero mean, unit variance at every voxel, correlated over ``grain_mm``.

    White noise on knots no further apart than the grain, weighted by a separable Gaussian whose
    rows have unit length: three small matrix products, no border effect.
    """
    weights = []
    for count, spacing, grain in zip(shape_zyx, spacing_mm, grain_mm, strict=True):
        at_N = np.arange(count) * spacing
        knot = np.arange(-3 * grain, at_N[-1] + 3 * grain + spacing, max(grain, spacing))
        if spacing >= grain:
            knot -= knot[0] % spacing  # knots on voxels: no beat between the two grids
        row_NK = np.exp(-0.5 * ((at_N[:, None] - knot) / grain) ** 2)
        weights.append((row_NK / np.linalg.norm(row_NK, axis=1, keepdims=True)).astype(np.float32))
    z_ZK, y_YK, x_XK = weights
    noise = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    rows = y_YK @ (noise @ x_XK.T)
    field: Floats = (z_ZK @ rows.reshape(rows.shape[0], -1)).reshape(shape_zyx)
    return field


def _draw_body(
    rng: np.random.Generator,
    shape_zyx: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
) -> _Body:
    """Draw size, pose and warp of one torso and express every voxel in its coordinates."""
    z, y, x = (
        ((np.arange(n) - (n - 1) / 2) * s).astype(np.float32)
        for n, s in zip(shape_zyx, spacing_mm, strict=True)
    )
    half_width, half_depth = rng.uniform(130, 158), rng.uniform(92, 114)  # mm
    turn, length = (
        rng.uniform(-0.12, 0.12),
        rng.uniform(0.9, 1.1),
    )  # radians about z, factor along z
    x0, y0, z0 = rng.uniform(-12, 12), rng.uniform(-6, 6), rng.uniform(-18, 18)  # mm
    lean = rng.uniform(-0.06, 0.06)  # sideways per unit along z
    x_X, y_Y = x - np.float32(x0), (y - np.float32(y0))[:, None]
    left_YX = np.float32(np.cos(turn)) * x_X + np.float32(np.sin(turn)) * y_Y
    posterior_YX = np.float32(np.cos(turn)) * y_Y - np.float32(np.sin(turn)) * x_X
    height_Z11 = (z - np.float32(z0))[:, None, None]
    warp_mm = (40.0, 45.0, 45.0)  # correlation length
    sway, heave, lift = (
        np.float32(amplitude) * _field(rng, shape_zyx, spacing_mm, warp_mm)
        for amplitude in (4, 4, 5)
    )
    return _Body(
        (left_YX + np.float32(lean) * height_Z11 + sway) / np.float32(half_width),
        (posterior_YX + heave) / np.float32(half_depth),
        ((height_Z11 + lift) / np.float32(100 * length)).astype(np.float32, copy=False),
    )


def _draw_ellipsoid(rng: np.random.Generator, body: _Body, centre: Xyz, radii: Xyz) -> Floats:
    """Return a squared radius that is 1 on the surface of an ellipsoid varied by case."""
    centre_3 = np.array(centre) + rng.normal(0, 0.025, 3)
    radii_3 = np.array(radii) * np.exp(rng.normal(0, 0.07, 3))
    squared: Floats = np.zeros((), np.float32)
    for at, c, r in zip(body, centre_3, radii_3, strict=True):
        squared = squared + np.square((at - np.float32(c)) * np.float32(1 / r))
    return squared


def _draw_labels(
    rng: np.random.Generator, body: _Body, spacing_mm: tuple[float, float, float]
) -> tuple[NDArray[np.int16], Floats]:
    """Paint the organs, the later over the earlier.

    Returns:
        Labels, and HU of bone (cortex denser than marrow), valid where the label is bone.
    """
    left, posterior, superior = body
    # A power of 2.5: between an ellipse and a box, as a torso is.
    radius = np.square(left) * np.sqrt(np.abs(left))
    radius += np.square(posterior) * np.sqrt(np.abs(posterior))
    wall = rng.uniform(0.84, 0.93)  # outside of the muscle wall; what is beyond is fat
    cavity = wall - rng.uniform(0.07, 0.09)
    is_inside = radius < cavity**2.5
    is_thorax = superior > rng.uniform(-0.15, 0.0) - 0.3 * posterior

    def organ(centre: Xyz, radii: Xyz) -> Mask:
        mask: Mask = (_draw_ellipsoid(rng, body, centre, radii) < 1) & is_inside
        return mask

    labels = np.zeros(left.shape, np.int16)
    labels[radius < 1] = LABEL["subcutaneous fat"]
    labels[radius < wall**2.5] = LABEL["muscle"]
    labels[is_inside] = LABEL["visceral fat"]

    bowel = _field(rng, left.shape, spacing_mm, (14.0, 11.0, 11.0)) > 0.1
    labels[bowel & organ((0.0, -0.3, -1.0), (0.68, 0.5, 0.75))] = LABEL["bowel"]

    # Patient left is +: the right dome is the higher one, the liver lies under it.
    right_lift = rng.uniform(0.06, 0.16)
    dome = rng.uniform(0.12, 0.26) - 0.9 * np.square(np.abs(left) - np.float32(DOMES))
    dome -= 0.35 * np.square(posterior + np.float32(0.2)) + np.float32(0.12) * posterior
    dome += np.where(left < 0, np.float32(right_lift), np.float32(0))
    is_above = superior > dome
    liver = organ((-0.42, -0.04, -0.08), (0.48, 0.68, 0.60))
    liver |= organ((-0.02, -0.42, -0.04), (0.46, 0.32, 0.34))
    labels[liver & ~is_above] = LABEL["liver"]
    labels[organ((0.55, 0.18, -0.12), (0.28, 0.48, 0.60)) & ~is_above] = LABEL["spleen"]
    labels[organ((0.37, 0.38, -0.58), (0.19, 0.26, 0.52))] = LABEL["left kidney"]
    labels[organ((-0.37, 0.40, -0.70), (0.19, 0.26, 0.52))] = LABEL["right kidney"]
    labels[organ((0.40, 0.02, 0.45), (0.40, 0.78, 1.30)) & is_above] = LABEL["left lung"]
    labels[organ((-0.40, 0.02, 0.45), (0.40, 0.78, 1.30)) & is_above] = LABEL["right lung"]
    heart = organ((0.14, -0.26, 0.42), (0.36, 0.38, 0.40)) | organ(
        (0.02, 0.0, 0.8), (0.13, 0.2, 0.7)
    )
    labels[heart & is_above] = LABEL["heart"]

    for side in (-1, 1):
        back = np.square((left - np.float32(0.22 * side)) / np.float32(0.19))
        back += np.square((posterior - np.float32(0.68)) / np.float32(0.16))
        labels[(back < 1) & (radius < wall**2.5)] = LABEL["muscle"]

    vertebra = np.square(left / np.float32(0.15)) + np.square(
        (posterior - np.float32(0.5)) / np.float32(0.18)
    )
    process = np.square(left / np.float32(0.05)) + np.square(
        (posterior - np.float32(0.76)) / np.float32(0.1)
    )
    # Ribs: bands of the wall that fall towards the front, 27 mm from one to the next.
    phase = (superior - np.float32(0.55) * posterior) / np.float32(0.27) + np.float32(rng.uniform())
    is_rib = (radius > (cavity - 0.02) ** 2.5) & (radius < (wall - 0.025) ** 2.5)
    is_rib &= (phase - np.floor(phase) < 0.45) & is_thorax & (np.abs(left) > 0.12)
    is_sternum = (np.abs(left) < 0.13) & (posterior < 0) & (superior > 0.2)
    is_sternum &= (radius > (cavity - 0.02) ** 2.5) & (radius < (wall - 0.025) ** 2.5)
    is_spine = (vertebra < 1) | (process < 1)
    labels[is_spine | is_rib | is_sternum] = LABEL["bone"]
    endplate = 0.5 + 0.5 * np.cos(phase * np.float32(2 * np.pi * 0.27 / 0.33))
    bone_hu = 280 + 420 * np.clip((vertebra - np.float32(0.55)) / np.float32(0.45), 0, 1)
    bone_hu += np.where(vertebra < 0.55, 160 * endplate, 0)
    bone_hu[~is_spine] = MEAN_HU[LABEL["bone"]]
    return labels, bone_hu.astype(np.float32)


def _box(mask_ZYX: Mask) -> tuple[slice, ...]:
    """Return the smallest box that holds a mask."""
    ends = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        (at,) = np.nonzero(mask_ZYX.any(axis=others))
        ends.append(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, 0))
    return tuple(ends)


def _add_grain(
    rng: np.random.Generator,
    hu_ZYX: Floats,
    mask_ZYX: Mask,
    spacing_mm: tuple[float, float, float],
    grain_mm: tuple[float, float, float],
) -> None:
    """Add a texture whose values over the organ follow one normal law, whatever its grain."""
    box = _box(mask_ZYX)
    mask = mask_ZYX[box]
    if not mask.any():
        return
    field_N = _field(rng, mask.shape, spacing_mm, grain_mm)[mask]
    value_N = np.empty_like(field_N)
    # By rank: a coarse field in a small organ has its own mean and spread, which HU would show.
    value_N[np.argsort(field_N)] = np.sort(rng.standard_normal(field_N.size, dtype=np.float32))
    hu_ZYX[box][mask] += np.float32(GRAIN_HU) * value_N


def _add_vessels(
    rng: np.random.Generator,
    hu_ZYX: Floats,
    mask_ZYX: Mask,
    spacing_mm: tuple[float, float, float],
) -> None:
    """Draw vessels into the lungs: curves along which two smooth fields vanish together."""
    box = _box(mask_ZYX)
    mask = mask_ZYX[box]
    if not mask.any():
        return
    squared = sum(
        np.square(_field(rng, mask.shape, spacing_mm, (14.0, 9.0, 9.0))[mask]) for _ in "ab"
    )
    hu_ZYX[box][mask] += np.float32(820) * np.exp(np.float32(-0.5 / 0.16**2) * squared)


def _draw_hu(
    rng: np.random.Generator,
    labels_ZYX: NDArray[np.int16],
    bone_hu_ZYX: Floats,
    spacing_mm: tuple[float, float, float],
) -> NDArray[np.int16]:
    """Give every label its HU, its texture and the noise of the acquisition."""
    mean_hu_ZYX = np.array(MEAN_HU, np.float32)[labels_ZYX]
    is_bone = labels_ZYX == LABEL["bone"]
    mean_hu_ZYX[is_bone] = bone_hu_ZYX[is_bone]
    # Partial volume, in plane, on air and bone only: at a border it would tell twins apart.
    blurred_ZYX = mean_hu_ZYX
    for axis in (1, 2):
        beside_ZYX = np.roll(blurred_ZYX, 1, axis) + np.roll(blurred_ZYX, -1, axis)
        blurred_ZYX = 0.5 * blurred_ZYX + 0.25 * beside_ZYX
    is_blurred = is_bone | (labels_ZYX == LABEL["background"])
    hu_ZYX: Floats = np.where(is_blurred, blurred_ZYX, mean_hu_ZYX)

    is_lung = (labels_ZYX == LABEL["left lung"]) | (labels_ZYX == LABEL["right lung"])
    _add_vessels(rng, hu_ZYX, is_lung, spacing_mm)
    for name, grain_mm in (("liver", LIVER_GRAIN_MM), ("spleen", SPLEEN_GRAIN_MM)):
        _add_grain(rng, hu_ZYX, labels_ZYX == LABEL[name], spacing_mm, grain_mm)
    hu_ZYX += np.float32(NOISE_HU) * _field(rng, labels_ZYX.shape, spacing_mm, NOISE_GRAIN_MM)
    return np.clip(np.rint(hu_ZYX), -1024, 3071).astype(np.int16)

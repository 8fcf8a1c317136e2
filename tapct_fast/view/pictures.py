"""Three planes of a scan as PNG, and what was computed for it as NIfTI in the scan's own frame.

Pictures are seen as in radiology: the patient's right on the left, front and head on top. Shape
suffixes: Z Y X voxels or tokens, I J rows and columns of a picture, C red, green, blue.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapct_fast.figures import paint_ct, paint_labels
from tapct_fast.io.convert import save_nifti
from tapct_fast.report import Pixels, Rgb
from tapct_fast.view.scene import LabelMap, Scene, label_color

HEIGHT, GAP = 400, 8  # pixels: of the tallest plane, and between two
OPACITY = 0.65
RANGE_PERCENT = 99.5  # of the tokens in the body: what lies above has the last colour

# From what stands out least to most; dark ones are transparent too, so that the CT shows.
_HEAT: tuple[Rgb, ...] = (
    (28, 26, 92),
    (98, 34, 138),
    (184, 54, 110),
    (238, 106, 56),
    (252, 182, 62),
    (255, 248, 190),
)


def heat_lut() -> NDArray[np.uint8]:
    """Return red, green, blue and opacity of 256 values from low to high, (256, 4)."""
    at = np.linspace(0, 1, 256)
    places = np.linspace(0, 1, len(_HEAT))
    colors = [np.interp(at, places, [color[c] for color in _HEAT]) for c in range(3)]
    lut: NDArray[np.uint8] = np.rint(
        np.stack([*colors, 255 * np.clip(at / 0.5, 0, 1)], axis=1)
    ).astype(np.uint8)
    return lut


def attention_range(scene: Scene, values_ZYX: NDArray[np.float32]) -> tuple[float, float]:
    """Return the values of the first and last colour: half of the body stays clear."""
    low, high = np.percentile(values_ZYX[~scene.is_air_ZYX], (50, RANGE_PERCENT))
    return float(low), max(float(high), float(low) + 1e-6)


def similarity_range(scene: Scene, values_ZYX: NDArray[np.float32]) -> tuple[float, float]:
    """Return the values of the first and last colour, as of attention."""
    return min(float(np.median(values_ZYX[~scene.is_air_ZYX])), 0.999), 1.0


# The directions of the patient, 4 x 5 squares each: a font would be one more thing to install.
_LETTERS = {
    "R": ("1110", "1001", "1110", "1010", "1001"),
    "L": ("1000", "1000", "1000", "1000", "1111"),
    "A": ("0110", "1001", "1111", "1001", "1001"),
    "P": ("1110", "1001", "1110", "1000", "1000"),
    "S": ("0111", "1000", "0110", "0001", "1110"),
    "I": ("1110", "0100", "0100", "0100", "1110"),
}
_LETTER_COLOR: Rgb = (255, 214, 90)
_SQUARE = 3  # pixels


class _Plane(NamedTuple):
    """A cut: the voxel coordinates of its picture's rows and columns, which lie along two axes."""

    letters: str  # of the left, right, upper and lower edge
    axis: int
    at: int
    axes_ij: tuple[int, int]
    voxel_I: NDArray[np.float64]
    voxel_J: NDArray[np.float64]


def pictures(scene: Scene) -> dict[str, Pixels]:
    """Return one picture of three planes through the middle of the body for each thing shown."""
    planes = _planes(scene)
    attention_ZYX = scene.attention_ZYXH.mean(axis=-1)
    similarity_ZYX = scene.cosine_to(scene.grid.token_at(scene.middle_zyx))
    greys = [paint_ct(_linear(scene.volume.hu_ZYX, plane)) for plane in planes]
    pca_ZYX4 = _opaque(scene.colors.paint_tokens(scene.features, scene.is_air_ZYX), scene)
    maps: Mapping[str, NDArray[np.uint8]] = {
        "pca": pca_ZYX4,
        "attention": _heat(attention_ZYX, attention_range(scene, attention_ZYX)),
        "similarity": _heat(similarity_ZYX, similarity_range(scene, similarity_ZYX)),
    }
    found = {"ct": _beside(greys, planes)}
    for name, rgba_ZYX4 in maps.items():
        found[name] = _beside(
            [
                _over(grey, _tokens(rgba_ZYX4, plane, scene))
                for grey, plane in zip(greys, planes, strict=True)
            ],
            planes,
        )
    for label_map in scene.label_maps:
        found[label_map.title] = _beside(
            [_labelled(grey, label_map, plane) for grey, plane in zip(greys, planes, strict=True)],
            planes,
        )
    return found


def write_niftis(out: Path, scene: Scene) -> list[str]:
    """Write the maps of a scene; returns the names of the files.

    Three principal components, attention (mean of the heads) and similarity to the patch in the
    middle of the body, float32 on the token grid; label maps on the scan's voxels.
    """
    features = scene.features
    maps: dict[str, NDArray[np.float32]] = {
        f"pca-{i + 1}": scores_ZYX
        for i, scores_ZYX in enumerate(np.moveaxis(scene.colors.scores(features), -1, 0))
    }
    maps["attention"] = scene.attention_ZYXH.mean(axis=-1)
    maps["similarity"] = scene.cosine_to(scene.grid.token_at(scene.middle_zyx))
    for name, values_ZYX in maps.items():
        save_nifti(out / f"{name}.nii.gz", values_ZYX, scene.volume, affine=features.affine)
    for label_map in scene.label_maps:
        save_nifti(out / f"{label_map.title}.nii.gz", label_map.labels_ZYX, scene.volume)
    return [f"{name}.nii.gz" for name in (*maps, *(m.title for m in scene.label_maps))]


def _planes(scene: Scene) -> list[_Plane]:
    """Return axial, coronal and sagittal plane at one scale in mm."""
    shape, mm = scene.volume.hu_ZYX.shape, scene.volume.spacing_mm
    extents = [size * spacing for size, spacing in zip(shape, mm, strict=True)]
    scale = HEIGHT / max(extents[0], extents[1])
    planes = []
    for letters, axis, i, j in (("RLAP", 0, 1, 2), ("RLSI", 1, 0, 2), ("APSI", 2, 0, 1)):
        voxel_I, voxel_J = (
            (np.arange(pixels) + 0.5) * shape[a] / pixels - 0.5
            for a in (i, j)
            for pixels in [max(round(extents[a] * scale), 1)]
        )
        up = voxel_I[::-1] if i == 0 else voxel_I  # slices count from the feet
        planes.append(_Plane(letters, axis, scene.middle_zyx[axis], (i, j), up, voxel_J))
    return planes


def _linear(hu_ZYX: NDArray[np.int16], plane: _Plane) -> NDArray[np.int16]:
    """Cut a plane; voxels are linear between their centres."""
    cut_IJ = np.take(hu_ZYX, plane.at, plane.axis).astype(np.float32)
    for axis, voxel in enumerate((plane.voxel_I, plane.voxel_J)):
        inside = np.clip(voxel, 0, cut_IJ.shape[axis] - 1)
        low = np.floor(inside).astype(np.intp)
        part = (inside - low)[:, None] if axis == 0 else inside - low
        high = np.minimum(low + 1, cut_IJ.shape[axis] - 1)
        cut_IJ = cut_IJ.take(low, axis) * (1 - part) + cut_IJ.take(high, axis) * part
    rounded_IJ: NDArray[np.int16] = np.rint(cut_IJ).astype(np.int16)
    return rounded_IJ


def _tokens(rgba_ZYX4: NDArray[np.uint8], plane: _Plane, scene: Scene) -> NDArray[np.uint8]:
    """Cut a plane of tokens, each a square, at the pixels of a picture."""
    grid = scene.grid
    at = grid.token_at(scene.middle_zyx)[plane.axis]
    cut_IJ4: NDArray[np.uint8] = np.take(rgba_ZYX4, at, plane.axis)
    for axis, (along, voxel) in enumerate(
        zip(plane.axes_ij, (plane.voxel_I, plane.voxel_J), strict=True)
    ):
        token = np.rint((voxel - grid.shift_zyx[along]) / grid.scale_zyx[along])
        inside = np.clip(token, 0, grid.shape_zyx[along] - 1).astype(np.intp)
        cut_IJ4 = np.take(cut_IJ4, inside, axis)
    return cut_IJ4


def _labelled(grey_IJC: Pixels, label_map: LabelMap, plane: _Plane) -> Pixels:
    cut_IJ = np.take(label_map.labels_ZYX, plane.at, plane.axis)
    for axis, voxel in enumerate((plane.voxel_I, plane.voxel_J)):
        inside = np.clip(np.rint(voxel), 0, cut_IJ.shape[axis] - 1).astype(np.intp)
        cut_IJ = np.take(cut_IJ, inside, axis)
    colors = [label_color(label) for label in range(int(cut_IJ.max()) + 1)]
    return paint_labels(grey_IJC, cut_IJ, colors)


def _opaque(rgb_ZYXC: Pixels, scene: Scene) -> NDArray[np.uint8]:
    opacity = np.where(scene.is_air_ZYX, 0, 255).astype(np.uint8)
    return np.concatenate([rgb_ZYXC, opacity[..., None]], axis=-1)


def _heat(values: NDArray[Any], ends: tuple[float, float]) -> NDArray[np.uint8]:
    low, high = ends
    index = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    heat: NDArray[np.uint8] = heat_lut()[index]
    return heat


def _over(grey_IJC: Pixels, rgba_IJ4: NDArray[np.uint8]) -> Pixels:
    opacity = OPACITY / 255 * rgba_IJ4[..., 3:]
    mixed: Pixels = np.rint(grey_IJC * (1 - opacity) + rgba_IJ4[..., :3] * opacity).astype(np.uint8)
    return mixed


def _beside(images: list[Pixels], planes: list[_Plane]) -> Pixels:
    """Lay pictures beside one another on black, with the letters of their edges."""
    height = max(len(image) for image in images)
    width = sum(image.shape[1] for image in images) + GAP * (len(images) - 1)
    sheet = np.zeros((height, width, 3), np.uint8)
    left = 0
    for image, plane in zip(images, planes, strict=True):
        rows, columns, _ = image.shape
        top = (height - rows) // 2
        sheet[top : top + rows, left : left + columns] = image
        right, bottom = left + columns - 4 * _SQUARE - 3, top + rows - 5 * _SQUARE - 3
        middle_y, middle_x = (top + bottom) // 2, (left + right) // 2
        places = ((middle_y, left + 3), (middle_y, right), (top + 3, middle_x), (bottom, middle_x))
        num_letters = 4 if rows > 15 * _SQUARE else 2  # the upper one would touch the lower one
        for letter, (y, x) in list(zip(plane.letters, places, strict=True))[:num_letters]:
            _write(sheet, letter, y, x)
        left += columns + GAP
    return sheet


def _write(sheet: Pixels, letter: str, top: int, left: int) -> None:
    is_ink = np.array([[square == "1" for square in row] for row in _LETTERS[letter]])
    is_ink = is_ink.repeat(_SQUARE, 0).repeat(_SQUARE, 1)
    rows, columns = np.nonzero(is_ink)
    rows, columns = rows + top, columns + left
    # A plane may be thinner than a letter.
    is_inside = (rows >= 0) & (rows < len(sheet)) & (columns >= 0) & (columns < sheet.shape[1])
    sheet[rows[is_inside], columns[is_inside]] = _LETTER_COLOR

"""The page: a scan in three planes under what its features say, all in one file.

Beside this module lie its parts (``page.html``), its look (``page.css``) and what acts in it:
``scene.js`` unpacks, ``draw.js`` paints, ``page.js`` listens.
Numbers travel as JSON, arrays as zlib in base64, which the page unpacks with DecompressionStream.
"""

import base64
import json
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from tapct_fast import __version__
from tapct_fast.report import facts_list, render_page
from tapct_fast.view import tables
from tapct_fast.view.pictures import attention_range, heat_lut
from tapct_fast.view.scene import LabelMap, Scene, label_color
from tapct_fast.view.tables import SimilarityTable, Thinned

MAX_VOXELS = 8_000_000  # about 10 MB of page
_MOST_TABLE_BYTES = 4_500_000
_MOST_ATTENTION_BYTES = 3_000_000


class _Content(NamedTuple):
    """The page's numbers and its packed arrays by name."""

    meta: dict[str, Any]
    blobs: dict[str, bytes]


def render_view(scene: Scene, *, max_voxels: int = MAX_VOXELS) -> str:
    """Return the page as HTML.

    Args:
        scene: What is shown.
        max_voxels: A larger scan is averaged to at most so many voxels, and the page says so.
    """
    thinned = tables.thin(scene.volume, max_voxels)
    width = scene.features.patches_ZYXC.shape[-1]
    tokens_ND = scene.features.patches_ZYXC.numpy().reshape(-1, width)
    table = tables.similarity_table(tokens_ND, _MOST_TABLE_BYTES)
    content = _content(scene, thinned, table)
    # No "<" may end the script element that holds it.
    texts = {"meta": json.dumps(content.meta, allow_nan=False).replace("<", "\\u003c")}
    texts |= {name: base64.b64encode(data).decode() for name, data in content.blobs.items()}
    data = "".join(
        f'<script type="text/plain" id="data-{name}">{text}</script>'
        for name, text in texts.items()
    )
    facts = facts_list(_facts(scene, thinned, table, content, texts))
    return render_page(
        "What the features see",
        "A CT scan in three planes under the frozen features of a backbone: their principal "
        "components, what the cls token attends to, and which patches are alike.",
        [],
        [("", "", _file("page.html") + data), ("How to read it", "", _HOW_TO_READ + facts)],
        style=_file("page.css"),
        script="".join(map(_file, ("scene.js", "draw.js", "page.js"))),
    )


def _file(name: str) -> str:
    return resources.files("tapct_fast.view").joinpath(name).read_text(encoding="ascii")


def _content(scene: Scene, thinned: Thinned, table: SimilarityTable) -> _Content:
    volume, grid, factor_zyx = scene.volume, scene.grid, np.array(thinned.factor_zyx)
    attention_ZYXH = scene.attention_ZYXH
    heads = [f"head {h + 1}" for h in range(attention_ZYXH.shape[-1])]
    if attention_ZYXH.size * 2 > _MOST_ATTENTION_BYTES:
        attention_ZYXH, heads = attention_ZYXH.mean(axis=-1, keepdims=True), []
    attention_HZYX = np.moveaxis(attention_ZYXH, -1, 0)
    # One head gives a token at most all of the attention: 16 bits resolve its largest by 1/65535.
    step_H = np.maximum(attention_HZYX.max(axis=(1, 2, 3)) / 65535, 1e-12)
    codes_HZYX = np.rint(attention_HZYX / step_H[:, None, None, None]).astype(np.uint16)
    shown = [attention_HZYX.mean(axis=0), *(attention_HZYX if heads else [])]
    blobs = {
        "hu": tables.pack_hu(thinned.hu_ZYX),
        "pca": tables.pack_bytes(scene.colors.paint_tokens(scene.features, scene.is_air_ZYX)),
        "attention": tables.pack_uint16(codes_HZYX),
        "tokens": tables.pack_bytes(table.code_KN),
    }
    label_maps = []
    for i, label_map in enumerate(scene.label_maps):
        labels, blobs[f"labels-{i}"] = _packed_labels(label_map, thinned)
        label_maps.append({"title": label_map.title, "labels": labels})
    # Voxel centres of the page: the average of factor voxels lies between them.
    to_voxel = np.diag([*factor_zyx[::-1], 1.0])
    to_voxel[:3, 3] = (factor_zyx[::-1] - 1) / 2
    meta = {
        "shape": thinned.hu_ZYX.shape,
        "factor": thinned.factor_zyx,
        "size": volume.hu_ZYX.shape,
        "spacing": [mm * int(f) for mm, f in zip(volume.spacing_mm, factor_zyx, strict=True)],
        "affine": (volume.affine @ to_voxel).tolist(),
        "toFile": _to_file(scene).tolist(),
        "middle": scene.middle_zyx,
        "grid": grid.shape_zyx,
        "tokenScale": (grid.scale_zyx / factor_zyx).tolist(),
        "tokenShift": ((grid.shift_zyx - (factor_zyx - 1) / 2) / factor_zyx).tolist(),
        "components": len(table.scale_K),
        "componentScale": [float(s) for s in table.scale_K],
        "error": table.largest_error,
        "heads": heads,
        "attentionStep": step_H.tolist(),
        "attentionRange": [attention_range(scene, values) for values in shown],
        "heat": heat_lut().ravel().tolist(),
        "labelMaps": label_maps,
    }
    return _Content(meta, blobs)


def _packed_labels(label_map: LabelMap, thinned: Thinned) -> tuple[list[dict[str, Any]], bytes]:
    """Return the labels that occur, and voxels that hold their places in that list, from 1."""
    present = np.unique(label_map.labels_ZYX)
    present = present[present > 0]
    place = np.zeros(int(label_map.labels_ZYX.max()) + 1, np.uint8)
    place[present] = np.arange(1, len(present) + 1)
    voxels_ZYX = place[tables.thin_labels(label_map.labels_ZYX, thinned.factor_zyx)]
    labels = [
        {
            "value": int(label),
            "name": label_map.names.get(int(label), f"label {label}"),
            "color": label_color(int(label)),
        }
        for label in present
    ]
    return labels, tables.pack_bytes(voxels_ZYX)


def _to_file(scene: Scene) -> Any:
    """Return the map from a voxel (x, y, z, 1) of the volume to the voxel of the scan's file."""
    volume = scene.volume
    if volume.stored is None:
        return np.eye(4)
    return np.linalg.inv(volume.stored.affine) @ volume.affine


def _facts(
    scene: Scene,
    thinned: Thinned,
    table: SimilarityTable,
    content: _Content,
    texts: dict[str, str],
) -> list[tuple[str, str]]:
    shape, mm = scene.volume.hu_ZYX.shape, scene.volume.spacing_mm
    factor, grid = thinned.factor_zyx, scene.grid
    scan = f"{_times(shape)} voxels (z, y, x) of {_times(mm)} mm"
    if max(factor) > 1:
        scan += (
            f"; too large for a page: {_times(factor)} voxels are averaged to one, and HU are "
            f"these averages ({_times(thinned.hu_ZYX.shape)} voxels); of labels the middle one "
            "counts"
        )
    angle = _tilt_deg(scene)
    if angle > 1:
        scan += (
            f"; the planes follow its axes, {angle:.0f} degrees off the patient's: letters name "
            "the nearest direction"
        )
    patch_mm = [m * s for m, s in zip(mm, grid.scale_zyx, strict=True)]
    width = scene.features.patches_ZYXC.shape[-1]
    similarity = (
        f"{len(table.scale_K)} components of {width}, a byte each; over {table.num_pairs:,} pairs "
        f"the cosine shown is off by at most {table.largest_error:.4f}, {table.rms_error:.4f} rms"
    )
    heads = content.meta["heads"]
    sizes = ", ".join(f"{name} {len(text) / 1e6:.2f} MB" for name, text in texts.items())
    return [
        ("scan", scan),
        ("tokens", f"{_times(grid.shape_zyx)} (z, y, x), one per {_times(patch_mm)} mm"),
        ("similarity", similarity),
        ("attention", f"{len(heads)} heads and their mean" if heads else "the mean of the heads"),
        *scene.facts,
        ("in this file", sizes),
        ("tapct_fast", f"{__version__}; not a medical device, not for diagnosis"),
    ]


def _tilt_deg(scene: Scene) -> float:
    """Return the largest angle between an axis of the scan and the nearest of the patient's."""
    axes = scene.volume.affine[:3, :3]
    cosines = np.abs(axes).max(axis=0) / np.linalg.norm(axes, axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))


def _times(numbers: Any) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)


_HOW_TO_READ = """<ul class="limits">
<li>Features: the first three principal components of the tokens in the body as red, green and
blue. Like colours mean like features, within this scan only; the colours themselves mean nothing.
Tokens in air are left out.</li>
<li>Attention: what the cls token of each window looks at in the last block; 1 is an even share.
Windows are blended as their features are. It says where information was taken from, not why.</li>
<li>Similarity: cosine of the clicked patch to every patch. The colours of both begin at the median
of the body, so half of it stays clear.</li>
<li>Planes are seen as in radiology: the patient's right on the left. Positions are voxels of the
scan's file, from 0, and millimetres toward the named direction.</li>
</ul>"""

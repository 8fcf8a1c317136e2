"""One scan through a backbone to a folder of pictures."""

import re
from pathlib import Path

import numpy as np

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.downstream.encode import embed_with_attention, steady_batch_size
from tapct_fast.downstream.features import Features
from tapct_fast.errors import InputError
from tapct_fast.evaluation.segmentation import SegmentationHead, apply_head
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.volume import Volume
from tapct_fast.report import png
from tapct_fast.view.page import MAX_VOXELS, render_view
from tapct_fast.view.pictures import pictures, write_niftis
from tapct_fast.view.scene import LabelMap, make_scene

PAGE = "view.html"
_OURS = ("ct", "pca", "pca-1", "pca-2", "pca-3", "attention", "similarity", "segmentation")

_OWN_HEAD = "by a linear head fitted on tokens of this backbone"
_OTHER_HEAD = (
    "by a linear head fitted on tokens of another backbone, or of this one in another precision or "
    "with another plane: it may be wrong for that reason alone"
)


def write_view(
    backbone: Backbone,
    volume: Volume,
    out: Path | str,
    *,
    head: SegmentationHead | None = None,
    label_maps: tuple[LabelMap, ...] = (),
    overlap: float = 0.5,
    batch_size: int | None = None,
    max_voxels: int = MAX_VOXELS,
) -> list[str]:
    """Encode a scan and write what its features see.

    ``view.html`` is one file that stands alone. PNG files show three planes through the middle of
    the body: ``ct``, ``pca``, ``attention``, ``similarity`` (to the patch in the middle), and each
    segmentation. NIfTI files hold the same numbers in the frame of the scan's file: ``pca-1`` to
    ``pca-3``, ``attention`` and ``similarity`` on the token grid, segmentations voxel for voxel.
    Nothing written holds a path, a name or an id.

    Args:
        backbone: From ``load_backbone``.
        volume: From ``read_volume``.
        out: Folder, made if absent.
        head: Of a probe of this backbone; what it makes of the scan is shown as ``segmentation``.
        label_maps: Other segmentations on the voxels of ``volume``; their titles name files.
        overlap: See ``embed_volume``.
        batch_size: See ``embed_volume``; None takes what this machine always takes.
        max_voxels: Of the page: a larger scan is averaged for it, and the page says so. The other
            files are of the whole scan.

    Returns:
        The names of the files written.

    Raises:
        InputError: A label map does not lie on the scan, the head takes other features, or ``out``
            cannot be written.
        BackboneError: The features are not finite.
    """
    _check_titles(label_maps)
    out = Path(out)
    features, attention_ZYXH = embed_with_attention(
        backbone, volume, overlap=overlap, batch_size=batch_size or steady_batch_size(backbone)
    )
    facts: list[tuple[str, str]] = []
    if head is not None:
        label_maps = (_segment(head, features, volume), *label_maps)
        is_its_own = head.fingerprint == backbone.fingerprint()
        facts.append(("segmentation", _OWN_HEAD if is_its_own else _OTHER_HEAD))
    scene = make_scene(volume, features, attention_ZYXH.numpy(), label_maps, tuple(facts))
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = {f"{name}.png": png(rgb) for name, rgb in pictures(scene).items()}
        for name, data in drawn.items():
            write_atomic(out / name, data)
        names = write_niftis(out, scene)
        write_atomic(out / PAGE, render_view(scene, max_voxels=max_voxels).encode())
    except OSError as error:
        raise InputError(f"--out cannot be written: {error.strerror}") from None
    return [PAGE, *drawn, *names]


def _check_titles(label_maps: tuple[LabelMap, ...]) -> None:
    titles = [label_map.title for label_map in label_maps]
    for title in titles:
        is_taken = title in _OURS or titles.count(title) > 1
        if is_taken or not re.fullmatch(r"[a-z][a-z0-9-]{0,40}", title):
            raise InputError(
                f"a label map's title names its files: {title!r} is taken, or not small letters, "
                "digits and hyphens"
            )


def _segment(head: SegmentationHead, features: Features, volume: Volume) -> LabelMap:
    """Segment the scan, in the values of the label maps that the head was fitted on."""
    value_K = np.array(head.label_values, np.int16)
    value_K[0] = 0  # background, whatever number it had
    labels_ZYX = value_K[apply_head(head, features, volume)]
    names = dict(zip(value_K.tolist(), head.label_names, strict=True))
    return LabelMap("segmentation", labels_ZYX, names)

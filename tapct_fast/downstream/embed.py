"""Features of whole scans by sliding windows.

Shape suffixes: B batch of windows, C channels or width, Z Y X voxels or tokens, L tokens,
N windows, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.config import Zyx
from tapct_fast.downstream.features import FORMAT, VERSION, Features, save_features
from tapct_fast.downstream.windows import Blend, tile
from tapct_fast.errors import InputError
from tapct_fast.io.atomic import read_json, write_json
from tapct_fast.io.case_id import case_id, ensure_key
from tapct_fast.io.orient import spacing_of
from tapct_fast.io.quarantine import Refusal, read_or_refuse, write_quarantine
from tapct_fast.io.read import find_scans
from tapct_fast.io.volume import Volume

INDEX_FILE, SETTINGS_FILE = "index.json", "settings.json"


class EmbedReport(NamedTuple):
    """Scans of one ``embed_scans`` call that were embedded, were there before, were refused."""

    embedded: int
    skipped: int
    quarantined: int


def embed_volume(
    backbone: Backbone,
    volume: Volume,
    *,
    window_slices: int | None = None,
    overlap: float = 0.5,
    batch_size: int = 4,
) -> Features:
    """Encode a scan of any size.

    Windows slide along depth, and in plane where a plane at native resolution exceeds the plane the
    backbone was trained on. They overlap by at least ``overlap`` and are blended with Gaussian
    weights.

    Args:
        backbone: From ``load_backbone``.
        volume: From ``read_volume``.
        window_slices: Depth of a window; None takes the backbone's own (12 for the released
            models). A scan with fewer slices is one window of its own depth.
        overlap: Share of a window that its neighbour repeats, 0 to 0.9.
        batch_size: Windows per forward pass.

    Returns:
        Features on the host; a token whose patch holds padding only does not exist.

    Raises:
        InputError: A setting is out of range.
        BackboneError: The features are not finite.
    """
    config, preprocess = backbone.vit.config, backbone.preprocess
    patch_zyx = config.patch_zyx
    if window_slices is None:
        window_slices = config.image_zyx[0]
    if window_slices < 1 or window_slices % patch_zyx[0]:
        raise InputError(
            f"window_slices={window_slices} is not a positive multiple of {patch_zyx[0]} slices"
        )
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is not positive")
    shape_zyx = _zyx(volume.hu_ZYX.shape)
    pixels_CZYX = preprocess.apply(volume)[0]
    # The multiple may be coarser than a patch: tokens beyond the scan hold only padding.
    resized_zyx = preprocess.resized_zyx(shape_zyx)
    grid_zyx = _zyx(-(-s // p) for s, p in zip(resized_zyx, patch_zyx, strict=True))
    largest_zyx = (window_slices // patch_zyx[0], *config.grid_zyx[1:])
    if preprocess.resize_yx:
        largest_zyx = (largest_zyx[0], *grid_zyx[1:])
    window_zyx = _zyx(map(min, grid_zyx, largest_zyx))

    blend = Blend(grid_zyx, window_zyx)
    cls: list[torch.Tensor] = []
    windows = tile(grid_zyx, window_zyx, overlap)
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        pixels_BCZYX = torch.stack([pixels_CZYX[_box(s, window_zyx, patch_zyx)] for s in batch])
        with torch.no_grad():
            out = backbone(pixels_BCZYX.to(backbone.device))
        cls.append(out.pooler_output.cpu())
        tokens_BLD = out.last_hidden_state.cpu()
        for start_zyx, tokens_LD in zip(batch, tokens_BLD, strict=True):
            blend.add(start_zyx, tokens_LD.reshape(*window_zyx, -1))

    affine = volume.affine @ preprocess.pixel_affine(shape_zyx) @ _token_affine(patch_zyx)
    cls_ND = torch.cat(cls)
    return Features(blend.mean_ZYXC(), affine, spacing_of(affine), cls_ND, cls_ND.mean(0))


def _zyx(sizes: Any) -> Zyx:
    z, y, x = sizes
    return int(z), int(y), int(x)


def _box(start_zyx: Zyx, window_zyx: Zyx, patch_zyx: Zyx) -> tuple[slice, ...]:
    spans = zip(start_zyx, window_zyx, patch_zyx, strict=True)
    return (slice(None), *(slice(s * p, (s + w) * p) for s, w, p in spans))


def _token_affine(patch_zyx: Zyx) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the map from token index (x, y, z, 1) to the pixel index of its patch's centre."""
    affine = np.diag([*patch_zyx[::-1], 1.0])
    affine[:3, 3] = [(p - 1) / 2 for p in patch_zyx[::-1]]
    return affine


def embed_scans(
    backbone: Backbone,
    paths: Sequence[Path],
    out: Path,
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    series: str | None = None,
    check_hu: bool = True,
    progress: bool = False,
) -> EmbedReport:
    """Embed scans into a folder; run again, it embeds only what is missing.

    Files: ``cases/<id>.safetensors`` and ``.json`` per scan; ``index.json`` lists the scans of the
    last call in input order; ``quarantine.jsonl`` those that could not be read, with field and
    reason (they are tried again in the next run); ``settings.json`` what the features depend on.
    Ids are keyed hashes: without ``.key`` they say nothing about the scans.

    Args:
        backbone: From ``load_backbone``.
        paths: Scan files, DICOM series folders, or folders searched recursively.
        out: Made if it is missing.
        overlap: See ``embed_volume``.
        batch_size: See ``embed_volume``; does not change the features beyond rounding.
        series: See ``read_volume``; for paths that are all DICOM folders.
        check_hu: Refuse scans whose values cannot be HU.
        progress: Show a progress bar on stderr.

    Raises:
        InputError: A path holds no scan, ``out`` cannot be written or holds features of another
            backbone or overlap.
        BackboneError: The features are not finite.
    """
    scans = find_scans(paths)
    tile((1, 1, 1), (1, 1, 1), overlap)  # refuse a bad overlap before the first scan is read
    try:
        return _embed_scans(backbone, scans, out, overlap, batch_size, series, check_hu, progress)
    except OSError as error:
        raise InputError(f"the output folder cannot be written: {error.strerror}") from None


def _embed_scans(
    backbone: Backbone,
    scans: Sequence[Path],
    out: Path,
    overlap: float,
    batch_size: int,
    series: str | None,
    check_hu: bool,
    progress: bool,
) -> EmbedReport:
    (out / "cases").mkdir(parents=True, exist_ok=True)
    _require_same_settings(out, {"backbone": backbone.fingerprint(), "overlap": overlap})
    key = ensure_key(out)
    ids = [case_id(scan, key, series) for scan in scans]
    refused: list[Refusal] = []
    embedded = skipped = 0
    todo = dict(zip(ids, scans, strict=True))  # a scan named twice is embedded once
    for case, scan in tqdm(todo.items(), desc="embed", unit="scan", disable=not progress):
        path = out / "cases" / f"{case}.safetensors"
        if path.is_file() and path.with_suffix(".json").is_file():
            skipped += 1
            continue
        volume = read_or_refuse(scan, case, series=series, check_hu=check_hu)
        if isinstance(volume, Refusal):
            refused.append(volume)
            continue
        save_features(embed_volume(backbone, volume, overlap=overlap, batch_size=batch_size), path)
        embedded += 1
    write_quarantine(out, ids, refused)
    bad = {refusal.case for refusal in refused}
    cases = [{"case": case, "is_quarantined": case in bad} for case in ids]
    write_json(out / INDEX_FILE, {"format": FORMAT, "version": VERSION, "cases": cases})
    return EmbedReport(embedded, skipped, len(refused))


def _require_same_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS_FILE
    if not path.exists():
        write_json(path, settings)
        return
    found = read_json(path, "embed settings")
    for name, value in settings.items():
        if not isinstance(found, dict) or found.get(name) != value:
            raise InputError(
                f"OUT holds features with another {name}; name a new folder, or embed as before"
            )

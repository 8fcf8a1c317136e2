"""One scan through a backbone: windows in batches, blended into features or pooled into vectors.

Shape suffixes: B batch of windows, C channels or width, Z Y X voxels or tokens, L tokens,
N windows, D width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tapct_fast.backbone.backbone import Backbone, BackboneOutput
from tapct_fast.backbone.preprocess import pad_end, token_affine
from tapct_fast.config import Zyx
from tapct_fast.downstream.features import Features
from tapct_fast.downstream.windows import Blend, Blending, tile
from tapct_fast.errors import InputError
from tapct_fast.io.orient import spacing_of
from tapct_fast.io.volume import Volume

_SLAB = 32  # slices resized at a time: their float32 copy is larger than all else
_BYTES_PER_VALUE = 48  # of one token's width, at the widest place of a block
_MOST_WINDOWS = {"cuda": 64, "cpu": 4}  # in a batch of our own choice


class ScanVectors(NamedTuple):
    """What is left of a scan when its place is of no interest: the cls bag, pooled three ways."""

    cls_ND: Tensor  # float32, one per window, in window order
    mean_D: Tensor
    std_D: Tensor  # of the population: zero for one window
    max_D: Tensor

    def pooled(self, how: Literal["mean", "mean+std", "max", "mean+std+max"]) -> Tensor:
        """Return one vector: (D,), (2 D,) or (3 D,).

        Raises:
            InputError: The way of pooling is unknown.
        """
        parts = {"mean": self.mean_D, "std": self.std_D, "max": self.max_D}
        if how not in ("mean", "mean+std", "max", "mean+std+max"):
            raise InputError(f"pooling {how!r} is not one of mean, mean+std, max, mean+std+max")
        return torch.cat([parts[name] for name in how.split("+")])


def embed_volume(
    backbone: Backbone,
    volume: Volume,
    *,
    window_slices: int | Literal["all"] | None = None,
    overlap: float = 0.5,
    blending: Blending = "gaussian",
    batch_size: int | None = None,
    num_blocks: int | None = None,
) -> Features:
    """Encode a scan of any size.

    Windows slide along depth, and in plane where a plane at native resolution exceeds the plane the
    backbone was trained on. A slice is encoded 1 / (1 - overlap) times: four times with the 0.75 of
    the released model card, once with 0.

    Args:
        backbone: From ``load_backbone``.
        volume: From ``read_volume``.
        window_slices: Depth of a window; None takes the backbone's own (12 for the released
            models), ``all`` the whole scan in one pass, for which attention costs the square of
            its length. A scan with fewer slices is one window of its own depth.
        overlap: Share of a window that its neighbour repeats, 0 to 0.9.
        blending: Weight of a window's tokens: ``gaussian`` about its centre, or ``uniform``.
        batch_size: Windows per forward pass; None takes what free memory allows. Halved when memory
            runs out: nothing that was encoded is lost. It does not change the features beyond
            rounding.
        num_blocks: Stop after this many blocks; the rest costs nothing.

    Returns:
        Features on the host; a token whose patch holds padding only does not exist.

    Raises:
        InputError: A setting is out of range.
        BackboneError: The features are not finite.
    """
    plan = _plan(backbone, volume, window_slices, overlap)
    blend = Blend(plan.grid_zyx, plan.window_zyx, blending, backbone.device)
    cls: list[Tensor] = []
    for starts, out in _encode(backbone, plan, batch_size, num_blocks):
        cls.append(out.pooler_output)
        for start_zyx, tokens_LD in zip(starts, out.last_hidden_state, strict=True):
            blend.add(start_zyx, tokens_LD.reshape(*plan.window_zyx, -1))
    shape_zyx = _zyx(volume.hu_ZYX.shape)
    pixel_affine = backbone.preprocess.pixel_affine(shape_zyx)
    affine = volume.affine @ pixel_affine @ token_affine(backbone.vit.config.patch_zyx)
    cls_ND = torch.cat(cls).cpu()
    patches_ZYXC = blend.mean_ZYXC().cpu()
    return Features(patches_ZYXC, affine, spacing_of(affine), cls_ND, cls_ND.mean(0))


def encode_scan(
    backbone: Backbone,
    volume: Volume,
    *,
    window_slices: int | Literal["all"] | None = None,
    overlap: float = 0.5,
    batch_size: int | None = None,
    num_blocks: int | None = None,
) -> ScanVectors:
    """Encode a scan to vectors; for the arguments and errors see ``embed_volume``."""
    plan = _plan(backbone, volume, window_slices, overlap)
    cls_ND = torch.cat(
        [out.pooler_output for _, out in _encode(backbone, plan, batch_size, num_blocks)]
    ).cpu()
    return pool_bag(cls_ND)


def pool_bag(cls_ND: Tensor) -> ScanVectors:
    """Pool a cls bag three ways."""
    return ScanVectors(cls_ND, cls_ND.mean(0), cls_ND.std(0, correction=0), cls_ND.max(0).values)


class _Plan(NamedTuple):
    pixels_CZYX: Tensor  # on the device, int16 HU or pixel values
    grid_zyx: Zyx
    window_zyx: Zyx  # tokens
    starts: Sequence[Zyx]  # first token of each window
    patch_zyx: Zyx


def _plan(
    backbone: Backbone, volume: Volume, window_slices: int | str | None, overlap: float
) -> _Plan:
    config, preprocess = backbone.vit.config, backbone.preprocess
    patch_zyx = config.patch_zyx
    if window_slices is None:
        window_slices = config.image_zyx[0]
    elif window_slices == "all":
        window_slices = -(-volume.hu_ZYX.shape[0] // patch_zyx[0]) * patch_zyx[0]
    if isinstance(window_slices, str) or window_slices < 1 or window_slices % patch_zyx[0]:
        raise InputError(
            f"window_slices={window_slices} is not a positive multiple of {patch_zyx[0]} slices, "
            "nor 'all'"
        )
    # The multiple may be coarser than a patch: tokens beyond the scan hold only padding.
    resized_zyx = preprocess.resized_zyx(_zyx(volume.hu_ZYX.shape))
    grid_zyx = _zyx(-(-s // p) for s, p in zip(resized_zyx, patch_zyx, strict=True))
    largest_zyx = (window_slices // patch_zyx[0], *config.grid_zyx[1:])
    if preprocess.resize_yx:
        largest_zyx = (largest_zyx[0], *grid_zyx[1:])
    window_zyx = _zyx(map(min, grid_zyx, largest_zyx))
    starts = tile(grid_zyx, window_zyx, overlap)
    return _Plan(_pixels_CZYX(backbone, volume), grid_zyx, window_zyx, starts, patch_zyx)


def _pixels_CZYX(backbone: Backbone, volume: Volume) -> Tensor:
    """Return the whole scan on the device: HU where no slice is resized, else pixel values."""
    preprocess, device = backbone.preprocess, backbone.device
    hu_CZYX = torch.from_numpy(volume.hu_ZYX)[None]
    if device.type == "cuda":  # not waited for
        hu_CZYX = hu_CZYX.pin_memory().to(device, non_blocking=True)
    if preprocess.resize_yx in (None, tuple(hu_CZYX.shape[2:])):
        return pad_end(hu_CZYX[None], backbone.vit.config.patch_zyx, preprocess.pad_hu)[0]
    slices = -(-_SLAB // preprocess.depth_multiple) * preprocess.depth_multiple
    slabs = hu_CZYX[None].split(slices, dim=2)  # type: ignore[no-untyped-call]
    return torch.cat([preprocess.apply(slab) for slab in slabs], dim=2)[0]


@torch.no_grad()
def _encode(
    backbone: Backbone, plan: _Plan, batch_size: int | None, num_blocks: int | None
) -> Iterator[tuple[Sequence[Zyx], BackboneOutput]]:
    """Yield the first tokens of the windows of each batch and its output."""
    if batch_size is None:
        batch_size = _windows_that_fit(backbone, plan)
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is not positive")
    done = 0
    while done < len(plan.starts):
        starts = plan.starts[done : done + batch_size]
        boxes = [_box(start_zyx, plan.window_zyx, plan.patch_zyx) for start_zyx in starts]
        try:
            out = backbone(
                torch.stack([plan.pixels_CZYX[box] for box in boxes]), num_blocks=num_blocks
            )
        except RuntimeError as error:
            if batch_size == 1 or not _is_out_of_memory(error):
                raise
            batch_size //= 2
        else:
            yield starts, out
            done += len(starts)
            continue
        if backbone.device.type == "cuda":  # after the error, which holds what it was made of
            torch.cuda.empty_cache()


def _windows_that_fit(backbone: Backbone, plan: _Plan) -> int:
    device, config = backbone.device, backbone.vit.config
    num_tokens = int(np.prod(plan.window_zyx)) + 1 + config.num_registers
    each = num_tokens * config.dim * _BYTES_PER_VALUE
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_host_bytes()
    most = _MOST_WINDOWS.get(device.type, 1)
    return max(1, min(most, int(0.6 * free) // each))


def _free_host_bytes() -> int:
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**30


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _zyx(sizes: Any) -> Zyx:
    z, y, x = sizes
    return int(z), int(y), int(x)


def _box(start_zyx: Zyx, window_zyx: Zyx, patch_zyx: Zyx) -> tuple[slice, ...]:
    spans = zip(start_zyx, window_zyx, patch_zyx, strict=True)
    return (slice(None), *(slice(s * p, (s + w) * p) for s, w, p in spans))

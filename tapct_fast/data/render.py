"""Which renderer draws the views, chosen once: ``torch``, ``native`` or ``dali``.

All three are pure functions of (box, table) under one law; see ``reference``. On the CPU ``auto``
is native, which its row in the benchmarks shows to be the fastest. On CUDA it is torch until a
row measured there says whether native or DALI is faster.

Shape suffixes: V views, B boxes, Z Y X voxels.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from tapct_fast import _native
from tapct_fast.config import HuConfig, ViewGroupConfig
from tapct_fast.data import dali, native, reference
from tapct_fast.data.views import ViewTable
from tapct_fast.errors import InputError

RendererName = Literal["torch", "native", "dali"]
RENDERERS: tuple[RendererName, ...] = get_args(RendererName)
# Boxes of a batch (int16 HU ZYX, of any shapes), the tables of every group and box, and the
# float32 or bfloat16 views VBZYX of every group, to be filled.
Renderer = Callable[[Sequence[Tensor], Sequence[Sequence[ViewTable]], Sequence[Tensor]], None]


def choose_renderer(
    name: RendererName | Literal["auto"], device: torch.device | str
) -> RendererName:
    """Return the renderer that ``name`` means on ``device``.

    Raises:
        InputError: It cannot run there; the message says what it needs.
    """
    device_type = torch.device(device).type
    if name == "auto":
        name = "torch" if device_type == "cuda" else "native"
    obstacle = obstacle_to(name, device_type)
    if obstacle:
        raise InputError(f"--views.renderer {name} cannot run on {device_type}: {obstacle}")
    return name


def obstacle_to(name: RendererName, device_type: str) -> str:
    """Return why a renderer cannot run on such a device, with the way out; empty where it can."""
    if name == "native" and device_type == "cuda" and not _native.has_cuda:
        return "the native core was built without CUDA; rebuild with TAPCT_CUDA=ON and nvcc"
    # The parent first: find_spec raises where it is missing.
    if name == "dali" and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        return dali.how_to_install()
    return ""


def make_renderer(
    name: RendererName,
    groups: Sequence[ViewGroupConfig],
    hu: HuConfig,
    device: torch.device,
    *,
    batch_size: int,
    threads: int = 1,
) -> Renderer:
    """Return a renderer of that name; on CUDA it works on the current stream.

    Args:
        name: What ``choose_renderer`` returned.
        groups: Number and size of the views of each group, and whether shrinking is antialiased.
        hu: Clip range, mean and deviation.
        device: Where the boxes are and the views go.
        batch_size: The most boxes of one call.
        threads: On the CPU; they do not change a bit.
    """
    if name == "dali":
        return dali.DaliRenderer(groups, hu, device, batch_size=batch_size, threads=threads)

    def render(
        boxes: Sequence[Tensor], tables: Sequence[Sequence[ViewTable]], out: Sequence[Tensor]
    ) -> None:
        for group, tables_B, out_VBZYX in zip(groups, tables, out, strict=True):
            if group.num == 0:
                continue
            if name == "native":
                native.render_batch(boxes, tables_B, group, hu, out_VBZYX, threads=threads)
                continue
            for b, (box_ZYX, table) in enumerate(zip(boxes, tables_B, strict=True)):
                out_VBZYX[:, b] = reference.render(box_ZYX, table, group, hu)

    return render

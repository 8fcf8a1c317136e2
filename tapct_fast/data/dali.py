"""Views rendered by NVIDIA DALI: one graph for all groups of a batch, on the CPU or a GPU.

The law is that of ``reference``, to whose results these are held. Turns and noise are ours, after
the graph: turning in plane commutes with all that comes before noise, and DALI's noise depends on
the place in the batch. Shape suffixes: V views, B boxes, Z Y X voxels.

DALI is an extra and imported on first use: 200 MB that neither the torch nor the native renderer
needs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tapct_fast.config import HuConfig, ViewGroupConfig
from tapct_fast.data.reference import gaussian_noise
from tapct_fast.data.views import ViewTable
from tapct_fast.errors import InputError

_LEAST_SIGMA = 0.05  # DALI refuses 0; under this one the neighbours' weights are 0 in float32
_COLUMNS = ("low", "scale", "gamma", "contrast")  # per view, broadcast over its voxels


class DaliRenderer:
    """Renders batches of boxes by one DALI pipeline.

    Args:
        groups: Number and size of the views of each group, and whether shrinking is antialiased.
        hu: Clip range, mean and deviation.
        device: Where boxes come from and views go.
        batch_size: The most boxes of one call.
        threads: Of DALI's CPU operators; they do not change a bit.

    Raises:
        InputError: DALI is not installed, or finds no GPU.
    """

    def __init__(
        self,
        groups: Sequence[ViewGroupConfig],
        hu: HuConfig,
        device: torch.device | str,
        *,
        batch_size: int,
        threads: int = 1,
    ) -> None:
        self._used = [g for g, group in enumerate(groups) if group.num]
        self._device = torch.device(device)
        self._pipeline = _build(groups, hu, self._device, batch_size, threads)

    def __call__(
        self,
        boxes: Sequence[Tensor],
        tables: Sequence[Sequence[ViewTable]],
        out: Sequence[Tensor],
    ) -> None:
        """Render every group's views of every box.

        Args:
            boxes: int16 HU per sample, of any shapes, on the device.
            tables: Of every group, what ``draw_views`` drew for each box.
            out: Of every group, contiguous float32 or bfloat16 views VBZYX to be filled.
        """
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        volumes = [box_ZYX[..., None] for box_ZYX in boxes]
        if stream is None:
            self._pipeline.feed_input("hu", [volume.numpy() for volume in volumes])
        else:
            self._pipeline.feed_input("hu", volumes, cuda_stream=stream.cuda_stream)
        for g in self._used:
            for name, column_B in _columns(tables[g]).items():
                self._pipeline.feed_input(f"{name}_{g}", column_B)
        rendered = self._pipeline.run(*([] if stream is None else [stream.cuda_stream]))
        for g, views in zip(self._used, rendered, strict=True):
            for b, table in enumerate(tables[g]):
                # Copied at once: the next run overwrites what DALI returned.
                view_VZYX = from_dlpack(views[b])[..., 0]
                _finish(view_VZYX, table, out[g][:, b])


def _columns(tables: Sequence[ViewTable]) -> dict[str, list[NDArray[np.float32]]]:
    """Return the inputs of one group, each a list over the boxes."""

    def wide(column_V: NDArray[np.floating]) -> NDArray[np.float32]:
        return column_V.astype(np.float32).reshape(-1, 1, 1, 1, 1)

    return {
        "start": [table.lo_V3 for table in tables],
        "end": [table.hi_V3 for table in tables],
        "sigma": [np.maximum(table.sigma_V3, np.float32(_LEAST_SIGMA)) for table in tables],
        "low": [wide(table.window_V2[:, 0]) for table in tables],
        "scale": [wide(1 / np.diff(table.window_V2)) for table in tables],
        "gamma": [wide(table.gamma_V) for table in tables],
        "contrast": [wide(table.contrast_V) for table in tables],
    }


def _finish(view_VZYX: Tensor, table: ViewTable, out_VZYX: Tensor) -> None:
    for v, view_ZYX in enumerate(view_VZYX):
        turned_ZYX = view_ZYX.rot90(int(table.turns_V[v]), dims=(1, 2))
        noise_std = float(table.noise_std_V[v])
        if noise_std > 0:
            noise_N = gaussian_noise(int(table.noise_key_V[v]), turned_ZYX.numel())
            noise_ZYX = noise_N.to(out_VZYX.device).view(turned_ZYX.shape)
            turned_ZYX = turned_ZYX + noise_std * noise_ZYX
        out_VZYX[v].copy_(turned_ZYX)


def _build(
    groups: Sequence[ViewGroupConfig],
    hu: HuConfig,
    device: torch.device,
    batch_size: int,
    threads: int,
) -> Any:
    try:
        from nvidia.dali import fn, pipeline_def
    except ImportError:
        raise InputError(how_to_install()) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("the dali renderer finds no CUDA device; see tapct-fast doctor")
    place = "gpu" if device.type == "cuda" else "cpu"

    # Without a GPU DALI wants None: its own constant for "CPU only" is refused.
    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if place == "gpu" else None,
        prefetch_queue_depth=1,  # a call returns its own batch
    )
    def graph() -> tuple[Any, ...]:
        hu_ZYXC = fn.external_source(name="hu", device=place, layout="DHWC", batch=True)
        return tuple(
            _group_graph(hu_ZYXC, g, group, hu, place)
            for g, group in enumerate(groups)
            if group.num
        )

    pipeline = graph()
    pipeline.build()
    return pipeline


def _group_graph(
    hu_ZYXC: Any, number: int, group: ViewGroupConfig, hu: HuConfig, place: str
) -> Any:
    from nvidia.dali import fn, math, types

    def column(name: str, device: str = place) -> Any:
        return fn.external_source(name=f"{name}_{number}", device=device, batch=True)

    start, end, sigma = (column(name, "cpu") for name in ("start", "end", "sigma"))
    low, scale, gamma, contrast = (column(name) for name in _COLUMNS)
    views = [
        fn.resize(
            hu_ZYXC,
            size=group.size_zyx,
            roi_start=start[v],
            roi_end=end[v],
            interp_type=types.INTERP_LINEAR,
            antialias=group.antialias,
            dtype=types.FLOAT,  # int16 would be rounded
        )
        for v in range(group.num)
    ]
    unit = fn.stack(*views, axis=0, axis_name="F")
    unit = math.pow(math.clamp((unit - low) * scale, 0.0, 1.0), gamma)
    unit = math.clamp((unit - 0.5) * contrast + 0.5, 0.0, 1.0)
    unit = fn.gaussian_blur(unit, sigma=fn.per_frame(sigma))
    gain, offset = (hu.clip[1] - hu.clip[0]) / hu.std, (hu.clip[0] - hu.mean) / hu.std
    return math.clamp(unit, 0.0, 1.0) * gain + offset


def how_to_install() -> str:
    """Return the way out where DALI is missing."""
    cuda = torch.version.cuda
    if cuda is not None and cuda.startswith("12."):
        package = "pip install nvidia-dali-cuda120"
    else:
        package = "pip install 'tapct-fast[dali]'"  # nvidia-dali-cuda130, which runs on CPUs too
    return (
        f"the dali renderer needs NVIDIA DALI: {package}; --views.renderer torch and native need "
        "nothing more"
    )

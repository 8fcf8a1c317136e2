"""Views rendered by the native code: int16 HU in, normalised float32 or bfloat16 out, one pass.

The law is that of ``reference``, to whose results these are held. Shape suffixes: V views, B boxes,
Z Y X voxels, P numbers of one view.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast import _native
from tapct_fast.config import HuConfig, ViewGroupConfig
from tapct_fast.data.views import ViewTable

_SIGMA = slice(10, 13)  # of the P numbers


def render_batch(
    boxes: Sequence[Tensor],
    tables: Sequence[ViewTable],
    group: ViewGroupConfig,
    hu: HuConfig,
    out_VBZYX: Tensor,
    *,
    threads: int = 1,
) -> None:
    """Render the views of one group from a batch of boxes into ``out_VBZYX``.

    Args:
        boxes: int16 HU per sample, contiguous, of any shapes.
        tables: What ``draw_views`` drew for each of them.
        group: Number and size of the views, and whether shrinking is antialiased.
        hu: Clip range, mean and deviation.
        out_VBZYX: Contiguous float32 or bfloat16 on the device of the boxes.
        threads: Threads to share the views on a CPU; they do not change a bit. On a GPU the work
            is queued on the current stream of its device.

    Raises:
        ValueError: A shape or number that cannot be; nothing is written then.
        RuntimeError: The CUDA code is absent (build with TAPCT_CUDA=ON) or failed.
    """
    params_BVP = [
        np.concatenate(
            [
                *(table.lo_V3, table.hi_V3, table.window_V2, table.gamma_V[:, None]),
                *(table.contrast_V[:, None], table.sigma_V3, table.noise_std_V[:, None]),
            ],
            axis=1,
        )
        for table in tables
    ]
    params_VBP = np.stack(params_BVP, axis=1)
    keys_VB = np.stack([table.noise_key_V for table in tables], axis=1)
    turns_VB = np.stack([table.turns_V for table in tables], axis=1)
    if out_VBZYX.is_cuda:
        _render_gpu(boxes, params_VBP, keys_VB, turns_VB, group, hu, out_VBZYX)
        return
    is_bf16 = out_VBZYX.dtype == torch.bfloat16
    _native.render_views(
        [box_ZYX.numpy() for box_ZYX in boxes],
        params_VBP,
        keys_VB,
        turns_VB,
        (out_VBZYX.view(torch.uint16) if is_bf16 else out_VBZYX).numpy(),
        group.antialias,
        hu.clip,
        hu.mean,
        hu.std,
        threads,
    )


def _render_gpu(
    boxes: Sequence[Tensor],
    params_VBP: NDArray[np.float32],
    keys_VB: NDArray[np.uint64],
    turns_VB: NDArray[np.uint8],
    group: ViewGroupConfig,
    hu: HuConfig,
    out_VBZYX: Tensor,
) -> None:
    device = out_VBZYX.device
    _check_device_memory(boxes, (*keys_VB.shape, *group.size_zyx), out_VBZYX)
    num_blurred = int((params_VBP[:, :, _SIGMA] > 0).any(axis=2).sum())
    scratch_NZYX = torch.empty(num_blurred, *group.size_zyx, dtype=torch.float32, device=device)
    stream = torch.cuda.current_stream(device)
    # What another stream allocated must not be given away before this one has used it. The scratch
    # is this stream's own.
    for tensor in (*boxes, out_VBZYX):
        tensor.record_stream(stream)
    _native.render_views_gpu(
        [box_ZYX.data_ptr() for box_ZYX in boxes],
        [tuple(box_ZYX.shape) for box_ZYX in boxes],
        params_VBP,
        keys_VB,
        turns_VB,
        out_VBZYX.data_ptr(),
        group.size_zyx,
        out_VBZYX.dtype == torch.bfloat16,
        group.antialias,
        hu.clip,
        hu.mean,
        hu.std,
        scratch_NZYX.data_ptr(),
        num_blurred,
        stream.cuda_stream,
    )


def _check_device_memory(
    boxes: Sequence[Tensor], shape_vbzyx: tuple[int, ...], out_VBZYX: Tensor
) -> None:
    """Refuse what the kernels, which see only addresses, could not."""
    if out_VBZYX.shape != shape_vbzyx:
        raise ValueError(
            f"render_batch: out has shape {tuple(out_VBZYX.shape)}, "
            f"but the tables and the group ask for {shape_vbzyx}"
        )
    if not out_VBZYX.is_contiguous() or out_VBZYX.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError("render_batch: out must be contiguous float32 or bfloat16")
    for box_ZYX in boxes:
        if box_ZYX.device != out_VBZYX.device:
            raise ValueError(
                f"render_batch: a box is on {box_ZYX.device}, out on {out_VBZYX.device}"
            )
        if box_ZYX.dtype != torch.int16 or box_ZYX.ndim != 3 or not box_ZYX.is_contiguous():
            raise ValueError("render_batch: a box must be contiguous int16 with three axes")

"""Views rendered by the native code: int16 HU in, normalised float32 or bfloat16 out, one pass.

The law is that of ``reference``, to whose results these are held. Shape suffixes: V views, B boxes,
Z Y X voxels, P numbers of one view.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tapct_fast import _native
from tapct_fast.config import HuConfig, ViewGroupConfig
from tapct_fast.data.views import ViewTable


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
        threads: Threads to share the views; they do not change a bit.

    Raises:
        ValueError: A shape or number that cannot be; nothing is written then.
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
    is_bf16 = out_VBZYX.dtype == torch.bfloat16
    _native.render_views(
        [box_ZYX.numpy() for box_ZYX in boxes],
        np.stack(params_BVP, axis=1),
        np.stack([table.noise_key_V for table in tables], axis=1),
        np.stack([table.turns_V for table in tables], axis=1),
        (out_VBZYX.view(torch.uint16) if is_bf16 else out_VBZYX).numpy(),
        group.antialias,
        hu.clip,
        hu.mean,
        hu.std,
        threads,
    )

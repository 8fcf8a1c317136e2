"""Gram anchoring: the student keeps the similarities between patch tokens of an earlier teacher.

Shape suffixes: N global views, C channels (one), L patch tokens, T all tokens, D width, Z Y X
voxels or tokens.
Source: DINOv3, arXiv:2508.10104 section 4.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.config import GramConfig, HuConfig, VitConfig, Zyx
from tapct_fast.model.vit import Vit
from tapct_fast.ssl.shards import whole


def gram_loss(student_NLD: Tensor, anchor_NLD: Tensor) -> Tensor:
    """Return the mean squared difference of the Gram matrices of unit-length patch tokens.

    The mean is over all L x L pairs of each view, then over views; views do not meet. Negative
    similarities count as they are, and the student's masked tokens with the others: DINOv3's choice
    for its own models.

    No L x L matrix is formed (191 MB a view for 3x48x48 tokens). With e = s - a and h = (s + a) / 2
    the difference s s^T - a a^T is e h^T + h e^T, whose squared norm is
    ``2 <e^T e, h^T h> + 2 <h^T e, (h^T e)^T>``: three D x D products, and small where e is small,
    where the difference of two norms would cancel.

    Args:
        student_NLD: Normed patch tokens of the student.
        anchor_NLD: Those of the anchor for the same views, on the same grid; gets no gradient.

    Returns:
        A float32 scalar (float64 for float64 tokens).
    """
    assert student_NLD.shape == anchor_NLD.shape
    with torch.autocast(student_NLD.device.type, enabled=False):
        dtype = torch.promote_types(student_NLD.dtype, torch.float32)
        student_NLD = F.normalize(student_NLD.to(dtype), dim=-1)
        anchor_NLD = F.normalize(anchor_NLD.detach().to(dtype), dim=-1)
        apart_NLD = student_NLD - anchor_NLD
        middle_NLD = (student_NLD + anchor_NLD) / 2
        apart_NDD = apart_NLD.mT @ apart_NLD
        middle_NDD = middle_NLD.mT @ middle_NLD
        mixed_NDD = middle_NLD.mT @ apart_NLD
        square_N = 2 * (apart_NDD * middle_NDD + mixed_NDD * mixed_NDD.mT).sum((1, 2))
        return square_N.mean() / student_NLD.shape[1] ** 2


def resize_patches(patches_NLD: Tensor, grid_zyx: Zyx, to_zyx: Zyx) -> Tensor:
    """Return patch tokens on another grid, trilinear with half-pixel centres.

    For the anchor's tokens of a larger view. At half the size each is the mean of its neighbours.

    Args:
        patches_NLD: Tokens on ``grid_zyx``, in z, y, x order.
        grid_zyx: Their grid.
        to_zyx: The grid of the result.
    """
    assert patches_NLD.shape[1] == math.prod(grid_zyx)
    if grid_zyx == to_zyx:
        return patches_NLD
    maps_NDZYX = patches_NLD.mT.unflatten(2, grid_zyx)  # type: ignore[no-untyped-call]
    resized_NDZYX = F.interpolate(maps_NDZYX, size=to_zyx, mode="trilinear", align_corners=False)
    return resized_NDZYX.flatten(2).mT


def anchor_step(config: GramConfig, step: int) -> int | None:
    """Return after how many steps the teacher was what anchors step ``step``, counted from 0.

    None before ``start_step``: the loss is left out. The copy is made before a step where this
    equals the step itself, and belongs to the checkpoint.
    """
    if step < config.start_step:
        return None
    refreshes = min((step - config.start_step) // config.refresh_every, config.max_refreshes)
    return config.start_step + refreshes * config.refresh_every


def anchor_size_zyx(config: GramConfig, size_zyx: Sequence[int], patch_zyx: Zyx) -> Zyx:
    """Return the size of the anchor's views in voxels: scaled in plane, to whole patches."""
    z, y, x = size_zyx
    y, x = (
        max(round(size * config.scale / patch), 1) * patch
        for size, patch in zip((y, x), patch_zyx[1:], strict=True)
    )
    return z, y, x


class Anchor(nn.Module):
    """A frozen copy of an earlier teacher's backbone; its state belongs to the checkpoint.

    Args:
        config: When it is copied anew, and at which size it sees a view.
        vit: Architecture of the run.
        hu: Intensity contract of the run.
    """

    def __init__(self, config: GramConfig, vit: VitConfig, hu: HuConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Vit(vit, hu).requires_grad_(False)

    @torch.no_grad()
    def refresh(self, teacher: Vit, step: int) -> None:
        """Copy the teacher if it anchors from ``step`` on, in place; call before each step."""
        if anchor_step(self.config, step) == step:
            for own, new in zip(self.backbone.parameters(), teacher.parameters(), strict=True):
                own.copy_(whole(new))

    @torch.no_grad()
    def patches(self, views_NCZYX: Tensor) -> Tensor:
        """Return normed patch tokens_NLD of unmasked views, on the grid that the student has.

        With a scale above 1 the views are enlarged first. That shows no new detail, unlike DINOv3's
        larger crops; each token of the enlarged view stands for less of it.
        """
        backbone, size_zyx = self.backbone, views_NCZYX.shape[2:]
        to_zyx = backbone.patch_embed.grid_zyx(views_NCZYX)
        larger_zyx = anchor_size_zyx(self.config, size_zyx, backbone.config.patch_zyx)
        if larger_zyx != size_zyx:
            views_NCZYX = F.interpolate(views_NCZYX, size=larger_zyx, mode="trilinear")
        tokens_NTD = backbone.forward_tokens(views_NCZYX)
        patches_NLD: Tensor = backbone.norm(tokens_NTD[:, backbone.num_prefix :])
        return resize_patches(patches_NLD, backbone.patch_embed.grid_zyx(views_NCZYX), to_zyx)

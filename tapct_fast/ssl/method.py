"""Student, teacher and the DINOv2 objective of one optimizer step.

A step has two phases: the teacher encodes every micro-batch, and one Sinkhorn-Knopp balances all
of its rows; then the student takes the micro-batches one by one. So neither the number of
micro-batches nor that of processes changes a loss.

Shape suffixes: V views, B samples, N = V * B views (view-major), G groups, C channels (one),
Z Y X voxels, M masked tokens, Q rows that are read, D width, K bottleneck width, P prototypes,
S block.
Source: DINOv2, arXiv:2304.07193; scalings as in its ssl_meta_arch.py (Apache-2.0).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.config import HeadsConfig, HuConfig, LossConfig, VitConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.model.heads import Projection, PrototypeHead
from tapct_fast.model.vit import Vit
from tapct_fast.ssl.centering import SoftmaxCenter
from tapct_fast.ssl.dino import dino_loss
from tapct_fast.ssl.gram import Anchor, gram_loss
from tapct_fast.ssl.ibot import ibot_loss
from tapct_fast.ssl.koleo import koleo_loss
from tapct_kernels import Logits, SoftTargets, masked_gather, sinkhorn


class Losses(NamedTuple):
    """Float32 scalars of one micro-batch; ``total`` is the weighted sum of the others.

    A student whose logits are all equal has dino_global + dino_local = ln P of the DINO head, and
    ibot = (share of masked views) * ln P of the iBOT head.
    """

    total: Tensor
    dino_global: Tensor
    dino_local: Tensor
    ibot: Tensor
    koleo: Tensor  # summed over the two global views
    gram: Tensor  # 0 where no anchor is asked


class Kept(NamedTuple):
    """The rows that drop path keeps in each branch of each block; see ``draw_kept_rows``."""

    global_S2N: Tensor
    local_S2N: Tensor


class Encoded(NamedTuple):
    """What a network makes of a micro-batch; its DINO head sees the cls tokens, global ones first.

    ``ibot`` is None where no token is masked.
    """

    cls_ND: Tensor  # of the global views, normed
    dino: Projection
    ibot: Projection | None
    patches_NLD: Tensor | None = None  # of the global views, normed, where they were asked for


class Targets(NamedTuple):
    """What the teacher asks for in one micro-batch."""

    dino: SoftTargets  # of the global views
    ibot: SoftTargets | None  # of the masked tokens; None without any


class StepTargets(NamedTuple):
    """The targets of all micro-batches of a step.

    ``mean_logits`` holds, for each head, the mean over the rows of all processes, to which softmax
    centering moves once the step is known to be sound; Sinkhorn-Knopp keeps none.
    """

    of_micro_batches: list[Targets]
    mean_logits: list[Tensor]


class Networks(nn.Module):
    """A backbone with its heads: the student, or the teacher. Its keys are the checkpoint's.

    Args:
        vit: The backbone.
        heads: The heads; without ``heads.ibot`` the DINO head serves the masked tokens too.
        hu: Intensity contract, for backbones fed with int16 HU.
    """

    def __init__(self, vit: VitConfig, heads: HeadsConfig, hu: HuConfig) -> None:
        super().__init__()
        self.backbone = Vit(vit, hu)
        self.dino_head = PrototypeHead(vit.dim, heads.dino)
        self.ibot_head = None if heads.ibot is None else PrototypeHead(vit.dim, heads.ibot)

    def init_weights(self, seed: int) -> None:
        """Initialise every parameter as a pure function of ``seed``, below 2**62."""
        self.backbone.init_weights(seed)
        self.dino_head.init_weights(seed + 1)
        if self.ibot_head is not None:
            self.ibot_head.init_weights(seed + 2)

    def encode_teacher(self, batch: ViewBatch) -> Encoded:
        """Encode the global views, none of their tokens masked."""
        views_NCZYX, index_M = _as_volumes(batch.global_VBZYX), batch.masked_index_M
        rows_QD = self.backbone.read_rows(views_NCZYX, index_M)
        cls_ND, masked_MD = torch.split(rows_QD, [views_NCZYX.shape[0], index_M.shape[0]])
        return self.project(cls_ND, cls_ND, masked_MD)

    def encode_student(
        self,
        batch: ViewBatch,
        kept: Kept | None = None,
        *,
        is_masked: bool = True,
        wants_patches: bool = False,
    ) -> Encoded:
        """Encode the global views, their tokens masked or not, and the local ones.

        With ``wants_patches`` all patch tokens of the global views are returned too, at the price
        of the last block in full.
        """
        views_NCZYX, index_M = _as_volumes(batch.global_VBZYX), batch.masked_index_M
        mask_NL = batch.mask_NL if is_masked else None
        kept_S2N = kept and kept.global_S2N
        patches_NLD = None
        if wants_patches:
            output = self.backbone(views_NCZYX, mask_BL=mask_NL, kept_S2N=kept_S2N)
            cls_ND, patches_NLD = output.cls_BD, output.patches_BLD
            masked_MD = masked_gather(patches_NLD, index_M, None, None, 0, 0.0)
        else:
            rows_QD = self.backbone.read_rows(views_NCZYX, index_M, mask_NL, kept_S2N=kept_S2N)
            cls_ND, masked_MD = torch.split(rows_QD, [views_NCZYX.shape[0], index_M.shape[0]])
        all_cls_ND = cls_ND
        if batch.local_VBZYX.shape[0]:
            local_ND = self.backbone.read_rows(
                _as_volumes(batch.local_VBZYX), index_M[:0], kept_S2N=kept and kept.local_S2N
            )
            all_cls_ND = torch.cat([cls_ND, local_ND])
        return self.project(cls_ND, all_cls_ND, masked_MD)._replace(patches_NLD=patches_NLD)

    def encode_patches(self, views_NCZYX: Tensor) -> Tensor:
        """Return the normed patch tokens patches_NLD of some views."""
        patches_NLD: Tensor = self.backbone(views_NCZYX).patches_BLD
        return patches_NLD

    def project(self, cls_ND: Tensor, all_cls_ND: Tensor, masked_MD: Tensor) -> Encoded:
        """Run the heads on all normed cls tokens, global ones first, and on masked tokens."""
        dino: Projection = self.dino_head(all_cls_ND)
        if not masked_MD.shape[0]:  # a constant of the run
            return Encoded(cls_ND, dino, None)
        if self.ibot_head is not None:
            return Encoded(cls_ND, dino, self.ibot_head(masked_MD))
        features_MK = self.dino_head.bottleneck(masked_MD)
        return Encoded(cls_ND, dino, dino._replace(features_NK=features_MK))


class DinoMethod(nn.Module):
    """Two networks of one architecture and the loss between them; the teacher gets no gradient.

    Args:
        vit: Both backbones.
        heads: Both sets of heads.
        losses: Loss weights and centering.
        hu: Intensity contract.
        seed: Initialises the student, below 2**62; the teacher starts as its copy.
        group_size: Samples among which KoLeo looks for neighbours; 0 is the micro-batch.
    """

    def __init__(
        self,
        vit: VitConfig,
        heads: HeadsConfig,
        losses: LossConfig,
        *,
        hu: HuConfig,
        seed: int,
        group_size: int = 0,
    ) -> None:
        super().__init__()
        self.config = losses
        self.group_size = group_size
        self.guide: Networks | None = None  # gives the targets in the teacher's place
        self.anchor: Anchor | None = None
        self.student = Networks(vit, heads, hu)
        self.student.init_weights(seed)
        self.teacher = Networks(vit, heads, hu).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        if losses.centering == "softmax":
            self.dino_center = SoftmaxCenter(heads.dino.num_prototypes)
            self.ibot_center = SoftmaxCenter((heads.ibot or heads.dino).num_prototypes)

    @property
    def target_networks(self) -> Networks:
        """The networks that give the targets: the guide's where there is one."""
        return self.guide or self.teacher

    @property
    def centers(self) -> list[SoftmaxCenter]:
        """The centers of the DINO and the iBOT head; none with Sinkhorn-Knopp."""
        return [self.dino_center, self.ibot_center] if self.config.centering == "softmax" else []

    @torch.no_grad()
    def targets(
        self,
        encoded: Sequence[Encoded],
        temp: float | Tensor,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> StepTargets:
        """Return the teacher's targets for all micro-batches of a step.

        Args:
            encoded: By the teacher, of every micro-batch.
            temp: Teacher temperature.
            group: Processes that share the step.
        """
        heads = [[e.dino for e in encoded], [e.ibot for e in encoded if e.ibot is not None]]
        rows = [  # of all micro-batches: the features are joined, not the logits
            head[0]._replace(features_NK=torch.cat([p.features_NK for p in head]))
            for head in heads
            if head
        ]
        # Of the cls tokens there are few: their logits are always stored.
        logits: list[Tensor | Logits] = [
            p.product() if i and self.config.recompute_ibot_logits else p.logits()
            for i, p in enumerate(rows)
        ]
        mean_logits = []
        if self.centers:
            targets = [center(of, temp) for center, of in zip(self.centers, logits, strict=False)]
            mean_logits = [_mean_logits(projection, group) for projection in rows]
        else:
            targets = sinkhorn(logits, temp, group=group)
        split = [_split(t, len(encoded)) for t in targets]
        ibot: Sequence[SoftTargets | None] = split[1] if len(split) > 1 else [None] * len(encoded)
        return StepTargets(
            [Targets(d, i) for d, i in zip(split[0], ibot, strict=True)], mean_logits
        )

    def student_losses(
        self,
        batch: ViewBatch,
        targets: Targets,
        kept: Kept | None = None,
        *,
        is_anchored: bool = False,
    ) -> tuple[Losses, Tensor]:
        """Return the losses of one micro-batch, differentiable in the student.

        Args:
            batch: Views and masks.
            targets: Of this micro-batch.
            kept: The rows that drop path keeps; None drops nothing.
            is_anchored: Add the Gram loss against the anchor.

        Returns:
            The losses, and the student's cls tokens of the global views, detached.
        """
        cls_ND, dino_student, ibot_student, patches_NLD = self.student.encode_student(
            batch, kept, is_masked=self.guide is None, wants_patches=is_anchored
        )
        temp = self.config.student_temp
        num_views = batch.global_VBZYX.shape[0] + batch.local_VBZYX.shape[0]
        features_VBK = _parts(dino_student.features_NK, num_views)
        dino = dino_loss(targets.dino, features_VBK, dino_student.prototypes_PK, student_temp=temp)
        ibot = dino.global_views.new_zeros(())
        if targets.ibot is not None and ibot_student is not None:
            num_global, weight_M = batch.mask_NL.shape[0], batch.masked_weight_M
            ibot = ibot_loss(
                targets.ibot, *ibot_student, weight_M, num_views=num_global, student_temp=temp
            )
        koleo = torch.stack(
            [
                koleo_loss(_parts(view_BD, view_BD.shape[0] // (self.group_size or len(view_BD))))
                for view_BD in cls_ND.chunk(2)
            ]
        ).sum()
        total = (
            self.config.dino_weight * (dino.global_views + dino.local_views)
            + self.config.ibot_weight * ibot
            + self.config.koleo_weight * koleo
        )
        gram = total.new_zeros(())
        if patches_NLD is not None:
            assert self.anchor is not None, "only a run with an anchor asks for it"
            gram = gram_loss(patches_NLD, self.anchor.patches(_as_volumes(batch.global_VBZYX)))
            total = total + self.anchor.config.weight * gram
        losses = Losses(total, dino.global_views, dino.local_views, ibot, koleo, gram)
        return losses, cls_ND.detach()


def _as_volumes(views_VBZYX: Tensor) -> Tensor:
    return views_VBZYX.flatten(0, 1).unsqueeze(1)


def _parts(rows_NK: Tensor, num: int) -> Tensor:
    parts_VBK: Tensor = rows_NK.unflatten(0, (num, -1))  # type: ignore[no-untyped-call]
    return parts_VBK


def _split(targets: SoftTargets, num: int) -> list[SoftTargets]:
    """Return the targets of each of ``num`` micro-batches, which have equally many rows."""
    return [
        targets._replace(rows_NX=rows_NX, row_N=row_N)
        for rows_NX, row_N in zip(targets.rows_NX.chunk(num), targets.row_N.chunk(num), strict=True)
    ]


def _mean_logits(rows: Projection, group: dist.ProcessGroup | None) -> Tensor:
    """Return the mean over the rows of all processes: the logits of the mean row."""
    features_NK, prototypes_PK = rows
    dtype = torch.promote_types(features_NK.dtype, torch.float32)
    mean_K = features_NK.mean(0, dtype=dtype)
    if group is not None:
        dist.all_reduce(mean_K, group=group)
        mean_K /= dist.get_world_size(group)
    with torch.autocast(mean_K.device.type, enabled=False):
        return F.linear(mean_K, prototypes_PK.to(dtype))

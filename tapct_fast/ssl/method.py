"""Student, teacher and the DINOv2 objective of one micro-batch.

Shape suffixes: V views, B samples, N = V * B views (view-major), C channels (one), Z Y X voxels,
T tokens of a view, L patch tokens, M masked tokens, D width, K bottleneck width.
Source: DINOv2, arXiv:2304.07193; scalings as in its ssl_meta_arch.py (Apache-2.0).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tapct_fast.config import HeadsConfig, HuConfig, LossConfig, VitConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.model.block import NORM_EPS
from tapct_fast.model.heads import Projection, PrototypeHead
from tapct_fast.model.vit import Vit
from tapct_fast.ssl.centering import SoftmaxCenter
from tapct_fast.ssl.dino import dino_loss
from tapct_fast.ssl.ibot import ibot_loss
from tapct_fast.ssl.koleo import koleo_loss
from tapct_kernels import SoftTargets, masked_gather, sinkhorn


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


class Targets(NamedTuple):
    """What the teacher asks for."""

    dino: SoftTargets  # of the global views
    ibot: SoftTargets | None  # of the masked tokens; None without any


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

    def cls_tokens(self, tokens_NTD: Tensor) -> Tensor:
        """Return the normed cls tokens cls_ND; no other row is normed."""
        cls_ND: Tensor = self.backbone.norm(tokens_NTD[:, 0])
        return cls_ND

    def masked_tokens(self, tokens_NTD: Tensor, index_M: Tensor) -> Tensor:
        """Return the normed patch tokens rows_MD that ``index_M`` lists."""
        norm, prefix = self.backbone.norm, self.backbone.num_prefix
        rows_MD: Tensor = masked_gather(
            tokens_NTD, index_M, norm.weight, norm.bias, prefix, NORM_EPS
        )
        return rows_MD

    def project(
        self, cls_ND: Tensor, masked_MD: Tensor | None
    ) -> tuple[Projection, Projection | None]:
        """Return what the DINO head makes of cls tokens and the iBOT head of masked tokens."""
        dino: Projection = self.dino_head(cls_ND)
        if masked_MD is None:
            return dino, None
        if self.ibot_head is not None:
            return dino, self.ibot_head(masked_MD)
        return dino, dino._replace(features_NK=self.dino_head.bottleneck(masked_MD))


class DinoMethod(nn.Module):
    """Two networks of one architecture and the loss between them; the teacher gets no gradient.

    Args:
        vit: Both backbones.
        heads: Both sets of heads.
        losses: Loss weights and centering.
        hu: Intensity contract.
        seed: Initialises the student, below 2**62; the teacher starts as its copy.
    """

    def __init__(
        self,
        vit: VitConfig,
        heads: HeadsConfig,
        losses: LossConfig,
        *,
        hu: HuConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = losses
        self.student = Networks(vit, heads, hu)
        self.student.init_weights(seed)
        self.teacher = Networks(vit, heads, hu).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        if losses.centering == "softmax":
            self.dino_center = SoftmaxCenter(heads.dino.num_prototypes)
            self.ibot_center = SoftmaxCenter((heads.ibot or heads.dino).num_prototypes)

    def losses(self, batch: ViewBatch, *, teacher_temp: float, drop_seed: int | None) -> Losses:
        """Return the losses of one micro-batch, differentiable in the student.

        Args:
            batch: Views and masks.
            teacher_temp: Temperature of the teacher's targets.
            drop_seed: Draws the rows that drop path keeps, below 2**62; None drops nothing.
        """
        targets = self.targets(batch, teacher_temp)
        student = self.student
        num_global, num_local = batch.global_VBZYX.shape[0], batch.local_VBZYX.shape[0]
        global_seed, local_seed = (None if drop_seed is None else 2 * drop_seed + i for i in (0, 1))

        tokens_NTD = student.backbone.forward_tokens(
            _as_volumes(batch.global_VBZYX), batch.mask_NL, drop_seed=global_seed
        )
        global_ND = student.cls_tokens(tokens_NTD)
        masked_MD = None
        if targets.ibot is not None:
            masked_MD = student.masked_tokens(tokens_NTD, batch.masked_index_M)
        cls_ND = global_ND
        if num_local:
            tokens_NTD = student.backbone.forward_tokens(
                _as_volumes(batch.local_VBZYX), drop_seed=local_seed
            )
            cls_ND = torch.cat([global_ND, student.cls_tokens(tokens_NTD)])
        dino_student, ibot_student = student.project(cls_ND, masked_MD)

        temp = self.config.student_temp
        features_VBK = _by_view(dino_student.features_NK, num_global + num_local)
        dino = dino_loss(targets.dino, features_VBK, dino_student.prototypes_PK, student_temp=temp)
        ibot = dino.global_views.new_zeros(())
        if targets.ibot is not None and ibot_student is not None:
            num_views, weight_M = batch.mask_NL.shape[0], batch.masked_weight_M
            ibot = ibot_loss(
                targets.ibot, *ibot_student, weight_M, num_views=num_views, student_temp=temp
            )
        first_BD, second_BD = global_ND.chunk(2)
        koleo = koleo_loss(first_BD) + koleo_loss(second_BD)
        total = (
            self.config.dino_weight * (dino.global_views + dino.local_views)
            + self.config.ibot_weight * ibot
            + self.config.koleo_weight * koleo
        )
        return Losses(total, dino.global_views, dino.local_views, ibot, koleo)

    @torch.no_grad()
    def targets(self, batch: ViewBatch, temp: float) -> Targets:
        """Return the teacher's targets for the unmasked global views, without drop path."""
        tokens_NTD = self.teacher.backbone.forward_tokens(_as_volumes(batch.global_VBZYX))
        masked_MD = None
        if batch.masked_index_M.shape[0]:  # a constant of the run
            masked_MD = self.teacher.masked_tokens(tokens_NTD, batch.masked_index_M)
        dino, ibot = self.teacher.project(self.teacher.cls_tokens(tokens_NTD), masked_MD)
        logits = [head.logits() for head in (dino, ibot) if head is not None]
        if self.config.centering == "softmax":
            centers = (self.dino_center, self.ibot_center)
            targets = [center(rows, temp) for center, rows in zip(centers, logits, strict=False)]
        else:
            targets = sinkhorn(logits, temp)
        return Targets(targets[0], targets[1] if ibot is not None else None)


def _as_volumes(views_VBZYX: Tensor) -> Tensor:
    return views_VBZYX.flatten(0, 1).unsqueeze(1)


def _by_view(rows_NK: Tensor, num_views: int) -> Tensor:
    rows_VBK: Tensor = rows_NK.unflatten(0, (num_views, -1))  # type: ignore[no-untyped-call]
    return rows_VBK

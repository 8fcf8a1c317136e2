"""Student, teacher and the DINOv2 objective of one micro-batch.

Shape suffixes: V views, B samples, N = V * B views (view-major), C channels (one), Z Y X voxels,
T tokens of a view, L patch tokens, M masked tokens, D width, P prototypes.
Source: DINOv2, arXiv:2304.07193; scalings as in its ssl_meta_arch.py (Apache-2.0).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tapct_fast.config import HeadsConfig, HuConfig, LossConfig, VitConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.model.block import NORM_EPS
from tapct_fast.model.heads import PrototypeHead
from tapct_fast.model.vit import Vit
from tapct_fast.ssl.centering import SoftmaxCenter
from tapct_fast.ssl.dino import dino_loss
from tapct_fast.ssl.ibot import ibot_loss
from tapct_fast.ssl.koleo import koleo_loss
from tapct_kernels import masked_gather, sinkhorn


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

    dino_VBP: Tensor
    ibot_MP: Tensor | None  # None without masked tokens


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

    def logits(self, cls_ND: Tensor, masked_MD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the DINO logits of the cls tokens and the iBOT logits of the masked tokens."""
        if masked_MD is None:
            return self.dino_head(cls_ND), None
        if self.ibot_head is not None:
            return self.dino_head(cls_ND), self.ibot_head(masked_MD)
        # One call: the shared head's weight norm is computed once.
        sizes = [cls_ND.shape[0], masked_MD.shape[0]]
        rows_ND = torch.cat([cls_ND, masked_MD.to(cls_ND.dtype)])
        dino_NP, ibot_MP = self.dino_head(rows_ND).split(sizes)
        return dino_NP, ibot_MP


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
        if targets.ibot_MP is not None:
            masked_MD = student.masked_tokens(tokens_NTD, batch.masked_index_M)
        cls_ND = global_ND
        if num_local:
            tokens_NTD = student.backbone.forward_tokens(
                _as_volumes(batch.local_VBZYX), drop_seed=local_seed
            )
            cls_ND = torch.cat([global_ND, student.cls_tokens(tokens_NTD)])
        dino_NP, ibot_MP = student.logits(cls_ND, masked_MD)

        dino_VBP = _by_view(dino_NP, num_global + num_local)
        temp = self.config.student_temp
        dino = dino_loss(
            targets.dino_VBP, dino_VBP[:num_global], dino_VBP[num_global:], student_temp=temp
        )
        ibot = dino.global_views.new_zeros(())
        if targets.ibot_MP is not None and ibot_MP is not None:
            num_views, weight_M = batch.mask_NL.shape[0], batch.masked_weight_M
            ibot = ibot_loss(
                targets.ibot_MP, ibot_MP, weight_M, num_views=num_views, student_temp=temp
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
        dino_NP, ibot_MP = self.teacher.logits(self.teacher.cls_tokens(tokens_NTD), masked_MD)
        if self.config.centering == "softmax":
            dino_NP = self.dino_center(dino_NP, temp).dense()
            ibot_MP = None if ibot_MP is None else self.ibot_center(ibot_MP, temp).dense()
        else:
            logits = [dino_NP] if ibot_MP is None else [dino_NP, ibot_MP]
            dino_NP, *rest = (targets.dense() for targets in sinkhorn(logits, temp))
            ibot_MP = rest[0] if rest else None
        return Targets(_by_view(dino_NP, batch.global_VBZYX.shape[0]), ibot_MP)


def _as_volumes(views_VBZYX: Tensor) -> Tensor:
    return views_VBZYX.flatten(0, 1).unsqueeze(1)


def _by_view(rows_NP: Tensor, num_views: int) -> Tensor:
    rows_VBP: Tensor = rows_NP.unflatten(0, (num_views, -1))  # type: ignore[no-untyped-call]
    return rows_VBP

"""Whole training steps beside the library's, on its weights: dinov3's structure, and our eager one.

A rival is an ``Arrangement``: how voxels are embedded, tokens encoded, heads, targets and losses
computed. ``DINOV3`` is the public system by formula, on volumes: convolution, blocks compiled one
by one, resolutions in a loop, all logits in memory, targets divided in place, and with bfloat16 its
weights cast as FSDP2 does. ``bench.train_eager`` is this library's step of commit 5b7510c, frozen;
``bench.waterfall`` goes from the one to the other part by part.
Only parameters are shared with the library: ``Networks`` hold them under their names.

Shape suffixes: V views, B samples, N = V * B rows (view-major), Z Y X voxels, L patch tokens, T all
tokens of a view, D width, H heads, K bottleneck or head width, P prototypes, M masked tokens,
S student rows, J the teacher's views.
Source: DINOv2, arXiv:2304.07193 and its ssl_meta_arch.py, block.py and losses (Apache-2.0);
dinov3's order of compilation and precision, facebookresearch/dinov3 at 6876159, by behaviour.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.config import Config, Zyx
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.model.vit import Vit
from tapct_fast.ssl.method import Networks
from tapct_fast.ssl.param_groups import Multipliers, multipliers
from tapct_fast.ssl.schedules import StepValues

EPS = 1e-6  # of every LayerNorm
NAMES = ("backbone", "dino_head", "ibot_head")
Compiled = Literal["no", "blocks", "step"]
MicroBatches = Sequence[tuple[ViewBatch, int]]  # with the seed of drop path
LossNumbers = dict[str, float]  # total, dino_global, dino_local, ibot, koleo
Encoder = Callable[[list[Tensor], int | None], list[Tensor]]
HeadCall = Callable[[Tensor], Any]


class Stepper(Protocol):
    """What can be trained step by step: a rival, or the library."""

    student: Networks
    teacher: Networks
    optimizer: torch.optim.AdamW

    def step(self, batches: MicroBatches, values: StepValues) -> LossNumbers:
        """Do one optimizer step in place and return its losses."""
        ...


class Rows(NamedTuple):
    """Normed tokens that reach the heads."""

    cls_ND: Tensor
    masked_MD: Tensor | None  # None where none were asked for


class Arrangement(NamedTuple):
    """How a step is computed; each part can be replaced by itself.

    Attributes:
        precision: With bfloat16, weights cast once a step, or rounded by autocast at each product.
        embed: Backbone, volumes_BZYX and mask_BL to tokens_BTD.
        encoder: Backbone, share that drop path skips and whether to compile, to what runs the
            blocks on tokens of every resolution; None for the seed drops nothing.
        select: Backbone, tokens before the final norm and index_M to normed cls and masked tokens.
        head: Head and whether to compile to a function of rows.
        center: What the heads made of the teacher's rows, and the temperature, to targets.
        dino: Targets, what the head made of the student, views and temperature to the two parts.
        ibot: Targets, what the head made, weight_M / views and temperature to the loss.
        read: Losses and gradient norms to numbers.
        average: Teacher, student and momentum: move the first towards the second, in place.
    """

    precision: Literal["cast", "autocast"]
    embed: Callable[[Vit, Tensor, Tensor | None], Tensor]
    encoder: Callable[[Vit, float, bool], Encoder]
    select: Callable[[Vit, Tensor, Tensor | None], Rows]
    head: Callable[[nn.Module, bool], HeadCall]
    center: Callable[[list[Any], Tensor, bool], list[Any]]
    dino: Callable[[Any, Any, int, float], tuple[Tensor, Tensor]]
    ibot: Callable[[Any, Any, Tensor, float], Tensor]
    read: Callable[[Mapping[str, Tensor], Sequence[Tensor]], LossNumbers]
    average: Callable[[list[Tensor], list[Tensor], float], None]


class Rival:
    """Student, teacher and optimizer of one arrangement, from the weights of a ``DinoMethod``.

    Args:
        config: The run; Sinkhorn-Knopp and two heads, as dinov3 asserts.
        state: Of the ``DinoMethod``.
        arrangement: How it computes.
        device: Where.
        dtype: Of the matrix products.
        compiled: Blocks and heads one by one, the forward pass as one graph, or nothing.
    """

    def __init__(
        self,
        config: Config,
        state: Mapping[str, Tensor],
        arrangement: Arrangement,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: Compiled = "no",
    ) -> None:
        assert config.losses.centering == "sinkhorn"
        assert config.heads.ibot is not None
        self.config, self.arrangement, self.dtype = config, arrangement, dtype
        self.student, self.teacher = (
            _networks(config, state, f"{name}.", device) for name in ("student", "teacher")
        )
        self.teacher.requires_grad_(False)
        self.optimizer = fused_adamw(self.student, config)
        casts = arrangement.precision == "cast" and dtype != torch.float32
        computing = [
            copy.deepcopy(networks).to(dtype) if casts else networks
            for networks in (self.student, self.teacher)
        ]
        self.computing = computing[0]  # the student whose gradients a backward leaves
        by_block = compiled == "blocks"
        self._student, self._teacher = (_Calls(n, self, by_block) for n in computing)
        self._losses = self.losses
        if compiled == "step":
            self._losses = torch.compile(self.losses, dynamic=False)

    def step(self, batches: MicroBatches, values: StepValues) -> LossNumbers:
        """Do one optimizer step in place and return its losses."""
        self.optimizer.zero_grad(set_to_none=True)
        _copy_weights(self.student, self._student.networks)
        _copy_weights(self.teacher, self._teacher.networks)
        drops, device_type = self.config.vit.drop_path > 0, batches[0][0].mask_NL.device.type
        is_rounded = self.arrangement.precision == "autocast" and self.dtype != torch.float32
        sums: dict[str, Tensor] = {}
        for batch, drop_seed in batches:
            temp = torch.full((), values.teacher_temp, device=batch.mask_NL.device)
            with torch.autocast(device_type, dtype=self.dtype, enabled=is_rounded):
                losses = self._losses(batch, temp, drop_seed if drops else None)
            (losses["total"] / len(batches)).backward()  # type: ignore[no-untyped-call]
            for name, loss in losses.items():
                part = loss.detach() / len(batches)
                sums[name] = sums[name] + part if name in sums else part
        _return_gradients(self._student.networks, self.student)
        clip_norm = self.config.optim.clip_norm
        norms = [
            nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
            for module in self.student.children()
        ]
        numbers = self.arrangement.read(sums, norms)
        for group in self.optimizer.param_groups:
            by: Multipliers = group["multipliers"]
            group["lr"] = (values.last_layer_lr if by.is_last_layer else values.lr) * by.lr
            group["weight_decay"] = values.weight_decay * by.weight_decay
        self.optimizer.step()
        means: list[Tensor] = list(self.teacher.parameters())
        new: list[Tensor] = list(self.student.parameters())
        with torch.no_grad():
            self.arrangement.average(means, new, values.momentum)
        return numbers

    def losses(self, batch: ViewBatch, temp: Tensor, drop_seed: int | None) -> dict[str, Tensor]:
        """Return the losses of one micro-batch, differentiable in the student."""
        with torch.no_grad():
            (tokens_NTD,) = self._teacher.encode([batch.global_VBZYX], [None], None)
            teacher = self._teacher.select(tokens_NTD, batch.masked_index_M)
        views = [v for v in (batch.global_VBZYX, batch.local_VBZYX) if v.shape[0]]
        tokens_NTD, *local = self._student.encode(views, [batch.mask_NL, None], drop_seed)
        student = self._student.select(tokens_NTD, batch.masked_index_M)
        first_BD, second_BD = student.cls_ND.chunk(2)
        koleo = koleo_loss(first_BD) + koleo_loss(second_BD)
        cls = [student.cls_ND, *(self._student.select(x, None).cls_ND for x in local)]
        student = Rows(torch.cat(cls), student.masked_MD)
        losses = self.head_losses(
            teacher, student, batch.masked_weight_M / batch.mask_NL.shape[0], temp
        )
        weights = self.config.losses
        total = (
            weights.dino_weight * (losses["dino_global"] + losses["dino_local"])
            + weights.ibot_weight * losses["ibot"]
            + weights.koleo_weight * koleo
        )
        return {"total": total, **losses, "koleo": koleo}

    def head_losses(
        self, teacher: Rows, student: Rows, weight_M: Tensor, temp: Tensor
    ) -> dict[str, Tensor]:
        """Return DINO's and iBOT's losses of rows that reach the heads.

        Args:
            teacher: Of the global views.
            student: Of all views, the global ones first; masked tokens as the teacher's.
            weight_M: 1 / (masked tokens of the view * views).
            temp: Of the teacher, a tensor: a float would compile anew at every step.
        """
        arrangement, student_temp = self.arrangement, self.config.losses.student_temp
        assert teacher.masked_MD is not None
        assert student.masked_MD is not None
        targets = self._targets(teacher.cls_ND, teacher.masked_MD, temp)
        dino, ibot = self._student.project(student.cls_ND, student.masked_MD)
        num_views = 2 * student.cls_ND.shape[0] // teacher.cls_ND.shape[0]
        parts = arrangement.dino(targets[0], dino, num_views, student_temp)
        loss = arrangement.ibot(targets[1], ibot, weight_M, student_temp)
        return {"dino_global": parts[0], "dino_local": parts[1], "ibot": loss}

    @torch.no_grad()
    def _targets(self, cls_ND: Tensor, masked_MD: Tensor, temp: Tensor) -> list[Any]:
        outs = self._teacher.project(cls_ND, masked_MD)
        return self.arrangement.center(outs, temp, self._teacher.by_block)


class _Calls:
    """One network's parts, as its arrangement calls them."""

    def __init__(self, networks: Networks, rival: Rival, by_block: bool) -> None:
        arrangement, vit = rival.arrangement, networks.backbone
        assert networks.ibot_head is not None
        self.networks, self.by_block = networks, by_block
        self._vit, self._embed, self._select = vit, arrangement.embed, arrangement.select
        self._encode = arrangement.encoder(vit, rival.config.vit.drop_path, by_block)
        self._dino_head = arrangement.head(networks.dino_head, by_block)
        self._ibot_head = arrangement.head(networks.ibot_head, by_block)

    def encode(
        self, views: list[Tensor], masks: list[Tensor | None], drop_seed: int | None
    ) -> list[Tensor]:
        pairs = zip(views, masks, strict=False)
        tokens = [self._embed(self._vit, view.flatten(0, 1), mask_NL) for view, mask_NL in pairs]
        return self._encode(tokens, drop_seed)

    def select(self, tokens_NTD: Tensor, index_M: Tensor | None) -> Rows:
        return self._select(self._vit, tokens_NTD, index_M)

    def project(self, cls_ND: Tensor, masked_MD: Tensor) -> list[Any]:
        return [self._dino_head(cls_ND), self._ibot_head(masked_MD)]


def _networks(config: Config, state: Mapping[str, Tensor], prefix: str, device: str) -> Networks:
    networks = Networks(config.vit, config.heads, config.hu)
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    networks.load_state_dict(own)
    return networks.to(device)


def fused_adamw(student: Networks, config: Config) -> torch.optim.AdamW:
    """Return AdamW over DINOv2's parameter groups, equal ones joined."""
    groups: dict[Multipliers, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        key = multipliers(name, depth=config.vit.depth, config=config.optim)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "multipliers": key} for key, params in groups.items()],
        lr=0.0,
        betas=config.optim.betas,
        fused=True,
    )


@torch.no_grad()
def _copy_weights(masters: nn.Module, computing: nn.Module) -> None:
    """Round the weights for this step, as FSDP2 does where it gathers them."""
    if masters is not computing:
        torch._foreach_copy_(list(computing.parameters()), list(masters.parameters()))


@torch.no_grad()
def _return_gradients(computing: nn.Module, masters: nn.Module) -> None:
    """Hand the gradients of rounded weights to the float32 ones, which the optimizer moves."""
    if masters is not computing:
        for rounded, master in zip(computing.parameters(), masters.parameters(), strict=True):
            master.grad = None if rounded.grad is None else rounded.grad.float()
            rounded.grad = None


def koleo_loss(cls_BD: Tensor) -> Tensor:
    """Return DINOv2's KoLeo loss of one view, in float32."""
    with torch.autocast(cls_BD.device.type, enabled=False):
        if cls_BD.shape[0] < 2:
            return cls_BD.float().sum() * 0.0
        unit_BD = F.normalize(cls_BD.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            nearest_B = (unit_BD @ unit_BD.T).fill_diagonal_(-2.0).argmax(dim=1)
        distance_B = F.pairwise_distance(unit_BD, unit_BD[nearest_B], eps=1e-8)
        return -torch.log(distance_B + 1e-8).mean()


def position_rows(vit: Vit, grid_zyx: Zyx) -> Tensor:
    """Return pos_LD of a grid, interpolated trilinearly to any other than the learned one."""
    pos_LD = vit.pos_embed[0, 1:]
    if grid_zyx == vit.config.grid_zyx:
        return pos_LD
    volume_DZYX = pos_LD.T.reshape(-1, *vit.config.grid_zyx).float()
    resized_DZYX = F.interpolate(volume_DZYX[None], size=grid_zyx, mode="trilinear")[0]
    return resized_DZYX.flatten(1).T.to(pos_LD.dtype)


def grid_of(vit: Vit, x_BZYX: Tensor) -> Zyx:
    """Return the tokens of volumes along each axis."""
    z, y, x = (s // p for s, p in zip(x_BZYX.shape[1:], vit.config.patch_zyx, strict=True))
    return z, y, x


def conv_embed(vit: Vit, x_BZYX: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Embed by a strided convolution, then mask, prepend, add positions, insert registers."""
    weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
    x_BCZYX = x_BZYX.unsqueeze(1).to(weight.dtype)
    x_BLD = F.conv3d(x_BCZYX, weight, bias, stride=vit.config.patch_zyx).flatten(2).mT
    if mask_BL is not None:
        x_BLD = torch.where(mask_BL[..., None], vit.mask_token.to(x_BLD.dtype), x_BLD)
    batch, grid_zyx = x_BLD.shape[0], grid_of(vit, x_BZYX)
    pos_TD = torch.cat([vit.pos_embed[0, :1], position_rows(vit, grid_zyx)])
    x_BTD = torch.cat([vit.cls_token.expand(batch, -1, -1), x_BLD], dim=1) + pos_TD
    if vit.config.num_registers:
        registers_BRD = vit.register_tokens.expand(batch, -1, -1)
        x_BTD = torch.cat([x_BTD[:, :1], registers_BRD, x_BTD[:, 1:]], dim=1)
    return x_BTD


class PlainBlock(nn.Module):
    """DINOv2's block on a list of resolutions, with the parameters of one of ours."""

    def __init__(self, block: Any, head_dim: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = block.norm1, block.attn, block.ls1
        self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        self.head_dim = head_dim

    def attend(self, x_BTD: Tensor) -> Tensor:
        """Return the attention branch."""
        qkv_BT3HK = self.attn.qkv(x_BTD).unflatten(2, (3, -1, self.head_dim))
        q_BHTK, k_BHTK, v_BHTK = qkv_BT3HK.permute(2, 0, 3, 1, 4).unbind(0)
        out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK)
        out_BTD: Tensor = self.attn.proj(out_BHTK.transpose(1, 2).flatten(2))
        return out_BTD

    def feed(self, x_BTD: Tensor) -> Tensor:
        """Return the feed-forward branch."""
        out_BTD: Tensor = self.mlp.fc2(F.gelu(self.mlp.fc1(x_BTD)))
        return out_BTD

    def forward(self, x: list[Tensor], drop_path: float) -> list[Tensor]:
        """Return the tokens of each resolution; a branch runs on a random subset of its rows."""
        for norm, branch, scale in (
            (self.norm1, self.attend, self.ls1.gamma),
            (self.norm2, self.feed, self.ls2.gamma),
        ):
            gamma_D = 1.0 if scale is None else scale
            if not drop_path:
                x = [x_BTD + branch(norm(x_BTD)) * gamma_D for x_BTD in x]
                continue
            keeps = [max(int(x_BTD.shape[0] * (1 - drop_path)), 1) for x_BTD in x]
            rows = [
                torch.randperm(x_BTD.shape[0], device=x_BTD.device)[:keep]
                for x_BTD, keep in zip(x, keeps, strict=True)
            ]
            x = [
                x_BTD.index_add(
                    *(0, rows_K, (branch(norm(x_BTD[rows_K])) * gamma_D).to(x_BTD.dtype)),
                    alpha=x_BTD.shape[0] / rows_K.shape[0],
                )
                for x_BTD, rows_K in zip(x, rows, strict=True)
            ]
        return x


def plain_encoder(vit: Vit, drop_path: float, compiles: bool) -> Encoder:
    """Run DINOv2's blocks, each compiled by itself."""
    blocks = [PlainBlock(block, vit.config.head_dim) for block in vit.blocks]
    if compiles:
        for block in blocks:
            block.compile(dynamic=False)

    def encode(x: list[Tensor], drop_seed: int | None) -> list[Tensor]:
        if drop_seed is not None:
            torch.manual_seed(drop_seed)
        for block in blocks:
            x = block(x, 0.0 if drop_seed is None else drop_path)
        return x

    return encode


def norm_then_select(vit: Vit, tokens_BTD: Tensor, index_M: Tensor | None) -> Rows:
    """Norm every token, then take those that are used."""
    normed_BTD = vit.norm(tokens_BTD)
    if index_M is None:
        return Rows(normed_BTD[:, 0], None)
    patches_ND = normed_BTD[:, vit.num_prefix :].flatten(0, 1)
    return Rows(normed_BTD[:, 0], patches_ND.index_select(0, index_M))


class _LogitsHead(nn.Module):
    """A prototype head to its logits."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(self.head.bottleneck(x_ND), self.head.last_layer())


def logits_head(head: nn.Module, compiles: bool) -> HeadCall:
    """Return a head to logits of every prototype."""
    module = _LogitsHead(head)
    if compiles:
        module.compile(dynamic=False)
    return module


def divided_in_place(logits_NP: Tensor, temp: Tensor) -> Tensor:
    """Return dense targets_NP by DINOv2's Sinkhorn-Knopp: in place, without a maximum."""
    q_PN = torch.exp(logits_NP.float() / temp).t()
    num_prototypes, num_rows = q_PN.shape
    q_PN /= q_PN.sum()
    for _ in range(3):
        q_PN /= q_PN.sum(dim=1, keepdim=True)
        q_PN /= num_prototypes
        q_PN /= q_PN.sum(dim=0, keepdim=True)
        q_PN /= num_rows
    q_PN *= num_rows
    return q_PN.t()


_compiled_in_place = torch.compile(divided_in_place, dynamic=False)


def dense_targets(outs: list[Any], temp: Tensor, compiles: bool) -> list[Any]:
    """Balance each head's logits; dinov3 compiles that of the masked tokens."""
    dino_NP, ibot_MP = outs
    call = _compiled_in_place if compiles else divided_in_place
    return [divided_in_place(dino_NP, temp), call(ibot_MP, temp)]


def dense_dino(
    target_NP: Tensor, logits_SP: Tensor, num_views: int, temp: float
) -> tuple[Tensor, Tensor]:
    """Return the DINO loss of stored logits: every view against the teacher's other views."""
    log_q_SP = F.log_softmax(logits_SP.float() / temp, dim=-1)
    log_q_VBP = log_q_SP.unflatten(0, (num_views, -1))  # type: ignore[no-untyped-call]
    target_JBP = target_NP.float().unflatten(0, (2, -1))  # type: ignore[no-untyped-call]
    loss_VJ = -torch.einsum("vbp,jbp->vj", log_q_VBP, target_JBP)
    scale = 1 / (log_q_VBP.shape[1] * (2 * num_views - 2))
    return (loss_VJ[0, 1] + loss_VJ[1, 0]) * scale, loss_VJ[2:].sum() * scale


def dense_ibot(target_MP: Tensor, logits_MP: Tensor, weight_M: Tensor, temp: float) -> Tensor:
    """Return the iBOT loss of stored logits."""
    log_q_MP = F.log_softmax(logits_MP.float() / temp, dim=-1)
    return -((target_MP.float() * log_q_MP).sum(dim=-1) * weight_M).sum()


def read_one_by_one(losses: Mapping[str, Tensor], norms: Sequence[Tensor]) -> LossNumbers:
    """Read norms and losses one after another: each waits for the device."""
    for norm in norms:
        norm.item()
    return {name: loss.item() for name, loss in losses.items()}


def average_in_two(means: list[Tensor], new: list[Tensor], momentum: float) -> None:
    """Move the teacher by a product and a sum over all parameters."""
    torch._foreach_mul_(means, momentum)
    torch._foreach_add_(means, new, alpha=1 - momentum)


DINOV3 = Arrangement(
    precision="cast",
    embed=conv_embed,
    encoder=plain_encoder,
    select=norm_then_select,
    head=logits_head,
    center=dense_targets,
    dino=dense_dino,
    ibot=dense_ibot,
    read=read_one_by_one,
    average=average_in_two,
)

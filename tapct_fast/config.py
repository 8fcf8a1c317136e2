"""Every setting of a training run, as one tree of frozen dataclasses.

A component receives its own node, never the root. ``recipes.py`` returns complete trees; the
command line and checkpoints read and write the same tree. Sizes and axes are z, y, x throughout.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from tapct_fast.errors import ConfigError

Zyx = tuple[int, int, int]
Range = tuple[float, float]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_range(name: str, value: Range, low: float, high: float) -> None:
    _require(
        low <= value[0] <= value[1] <= high,
        f"{name}={value} is not an increasing pair in [{low:g}, {high:g}]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HuConfig:
    """Intensity contract of the released TAP-CT processor (facts: four independent users agree)."""

    clip: Range = (-1008.0, 822.0)  # HU
    mean: float = -86.8086  # HU
    std: float = 322.6347  # HU

    def __post_init__(self) -> None:
        _require(self.clip[0] < self.clip[1], f"hu.clip={self.clip} is not an increasing pair")
        _require(self.std > 0, f"hu.std={self.std} is not positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class CropConfig:
    """The box read from the store for one training sample; views are drawn inside it."""

    extent_mm_zyx: tuple[float, float, float] = (60.0, 360.0, 360.0)
    center_in_body: bool = True  # the box's centre lies inside the patient's bounding box
    # Boxes start only where blocks of the store do: faster to read, but no longer uniform.
    snap_to_blocks: bool = False

    def __post_init__(self) -> None:
        _require(
            min(self.extent_mm_zyx) > 0, f"crops.extent_mm_zyx={self.extent_mm_zyx} is not positive"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewGroupConfig:
    """One kind of view: how many, how large, and which part of the box each one shows."""

    num: int
    size_zyx: Zyx  # voxels of the rendered view
    in_plane_scale: Range  # fraction of the box's in-plane area
    depth_scale: Range  # fraction of the box's depth
    aspect: Range = (3 / 4, 4 / 3)  # in-plane height / width, log-uniform
    antialias: bool = True  # smooth where a view shrinks its part of the box
    blur_prob: Range = (0.25, 0.25)  # of the first view, of each other view

    def __post_init__(self) -> None:
        _require(
            all(0 <= p <= 1 for p in self.blur_prob),
            f"views.blur_prob={self.blur_prob} are not probabilities",
        )
        _require(self.num >= 0, f"views.num={self.num} is negative")
        _require(min(self.size_zyx) > 0, f"views.size_zyx={self.size_zyx} is not positive")
        _require_range("views.in_plane_scale", self.in_plane_scale, 1e-4, 1.0)
        _require_range("views.depth_scale", self.depth_scale, 1e-4, 1.0)
        _require_range("views.aspect", self.aspect, 0.1, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewsConfig:
    """The law every view parameter is drawn from.

    Defaults: DINOv2 in plane, 3DINO across slices, intensity changes of SPECTRE and 3DINO that keep
    HU ordering, contrast as in nnU-Net. TAP-CT's own ranges are not public.
    """

    global_views: ViewGroupConfig = field(
        default_factory=lambda: ViewGroupConfig(
            num=2, size_zyx=(12, 224, 224), in_plane_scale=(0.32, 1.0), depth_scale=(0.5, 1.0)
        )
    )
    local_views: ViewGroupConfig = field(
        default_factory=lambda: ViewGroupConfig(
            num=8, size_zyx=(12, 96, 96), in_plane_scale=(0.05, 0.32), depth_scale=(0.2, 0.5)
        )
    )
    renderer: Literal["auto", "torch", "native", "dali"] = "auto"
    flip_prob_zyx: tuple[float, float, float] = (0.0, 0.0, 0.5)
    quarter_turn_prob: float = 0.0  # in plane, by 90, 180 or 270 degrees
    window_prob: float = 0.5
    window_shift: float = 0.1  # each end moves by up to this fraction of the clip range
    gamma_prob: float = 0.25
    gamma: Range = (0.8, 1.25)  # log-uniform
    contrast_prob: float = 0.25
    contrast: Range = (0.75, 1.25)  # about the middle of the clip range, uniform
    blur_as_released: bool = False  # as DINOv2's code: blurred with one minus its probability
    blur_sigma: Range = (0.3, 1.0)  # view voxels
    thick_slice_prob: float = 0.25
    thick_slices: Range = (1.0, 3.0)  # full width at half maximum of a slice, in view voxels
    noise_prob: float = 0.25
    noise_std: Range = (0.0, 0.1)  # of the z-scored intensities

    def __post_init__(self) -> None:
        _require(
            self.global_views.num == 2, "views.global_views.num must be 2: DINO compares two views"
        )
        for name in (
            *("quarter_turn_prob", "window_prob", "gamma_prob", "contrast_prob"),
            *("thick_slice_prob", "noise_prob"),
        ):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"views.{name}={value} is not a probability")
        _require(
            all(0 <= p <= 1 for p in self.flip_prob_zyx),
            f"views.flip_prob_zyx={self.flip_prob_zyx} are not probabilities",
        )
        _require(
            0 <= self.window_shift < 0.5,
            f"views.window_shift={self.window_shift} is not in [0, 0.5)",
        )
        for group in (self.global_views, self.local_views):
            _, y, x = group.size_zyx
            _require(
                self.quarter_turn_prob == 0 or y == x,
                f"views.quarter_turn_prob={self.quarter_turn_prob} needs square views; "
                f"views.size_zyx={group.size_zyx}",
            )
        _require_range("views.gamma", self.gamma, 0.1, 10.0)
        _require_range("views.contrast", self.contrast, 0.1, 10.0)
        _require_range("views.blur_sigma", self.blur_sigma, 0.01, 10.0)
        _require_range("views.thick_slices", self.thick_slices, 0.1, 20.0)
        _require_range("views.noise_std", self.noise_std, 0.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskConfig:
    """3D block masks for iBOT; the number of masked tokens of a batch is a constant of the run."""

    prob: float = 0.5  # share of global views that are masked
    ratio: Range = (0.1, 0.5)  # share of the tokens of a masked view
    aspect: Range = (0.3, 1 / 0.3)  # in-plane, log-uniform
    min_block: int = 4  # in-plane tokens

    def __post_init__(self) -> None:
        _require(0 <= self.prob <= 1, f"masks.prob={self.prob} is not a probability")
        _require_range("masks.ratio", self.ratio, 0.0, 1.0)
        _require_range("masks.aspect", self.aspect, 0.01, 100.0)
        _require(self.min_block >= 1, f"masks.min_block={self.min_block} is not positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig:
    """A 3D vision transformer; sizes differ only in ``dim`` and ``depth``."""

    dim: int = 384
    depth: int = 12
    head_dim: int = 64
    patch_zyx: Zyx = (4, 8, 8)  # voxels
    image_zyx: Zyx = (12, 224, 224)  # voxels; fixes the size of the learned position grid
    num_registers: int = 4
    mlp_ratio: float = 4.0
    ffn: Literal["mlp", "swiglu"] = "mlp"
    layer_scale: float | None = 1e-5  # None: no LayerScale
    drop_path: float = 0.3  # share of the batch whose residual branch is skipped

    def __post_init__(self) -> None:
        _require(
            self.dim > 0 and self.dim % self.head_dim == 0,
            f"vit.dim={self.dim} is not a multiple of vit.head_dim={self.head_dim}",
        )
        _require(self.depth >= 1, f"vit.depth={self.depth} is not positive")
        _require(self.num_registers >= 0, f"vit.num_registers={self.num_registers} is negative")
        _require(self.mlp_ratio > 0, f"vit.mlp_ratio={self.mlp_ratio} is not positive")
        _require(0 <= self.drop_path < 1, f"vit.drop_path={self.drop_path} is not in [0, 1)")
        _require(
            all(p > 0 and i % p == 0 for i, p in zip(self.image_zyx, self.patch_zyx, strict=True)),
            f"vit.image_zyx={self.image_zyx} is not a multiple of vit.patch_zyx={self.patch_zyx}",
        )

    @property
    def num_heads(self) -> int:
        """Attention heads."""
        return self.dim // self.head_dim

    @property
    def grid_zyx(self) -> Zyx:
        """Tokens of the learned position grid."""
        z, y, x = (i // p for i, p in zip(self.image_zyx, self.patch_zyx, strict=True))
        return z, y, x

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the feed-forward layer; SwiGLU takes two thirds, rounded up to 8."""
        hidden = int(self.dim * self.mlp_ratio)
        return hidden if self.ffn == "mlp" else (int(hidden * 2 / 3) + 7) // 8 * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """A prototype head: MLP to a normalised bottleneck, then a weight-normed linear layer."""

    num_prototypes: int = 65536
    bottleneck_dim: int = 256
    hidden_dim: int = 2048
    num_layers: int = 3

    def __post_init__(self) -> None:
        _require(self.num_prototypes >= 2, f"heads.num_prototypes={self.num_prototypes} is below 2")
        _require(self.num_layers >= 1, f"heads.num_layers={self.num_layers} is not positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig:
    """The DINO head and the iBOT head; ``ibot=None`` shares the DINO head."""

    dino: HeadConfig = field(default_factory=HeadConfig)
    ibot: HeadConfig | None = field(default_factory=HeadConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Loss weights and the teacher's centering."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"
    student_temp: float = 0.1
    recompute_ibot_logits: bool = False  # the teacher's, wherever read: less memory, more products

    def __post_init__(self) -> None:
        _require(self.student_temp > 0, f"losses.student_temp={self.student_temp} is not positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class GramConfig:
    """Gram anchoring: similarities between patch tokens are held to those of an earlier teacher.

    Defaults are DINOv3's for its 7B model, but that its anchor sees crops of twice the resolution.
    """

    weight: float = 2.0
    start_step: int = 0  # the teacher as it is after so many steps is the first anchor
    refresh_every: int = 10000  # steps, after which the teacher of then is the anchor
    max_refreshes: int = 3
    scale: float = 1.0  # by which views are enlarged in plane for the anchor

    def __post_init__(self) -> None:
        _require(self.weight > 0, f"gram.weight={self.weight} is not positive; give gram=None")
        _require(
            self.start_step >= 0 and self.refresh_every >= 1 and self.max_refreshes >= 0,
            "gram.start_step and gram.max_refreshes must not be negative, and gram.refresh_every "
            "must be positive",
        )
        _require(1 <= self.scale <= 4, f"gram.scale={self.scale} is not in [1, 4]")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW with DINOv2's parameter groups."""

    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.9
    patch_embed_lr_scale: float = 0.2
    clip_norm: float = 3.0  # per sub-module: backbone, DINO head, iBOT head

    def __post_init__(self) -> None:
        _require(
            0 < self.layer_decay <= 1, f"optim.layer_decay={self.layer_decay} is not in (0, 1]"
        )
        _require(self.clip_norm > 0, f"optim.clip_norm={self.clip_norm} is not positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """What changes over a run; every value is a pure function of the step."""

    base_lr: float = 2e-3  # for a batch of 1024; scaled by sqrt(batch / 1024)
    min_lr: float = 1e-6
    warmup_steps: int = 12500
    weight_decay: Range = (0.04, 0.4)
    momentum: Range = (0.992, 1.0)  # teacher EMA
    teacher_temp: Range = (0.04, 0.07)
    teacher_temp_warmup_steps: int = 37500
    freeze_last_layer_steps: int = 1250
    # The backbone's learning rate stays 0 while new heads settle, then it warms up too.
    freeze_backbone_steps: int = 0

    def __post_init__(self) -> None:
        _require(
            self.freeze_backbone_steps >= 0,
            f"schedule.freeze_backbone_steps={self.freeze_backbone_steps} is negative",
        )
        _require(self.base_lr > 0, f"schedule.base_lr={self.base_lr} is not positive")
        _require_range("schedule.momentum", self.momentum, 0.0, 1.0)
        _require(
            min(self.teacher_temp) > 0, f"schedule.teacher_temp={self.teacher_temp} is not positive"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """Which steps may update the weights, and what happens when they may not.

    Origin of the spike limits: see ``train/guard.py``.
    """

    spike_loss: float = 3.0  # nats of the total loss above its running mean
    spike_norm: float = 20.0  # times the running mean of a gradient norm
    warmup_steps: int = 1000  # accepted steps before anything counts as a spike
    skip_budget: int = 3  # skips in a row that end in a roll-back
    max_rollbacks: int = 3  # of a run; the next one stops it

    def __post_init__(self) -> None:
        _require(self.spike_loss > 0, f"guard.spike_loss={self.spike_loss} is not positive")
        _require(self.spike_norm > 1, f"guard.spike_norm={self.spike_norm} is not above 1")
        _require(
            self.warmup_steps >= 1,
            f"guard.warmup_steps={self.warmup_steps} is not positive: the means need a first step",
        )
        _require(self.skip_budget >= 1, f"guard.skip_budget={self.skip_budget} is not positive")
        _require(self.max_rollbacks >= 0, f"guard.max_rollbacks={self.max_rollbacks} is negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how large, how precise, how often to save."""

    num_steps: int = 125000
    batch_size: int = 64  # samples per optimizer step, over all processes
    group_size: int = 8  # samples that share masks, drop path's rows and KoLeo's neighbours
    accumulate: int = 1  # micro-batches per step and process
    seed: int = 0
    # auto: bf16 on CUDA, fp32 on a CPU; fp8: bf16, and float8 in the linear layers of blocks
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    compile: Literal["auto", "on", "off", "cuda-graphs"] = "auto"  # auto: on with CUDA
    checkpointing: Literal["none", "selective", "full"] = "none"  # activations computed twice
    parallel: Literal["ddp", "fsdp"] = "ddp"  # with several processes: copies or shards
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 3
    log_every: int = 10  # steps
    num_workers: int = 0  # threads that read and render; 0: half the cores, at most 8
    read_timeout: float = 60.0  # seconds after which a read counts as hung

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, f"train.num_steps={self.num_steps} is not positive")
        micro_size = self.batch_size // max(self.accumulate, 1)
        _require(
            min(self.accumulate, self.group_size) >= 1
            and self.batch_size % (self.accumulate * self.group_size) == 0,
            f"train.batch_size={self.batch_size} is not a multiple of train.accumulate="
            f"{self.accumulate} times train.group_size={self.group_size}; a group of a whole "
            f"micro-batch is train.group_size={max(micro_size, 1)}",
        )
        _require(
            self.compile != "cuda-graphs" or self.accumulate == 1,
            "train.compile=cuda-graphs would overwrite what it made of one micro-batch by the "
            f"next; give train.accumulate=1, not {self.accumulate}, or train.compile=on",
        )
        _require(
            self.checkpoint_every >= 1 and self.log_every >= 1,
            "train.checkpoint_every and train.log_every must be positive",
        )
        _require(
            self.num_workers >= 0 and self.read_timeout > 0,
            "train.num_workers must not be negative, and train.read_timeout must be positive",
        )
        _require(
            self.keep_checkpoints >= 2,
            "train.keep_checkpoints must be at least 2: the newest one may be the damaged one",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A complete training run."""

    hu: HuConfig = field(default_factory=HuConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    vit: VitConfig = field(default_factory=VitConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    gram: GramConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("global_views", "local_views"):
            size_zyx = getattr(self.views, name).size_zyx
            _require(
                all(s % p == 0 for s, p in zip(size_zyx, self.vit.patch_zyx, strict=True)),
                f"views.{name}.size_zyx={size_zyx} is not a multiple of "
                f"vit.patch_zyx={self.vit.patch_zyx}",
            )
        _require(
            self.train.precision != "fp8" or self.vit.dim % 16 == self.vit.mlp_dim % 16 == 0,
            f"train.precision=fp8 multiplies widths that are multiples of 16, not vit.dim="
            f"{self.vit.dim} with a hidden width of {self.vit.mlp_dim}; change vit.dim or "
            "vit.mlp_ratio, or use train.precision=bf16",
        )


Node = TypeVar("Node")


def to_json(node: object) -> str:
    """Serialise a config node; ``from_json`` gives an equal node back."""
    assert dataclasses.is_dataclass(node)
    assert not isinstance(node, type)
    return json.dumps(dataclasses.asdict(node), indent=1)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted names and values of a tree of settings, in reading order."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def from_json(kind: type[Node], text: str) -> Node:
    """Parse a node of type ``kind`` strictly.

    Raises:
        ConfigError: The text is not JSON, or a setting is unknown, missing or of the wrong type.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"config is not JSON: {error}") from None
    return typing.cast(Node, _parse(kind, raw, ""))


def _parse(kind: Any, raw: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _parse_node(kind, raw, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _parse(inner, raw, where)
    if origin is tuple:
        if not isinstance(raw, list) or len(raw) != len(arguments):
            raise ConfigError(f"{where}={raw!r} is not a list of {len(arguments)}")
        return tuple(_parse(a, r, where) for a, r in zip(arguments, raw, strict=True))
    if origin is Literal:
        if raw not in arguments:
            raise ConfigError(f"{where}={raw!r} is not one of {', '.join(map(repr, arguments))}")
        return raw
    if kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        if not math.isfinite(raw):
            raise ConfigError(f"{where}={raw!r} is not finite")
        return float(raw)
    if type(raw) is not kind:
        raise ConfigError(f"{where}={raw!r} is not of type {kind.__name__}")
    return raw


def _parse_node(kind: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where or 'config'} is not an object")
    known = typing.get_type_hints(kind)
    for name in raw:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"unknown setting {where}{'.' if where else ''}{name}; nearest is {near[0]}"
            )
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in raw]
    if missing:
        raise ConfigError(f"{where or 'config'} lacks {', '.join(missing)}")
    prefix = f"{where}." if where else ""
    return kind(**{name: _parse(known[name], value, prefix + name) for name, value in raw.items()})

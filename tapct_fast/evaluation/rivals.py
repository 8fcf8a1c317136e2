"""Networks of other libraries as encoders: timm's, slice by slice, and MONAI's, by windows.

Weights come from safetensors on this machine or are drawn from a seed; nothing is downloaded and
no pickle is opened. HU are clipped to ``WINDOW_HU`` and scaled to 0..1.

Shape suffixes: B batch, C channels or width, Z Y X voxels or tokens, N vectors, D width, S slices.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.backbone.load import read_tensors
from tapct_fast.backbone.preprocess import Preprocess, token_affine
from tapct_fast.config import Zyx
from tapct_fast.downstream.features import Features
from tapct_fast.downstream.windows import Blend, tile
from tapct_fast.errors import InputError
from tapct_fast.evaluation.encoders import Encoder, grid_features, state_fingerprint
from tapct_fast.io.volume import Volume

WINDOW_HU = (-1000.0, 1000.0)  # of MONAI's self-supervised SwinUNETR
SLICES = 3  # neighbours that make the red, green and blue of one image
BATCH = 8
WINDOW = 96  # voxels along each axis, MONAI's usual
OVERLAP = 0.25  # MONAI's default
AIR_HU = -1024.0
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def open_timm(rest: str, device: torch.device, *, seed: int) -> Encoder:
    """Open ``NAME`` with weights that timm has on this machine, or ``NAME@random``.

    Raises:
        InputError: timm is missing or knows no such network, or the weights are not here.
    """
    name, at, source = rest.partition("@")
    if (at and source != "random") or not _TIMM_NAME.fullmatch(name):
        raise InputError("a timm network is timm:NAME or timm:NAME@random")
    timm = _library("timm")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:1]
        raise InputError(f"timm has no network {name}{f'; it has {near[0]}' if near else ''}")
    if source == "random":
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            net = timm.create_model(name, num_classes=0)
    else:
        weights = {"state_dict": _timm_weights(timm, name), "custom_load": False}
        net = timm.create_model(
            name, pretrained=True, num_classes=0, pretrained_cfg_overlay=weights
        )
    settings = timm.data.resolve_model_data_config(net)
    return TimmEncoder(f"timm:{rest}", net.to(device).eval().requires_grad_(False), settings)


def _timm_weights(timm: ModuleType, name: str) -> dict[str, Tensor]:
    """Return weights out of the hub's cache; timm itself would go to the network for them."""
    from huggingface_hub import try_to_load_from_cache

    configured = timm.get_pretrained_cfg(name)
    hub_id = configured.hf_hub_id if configured is not None else None
    found = try_to_load_from_cache(hub_id, "model.safetensors") if hub_id else None
    if not isinstance(found, str):
        raise InputError(
            f"the weights of timm:{name} are not on this machine; fetch them where there is a "
            f"network, timm.create_model({name!r}, pretrained=True), or take timm:{name}@random"
        )
    return read_tensors(Path(found))


@dataclass(frozen=True, slots=True)
class TimmEncoder:
    """A 2D network over axial slices, three neighbours as red, green and blue of one image.

    Its last patch tokens or feature map are the tokens, its pooled vector per image the bag.
    """

    name: str
    net: nn.Module
    settings: dict[str, Any]  # input_size, mean, std

    def fingerprint(self) -> str:
        """Return a hash of weights and preprocessing."""
        kept = {key: self.settings[key] for key in ("input_size", "mean", "std")}
        return state_fingerprint(f"timm 1 {kept} {WINDOW_HU} {SLICES}", self.net.state_dict())

    @torch.no_grad()
    def encode(self, volume: Volume) -> Features:
        """Return tokens, one plane of them for three slices."""
        height, width = self.settings["input_size"][1:]
        device = next(self.net.parameters()).device
        mean, std = (
            torch.tensor(self.settings[key], device=device).reshape(1, 3, 1, 1)
            for key in ("mean", "std")
        )
        hu_ZYX = torch.from_numpy(volume.hu_ZYX)
        # The last image repeats the last slice where slices are missing.
        slices = torch.arange(-(-len(hu_ZYX) // SLICES) * SLICES).clamp_max(len(hu_ZYX) - 1)
        planes, vectors = [], []
        for part_S in slices.split(SLICES * BATCH):  # type: ignore[no-untyped-call]
            x_BCYX = hu_ZYX[part_S].float().reshape(-1, SLICES, *hu_ZYX.shape[1:]).to(device)
            x_BCYX = F.interpolate(x_BCYX, (height, width), mode="bilinear", antialias=True)
            maps = self.net.forward_features((_scaled(x_BCYX) - mean) / std)  # type: ignore[operator]
            vectors.append(self.net.forward_head(maps, pre_logits=True).cpu())  # type: ignore[operator]
            planes.append(self._tokens_BYXC(maps).cpu())
        tokens_ZYXC = torch.cat(planes)
        z, y, x = volume.hu_ZYX.shape
        resized = Preprocess(resize_yx=(height, width), depth_multiple=1, plane_multiple=1)
        patch_zyx = (SLICES, height // tokens_ZYXC.shape[1], width // tokens_ZYXC.shape[2])
        affine = volume.affine @ resized.pixel_affine((z, y, x)) @ token_affine(patch_zyx)
        return grid_features(tokens_ZYXC, affine, torch.cat(vectors))

    def _tokens_BYXC(self, maps: Tensor) -> Tensor:
        if maps.ndim == 3:
            grid = getattr(getattr(self.net, "patch_embed", None), "grid_size", None)
            patches = maps[:, getattr(self.net, "num_prefix_tokens", 0) :]
            if grid is None or grid[0] * grid[1] != patches.shape[1]:
                raise InputError(f"{self.name}: its tokens lie on no grid; take another network")
            return patches.reshape(len(patches), *grid, -1)
        is_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        return maps if is_last else maps.movedim(1, -1)


class _Family(NamedTuple):
    """How a MONAI network is built from a width, and where its encoder's feature maps are."""

    width: int
    width_of: str  # the tensor whose first axis is the width
    strides: tuple[int, ...]  # voxels per token, of each feature map
    build: Callable[[ModuleType, int], nn.Module]
    part: str  # prefix of the encoder's tensors in a file of the whole network
    own: tuple[str, ...]  # first words of the tensors that must be there
    maps: Callable[[Any, Tensor], list[Tensor]]


_FAMILIES = {
    "SwinUNETR": _Family(
        48,
        "patch_embed.proj.weight",
        (2, 4, 8, 16, 32),
        lambda nets, w: nets.SwinUNETR(1, 1, feature_size=w).swinViT,
        "swinViT.",
        ("",),
        lambda net, x_BCZYX: net(x_BCZYX),
    ),
    "ViT": _Family(
        768,
        "norm.weight",
        (16,),
        lambda nets, w: nets.ViT(1, (WINDOW,) * 3, (16,) * 3, hidden_size=w, mlp_dim=4 * w),
        "vit.",
        ("",),
        lambda net, x_BCZYX: [net(x_BCZYX)[0].movedim(1, -1).unflatten(-1, (WINDOW // 16,) * 3)],
    ),
    "SegResNet": _Family(
        16,
        "convInit.conv.weight",
        (1, 2, 4, 8),
        lambda nets, w: nets.SegResNet(init_filters=w),
        "",
        ("convInit.", "down_layers."),
        lambda net, x_BCZYX: net.encode(x_BCZYX)[1],
    ),
}


def open_monai(rest: str, device: torch.device, *, seed: int) -> Encoder:
    """Open ``NAME@FILE.safetensors`` or ``NAME@random``; ``NAME/2`` takes its third feature map.

    Raises:
        InputError: MONAI is missing, or network, map or file are not known.
        BackboneError: The file is damaged.
    """
    which, _, source = rest.partition("@")
    name, slash, level_text = which.partition("/")
    family = _FAMILIES.get(name)
    if family is None or not source or (slash and not level_text.isdecimal()):
        raise InputError(
            f"a MONAI network is monai:NAME@random or monai:NAME@FILE.safetensors, NAME one of "
            f"{', '.join(_FAMILIES)}, with /0, /1, ... for another feature map than the deepest"
        )
    level = int(level_text) if slash else len(family.strides) - 1
    if level >= len(family.strides):
        raise InputError(f"monai:{name} has {len(family.strides)} feature maps, counted from /0")
    nets = _library("monai.networks.nets")
    _library("einops")  # MONAI imports without it, and fails in the first forward
    called = f"monai:{which}"
    if source == "random":
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            net = family.build(nets, family.width)
        called += "@random"
    else:
        net = _with_weights(family, nets, Path(source), called)
    return MonaiEncoder(called, net.to(device).eval().requires_grad_(False), name, level)


def _with_weights(family: _Family, nets: ModuleType, path: Path, called: str) -> nn.Module:
    if path.suffix != ".safetensors" or not path.is_file():
        raise InputError(
            f"the weights of {called} are no .safetensors file; convert a checkpoint with "
            "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        )
    state = {name.removeprefix("module."): tensor for name, tensor in read_tensors(path).items()}
    if any(name.startswith(family.part) for name in state):
        state = {
            name.removeprefix(family.part): tensor
            for name, tensor in state.items()
            if name.startswith(family.part)
        }
    if family.width_of not in state:
        raise InputError(f"the weights of {called} have no {family.part}{family.width_of}")
    net = family.build(nets, len(state[family.width_of]))
    wanted = {name for name in net.state_dict() if name.startswith(family.own)}
    if missing := sorted(wanted - state.keys()):
        raise InputError(
            f"the weights of {called} lack {len(missing)} tensors, the first is {missing[0]}"
        )
    try:
        net.load_state_dict({name: state[name] for name in wanted}, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"the weights of {called} do not fit it: {reason}") from None
    return net


@dataclass(frozen=True, slots=True)
class MonaiEncoder:
    """A 3D encoder over windows of 96 voxels a side at the scan's own voxel size.

    One of its feature maps is the token grid; the mean of that map per window is the bag.
    """

    name: str
    net: nn.Module
    family: str
    level: int

    def fingerprint(self) -> str:
        """Return a hash of weights and settings."""
        settings = f"monai 1 {self.family} {self.level} {WINDOW_HU} {WINDOW} {OVERLAP}"
        return state_fingerprint(settings, self.net.state_dict())

    @torch.no_grad()
    def encode(self, volume: Volume) -> Features:
        """Return tokens of one feature map, windows blended."""
        family = _FAMILIES[self.family]
        stride = family.strides[self.level]
        device = next(self.net.parameters()).device
        hu_ZYX = torch.from_numpy(volume.hu_ZYX)
        held = [-(-size // stride) for size in hu_ZYX.shape]
        grid_zyx: Zyx = tuple(max(size, WINDOW // stride) for size in held)  # type: ignore[assignment]
        at_least = [g * stride - s for g, s in zip(grid_zyx, hu_ZYX.shape, strict=True)]
        x_BCZYX = F.pad(
            hu_ZYX[None, None].float(),
            (0, at_least[2], 0, at_least[1], 0, at_least[0]),
            value=AIR_HU,
        )
        x_BCZYX = _scaled(x_BCZYX)
        window_zyx: Zyx = (WINDOW // stride,) * 3
        blend = Blend(grid_zyx, window_zyx, "gaussian", device)
        vectors = []
        for start_zyx in tile(grid_zyx, window_zyx, OVERLAP):
            box = tuple(slice(s * stride, s * stride + WINDOW) for s in start_zyx)
            maps = family.maps(self.net, x_BCZYX[0, 0][box][None, None].to(device))
            tokens_ZYXC = maps[self.level][0].movedim(0, -1)
            blend.add(start_zyx, tokens_ZYXC)
            vectors.append(tokens_ZYXC.flatten(0, 2).mean(0).cpu())
        tokens_ZYXC = blend.mean_ZYXC()[tuple(slice(size) for size in held)].cpu().contiguous()
        affine = volume.affine @ token_affine((stride,) * 3)
        return grid_features(tokens_ZYXC, affine, torch.stack(vectors))


def _scaled(hu: Tensor) -> Tensor:
    low, high = WINDOW_HU
    return hu.clamp(low, high).sub(low).div(high - low)


def _library(module: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"this rival needs {package}: pip install {package} ({reason})") from None

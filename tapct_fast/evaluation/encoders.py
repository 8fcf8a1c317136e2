"""Who takes part: anything that turns a scan into tokens on a grid, and a bag of vectors.

Ours, an untrained network of the same make, plain intensities, networks of other libraries
(``rivals``) and a user's own function are all an ``Encoder``. A name never holds a path.

Shape suffixes: C channels, Z Y X voxels or tokens, D width, N vectors of a bag.
"""

import copy
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast import recipes
from tapct_fast.backbone.backbone import Backbone, best_precision
from tapct_fast.backbone.export import preprocess_of
from tapct_fast.backbone.load import load_backbone
from tapct_fast.backbone.preprocess import Preprocess, token_affine
from tapct_fast.downstream.encode import embed_volume
from tapct_fast.downstream.features import Features
from tapct_fast.errors import InputError
from tapct_fast.io.orient import check_affine, spacing_of
from tapct_fast.io.volume import Volume
from tapct_fast.model.vit import Vit

BATCH_SIZE = 4  # windows; fixed, as it changes the last bits of features
BAG_PLANES = 3  # token planes that share a vector of the bag, as a window of 12 slices has them
_NAMED = re.compile(r"(?P<name>[A-Za-z0-9][\w .+-]{0,39})=(?P<spec>.+)")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Spec = Any  # str | Path | Backbone | Encoder | Callable[[Volume], ...]; a Protocol in a union


@runtime_checkable
class Encoder(Protocol):
    """Turns a scan into features."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def fingerprint(self) -> str:
        """Return what tells its features from those of other weights and settings.

        An empty one says that this is not known: features are then encoded in every run.
        """
        ...

    def encode(self, volume: Volume) -> Features:
        """Return features on the host, the same for the same scan."""
        ...


def open_encoder(spec: Spec, device: str | torch.device = "cpu", *, seed: int = 0) -> Encoder:
    """Open a backbone or one of its rivals.

    Args:
        spec: What ``load_backbone`` takes (or a ``Backbone``); ``random:RECIPE`` or
            ``random:BACKBONE``, the same network untrained; ``intensity``; ``timm:NAME``,
            ``timm:NAME@random``; ``monai:NAME@FILE.safetensors``, ``monai:NAME@random``;
            ``module:function`` (or a function), see ``FunctionEncoder``. ``NAME=`` before it is
            what tables call it. An ``Encoder`` is returned as it is.
        device: Where it runs.
        seed: Draws untrained weights.

    Raises:
        InputError: It is none of these, or a library is missing.
        BackboneError: Weights are damaged.
    """
    if isinstance(spec, Backbone):
        return BackboneEncoder(_called(spec), spec)
    if isinstance(spec, Encoder):
        return spec
    if callable(spec):
        return FunctionEncoder(getattr(spec, "__name__", type(spec).__name__), spec)
    text, name = str(spec), ""
    if named := _NAMED.fullmatch(text):
        name, text = named["name"], named["spec"]
    encoder = _open(text, torch.device(device), seed)
    return _Renamed(name, encoder) if name else encoder


def _open(text: str, device: torch.device, seed: int) -> Encoder:
    kind, _, rest = text.partition(":")
    if text == "intensity":
        return IntensityEncoder()
    if kind == "random" and rest:
        return _untrained(rest, device, seed)
    if kind in ("timm", "monai") and rest:
        from tapct_fast.evaluation.rivals import open_monai, open_timm

        return (open_timm if kind == "timm" else open_monai)(rest, device, seed=seed)
    if _FUNCTION.fullmatch(text) and not Path(text).exists():
        return FunctionEncoder(text, _function(text))
    backbone = load_backbone(text, device=device)
    is_hub_id = _HUB_ID.fullmatch(text) and not Path(text).exists()
    return BackboneEncoder(text if is_hub_id else _called(backbone), backbone)


@dataclass(frozen=True, slots=True)
class _Renamed:
    name: str
    encoder: Encoder

    def fingerprint(self) -> str:
        return self.encoder.fingerprint()

    def encode(self, volume: Volume) -> Features:
        return self.encoder.encode(volume)


@dataclass(frozen=True, slots=True)
class BackboneEncoder:
    """One of our backbones, by sliding windows as ``embed_volume`` has them by default."""

    name: str
    backbone: Backbone

    def fingerprint(self) -> str:
        """Return the backbone's."""
        return self.backbone.fingerprint()

    def encode(self, volume: Volume) -> Features:
        """Return the features of ``embed_volume``."""
        return embed_volume(self.backbone, volume, batch_size=BATCH_SIZE)


def _called(backbone: Backbone) -> str:
    config = backbone.vit.config
    return f"vit {config.dim}x{config.depth} {backbone.fingerprint()[:8]}"


def _untrained(which: str, device: torch.device, seed: int) -> Encoder:
    """Return the network of a recipe or of a backbone as it is before its first step."""
    if which in recipes.RECIPES:
        config = recipes.recipe(which)
        vit, preprocess, name = Vit(config.vit, config.hu), preprocess_of(config), which
    else:
        trained = load_backbone(which)
        vit, preprocess = copy.deepcopy(trained.vit), trained.preprocess
        name = f"vit {vit.config.dim}x{vit.config.depth}"
    vit.init_weights(seed)
    backbone = Backbone(vit, preprocess, precision=best_precision(device)).to(device)
    return BackboneEncoder(f"random {name}", backbone.eval().requires_grad_(False))


@dataclass(frozen=True, slots=True)
class IntensityEncoder:
    """What no learning gives: mean, standard deviation, minimum and maximum HU of each patch.

    Slices are resized to 224 x 224 and patches are 4 x 8 x 8, as those of the released models.
    """

    name: str = "intensity"

    def fingerprint(self) -> str:
        """Return a hash of the settings."""
        return hashlib.sha256(b"intensity 1 224x224 4x8x8 mean std min max").hexdigest()

    def encode(self, volume: Volume) -> Features:
        """Return tokens of width 4; a patch at the end counts the voxels it has."""
        preprocess, patch_zyx = Preprocess(antialias=True), (4, 8, 8)
        slabs = []
        for slab_ZYX in torch.from_numpy(volume.hu_ZYX).split(4 * 8):  # type: ignore[no-untyped-call]
            # float64: a variance of HU from its squares loses digits in float32
            x_NYX = F.interpolate(
                slab_ZYX.double()[:, None],
                preprocess.resize_yx,
                mode="bilinear",
                antialias=preprocess.antialias,
            )[:, 0]
            slabs.append(_patch_statistics(x_NYX, patch_zyx))
        z, y, x = volume.hu_ZYX.shape
        affine = volume.affine @ preprocess.pixel_affine((z, y, x)) @ token_affine(patch_zyx)
        return grid_features(torch.cat(slabs).float(), affine)


def _patch_statistics(x_ZYX: Tensor, patch_zyx: tuple[int, int, int]) -> Tensor:
    x_CZYX = x_ZYX[None]

    def mean(of_CZYX: Tensor) -> Tensor:
        return F.avg_pool3d(of_CZYX, patch_zyx, ceil_mode=True, count_include_pad=False)[0]

    mean_ZYX = mean(x_CZYX)
    std_ZYX = (mean(x_CZYX.square()) - mean_ZYX.square()).clamp_min(0).sqrt()
    low_ZYX = -F.max_pool3d(-x_CZYX, patch_zyx, ceil_mode=True)[0]
    high_ZYX = F.max_pool3d(x_CZYX, patch_zyx, ceil_mode=True)[0]
    return torch.stack([mean_ZYX, std_ZYX, low_ZYX, high_ZYX], dim=-1)


def grid_features(
    patches_ZYXC: Tensor, affine: NDArray[np.float64], cls_ND: Tensor | None = None
) -> Features:
    """Return features of tokens on a grid; without a bag, of the means of three planes each."""
    if cls_ND is None:
        planes = patches_ZYXC.split(BAG_PLANES)  # type: ignore[no-untyped-call]
        cls_ND = torch.stack([part.flatten(0, 2).mean(0) for part in planes])
    return Features(patches_ZYXC, affine, spacing_of(affine), cls_ND, cls_ND.mean(0))


@dataclass(frozen=True, slots=True)
class FunctionEncoder:
    """A user's function ``encode(volume)``.

    It returns ``Features``, or an array (C, Z, Y, X) and the (4, 4) affine from token index
    (x, y, z, 1) to RAS+ mm. What it returns is kept between runs only if it has an attribute
    ``fingerprint``, a text that changes with its weights: what a function computes from cannot be
    seen from outside.
    """

    name: str
    function: Callable[[Volume], Any]

    def fingerprint(self) -> str:
        """Return a hash of the function's own, or nothing."""
        own = getattr(self.function, "fingerprint", "")
        if not isinstance(own, str):
            raise InputError(f"{self.name}: its attribute fingerprint is not a text")
        return hashlib.sha256(f"{self.name}\0{own}".encode()).hexdigest() if own else ""

    def encode(self, volume: Volume) -> Features:
        """Return what the function returns, checked.

        Raises:
            InputError: It is neither of both, or not finite.
            FormatError: The affine is not that of a regular grid.
        """
        found = self.function(volume)
        if isinstance(found, Features):
            return found
        if not (isinstance(found, tuple) and len(found) == 2):
            raise InputError(f"{self.name} returned neither Features nor (array CZYX, affine)")
        array_CZYX, affine = torch.as_tensor(found[0]), np.asarray(found[1], dtype=np.float64)
        if array_CZYX.ndim != 4 or 0 in array_CZYX.shape or affine.shape != (4, 4):
            raise InputError(
                f"{self.name} returned an array of shape {tuple(array_CZYX.shape)} and an affine "
                f"of shape {affine.shape}; return (C, Z, Y, X) and (4, 4)"
            )
        array_CZYX = array_CZYX.detach().float().cpu()
        if not array_CZYX.isfinite().all():
            raise InputError(f"{self.name} returned values that are not finite")
        check_affine(affine)
        return grid_features(array_CZYX.movedim(0, -1).contiguous(), affine)


def _function(text: str) -> Callable[[Volume], Any]:
    module, _, name = text.partition(":")
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"backbone {text}: there is no module {error.name}; run where it can be imported"
        ) from None
    except AttributeError:
        raise InputError(f"backbone {text}: module {module} has no {name}") from None
    if not callable(found):
        raise InputError(f"backbone {text} is not a function")
    function: Callable[[Volume], Any] = found
    return function


def state_fingerprint(settings: str, state: dict[str, Tensor]) -> str:
    """Return a sha256 over settings and weights."""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

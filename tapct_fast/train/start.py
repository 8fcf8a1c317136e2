"""What a fresh run starts from: the weights of a backbone or of another run.

A backbone comes as ``export`` writes it, as a lone ``model.safetensors`` or from the hub, and its
heads are new. A run gives its teacher with the heads. Student and teacher start equal. The backbone
of an image network is inflated.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tapct_fast.backbone.architecture import canonical_names, check_state, read_architecture
from tapct_fast.backbone.export import read_checkpoint
from tapct_fast.backbone.fit import fit_state
from tapct_fast.backbone.inflate import KERNEL, inflate, inflate_kernel
from tapct_fast.backbone.load import find_files, load_backbone, read_tensors
from tapct_fast.backbone.schema import ForeignConfig
from tapct_fast.config import Config, HeadConfig, HeadsConfig, HuConfig, VitConfig
from tapct_fast.errors import ConfigError
from tapct_fast.io.atomic import sha256_file
from tapct_fast.ssl.method import DinoMethod

_BACKBONE = "backbone."


class Start(NamedTuple):
    """Weights that a run starts from, fitted to its config."""

    tensors: dict[str, Tensor]  # backbone.*; from a run also the heads and the centers
    sha256: str  # of the file they were read from


def read_start(source: str | Path, config: Config, *, notify: Callable[[str], None]) -> Start:
    """Read weights and fit them to a run.

    Args:
        source: A folder written by ``export``, a ``.safetensors`` file, a hub id, a run's folder or
            one of its checkpoints.
        config: The run that starts.
        notify: Told in one line what was changed: positions resized, a 2D network inflated.

    Raises:
        InputError: Nothing is there.
        BackboneError: The weights are damaged or fit no known architecture.
        CheckpointError: The run's checkpoints are damaged.
        ConfigError: The run has another architecture, other heads or other HU constants; names the
            setting.
    """
    if is_run(source):
        saved = read_checkpoint(Path(source), "teacher")
        _check_hu(saved.config.hu, config.hu)
        _check_heads(saved.config.heads, config.heads)
        state = check_state(saved.config.vit, saved.backbone())
        fitted = _fit(state, saved.config.vit, config.vit, notify)
        return Start(saved.tensors | fitted, saved.sha256)
    files = find_files(source)
    digest = sha256_file(files.weights)
    named = canonical_names(read_tensors(files.weights))
    patch_zyx = config.vit.patch_zyx
    if KERNEL in named and named[KERNEL].ndim == 4:
        # What lies beside it describes an image network, for another library.
        tensors, image_zyx = inflate(named, patch_zyx)
        vit = read_architecture(tensors, ForeignConfig.model_validate({"image_size": image_zyx}))
        state, was_flat = check_state(vit, tensors), True
    else:
        backbone = load_backbone(source, precision="fp32")
        if files.preprocessor is not None:
            _check_hu(backbone.preprocess.hu, config.hu)
        state, vit = backbone.vit.state_dict(), backbone.vit.config
        was_flat = vit.patch_zyx[0] == 1 and patch_zyx[0] > 1
        if was_flat:
            state[KERNEL] = inflate_kernel(state[KERNEL], patch_zyx)
            z, y, x = (g * p for g, p in zip(vit.grid_zyx, patch_zyx, strict=True))
            vit = replace(vit, patch_zyx=patch_zyx, image_zyx=(z, y, x))
    if was_flat:
        notify(
            f"the weights are of a 2D network: its patch embedding is inflated to {patch_zyx} "
            "voxels, its positions are repeated over depth"
        )
    return Start(_fit(state, vit, config.vit, notify), digest)


@torch.no_grad()
def start_from(method: DinoMethod, start: Start) -> None:
    """Copy the weights into student and teacher of a run that has done no step, on the host.

    New heads keep their initial weights, equal in both.
    """
    live = method.state_dict()
    for name, tensor in start.tensors.items():
        if "_center." in name:  # softmax centering; with Sinkhorn there is none to fill
            places = [name] if name in live else []
        else:
            places = [f"student.{name}", f"teacher.{name}"]
        for place in places:
            assert live[place].shape == tensor.shape, place
            live[place].copy_(tensor)


def is_run(source: str | Path) -> bool:
    """Say whether this is the folder of a run or of a checkpoint."""
    folder = Path(source)
    return (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file()


def _check_heads(saved: HeadsConfig, heads: HeadsConfig) -> None:
    """Require that heads of ``saved`` fit a run with ``heads``.

    Raises:
        ConfigError: They do not; names the setting.
    """
    if (saved.ibot is None) != (heads.ibot is None):
        raise ConfigError(
            f"the other run {'shares' if saved.ibot is None else 'does not share'} the DINO head "
            "with the masked tokens; heads.ibot must be as there, or export that run and start "
            "from the backbone, with new heads"
        )
    for kind in ("dino", "ibot"):
        theirs, ours = getattr(saved, kind), getattr(heads, kind)
        for name in HeadConfig.__dataclass_fields__:
            if theirs is not None and getattr(theirs, name) != getattr(ours, name):
                raise ConfigError(
                    f"the other run has heads.{kind}.{name} {getattr(theirs, name)}, this one "
                    f"{getattr(ours, name)}; give --heads.{kind}.{name} {getattr(theirs, name)}, "
                    "or export that run and start from the backbone, with new heads"
                )


def _fit(
    state: dict[str, Tensor], source: VitConfig, target: VitConfig, notify: Callable[[str], None]
) -> dict[str, Tensor]:
    fitted = fit_state(state, source, target)
    if source.grid_zyx != target.grid_zyx:
        notify(f"learned positions are resized from {source.grid_zyx} to {target.grid_zyx} tokens")
    return {_BACKBONE + name: tensor for name, tensor in fitted.items()}


def _check_hu(theirs: HuConfig, ours: HuConfig) -> None:
    if theirs != ours:
        low, high = theirs.clip
        raise ConfigError(
            f"the weights were trained on other HU constants: {theirs}, hu={ours}; give "
            f"--hu.clip {low},{high} --hu.mean {theirs.mean} --hu.std {theirs.std}"
        )

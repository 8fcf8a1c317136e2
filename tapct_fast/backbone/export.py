"""Write a backbone as a folder: ``model.safetensors``, ``config.json``, ``preprocessor.json``.

A fourth file, ``preprocessor_config.json``, only tells transformers which class reads the third.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from tapct_fast.backbone.architecture import PREFIX, check_state
from tapct_fast.backbone.backbone import Backbone, best_precision
from tapct_fast.backbone.load import WEIGHTS_FILE
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.backbone.schema import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    PROCESSOR_CLASS_FILE,
    config_json,
    preprocess_json,
    processor_class_json,
)
from tapct_fast.config import Config, VitConfig, from_json
from tapct_fast.errors import CheckpointError, ConfigError, FormatError, InputError
from tapct_fast.io.atomic import atomic_folder, read_json
from tapct_fast.model.vit import Vit

# What train/checkpoint.py writes; this layer does not import it.
_CHECKPOINT = ("tapct-checkpoint", 2)
_STEP_FOLDER = re.compile(r"step-\d{8,}")  # others were set aside as damaged
_BACKBONE_PREFIX = "backbone."


def export_backbone(
    checkpoint_dir: Path, out: Path, *, which: Literal["teacher", "student"] = "teacher"
) -> Path:
    """Write the backbone of a training checkpoint; the heads stay behind.

    Args:
        checkpoint_dir: A run folder, whose newest intact checkpoint is taken (a warning says if
            that is not the newest), or one checkpoint folder.
        out: New folder, or one that holds a backbone and nothing else: it is replaced in one step.
        which: The EMA teacher, which evaluates better, or the student.

    Returns:
        ``out``.

    Raises:
        InputError: There is no checkpoint, or ``out`` holds other files.
        CheckpointError: The checkpoint is damaged.
    """
    saved = read_checkpoint(checkpoint_dir, which)
    return _write(saved.backbone(), saved.config.vit, preprocess_of(saved.config), out)


def read_teacher(checkpoint_dir: Path, *, device: str | torch.device) -> Backbone:
    """Return the backbone that ``export_backbone`` would write, without writing it.

    Raises:
        InputError: There is no checkpoint.
        CheckpointError: The checkpoint is damaged.
    """
    saved = read_checkpoint(checkpoint_dir, "teacher")
    with torch.device("meta"):  # no time, and no random numbers, for initial values
        vit = Vit(saved.config.vit, saved.config.hu)
    vit.load_state_dict(check_state(saved.config.vit, saved.backbone()), assign=True)
    place = torch.device(device)
    backbone = Backbone(vit, preprocess_of(saved.config), precision=best_precision(place))
    return backbone.to(place).eval()


def preprocess_of(config: Config) -> Preprocess:
    """Return the preprocessing of a backbone that is trained with a config."""
    image_zyx, patch_zyx = config.vit.image_zyx, config.vit.patch_zyx
    return Preprocess(
        resize_yx=image_zyx[1:],
        antialias=True,  # as the training views
        depth_multiple=patch_zyx[0],
        plane_multiple=math.lcm(*patch_zyx[1:]),
        hu=config.hu,
    )


def save_backbone(backbone: Backbone, out: Path) -> Path:
    """Write a loaded backbone; ``load_backbone(out)`` gives the same outputs.

    Raises:
        InputError: ``out`` holds other files.
    """
    return _write(backbone.vit.state_dict(), backbone.vit.config, backbone.preprocess, out)


def _write(
    named: Mapping[str, Tensor], config: VitConfig, preprocess: Preprocess, out: Path
) -> Path:
    ours = {WEIGHTS_FILE, CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_CLASS_FILE}
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - ours):
        raise InputError("OUT exists and holds other files; name a new folder")
    state = check_state(config, named)
    tensors = {PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out) as folder:
            weights = tensor_bytes(tensors, {"format": "pt"})
            digest = hashlib.sha256(weights).hexdigest()
            (folder / WEIGHTS_FILE).write_bytes(weights)
            (folder / CONFIG_FILE).write_bytes(config_json(config, weights_sha256=digest))
            (folder / PREPROCESSOR_FILE).write_bytes(preprocess_json(preprocess))
            (folder / PROCESSOR_CLASS_FILE).write_bytes(processor_class_json())
    except OSError as error:
        raise InputError(f"OUT cannot be written: {error.strerror}") from None
    return out


class SavedNetworks(NamedTuple):
    """Student or teacher of a checkpoint."""

    tensors: dict[str, Tensor]  # backbone.*, dino_head.*, ibot_head.*, and centers of the teacher
    config: Config
    sha256: str  # of the file they were read from

    def backbone(self) -> dict[str, Tensor]:
        """Return the backbone's tensors under ``Vit``'s names."""
        return {
            name.removeprefix(_BACKBONE_PREFIX): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(_BACKBONE_PREFIX)
        }


def read_checkpoint(directory: Path, which: Literal["teacher", "student"]) -> SavedNetworks:
    """Read one network with its heads from a run folder, newest intact checkpoint, or from one.

    Raises:
        InputError: There is no checkpoint.
        CheckpointError: The checkpoint is damaged.
    """
    if (directory / "manifest.json").is_file():
        return _read_step(directory, which)
    folders = (directory / "checkpoints").glob("step-*")
    steps = sorted((p for p in folders if _STEP_FOLDER.fullmatch(p.name)), reverse=True)
    if not steps:
        raise InputError("RUN holds no checkpoint; train first, or wait for the first one")
    failures: list[str] = []
    for step in steps:
        try:
            found = _read_step(step, which)
        except CheckpointError as error:
            failures.append(f"{step.name}: {error}")
            continue
        if failures:
            warnings.warn(f"read {step.name}; {'; '.join(failures)}", stacklevel=3)
        return found
    raise CheckpointError(f"no checkpoint is intact; {failures[0]}")


def _read_step(step: Path, which: str) -> SavedNetworks:
    """Read one checkpoint; the bytes that are hashed are the bytes that are parsed."""
    name = f"{which}.safetensors"
    try:
        manifest = read_json(step / "manifest.json", "manifest")
        if (manifest["format"], manifest["version"]) != _CHECKPOINT:
            raise FormatError("manifest", "written by another version; export with that version")
        files = manifest["files"]
        config = from_json(Config, _verified(step, files, "config.json").decode())
        tensors = load_tensors(_verified(step, files, name))
        return SavedNetworks(tensors, config, files[name]["sha256"])
    except (FormatError, ConfigError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged: {str(error).splitlines()[0]}") from None


def _verified(step: Path, files: Any, name: str) -> bytes:
    try:
        data = (step / name).read_bytes()
    except OSError as error:
        raise FormatError(name, str(error.strerror)) from None
    if hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
        raise FormatError(name, "its sha256 is not that of the manifest")
    return data

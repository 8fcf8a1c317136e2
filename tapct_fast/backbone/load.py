"""Load a backbone from a folder, a lone ``model.safetensors`` or a hub id; never a pickle."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tapct_fast.backbone.architecture import canonical_names, check_state, read_architecture
from tapct_fast.backbone.backbone import Backbone, Compile, Precision, best_precision
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.backbone.schema import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    read_config,
    read_preprocess,
    read_weights_sha256,
)
from tapct_fast.config import VitConfig
from tapct_fast.errors import BackboneError, ConfigError, InputError
from tapct_fast.io.atomic import sha256_file
from tapct_fast.model.vit import Vit
from tapct_kernels.attention import BackendName

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"  # the hub's model card
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class BackboneFiles(NamedTuple):
    """Where a backbone lies; None where a file is absent."""

    weights: Path
    config: Path | None = None
    preprocessor: Path | None = None
    card: Path | None = None


def load_backbone(
    path_or_repo: str | Path,
    *,
    device: str | torch.device = "cpu",
    precision: Precision | None = None,
    attention: BackendName | None = None,
    compile: Compile = False,
    revision: str | None = None,
    sha256: str | None = None,
) -> Backbone:
    """Load a backbone, strictly, ready for inference.

    Args:
        path_or_repo: A folder with ``model.safetensors`` (and ``config.json``,
            ``preprocessor.json``); such a file itself, whose neighbours count if it has that name;
            or a hub id ``owner/name``. Without a config the architecture is read off the tensors.
        device: Where the weights go.
        precision: Of the matrix products: ``fp32``, ``bf16`` or ``fp16``; None takes bf16 where the
            device has units for it (CUDA, or a CPU with AMX), else fp32.
        attention: See ``Backbone``.
        compile: See ``Backbone``.
        revision: Branch, tag or commit of a hub id.
        sha256: Of ``model.safetensors``, where you know it. What we export states its own in
            ``config.json``, and that is checked always.

    Raises:
        InputError: Nothing is there, or the device does not exist.
        BackboneError: The weights or their config are damaged or fit no known architecture.
    """
    place = _device(device)
    files = find_files(path_or_repo, revision)
    named = canonical_names(read_tensors(files.weights))
    stated = read_config(files.config) if files.config else None
    config = stated if isinstance(stated, VitConfig) else read_architecture(named, stated)
    state = check_state(config, named)
    _check_sha256(files, sha256)
    preprocess = (
        read_preprocess(files.preprocessor) if files.preprocessor else default_preprocess(config)
    )
    with torch.device("meta"):  # no time for initial values that are replaced at once
        vit = Vit(config, preprocess.hu)
    vit.load_state_dict(state, assign=True)
    backbone = Backbone(
        vit,
        preprocess,
        precision=precision or best_precision(place),
        attention=attention,
        compile=compile,
    )
    return backbone.to(place).eval()


def load_preprocess(path_or_repo: str | Path, *, revision: str | None = None) -> Preprocess:
    """Read the preprocessing of a backbone, or that of its architecture where none is saved.

    Raises:
        InputError: Nothing is there.
        BackboneError: A file is damaged.
    """
    if (Path(path_or_repo) / PREPROCESSOR_FILE).is_file():  # enough, even without weights
        return read_preprocess(Path(path_or_repo) / PREPROCESSOR_FILE)
    preprocessor = find_files(path_or_repo, revision).preprocessor
    if preprocessor:
        return read_preprocess(preprocessor)
    return load_backbone(path_or_repo, revision=revision).preprocess


def default_preprocess(config: VitConfig) -> Preprocess:
    """Return the released processor's steps, with the plane and multiples of an architecture."""
    pz, py, px = config.patch_zyx
    try:
        return Preprocess(
            resize_yx=config.image_zyx[1:], depth_multiple=pz, plane_multiple=math.lcm(py, px)
        )
    except ConfigError as error:
        raise BackboneError(str(error)) from None


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {str(device)!r} is unknown; give cpu, cuda or cuda:0") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch sees no GPU here; see tapct-fast doctor")
    return place


def find_files(path_or_repo: str | Path, revision: str | None = None) -> BackboneFiles:
    """Say where the files of a backbone lie, and download those of a hub id.

    Raises:
        InputError: Nothing is there.
        BackboneError: It is no safetensors file.
    """
    path = Path(path_or_repo)
    if path.is_file():
        if path.suffix != ".safetensors":
            what = "a pickle, which can run code" if path.suffix in _PICKLES else "unknown"
            raise BackboneError(f"a {path.suffix or 'nameless'} file is {what}; give .safetensors")
        return _neighbours(path) if path.name == WEIGHTS_FILE else BackboneFiles(path)
    if path.is_dir():
        weights = path / WEIGHTS_FILE
        if weights.is_file():
            return _neighbours(weights)
        if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
            raise InputError("BACKBONE is a training run; make a backbone of it: tapct-fast export")
        raise InputError(f"the backbone folder holds no {WEIGHTS_FILE}")
    if isinstance(path_or_repo, str) and HUB_ID.fullmatch(path_or_repo):
        return _neighbours(_download(path_or_repo, revision) / WEIGHTS_FILE)
    raise InputError(
        "the backbone is neither a folder, a .safetensors file nor a hub id owner/name"
    )


def _neighbours(weights: Path) -> BackboneFiles:
    names = (CONFIG_FILE, PREPROCESSOR_FILE, CARD_FILE)
    beside = (weights.with_name(name) for name in names)
    return BackboneFiles(weights, *(path if path.is_file() else None for path in beside))


def _download(repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise InputError(
            "no such folder or file; to read it as a hub id: pip install 'tapct-fast[hf]'"
        ) from None
    names = [WEIGHTS_FILE, CONFIG_FILE, PREPROCESSOR_FILE, CARD_FILE]
    try:
        # Only these names: a repository's code is never fetched. The hub library compares sizes.
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=names))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"no such folder or file, and the hub has no {repo!r}: {reason}") from None
    if not (folder / WEIGHTS_FILE).is_file():
        raise BackboneError(f"the hub repository {repo!r} holds no {WEIGHTS_FILE}")
    return folder


def _check_sha256(files: BackboneFiles, known: str | None) -> None:
    stated = read_weights_sha256(files.config) if files.config else None
    if known is None and stated is None:
        return
    found = sha256_file(files.weights)
    for digest, whose in ((known, "the one given"), (stated, f"that in {CONFIG_FILE}")):
        if digest is not None and digest.lower() != found:
            raise BackboneError(
                f"{files.weights.name} has the sha256 {found}, which is not {whose}: it was "
                "damaged or replaced; copy it again, or save the backbone anew"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        BackboneError: It is damaged.
    """
    try:
        return load_file(path)  # checks that header, offsets and file size agree
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise BackboneError(f"{path.name} is damaged: {reason}; copy it again") from None

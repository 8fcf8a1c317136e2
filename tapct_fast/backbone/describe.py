"""Say what a backbone is: sizes, hashes, preprocessing, licence, and what runs it here.

No fact holds a path.
"""

import json
import platform
import re
from pathlib import Path

import torch
from safetensors import safe_open

from tapct_fast import __version__
from tapct_fast.backbone.architecture import canonical_names
from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.load import BackboneFiles
from tapct_fast.backbone.schema import read_weights_sha256
from tapct_fast.io.atomic import sha256_file

_OPTIONAL = ("mask_token", "register_tokens", "ls1.gamma", "ls2.gamma")


def describe(backbone: Backbone, files: BackboneFiles) -> dict[str, str]:
    """Return facts by name: of a backbone, the files it was loaded from, versions and device."""
    config, preprocess = backbone.vit.config, backbone.preprocess
    scale = "LayerScale" if config.layer_scale is not None else "no LayerScale"
    resize = "none" if preprocess.resize_yx is None else sizes_text(preprocess.resize_yx)
    multiple, (low, high) = preprocess.plane_multiple, preprocess.hu.clip
    return {
        "architecture": f"{config.depth} blocks, width {config.dim}, {config.num_heads} heads of "
        f"{config.head_dim}, {config.ffn} of {config.mlp_dim}, {config.num_registers} registers, "
        f"{scale}, patch {sizes_text(config.patch_zyx)}, positions {sizes_text(config.grid_zyx)}",
        "architecture from": "config.json" if files.config else "the tensors",
        "parameters": f"{sum(p.numel() for p in backbone.vit.parameters()):,}",
        "tensors": _tensors_fact(files.weights),
        "weights file": f"sha256 {sha256_file(files.weights)} ({_stated_where(files)})",
        "backbone in fp32": f"sha256 {backbone.fingerprint()}",
        "preprocessing": f"plane {resize}{' antialiased' if preprocess.antialias else ''}, padded "
        f"to multiples of {sizes_text((preprocess.depth_multiple, multiple, multiple))} with "
        f"{preprocess.pad_hu:g} HU, clip {low:g}..{high:g}, mean {preprocess.hu.mean:g}, "
        f"std {preprocess.hu.std:g}",
        "preprocessing from": "preprocessor.json" if files.preprocessor else "the released default",
        "licence of the weights": stated_license(files) or "not stated: ask the publisher",
        "versions": f"tapct-fast {__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}",
        "device": device_text(backbone.device),
    }


def _stated_where(files: BackboneFiles) -> str:
    """Say what the hash was held to when the weights were loaded."""
    stated = read_weights_sha256(files.config) if files.config else None
    return "as config.json states" if stated else "stated nowhere"


def _tensors_fact(weights: Path) -> str:
    with safe_open(weights, framework="pt") as file:
        names = list(file.keys())
        kinds = sorted({file.get_slice(name).get_dtype() for name in names})
    present = {re.sub(r"^blocks\.\d+\.", "", name) for name in _canonical(names)}
    absent = [name for name in _OPTIONAL if name not in present]
    return f"{len(names)} ({', '.join(kinds)}), optional ones absent: {', '.join(absent) or 'none'}"


def _canonical(names: list[str]) -> list[str]:
    return list(canonical_names(dict.fromkeys(names, torch.empty(0))))


def stated_license(files: BackboneFiles) -> str | None:
    """Return the licence that the model card states, or else the config; None where neither does.

    What they say is shown, not judged.
    """
    if files.card is not None:
        with files.card.open("rb") as file:
            text = file.read(1 << 16).decode(errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        entry = re.search(r"^license:[ \t]*(\S.*)$", front[1], re.MULTILINE) if front else None
        if entry:
            return f"{_plain(entry[1])} (README.md)"
    if files.config is not None:
        stated = json.loads(files.config.read_bytes()).get("license")
        if isinstance(stated, str) and stated.strip():
            return f"{_plain(stated)} (config.json)"
    return None


def _plain(text: str) -> str:
    """Return printable ASCII on one short line: the text comes from outside."""
    return re.sub(r"[^ -~]|[|`]", "?", text.strip().strip("'\""))[:80]


def device_text(device: torch.device) -> str:
    """Return the name of a GPU or of the processor, and what it computes with."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def sizes_text(sizes: tuple[int, ...]) -> str:
    """Return sizes as ``12x224x224``."""
    return "x".join(str(size) for size in sizes)

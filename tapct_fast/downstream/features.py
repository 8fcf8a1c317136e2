"""Features of one scan: a token grid with its place in the patient, a cls bag, a pooled vector.

Shape suffixes: Z Y X tokens, D width (also as the last axis C of a volume), N windows.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from tapct_fast.downstream.zarr_features import digest_group, read_array, write_group
from tapct_fast.errors import BackboneError, FormatError, InputError
from tapct_fast.io.atomic import read_json, write_atomic, write_json

FORMAT, VERSION = "tapct-features", 1
SUFFIXES = {"safetensors": ".safetensors", "zarr": ".zarr"}  # by format
_TENSORS = ("patches", "cls", "pooled")


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Frozen features of one scan.

    Attributes:
        patches_ZYXC: Patch tokens, float32; z to Superior, y to Posterior, x to Left as in
            ``Volume``.
        affine: (4, 4) float64; maps the token index (x, y, z, 1) to the RAS+ millimetres of the
            centre of its patch.
        spacing_mm: Distance of token centres in z, y, x order.
        cls_ND: One cls token per window, in window order, float32.
        pooled_D: Mean of the cls bag.
    """

    patches_ZYXC: Tensor
    affine: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]
    cls_ND: Tensor
    pooled_D: Tensor


def save_features(
    features: Features, path: Path, *, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write ``path`` and beside it a .json with the geometry and a sha256.

    Patch tokens are stored as float16, a relative error of 5e-4; vectors as float32. The .json is
    written last, so that its presence means that both are whole.

    Args:
        features: Of one scan.
        path: Ends in ``.safetensors`` for one file, in ``.zarr`` for a Zarr v3 group.
        known: What else the .json is to say, as JSON values.

    Returns:
        The content of the .json.

    Raises:
        InputError: The name has another ending.
        BackboneError: A value does not fit float16.
    """
    if path.suffix not in SUFFIXES.values():
        raise InputError(f"features are written as {' or '.join(SUFFIXES.values())}; name them so")
    patches_ZYXC = features.patches_ZYXC.half()
    if not patches_ZYXC.isfinite().all():
        raise BackboneError("a patch feature is not finite in float16; check the backbone")
    place = {
        "affine": features.affine.ravel().tolist(),
        "spacing_mm": list(features.spacing_mm),
        "grid_zyx": list(patches_ZYXC.shape[:3]),
    }
    # What is there must not pass for what is being written.
    path.with_suffix(".json").unlink(missing_ok=True)
    if path.suffix == ".zarr":
        arrays = {
            "patches": (patches_ZYXC.contiguous().numpy(), ("z", "y", "x", "channel")),
            "cls": (features.cls_ND.contiguous().numpy(), ("window", "channel")),
            "pooled": (features.pooled_D.contiguous().numpy(), ("channel",)),
        }
        digest, size = write_group(path, arrays, {"format": FORMAT, "version": VERSION, **place})
    else:
        data = tensor_bytes(
            {
                "patches": patches_ZYXC.contiguous(),
                "cls": features.cls_ND.contiguous(),
                "pooled": features.pooled_D.contiguous(),
            }
        )
        write_atomic(path, data)
        digest, size = hashlib.sha256(data).hexdigest(), len(data)
    record = {
        "format": FORMAT,
        "version": VERSION,
        **place,
        "num_windows": len(features.cls_ND),
        "bytes": size,
        "sha256": digest,
        **(known or {}),
    }
    write_json(path.with_suffix(".json"), record)
    return record


def load_features(path: Path) -> Features:
    """Read what ``save_features`` wrote and verify it.

    Raises:
        FormatError: A file is missing, damaged or of another version.
    """
    record = read_json(path.with_suffix(".json"), "features")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FormatError("features", "the .json is not that of features; embed the scan again")
    if record.get("version") != VERSION:
        raise FormatError(
            "features", f"version {record.get('version')}, this reads {VERSION}; embed again"
        )
    try:
        tensors = _read_zarr(path, record) if path.suffix == ".zarr" else _read_file(path, record)
        z, y, x = (float(s) for s in record["spacing_mm"])
        return Features(
            patches_ZYXC=tensors["patches"].float(),
            affine=np.array(record["affine"], dtype=np.float64).reshape(4, 4),
            spacing_mm=(z, y, x),
            cls_ND=tensors["cls"],
            pooled_D=tensors["pooled"],
        )
    except OSError as error:
        raise FormatError("features", f"{error.strerror}; embed the scan again") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError("features", "damaged record; embed the scan again") from None


def _read_file(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    data = path.read_bytes()
    _check(hashlib.sha256(data).hexdigest(), record)
    return load_tensors(data)


def _read_zarr(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.is_dir():
        raise FormatError("features", "there is no such Zarr group; embed the scan again")
    _check(digest_group(path), record)
    return {name: torch.from_numpy(read_array(path / name)) for name in _TENSORS}


def _check(digest: str, record: Mapping[str, Any]) -> None:
    if digest != record["sha256"]:
        raise FormatError("features", "sha256 differs, the file is damaged; embed again")

"""Features of one scan: a token grid with its place in the patient, a cls bag, a pooled vector.

Shape suffixes: Z Y X tokens, D width (also as the last axis C of a volume), N windows.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.atomic import read_json, write_atomic, write_json

FORMAT, VERSION = "tapct-features", 1


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


def save_features(features: Features, path: Path) -> None:
    """Write ``path`` (.safetensors) and beside it a .json with the geometry and a sha256.

    Patch tokens are stored as float16, a relative error of 5e-4; vectors as float32. The .json is
    written last, so that its presence means that both are whole.

    Raises:
        InputError: The name does not end in .safetensors, or a value does not fit float16.
    """
    if path.suffix != ".safetensors":
        raise InputError("features are written as .safetensors; name the file so")
    patches_ZYXC = features.patches_ZYXC.half()
    if not patches_ZYXC.isfinite().all():
        raise InputError("a patch feature is not finite in float16; check the backbone")
    data = tensor_bytes(
        {
            "patches": patches_ZYXC.contiguous(),
            "cls": features.cls_ND.contiguous(),
            "pooled": features.pooled_D.contiguous(),
        }
    )
    write_atomic(path, data)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "affine": features.affine.ravel().tolist(),
        "spacing_mm": list(features.spacing_mm),
        "grid_zyx": list(patches_ZYXC.shape[:3]),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(path.with_suffix(".json"), record)


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
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise FormatError("features", "sha256 differs, the file is damaged; embed again")
        tensors = load_tensors(data)
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

"""Fast, trustworthy self-supervised 3D CT backbones.

Names are imported when first used, so that ``import tapct_fast`` and ``tapct-fast --help`` do not
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapct_fast.backbone.backbone import TAPCTModel
    from tapct_fast.backbone.export import export_backbone
    from tapct_fast.backbone.load import load_backbone
    from tapct_fast.backbone.load_scans import LoadedScans, load_for_tapct
    from tapct_fast.backbone.processor import TAPCTProcessor
    from tapct_fast.config import Config
    from tapct_fast.downstream.embed import embed_scans
    from tapct_fast.downstream.encode import embed_volume, encode_scan
    from tapct_fast.downstream.probe import knn, linear_segmentation
    from tapct_fast.errors import TapctError
    from tapct_fast.evaluation.evaluate import evaluate
    from tapct_fast.io.convert import (
        from_monai,
        from_nibabel,
        from_numpy,
        from_simpleitk,
        save_nifti,
        to_monai,
        to_nibabel,
        to_simpleitk,
    )
    from tapct_fast.io.findings import Finding, Report
    from tapct_fast.io.pack import pack
    from tapct_fast.io.read import check_series, check_volume, read_labels, read_volume
    from tapct_fast.io.store import Store
    from tapct_fast.io.verify import verify
    from tapct_fast.io.volume import Volume

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "Finding": "io.findings",
    "LoadedScans": "backbone.load_scans",
    "Report": "io.findings",
    "Store": "io.store",
    "TAPCTModel": "backbone.backbone",
    "TAPCTProcessor": "backbone.processor",
    "TapctError": "errors",
    "Volume": "io.volume",
    "check_series": "io.read",
    "check_volume": "io.read",
    "embed_scans": "downstream.embed",
    "embed_volume": "downstream.encode",
    "encode_scan": "downstream.encode",
    "evaluate": "evaluation.evaluate",
    "export_backbone": "backbone.export",
    "from_monai": "io.convert",
    "from_nibabel": "io.convert",
    "from_numpy": "io.convert",
    "from_simpleitk": "io.convert",
    "knn": "downstream.probe",
    "linear_segmentation": "downstream.probe",
    "load_backbone": "backbone.load",
    "load_for_tapct": "backbone.load_scans",
    "pack": "io.pack",
    "read_labels": "io.read",
    "read_volume": "io.read",
    "save_nifti": "io.convert",
    "to_monai": "io.convert",
    "to_nibabel": "io.convert",
    "to_simpleitk": "io.convert",
    "verify": "io.verify",
}

__all__ = [
    "Config",
    "Finding",
    "LoadedScans",
    "Report",
    "Store",
    "TAPCTModel",
    "TAPCTProcessor",
    "TapctError",
    "Volume",
    "check_series",
    "check_volume",
    "embed_scans",
    "embed_volume",
    "encode_scan",
    "evaluate",
    "export_backbone",
    "from_monai",
    "from_nibabel",
    "from_numpy",
    "from_simpleitk",
    "knn",
    "linear_segmentation",
    "load_backbone",
    "load_for_tapct",
    "pack",
    "read_labels",
    "read_volume",
    "save_nifti",
    "to_monai",
    "to_nibabel",
    "to_simpleitk",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tapct_fast' has no attribute {name!r}")
    value = getattr(import_module(f"tapct_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

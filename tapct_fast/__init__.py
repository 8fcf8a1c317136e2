"""Fast, trustworthy self-supervised 3D CT backbones.

Names are imported when first used, so that ``import tapct_fast`` and ``tapct-fast --help`` do not
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapct_fast.backbone.export import export_backbone
    from tapct_fast.backbone.load import load_backbone
    from tapct_fast.config import Config
    from tapct_fast.downstream.embed import embed_scans, embed_volume
    from tapct_fast.downstream.probe import knn, linear_segmentation
    from tapct_fast.errors import TapctError
    from tapct_fast.io.read import read_labels, read_volume
    from tapct_fast.io.store import Store, pack
    from tapct_fast.io.volume import Volume

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "Store": "io.store",
    "TapctError": "errors",
    "Volume": "io.volume",
    "embed_scans": "downstream.embed",
    "embed_volume": "downstream.embed",
    "export_backbone": "backbone.export",
    "knn": "downstream.probe",
    "linear_segmentation": "downstream.probe",
    "load_backbone": "backbone.load",
    "pack": "io.store",
    "read_labels": "io.read",
    "read_volume": "io.read",
}

__all__ = [
    "Config",
    "Store",
    "TapctError",
    "Volume",
    "embed_scans",
    "embed_volume",
    "export_backbone",
    "knn",
    "linear_segmentation",
    "load_backbone",
    "pack",
    "read_labels",
    "read_volume",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tapct_fast' has no attribute {name!r}")
    value = getattr(import_module(f"tapct_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

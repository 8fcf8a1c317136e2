"""timm, where its torchvision stands beside a CPU build of torch."""

import importlib
import sys
from typing import Any

import pytest
import torch


def import_timm() -> Any:
    """Import timm, whose torchvision wants operators that its wheel lacks beside a CPU torch."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}")
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith(("timm", "torchvision"))]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
        return importlib.import_module("timm")

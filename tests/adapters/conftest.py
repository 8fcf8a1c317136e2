"""A small backbone, its folders, and HU to encode."""

import contextlib
import dataclasses
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.export import save_backbone
from tapct_fast.backbone.load import default_preprocess
from tapct_fast.config import VitConfig
from tapct_fast.model.vit import Vit

# Where it is, transformers imports torchvision, whose wheel lacks operators beside a CPU torch.
with contextlib.suppress(ModuleNotFoundError):
    try:
        import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
        import_module("torchvision")


@pytest.fixture
def backbone() -> Backbone:
    """Make weights that are far from their initial values, so that no branch is negligible."""
    config = VitConfig(dim=64, depth=2, head_dim=32, image_zyx=(8, 32, 32))
    vit = Vit(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    preprocess = dataclasses.replace(default_preprocess(config), antialias=True)
    return Backbone(vit, preprocess)


@pytest.fixture
def exported(backbone: Backbone, tmp_path: Path) -> Path:
    """Write it as ``tapct-fast export`` does."""
    return save_backbone(backbone, tmp_path / "exported")


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Write a folder in the released form: other weights, heads 64 wide, and code to download."""
    vit = Vit(VitConfig(dim=128, depth=2, image_zyx=(8, 32, 32)))
    vit.init_weights(1)
    folder = tmp_path / "released"
    folder.mkdir()
    save_file({f"model.{k}": v for k, v in vit.state_dict().items()}, folder / "model.safetensors")
    config = {
        "model_type": "tapct",
        "architectures": ["TAPCTModel"],
        "auto_map": {
            "AutoConfig": "modeling_tapct.TAPCTConfig",
            "AutoModel": "modeling_tapct.TAPCTModel",
        },
        "embed_dim": 128,
        "num_heads": 2,
        "img_size": [8, 32, 32],
        "dtype": "float32",
        "transformers_version": "4.55.0",
    }
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "image_processor_type": "TAPCTProcessor",
        "auto_map": {"AutoImageProcessor": "tapct_processor.TAPCTProcessor"},
        "resize_dims": [32, 32],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for name in ("modeling_tapct.py", "tapct_processor.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')\n")
    return folder


@pytest.fixture
def hu_BCZYX() -> Tensor:
    """Draw HU of no particular size."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-1100, 1000, (2, 1, 7, 40, 48), generator=generator, dtype=torch.int16)

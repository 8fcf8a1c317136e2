"""The examples of docs/adapters.md run as they are printed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tapct_fast.backbone.load import load_backbone

EXAMPLES = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(),
    re.DOTALL,
)


def run(word: str, **names: Any) -> dict[str, Any]:
    (source,) = [example for example in EXAMPLES if word in example]
    exec(source, names)
    return names


def test_the_transformers_example(exported: Path, hu_BCZYX: Tensor) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    names = run("hf.register", folder_or_id=exported, hu_BCZYX=hu_BCZYX)
    assert names["out"].last_hidden_state.shape == (2, 64, 2, 4, 4)


@torch.no_grad()
def test_the_monai_example(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai", reason="MONAI is not installed")
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
    hu = np.random.default_rng(0).integers(-1000, 500, (40, 44, 13)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([0.8, 0.8, 2.0, 1.0])), tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    names = run("SlidingWindowInferer", backbone=load_backbone(exported))
    assert names["maps"].shape == (1, 64, 4, 4, 4)
    assert len(list(Path("out").rglob("*.nii.gz"))) == 1


def test_the_peft_example(exported: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    names = run("get_peft_model", folder=exported, load_backbone=load_backbone)
    state, stored = names["backbone"].vit.state_dict(), load_backbone(exported).vit.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_the_accelerate_example() -> None:
    from reference_model import TAPCTModel

    class AutoModel:
        @staticmethod
        def from_pretrained(repo: str, *, trust_remote_code: bool) -> TAPCTModel:
            assert repo
            assert trust_remote_code
            return TAPCTModel()

    names = run("accelerate(model)", AutoModel=AutoModel)
    assert "forward" in vars(names["model"].model.blocks[0])

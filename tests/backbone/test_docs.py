"""The README's drop-in example runs."""

import re
from pathlib import Path

import numpy as np
import pytest

import tapct_fast
from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.load import default_preprocess
from tapct_fast.config import VitConfig
from tapct_fast.io.nifti import write_nifti
from tapct_fast.model.vit import Vit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/backbone.md"])
def test_the_drop_in_example_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VitConfig(dim=64, depth=1, image_zyx=(12, 32, 32))
    vit = Vit(config)
    vit.init_weights(0)
    Backbone(vit, default_preprocess(config)).save_pretrained(tmp_path / "backbone")
    hu_ZYX = np.random.default_rng(0).integers(-1000, 800, (20, 40, 30)).astype(np.int16)
    write_nifti(tmp_path / "scan.nii.gz", hu_ZYX, np.diag([2.0, 2.0, 4.0, 1.0]))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(
        r"```python\n([^`]*from tapct_fast import [^`]*?TAPCTModel[^`]*)```",
        (ROOT / page).read_text(),
    )
    # The hub is out of reach of tests; all else is as printed.
    names = {}
    exec(example.replace("fomofo/tap-ct-b-3d", "backbone"), names)
    assert isinstance(names["model"], tapct_fast.TAPCTModel)
    assert names["features"].patches_ZYXC.shape == (5, 4, 4, 64)

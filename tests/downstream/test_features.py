import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tapct_fast.downstream.features import Features, load_features, save_features
from tapct_fast.errors import BackboneError, FormatError, InputError


@pytest.fixture
def features() -> Features:
    affine = np.array([[-1.1, 0, 0, 7], [0, -2.2, 0, 8], [0, 0, 3.3, 9], [0, 0, 0, 1]])
    cls_ND = torch.randn(3, 6)
    return Features(torch.randn(2, 3, 4, 6), affine, (3.3, 2.2, 1.1), cls_ND, cls_ND.mean(0))


def test_features_come_back(features: Features, tmp_path: Path) -> None:
    path = tmp_path / "scan.safetensors"
    save_features(features, path)
    back = load_features(path)
    assert torch.equal(back.patches_ZYXC, features.patches_ZYXC.half().float())
    assert torch.equal(back.cls_ND, features.cls_ND)
    assert torch.equal(back.pooled_D, features.pooled_D)
    assert np.array_equal(back.affine, features.affine)
    assert back.spacing_mm == features.spacing_mm


def test_any_flipped_bit_is_noticed(features: Features, tmp_path: Path) -> None:
    path = tmp_path / "scan.safetensors"
    save_features(features, path)
    data = path.read_bytes()
    for place in np.random.default_rng(0).integers(len(data), size=20):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="sha256"):
            load_features(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "not that of features"),
        ({"affine": [1.0]}, "damaged record"),
        ({"spacing_mm": None}, "damaged record"),
    ],
)
def test_a_wrong_record_is_an_error(
    features: Features, tmp_path: Path, change: dict[str, object], match: str
) -> None:
    path = tmp_path / "scan.safetensors"
    save_features(features, path)
    record = path.with_suffix(".json")
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    with pytest.raises(FormatError, match=match):
        load_features(path)


def test_a_missing_file_is_an_error(features: Features, tmp_path: Path) -> None:
    path = tmp_path / "scan.safetensors"
    with pytest.raises(FormatError, match=r"scan\.json"):
        load_features(path)
    save_features(features, path)
    path.unlink()
    with pytest.raises(FormatError, match="embed the scan again"):
        load_features(path)


def test_what_float16_cannot_hold_is_refused(features: Features, tmp_path: Path) -> None:
    features.patches_ZYXC[0, 0, 0, 0] = 1e5
    with pytest.raises(BackboneError, match="float16"):
        save_features(features, tmp_path / "scan.safetensors")
    with pytest.raises(InputError, match=r"\.safetensors"):
        save_features(features, tmp_path / "scan.npz")
    assert list(tmp_path.iterdir()) == []

import json
from pathlib import Path
from typing import Any

import pytest

from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.backbone.schema import (
    config_json,
    preprocess_json,
    read_config,
    read_preprocess,
)
from tapct_fast.config import HuConfig, VitConfig
from tapct_fast.errors import BackboneError

CONFIG = VitConfig(dim=128, depth=3, ffn="swiglu", layer_scale=None, image_zyx=(8, 64, 64))
PREPROCESS = Preprocess(resize_yx=None, antialias=True, hu=HuConfig(clip=(-900.0, 500.0), std=7.5))


def test_both_files_round_trip(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(config_json(CONFIG))
    (tmp_path / "preprocessor.json").write_bytes(preprocess_json(PREPROCESS))
    assert read_config(tmp_path / "config.json") == CONFIG
    assert read_preprocess(tmp_path / "preprocessor.json") == PREPROCESS


def set_in(raw: dict[str, Any], where: str, value: object) -> None:
    *parents, last = where.split(".")
    for parent in parents:
        raw = raw[parent]
    raw[last] = value


@pytest.mark.parametrize(
    ("where", "value", "word"),
    [
        ("vit.dmi", 64, "vit.dmi"),
        ("extra", 1, "extra"),
        ("version", 2, "version"),
        ("format", "tapct-store", "format"),
        ("vit.dim", "128", "vit.dim"),
        ("vit.dim", 128.5, "vit.dim"),
        ("vit.dim", True, "vit.dim"),
        ("vit.dim", 100, "head_dim"),
        ("vit.depth", 0, "depth"),
        ("vit.ffn", "moe", "vit.ffn"),
        ("vit.patch_zyx", [4, 8], "vit.patch_zyx"),
        ("vit", None, "vit"),
    ],
)
def test_config_is_strict(tmp_path: Path, where: str, value: object, word: str) -> None:
    raw = json.loads(config_json(CONFIG))
    set_in(raw, where, value)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BackboneError, match=word) as error:
        read_config(tmp_path / "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("preprocess.resize_yx", [224]),
        ("preprocess.resize_yx", [224, 220]),
        ("preprocess.pad_hu", "air"),
        ("preprocess.pad_hu", 1e9),
        ("preprocess.depth_multiple", 0),
        ("preprocess.hu.std", 0.0),
        ("preprocess.hu.median", 0.0),
        ("preprocess.antialias", 1),
    ],
)
def test_preprocessor_is_strict(tmp_path: Path, where: str, value: object) -> None:
    raw = json.loads(preprocess_json(PREPROCESS))
    set_in(raw, where, value)
    (tmp_path / "preprocessor.json").write_text(json.dumps(raw))
    with pytest.raises(BackboneError, match=r"preprocessor\.json"):
        read_preprocess(tmp_path / "preprocessor.json")


def test_a_missing_field_does_not_become_a_default(tmp_path: Path) -> None:
    raw = json.loads(preprocess_json(PREPROCESS))
    del raw["preprocess"]["hu"]["mean"]
    (tmp_path / "preprocessor.json").write_text(json.dumps(raw))
    with pytest.raises(BackboneError, match=r"preprocess\.hu\.mean"):
        read_preprocess(tmp_path / "preprocessor.json")
    raw = json.loads(config_json(CONFIG))
    del raw["vit"]["num_registers"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BackboneError, match=r"vit\.num_registers"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", "\x00\xff", '{"vit": {}}', "[" * 100_000]
)
def test_a_file_that_is_no_config_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BackboneError, match=r"config\.json"):
        read_config(tmp_path / "config.json")


def test_a_huge_file_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(BackboneError, match="bytes"):
        read_config(tmp_path / "config.json")

"""The config tree: strict, round-trip exact, and without a setting that nothing reads."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tapct_fast import recipes
from tapct_fast.config import Config, VitConfig, from_json, to_json
from tapct_fast.errors import ConfigError

SOURCE = Path(__file__).resolve().parent.parent / "tapct_fast"


def _fields(node: Any) -> Iterator[str]:
    for field in dataclasses.fields(node):
        yield field.name
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value)


def test_every_setting_is_read_by_a_module() -> None:
    modules = [p for p in SOURCE.rglob("*.py") if p.name not in ("config.py", "recipes.py")]
    text = "\n".join(p.read_text() for p in modules)
    derived = {"mlp_ratio"}  # read through VitConfig.mlp_dim
    unread = [f for f in set(_fields(Config())) - derived if not re.search(rf"\.{f}\b", text)]
    assert unread == []


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_a_recipe_survives_json(name: str) -> None:
    config = recipes.recipe(name)
    assert from_json(Config, to_json(config)) == config


def test_an_override_changes_one_setting_and_keeps_the_rest() -> None:
    changed = recipes.override(
        recipes.debug(),
        {"vit.depth": "7", "heads.ibot": "none", "views.local_views.size_zyx": "4,16,24"},
    )
    assert changed.vit == dataclasses.replace(recipes.debug().vit, depth=7)
    assert changed.heads.ibot is None
    assert changed.views.local_views.size_zyx == (4, 16, 24)
    assert changed.train == recipes.debug().train


def test_none_of_a_setting_that_is_a_word_is_a_word() -> None:
    config = recipes.override(recipes.debug(), {"train.checkpointing": "full"})
    assert recipes.override(config, {"train.checkpointing": "none"}) == recipes.debug()
    with pytest.raises(ConfigError, match=r"vit\.ffn='none' is not one of 'mlp', 'swiglu'"):
        recipes.override(config, {"vit.ffn": "none"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vit.dpeth", "6", "unknown setting vit.dpeth; nearest is vit.depth"),
        ("depth", "6", "unknown setting depth; nearest is vit.depth"),
        ("vit.depth.x", "6", "unknown setting vit.depth.x; nearest is vit.depth"),
        ("vit.depth", "six", "vit.depth='six' is not of type int"),
        ("vit.depth", "true", "vit.depth=True is not of type int"),
        ("vit.depth", "0", "vit.depth=0 is not positive"),
        ("vit.dim", "100", "vit.dim=100 is not a multiple of vit.head_dim=64"),
        ("vit.ffn", "gelu", "vit.ffn='gelu' is not one of 'mlp', 'swiglu'"),
        ("vit", "3", "vit is not an object"),
        ("hu.mean", "NaN", "hu.mean=nan is not finite"),
        ("masks.ratio", "0.5,0.1", "masks.ratio=(0.5, 0.1) is not an increasing pair in [0, 1]"),
        ("views.flip_prob_zyx", "0,1", "views.flip_prob_zyx=[0, 1] is not a list of 3"),
        ("views.global_views.num", "3", "views.global_views.num must be 2"),
        ("views.local_views.size_zyx", "5,32,32", "is not a multiple of vit.patch_zyx=(4, 8, 8)"),
        ("train.accumulate", "3", "train.batch_size=16 is not a multiple of train.accumulate=3"),
        ("train.keep_checkpoints", "1", "train.keep_checkpoints must be at least 2"),
    ],
)
def test_a_wrong_setting_is_named_with_the_way_out(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipes.override(recipes.debug(), {name: value})


def test_json_from_outside_must_be_complete_and_known() -> None:
    text = to_json(VitConfig())
    with pytest.raises(ConfigError, match="unknown setting dept; nearest is depth"):
        from_json(VitConfig, text.replace('"depth"', '"dept"'))
    with pytest.raises(ConfigError, match="config lacks depth"):
        from_json(VitConfig, text.replace('"depth": 12,', ""))
    with pytest.raises(ConfigError, match="config is not JSON"):
        from_json(VitConfig, text[:-1])


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no recipe 'vit-x'; recipes: debug, vit-s, vit-b"):
        recipes.recipe("vit-x")


def test_graphs_that_one_micro_batch_would_overwrite_for_the_next_are_refused() -> None:
    recipes.override(recipes.vit_s(), {"train.compile": "cuda-graphs"})
    with pytest.raises(ConfigError, match=r"give train\.accumulate=1, not 2"):
        recipes.override(recipes.vit_b(), {"train.compile": "cuda-graphs"})

"""The JSON files beside the weights, read strictly; nothing in them is ever executed.

``config.json`` and ``preprocessor.json`` of ours are strict. A ``config.json`` written for another
library is only consulted for sizes under their usual names, which must agree with the tensors.
transformers finds our classes by ``model_type`` in ``config.json`` and by a file that holds nothing
but the name of the processor's class.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import VitConfig, Zyx
from tapct_fast.errors import BackboneError

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor.json"
PROCESSOR_CLASS_FILE = "preprocessor_config.json"  # transformers' name for it
PROCESSOR_CLASS = "TAPCTProcessor"  # that of the released models
MODEL_TYPE = "tapct"
MAX_JSON_BYTES = 1 << 20  # ours are below 1 KiB

# Any of these says that the file was written for transformers and not by us.
_FOREIGN_KEYS = {"architectures", "auto_map", "model_type", "transformers_version"}


class _ConfigFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal["tapct-backbone"]
    version: Literal[1]
    model_type: Literal["tapct"] = "tapct"
    vit: VitConfig


class _PreprocessorFile(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal["tapct-preprocessor"]
    version: Literal[1]
    preprocess: Preprocess


class ForeignConfig(BaseModel):
    """Sizes found in a ``config.json`` of another library; None where it does not state one."""

    model_config = ConfigDict(strict=True, extra="ignore")
    dim: int | None = Field(None, validation_alias=AliasChoices("embed_dim", "hidden_size"))
    depth: int | None = Field(None, validation_alias=AliasChoices("depth", "num_hidden_layers"))
    num_heads: int | None = Field(
        None, validation_alias=AliasChoices("num_heads", "num_attention_heads")
    )
    num_registers: int | None = Field(None, validation_alias="num_register_tokens")
    image_zyx: Zyx | int | None = Field(
        None, validation_alias=AliasChoices("img_size", "image_size")
    )


Schema = TypeVar("Schema", bound=BaseModel)


def _read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise BackboneError(f"{path.name} has {path.stat().st_size} bytes; it is not a config")
    try:
        raw = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BackboneError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BackboneError(f"{path.name} is not a JSON object")
    return raw


def _parse(kind: type[Schema], raw: Any, name: str) -> Schema:
    try:
        return kind.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BackboneError(f"{name}: {where}: {first['msg']}") from None


def _require_complete(node: object, raw: dict[str, Any], where: str) -> None:
    """Refuse a node whose file lacks a field: a default of ours may differ from its writer's."""
    assert dataclasses.is_dataclass(node)
    for item in dataclasses.fields(node):
        if item.name not in raw:
            raise BackboneError(f"{where}.{item.name}: Field required")
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            _require_complete(value, raw[item.name], f"{where}.{item.name}")


def read_config(path: Path) -> VitConfig | ForeignConfig:
    """Read ``config.json``.

    Raises:
        BackboneError: It is not JSON, or one of ours with an unknown, missing or wrong field, or
            neither ours nor written for transformers.
    """
    raw = _read_json(path)
    if "format" not in raw and raw.keys() & _FOREIGN_KEYS:
        return _parse(ForeignConfig, raw, path.name)
    if "transformers_version" in raw:  # ours, written by transformers, which adds its own keys
        raw = {name: raw[name] for name in _ConfigFile.model_fields if name in raw}
    config = _parse(_ConfigFile, raw, path.name).vit
    _require_complete(config, raw["vit"], f"{path.name}: vit")
    return config


def read_preprocess(path: Path) -> Preprocess:
    """Read ``preprocessor.json``.

    Raises:
        BackboneError: It is not JSON or has an unknown, missing or wrong field.
    """
    raw = _read_json(path)
    preprocess = _parse(_PreprocessorFile, raw, path.name).preprocess
    _require_complete(preprocess, raw["preprocess"], f"{path.name}: preprocess")
    return preprocess


def config_json(config: VitConfig) -> bytes:
    """Serialise ``config.json``; ``read_config`` gives an equal config back."""
    return _dump(_ConfigFile(format="tapct-backbone", version=1, vit=config))


def preprocess_json(preprocess: Preprocess) -> bytes:
    """Serialise ``preprocessor.json``; ``read_preprocess`` gives an equal object back."""
    return _dump(_PreprocessorFile(format="tapct-preprocessor", version=1, preprocess=preprocess))


def processor_class_json() -> bytes:
    """Serialise ``preprocessor_config.json``, by which transformers finds the processor."""
    return f'{{"image_processor_type": "{PROCESSOR_CLASS}"}}\n'.encode()


def _dump(file: BaseModel) -> bytes:
    return (file.model_dump_json(indent=1) + "\n").encode()

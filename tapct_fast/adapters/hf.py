"""The backbone as transformers' own kind of model, without remote code.

``register()`` makes ``AutoConfig``, ``AutoModel`` and ``AutoImageProcessor`` know the model type
``tapct``. A registered class also wins over code in the repository (``auto_map``), whatever
``trust_remote_code`` says. Weights are read by ``load_backbone``: strictly, from safetensors only;
transformers then places them. The classes have the released models' names, which transformers
writes into the files.

Shape suffixes: B batch, C channels (one in, D out), Z Y X voxels or tokens, L patch tokens,
R registers, D width.
"""

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tapct_fast.backbone.backbone import DTYPES, Backbone
from tapct_fast.backbone.load import WEIGHTS_FILE, default_preprocess, load_backbone
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.backbone.schema import (
    CONFIG_FILE,
    MODEL_TYPE,
    PREPROCESSOR_FILE,
    PROCESSOR_CLASS_FILE,
    preprocess_json,
    processor_class_json,
    read_preprocess,
)
from tapct_fast.config import VitConfig
from tapct_fast.errors import BackboneError, ConfigError, InputError
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.volume import Volume, to_int16
from tapct_fast.model.vit import Vit

try:
    import transformers
    from huggingface_hub import snapshot_download
    from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
    from transformers.modeling_outputs import ModelOutput
    from transformers.utils import cached_file
except ImportError as error:
    raise InputError(
        f"this adapter needs transformers: pip install 'tapct-fast[hf]' ({error})"
    ) from None

_INITIAL_SEED = 0
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_CACHED_FILE_ARGUMENTS = (*_HUB_ARGUMENTS, "subfolder")
# What a preprocessor_config.json says about classes, and not about voxels.
_CLASS_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}

Node = TypeVar("Node")


def register() -> None:
    """Make transformers' ``Auto`` classes load backbones; calling it again changes nothing.

    After it ``AutoModel.from_pretrained(x)`` and ``AutoImageProcessor.from_pretrained(x)`` take a
    folder or hub id of the released form, of ``export_backbone``, or of their own
    ``save_pretrained``.

    Source: transformers, "Registering a model" (custom models).
    """
    transformers.AutoConfig.register(MODEL_TYPE, TAPCTConfig, exist_ok=True)
    transformers.AutoModel.register(TAPCTConfig, TAPCTModel, exist_ok=True)
    transformers.AutoImageProcessor.register(
        TAPCTConfig, slow_image_processor_class=TAPCTProcessor, exist_ok=True
    )


class TAPCTConfig(transformers.PreTrainedConfig):  # type: ignore[misc]  # untyped base
    """Architecture and preprocessing, in a ``config.json`` that ``load_backbone`` reads too.

    The released form states nothing that is needed: ``from_pretrained`` of the model completes it
    from the tensors.

    Attributes:
        format: Ours, once ``vit`` is known.
        version: Of the format.
        vit: ``VitConfig`` as a dict, or None.
        preprocess: ``Preprocess`` as a dict; ``preprocessor.json`` beside it wins.
        hidden_size: D, under the name that other libraries look for, as are the next ones.
        num_hidden_layers: Blocks.
        num_attention_heads: Per block.
        num_register_tokens: R.
        num_channels: One.
        image_size: Voxels of the learned position grid, z, y, x.
        patch_size: Voxels of a patch, z, y, x.
    """

    model_type = MODEL_TYPE

    format: str | None = None
    version: int | None = None
    vit: dict[str, Any] | None = None
    preprocess: dict[str, Any] | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_register_tokens: int | None = None
    num_channels: int = 1
    image_size: list[int] | None = None
    patch_size: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Let transformers take its own keys, then state the sizes."""
        super().__post_init__(**kwargs)
        if self.vit is not None:
            self.state(self.vit_config(), self.preprocess_steps())

    def vit_config(self) -> VitConfig:
        """Return the architecture.

        Raises:
            BackboneError: It is not known yet, or damaged.
        """
        if self.vit is None:
            raise BackboneError(
                "config.json does not state the architecture; load weights with from_pretrained, "
                "or give TAPCTConfig(vit=dataclasses.asdict(VitConfig(...)))"
            )
        return _node(VitConfig, self.vit, "vit")

    def preprocess_steps(self) -> Preprocess:
        """Return the preprocessing; the released one for this architecture where none is stated."""
        if self.preprocess is None:
            return default_preprocess(self.vit_config())
        return _node(Preprocess, self.preprocess, "preprocess")

    def state(self, vit: VitConfig, preprocess: Preprocess) -> None:
        """Write an architecture and its preprocessing into this config."""
        self.format, self.version = "tapct-backbone", 1
        self.vit, self.preprocess = dataclasses.asdict(vit), dataclasses.asdict(preprocess)
        self.hidden_size, self.num_hidden_layers = vit.dim, vit.depth
        self.num_attention_heads, self.num_register_tokens = vit.num_heads, vit.num_registers
        self.image_size, self.patch_size = list(vit.image_zyx), list(vit.patch_zyx)
        self.__dict__.pop("auto_map", None)  # what is saved refers to no remote code


@dataclass
class TAPCTOutput(ModelOutput):  # type: ignore[misc]  # untyped base
    """``BackboneOutput`` as transformers' ordered dict: attribute, key and position all work.

    Attributes:
        last_hidden_state: Patch tokens only, (B, L, D), or (B, D, Z, Y, X) on the token grid.
        pooler_output: The cls token, (B, D).
        hidden_states: Patch tokens after each block, if asked for, in the form of the last.
        registers: Register tokens, (B, R, D).
        grid: Tokens along z, y, x.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    registers: Tensor | None = None
    grid: tuple[int, int, int] | None = None


class TAPCTModel(transformers.PreTrainedModel):  # type: ignore[misc]  # untyped base
    """A ``Backbone`` whose state-dict keys are those of the released files, ``model.blocks.0...``.

    Weights stay float32: ``dtype=torch.bfloat16`` or ``torch.float16`` of ``from_pretrained`` is
    the precision of the matrix products, as in ``load_backbone``; None is float32 on every device.
    ``model.to(dtype)`` afterwards casts the weights.

    Args:
        config: States the architecture; initial weights are those of seed 0.
    """

    config_class = TAPCTConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keep_in_fp32_modules_strict = frozenset({"model"})
    _no_split_modules = ("Vit",)  # a block computes the next block's norm

    def __init__(self, config: TAPCTConfig, *_: Any, **__: Any) -> None:
        super().__init__(config)
        preprocess = config.preprocess_steps()
        self.model = Vit(config.vit_config(), preprocess.hu)
        if self.model.cls_token.device.type != "meta":
            self.model.init_weights(_INITIAL_SEED)
        stated = [name for name, dtype in DTYPES.items() if dtype == config.dtype]
        precision = stated[0] if stated else "fp32"
        # In a tuple it is no submodule, so that every weight has one name.
        self._backbone = (Backbone(self.model, preprocess, precision=precision),)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave weights as they are: they were all initialised, or will all be loaded."""

    def train(self, mode: bool = True) -> "TAPCTModel":
        """Switch to training, or with ``mode=False`` to inference."""
        super().train(mode)
        self.backbone.train(mode)
        return self

    @property
    def backbone(self) -> Backbone:
        """The backbone that computes; it shares the weights."""
        return self._backbone[0]

    def forward(
        self,
        pixel_values: Tensor,  # the released model's argument name, so no shape suffix
        reshape: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TAPCTOutput | tuple[Any, ...]:
        """Encode volumes; see ``Backbone.forward``.

        Args:
            pixel_values: (B, 1, Z, Y, X), int16 HU or normalised float.
            reshape: Return patch tokens as (B, D, Z, Y, X) maps instead of (B, L, D).
            output_hidden_states: Also return the patch tokens after each block; None asks the
                config.
            return_dict: False returns the outputs that are there as a tuple; None asks the config.

        Raises:
            InputError: Wrong shape or type, or float values that look like HU.
            BackboneError: The output is not finite.
        """
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if return_dict is None:
            return_dict = bool(self.config.return_dict)
        out = self.backbone(pixel_values, reshape, output_hidden_states)
        named = TAPCTOutput(
            last_hidden_state=out.last_hidden_state,
            pooler_output=out.pooler_output,
            hidden_states=out.hidden_states,
            registers=out.registers,
            grid=out.grid,
        )
        return named if return_dict else named.to_tuple()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        config: TAPCTConfig | None = None,
        **kwargs: Any,  # transformers' own: dtype, device_map, revision, ...
    ) -> "TAPCTModel":
        """Load strictly what ``load_backbone`` loads, and let transformers place it.

        Args:
            pretrained_model_name_or_path: A folder or hub id.
            args: Nothing that this model knows.
            config: As ``AutoConfig`` read it; None reads it here.
            kwargs: Those of transformers.

        Raises:
            InputError: Nothing is there, or an argument names pickled weights.
            BackboneError: The weights or their config are damaged or contradict each other.
        """
        if pretrained_model_name_or_path is None:
            given: TAPCTModel = super().from_pretrained(None, *args, config=config, **kwargs)
            return given
        if kwargs.pop("use_safetensors", True) is False:
            raise InputError("use_safetensors=False asks for a pickle, which can run code; omit it")
        folder = _folder(pretrained_model_name_or_path, kwargs)
        backbone = load_backbone(folder)
        if config is None:
            has_config = (folder / CONFIG_FILE).is_file()
            config = TAPCTConfig.from_pretrained(folder) if has_config else TAPCTConfig()
        elif config.vit is not None and config.vit_config() != backbone.vit.config:
            raise BackboneError("the config given is of another architecture than the weights")
        config.state(backbone.vit.config, backbone.preprocess)
        state = {f"model.{name}": tensor for name, tensor in backbone.vit.state_dict().items()}
        loaded: TAPCTModel = super().from_pretrained(
            None, *args, config=config, state_dict=state, **kwargs
        )
        return loaded

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write a folder that ``from_pretrained`` and ``load_backbone`` read.

        Args:
            save_directory: Made where it is missing.
            args: Those of transformers.
            kwargs: Those of transformers.
        """
        _write_preprocess(self.backbone.preprocess, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)


class TAPCTProcessor(BaseImageProcessor):  # type: ignore[misc]  # untyped base
    """``Preprocess`` behind the released processor's call: HU in, ``pixel_values`` out.

    Args:
        preprocess: The steps, or their dict; None takes the released ones.
        resize_dims: In-plane size instead of that of ``preprocess``, the released attribute.
        kwargs: Other keys of a ``preprocessor_config.json``; those about voxels are named in a
            warning and not used.

    Raises:
        BackboneError: The steps are damaged.
    """

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        preprocess: Preprocess | dict[str, Any] | None = None,
        resize_dims: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(kwargs.keys() - _CLASS_KEYS):
            warnings.warn(
                f"{PROCESSOR_CLASS_FILE} states {', '.join(unknown)}, which is not used; "
                f"put our {PREPROCESSOR_FILE} beside it if these differ from the released ones",
                stacklevel=2,
            )
        if not isinstance(preprocess, Preprocess):
            preprocess = _node(Preprocess, preprocess or {}, "preprocess")
        self.steps = preprocess
        if resize_dims is not None:
            self.resize_dims = resize_dims

    @property
    def resize_dims(self) -> tuple[int, int] | None:
        """In-plane size; may be set, None keeps the scan's own."""
        return self.steps.resize_yx

    @resize_dims.setter
    def resize_dims(self, resize_yx: tuple[int, int] | None) -> None:
        sizes = None if resize_yx is None else (int(resize_yx[0]), int(resize_yx[1]))
        self.steps = dataclasses.replace(self.steps, resize_yx=sizes)

    def preprocess(
        self,
        images: Volume | Tensor | NDArray[np.generic],
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Return ``pixel_values``, (B, 1, Z, Y, X) float32.

        Args:
            images: A ``Volume``, or (B, 1, Z, Y, X) HU in LPS with the axial axis first.
            return_tensors: ``pt`` or ``np``.

        Raises:
            InputError: Wrong shape or type, or values that were already normalised.
            FormatError: Integers that do not fit int16.
        """
        if isinstance(images, np.ndarray):
            if np.issubdtype(images.dtype, np.integer):
                images = to_int16(images, "images")
            images = torch.from_numpy(np.ascontiguousarray(images))
        if not isinstance(images, Volume | Tensor):
            raise InputError(f"a {type(images).__name__} is not an array, a tensor or a Volume")
        pixels_BCZYX = self.steps.apply(images)
        return BatchFeature({"pixel_values": pixels_BCZYX}, tensor_type=return_tensors)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read ``preprocessor.json`` where it is, else what transformers reads.

        Raises:
            BackboneError: ``preprocessor.json`` is damaged.
        """
        found = cached_file(
            pretrained_model_name_or_path,
            PREPROCESSOR_FILE,
            **{name: kwargs[name] for name in _CACHED_FILE_ARGUMENTS if name in kwargs},
            _raise_exceptions_for_missing_entries=False,
        )
        if found is None:
            stated: tuple[dict[str, Any], dict[str, Any]] = super().get_image_processor_dict(
                pretrained_model_name_or_path, **kwargs
            )
            return stated
        rest = {name: kwargs[name] for name in kwargs.keys() - {*_CACHED_FILE_ARGUMENTS}}
        return {"preprocess": dataclasses.asdict(read_preprocess(Path(found)))}, rest

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a processor; of ``kwargs`` only ``resize_dims`` changes it."""
        returns_rest = kwargs.pop("return_unused_kwargs", False)
        changes = {"resize_dims": kwargs.pop("resize_dims")} if "resize_dims" in kwargs else {}
        processor = cls(**{**image_processor_dict, **changes})
        return (processor, kwargs) if returns_rest else processor

    def to_dict(self) -> dict[str, Any]:
        """Return what ``from_dict`` takes."""
        return {
            "image_processor_type": type(self).__name__,
            "preprocess": dataclasses.asdict(self.steps),
        }

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> list[str]:
        """Write ``preprocessor.json``, and the file by which transformers finds this class."""
        return [str(path) for path in _write_preprocess(self.steps, Path(save_directory))]


def _node(kind: type[Node], raw: dict[str, Any], name: str) -> Node:
    try:
        return TypeAdapter(kind).validate_json(json.dumps(raw), strict=True)
    except (ValidationError, ConfigError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise BackboneError(f"{name}: {reason}") from None


def _folder(path_or_repo: str | Path, kwargs: dict[str, Any]) -> Path:
    """Return a local folder, downloading data files and never code; takes what it uses."""
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    subfolder = kwargs.pop("subfolder", None) or "."
    if Path(path_or_repo).exists():
        return Path(path_or_repo) / subfolder
    names = [WEIGHTS_FILE, CONFIG_FILE, PREPROCESSOR_FILE]
    patterns = [str(Path(subfolder) / name) for name in names]
    try:
        folder = snapshot_download(str(path_or_repo), allow_patterns=patterns, **hub)
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"no such folder, and the hub has no {path_or_repo!r}: {reason}") from None
    return Path(folder) / subfolder


def _write_preprocess(preprocess: Preprocess, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / PREPROCESSOR_FILE, folder / PROCESSOR_CLASS_FILE]
    write_atomic(files[0], preprocess_json(preprocess))
    write_atomic(files[1], processor_class_json())
    return files

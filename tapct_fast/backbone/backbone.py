"""The backbone users hold: a frozen Vit, its preprocessing, and outputs by name.

Shape suffixes: B batch, C channels (one in, D out), Z Y X voxels or tokens, L patch tokens in z, y,
x order, R registers, D width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tapct_fast import _native
from tapct_fast.backbone.preprocess import NORMALISED_LIMIT, Preprocess, pad_end
from tapct_fast.backbone.schema import config_json, preprocess_json
from tapct_fast.config import Zyx
from tapct_fast.errors import BackboneError, InputError
from tapct_fast.model.attention import Attention
from tapct_fast.model.block import Block, LayerScale, Mlp, SwiGlu
from tapct_fast.model.frozen import FrozenVit
from tapct_fast.model.patch_embed import PatchEmbed, PatchProjection
from tapct_fast.model.vit import Vit
from tapct_kernels.attention import BackendName

Precision = Literal["fp32", "bf16", "fp16"]
Compile = bool | Literal["cuda-graphs"]
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def best_precision(device: torch.device) -> Precision:
    """Return bf16 where the device has units for it (CUDA, or a CPU with AMX), else fp32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device.type == "cpu" and _native.has_amx()
    return "bf16" if has_bf16 else "fp32"


@dataclass(frozen=True, slots=True, eq=False)
class BackboneOutput:
    """Normed tokens; attribute and string-key access both work.

    Attributes:
        last_hidden_state: Patch tokens only, (B, L, D), or (B, D, Z, Y, X) on the token grid.
        pooler_output: The cls token, (B, D).
        registers: Register tokens, (B, R, D).
        grid: Tokens along z, y, x; L is their product.
        hidden_states: Patch tokens after each block, if asked for, in the form of the last.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    registers: Tensor
    grid: Zyx
    hidden_states: tuple[Tensor, ...] | None = None

    def __getitem__(self, key: str) -> Any:
        if key not in self.__slots__:
            raise KeyError(f"no output {key!r}; there are {', '.join(self.__slots__)}")
        return getattr(self, key)


class Backbone(nn.Module):
    """A Vit with the preprocessing it was trained with; ``TAPCTModel`` is its other name.

    Weights, norms, softmax and the residual stream are float32 whatever the precision, which is
    that of the matrix products. Without a gradient to compute, a copy of the weights in that
    precision runs (see ``FrozenVit``); it is made anew when a weight has changed.

    Args:
        vit: The transformer, weights loaded.
        preprocess: Must agree with the Vit's patch and HU constants.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        attention: Its backend, see ``tapct_kernels.attention``; None chooses the best that runs.
        compile: Compile inference to one graph, which serves every batch size; the first call of a
            volume size takes a minute. ``cuda-graphs`` also replays it on CUDA without launches,
            one graph for each shape: for shapes that stay.

    Raises:
        BackboneError: Preprocessing and Vit contradict each other.
        InputError: Another precision.
    """

    def __init__(
        self,
        vit: Vit,
        preprocess: Preprocess,
        *,
        precision: Precision = "fp32",
        attention: BackendName | None = None,
        compile: Compile = False,
    ) -> None:
        super().__init__()
        if precision not in DTYPES:
            raise InputError(f"precision={precision!r} is not one of {', '.join(DTYPES)}")
        multiples = (
            preprocess.depth_multiple,
            preprocess.plane_multiple,
            preprocess.plane_multiple,
        )
        patch_zyx = vit.config.patch_zyx
        if any(m % p for m, p in zip(multiples, patch_zyx, strict=True)):
            raise BackboneError(
                f"preprocessing pads to multiples of {multiples}, the patch is {patch_zyx}"
            )
        if preprocess.hu != vit.patch_embed.hu:
            raise BackboneError("the HU constants of the preprocessing are not those of the Vit")
        self.vit = vit
        self.preprocess = preprocess
        self.precision = precision
        self._attention = attention
        if compile not in (True, False, "cuda-graphs"):
            raise InputError(f"compile={compile!r} is not one of True, False, cuda-graphs")
        self._compile = compile
        # In a list: its weights are copies, no part of the state of this module.
        self._frozen: list[tuple[tuple[object, ...], FrozenVit]] = []

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, **settings: Any) -> "Backbone":
        """Load a backbone from a folder, a file or a hub id; see ``load_backbone``."""
        from tapct_fast.backbone.load import load_backbone

        return load_backbone(path_or_repo, **settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, config and preprocessing; ``from_pretrained`` gives the same outputs.

        Raises:
            InputError: The folder holds other files, or cannot be written.
        """
        from tapct_fast.backbone.export import save_backbone

        save_backbone(self, Path(folder))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copy for inference out of copies and pickles: it is made anew."""
        return {**self.__dict__, "_frozen": []}

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrix products."""
        return DTYPES[self.precision]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vit.cls_token.device

    def fingerprint(self) -> str:
        """Return a sha256 over architecture, weights, preprocessing and precision."""
        digest = hashlib.sha256(config_json(self.vit.config))
        digest.update(preprocess_json(self.preprocess) + self.precision.encode())
        for name, tensor in self.vit.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def forward(
        self,
        pixel_values: Tensor,  # the released model's argument name, so no shape suffix
        reshape: bool = False,
        output_hidden_states: bool = False,
        *,
        num_blocks: int | None = None,
    ) -> BackboneOutput:
        """Encode volumes; differentiable.

        Args:
            pixel_values: (B, 1, Z, Y, X); int16 means HU, float means already normalised by
                ``preprocess``. Sizes that are no multiple of the patch are padded with air at the
                end; a token whose patch holds at least one voxel is kept.
            reshape: Return patch tokens as (B, D, Z, Y, X) maps instead of (B, L, D).
            output_hidden_states: Also return the patch tokens after each block, each with the final
                norm.
            num_blocks: Stop after this many blocks; the rest costs nothing.

        Raises:
            InputError: Wrong shape or type, or float values that look like HU.
            BackboneError: The output is not finite; says why.
        """
        if type(pixel_values) is not Tensor and not torch.compiler.is_compiling():
            pixel_values = pixel_values.as_subclass(Tensor)  # MONAI's adds metadata, and fails here
        x_BCZYX = self._padded(pixel_values)
        vit, frozen = self._ready(x_BCZYX)
        if frozen is not None:
            out = frozen(x_BCZYX, num_blocks=num_blocks, return_hidden=output_hidden_states)
            if self._compile == "cuda-graphs":  # the next replay writes where this one did
                out = out._replace(
                    cls_BD=out.cls_BD.clone(),
                    registers_BRD=out.registers_BRD.clone(),
                    patches_BLD=out.patches_BLD.clone(),
                    hidden=tuple(tokens.clone() for tokens in out.hidden),
                )
        else:
            with self._autocast(x_BCZYX.device):
                out = vit(x_BCZYX, num_blocks=num_blocks, return_hidden=output_hidden_states)
        cls_BD, patches_BLD = out.cls_BD.float(), out.patches_BLD.float()
        if not torch.compiler.is_compiling():  # a check on values would break the graph
            self._require_finite(cls_BD, patches_BLD, pixel_values)

        def shaped(tokens_BLD: Tensor) -> Tensor:
            return _as_maps(tokens_BLD, out.grid_zyx) if reshape else tokens_BLD

        return BackboneOutput(
            last_hidden_state=shaped(patches_BLD),
            pooler_output=cls_BD,
            registers=out.registers_BRD.float(),
            grid=out.grid_zyx,
            hidden_states=(
                tuple(shaped(hidden.float()) for hidden in out.hidden)
                if output_hidden_states
                else None
            ),
        )

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Any]:
        """Encode volumes as DINOv2's method of this name does.

        Args:
            x: See ``forward``.
            masks: bool (B, L): patches that the mask token replaces.

        Returns:
            ``x_norm_clstoken`` (B, D), ``x_norm_regtokens`` (B, R, D), ``x_norm_patchtokens``
            (B, L, D), ``x_prenorm`` (B, 1 + R + L, D) and ``masks``.
        """
        (tokens_BTD,) = self._tapped(x, [self.vit.config.depth - 1], masks)
        normed_BTD = self.vit.norm(tokens_BTD)
        prefix = self.vit.num_prefix
        return {
            "x_norm_clstoken": normed_BTD[:, 0],
            "x_norm_regtokens": normed_BTD[:, 1:prefix],
            "x_norm_patchtokens": normed_BTD[:, prefix:],
            "x_prenorm": tokens_BTD,
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Return patch tokens of several blocks as DINOv2's method of this name does.

        Args:
            x: See ``forward``.
            n: That many last blocks, or the positions of blocks from 0; blocks after the last of
                them do not run.
            reshape: Return (B, D, Z, Y, X) maps instead of (B, L, D).
            return_class_token: Return pairs of patch tokens and the cls token (B, D).
            norm: Apply the final norm; on, as in DINOv2 (timm's default is off).
        """
        depth, prefix = self.vit.config.depth, self.vit.num_prefix
        blocks = list(range(depth - n, depth)) if isinstance(n, int) else list(n)
        outs = []
        for tokens in self._tapped(x, blocks):
            tokens_BTD = self.vit.norm(tokens) if norm else tokens
            patches = tokens_BTD[:, prefix:]
            if reshape:
                patches = _as_maps(patches, self._grid_zyx(x))
            outs.append((patches, tokens_BTD[:, 0]) if return_class_token else patches)
        return tuple(outs)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Width and patch of each block's output, as timm lists them."""
        config = self.vit.config
        return [
            {"module": f"vit.blocks.{i}", "num_chs": config.dim, "reduction": config.patch_zyx}
            for i in range(config.depth)
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last tokens and those of several blocks as timm's method of this name does.

        Args:
            x: See ``forward``.
            indices: Positions of blocks, negative ones from the end; an integer is that many last
                blocks, None all.
            return_prefix_tokens: Return pairs of patch tokens and the cls and register tokens.
            norm: Apply the final norm to the intermediates; off, as in timm (DINOv2's is on).
            stop_early: Run no block after the last one asked for.
            output_fmt: ``NCHW`` for maps, here (B, D, Z, Y, X); ``NLC`` for (B, L, D).
            intermediates_only: Leave out the last tokens.

        Returns:
            The normed tokens (B, 1 + R + L, D) after the last block that ran and the list of
            intermediates, or with ``intermediates_only`` the list.

        Raises:
            InputError: A position or ``output_fmt`` is unknown.
        """
        depth, prefix = self.vit.config.depth, self.vit.num_prefix
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"output_fmt={output_fmt!r} is neither NCHW nor NLC")
        if indices is None:
            indices = depth
        if isinstance(indices, int):
            indices = range(depth - indices, depth)
        blocks = [i + depth if i < 0 else i for i in indices]
        self._check_blocks(blocks)
        last = max(blocks) if stop_early else depth - 1
        tapped = dict(zip(sorted({*blocks, last}), self._tapped(x, [*blocks, last]), strict=True))
        outs = []
        for i in blocks:
            tokens_BTD = self.vit.norm(tapped[i]) if norm else tapped[i]
            patches = tokens_BTD[:, prefix:]
            if output_fmt == "NCHW":
                patches = _as_maps(patches, self._grid_zyx(x))
            outs.append((patches, tokens_BTD[:, :prefix]) if return_prefix_tokens else patches)
        return outs if intermediates_only else (self.vit.norm(tapped[last]), outs)

    def _tapped(
        self, pixel_values: Tensor, blocks: Sequence[int], mask_BL: Tensor | None = None
    ) -> list[Tensor]:
        """Return tokens_BTD after some blocks, float32, in the blocks' order."""
        self._check_blocks(blocks)
        x_BCZYX = self._padded(pixel_values)
        vit, frozen = self._ready(x_BCZYX)
        if frozen is not None:
            tapped = frozen.tapped_tokens(x_BCZYX, set(blocks), mask_BL=mask_BL)
        else:
            with self._autocast(x_BCZYX.device):
                tapped = vit.tapped_tokens(x_BCZYX, set(blocks), mask_BL=mask_BL)
        tapped = [tokens_BTD.float() for tokens_BTD in tapped]
        if not torch.compiler.is_compiling():
            self._require_finite(tapped[-1], tapped[-1], pixel_values)
        return tapped

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        last = self.vit.config.depth - 1
        if not blocks or not all(0 <= i <= last for i in blocks):
            raise InputError(f"blocks {list(blocks)} are not positions in 0..{last}")

    def _padded(self, pixel_values: Tensor) -> Tensor:
        self._check(pixel_values)
        is_hu = pixel_values.dtype == torch.int16
        air = self.preprocess.pad_hu if is_hu else self.preprocess.air
        return pad_end(pixel_values, self.vit.config.patch_zyx, air)

    def _grid_zyx(self, pixel_values: Tensor) -> Zyx:
        patch_zyx = self.vit.config.patch_zyx
        z, y, x = (-(-s // p) for s, p in zip(pixel_values.shape[2:], patch_zyx, strict=True))
        return z, y, x

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.precision != "fp32")

    def _ready(self, x_BCZYX: Tensor) -> tuple[Vit, FrozenVit | None]:
        """Return the Vit, and for inference the copy that runs in its place."""
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling():
            return self.vit, None
        weights = [*self.vit.parameters()]
        if not _is_plain(self.vit) or any(w.dtype != torch.float32 for w in weights):
            return self.vit, None
        # A version counts the writes to a tensor; inference tensors keep none, and have none.
        key = tuple(
            (w.data_ptr(), w.device, 0 if w.is_inference() else w._version) for w in weights
        )
        if not self._frozen or self._frozen[0][0] != key:
            frozen = FrozenVit(
                self.vit, self.dtype, self._attention, is_compiled=bool(self._compile)
            )
            if self._compile:
                mode = "reduce-overhead" if self._compile == "cuda-graphs" else None
                frozen.compile(fullgraph=True, mode=mode)
            self._frozen[:] = [(key, frozen)]
        if self._compile == "cuda-graphs":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        elif self._compile:
            torch._dynamo.mark_dynamic(x_BCZYX, 0)
        return self.vit, self._frozen[0][1]

    def _check(self, pixel_values: Tensor) -> None:
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 1 or 0 in pixel_values.shape:
            raise InputError(
                f"pixel_values of shape {tuple(pixel_values.shape)} are not (B, 1, Z, Y, X)"
            )
        if pixel_values.dtype == torch.int16:
            return
        if not pixel_values.is_floating_point():
            raise InputError(
                f"pixel_values of type {pixel_values.dtype}; give int16 HU or normalised float"
            )
        if torch.compiler.is_compiling():
            return
        if bool(pixel_values.detach().abs().amax() > NORMALISED_LIMIT):
            raise InputError(
                "float pixel_values look like HU; give int16 HU, "
                "or backbone.preprocess.apply(hu) first"
            )

    def _require_finite(self, cls_BD: Tensor, patches_BLD: Tensor, pixel_values: Tensor) -> None:
        if bool(cls_BD.isfinite().all()) and bool(patches_BLD.isfinite().all()):
            return
        if not pixel_values.isfinite().all():
            cause = "pixel_values hold NaN or infinite values"
        elif not all(p.isfinite().all() for p in self.vit.parameters()):
            cause = "a weight is NaN or infinite"
        else:
            cause = f"{self._first_overflow(pixel_values)} overflowed"
            if self.precision == "fp16":
                cause += " in float16; load the backbone with precision='bf16'"
            else:
                cause += "; check that the input is HU normalised by preprocess"
        raise BackboneError(f"features are not finite: {cause}")

    @torch.no_grad()
    def _first_overflow(self, pixel_values: Tensor) -> str:
        x_BCZYX = self._padded(pixel_values)
        with self._autocast(x_BCZYX.device):
            tapped = self.vit.tapped_tokens(x_BCZYX, range(self.vit.config.depth))
        for i, tokens_BTD in enumerate(tapped):
            if not tokens_BTD.isfinite().all():
                return f"block {i}"
        return "the last norm"


TAPCTModel = Backbone  # the released model's name


def _as_maps(tokens_BLD: Tensor, grid_zyx: Zyx) -> Tensor:
    """Return tokens as (B, D, Z, Y, X)."""
    batch, _, dim = tokens_BLD.shape
    return tokens_BLD.mT.reshape(batch, dim, *grid_zyx)


def _is_plain(vit: Vit) -> bool:
    """Say whether all parts are as built: no adapter in a layer's place, no hook to be called."""
    return all(
        type(module) in _PARTS and not (module._forward_hooks or module._forward_pre_hooks)
        for module in vit.modules()
    )


_PARTS = {Vit, PatchEmbed, PatchProjection, Block, Attention, LayerScale, Mlp, SwiGlu}
_PARTS |= {nn.ModuleList, nn.Linear, nn.LayerNorm}

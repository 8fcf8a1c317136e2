"""The backbone users hold: a frozen Vit, its preprocessing, and outputs by name.

Shape suffixes: B batch, C channels (one in, D out), Z Y X voxels or tokens, L patch tokens in z, y,
x order, R registers, D width.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tapct_fast.backbone.preprocess import NORMALISED_LIMIT, Preprocess, pad_end
from tapct_fast.backbone.schema import config_json, preprocess_json
from tapct_fast.config import Zyx
from tapct_fast.errors import BackboneError, InputError
from tapct_fast.model.vit import Vit

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


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
    """A Vit with the preprocessing it was trained with.

    Weights stay float32; bfloat16 and float16 are the precision of the matrix products (autocast),
    so norms, softmax and the residual stream keep float32.

    Args:
        vit: The transformer, weights loaded.
        preprocess: Must agree with the Vit's patch and HU constants.
        dtype: float32, bfloat16 or float16.

    Raises:
        BackboneError: Preprocessing and Vit contradict each other.
        InputError: Another dtype.
    """

    def __init__(
        self, vit: Vit, preprocess: Preprocess, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if dtype not in PRECISIONS:
            raise InputError(f"dtype {dtype} is not one of {', '.join(map(str, PRECISIONS))}")
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
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vit.cls_token.device

    def fingerprint(self) -> str:
        """Return a sha256 over architecture, weights, preprocessing and precision."""
        digest = hashlib.sha256(config_json(self.vit.config))
        digest.update(preprocess_json(self.preprocess) + str(self.dtype).encode())
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
        self._check(pixel_values)
        is_hu = pixel_values.dtype == torch.int16
        air = self.preprocess.pad_hu if is_hu else self.preprocess.air
        x_BCZYX = pad_end(pixel_values, self.vit.config.patch_zyx, air)
        with torch.autocast(
            x_BCZYX.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        ):
            out = self.vit(x_BCZYX, num_blocks=num_blocks, return_hidden=output_hidden_states)
        cls_BD, patches_BLD = out.cls_BD.float(), out.patches_BLD.float()
        if not torch.compiler.is_compiling():  # a check on values would break the graph
            self._require_finite(cls_BD, patches_BLD, pixel_values)

        def shaped(tokens_BLD: Tensor) -> Tensor:
            if not reshape:
                return tokens_BLD
            batch, _, dim = tokens_BLD.shape
            return tokens_BLD.mT.reshape(batch, dim, *out.grid_zyx)

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
        elif self.dtype == torch.float16:
            cause = "float16 overflowed; load the backbone with dtype=torch.bfloat16"
        else:
            cause = "activations overflowed; check that the input is HU normalised by preprocess"
        raise BackboneError(f"features are not finite: {cause}")

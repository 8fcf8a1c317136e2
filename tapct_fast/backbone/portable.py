"""Backbones as files that run without this library: an AOTInductor ``.pt2``, an ONNX graph.

Both take normalised float32 ``pixel_values`` (B, 1, Z, Y, X) and give the cls token and the patch
tokens, normed. Batch and depth are free, the plane is that of the trained positions. The graph
holds PyTorch's own ops only; what a caller must know of the input (patch, plane, HU constants) is
stored in the file as JSON under ``tapct``.

Shape suffixes: B batch, C channels (one), Z Y X voxels, L patch tokens in z, y, x order, T = prefix
+ L, D width, K voxels of a patch, H heads, W head width.
"""

import contextlib
import copy
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.config import HuConfig, Zyx
from tapct_fast.errors import BackboneError, InputError
from tapct_fast.io.atomic import fsync_path
from tapct_fast.model.vit import Vit

MIN_GRID_Z = 2  # torch.export specialises a size of one
_FACTS = "tapct"
_MAX_INLINE_BYTES = 1 << 30  # protobuf ends at 2 GiB


class PortableOutput(NamedTuple):
    """Normed tokens: ``cls_BD`` and ``patches_BLD``, patches in z, y, x order."""

    cls_BD: Tensor
    patches_BLD: Tensor


class PortableVit(nn.Module):
    """The forward pass in PyTorch's own ops, with positions for any depth.

    ``Vit`` calls ours, which a file that leaves this library cannot. ``tests/backbone`` holds the
    two together.
    """

    def __init__(self, vit: Vit) -> None:
        super().__init__()
        self.vit = copy.deepcopy(vit).eval().requires_grad_(False).float()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return cls_BD and patches_BLD of normalised (B, 1, Z, Y, X) volumes."""
        vit = self.vit
        x_BTD = self._embed(pixel_values)
        for block in cast(Any, vit.blocks):  # a ModuleList forgets its type
            heads_BT3HW = block.attn.qkv(block.norm1(x_BTD)).unflatten(
                2, (3, -1, block.attn.head_dim)
            )
            q, k, v = heads_BT3HW.permute(2, 0, 3, 1, 4).unbind(0)
            attended_BTHW = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            x_BTD = x_BTD + _scaled(block.attn.proj(attended_BTHW.flatten(2)), block.ls1.gamma)
            x_BTD = x_BTD + _scaled(block.mlp(block.norm2(x_BTD)), block.ls2.gamma)
        x_BTD = vit.norm(x_BTD)
        return x_BTD[:, 0], x_BTD[:, vit.num_prefix :]

    def _embed(self, x_BCZYX: Tensor) -> Tensor:
        vit = self.vit
        z, y, x = vit.config.patch_zyx
        grid_zyx = (x_BCZYX.shape[2] // z, x_BCZYX.shape[3] // y, x_BCZYX.shape[4] // x)
        batch, (gz, gy, gx) = x_BCZYX.shape[0], grid_zyx
        split = x_BCZYX.reshape(batch, gz, z, gy, y, gx, x)
        rows_BLK = split.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        proj = vit.patch_embed.proj
        patches_BLD = F.linear(rows_BLK, proj.weight.flatten(1), proj.bias)
        prefix_RD = vit.cls_token[0] + vit.pos_embed[0, :1]
        if vit.config.num_registers:
            prefix_RD = torch.cat([prefix_RD, vit.register_tokens[0]])
        prefix_BRD = prefix_RD.expand(batch, -1, -1)
        return torch.cat([prefix_BRD, patches_BLD + self._positions(grid_zyx)], dim=1)

    def _positions(self, grid_zyx: Zyx) -> Tensor:
        """Interpolate to every grid: a graph has no branch, and on the learned grid it is exact."""
        vit = self.vit
        volume_1DZYX = vit.pos_embed[:, 1:].mT.reshape(1, -1, *vit.config.grid_zyx)
        return F.interpolate(volume_1DZYX, size=grid_zyx, mode="trilinear").flatten(2).mT


def _scaled(branch_BTD: Tensor, gamma_D: Tensor | None) -> Tensor:
    return branch_BTD if gamma_D is None else branch_BTD * gamma_D


def exported_program(
    backbone: Backbone,
    *,
    example_slices: int | None = None,
    device: torch.device | str | None = None,
) -> torch.export.ExportedProgram:
    """Return the graph of a backbone in float32, whatever the backbone's own precision.

    Args:
        backbone: What to export.
        example_slices: Depth to trace with; sizes near it are what a compiler tunes for. None takes
            the trained depth.
        device: Where the graph runs; None takes the backbone's.

    Raises:
        InputError: The depth is not a multiple of the patch, or holds too few patches.
    """
    patch_z, image_zyx = backbone.vit.config.patch_zyx[0], backbone.vit.config.image_zyx
    if example_slices is None:
        example_slices = max(image_zyx[0], MIN_GRID_Z * patch_z)
    if example_slices % patch_z or example_slices < MIN_GRID_Z * patch_z:
        raise InputError(
            f"example_slices={example_slices} is not a multiple of the patch's {patch_z} slices, "
            f"{MIN_GRID_Z} at least"
        )
    model = PortableVit(backbone.vit).to(device or backbone.device)
    pixels = torch.zeros(2, 1, example_slices, *image_zyx[1:], device=model.vit.cls_token.device)
    grid_z = torch.export.Dim("grid_z", min=MIN_GRID_Z)
    depth = patch_z * grid_z if patch_z > 1 else grid_z
    free = {0: torch.export.Dim("batch", min=1), 2: depth}
    return torch.export.export(model, (pixels,), dynamic_shapes={"pixel_values": free})


def export_pt2(backbone: Backbone, path: Path, *, example_slices: int | None = None) -> Path:
    """Compile a backbone with AOTInductor; ``load_pt2`` or plain PyTorch runs the file.

    The file holds machine code for the device of the backbone and, on a CPU, for the instruction
    set of this machine.

    Args:
        backbone: What to export; the file computes in float32.
        path: File to write, ``.pt2``; an existing one is replaced in one step.
        example_slices: Depth that the compiler sizes its loops for; any other depth runs too.

    Raises:
        InputError: ``path`` or ``example_slices`` is wrong, or there is no C++ compiler.
    """
    require_suffix(path, ".pt2")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError("a .pt2 needs a C++ compiler; install g++, or set CXX") from None
    program = exported_program(backbone, example_slices=example_slices)
    with staged(path) as file:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(file),
            inductor_configs={"aot_inductor.metadata": {_FACTS: json.dumps(_facts(backbone))}},
        )
    return path


class Pt2Backbone:
    """A loaded ``.pt2``; call it with pixel values.

    Attributes:
        patch_zyx: Voxels of a patch.
        plane_yx: The one size of the plane.
        hu: Clip range, mean and standard deviation that normalise HU.
        pad_hu: Value of padding, in HU.
    """

    def __init__(self, model: Any, facts: dict[str, Any]) -> None:
        self._model = model
        self.patch_zyx: Zyx = tuple(facts["patch_zyx"])
        self.plane_yx: tuple[int, int] = tuple(facts["plane_yx"])
        self.hu = HuConfig(**{**facts["hu"], "clip": tuple(facts["hu"]["clip"])})
        self.pad_hu: float = facts["pad_hu"]

    def __call__(self, pixel_values: Tensor) -> PortableOutput:
        """Encode normalised float32 volumes (B, 1, Z, Y, X).

        Raises:
            InputError: Another shape or type: the machine code itself does not look.
        """
        patch_z, shape = self.patch_zyx[0], tuple(pixel_values.shape)
        fits = len(shape) == 5 and shape[0] > 0 and shape[1] == 1 and shape[3:] == self.plane_yx
        if not fits or shape[2] % patch_z or shape[2] < MIN_GRID_Z * patch_z:
            y, x = self.plane_yx
            raise InputError(
                f"pixel_values of shape {shape} are not (B, 1, Z, {y}, {x}) with Z a multiple of "
                f"{patch_z}, {MIN_GRID_Z * patch_z} at least"
            )
        if pixel_values.dtype != torch.float32:
            raise InputError(f"pixel_values of type {pixel_values.dtype}; give normalised float32")
        return PortableOutput(*self._model(pixel_values.contiguous()))


def load_pt2(path: Path) -> Pt2Backbone:
    """Load what ``export_pt2`` wrote. It is machine code: load only files that you trust.

    Raises:
        InputError: There is no such file.
        BackboneError: It is not from ``export_pt2``, or not for this machine.
    """
    if not path.is_file():
        raise InputError("there is no such .pt2 file; check the path")
    try:
        model = torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BackboneError(f"the .pt2 does not load here; export it again: {reason}") from None
    metadata = model.get_metadata()
    if _FACTS not in metadata:
        raise BackboneError("the .pt2 is not a backbone; write one with export_pt2")
    return Pt2Backbone(model, json.loads(metadata[_FACTS]))


def export_onnx(backbone: Backbone, path: Path) -> Path:
    """Write a backbone as ONNX: ``pixel_values`` to ``cls`` and ``patches``.

    Above 1 GiB the weights go to a second file, ``path`` with ``.data`` added.

    Args:
        backbone: What to export; the graph computes in float32.
        path: File to write, ``.onnx``; an existing one is replaced in one step.

    Raises:
        InputError: ``path`` is wrong, or the ``onnx`` extra is not installed.
    """
    require_suffix(path, ".onnx")
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it and says so less clearly
    except ImportError:
        raise InputError("ONNX needs an extra; run pip install 'tapct-fast[onnx]'") from None
    written = torch.onnx.export(
        exported_program(backbone, device="cpu"),
        dynamo=True,
        verbose=False,
        input_names=["pixel_values"],
        output_names=["cls", "patches"],
    )
    assert written is not None  # None is the answer of the old exporter
    _drop_provenance(written.model)
    written.model.metadata_props[_FACTS] = json.dumps(_facts(backbone))
    num_bytes = sum(p.numel() * 4 for p in backbone.vit.parameters())
    with staged(path) as file:
        written.save(file, external_data=num_bytes > _MAX_INLINE_BYTES)
    return path


def _drop_provenance(model: Any) -> None:  # Any: onnx_ir.Model
    """Remove where each node came from: stack traces name the folders of this machine."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _facts(backbone: Backbone) -> dict[str, Any]:
    """Return what the caller of a portable file must know of its input."""
    config, preprocess = backbone.vit.config, backbone.preprocess
    return {
        "patch_zyx": config.patch_zyx,
        "plane_yx": config.image_zyx[1:],
        "hu": dataclasses.asdict(preprocess.hu),
        "pad_hu": preprocess.pad_hu,
    }


def require_suffix(path: Path, suffix: str) -> None:
    """Refuse a name that no reader of the format would take.

    Raises:
        InputError: Another suffix, or a folder.
    """
    if path.suffix != suffix or path.is_dir():
        raise InputError(f"OUT is not the name of a {suffix} file; name one that ends in {suffix}")


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield the same name in a new folder beside ``path``; what is written there moves out."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            yield Path(folder, path.name)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # .onnx.data before .onnx
                fsync_path(file)
                file.replace(path.parent / file.name)
            fsync_path(path.parent)
    except OSError as error:
        raise InputError(f"OUT cannot be written: {error.strerror}") from None

"""Make a model that is already loaded run its blocks by our ops; its weights stay where they are.

For a reference-like model: an ``nn.Module`` whose ViT, under ``model`` or itself, has DINOv2's
``blocks`` (in chunks or not) with explicit softmax attention. Each block then computes

    x = x + gamma1 * proj(attention(qkv(norm1(x))));   x = x + gamma2 * mlp(norm2(x))

by ``tapct_kernels.attention``, whose memory is linear in the tokens, and ``residual_norm``. The
linear layers are still called as the modules they are, so hooks and adapters on them keep working.

Shape suffixes: B batch, T tokens, D width.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tapct_fast.errors import InputError
from tapct_fast.model.block import Block, add_branch, start_stream
from tapct_kernels import attention

Model = TypeVar("Model", bound=nn.Module)

_NUM_PROBE_TOKENS = 5
# Largest difference over largest value. float32 sums in another order give 1e-6; half types round
# each product of a block to 8 or 11 bits. What is laid out otherwise differs by 1e-1 and more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.03


class _Scale(NamedTuple):
    gamma: Tensor | None


def accelerate(model: Model) -> Model:
    """Replace how a loaded model's blocks run, in place.

    Parameters stay the same tensors, ``state_dict()`` keeps its keys and values. Works with
    autocast, with gradients and without. Each block is compared once with what it computed before,
    on a few random tokens. A second call changes nothing.

    Args:
        model: A reference-like model, its weights on their device.

    Returns:
        ``model`` itself.

    Raises:
        InputError: The model has no such blocks, or one computes something else; it is then as it
            was. Also later, by a block in training mode with drop path or attention dropout.

    Source: DINOv2, ``dinov2/layers/block.py`` and ``attention.py``.
    """
    blocks = dict(_blocks_of(model))
    for name, block in blocks.items():
        if not _is_accelerated(block):
            _check_parts(block, name)
            _compare(block, name)
    for block in blocks.values():
        if not _is_accelerated(block):
            # A partial and not a method: copies and pickles of the model bind to their own block.
            block.forward = functools.partial(_forward, block)
    return model


def _blocks_of(model: nn.Module) -> Iterator[tuple[str, Any]]:  # Any: attributes of foreign blocks
    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate: a {type(model).__name__} is not a torch module")
    vit, prefix = model, ""
    inner = getattr(model, "model", None)
    if not hasattr(vit, "blocks") and isinstance(inner, nn.Module):
        vit, prefix = inner, "model."
    blocks = getattr(vit, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise InputError(
            f"accelerate: {type(model).__name__} has no ModuleList blocks, itself or in .model; "
            "give the loaded model, before torch.compile"
        )
    for i, block in enumerate(blocks):
        if isinstance(block, Block):
            raise InputError("accelerate: this model already runs our blocks")
        if isinstance(block, nn.ModuleList | nn.Sequential):  # a chunk, padded in front
            for j, member in enumerate(block):
                if not isinstance(member, nn.Identity):
                    yield f"{prefix}blocks.{i}.{j}", member
        else:
            yield f"{prefix}blocks.{i}", block


def _is_accelerated(block: Any) -> bool:
    forward = vars(block).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _forward


def _check_parts(block: Any, name: str) -> None:
    def refuse(reason: str) -> InputError:
        return InputError(f"accelerate: {name} is not a DINOv2 block: {reason}")

    if "forward" in vars(block):
        raise refuse("its forward was already replaced by something else")
    for part in ("norm1", "attn", "norm2", "mlp", "attn.qkv", "attn.proj"):
        owner, _, leaf = part.rpartition(".")
        if not isinstance(
            getattr(getattr(block, owner) if owner else block, leaf, None), nn.Module
        ):
            raise refuse(f"it has no module {part}")
    for part in ("norm1", "norm2"):
        norm = getattr(block, part)
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            raise refuse(f"{part} is not a LayerNorm with weight and bias")
    dim, num_heads = block.norm1.weight.shape[0], getattr(block.attn, "num_heads", None)
    if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
        raise refuse(f"attn.num_heads is {num_heads}, which does not divide the width {dim}")
    if block.norm1.weight.device.type == "meta":
        raise refuse("its weights are on the meta device; load them first")


def _forward(block: Any, x_BTD: Tensor) -> Tensor:
    """Run a foreign block by our ops."""
    if not isinstance(x_BTD, Tensor):
        raise InputError("accelerate: a list of crops of several sizes is not computed; give one")
    if block.training and (why := _randomness(block)):
        raise InputError(
            f"accelerate: {why} is not computed in training; set it to 0, or call eval()"
        )
    attn = block.attn
    x_BTD, normed_BTD = start_stream(x_BTD, block.norm1, None)
    qkv_BT3HK = attn.qkv(normed_BTD).unflatten(2, (3, attn.num_heads, -1))
    branch_BTD = attn.proj(attention(qkv_BT3HK).flatten(2))
    if (dropout := getattr(attn, "proj_drop", None)) is not None:
        branch_BTD = dropout(branch_BTD)
    # Any: add_branch asks a LayerScale of ours for its gamma and nothing else.
    scale1: Any = _Scale(getattr(getattr(block, "ls1", None), "gamma", None))
    scale2: Any = _Scale(getattr(getattr(block, "ls2", None), "gamma", None))
    x_BTD, normed_BTD = add_branch(x_BTD, branch_BTD, scale1, block.norm2)
    return add_branch(x_BTD, block.mlp(normed_BTD), scale2, None).x_BTD


def _randomness(block: Any) -> str:
    """Name what a block draws in training and ours does not, or nothing."""
    if getattr(block, "sample_drop_ratio", 0.0):
        return "sample_drop_ratio"
    for name in ("drop_path", "drop_path1", "drop_path2"):
        if getattr(getattr(block, name, None), "drop_prob", 0.0):
            return name
    dropout = getattr(block.attn, "attn_drop", 0.0)
    return "attn.attn_drop" if getattr(dropout, "p", dropout) else ""


@torch.no_grad()
def _compare(block: Any, name: str) -> None:
    """Refuse a block that computes something else than ours."""
    weight_D = block.norm1.weight
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(2, _NUM_PROBE_TOKENS, weight_D.shape[0], generator=generator)
    x_BTD = x_BTD.to(weight_D.device, weight_D.dtype)
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        with torch.autocast(x_BTD.device.type, enabled=False):
            expected_BTD = block.forward(x_BTD.clone())
            out_BTD = _forward(block, x_BTD)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"accelerate: {name} does not run as a DINOv2 block: {reason}") from None
    finally:
        for module, is_training in modes.items():
            module.training = is_training
    if not isinstance(expected_BTD, Tensor) or expected_BTD.shape != out_BTD.shape:
        raise InputError(f"accelerate: {name} does not return tokens of the shape it takes")
    branches_BTD = (expected_BTD - x_BTD).double()  # the tokens themselves would hide them
    apart = (out_BTD - expected_BTD).double().abs().amax()
    largest = branches_BTD.abs().amax()
    limit = _TOLERANCE.get(weight_D.dtype, _HALF_TOLERANCE)
    rounding = torch.finfo(weight_D.dtype).eps * x_BTD.double().abs().amax()
    if not bool(apart <= limit * largest + 2 * rounding):
        raise InputError(
            f"accelerate: {name} computes something else than a DINOv2 block: its branches differ "
            f"by {float(apart / largest):.2g} of their size"
        )

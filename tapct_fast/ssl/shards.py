"""Tensors that are spread over processes (FSDP2's DTensor), seen as what is here and as a whole."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds, in the same memory; all of a tensor without shards.

    What is done element by element is done on it: faster than through DTensor, and in place.
    """
    if isinstance(tensor, DTensor):
        with torch.no_grad():  # else the part would be a node of the graph
            return tensor.to_local()
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor without its shards; all processes call this together, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return a whole tensor that all processes hold, spread as ``model`` is and on its device.

    Each keeps its own part; nothing is sent.
    """
    tensor = tensor.to(model.device)
    if isinstance(model, DTensor):
        return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
    return tensor


@torch.no_grad()
def fill(tensor: Tensor, source: Tensor) -> None:
    """Copy a whole tensor that all processes hold into one that may be spread, in place."""
    local(tensor).copy_(local(like(source, tensor)) if isinstance(tensor, DTensor) else source)

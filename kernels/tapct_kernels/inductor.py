"""What the compiler of torch before 2.13 must be told of our operators before it meets them."""

import functools
import sys

import torch

_IS_OLD = torch.__version__ < "2.13"


@functools.cache
def _register() -> None:
    from torch._inductor.lowering import make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("tapct::"):
            op = getattr(torch.ops.tapct, name.removeprefix("tapct::")).default
            tag = get_layout_constraint_tag(op, with_default=True)
            make_fallback(op, layout_constraint=tag_to_layout_constraint(tag))


def register_fallbacks() -> None:
    """Register our operators with Inductor as it would by itself, where it would take too long.

    At the first call of an operator that it does not know, torch 2.11 spells the arguments with all
    that they were computed from, to log them: six times as long for each block in front of it, and
    behind twelve without end. Nothing is imported where nothing is compiled.
    """
    if _IS_OLD and "torch._inductor" in sys.modules:
        _register()

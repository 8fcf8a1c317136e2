"""Operators that a plain call on a CPU reaches without PyTorch's dispatcher.

Compilers, exports, modes, transforms and other devices see an operator of ``torch.library``. Where
none of them watches, its function and gradient are enough: on the way through the dispatcher are
some 60 us of Python, which of a training step of the recipe ``debug`` on two CPU cores, 240 calls,
were 14 ms of 253.
"""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn


class Operator:
    """A ``torch.library.custom_op`` that changes none of its arguments."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake, self.register_kernel = self.op.register_fake, self.op.register_kernel
        self._function = function
        self._with_gradient: type[torch.autograd.Function] | None = None
        update_wrapper(self, function)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """Add the gradient, as in ``torch.library.register_autograd``."""
        self.op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = self._function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._with_gradient = type(self.op._qualname, (torch.autograd.Function,), methods)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Return what the function does, with its gradient where an argument wants one."""
        if torch.compiler.is_compiling() or named or not _is_plain(arguments):
            return self.op(*arguments, **named)
        if not (torch.is_grad_enabled() and any(map(_wants_gradient, arguments))):
            return self._function(*arguments)
        if self._with_gradient is None:
            return self.op(*arguments)  # whose result says so when it is asked for a gradient
        return self._with_gradient.apply(*arguments)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function an operator; its annotations are the operator's schema."""
    return partial(Operator, name)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Say whether no mode, transform or trace watches, and all tensors are ordinary, on the CPU."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    ):
        return False
    for a in arguments:
        if isinstance(a, Tensor) and not (type(a) in (Tensor, nn.Parameter) and a.is_cpu):
            return False
    return True


def _wants_gradient(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad

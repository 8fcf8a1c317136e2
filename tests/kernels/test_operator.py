"""What a plain call on a CPU leaves out, and that whatever watches still sees the operator."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tapct_kernels.operator import operator


@operator("tapct_test::scaled_square")
def scaled_square(x_N: Tensor, scale: float) -> Tensor:
    """Return scale * x**2."""
    return scale * x_N.detach() ** 2  # no gradient but the registered one


@scaled_square.register_fake
def _(x_N: Tensor, _scale: float) -> Tensor:
    return torch.empty_like(x_N)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x_N, ctx.scale = inputs
    ctx.save_for_backward(x_N, output)


def _backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
    x_N, out_N = ctx.saved_tensors
    assert torch.equal(out_N, ctx.scale * x_N**2)
    return 2 * ctx.scale * x_N * grad_N, None


scaled_square.register_autograd(_backward, setup_context=_save_for_backward)


@operator("tapct_test::doubled")
def doubled(x_N: Tensor) -> Tensor:
    """Return 2 x, without a gradient."""
    return 2 * x_N


def sample(**options: Any) -> Tensor:
    return torch.linspace(-2, 2, 9, **options)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of operators that are called by way of the dispatcher."""
    names: list[str] = []

    def watched(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            names.append(name)
            return op(*arguments, **named)

        return call

    monkeypatch.setattr(scaled_square, "op", watched("scaled_square", scaled_square.op))
    monkeypatch.setattr(doubled, "op", watched("doubled", doubled.op))
    return names


def with_gradients(call: Callable[..., Tensor]) -> list[Tensor]:
    x_N = sample(requires_grad=True)
    out_N = call(x_N, 3.0)
    (grad_N,) = torch.autograd.grad(out_N.sum(), [x_N], create_graph=True)
    (curvature_N,) = torch.autograd.grad(grad_N.sum(), [x_N])
    return [out_N, grad_N, curvature_N]


def test_a_plain_call_gives_what_the_operator_gives_and_meets_no_dispatcher(
    dispatched: list[str],
) -> None:
    found = with_gradients(scaled_square)
    assert torch.equal(scaled_square(nn.Parameter(sample()), 3.0), found[0])
    with torch.no_grad():
        assert not scaled_square(sample(requires_grad=True), 3.0).requires_grad
    assert not scaled_square(sample(), 3.0).requires_grad
    assert not doubled(sample()).requires_grad
    assert dispatched == []
    for one, other in zip(found, with_gradients(scaled_square.op), strict=True):
        assert torch.equal(one, other)
    assert dispatched == ["scaled_square"]
    assert scaled_square.__doc__ == "Return scale * x**2."


def test_names_of_arguments_and_missing_gradients_are_the_operators_business(
    dispatched: list[str],
) -> None:
    assert torch.equal(scaled_square(sample(), scale=3.0), scaled_square(sample(), 3.0))
    assert dispatched == ["scaled_square"]
    out_N = doubled(sample(requires_grad=True))
    assert dispatched == ["scaled_square", "doubled"]
    with pytest.raises(RuntimeError, match=r"tapct_test.*autograd"):
        out_N.sum().backward()


def test_modes_other_devices_and_subclasses_see_the_operator(dispatched: list[str]) -> None:
    met = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            met.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        scaled_square(sample(), 3.0)
    assert "tapct_test.scaled_square.default" in met
    with FakeTensorMode() as mode:
        fake_N = scaled_square(torch.empty(9), 3.0)
    assert isinstance(fake_N, FakeTensor)
    assert isinstance(scaled_square(mode.from_tensor(sample()), 3.0), FakeTensor)
    assert scaled_square(sample(device="meta"), 3.0).is_meta
    assert dispatched == ["scaled_square"] * 4


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_transforms_and_traces_see_the_operator(dispatched: list[str]) -> None:
    many_N = torch.func.vmap(lambda x: scaled_square(x, 3.0))(sample().reshape(3, 3))
    assert torch.equal(many_N.flatten(), scaled_square(sample(), 3.0))
    assert dispatched == ["scaled_square"]
    with pytest.raises(RuntimeError, match="with functorch transforms"):  # PyTorch's own limit
        torch.func.grad(lambda x: scaled_square(x, 3.0).sum())(sample())
    assert dispatched == ["scaled_square"] * 2
    traced = torch.jit.trace(lambda x: scaled_square(x, 3.0), sample())
    assert "tapct_test::scaled_square" in str(traced.graph)


def test_compilers_and_exports_see_the_operator() -> None:
    class Layer(nn.Module):
        def forward(self, x_N: Tensor) -> Tensor:
            out_N: Tensor = scaled_square(x_N, 3.0)
            return out_N

    graphs: list[str] = []

    def keep_graph(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(Layer(), fullgraph=True, backend=keep_graph)
    assert torch.equal(compiled(sample()), scaled_square(sample(), 3.0))
    for code in (*graphs, torch.export.export(Layer(), (sample(),)).graph_module.code):
        assert "tapct_test.scaled_square" in code
    assert len(graphs) == 1


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_checkpoint_computes_it_again(early_stop: bool) -> None:
    x_N = sample(requires_grad=True)
    expected = torch.autograd.grad(scaled_square(x_N, 3.0).sum(), [x_N])
    out_N = checkpoint(scaled_square, x_N, 3.0, use_reentrant=False, early_stop=early_stop)
    assert torch.equal(torch.autograd.grad(out_N.sum(), [x_N])[0], expected[0])

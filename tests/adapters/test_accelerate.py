import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_model
import torch
from reference_model import TAPCTModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tapct_fast.adapters.accelerate import accelerate
from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.load import load_backbone
from tapct_fast.errors import InputError

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swiglu": {"swiglu": True, "dim": 96, "num_heads": 3},
    "no LayerScale": {"layer_scale": False},
    "chunks": {"depth": 4, "num_chunks": 2},
}
# The same float32 sums in another order; both branches of a block are of the size of the tokens.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def x_BCZYX() -> Tensor:
    return torch.randn(2, 1, 12, 32, 40, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_stay_and_so_does_every_tensor(kind: str, x_BCZYX: Tensor) -> None:
    model = TAPCTModel(**KINDS[kind]).eval()
    weights = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    expected = model(x_BCZYX, reshape=True)
    loss = expected["last_hidden_state"].square().mean() + expected["pooler_output"].mean()
    wanted = torch.autograd.grad(loss, model.parameters(), allow_unused=True)

    assert accelerate(model) is model
    assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        same, pointer, value = weights[name]
        assert parameter is same
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)
    out = model(x_BCZYX, reshape=True)
    with torch.no_grad():
        quiet = model(x_BCZYX, reshape=True)
    for name, tensor in expected.items():
        torch.testing.assert_close(out[name], tensor, **TOLERANCE)
        torch.testing.assert_close(quiet[name], tensor, **TOLERANCE)
    loss = out["last_hidden_state"].square().mean() + out["pooler_output"].mean()
    gradients = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (want is None)
        if want is not None:
            apart = (gradient - want).abs().max() / want.abs().max().clamp(min=1e-3)
            assert apart < 1e-5  # float32 in another order; measured 8e-7


class _Seen(TorchDispatchMode):
    """Records what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@torch.no_grad()
def test_no_weight_matrix_over_pairs_of_tokens_is_made() -> None:
    model = TAPCTModel().eval()
    x_BCZYX = torch.randn(1, 1, 16, 128, 128)  # 1029 tokens: more pairs than any other tensor has
    with _Seen() as eager:
        model(x_BCZYX)
    accelerate(model)
    with _Seen() as ours:
        model(x_BCZYX)
    assert "_softmax" in eager.names
    assert eager.largest >= 1029**2
    assert "_softmax" not in ours.names
    assert ours.largest == 1029 * 4 * 64  # the hidden layer


@torch.no_grad()
def test_autocast_stays_as_close_to_float32_as_the_eager_model(x_BCZYX: Tensor) -> None:
    model = TAPCTModel().eval()
    exact = model(x_BCZYX)["last_hidden_state"]

    def similarity() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens_BLD = model(x_BCZYX)["last_hidden_state"]
        return torch.cosine_similarity(tokens_BLD.float(), exact, dim=-1).min().item()

    eager = similarity()
    accelerate(model)
    assert similarity() > eager - 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_weights_of_another_type_are_accelerated_too(dtype: torch.dtype, x_BCZYX: Tensor) -> None:
    model = TAPCTModel().eval().to(dtype)
    expected = model(x_BCZYX.to(dtype))["last_hidden_state"]
    out = accelerate(model)(x_BCZYX.to(dtype))["last_hidden_state"]
    assert out.dtype == dtype
    assert torch.cosine_similarity(out.float(), expected.float(), dim=-1).min() > 0.995


def test_it_holds_what_load_backbone_computes_from_the_same_file(
    tmp_path: Path, x_BCZYX: Tensor
) -> None:
    model = TAPCTModel(dim=128, num_heads=2).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "tapct", "img_size": [8, 32, 32]}')
    backbone = load_backbone(tmp_path, precision="fp32")
    with torch.no_grad():
        expected, out = model(x_BCZYX), backbone(x_BCZYX)
        fast = accelerate(model)(x_BCZYX)
    for name in expected:
        torch.testing.assert_close(out[name], expected[name], **TOLERANCE)
        torch.testing.assert_close(fast[name], expected[name], **TOLERANCE)


def test_a_second_call_changes_nothing_and_copies_have_their_own_weights(x_BCZYX: Tensor) -> None:
    model = accelerate(TAPCTModel().eval())
    forwards = [block.forward for block in model.model.blocks]
    accelerate(model)
    assert all(b.forward is f for b, f in zip(model.model.blocks, forwards, strict=True))
    expected = model(x_BCZYX)["pooler_output"]
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for parameter in model.parameters():
        parameter.data.zero_()
    for twin in copies:
        assert torch.equal(twin(x_BCZYX)["pooler_output"], expected)


@torch.no_grad()
def test_compiles_to_one_graph(x_BCZYX: Tensor) -> None:
    model = accelerate(TAPCTModel().eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x_BCZYX)["pooler_output"], model(x_BCZYX)["pooler_output"])


@torch.no_grad()
def test_hooks_on_the_linear_layers_are_called(x_BCZYX: Tensor) -> None:
    model = accelerate(TAPCTModel().eval())
    called: list[str] = []
    for name, module in model.model.blocks[0].named_modules():
        if name in ("", "attn.qkv", "attn.proj", "mlp", "mlp.fc1"):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(x_BCZYX)
    assert called == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp", ""]


@pytest.mark.parametrize("which", ["drop path", "attention dropout"])
def test_training_with_what_is_not_computed_is_refused(which: str, x_BCZYX: Tensor) -> None:
    model = TAPCTModel(attn_drop=0.1 if which == "attention dropout" else 0.0)
    if which == "drop path":
        model.model.blocks[1].sample_drop_ratio = 0.3
    assert all(module.training for module in accelerate(model).modules())
    with pytest.raises(InputError, match="is not computed in training"):
        model(x_BCZYX)
    model.eval()(x_BCZYX)


class _Flipped(reference_model.Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


def _with(change: Callable[[Any], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = TAPCTModel()
        change(model.model.blocks[1])
        return model

    return build


def _flip(block: Any) -> None:
    block.attn.__class__ = _Flipped


STRANGERS: dict[str, tuple[Callable[[], Any], str]] = {
    "a string": (lambda: "model", "a str is not a torch module"),
    "no blocks": (lambda: nn.Linear(2, 2), "Linear has no ModuleList blocks"),
    "ours": (lambda: None, "already runs our blocks"),
    "no qkv": (_with(lambda b: delattr(b.attn, "qkv")), r"model.blocks.1 .*no module attn.qkv"),
    "no heads": (_with(lambda b: setattr(b.attn, "num_heads", 5)), "num_heads is 5"),
    "another norm": (_with(lambda b: setattr(b, "norm2", nn.RMSNorm(64))), "norm2 is not"),
    "another scale": (_with(lambda b: setattr(b.attn, "scale", 0.5)), "computes something else"),
    "another order of tokens": (_with(_flip), "computes something else"),
    "patched": (_with(lambda b: setattr(b, "forward", lambda x: x)), "already replaced"),
    "meta": (lambda: TAPCTModel().to("meta"), "meta device"),
    "broken": (_with(lambda b: setattr(b, "mlp", nn.Linear(7, 7))), "does not run as"),
    "NaN": (_with(lambda b: b.mlp.fc1.bias.data.fill_(float("nan"))), "something else"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_is_no_such_model_is_refused_and_left_as_it_was(
    stranger: str, backbone: Backbone
) -> None:
    build, message = STRANGERS[stranger]
    model = backbone.vit if stranger == "ours" else build()
    with pytest.raises(InputError, match=message):
        accelerate(model)
    if isinstance(model, TAPCTModel):
        assert "forward" not in vars(model.model.blocks[0])

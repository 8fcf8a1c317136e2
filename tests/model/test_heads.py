"""The prototype head against its formula in float64."""

import pytest
import torch

from tapct_fast.config import HeadConfig
from tapct_fast.model.heads import PrototypeHead

CONFIG = HeadConfig(num_prototypes=7, bottleneck_dim=4, hidden_dim=6)


def tiny_head(config: HeadConfig = CONFIG) -> PrototypeHead:
    head = PrototypeHead(5, config).double()
    head.init_weights(0)
    return head


def test_parameters_have_dinov2_names_and_shapes() -> None:
    assert {name: tuple(t.shape) for name, t in tiny_head().state_dict().items()} == {
        "mlp.0.weight": (6, 5),
        "mlp.0.bias": (6,),
        "mlp.2.weight": (6, 6),
        "mlp.2.bias": (6,),
        "mlp.4.weight": (4, 6),
        "mlp.4.bias": (4,),
        "last_layer.weight_g": (7, 1),
        "last_layer.weight_v": (7, 4),
    }


def test_logits_follow_the_formula() -> None:
    head = tiny_head()
    weights = dict(head.named_parameters())
    weights["last_layer.weight_g"].data.uniform_(0.5, 2)
    x_ND = 100 * torch.randn(3, 5, dtype=torch.float64)
    h = x_ND
    for layer in (0, 2, 4):
        h = h @ weights[f"mlp.{layer}.weight"].T + weights[f"mlp.{layer}.bias"]
        if layer < 4:
            h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    h = h / h.square().sum(1, keepdim=True).sqrt()
    v = weights["last_layer.weight_v"]
    prototypes = weights["last_layer.weight_g"] * v / v.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(head.bottleneck(x_ND), h)
    torch.testing.assert_close(head(x_ND).prototypes_PK, prototypes)
    torch.testing.assert_close(head(x_ND).logits(), h @ prototypes.T)


def test_gradient_of_the_weight_norm_matches_finite_differences() -> None:
    head = tiny_head()
    layer = head.last_layer

    def prototypes_of(weight_g: torch.Tensor, weight_v: torch.Tensor) -> torch.Tensor:
        weights = {"weight_g": weight_g, "weight_v": weight_v}
        return torch.func.functional_call(layer, weights, ())

    assert torch.autograd.gradcheck(prototypes_of, (layer.weight_g, layer.weight_v))


def test_logits_under_autocast_keep_the_precision_of_float16() -> None:
    head = tiny_head().float()
    x_ND = torch.randn(50, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projection = head(x_ND)
        logits_NP = projection.logits()
    assert logits_NP.dtype == torch.float16
    features_NK, prototypes_PK = projection
    error_NP = logits_NP.double() - features_NK.double() @ prototypes_PK.double().T
    # 2**-11 for the result below 1, as much for each operand; bfloat16 would be off by 2**-9
    assert error_NP.abs().max() < 1.5 * 2**-11


@pytest.mark.parametrize("num_layers", [1, 2])
def test_shallow_heads_have_as_many_linear_layers(num_layers: int) -> None:
    config = HeadConfig(num_prototypes=7, bottleneck_dim=4, hidden_dim=6, num_layers=num_layers)
    head = tiny_head(config)
    assert sum(isinstance(m, torch.nn.Linear) for m in head.mlp) == num_layers
    assert isinstance(head.mlp[-1], torch.nn.Linear)
    norms = head.bottleneck(torch.randn(3, 5, dtype=torch.float64)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(3, dtype=torch.float64))


def test_weights_depend_on_the_seed_alone() -> None:
    first, second, third = (PrototypeHead(5, CONFIG) for _ in range(3))
    for head, seed in ((first, 1), (second, 1), (third, 2)):
        head.init_weights(seed)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not torch.equal(first.last_layer.weight_v, third.last_layer.weight_v)
    assert (first.last_layer.weight_g == 1).all()
    assert first.last_layer.weight_v.abs().max() <= 0.5  # 1 / sqrt(bottleneck)

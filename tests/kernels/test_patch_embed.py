"""Token assembly, its kernels and its gradients against convolutions and formulas in float64."""

import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct_kernels import patch_embed, patch_embed_ref, tuning
from tapct_kernels.patch_embed import _backward_ref, _backward_triton, _forward_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes CPU tensors
HU = (-1008.0, 822.0, -86.8086, 322.6347)


class Case(NamedTuple):
    batch: int
    size_zyx: tuple[int, int, int]
    patch_zyx: tuple[int, int, int]
    width: int
    num_prefix: int


# At, below and off every block edge; one row; a patch that is no power of two; no prefix.
CASES = [
    Case(2, (8, 16, 24), (4, 8, 8), 48, 5),
    Case(2, (4, 96, 96), (4, 8, 8), 16, 2),
    Case(3, (4, 9, 10), (2, 3, 5), 130, 1),
    Case(1, (4, 8, 8), (4, 8, 8), 8, 5),
    Case(1, (6, 16, 8), (6, 8, 8), 24, 0),
]


def sample(
    case: Case,
    *,
    is_hu: bool = True,
    mask: str = "some",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    batch, size_zyx, patch_zyx, width, num_prefix = case
    num_voxels = math.prod(patch_zyx)
    num_patches = math.prod(size_zyx) // num_voxels
    hu_BZYX = torch.randint(-2000, 2000, (batch, *size_zyx), generator=generator)
    draws_BL = torch.rand(batch, num_patches, generator=generator)
    masks = {"none": None, "some": draws_BL < 0.4, "all": draws_BL < 2}
    return [
        hu_BZYX.to(torch.int16) if is_hu else normal(batch, *size_zyx),
        normal(width, num_voxels) / math.sqrt(num_voxels),
        normal(width),
        normal(num_patches, width),
        normal(width),
        masks[mask],
        normal(num_prefix, width),
        patch_zyx,
        HU,
    ]


def on_device(inputs: list[Any]) -> list[Any]:
    return [i.to(DEVICE) if isinstance(i, Tensor) else i for i in inputs]


def by_convolution(inputs: list[Any]) -> Tensor:
    """The definition in float64: a strided convolution, then mask, position and prefix."""
    x, weight, bias, pos, mask_token, mask, prefix, patch_zyx, (low, high, mean, std) = inputs
    if x.dtype == torch.int16:
        x = (x.double().clip(low, high) - mean) / std
    kernel = weight.double().reshape(-1, 1, *patch_zyx)
    rows = F.conv3d(x.double()[:, None], kernel, bias.double(), stride=patch_zyx).flatten(2).mT
    if mask is not None:
        rows = rows.where(~mask[..., None], mask_token.double())
    prefix = prefix.double().expand(x.shape[0], -1, -1)
    return torch.cat([prefix, rows + pos.double()], dim=1)


@pytest.fixture
def _nan_outputs() -> Any:
    """Fill new tensors with NaN, so that a row the kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mask", ["none", "some", "all"])
@pytest.mark.parametrize("is_hu", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_matches_a_strided_convolution_in_float64(case: Case, is_hu: bool, mask: str) -> None:
    inputs = sample(case, is_hu=is_hu, mask=mask)
    # 1e-5: float32 sums of at most 384 products of order 1
    torch.testing.assert_close(
        patch_embed(*inputs).double(), by_convolution(inputs), rtol=1e-5, atol=1e-5
    )


def test_int16_hu_gives_the_tokens_of_the_preprocessed_volume() -> None:
    inputs = sample(CASES[0])
    low, high, mean, std = HU
    normalised = (inputs[0].float().clip(low, high) - mean) / std
    assert torch.equal(patch_embed(*inputs), patch_embed(normalised, *inputs[1:]))


@pytest.mark.usefixtures("_nan_outputs")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize(
    ("case", "is_hu", "mask"),
    [
        (CASES[0], True, "some"),
        (CASES[0], False, "none"),
        (CASES[1], True, "some"),
        (CASES[2], False, "all"),
        (CASES[2], True, "none"),
        (CASES[3], True, "none"),
        (CASES[4], True, "some"),
    ],
    ids=str,
)
def test_kernels_match_the_eager_definition(
    case: Case, is_hu: bool, mask: str, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = on_device(sample(case, is_hu=is_hu, mask=mask, dtype=dtype))
    expected = patch_embed_ref(*inputs)
    for _, _, tokens in tuning.each_config(lambda: _forward_triton(*inputs)):
        torch.testing.assert_close(tokens, expected, rtol=tolerance, atol=tolerance)

    grad = torch.randn_like(expected)
    arguments = (grad, inputs[0], inputs[1], inputs[5], inputs[7], inputs[8])
    references = _backward_ref(*arguments)
    for _, _, grads in tuning.each_config(lambda: _backward_triton(*arguments)):
        for found, wanted in zip(grads, references, strict=True):
            assert found.dtype == torch.float32
            # 1e-5 of the largest sum: both sides add the same products in another order
            atol = 1e-5 * max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("mask", ["none", "some"])
def test_gradients_match_finite_differences_in_float64(mask: str) -> None:
    inputs = sample(Case(2, (2, 4, 3), (1, 2, 3), 5, 2), is_hu=False, mask=mask)
    inputs = [i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs]
    differentiable = [0, 1, 2, 3, 4, 6]
    leaves = tuple(inputs[i].requires_grad_() for i in differentiable)

    def tokens_of(*values: Tensor) -> Tensor:
        arguments = list(inputs)
        for i, value in zip(differentiable, values, strict=True):
            arguments[i] = value
        return patch_embed(*arguments)

    assert torch.autograd.gradcheck(tokens_of, leaves)


@pytest.mark.parametrize("layout", ["compact", "transposed", "stride 0"])
def test_op_passes_opcheck(layout: str) -> None:
    inputs = sample(Case(2, (2, 8, 8), (2, 4, 4), 8, 3), is_hu=False)
    if layout == "transposed":
        inputs[0] = inputs[0].mT.contiguous().mT
        inputs[1] = inputs[1].T.contiguous().T
    elif layout == "stride 0":
        inputs[0] = inputs[0][:1].expand(2, -1, -1, -1)
        inputs[3] = inputs[3][:1].expand(4, -1).contiguous()
    for i in (1, 2, 3, 4, 6):
        inputs[i].requires_grad_()
    torch.library.opcheck(patch_embed.op, tuple(inputs))


def test_non_contiguous_tensors_give_the_same_tokens_in_the_kernel() -> None:
    inputs = on_device(sample(CASES[0]))
    expected = patch_embed_ref(*inputs)
    inputs[0] = inputs[0].mT.contiguous().mT
    inputs[1] = inputs[1].T.contiguous().T
    inputs[5] = inputs[5].T.contiguous().T
    torch.testing.assert_close(_forward_triton(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_op_compiles_to_one_graph_with_equal_gradients() -> None:
    inputs = sample(CASES[0])
    leaves = [inputs[i].requires_grad_() for i in (1, 2, 3, 4, 6)]

    def loss_of(*arguments: Any) -> Tensor:
        return patch_embed(*arguments).square().mean()

    expected = torch.autograd.grad(loss_of(*inputs), leaves)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs), leaves)
    for grad, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 8, 16, 20, dtype=torch.int16), "pad the volume first"),
        (0, torch.zeros(2, 8, 16, 24, dtype=torch.int32), "not int16 HU or normalised float"),
        (1, torch.zeros(48, 255), "weight has shape"),
        (3, torch.zeros(11, 48), "pos has shape"),
        (5, torch.zeros(2, 11, dtype=torch.bool), "mask has shape"),
        (8, (0.0, 1.0), "clip_low, clip_high, mean, std"),
    ],
)
def test_wrong_arguments_are_named(position: int, value: Any, message: str) -> None:
    inputs = sample(CASES[0])
    inputs[position] = value
    with pytest.raises(ValueError, match=message):
        patch_embed(*inputs)


@pytest.mark.gpu
def test_kernels_in_bfloat16_err_at_most_twice_as_much_as_eager(hold_to_eager: Any) -> None:
    def draw(seed: int) -> list[Any]:
        case = Case(2, (12, 96, 96), (4, 8, 8), 384, 5)
        return on_device(sample(case, dtype=torch.bfloat16, seed=seed))

    def run(forward: Any, backward: Any, inputs: list[Any]) -> list[Tensor]:
        x_BZYX, weight_DK, *_, mask_BL, _, patch_zyx, hu = inputs
        tokens = forward(*inputs)
        grad = torch.linspace(-1, 1, tokens.numel(), device=DEVICE).reshape(tokens.shape)
        grad = grad.bfloat16().to(tokens.dtype)
        return [tokens, *backward(grad, x_BZYX, weight_DK, mask_BL, patch_zyx, hu)]

    def exact(inputs: list[Any]) -> list[Tensor]:
        doubles = [
            i.double() if torch.is_tensor(i) and i.is_floating_point() else i for i in inputs
        ]
        return run(patch_embed_ref, _backward_ref, doubles)

    hold_to_eager(
        draw,
        partial(run, _forward_triton, _backward_triton),
        partial(run, patch_embed_ref, _backward_ref),
        exact,
    )

"""The native attention kernels against float64; see ``tapct_fast.model.cpu_attention``.

Shape suffixes: N volumes, T tokens, H heads, K head width.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from tapct_fast import _native
from tapct_fast.model.cpu_attention import _attention, attention_cpu
from tapct_kernels import attention
from tapct_kernels.attention import attention_ref, choose_backend, provide

needs_amx = pytest.mark.skipif(not _native.has_amx(), reason="this CPU has no AMX tiles")
needs_avx2 = pytest.mark.skipif(not _native.has_avx2(), reason="this CPU has no AVX2")
every_dtype = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.bfloat16, marks=needs_amx), pytest.param(torch.float32, marks=needs_avx2)],
)
OUT_ERROR = {torch.bfloat16: 3e-3, torch.float32: 2e-6}
GRAD_ERROR = {torch.bfloat16: 1e-2, torch.float32: 6e-6}
MORE = {torch.bfloat16: 1e-4, torch.float32: 7e-7}  # than PyTorch's may be ours
TOKENS = [
    *(1, 2, 5, 6, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 133),
    *(255, 256, 257, 272, 288, 383, 385, 511, 513, 2357),
]


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def qkv_of(
    num: int, tokens: int, heads: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(num, tokens, 3, heads, 64, generator=generator).mul(scale).to(dtype)


def gradient(call: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
    qkv = qkv.detach().requires_grad_()
    out = call(qkv)
    grad_out = torch.arange(out.numel(), dtype=torch.float64).mul(0.7).sin().reshape(out.shape)
    return torch.autograd.grad(out, qkv, grad_out.bfloat16().to(out.dtype))[0]


def norms(qkv: Tensor) -> Tensor:
    """Return those of query, key and value."""
    return torch.linalg.vector_norm(qkv, dim=(0, 1, 3, 4))


@every_dtype
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_is_the_softmax_at_every_edge_of_a_tile(tokens: int, dtype: torch.dtype) -> None:
    for num, heads, scale in ((1, 1, 1.0), (2, 3, 4.0)):
        qkv = qkv_of(num, tokens, heads, scale, dtype)
        expected = attention_ref(qkv.double())
        ours = attention_cpu(qkv)
        assert ours.dtype == dtype
        error = (ours.double() - expected).norm() / expected.norm()
        theirs = attention(qkv, backend="sdpa flash")
        their_error = (theirs.double() - expected).norm() / expected.norm()
        assert error < OUT_ERROR[dtype]
        assert error < 1.1 * their_error + MORE[dtype]


@every_dtype
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_gradient_is_that_of_the_softmax_at_every_edge_of_a_tile(
    tokens: int, dtype: torch.dtype
) -> None:
    for num, heads, scale in ((1, 1, 1.0), (2, 3, 4.0)):
        qkv = qkv_of(num, tokens, heads, scale, dtype)
        expected = gradient(attention_ref, qkv.double())
        ours = gradient(attention_cpu, qkv)
        theirs = gradient(partial(attention, backend="sdpa flash"), qkv)
        assert ours.dtype == dtype
        # Of one token the gradients of query and key are zero: no relative error there.
        size = expected.norm() if tokens == 1 else norms(expected)
        error, their_error = (norms(x.double() - expected) / size for x in (ours, theirs))
        assert (error < GRAD_ERROR[dtype]).all()
        assert (error < 1.2 * their_error + MORE[dtype]).all()


@needs_avx2
@pytest.mark.parametrize("tokens", [1, 2, 5, 7, 17, 133, 257, 513])
def test_a_cpu_without_avx512_gets_the_same(tokens: int) -> None:
    qkv, grad_out = qkv_of(2, tokens, 3, 2.0, torch.float32), torch.randn(2, tokens, 3, 64)
    expected = [t.numpy() for t in _attention(qkv)]
    grads = [torch.empty_like(qkv).numpy() for _ in range(2)]
    found = [array.copy() * math.nan for array in expected]
    _native.attention_avx(qkv.numpy(), *found, 1, lanes=8)
    for lanes, grad in zip((0, 8), grads, strict=True):
        _native.attention_avx_backward(grad_out.numpy(), qkv.numpy(), *expected, grad, 1, lanes)
    for ours, wide in (*zip(found, expected, strict=True), grads):
        np.testing.assert_allclose(ours, wide, rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="lanes must be 0, 8"):
        _native.attention_avx(qkv.numpy(), *found, 1, lanes=4)


@every_dtype
def test_a_gradient_that_is_one_number_is_taken(dtype: torch.dtype) -> None:
    qkv = qkv_of(2, 40, 2, dtype=dtype).requires_grad_()
    (found,) = torch.autograd.grad(attention_cpu(qkv).sum(), qkv)
    (expected,) = torch.autograd.grad(attention_ref(qkv.double()).sum(), qkv)
    error = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected.to(dtype), atol=error, rtol=error)
    with pytest.raises(RuntimeError, match="does not require grad"):
        _attention(qkv)[1].sum().backward()  # the level is no result


@every_dtype
def test_scores_of_any_size_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    qkv = qkv_of(1, 300, 2, dtype=dtype)
    qkv[:, :, 0] *= 200  # scores of thousands: one key takes all
    expected = attention_ref(qkv.double())
    ours = attention_cpu(qkv)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.double(), expected, atol=0.05, rtol=0.02)
    # All far below zero, where a key that is not there would have the largest score.
    below = qkv_of(1, 37, 1, dtype=dtype).abs()
    below[:, :, 0] *= -100
    for one in (qkv, below):
        assert gradient(attention_cpu, one).isfinite().all()
    for value in (math.nan, math.inf):
        qkv[:, 7, 1] = value  # a key that is not finite reaches every query
        assert attention_cpu(qkv).isnan().all()
        assert gradient(attention_cpu, qkv).isnan().all()


@pytest.mark.usefixtures("_threads")
@every_dtype
def test_threads_and_batches_do_not_change_a_bit(dtype: torch.dtype) -> None:
    qkv, grad_out = (qkv_of(3, 700, 3, dtype=dtype) for _ in range(2))
    grad_out = grad_out[:, :, 1]

    def results(volumes: slice) -> list[Tensor]:
        part = qkv[volumes].clone().requires_grad_()
        out = attention_cpu(part)
        return [out.detach(), *torch.autograd.grad(out, part, grad_out[volumes])]

    torch.set_num_threads(1)
    expected = results(slice(3))
    torch.set_num_threads(3)
    for one, other, of_one in zip(results(slice(3)), expected, results(slice(1, 2)), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(of_one, other[1:2])


@every_dtype
def test_no_volume_and_no_head_have_no_attention(dtype: torch.dtype) -> None:
    for shape in ((0, 5, 3, 2, 64), (2, 5, 3, 0, 64)):
        qkv = torch.empty(shape, dtype=dtype).requires_grad_()
        out = attention_cpu(qkv)
        assert out.shape == (shape[0], 5, shape[3], 64)
        out.sum().backward()


@every_dtype
def test_a_kernel_is_chosen_for_its_dtype_and_head_width(dtype: torch.dtype) -> None:
    name = "amx" if dtype == torch.bfloat16 else "avx"
    for needs_grad in (False, True):
        assert choose_backend("cpu", dtype, 64, needs_grad).name == name
        assert choose_backend("cpu", dtype, 32, needs_grad).name == "sdpa flash"
    word = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"takes {word} and a head width of 64"):
        attention(qkv_of(1, 4, 1).double(), backend=name)


@every_dtype
def test_a_wrong_kernel_is_passed_over(dtype: torch.dtype) -> None:
    name = "amx" if dtype == torch.bfloat16 else "avx"
    try:
        provide(name, lambda qkv: qkv[:, :, 0] * 0, "wrong")
        backend = choose_backend("cpu", dtype, 64, False)
        assert backend.name == "sdpa flash"
        assert name in dict(backend.passed_over)
    finally:
        provide(name, attention_cpu, "tapct_fast")


@every_dtype
def test_the_operator_keeps_what_it_tells_a_compiler(dtype: torch.dtype) -> None:
    torch.library.opcheck(_attention.op, (qkv_of(2, 37, 2, dtype=dtype),))
    # opcheck itself cannot compare gradients where an output has none.
    kept = ("test_schema", "test_autograd_registration", "test_faketensor")
    qkv = qkv_of(2, 37, 2, dtype=dtype).requires_grad_()
    torch.library.opcheck(_attention.op, (qkv,), test_utils=kept)
    compiled = torch.compile(attention_cpu, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled, qkv), gradient(attention_cpu, qkv))


@every_dtype
def test_the_native_functions_refuse_what_they_cannot_take(dtype: torch.dtype) -> None:
    is_bf16 = dtype == torch.bfloat16
    forward = _native.attention_amx if is_bf16 else _native.attention_avx
    backward = _native.attention_amx_backward if is_bf16 else _native.attention_avx_backward
    qkv = qkv_of(1, 4, 2, dtype=dtype)
    array = (qkv.view(torch.uint16) if is_bf16 else qkv).numpy()
    out, level = array[:, :, 0].copy(), torch.zeros(1, 2, 4).numpy()
    with pytest.raises(ValueError, match="attention"):
        forward(array, out[:, :, :1].copy(), level, 1)
    with pytest.raises(ValueError, match="attention"):
        forward(array, out, level[:, :1].copy(), 1)
    for wrong in ((out[:, :3].copy(), array), (out, array[:, :3].copy())):
        with pytest.raises(ValueError, match="attention"):
            backward(wrong[0], array, out, level, wrong[1], 1)
    with pytest.raises(TypeError):
        forward(array.astype("float64"), out, level, 1)

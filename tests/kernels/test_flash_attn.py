"""The calls to flash-attn, their gradient and compilation, and which packages are refused.

The packages need a GPU. Here operators with their schemas stand in for them, computed by PyTorch on
the CPU, so that everything of ours runs; with a GPU test_attention runs the packages themselves.
"""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tapct_kernels import attention_ref
from tapct_kernels.flash_attn import (
    _PACKAGES,
    _schema_refusal,
    flash_attn,
    flash_attn_backward,
    flash_attn_varlen,
    package_refusal,
)


def sample(num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn((2, num_tokens, 3, 2, 8), generator=generator)


SCHEMAS_3 = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None,"
    " Tensor? q_v=None, Tensor? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
    " Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None,"
    " int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None,"
    " float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,"
    " int window_size_right=-1, int num_splits=0, int sm_margin=0)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,"
    " Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None,"
    " Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, float? softmax_scale=None,"
    " bool is_causal=False, int window_size_left=-1, int window_size_right=-1,"
    " float softcap=0.0, bool deterministic=False, int sm_margin=0) -> Tensor[]",
}
_WINDOW_2 = "int window_size_left, int window_size_right, float softcap, Tensor? alibi_slopes"
SCHEMAS_2 = {
    "_flash_attn_forward": "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale,"
    f" bool causal, {_WINDOW_2}, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)",
    "_flash_attn_varlen_forward": "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p,"
    " float softmax_scale, bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1,"
    " float softcap=0., Tensor? alibi_slopes=None, bool return_softmax=False,"
    " Tensor? block_table=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "_flash_attn_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor softmax_lse, Tensor(dq!)? dq, Tensor(dk!)? dk, Tensor(dv!)? dv, float dropout_p,"
    f" float softmax_scale, bool causal, {_WINDOW_2}, bool deterministic, Tensor? rng_state=None)"
    " -> Tensor",
}


def _stand_in_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    starts = next((t for t in rest if isinstance(t, Tensor)), None)  # cu_seqlens_q
    if starts is not None:
        lengths = starts.diff().tolist()
        parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
        outs = [_stand_in_forward(*(p[None] for p in part))[0][0] for part in parts]
        return torch.cat(outs), *(q.new_empty(0) for _ in range(3))
    q_NHTK, k_NHTK, v_NHTK = (t.transpose(1, 2) for t in (q, k, v))
    score_NHTT = (q_NHTK @ k_NHTK.mT).float() / q.shape[-1] ** 0.5
    out_NHTK = score_NHTT.softmax(-1).to(v.dtype) @ v_NHTK
    # FlashAttention returns (N, T, H, K) in memory, float32 log-sum-exps of (N, H, T)
    out_NTHK = out_NHTK.transpose(1, 2).contiguous()
    return out_NTHK, score_NHTT.logsumexp(-1), q.new_empty(0), q.new_empty(0)


def _stand_in_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, *_: Any,
) -> list[Tensor]:  # fmt: skip
    scale = q.shape[-1] ** -0.5
    q_NHTK, k_NHTK, v_NHTK, g_NHTK = (t.transpose(1, 2).float() for t in (q, k, v, dout))
    p_NHTT = (q_NHTK @ k_NHTK.mT * scale - softmax_lse[..., None]).exp()
    delta_NHT1 = (dout.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
    s_NHTT = p_NHTT * (g_NHTK @ v_NHTK.mT - delta_NHT1) * scale
    dq.copy_((s_NHTT @ k_NHTK).transpose(1, 2))
    dk.copy_((s_NHTT.mT @ q_NHTK).transpose(1, 2))
    dv.copy_((p_NHTT.mT @ g_NHTK).transpose(1, 2))
    return [softmax_lse]


def _stand_in(name: str, schema: str) -> Any:
    if not name.endswith(("bwd", "backward")):
        return _stand_in_forward
    if schema.endswith("-> Tensor"):
        return lambda *args: _stand_in_backward(*args)[0]
    return _stand_in_backward


@pytest.fixture(params=[2, 3])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Put operators with the package's schemas in its place; return its major version."""
    major: int = request.param
    module = _PACKAGES[major].module
    if module in sys.modules:
        pytest.skip(f"{module} itself is installed and tested")
    namespace, schemas = {2: ("flash_attn", SCHEMAS_2), 3: ("flash_attn_3", SCHEMAS_3)}[major]
    library = torch.library.Library(namespace, "DEF")
    for name, schema in schemas.items():
        library.define(name + schema)
        library.impl(name, _stand_in(name, schema), "CPU")
    stand_in = type(sys)(module)
    stand_in.__spec__ = type("Spec", (), {"name": module})()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, module, stand_in)
    package_refusal.cache_clear()
    yield major
    library._destroy()
    package_refusal.cache_clear()


def test_package_with_the_known_operators_is_accepted(package: int) -> None:
    assert package_refusal(package) is None


@pytest.mark.parametrize("layout", ["compact", "transposed", "stride 0"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_package_operation_passes_opcheck(package: int, layout: str, needs_grad: bool) -> None:
    assert package_refusal(package) is None
    qkv_NT3HK = sample(6)
    if layout == "transposed":
        qkv_NT3HK = qkv_NT3HK.transpose(0, 4).contiguous().transpose(0, 4)
    elif layout == "stride 0":
        qkv_NT3HK = qkv_NT3HK[:1].expand(2, -1, -1, -1, -1)
    torch.library.opcheck(flash_attn, (qkv_NT3HK.detach().requires_grad_(needs_grad), package))
    out_NTHK, lse_NHT = flash_attn(qkv_NT3HK, package)
    for grad_NTHK in (
        torch.ones(1).expand_as(out_NTHK),
        torch.randn(8, 2, 6, 2).permute(3, 2, 1, 0),
    ):
        torch.library.opcheck(
            flash_attn_backward, (grad_NTHK, qkv_NT3HK, out_NTHK, lse_NHT, package)
        )
    torch.library.opcheck(flash_attn_varlen, (qkv_NT3HK[0], [2, 4], package))


def test_package_operation_matches_the_formula_and_its_gradient(package: int) -> None:
    assert package_refusal(package) is None
    qkv_NT3HK = sample(7).requires_grad_()
    out_NTHK, _ = flash_attn(qkv_NT3HK, package)
    torch.testing.assert_close(
        out_NTHK.double(), attention_ref(qkv_NT3HK.detach().double()), rtol=1e-5, atol=1e-5
    )
    exact = qkv_NT3HK.detach().double().requires_grad_()
    for grad_NTHK in (torch.ones(1).expand_as(out_NTHK), torch.randn_like(out_NTHK)):
        (found,) = torch.autograd.grad(out_NTHK, qkv_NT3HK, grad_NTHK, retain_graph=True)
        (wanted,) = torch.autograd.grad(attention_ref(exact), exact, grad_NTHK.double())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    alone = [flash_attn(part[None], package)[0][0] for part in qkv_NT3HK[0].split((3, 4))]
    found_THK = flash_attn_varlen(qkv_NT3HK[0].detach(), [3, 4], package)
    torch.testing.assert_close(found_THK, torch.cat(alone).detach(), rtol=1e-6, atol=1e-6)


def test_package_operation_compiles_to_one_graph_with_equal_gradients(package: int) -> None:
    assert package_refusal(package) is None
    qkv_NT3HK = sample(7).requires_grad_()

    def loss_of(qkv: Tensor) -> Tensor:
        return flash_attn(qkv, package)[0].square().mean()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(qkv_NT3HK), qkv_NT3HK)
    (expected,) = torch.autograd.grad(loss_of(qkv_NT3HK), qkv_NT3HK)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (SCHEMAS_3["fwd"].replace("softmax_scale", "scale"), "does not take softmax_scale"),
        (SCHEMAS_3["fwd"].replace("Tensor q, Tensor k", "Tensor k, Tensor q"), "not begin with q"),
        (SCHEMAS_3["fwd"].replace("int sm_margin=0", "*, int page"), "also wants page"),
        (SCHEMAS_3["fwd"], None),
    ],
)
def test_operator_with_other_arguments_is_refused_with_the_difference(
    schema: str, reason: str | None
) -> None:
    library = torch.library.Library("tapct_test_schema", "DEF")
    library.define("forward" + schema)
    names = {*_PACKAGES[3].extra_forward, "softmax_scale"}
    found = _schema_refusal("tapct_test_schema::forward", ("q", "k", "v"), names)
    assert found is None if reason is None else found is not None and reason in found
    assert _schema_refusal("tapct_test_schema::absent", (), set()) is not None
    library._destroy()


def test_package_that_is_absent_or_built_for_another_torch_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = _PACKAGES[3].module
    if module in sys.modules:
        pytest.skip(f"{module} is installed and loaded")
    package_refusal.cache_clear()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    assert package_refusal(3) == "not installed"
    (tmp_path / f"{module}.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    # Not syspath_prepend: it would put back, at the end, the path without site-packages.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    package_refusal.cache_clear()
    refusal = package_refusal(3)
    assert refusal == "installed, but its import fails: undefined symbol: _ZN3c10"
    (tmp_path / f"{module}.py").write_text("")
    importlib.invalidate_caches()
    package_refusal.cache_clear()
    refusal = package_refusal(3)
    assert refusal is not None
    assert "it has no operator flash_attn_3::fwd" in refusal
    package_refusal.cache_clear()
    monkeypatch.delitem(sys.modules, module)

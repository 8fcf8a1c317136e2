"""What the doctor says of the chosen attention and of launch configurations."""

from pathlib import Path

import pytest
import torch

import tapct_kernels
from tapct_fast import _native
from tapct_fast.doctor import _launches, examine, render
from tapct_kernels import tuning
from tapct_kernels.attention import Backend


def state_of(name: str) -> str:
    return next(finding.state for finding in examine() if finding.name == name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice of a machine without a GPU")
def test_doctor_names_the_chosen_attention_and_its_version() -> None:
    of_torch = f"sdpa flash (torch {torch.__version__})"
    fp32 = "avx (tapct_fast)" if _native.has_avx2() else of_torch
    bf16 = "amx (tapct_fast)" if _native.has_amx() else of_torch
    assert state_of("attention").startswith(f"{fp32} (passed over amx: ")
    assert state_of("attention, bf16 inference").startswith(bf16)
    assert state_of("attention, mixed lengths") == f"dense (torch {torch.__version__})"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice of a machine without a GPU")
def test_doctor_names_the_ops_that_are_native_on_a_cpu() -> None:
    assert state_of("fused ops").startswith("native residual_norm and gelu in float32, other ops")


def test_doctor_says_why_a_backend_was_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    older = Backend("sdpa flash", "torch 2.6", (("sdpa cudnn", "cuDNN 9.1 has no such kernel"),))
    monkeypatch.setattr(tapct_kernels, "choose_backend", lambda *_: older)
    expected = "sdpa flash (torch 2.6) (passed over sdpa cudnn: cuDNN 9.1 has no such kernel)"
    assert state_of("attention") == expected
    assert expected in render(examine())


@pytest.mark.gpu
def test_doctor_on_the_gpu_names_a_fused_kernel() -> None:
    assert state_of("attention").startswith(("flash-attn", "sdpa cudnn", "sdpa flash"))


def test_doctor_names_the_table_of_launch_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nvidia-x-triton-3.json"
    monkeypatch.setattr(tuning, "table_path", lambda: path)
    missing = _launches()
    assert missing.state == "defaults (no nvidia-x-triton-3.json)"
    assert "bench.tune" in missing.remedy
    path.write_text("{}")
    tuned = _launches()
    assert tuned.state == "tuned for this device (nvidia-x-triton-3.json)"
    assert not tuned.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice of a machine without a GPU")
def test_doctor_names_the_renderer_of_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_of("views").startswith("native (auto; --views.renderer torch")
    monkeypatch.setattr("tapct_fast.data.render.find_spec", lambda _: None)
    finding = next(finding for finding in examine() if finding.name == "views")
    assert "tapct-fast[dali]" in finding.remedy

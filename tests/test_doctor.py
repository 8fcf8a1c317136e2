"""What the doctor says of the chosen attention."""

import pytest
import torch

import tapct_kernels
from tapct_fast.doctor import examine, render
from tapct_kernels.attention import Backend


def state_of(name: str) -> str:
    return next(finding.state for finding in examine() if finding.name == name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice of a machine without a GPU")
def test_doctor_names_the_chosen_attention_and_its_version() -> None:
    assert state_of("attention") == f"sdpa flash (torch {torch.__version__})"
    assert state_of("attention, mixed lengths") == f"dense (torch {torch.__version__})"


def test_doctor_says_why_a_backend_was_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    older = Backend("sdpa flash", "torch 2.6", (("sdpa cudnn", "cuDNN 9.1 has no such kernel"),))
    monkeypatch.setattr(tapct_kernels, "choose_backend", lambda *_: older)
    expected = "sdpa flash (torch 2.6) (passed over sdpa cudnn: cuDNN 9.1 has no such kernel)"
    assert state_of("attention") == expected
    assert expected in render(examine())


@pytest.mark.gpu
def test_doctor_on_the_gpu_names_a_fused_kernel() -> None:
    assert state_of("attention").startswith(("flash-attn", "sdpa cudnn", "sdpa flash"))

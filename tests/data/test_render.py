import pytest

from tapct_fast import _native
from tapct_fast.data import render
from tapct_fast.data.render import choose_renderer, obstacle_to
from tapct_fast.errors import InputError


def test_the_choice_is_made_by_device() -> None:
    assert choose_renderer("auto", "cpu") == "native"
    assert choose_renderer("auto", "cuda") == "torch"
    for device in ("cpu", "cuda:1"):
        assert choose_renderer("torch", device) == "torch"


@pytest.mark.skipif(_native.has_cuda, reason="the native core has CUDA here")
def test_native_on_cuda_says_how_to_build_it() -> None:
    with pytest.raises(InputError, match=r"renderer native cannot run on cuda.*TAPCT_CUDA=ON"):
        choose_renderer("native", "cuda")


def test_dali_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "find_spec", lambda _: None)
    assert "tapct-fast[dali]" in obstacle_to("dali", "cpu")
    with pytest.raises(InputError, match=r"renderer dali cannot run on cpu.*tapct-fast\[dali\]"):
        choose_renderer("dali", "cpu")

"""What the native module says about its own build."""

import re

import pytest
import torch

from tapct_fast import _native


def test_backends_name_themselves_with_versions() -> None:
    assert re.fullmatch(r"(libdeflate|zlib-ng) \d+\.\d+(\.\d+)?", _native.inflate_backend())
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", _native.blosc2_version())


def test_a_build_without_cuda_says_how_to_get_it() -> None:
    if _native.has_cuda:
        pytest.skip("this build has CUDA code; build with TAPCT_CUDA=OFF to run this")
    with pytest.raises(RuntimeError, match="rebuild with TAPCT_CUDA=ON"):
        _native.cuda_devices()


@pytest.mark.gpu
def test_the_native_module_sees_the_devices_torch_sees() -> None:
    assert _native.has_cuda, "a GPU machine must test a build with TAPCT_CUDA=ON"
    devices = _native.cuda_devices()
    assert len(devices) == torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability(0)
    assert devices[0].startswith(torch.cuda.get_device_name(0))
    assert f"sm_{major}{minor}" in devices[0]

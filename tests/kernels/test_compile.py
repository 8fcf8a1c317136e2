"""Ahead-of-time compilation for an H200, which needs no GPU: ptxas comes with Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_LIMIT = 232_448  # bytes of shared memory a block can ask for on sm_90; not checked offline
USES_TENSOR_CORES = ("patch_embed forward", "patch_embed weight gradient")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("compile_for_sm90.py")
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    table: dict[str, dict[str, Any]] = json.loads(run.stdout)
    return table


def test_no_kernel_spills_or_asks_for_too_much_shared_memory(kernels: dict[str, Any]) -> None:
    assert len(kernels) == 5
    for name, found in kernels.items():
        assert found["registers"] > 0, name
        assert (found["stack"], found["local"], found["spills"]) == (0, 0, 0), name
        assert found["shared"] <= SHARED_LIMIT, name


def test_every_kernel_loads_sixteen_bytes_at_a_time(kernels: dict[str, Any]) -> None:
    for name, found in kernels.items():
        assert found["wide_loads"] > 0, name
        assert found["two_byte_loads"] == 0, name


def test_products_use_hopper_tensor_cores_with_operands_from_memory(
    kernels: dict[str, Any],
) -> None:
    for name, found in kernels.items():
        assert (found["hgmma"] > 0) == (name in USES_TENSOR_CORES), name
        assert found["hmma"] == 0, name
        assert found["dots_from_registers"] == 0, name

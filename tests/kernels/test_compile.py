"""Ahead-of-time compilation for GPUs that are not here: ptxas comes with Triton.

``kernels/resources.jsonl`` is what the compiler made of every kernel and candidate configuration;
``python tests/kernels/compile_kernels.py --write`` writes it anew after a change of a kernel.
"""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import triton

import tapct_kernels
from tapct_kernels import tuning

HERE = Path(__file__).resolve().parent
TABLE = HERE.parent.parent / "kernels" / "resources.jsonl"
SHARED_LIMIT = 232_448  # bytes of shared memory a block can ask for on sm_90; not checked offline
ID = ("sm", "op", "kernel", "launch", "config")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Compile for sm_90, in other processes: kernels under the interpreter do not compile."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))

    def compile_op(op: str) -> Rows:
        run = subprocess.run(
            [sys.executable, HERE / "compile_kernels.py", "--op", op, "90"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return [json.loads(line) for line in run.stdout.splitlines()]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ops = sorted(path.stem for path in (HERE / "launches").glob("*.py"))
        return list(itertools.chain(*pool.map(compile_op, ops)))


def named(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ID)


def test_every_op_with_kernels_has_its_launches() -> None:
    sources = Path(tapct_kernels.__file__).parent.glob("*.py")
    with_kernels = {path.stem for path in sources if "@triton.jit" in path.read_text()}
    assert with_kernels == {path.stem for path in (HERE / "launches").glob("*.py")}


def test_every_kernel_of_every_op_is_compiled(rows: Rows) -> None:
    for path in (HERE / "launches").glob("*.py"):
        source = Path(tapct_kernels.__file__).with_name(path.name).read_text()
        for line in source.splitlines():
            kernel = line.removeprefix("def ").partition("(")[0]
            if line.startswith("def ") and kernel.endswith("_kernel"):
                assert (path.stem, kernel) in {(row["op"], row["kernel"]) for row in rows}


def test_no_kernel_spills_or_asks_for_too_much_shared_memory(rows: Rows) -> None:
    for row in rows:
        assert row["registers"] > 0, named(row)
        assert (row["stack"], row["spills"]) == (0, 0), named(row)
        assert row["shared"] <= SHARED_LIMIT, named(row)


def test_hot_loops_load_sixteen_bytes_at_a_time(rows: Rows) -> None:
    for row in rows:
        if row["op"] != "block_masks":  # draws its numbers, and reads next to nothing
            assert row["loads_16_bytes"] > 0, named(row)
        assert row["loads_2_bytes"] == 0, named(row)


def test_products_use_hopper_tensor_cores_with_operands_from_memory(rows: Rows) -> None:
    assert any(row["hgmma"] for row in rows)
    for row in rows:
        assert row["hmma"] == 0, named(row)
        # Triton on Hopper has miscompiled left operands that were computed in registers
        assert row["dots_from_registers"] == 0, named(row)


def test_the_committed_table_is_what_the_compiler_says(rows: Rows) -> None:
    table = [json.loads(line) for line in TABLE.read_text().splitlines()]
    assert {row["sm"] for row in table} == {80, 90, 100}
    if {row["triton"] for row in table} != {triton.__version__}:
        pytest.skip(f"the table is not of Triton {triton.__version__}; compile anew to compare")
    stored = {named(row): row for row in table if row["sm"] == 90}
    assert stored == {named(row): row for row in rows}, "run compile_kernels.py --write"


def test_a_forced_configuration_goes_before_the_default() -> None:
    candidates = ({"num_warps": 4}, {"num_warps": 8})
    assert tuning.config_for("op.kernel", 384, candidates) == candidates[0]
    with tuning.forced("op.kernel", candidates[1]), tuning.asked() as found:
        assert tuning.config_for("op.kernel", 384, candidates) == candidates[1]
        assert tuning.config_for("op.other", 384, candidates) == candidates[0]
    assert found == {("op.kernel", 384): candidates, ("op.other", 384): candidates}
    assert tuning.config_for("op.kernel", 384, candidates) == candidates[0]


def test_a_table_serves_its_own_device_and_candidates_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = ({"num_warps": 4}, {"num_warps": 8})
    table = tmp_path / "device.json"
    table.write_text(json.dumps({"op.a": {"384": {"num_warps": 8}, "768": {"num_warps": 2}}}))
    monkeypatch.setattr(tuning, "table_path", lambda: table)
    assert tuning.config_for("op.a", 384, candidates) == {"num_warps": 8}
    assert tuning.config_for("op.a", 768, candidates) == candidates[0]  # no candidate any more
    assert tuning.config_for("op.a", 512, candidates) == candidates[0]
    assert tuning.config_for("op.b", 384, candidates) == candidates[0]

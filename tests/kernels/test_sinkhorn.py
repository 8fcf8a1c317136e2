"""Sinkhorn-Knopp and softmax targets against NumPy in float64, their kernels, processes, memory."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_kernels import Logits, sinkhorn, sinkhorn_ref, softmax_targets, tuning
from tapct_kernels.sinkhorn import (
    _prototype_triton,
    _row_triton,
    prototype_logsumexp,
    prototype_logsumexp_ref,
    row_logsumexp,
    row_logsumexp_ref,
)
from tapct_kernels.soft_targets import PRODUCTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes CPU tensors
OPS = [prototype_logsumexp, row_logsumexp]


def sample(rows: int, prototypes: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.empty(rows, prototypes).uniform_(-1, 1, generator=generator).to(dtype)


def draw_factor(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1))


def written_out(logits: NDArray[Any], temp: float, num_iter: int) -> NDArray[Any]:
    """DINOv2's form: transposed, every division written out."""
    q = np.exp(logits / temp).T
    k, b = q.shape
    q /= q.sum()
    for _ in range(num_iter):
        q /= q.sum(axis=1, keepdims=True)
        q /= k
        q /= q.sum(axis=0, keepdims=True)
        q /= b
    targets: NDArray[Any] = (q * b).T
    return targets


@pytest.fixture
def _nan_outputs() -> Any:
    """Fill new tensors with NaN, so that a value the kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("rows", "prototypes", "num_iter"), [(32, 64, 3), (5, 1000, 3), (3, 100_000, 2), (1, 7, 1)]
)
@pytest.mark.parametrize("temp", [0.04, 0.07])
def test_sinkhorn_equals_the_written_out_iteration(
    rows: int, prototypes: int, num_iter: int, temp: float
) -> None:
    logits = np.random.default_rng(0).uniform(-1, 1, (rows, prototypes))
    expected = written_out(logits, temp, num_iter)
    (targets,) = sinkhorn([torch.from_numpy(logits)], temp, num_iter=num_iter)
    np.testing.assert_allclose(targets.dense().numpy(), expected, rtol=1e-10)
    reference = sinkhorn_ref(torch.from_numpy(logits), temp, num_iter)
    np.testing.assert_allclose(reference.numpy(), expected, rtol=1e-10)

    (targets,) = sinkhorn([torch.from_numpy(logits).float()], temp, num_iter=num_iter)
    assert targets.dense().dtype == torch.float32
    # exponents up to 25, rounded to 1e-6 by each of the three terms and the division
    np.testing.assert_allclose(targets.dense().numpy(), expected, rtol=5e-5, atol=1e-12)


def test_each_tensor_is_balanced_by_itself() -> None:
    logits = [sample(6, 40), sample(50, 16, dtype=torch.float16)]
    for targets, alone in zip(sinkhorn(logits, 0.05), logits, strict=True):
        assert torch.equal(targets.dense(), sinkhorn([alone], 0.05)[0].dense())


@pytest.mark.parametrize("rows", [1, 4, 10])  # of a part: one, less than one, two and a half parts
def test_products_are_balanced_like_stored_logits(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRODUCTS, "cpu", 4 * 30)
    product = Logits(sample(rows, 7).double(), sample(30, 7).double())
    stored = product.stored(torch.float64)
    assert torch.equal(stored, product.rows_NX @ product.weights_PK.T)
    assert len(product.parts()) == -(-rows // 4)
    assert Logits(stored).parts() == [slice(0, rows)]
    for found, expected in (
        (sinkhorn([product], 0.05)[0], sinkhorn([stored], 0.05)[0]),
        (
            softmax_targets(product, draw_factor(30), 0.05),
            softmax_targets(stored, draw_factor(30), 0.05),
        ),
    ):
        assert found.rows_NX.shape == (rows, 7)
        torch.testing.assert_close(found.dense(), expected.dense(), rtol=1e-10, atol=0)


def test_products_are_stored_in_16_bits_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRODUCTS, "cpu", 4 * 30)
    product = Logits(sample(10, 7), sample(30, 7))
    expected = (product.rows_NX @ product.weights_PK.T).half()
    torch.testing.assert_close(product.stored(torch.float16), expected, rtol=1e-3, atol=0)


def test_rows_sum_to_one_and_prototypes_are_used_equally() -> None:
    targets_NP = sinkhorn([sample(64, 16).double()], 0.07, num_iter=50)[0].dense()
    torch.testing.assert_close(targets_NP.sum(1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(targets_NP.sum(0), torch.full((16,), 4.0, dtype=torch.float64))


def test_unnormalised_logits_and_an_unwanted_prototype_stay_finite() -> None:
    """exp(100 / 0.04) and exp(-60000 / 0.04) are numbers in no format, their targets are."""
    logits_NP = 100 * sample(8, 16)
    logits_NP[:, 3] = -60_000.0
    (targets,) = sinkhorn([logits_NP.half()], 0.04)
    exact = sinkhorn([logits_NP.half().double()], 0.04)[0].dense()
    assert targets.dense().isfinite().all()
    torch.testing.assert_close(exact.sum(1), torch.ones(8, dtype=torch.float64))
    # exponents of 2,500, and of 1.5 million for the unwanted one, have float32 steps of 2e-4, 0.1
    wanted = torch.arange(16) != 3
    found = targets.dense().double()[:, wanted]
    torch.testing.assert_close(found, exact[:, wanted], rtol=0.2, atol=0.1)


def test_a_shift_of_all_logits_changes_nothing() -> None:
    logits_NP = sample(8, 16)
    shifted = sinkhorn([logits_NP + 40.0], 0.04)[0].dense()
    # 40 has float32 steps of 4e-6, divided by 0.04
    torch.testing.assert_close(shifted, sinkhorn([logits_NP], 0.04)[0].dense(), rtol=1e-3, atol=0)


def test_softmax_targets_are_the_softmax_of_centered_logits() -> None:
    logits_NP, center_P = sample(10, 37), 0.3 * draw_factor(37)
    exact = torch.softmax((logits_NP.double() - center_P.double()) / 0.05, 1)
    targets = softmax_targets(logits_NP, center_P, 0.05)
    torch.testing.assert_close(targets.dense().double(), exact, rtol=2e-5, atol=1e-12)


def test_targets_keep_the_logits_and_no_gradient() -> None:
    logits_NP = sample(4, 8).requires_grad_()
    before = logits_NP.detach().clone()
    (targets,) = sinkhorn([logits_NP], 0.05)
    assert targets.rows_NX.data_ptr() == logits_NP.data_ptr()
    assert not targets.dense().requires_grad
    assert torch.equal(logits_NP, before)


@pytest.mark.parametrize("has_factor", [True, False])
@pytest.mark.parametrize(("rows", "prototypes"), [(9, 40), (5, 100_000), (1, 1), (0, 5)], ids=str)
def test_sums_match_the_eager_definition(rows: int, prototypes: int, has_factor: bool) -> None:
    logits_NP, temp = sample(rows, prototypes), torch.tensor(0.05)
    row_N = draw_factor(rows) if has_factor else None
    expected = prototype_logsumexp_ref(logits_NP, row_N, temp)
    torch.testing.assert_close(prototype_logsumexp(logits_NP, row_N, temp), expected)
    prototype_P = draw_factor(prototypes) if has_factor else None
    expected = row_logsumexp_ref(logits_NP, prototype_P, temp)
    torch.testing.assert_close(row_logsumexp(logits_NP, prototype_P, temp), expected)


@pytest.mark.usefixtures("_nan_outputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("has_factor", [True, False])
@pytest.mark.parametrize(
    # blocks of 16 x 256 and 8 x 512; 1,100 rows: two per program of the row pass, several slabs
    ("rows", "prototypes"),
    [(16, 256), (8, 512), (33, 700), (15, 255), (1, 100), (7, 1), (1100, 24), (0, 5)],
    ids=str,
)
def test_kernels_match_the_eager_definition(
    rows: int, prototypes: int, has_factor: bool, dtype: torch.dtype
) -> None:
    logits_NP = sample(rows, prototypes, dtype=dtype).to(DEVICE)
    temp = torch.tensor(0.05, device=DEVICE)
    row_N = draw_factor(rows).to(DEVICE) if has_factor else None
    prototype_P = draw_factor(prototypes).to(DEVICE) if has_factor else None
    # 1e-5 in float16 too: what is rounded to 16 bits is an input of both, not a result
    expected = prototype_logsumexp_ref(logits_NP, row_N, temp)
    for _, _, lse_P in tuning.each_config(lambda: _prototype_triton(logits_NP, row_N, temp)):
        torch.testing.assert_close(lse_P, expected, rtol=1e-5, atol=1e-5)
    expected = row_logsumexp_ref(logits_NP, prototype_P, temp)
    for _, _, lse_N in tuning.each_config(lambda: _row_triton(logits_NP, prototype_P, temp)):
        torch.testing.assert_close(lse_N, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [100.0, 30_000.0])
def test_kernels_stay_finite_for_unnormalised_logits(scale: float) -> None:
    logits_NP = (scale * sample(20, 300)).half().to(DEVICE)
    logits_NP[:, 3] = -60_000.0
    temp = torch.tensor(0.04, device=DEVICE)
    for found, expected in (
        (_prototype_triton(logits_NP, None, temp), prototype_logsumexp_ref),
        (_row_triton(logits_NP, None, temp), row_logsumexp_ref),
    ):
        exact = expected(logits_NP.double(), None, temp.double())
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", ["compact", "transposed", "stride 0"])
@pytest.mark.parametrize("axis", [0, 1])
def test_ops_pass_opcheck(axis: int, layout: str) -> None:
    logits_NP, factor = sample(6, 9), draw_factor((6, 9)[axis])
    if layout == "transposed":
        logits_NP, factor = sample(9, 6).t(), draw_factor(2 * len(factor))[::2]
    elif layout == "stride 0":
        logits_NP, factor = logits_NP[:1].expand(6, -1), factor[:1].expand(len(factor))
    torch.library.opcheck(OPS[axis].op, (logits_NP, factor, torch.tensor(0.05)))
    torch.library.opcheck(OPS[axis].op, (logits_NP, None, torch.tensor(0.05)))


def test_sinkhorn_compiles_to_one_graph_for_every_temperature() -> None:
    compiled = torch.compile(sinkhorn, fullgraph=True, backend="aot_eager")
    logits = [sample(4, 12), sample(9, 12), Logits(sample(5, 3), sample(12, 3))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for temp in (torch.tensor(0.04), torch.tensor(0.07)):
            for found, expected in zip(compiled(logits, temp), sinkhorn(logits, temp), strict=True):
                assert torch.equal(found.dense(), expected.dense())


@pytest.mark.parametrize(
    ("logits_NP", "factor", "temp", "message"),
    [
        (torch.zeros(4), None, torch.tensor(1.0), "1 dimensions, not floats of 2"),
        (torch.zeros(4, 3, dtype=torch.int32), None, torch.tensor(1.0), "torch.int32 of 2"),
        (torch.zeros(4, 4), torch.zeros(5), torch.tensor(1.0), r"shape \(5,\)"),
        (torch.zeros(4, 4), torch.zeros(4).half(), torch.tensor(1.0), "torch.float16 of shape"),
        (torch.zeros(4, 4), None, torch.ones(1), "temp is"),
        (torch.zeros(4, 4), None, torch.tensor(1.0).double(), "temp is"),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_wrong_arguments_are_named(
    axis: int, logits_NP: Tensor, factor: Tensor | None, temp: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OPS[axis](logits_NP, factor, temp)


def test_no_round_is_refused() -> None:
    with pytest.raises(ValueError, match="num_iter=0"):
        sinkhorn([sample(2, 2)], 0.1, num_iter=0)


PROCESS = """
import sys
import torch, torch.distributed as dist
from tapct_kernels import Logits, sinkhorn
store, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
inputs = torch.load(store + ".inputs")
logits = [whole.chunk(world)[rank] for whole in inputs]
logits.append(Logits(logits[1], torch.eye(20)))  # stored and as a product
calls = []
wrapped = dist.all_reduce
dist.all_reduce = lambda tensor, *a: (calls.append(tensor.numel()), wrapped(tensor, *a))
targets = sinkhorn(logits, 0.05, group=dist.group.WORLD)
torch.save(([t.dense() for t in targets], calls), f"{store}.{rank}")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [2, 4])
def test_processes_balance_their_rows_together(world: int, tmp_path: Path) -> None:
    inputs = [sample(8, 30), 50 * sample(24, 20)]
    store = tmp_path / "store"
    torch.save(inputs, f"{store}.inputs")
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(store), str(rank), str(world)])
        for rank in range(world)
    ]
    assert [p.wait(timeout=100) for p in processes] == [0] * world
    results = [torch.load(f"{store}.{rank}") for rank in range(world)]
    for i, expected in enumerate(sinkhorn([*inputs, inputs[1]], 0.05)):
        found = torch.cat([dense[i] for dense, _ in results])
        # exponents up to 1,000 in the second tensor: float32 steps of 6e-5
        torch.testing.assert_close(found, expected.dense(), rtol=1e-3, atol=1e-6)
    # all tensors in one buffer: a maximum and a sum for each of three rounds
    assert all(calls == [70] * 6 for _, calls in results)


PEAK = """
import sys
import torch
from tapct_kernels import Logits, sinkhorn, sinkhorn_ref, soft_targets
torch.set_num_threads(1)

def kilobytes(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

logits = torch.randn(1024, 8192, generator=torch.Generator().manual_seed(0)).half()
call = {
    "op": lambda l: sinkhorn([l], 0.05),
    "eager": lambda l: sinkhorn_ref(l, 0.05),
    "product": lambda f: sinkhorn([Logits(f, weights)], 0.05),
}[sys.argv[1]]
if sys.argv[1] == "product":
    logits, weights = torch.randn(4096, 64), torch.randn(8192, 64)
    soft_targets.PRODUCTS["cpu"] = 2**18
call(logits[:64])  # what torch loads and malloc sets up at first use, some 8 MB, is not the op's
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
before = kilobytes("VmRSS")
call(logits)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's VmHWM")
def test_op_needs_a_tenth_of_the_memory_of_the_eager_definition() -> None:
    def peak(variant: str) -> int:
        command = [sys.executable, "-c", PEAK, variant]
        # glibc's heap would keep most of what small tensors free
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(done.stdout)

    eager = peak("eager")
    assert eager > 3 * 1024 * 8192 * 4 / 1024 * 0.9  # three float32 copies
    assert peak("op") <= 0.1 * eager
    assert peak("product") <= 0.1 * 4096 * 8192 * 4 / 1024  # of the logits of 4096 rows alone


@pytest.mark.gpu
def test_kernels_in_bfloat16_err_at_most_twice_as_much_as_eager(hold_to_eager: Any) -> None:
    def draw(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        logits_NP = torch.empty(3000, 4096, device=DEVICE).uniform_(-1, 1).bfloat16()
        row_N, prototype_P = torch.randn(3000, device=DEVICE), torch.randn(4096, device=DEVICE)
        return [logits_NP, row_N, prototype_P, torch.tensor(0.05, device=DEVICE)]

    def run(columns: Any, rows: Any, inputs: list[Any]) -> list[Tensor]:
        logits_NP, row_N, prototype_P, temp = inputs
        return [columns(logits_NP, row_N, temp), rows(logits_NP, prototype_P, temp)]

    eager = partial(run, prototype_logsumexp_ref, row_logsumexp_ref)
    hold_to_eager(
        draw,
        partial(run, _prototype_triton, _row_triton),
        eager,
        lambda inputs: eager([i.double() for i in inputs]),
    )

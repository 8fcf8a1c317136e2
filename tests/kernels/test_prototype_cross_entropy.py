"""The streaming cross-entropy, its kernels and its gradients against formulas in float64."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tapct_kernels import prototype_cross_entropy, prototype_cross_entropy_ref
from tapct_kernels.soft_targets import SoftTargets
from tapct_kernels.tuning import each_config

module = importlib.import_module("tapct_kernels.prototype_cross_entropy")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes CPU tensors
TEMP = 0.1
NUM_TARGETS = 9


class Inputs(NamedTuple):
    """Arguments of the op."""

    features_SK: Tensor
    prototypes_PK: Tensor
    targets: SoftTargets
    target_row_SJ: Tensor
    weight_SJ: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        return (*self[:2], *self.targets, *self[3:])

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Cast operands; the targets' vectors follow to float64, and to what rounding changes."""
        rows, weights, *vectors = self.targets
        if dtype == torch.float64:
            vectors = [v.double() for v in vectors]
        targets = SoftTargets(
            rows.to(dtype), None if weights is None else weights.to(dtype), *vectors
        )
        if dtype == torch.bfloat16:  # which holds fewer values than the sample's
            scaled_NP = targets.logits.of().float() / targets.temp + targets.prototype_P
            targets = targets._replace(row_N=-torch.logsumexp(scaled_NP, 1))
        return self._replace(
            features_SK=self.features_SK.to(dtype),
            prototypes_PK=self.prototypes_PK.to(dtype),
            targets=targets,
        )


def sample(
    num_rows: int,
    num_prototypes: int,
    width: int,
    num_pairs: int = 1,
    seed: int = 3,
    *,
    is_product: bool = False,
) -> Inputs:
    """Unit features and prototypes, targets of unit rows; values that float16 holds."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1).half().float()

    prototypes_PK = unit(num_prototypes, width)
    teacher_NK = unit(NUM_TARGETS, width)
    logits_NP = teacher_NK @ prototypes_PK.T
    if not is_product:
        logits_NP = logits_NP.half().float()
    temp = torch.tensor(0.05)
    prototype_P = torch.randn(num_prototypes, generator=generator)
    row_N = -torch.logsumexp(logits_NP / temp + prototype_P, 1)
    target_row_SJ = torch.randint(NUM_TARGETS, (num_rows, num_pairs), generator=generator)
    weight_SJ = torch.rand(num_rows, num_pairs, generator=generator) + 0.2
    inputs = Inputs(
        unit(num_rows, width),
        prototypes_PK,
        SoftTargets(
            *((teacher_NK, prototypes_PK) if is_product else (logits_NP, None)),
            *(prototype_P, row_N, temp),
        ),
        target_row_SJ,
        weight_SJ,
    )
    return _on_device(inputs)


def _on_device(inputs: Inputs) -> Inputs:
    targets = SoftTargets(*(None if t is None else t.to(DEVICE) for t in inputs.targets))
    moved = [t if isinstance(t, SoftTargets) else t.to(DEVICE) for t in inputs]
    moved[2] = targets
    return Inputs(*moved)


def without_a_pair(inputs: Inputs, num_unused: int = 2) -> Inputs:
    """Give the last pair of the first rows weight 0 and targets that are not numbers, or none."""
    targets, row_SJ, weight_SJ = inputs.targets, inputs.target_row_SJ, inputs.weight_SJ.clone()
    weight_SJ[:num_unused, -1] = 0
    rows_NX, row_N = targets.rows_NX.clone(), targets.row_N.clone()
    rows_NX[NUM_TARGETS - 1], row_N[NUM_TARGETS - 1] = math.nan, math.nan
    row_SJ = row_SJ % (NUM_TARGETS - 1)
    row_SJ[:num_unused, -1] = NUM_TARGETS - 1
    row_SJ[: num_unused // 2, -1] = 10**9
    return inputs._replace(
        targets=targets._replace(rows_NX=rows_NX, row_N=row_N),
        target_row_SJ=row_SJ,
        weight_SJ=weight_SJ,
    )


def op(inputs: Inputs, temp: float = TEMP) -> Tensor:
    *operands, target_row_SJ, weight_SJ = inputs
    return prototype_cross_entropy(
        *operands, temp=temp, target_row_SJ=target_row_SJ, weight_SJ=weight_SJ
    )


def ref(inputs: Inputs, temp: float = TEMP) -> Tensor:
    *operands, target_row_SJ, weight_SJ = inputs
    return prototype_cross_entropy_ref(
        *operands, temp=temp, target_row_SJ=target_row_SJ, weight_SJ=weight_SJ
    )


def loops(inputs: Inputs) -> Tensor:
    """The cross-entropy of every pair from scalars, float64."""
    x, w, targets, rows, weights = inputs
    _, _, prototype, row, temp = targets
    logits = targets.logits.of()
    losses = []
    for s in range(x.shape[0]):
        student = [float(x[s].double() @ w[p].double()) / TEMP for p in range(w.shape[0])]
        total = math.log(sum(math.exp(v) for v in student))
        loss = 0.0
        for n, weight in zip(rows[s].tolist(), weights[s].tolist(), strict=True):
            for p, value in enumerate(student):
                if weight:
                    target = math.exp(float(logits[n, p]) / float(temp) + prototype[p] + row[n])
                    loss -= weight * target * (value - total)
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64, device=x.device)


def ref_gradients(inputs: Inputs, grad_S: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs[:2]]
    loss_S = ref(inputs._replace(features_SK=leaves[0], prototypes_PK=leaves[1]))
    return torch.autograd.grad(loss_S, leaves, grad_S.to(loss_S.dtype))


def run_kernels(inputs: Inputs, grad_S: Tensor) -> tuple[Tensor, ...]:
    loss_S, lse_S = module._forward_triton(*inputs.flat(), TEMP)
    return (loss_S, *module._backward_triton(grad_S, lse_S, *inputs.flat(), TEMP))


@pytest.fixture
def _nan_outputs() -> Any:
    """Fill new tensors with NaN, so that a row the kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small inputs have several tiles, chunks and parts, the last ones not full."""
    monkeypatch.setattr(module, "TILE_SP", (4, 16))
    monkeypatch.setattr(module, "CHUNK", 4 * 40)


@pytest.mark.usefixtures("_small_tiles", "_nan_outputs")
@pytest.mark.parametrize("is_product", [False, True])
@pytest.mark.parametrize("num_pairs", [1, 2])
def test_op_and_eager_definition_match_the_formula_in_float64(
    num_pairs: int, is_product: bool
) -> None:
    inputs = without_a_pair(sample(7, 40, 6, num_pairs, is_product=is_product))
    expected = loops(inputs)
    # 1e-5: float32 sums of 40 values; the loss is of order 4
    torch.testing.assert_close(op(inputs).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ref(inputs).double(), expected, rtol=1e-5, atol=1e-5)
    grad_S = torch.linspace(-1, 2, 7, device=DEVICE)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    found = torch.autograd.grad(op(inputs), leaves, grad_S)
    doubles = inputs.to(torch.float64)
    for grad, wanted in zip(found, ref_gradients(doubles, grad_S), strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


SHAPES = [
    (128, 64, 16, 1),  # whole blocks
    (150, 100, 24, 2),  # a few more rows, prototypes and columns than blocks
    (127, 70, 20, 1),
    (1, 17, 5, 2),
    (20, 1000, 48, 1),  # parts of the prototypes
    (3, 40, 600, 2),  # wider than the blocks are made for
]
IS_PRODUCT = pytest.mark.parametrize("is_product", [False, True], ids=["stored", "product"])


@pytest.mark.usefixtures("_small_tiles", "_nan_outputs")
@IS_PRODUCT
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("S", "P", "K", "J"), SHAPES, ids=str)
def test_kernels_match_the_eager_definition(
    S: int, P: int, K: int, J: int, dtype: torch.dtype, tolerance: float, is_product: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "CHUNK", 96 * P)  # two chunks for more rows, the second not full
    inputs = sample(S, P, K, J, is_product=is_product)
    inputs = without_a_pair(inputs, num_unused=min(2, S - 1)).to(dtype)
    exact = inputs.to(torch.float64)
    grad_S = torch.linspace(-1, 2, S, device=DEVICE)
    expected = (ref(exact), *ref_gradients(exact, grad_S))
    if is_product and dtype == torch.float16:  # teacher logits rounded by 2**-12, over temp
        tolerance *= 10
    for kernel, config, outputs in each_config(lambda: run_kernels(inputs, grad_S)):
        assert [t.dtype for t in outputs] == [torch.float32, dtype, torch.float32]
        for found, wanted in zip(outputs, expected, strict=True):
            # gradients are divided by temp and summed over the rows
            limit = tolerance if wanted is expected[0] else 10 * tolerance
            torch.testing.assert_close(
                found.double(), wanted, rtol=limit, atol=limit,
                msg=lambda text: f"{kernel} {config}: {text}",  # noqa: B023 (called at once)
            )  # fmt: skip


def test_large_logits_of_student_and_teacher_stay_finite() -> None:
    inputs = sample(5, 40, 6)
    inputs = inputs._replace(features_SK=300 * inputs.features_SK)  # exp(3000) has no float32
    expected = ref(inputs.to(torch.float64)).float()
    torch.testing.assert_close(op(inputs), expected, rtol=1e-5, atol=1e-3)
    loss_S, _ = module._forward_triton(*inputs.flat(), TEMP)
    torch.testing.assert_close(loss_S, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("_small_tiles")
@IS_PRODUCT
@pytest.mark.parametrize("num_pairs", [1, 2])
def test_gradients_match_finite_differences_in_float64(num_pairs: int, is_product: bool) -> None:
    inputs = without_a_pair(sample(5, 20, 3, num_pairs, is_product=is_product)).to(torch.float64)
    leaves = tuple(t.requires_grad_() for t in inputs[:2])
    assert torch.autograd.gradcheck(lambda *pair: op(Inputs(*pair, *inputs[2:])), leaves)


def test_no_rows_give_no_losses_and_zero_gradients() -> None:
    inputs = sample(0, 20, 3)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    loss_S = op(inputs)
    assert loss_S.shape == (0,)
    grads = torch.autograd.grad(loss_S.sum(), leaves)
    assert [grad.abs().sum().item() for grad in grads] == [0, 0]


def test_under_autocast_the_gradient_of_the_prototypes_is_not_rounded() -> None:
    inputs = sample(6, 20, 16)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss_S = op(inputs)
    assert loss_S.dtype == torch.float32
    grad_x_SK, grad_w_PK = torch.autograd.grad(loss_S.sum(), leaves)
    assert grad_x_SK.dtype == grad_w_PK.dtype == torch.float32
    rounded = [t.detach().bfloat16() for t in leaves]
    expected = op(inputs._replace(features_SK=rounded[0], prototypes_PK=rounded[1]))
    torch.testing.assert_close(loss_S, expected, rtol=0, atol=0)


@IS_PRODUCT
@pytest.mark.parametrize("layout", ["compact", "transposed", "stride 0"])
def test_op_passes_opcheck(layout: str, is_product: bool) -> None:
    inputs = list(sample(6, 20, 4, 2, is_product=is_product).flat())
    is_matrix = [t is not None and t.ndim == 2 for t in inputs]
    if layout == "transposed":
        inputs = [t.T.contiguous().T if m else t for t, m in zip(inputs, is_matrix, strict=True)]
    elif layout == "stride 0":
        inputs = [t[:1].expand(t.shape) if m else t for t, m in zip(inputs, is_matrix, strict=True)]
    for i in (0, 1):
        inputs[i] = inputs[i].detach().requires_grad_()
    torch.library.opcheck(module._op.op, (*inputs, TEMP))
    grads = [torch.ones(1, device=DEVICE).expand(6), torch.ones(6, device=DEVICE)]
    detached = [None if t is None else t.detach() for t in inputs]
    torch.library.opcheck(module._backward_op.op, (*grads, *detached, TEMP))


def test_op_compiles_to_one_graph_with_equal_gradients() -> None:
    inputs = sample(6, 20, 4, 2)
    leaves = [t.requires_grad_() for t in inputs[:2]]

    def loss_of(inputs: Inputs) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return op(inputs).square().mean()

    expected = torch.autograd.grad(loss_of(inputs), leaves)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(inputs), leaves)
    for grad, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0)


def no_targets(width: int, weights_PK: Tensor | None) -> SoftTargets:
    rows_NX, prototype_P, row_N, temp = (torch.zeros(s) for s in ((0, width), 20, 0, ()))
    return SoftTargets(rows_NX, weights_PK, prototype_P, row_N, temp)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prototypes_PK", torch.zeros(20, 5), "features and prototypes"),
        ("prototypes_PK", torch.zeros(21, 4), "targets have shapes"),
        ("weight_SJ", torch.zeros(6, 1), "target_row and weight"),
        ("target_row_SJ", torch.zeros(6, 2, dtype=torch.int32), "not int64"),
        ("targets", no_targets(20, None), "no targets"),
        ("targets", no_targets(4, torch.zeros(21, 4)), "targets have shapes"),
    ],
)
def test_wrong_arguments_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(sample(6, 20, 4, 2)._replace(**{name: value}))


PEAK = """
import json, re, sys
import torch
sys.path.insert(0, {folder!r})
import test_prototype_cross_entropy as tests
from pathlib import Path

def memory(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+)", text)[1]) / 1024

torch.set_num_threads(1)
inputs = tests.sample(4096, 8192, 32)
leaves = [t.requires_grad_() for t in inputs[:2]]
x_SK, w_PK, targets, row_SJ, weight_SJ = inputs
few = tests.Inputs(x_SK[:8], w_PK, targets, row_SJ[:8], weight_SJ[:8])
peaks = []
for dtype in (torch.float32, torch.bfloat16):
    for call in (tests.op, tests.ref):
        for some in (few, inputs):  # first what torch allocates once
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                before = memory("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")
                torch.autograd.grad(call(some).sum(), leaves)
        peaks.append(memory("VmHWM") - before)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures the peak")
def test_on_the_cpu_the_peak_is_a_tenth_of_the_eager_definition() -> None:
    code = PEAK.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    op_fp32, eager_fp32, op_bf16, eager_bf16 = json.loads(done.stdout)
    assert eager_fp32 > 4 * 100  # MiB: several copies of 4096 x 8192 logits, so the measure works
    assert op_fp32 < 0.1 * eager_fp32
    assert op_bf16 < 0.1 * eager_bf16


@pytest.mark.gpu
@pytest.mark.parametrize("num_pairs", [1, 2])
def test_kernels_in_bfloat16_err_at_most_twice_as_much_as_eager(
    num_pairs: int, hold_to_eager: Any
) -> None:
    grad_S = torch.linspace(-1, 2, 300, device=DEVICE)

    def draw(seed: int) -> list[Any]:
        return [sample(300, 4096, 256, num_pairs, seed).to(torch.bfloat16)]

    def eager(inputs: list[Any]) -> list[Tensor]:
        return [ref(*inputs), *ref_gradients(*inputs, grad_S)]

    def exact(inputs: list[Any]) -> list[Tensor]:
        return eager([inputs[0].to(torch.float64)])

    hold_to_eager(draw, lambda inputs: run_kernels(*inputs, grad_S), eager, exact)

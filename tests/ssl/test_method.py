"""The whole objective against full forwards and float64 numpy, and what must not influence it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tapct_fast.config import HeadConfig, HeadsConfig, HuConfig, LossConfig, VitConfig
from tapct_fast.data.pipeline import ViewBatch
from tapct_fast.model.block import draw_kept_rows
from tapct_fast.ssl.method import DinoMethod, Kept, Losses, Targets

P_DINO, P_IBOT = 24, 40


def small_method(
    *,
    shared: bool = False,
    centering: str = "sinkhorn",
    drop: float = 0.0,
    recompute: bool = False,
) -> DinoMethod:
    dino = HeadConfig(num_prototypes=P_DINO, bottleneck_dim=8, hidden_dim=16)
    ibot = HeadConfig(num_prototypes=P_IBOT, bottleneck_dim=8, hidden_dim=16)
    method = DinoMethod(
        VitConfig(dim=64, depth=2, image_zyx=(8, 16, 16), layer_scale=0.5, drop_path=drop),
        HeadsConfig(dino=dino, ibot=None if shared else ibot),
        LossConfig(
            dino_weight=0.7,
            ibot_weight=1.3,
            koleo_weight=0.2,
            centering=centering,
            recompute_ibot_logits=recompute,
        ),
        hu=HuConfig(),
        seed=5,
    )
    with torch.no_grad():  # a teacher that is not its student, and a mask token that is seen
        generator = torch.Generator().manual_seed(0)
        for parameter in method.student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return method


def small_batch(num_samples: int = 3, *, num_local: int = 2, masked: bool = True) -> ViewBatch:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, num_samples, 8, 16, 16, generator=generator)
    local = torch.randn(num_local, num_samples, 8, 8, 8, generator=generator)
    mask_NL = torch.zeros(2 * num_samples, 8, dtype=torch.bool)
    if masked:
        mask_NL[0, [1, 4, 6]] = True
        mask_NL[-1, [0, 2, 3, 5, 7]] = True
    count_N1 = mask_NL.sum(1, keepdim=True).clamp(min=1)
    return ViewBatch(
        views,
        local,
        mask_NL,
        mask_NL.flatten().nonzero().squeeze(1),
        (1 / count_N1).expand_as(mask_NL)[mask_NL],
        num_samples,
    )


def targets_of(method: DinoMethod, batch: ViewBatch) -> Targets:
    with torch.no_grad():
        return method.targets([method.teacher.encode_teacher(batch)], 0.05).of_micro_batches[0]


def losses_of(
    method: DinoMethod,
    batch: ViewBatch,
    *,
    teacher_temp: float | Tensor,
    kept: Kept | None = None,
) -> Losses:
    """Return the losses of a step of one micro-batch and one process."""
    with torch.no_grad():
        encoded = method.target_networks.encode_teacher(batch)
    (targets,) = method.targets([encoded], teacher_temp).of_micro_batches
    return method.student_losses(batch, targets, kept)[0]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def sinkhorn(logits: np.ndarray, temp: float) -> np.ndarray:
    q = np.exp(logits / temp)
    for _ in range(3):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdims=True) / q.shape[0]
    return q * q.shape[0]


def numpy_losses(method: DinoMethod, batch: ViewBatch, temp: float) -> list[float]:
    """Norm and project every token of every view, then write the formulae out in loops."""
    student, teacher = method.student.double(), method.teacher.double()

    def project(head: torch.nn.Module, x: Tensor) -> np.ndarray:
        return head(x).logits().numpy()

    with torch.no_grad():
        views, local = (v.double().flatten(0, 1)[:, None] for v in batch[:2])
        t, s = teacher.backbone(views), student.backbone(views, mask_BL=batch.mask_NL)
        locals_cls = student.backbone(local).cls_BD
        heads = [(n, n.dino_head, n.ibot_head or n.dino_head) for n in (student, teacher)]
        (_, s_dino, s_ibot), (_, t_dino, t_ibot) = heads
        B, m = batch.num_samples, batch.mask_NL
        targets = sinkhorn(project(t_dino, t.cls_BD), temp)
        logp = log_softmax(project(s_dino, s.cls_BD) / 0.1)
        logp_local = log_softmax(project(s_dino, locals_cls) / 0.1)
        patch_targets = sinkhorn(project(t_ibot, t.patches_BLD[m]), temp)
        patch_logp = log_softmax(project(s_ibot, s.patches_BLD[m]) / 0.1)
        cls = torch.nn.functional.normalize(s.cls_BD, dim=-1).numpy()
    pairs = 2 + 2 * batch.local_VBZYX.shape[0]
    dino_global = dino_local = koleo = ibot = 0.0
    for b in range(B):
        for view in range(2):
            other = (1 - view) * B + b
            dino_global -= (targets[other] * logp[view * B + b]).sum() / B / pairs
            for v in range(batch.local_VBZYX.shape[0]):
                row = logp_local[v * B + b]
                dino_local -= (targets[view * B + b] * row).sum() / B / pairs
            mine = cls[view * B : (view + 1) * B]
            gaps = [np.linalg.norm(mine[b] - mine[j]) for j in range(B) if j != b]
            koleo -= math.log(min(gaps) + 1e-8) / B
    counts = m.sum(1)[m.nonzero()[:, 0]].numpy()
    ibot = float((-(patch_targets * patch_logp).sum(-1) / counts).sum() / (2 * B))
    total = 0.7 * (dino_global + dino_local) + 1.3 * ibot + 0.2 * koleo
    return [total, dino_global, dino_local, ibot, koleo]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_losses_equal_the_formulae_on_full_forwards(shared: bool, recompute: bool) -> None:
    method, batch = small_method(shared=shared, recompute=recompute), small_batch()
    assert (targets_of(method, batch).ibot.weights_PK is not None) == recompute
    got = losses_of(method, batch, teacher_temp=0.05)
    expected = numpy_losses(method, batch, 0.05)
    # float32 network against float64: targets are exp(20 * logits).
    np.testing.assert_allclose([loss.item() for loss in got[:5]], expected, rtol=2e-4)
    assert got.gram.item() == 0  # there is no anchor


@pytest.mark.parametrize("shared", [False, True])
def test_a_uniform_student_gives_ln_of_the_prototypes(shared: bool) -> None:
    method, batch = small_method(shared=shared), small_batch(num_local=8)
    with torch.no_grad():
        for name, parameter in method.student.named_parameters():
            if name.endswith("weight_g"):
                parameter.zero_()
    got = losses_of(method, batch, teacher_temp=0.05)
    assert got.dino_global.item() == pytest.approx(math.log(P_DINO) * 2 / 18, rel=1e-5)
    assert got.dino_local.item() == pytest.approx(math.log(P_DINO) * 16 / 18, rel=1e-5)
    # Two of the six global views are masked.
    patches = P_DINO if shared else P_IBOT
    assert got.ibot.item() == pytest.approx(math.log(patches) * 2 / 6, rel=1e-5)


def test_masked_tokens_do_not_reach_the_teacher() -> None:
    method, batch = small_method(recompute=True), small_batch()
    unmasked = batch._replace(mask_NL=torch.zeros_like(batch.mask_NL))
    with_mask, without = targets_of(method, batch), targets_of(method, unmasked)
    for head in zip(with_mask, without, strict=True):
        assert all(torch.equal(*pair) for pair in zip(*head, strict=True) if pair[0] is not None)
    # The student does see the mask token.
    one = losses_of(method, batch, teacher_temp=0.05)
    other = losses_of(method, unmasked, teacher_temp=0.05)
    assert one.ibot.item() != other.ibot.item()


def test_every_student_parameter_gets_a_gradient_and_no_teacher_parameter_does() -> None:
    method = small_method()
    losses_of(method, small_batch(), teacher_temp=0.05).total.backward()
    without = [n for n, p in method.student.named_parameters() if p.grad is None]
    assert without == []
    zero = [n for n, p in method.student.named_parameters() if not p.grad.abs().sum() > 0]
    assert zero == []
    assert all(p.grad is None for p in method.teacher.parameters())


def test_drop_path_is_a_function_of_its_seed_and_spares_the_teacher() -> None:
    method, batch = small_method(drop=0.5), small_batch()
    losses = []
    for seed in (7, 7, 8):
        rows = [
            draw_kept_rows([seed], depth=2, num_views=2, group_size=3, drop_path=0.5)
            for _ in range(2)
        ]
        losses.append(losses_of(method, batch, teacher_temp=0.05, kept=Kept(*rows)).total.item())
    assert losses[0] == losses[1] != losses[2]
    kept = small_method(drop=0.0)
    targets = [targets_of(m, batch).dino.dense() for m in (method, kept)]
    assert torch.equal(*targets)


@pytest.mark.parametrize(
    "batch",
    [
        small_batch(1),
        small_batch(masked=False),
        small_batch(num_local=0),
        small_batch()._replace(
            global_VBZYX=torch.zeros(2, 3, 8, 16, 16), local_VBZYX=torch.zeros(2, 3, 8, 8, 8)
        ),
    ],
    ids=["one sample", "no masked token", "no local view", "air only"],
)
@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
def test_degenerate_batches_give_finite_losses_and_gradients(
    batch: ViewBatch, centering: str
) -> None:
    method = small_method(centering=centering)
    losses = losses_of(method, batch, teacher_temp=0.05, kept=None)
    losses.total.backward()
    assert all(bool(loss.isfinite()) for loss in losses)
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.student.parameters())


def test_the_softmax_centers_move_by_the_mean_over_all_micro_batches_of_a_sound_step() -> None:
    method = small_method(centering="softmax")
    batches = [small_batch(), small_batch()._replace(global_VBZYX=torch.ones(2, 3, 8, 16, 16))]
    with torch.no_grad():
        encoded = [method.teacher.encode_teacher(batch) for batch in batches]
    means = []
    for batch in batches:
        cls_BD = method.teacher.backbone(batch.global_VBZYX.flatten(0, 1)[:, None]).cls_BD
        means.append(method.teacher.dino_head(cls_BD).logits().mean(0))
    mean_P = torch.stack(means).mean(0)
    targets = method.targets(encoded, 0.05)
    torch.testing.assert_close(targets.mean_logits[0], mean_P)
    center = method.centers[0]
    center.move(targets.mean_logits[0], torch.tensor(True))
    torch.testing.assert_close(center.center_P, 0.1 * mean_P)
    center.move(targets.mean_logits[0], torch.tensor(False))
    torch.testing.assert_close(center.center_P, 0.1 * mean_P)
    center.move(torch.full_like(mean_P, torch.nan), torch.tensor(False))
    torch.testing.assert_close(center.center_P, 0.1 * mean_P)


@pytest.mark.parametrize("shared", [False, True])
def test_sinkhorn_balances_all_micro_batches_of_a_step_together(shared: bool) -> None:
    method, whole = small_method(shared=shared), small_batch(4)
    parts = []
    for b in (slice(0, 2), slice(2, 4)):
        mask_NL = whole.mask_NL.view(2, 4, 8)[:, b].flatten(0, 1)
        count_N1 = mask_NL.sum(1, keepdim=True).clamp(min=1)
        parts.append(
            ViewBatch(
                whole.global_VBZYX[:, b],
                whole.local_VBZYX[:, b],
                mask_NL,
                mask_NL.flatten().nonzero().squeeze(1),
                (1 / count_N1).expand_as(mask_NL)[mask_NL],
                2,
            )
        )
    # 3 and 5 tokens: real micro-batches have equally many, so compare the cls tokens only.
    with torch.no_grad():
        one = method.targets([method.teacher.encode_teacher(whole)], 0.05).of_micro_batches
        rows = [method.teacher.encode_teacher(part)._replace(ibot=None) for part in parts]
        two = method.targets(rows, 0.05).of_micro_batches
    dense_VBP = one[0].dino.dense().view(2, 4, -1)
    for b, part in zip((slice(0, 2), slice(2, 4)), two, strict=True):
        expected_NP = dense_VBP[:, b].flatten(0, 1)
        torch.testing.assert_close(part.dino.dense(), expected_NP, rtol=1e-5, atol=1e-7)


def test_student_and_teacher_start_equal_and_depend_on_the_seed_only() -> None:
    one, again = (
        DinoMethod(
            VitConfig(dim=64, depth=1, image_zyx=(4, 8, 8)),
            HeadsConfig(dino=HeadConfig(num_prototypes=8, bottleneck_dim=4, hidden_dim=8)),
            LossConfig(),
            hu=HuConfig(),
            seed=9,
        )
        for _ in range(2)
    )
    for name, tensor in one.student.state_dict().items():
        assert torch.equal(tensor, one.teacher.state_dict()[name])
        assert torch.equal(tensor, again.student.state_dict()[name])
    weights = one.student.dino_head.mlp[0].weight, one.student.ibot_head.mlp[0].weight
    assert weights[0].shape != weights[1].shape or not torch.equal(*weights)


@pytest.mark.parametrize(
    ("shared", "centering", "dtype"),
    [(False, "sinkhorn", torch.float32), (True, "softmax", torch.bfloat16)],
)
def test_losses_compile_to_one_graph(shared: bool, centering: str, dtype: torch.dtype) -> None:
    batch, temp = small_batch(), torch.tensor(0.05)
    is_exact = dtype == torch.float32
    rows = []
    for compiles in (False, True):
        method = small_method(shared=shared, centering=centering)

        def compiled_losses(temp: Tensor, method: DinoMethod = method) -> Losses:
            with torch.autocast("cpu", dtype=dtype, enabled=not is_exact):
                return losses_of(method, batch, teacher_temp=temp)

        call = torch.compile(compiled_losses, fullgraph=True, backend="aot_eager")
        losses = (call if compiles else compiled_losses)(temp)
        losses.total.backward()
        grads = [p.grad for p in method.student.parameters()] if is_exact else []
        rows.append([*(loss.detach() for loss in losses), *grads])
    for eager, compiled in zip(*rows, strict=True):
        # The graph rounds to bfloat16 at other places.
        limits = {"rtol": 1e-5, "atol": 1e-6} if is_exact else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(compiled, eager, **limits)

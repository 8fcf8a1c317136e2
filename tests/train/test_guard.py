"""The law that lets a step update: against a plain-Python reference, in one graph, bit for bit."""

import dataclasses
import math
import random
import re

import pytest
import torch
from torch import Tensor

from tapct_fast.config import GuardConfig
from tapct_fast.errors import ConfigError
from tapct_fast.train.guard import GuardState, all_finite, explain, judge, start_guard

CONFIG = GuardConfig(spike_loss=2.0, spike_norm=5.0, warmup_steps=3)


def reference(steps: list[tuple[list[float], list[float]]]) -> list[bool]:
    """The same law on Python floats."""
    accepted, loss_mean, norm_means, verdicts = 0, 0.0, [0.0, 0.0], []
    for losses, norms in steps:
        ok = all(map(math.isfinite, losses + norms))
        if ok and accepted >= CONFIG.warmup_steps:
            ok = losses[0] <= loss_mean + CONFIG.spike_loss and all(
                norm <= CONFIG.spike_norm * max(mean, 1e-3)
                for norm, mean in zip(norms, norm_means, strict=True)
            )
        verdicts.append(ok)
        if ok:
            accepted += 1
            weight = 1 / min(accepted, 100)
            loss_mean += weight * (losses[0] - loss_mean)
            norm_means = [m + weight * (n - m) for n, m in zip(norms, norm_means, strict=True)]
    return verdicts


def draw_steps(seed: int, num: int = 300) -> list[tuple[list[float], list[float]]]:
    draw = random.Random(seed)
    steps = []
    for _ in range(num):
        losses = [draw.gauss(8, 0.5), draw.gauss(4, 0.5)]
        norms = [draw.lognormvariate(0, 0.3), draw.lognormvariate(-2, 0.3)]
        if draw.random() < 0.1:
            part = draw.choice([losses, norms])
            part[draw.randrange(2)] = draw.choice([math.nan, math.inf, -math.inf, 14.0, 100.0])
        steps.append((losses, norms))
    return steps


def run_law(steps: list[tuple[list[float], list[float]]]) -> tuple[list[bool], GuardState]:
    state, verdicts = start_guard(2, "cpu"), []
    for losses, norms in steps:
        ok, state = judge(state, torch.tensor(losses), torch.tensor(norms), CONFIG)
        verdicts.append(bool(ok))
    return verdicts, state


@pytest.mark.parametrize("seed", range(5))
def test_verdicts_and_counts_are_those_of_the_reference(seed: int) -> None:
    steps = draw_steps(seed)
    verdicts, state = run_law(steps)
    expected = reference(steps)
    assert verdicts == expected
    assert 0 < expected.count(False) < len(steps)
    assert int(state.accepted) == expected.count(True)
    assert int(state.skipped) == expected.count(False)
    in_a_row = 0
    for ok in expected:
        in_a_row = 0 if ok else in_a_row + 1
    assert int(state.in_a_row) == in_a_row
    healthy = [losses[0] for (losses, _), ok in zip(steps, expected, strict=True) if ok]
    assert float(state.loss_mean) == pytest.approx(sum(healthy[-100:]) / 100, abs=0.3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(4))
def test_a_number_that_is_not_finite_is_refused_from_the_first_step_on(
    bad: float, where: int
) -> None:
    numbers = [8.0, 4.0, 1.0, 0.1]
    numbers[where] = bad
    before = start_guard(2, "cpu")
    kept = [tensor.clone() for tensor in before]
    ok, after = judge(before, torch.tensor(numbers[:2]), torch.tensor(numbers[2:]), CONFIG)
    assert not ok
    assert (int(after.skipped), int(after.in_a_row), int(after.accepted)) == (1, 1, 0)
    assert all(map(torch.equal, before, kept))  # pure
    assert float(after.loss_mean) == 0
    assert after.norm_mean_K.tolist() == [0, 0]


def test_a_step_that_is_not_sound_is_refused_whatever_its_numbers() -> None:
    numbers = torch.tensor([8.0, 4.0]), torch.tensor([1.0, 0.1])
    for is_sound in (True, False):
        ok, after = judge(start_guard(2, "cpu"), *numbers, CONFIG, is_sound=torch.tensor(is_sound))
        assert (bool(ok), int(after.accepted), int(after.skipped)) == (
            is_sound,
            is_sound,
            not is_sound,
        )


def test_nothing_is_a_spike_before_the_warm_up_and_a_fall_is_never_one() -> None:
    calm, jump, fall = ([8.0, 4.0], [1.0, 0.1]), ([80.0, 4.0], [99.0, 0.1]), ([0.1, 0], [0, 0])
    assert run_law([calm, jump, calm])[0] == [True, True, True]
    assert run_law([calm, calm, calm, jump, fall])[0] == [True, True, True, False, True]


def test_a_head_without_tokens_so_far_may_get_a_small_gradient() -> None:
    still, first = ([8.0, 4.0], [1.0, 0.0]), ([8.0, 4.0], [1.0, 0.004])
    assert run_law([still] * 5 + [first])[0] == [True] * 6


def test_one_graph_without_breaks_gives_the_same_bits() -> None:
    compiled = torch.compile(judge, fullgraph=True, backend="aot_eager")
    states = [start_guard(2, "cpu")] * 2
    for losses, norms in draw_steps(9, num=50):
        tensors = torch.tensor(losses), torch.tensor(norms)
        ok, states[0] = judge(states[0], *tensors, CONFIG)
        same, states[1] = compiled(states[1], *tensors, CONFIG)
        assert bool(ok) == bool(same)
        assert all(map(torch.equal, *states))


def test_nothing_is_read_by_the_host() -> None:
    """Meta tensors have no values: whatever asked for one would fail."""
    state = GuardState(*(tensor.to("meta") for tensor in start_guard(2, "cpu")))
    ok, after = judge(state, torch.empty(2, device="meta"), torch.empty(2, device="meta"), CONFIG)
    assert {t.device.type for t in (ok, *after)} == {"meta"}
    assert [t.dtype for t in after] == [t.dtype for t in state]
    assert [t.shape for t in after] == [t.shape for t in state]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_among_many_tensors_is_found(bad: float) -> None:
    tensors: list[Tensor] = [torch.ones(7, 5), torch.full((3,), 1e38), torch.zeros(())]
    assert bool(all_finite(tensors))
    tensors[0][6, 4] = bad
    assert not bool(all_finite(tensors))


@pytest.mark.parametrize(
    ("name", "value"),
    [("spike_loss", 0.0), ("spike_norm", 1.0), ("warmup_steps", 0), ("skip_budget", 0)],
)
def test_a_limit_that_would_refuse_every_step_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"guard\.{name}="):
        dataclasses.replace(CONFIG, **{name: value})


@pytest.mark.parametrize(
    ("losses", "poison", "message"),
    [
        (
            {"total": 30.0},
            "",
            r"^a spike: loss total 30, gradient of the head 2\. Nothing was updat",
        ),
        ({"total": math.nan}, "", r"^not finite: loss total\. .*overflowed on the way"),
        ({"total": math.nan}, "student", r"^not finite: loss total\. .*weights of student are dam"),
        ({"total": 1.0}, "optimizer", r"^not finite: moments of the optimizer\. Nothing was updat"),
        ({"total": math.inf}, "views", r"^not finite: loss total\. .*the views hold NaN"),
        ({"total": 1.0}, "views", r"^not finite: views\. .*the views hold NaN"),
    ],
)
def test_a_refusal_is_told_with_its_cause(
    losses: dict[str, float], poison: str, message: str
) -> None:
    student, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    if poison == "student":
        student.weight.data[1, 2] = math.inf
    if poison == "optimizer":
        optimizer.state[student.bias]["exp_avg_sq"][1] = math.nan
    told = explain(
        losses,
        {"head": 2.0},
        voxels=math.nan if poison == "views" else 0.0,
        networks={"student": student, "teacher": teacher},
        optimizer=optimizer,
    )
    assert re.search(message, told), told

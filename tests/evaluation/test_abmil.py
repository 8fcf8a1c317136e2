import numpy as np
import pytest
import torch

from tapct_fast.evaluation import abmil
from tapct_fast.evaluation.abmil import Attended, GatedAttention, fit_abmil
from tapct_fast.evaluation.scores import auroc


def mil(num: int, seed: int, *, signal: float = 6.0) -> tuple[list[torch.Tensor], np.ndarray, list]:
    """Bags of 4 to 9 windows; in every second one window holds a sign, which says the class."""
    rng = np.random.default_rng(seed)
    bags, targets, windows = [], [], []
    for scan in range(num):
        bag = rng.normal(size=(rng.integers(4, 10), 10))
        window = rng.integers(len(bag))
        if scan % 2:
            bag[window, 3] += signal
        bags.append(torch.from_numpy(bag).float())
        targets.append(scan % 2)
        windows.append(window)
    return bags, np.array(targets), windows


def fitted(num: int, *, seed: int = 0) -> tuple[list[torch.Tensor], np.ndarray, list, list]:
    bags, targets, _ = mil(num, 0)
    predict = fit_abmil(
        bags, np.eye(2)[targets], np.ones(num), [str(i) for i in range(num)], seed=seed
    )
    others, truth, windows = mil(40, 1)
    return [predict(bag) for bag in others], truth, windows, others


def test_forward_is_the_formula_whatever_the_padding() -> None:
    torch.manual_seed(0)
    model = GatedAttention(5, 2, hidden=7).double()
    bags = [torch.randn(n, 5, dtype=torch.float64) for n in (1, 3, 6)]
    padded = torch.nn.utils.rnn.pad_sequence(bags, batch_first=True, padding_value=99.0)
    exists = torch.arange(6) < torch.tensor([[1], [3], [6]])
    out, attention = model(padded, exists)
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    for row, bag in enumerate(bags):
        h = bag.numpy()
        gate = 1 / (1 + np.exp(-(h @ p["gate.weight"].T + p["gate.bias"])))
        logit = (np.tanh(h @ p["tanh.weight"].T + p["tanh.bias"]) * gate) @ p["attention.weight"][0]
        a = np.exp(logit) / np.exp(logit).sum()
        expected = (a @ h) @ p["head.weight"].T + p["head.bias"]
        np.testing.assert_allclose(attention[row, : len(h)].detach(), a, rtol=1e-12)
        assert (attention[row, len(h) :] == 0).all()
        np.testing.assert_allclose(out[row].detach(), expected, rtol=1e-10)


def test_a_shift_of_the_mean_is_found_with_fewer_scans_than_features() -> None:
    rng = np.random.default_rng(0)
    direction = rng.normal(size=384) / 384**0.5

    def bag(target: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(6, 384)) + 1.5 * target * direction).float()

    train, held_out = (np.arange(num) % 2 for num in (80, 100))
    owners = [str(i) for i in range(80)]
    predict = fit_abmil([bag(t) for t in train], np.eye(2)[train], np.ones(80), owners, seed=0)
    scores = np.array([predict(bag(t)).scores_K for t in held_out])
    assert auroc(held_out, scores) > 0.9


def test_the_window_that_decides_gets_the_attention() -> None:
    results, truth, windows, others = fitted(80)
    right = [result.scores_K.argmax() == t for result, t in zip(results, truth, strict=True)]
    assert np.mean(right) > 0.9
    for result, bag in zip(results, others, strict=True):
        assert result.attention_N.shape == (len(bag),)
        assert result.attention_N.sum() == pytest.approx(1)
        assert result.scores_K.sum() == pytest.approx(1)
    found = [
        result.attention_N.argmax() == window
        for result, window, t in zip(results, windows, truth, strict=True)
        if t
    ]
    assert np.mean(found) >= 0.9


def same(a: list[Attended], b: list[Attended], atol: float) -> bool:
    pairs = zip(a, b, strict=True)
    return all(np.allclose(x.scores_K, y.scores_K, rtol=0, atol=atol) for x, y in pairs)


def test_the_seed_decides_and_neither_threads_nor_torchs_own_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(abmil, "NUM_STEPS", 20)
    first = fitted(12)[0]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = fitted(12)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again, 0)
    assert not same(first, fitted(12, seed=1)[0], 1e-3)
    try:
        torch.set_num_threads(2)
        assert same(first, fitted(12)[0], 1e-9)
    finally:
        torch.set_num_threads(1)


def test_values_are_predicted_in_their_unit() -> None:
    rng = np.random.default_rng(0)
    bags = [
        torch.from_numpy(rng.normal(size=(5, 6)) + rng.normal(size=6)).float() for _ in range(90)
    ]
    value = np.array([float(bag[:, 2].mean()) * 100 + 1000 for bag in bags])
    patients = [str(i) for i in range(60)]
    predict = fit_abmil(bags[:60], value[:60, None], np.ones(60), patients, seed=0)
    predicted = np.array([predict(bag).scores_K[0] for bag in bags[60:]])
    assert np.corrcoef(predicted, value[60:])[0, 1] > 0.9
    assert abs(predicted.mean() - value[60:].mean()) < 0.5 * value[60:].std()


def test_too_few_patients_for_a_stop_still_train() -> None:
    bags, targets, _ = mil(8, 0)
    predict = fit_abmil(bags, np.eye(2)[targets], np.ones(8), ["a"] * 8, seed=0)
    assert [predict(bag).scores_K.argmax() for bag in bags] == targets.tolist()
    constant = fit_abmil(bags[:2], np.ones((2, 1)), np.ones(2), ["a", "b"], seed=0)
    assert np.isfinite(constant(bags[0]).scores_K).all()

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tapct_fast.downstream.probe import knn
from tapct_fast.errors import InputError
from tapct_fast.evaluation import heads
from tapct_fast.evaluation.heads import Training, fit_knn, fit_logistic, fit_ridge, inner_folds

WIDTH = 8


def drawn(num: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features of unequal scales, a value that some of them tell in noise, two scans a patient."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, WIDTH)) * 10.0 ** np.arange(-3, 5) + 50
    value = (x[:, 2] - 50) / 0.1 + (x[:, 5] - 50) / 100 + rng.normal(size=num)
    return x, value, [str(i // 2) for i in range(num)]


def folds_of(train: Training, seed: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (fold.train, fold.test) for fold in inner_folds(train.patients, train.class_N, seed=seed)
    ]


def test_ridge_of_values_is_a_grid_search_over_a_pipeline() -> None:
    x, value, patients = drawn(60, 0)
    train = Training(x, value[:, None], np.ones(60), patients)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()),
        {"ridge__alpha": heads.PENALTIES},
        cv=folds_of(train, 3),
        scoring="neg_mean_squared_error",
    ).fit(x, value)
    assert search.best_params_["ridge__alpha"] not in (heads.PENALTIES[0], heads.PENALTIES[-1])
    others = drawn(20, 1)[0]
    got = fit_ridge(train, seed=3)(others)
    np.testing.assert_allclose(got, search.predict(others)[:, None], rtol=1e-9)


def test_ridge_of_values_solves_its_normal_equations() -> None:
    """With one patient there are no inner folds, and the penalty is scikit-learn's 1."""
    x, value, _ = drawn(40, 0)
    got = fit_ridge(Training(x, value[:, None], np.ones(40), ["a"] * 40), seed=0)
    z = (x - x.mean(0)) / x.std(0)
    weight = np.linalg.solve(z.T @ z + np.eye(WIDTH), z.T @ (value - value.mean()))
    np.testing.assert_allclose(got(x)[:, 0], z @ weight + value.mean(), rtol=1e-8)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_logistic_is_a_grid_search_over_a_pipeline_with_balanced_classes(num_classes: int) -> None:
    x, value, patients = drawn(90, 0)
    cuts = [[0.8], [-1.0, 0.8]][num_classes - 2]
    label = np.digitize(value, cuts)
    count = np.bincount(label)
    weight = len(label) / num_classes / count[label]
    assert count.max() > 1.3 * count.min()
    train = Training(x, np.eye(num_classes)[label], weight, patients)

    def loss(model: GridSearchCV, rows: np.ndarray, truth: np.ndarray) -> float:
        share = len(label) / num_classes / count[truth]
        p = model.predict_proba(rows)
        return -log_loss(truth, p, sample_weight=share, normalize=False, labels=range(num_classes))

    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": [1 / penalty for penalty in heads.PENALTIES]},
        cv=folds_of(train, 3),
        scoring=loss,
    ).fit(x, label, logisticregression__sample_weight=weight)
    others = drawn(20, 1)[0]
    got = fit_logistic(train, seed=3)(others)
    # Weights of the inner fits go through both ways alike only where the search passes them on.
    np.testing.assert_allclose(got, search.predict_proba(others), atol=1e-6)
    np.testing.assert_allclose(got.sum(1), 1)


def test_a_class_that_trains_nobody_never_wins() -> None:
    x, value, patients = drawn(40, 0)
    target = np.eye(3)[(value > 0).astype(int) * 2]
    train = Training(x, target, np.ones(40), patients)
    for fit in (fit_logistic, fit_ridge):
        assert 1 not in fit(train, seed=0)(x).argmax(1)
    assert 1 not in fit_knn(train)(x).argmax(1)


def test_ridge_classifies_like_the_sign_of_a_regression() -> None:
    x, value, _ = drawn(40, 0)
    label = (value > 0).astype(int)
    got = fit_ridge(Training(x, np.eye(2)[label], np.ones(40), ["a"] * 40), seed=0)(x)
    expected = make_pipeline(StandardScaler(), Ridge(1.0)).fit(x, 2 * label - 1).predict(x)
    np.testing.assert_allclose(got[:, 1], expected, atol=1e-10)
    np.testing.assert_allclose(got[:, 0], -expected, atol=1e-10)


def test_knn_is_that_of_the_patch_probe() -> None:
    rng = np.random.default_rng(0)
    x, others, label = rng.normal(size=(50, 6)), rng.normal(size=(20, 6)), rng.integers(3, size=50)
    got = fit_knn(Training(x, np.eye(3)[label], np.ones(50), [str(i) for i in range(50)]))(others)
    tables = [torch.from_numpy(t) for t in (x, label, others)]
    assert got.argmax(1).tolist() == knn(*tables).tolist()


def test_knn_of_values_is_their_weighted_mean() -> None:
    x = np.array([[1.0, 0.0], [0.0, 1.0]])
    predict = fit_knn(Training(x, np.array([[10.0], [20.0]]), np.ones(2), ["a", "b"]))
    near, far = np.exp(0.6 / 0.07), np.exp(0.8 / 0.07)
    expected = (10 * near + 20 * far) / (near + far)
    assert predict(np.array([[3.0, 4.0]]))[0, 0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fit", [fit_logistic, fit_ridge])
def test_the_order_of_patients_names_and_a_constant_feature_do_not_matter(
    fit: Callable[..., heads.Predict],
) -> None:
    x, value, patients = drawn(40, 0)
    train = Training(x, np.eye(2)[(value > 0).astype(int)], np.ones(40), patients)
    wide = train._replace(x_ND=np.c_[x, np.full(40, 7.0)])
    got, with_constant = fit(train, seed=1), fit(wide, seed=1)
    np.testing.assert_allclose(with_constant(np.c_[x, np.full(40, 9.0)]), got(x), atol=1e-6)


def test_inner_folds_keep_patients_and_classes_together() -> None:
    label = np.array([0] * 9 + [1])
    folds = inner_folds([str(i) for i in range(10)], label, seed=0)
    assert all(len(set(label[list(fold.train)])) == 2 for fold in folds)
    assert len(folds) == heads.INNER_FOLDS - 1  # one fold would train on class 0 only
    assert inner_folds(["a", "a"], None, seed=0) == []


def test_logistic_refuses_values_and_one_class() -> None:
    x, value, patients = drawn(10, 0)
    for target in (value[:, None], np.eye(2)[np.zeros(10, int)]):
        with pytest.raises(InputError, match="two classes"):
            fit_logistic(Training(x, target, np.ones(10), patients), seed=0)

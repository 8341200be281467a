"""Paths of l1 penalties: each fit is the optimum over all features, as in glmnet's paths."""

import contextlib

import numpy as np
import pytest
from scipy.special import log_softmax
from sparse_rows import sparse_rows
from test_regression_penalties import assert_optimal

import softjax
from softjax import regression
from softjax.regression import _host_path, _l1_path, _solve

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]
N, D, K, TOL = 100, 24, 3, 1e-8


def drawn(width=D):
    rng = np.random.default_rng(width)
    x = rng.normal(size=(N, width)) * 2.0 ** rng.integers(-1, 2, width) + rng.normal(size=width)
    x = np.where(rng.random(x.shape) < 0.5, 0, x)
    kernel = np.where(np.arange(width)[:, None] < 4, rng.normal(size=(width, K)), 0)
    return x, np.argmax(x @ kernel + rng.gumbel(size=(N, K)), 1)


@pytest.fixture
def few_columns(monkeypatch):
    """Buckets so small that features are left out of data as small as these."""
    monkeypatch.setattr(_l1_path, "FEWEST", 6)  # and then 24, all of them: two programs a path


@pytest.fixture
def never_compiled(monkeypatch):
    """Paths in the memory of the host alone, with nothing left to a compiled solver."""
    monkeypatch.setattr(_l1_path.Path, "_among", None)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_fit_of_a_path_is_the_optimum_among_all_features(
    grouped, sparse, compiled, few_columns, monkeypatch, request
):
    """In NumPy and compiled, with a feature that has no penalty."""
    if compiled:
        monkeypatch.setattr(_host_path, "takes", lambda _: False)
    else:
        request.getfixturevalue("never_compiled")
    x, labels = drawn()
    factors = np.where(np.arange(D) == 7, 0.0, 1 + np.arange(D) % 3 / 2)
    options = {"grouped": grouped, "penalty_factors": factors}
    largest = regression.largest_l1(x, labels, tol=1e-10, **options)
    grid = largest * np.array([0.05, 1.0001, 0.5, 0.2, 0.999])
    features = sparse_rows(x) if sparse else x
    path = regression.fit_path(features, labels, l1=grid, l2=0.01, folds=None, tol=TOL, **options)
    assert path.fits.converged.all()
    for i, l1 in enumerate(grid):
        assert_optimal(path.params_at(i), x, labels, l1, 0.01, factors, grouped, tol=1e-6)
    inside = np.any(np.asarray(path.fits.params.kernel) != 0, -1)
    # What is not penalised alone, and one more right below.
    assert inside[1].sum() == 1
    assert inside[4].sum() == 2
    entry = np.asarray(path.entry)
    order = np.argsort(-grid)
    for j in range(D):
        there = np.flatnonzero(inside[order, j])
        assert entry[j] == (there[0] if len(there) else len(grid))
    explained = np.asarray(path.deviance_explained)
    np.testing.assert_allclose(explained[1], 0, atol=1e-6)
    assert np.all(np.diff(explained[order]) > 0)


def test_models_of_every_kind_are_at_their_optimum(never_compiled):
    """Offsets, no intercept, weights, soft labels, equal columns, columns of ones; in one dtype."""
    for seed in range(16):
        rng = np.random.default_rng(seed)
        count, width, classes = 40, (3, 30)[seed % 2], 2 + seed % 4
        x = rng.normal(size=(count, width)) * 2.0 ** rng.integers(-3, 4, width)
        x += rng.normal(size=width) * rng.choice([0, 10])
        if seed % 3 == 0:
            x[:, 0], x[:, -1] = 1, 2 * x[:, 1]
        soft = rng.dirichlet(np.ones(classes), size=count)
        labels = soft if seed % 4 == 1 else np.argmax(soft, 1) * (np.arange(count) >= classes)
        if seed % 4 != 1:
            labels[:classes] = np.arange(classes)
        chosen = {
            "offset": rng.normal(size=(count, classes)),
            "sample_weights": rng.uniform(0.1, 2, count),
            "class_weights": rng.uniform(0.1, 2, classes),
        }
        options = {name: value for name, value in chosen.items() if rng.random() < 0.5}
        options |= {"fit_intercept": bool(rng.random() < 0.7), "num_classes": classes}
        grouped, l2 = bool(rng.random() < 0.4), rng.choice([0.0, 1e-3])
        grid = regression.largest_l1(x, labels, grouped=grouped, **options) * np.array([0.5, 0.05])
        path = regression.fit_path(
            x, labels, l1=grid, l2=l2, folds=None, tol=1e-7, grouped=grouped, **options
        )
        assert path.fits.converged.all(), seed
        for i, l1 in enumerate(grid):
            slopes = subgradient(path.params_at(i), x, labels, l1, l2, grouped, options)
            assert np.max(slopes) < 3e-7, seed


def subgradient(params, x, labels, l1, l2, grouped, options):
    """The smallest one, relative to what the gradient can be at most, in NumPy."""
    kernel, bias = (np.asarray(part, np.float64) for part in params)
    classes = len(bias)
    weights = options.get("sample_weights", np.ones(len(x)))
    q = labels if labels.ndim == 2 else np.eye(classes)[labels]
    q = q * options.get("class_weights", np.ones(classes)) * (weights / weights.mean())[:, None]
    q, mass = q / q.sum(), q.sum() / len(x)
    z = x @ kernel + bias + options.get("offset", 0)
    residual = q.sum(1, keepdims=True) * np.exp(log_softmax(z, 1)) - q
    gradient, l1 = x.T @ residual + l2 / mass * kernel, l1 / mass
    axis = 1 if grouped else ()
    length, size = (np.sqrt(np.sum(a * a, axis, keepdims=True)) for a in (kernel, gradient))
    outside = gradient * np.maximum(1 - l1 / np.where(size > 0, size, np.inf), 0)
    inside = gradient + l1 * kernel / np.where(length > 0, length, 1)
    bound = np.sqrt(q.sum(1) @ (x * x))[:, None]
    slopes = np.abs(np.where(length > 0, inside, outside)) / bound
    return np.append(slopes, np.abs(residual.sum(0)) * options["fit_intercept"])


def test_the_deviance_explained_is_that_of_the_loss(few_columns):
    x, labels = drawn()
    path = regression.fit_path(x, labels, l1=[0.02, 0.05], folds=None, tol=TOL)
    shares = np.bincount(labels) / N
    null = -np.sum(shares * np.log(shares))
    for i in range(2):
        params = path.params_at(i)
        z = x @ np.asarray(params.kernel) + np.asarray(params.bias)
        loss = -log_softmax(z, 1)[np.arange(N), labels].mean()
        np.testing.assert_allclose(path.deviance_explained[i], 1 - loss / null, rtol=1e-9)
        np.testing.assert_allclose(
            path.fits.objective[i], loss + [0.02, 0.05][i] * np.abs(params.kernel).sum(), rtol=1e-9
        )


def test_cross_validation_along_a_path(few_columns):
    x, labels = drawn()
    folds, grid = np.arange(N) % 3, np.array([0.1, 0.01, 0.03])
    seen = []
    path = regression.fit_path(
        x, labels, l1=grid, folds=folds, tol=TOL, callback=lambda event: seen.append(event.done)
    )
    assert seen == list(range(13))
    validated = path.cross_validation
    assert validated.loss.shape == validated.accuracy.shape == (3, 3)
    for p, l1 in enumerate(grid):
        for fold in range(3):
            rest, out = folds != fold, folds == fold
            alone = regression.fit(x[rest], labels[rest], l1=l1, tol=TOL).params
            z = regression.logits(alone, x[out])
            loss = softjax.cross_entropy(z, labels[out]).mean()
            np.testing.assert_allclose(validated.loss[p, fold], loss, rtol=1e-5)
    assert grid[path.best_within_one_standard_error] >= grid[path.best]


def test_a_callback_stops_a_path(few_columns):
    x, labels = drawn()
    path = regression.fit_path(
        x, labels, l1=[0.1, 0.05, 0.02], folds=2, callback=lambda event: event.done == 2
    )
    assert path.fits.stop_reason == ["converged", "converged", "callback"]
    assert np.isfinite(path.cross_validation.loss).all()


def test_the_strong_rule_is_only_where_to_begin(few_columns, monkeypatch):
    """With a rule that leaves everything out the violations alone bring the features in."""
    x, labels = drawn()

    def at(path, step, before, l1, l2):
        return path._fitted(step.fit.params, np.zeros(D, bool), l1, l2)

    monkeypatch.setattr(_l1_path.Path, "at", at)
    path = regression.fit_path(x, labels, l1=[0.05, 0.02], folds=None, tol=TOL)
    for i, l1 in enumerate((0.05, 0.02)):
        assert_optimal(path.params_at(i), x, labels, l1, tol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"l1": 0.1}, "`l1`"),
        ({"l1": [0.1, -1.0]}, "`l1`"),
        ({"l1": [0.1, 1.0], "l2": [0.1, 1.0, 2.0]}, "`l1`"),
        ({"l2": [0.1, 1.0], "grouped": True}, "`grouped`"),
        ({"l2": [0.1, 1.0], "folds": None}, "`folds`"),
    ],
)
def test_refusals(options, named):
    x, labels = drawn()
    with pytest.raises((TypeError, ValueError), match=named):
        regression.fit_path(x, labels, **options)


@pytest.mark.parametrize("grouped", [False, True])
def test_no_feature_is_in_the_model_at_the_largest_penalty(grouped, dtype):
    """However it was rounded: a share of it, of any size, is put together again."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = (rng.normal(size=(80, 4)) * [1, 5, 0.1, 1] + rng.normal(size=4)).astype(dtype)
        y, alpha = rng.integers(3, size=80), rng.uniform(0.1, 1)
        grid = np.array([1.0, 0.5]) * (regression.largest_l1(x, y, grouped=grouped) / alpha)
        path = regression.fit_path(
            x, y, l1=alpha * grid, l2=(1 - alpha) * grid, grouped=grouped, folds=None
        )
        assert not np.asarray(path.fits.params.kernel[0]).any()
        assert np.asarray(path.fits.params.kernel[1]).any()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_fit_in_numpy_leaves_constant_and_equal_features_without_a_penalty(grouped, monkeypatch):
    """Their parameters could have any size, and the objective of these would be another one."""
    left = []
    monkeypatch.setattr(_host_path._active_set, "optimum", lambda *_: left.append(0))
    x, labels = drawn(4)
    for column, seen in ((np.full(N, -7.0), False), (x[:, 1], False), (np.arange(N) % 3, True)):
        x[:, 0] = column
        factors = np.array([0.0, 0.0, 1.0, 1.0])
        regression.fit(x, labels, l1=0.1, grouped=grouped, penalty_factors=factors, max_steps=1)
        assert bool(left) == seen  # a second attempt with decreasing penalties may follow


@pytest.mark.parametrize("grouped", [False, True])
def test_a_loose_tolerance_is_kept_beside_one_huge_entry(grouped, monkeypatch):
    """A gradient that is small relative to the huge feature proves nothing about the others."""
    monkeypatch.setattr(_solve, "Run", None)  # nothing is left to a compiled solver
    converged = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(5, 31))
        x = rng.normal(size=(n, 3))
        labels = np.argmax(x @ rng.normal(size=(3, K)) + rng.gumbel(size=(n, K)), 1)
        x[rng.integers(n), 0] = 10.0 ** rng.integers(2, 6)
        penalty = {"l1": 10 ** rng.uniform(-4, -2), "l2": 10 ** rng.uniform(-3, -1)}
        fits = []
        for tol in (1e-4, 1e-9):
            with contextlib.suppress(TypeError):  # from `Run`: the end is not clear
                fits.append(
                    regression.fit(x, labels, num_classes=K, grouped=grouped, tol=tol, **penalty)
                )
        if len(fits) == 2:
            converged += 1
            loose, tight = (fit.objective for fit in fits)
            assert loose <= tight * (1 + 4e-4), seed
    assert converged >= 6

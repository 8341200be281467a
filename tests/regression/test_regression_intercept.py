"""Models without an intercept and with an offset: all fits and their statistics.

The gradient of the objective is computed independently, in NumPy, from the parameters of a fit.
"""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sparse_rows import sparse_rows
from statsmodels.discrete.discrete_model import MNLogit

import softjax
from softjax import regression
from softjax.regression import _host_folds, _host_newton, inference

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]
N, D, K, L2 = 120, 4, 3, 0.02
SOLVERS = ("newton-cg", "newton", "lbfgs", "proximal")


def drawn(examples=N, width=D):
    """Features far from 0, labels of all classes, and an offset."""
    rng = np.random.default_rng(examples + width)
    x = rng.normal(size=(examples, width)) + 4 * rng.normal(size=width)
    kernel = rng.normal(size=(width, K)) / width**0.5
    labels = np.argmax((x - x.mean(0)) @ kernel + rng.gumbel(size=(examples, K)), 1)
    return x, labels, rng.normal(size=(examples, K))


def gradient(params, x, labels, l2=L2, offset=0.0, weights=None):
    """Of the objective: kernel [D, K] and bias [K]."""
    kernel, bias = map(np.asarray, params)
    weights = np.ones(len(x)) if weights is None else weights
    p = np.exp(log_softmax(x @ kernel + bias + offset, 1))
    residual = weights[:, None] * (p - np.eye(K)[labels]) / weights.sum()
    return x.T @ residual + l2 * kernel, residual.sum(0)


def assert_optimal(params, *args, intercept=False, **kwargs):
    kernel, bias = gradient(params, *args, **kwargs)
    np.testing.assert_allclose(kernel, 0, atol=1e-8)
    if intercept:
        np.testing.assert_allclose(bias, 0, atol=1e-8)
    else:
        assert np.all(np.asarray(params.bias) == 0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(N, D), (20, 50)])
def test_without_an_intercept_the_kernel_is_that_of_scikit_learn(solver, shape):
    x, labels, _ = drawn(*shape)
    result = regression.fit(x, labels, solver=solver, l2=L2, fit_intercept=False, tol=1e-10)
    peer = LogisticRegression(
        C=1 / (L2 * len(x)), fit_intercept=False, solver="newton-cholesky", tol=1e-12
    ).fit(x, labels)
    assert result.converged
    np.testing.assert_allclose(result.params.kernel, peer.coef_.T, atol=1e-8)
    assert np.all(np.asarray(result.params.bias) == 0)


@pytest.mark.parametrize("intercept", [False, True])
def test_the_offset_is_part_of_the_logits_in_every_fit(intercept, monkeypatch):
    x, labels, offset = drawn()
    options = {"fit_intercept": intercept, "offset": offset, "tol": 1e-10}
    for solver in SOLVERS:
        result = regression.fit(x, labels, solver=solver, l2=L2, **options)
        assert result.converged
        assert_optimal(result.params, x, labels, offset=offset, intercept=intercept)
    with monkeypatch.context() as compiled:
        compiled.setattr(_host_newton, "takes", lambda *_: False)
        sparse = regression.fit(sparse_rows(x), labels, l2=L2, **options)
    assert_optimal(sparse.params, x, labels, offset=offset, intercept=intercept)

    weights = np.stack([np.ones(N), np.arange(N) % 3])
    many = regression.fit_many(x, labels, l2=L2, sample_weights=weights, **options)
    for lane, w in enumerate(weights):
        params = jax.tree.map(lambda leaf, lane=lane: leaf[lane], many.params)
        assert_optimal(params, x, labels, offset=offset, weights=w, intercept=intercept)

    folds = np.arange(N) % 2
    for most in (_host_folds.MOST_WORK, 0):  # in NumPy, and compiled
        monkeypatch.setattr(_host_folds, "MOST_WORK", most)
        path = regression.fit_path(x, labels, l2=np.array([L2, 1.0]), folds=folds, **options)
        fold = jax.tree.map(lambda leaf: leaf[0, 1], path.cross_validation.fits.params)
        assert_optimal(fold, x, labels, offset=offset, weights=1.0 - folds, intercept=intercept)
        z = regression.logits(fold, x, offset=offset)
        held_out = softjax.cross_entropy(z, labels)[folds == 1].mean()
        np.testing.assert_allclose(path.cross_validation.loss[0, 1], held_out, rtol=1e-12)


def test_fits_of_other_kinds_have_no_bias():
    x, labels, offset = drawn()
    exact = regression.fit(x, labels, l2=L2, fit_intercept=False)
    optax = regression.fit(x, labels, solver="optax", l2=L2, fit_intercept=False)
    rows = softjax.streaming.ArrayRows(x, labels)
    streamed = softjax.streaming.fit(rows, num_classes=K, l2=L2, fit_intercept=False)
    for result in (optax, streamed):
        assert np.all(np.asarray(result.params.bias) == 0)
        np.testing.assert_allclose(result.params.kernel, exact.params.kernel, atol=1e-3)
    batches = regression.fit(x, labels, batch_size=32, epochs=1, fit_intercept=False, offset=offset)
    assert np.all(np.asarray(batches.params.bias) == 0)


def test_firth_without_an_intercept_is_the_optimum_of_the_penalised_likelihood():
    x, labels, offset = drawn()
    firth = regression.fit(
        x, labels, solver="firth", fit_intercept=False, offset=offset, tol=1e-9
    ).params

    def objective(kernel):
        params = regression.SoftmaxRegression(kernel, np.zeros(K))
        information = regression.fisher_information(params, x, offset=offset)
        information = information[: D * K, : D * K].reshape(D, K, D, K)[:, :-1, :, :-1]
        determinant = np.linalg.slogdet(information.reshape(D * (K - 1), -1))[1]
        loss = regression.objective(params, x, labels, offset=offset)
        return loss - determinant / (2 * N)

    kernel, rng = np.asarray(firth.kernel), np.random.default_rng(0)
    assert np.all(np.asarray(firth.bias) == 0)
    for _ in range(3):  # the slope in directions whose sum over the classes is 0
        d = rng.normal(size=kernel.shape)
        d = 1e-4 * (d - d.mean(1, keepdims=True))
        slope = (objective(kernel + d) - objective(kernel - d)) / 2e-4
        assert abs(slope) < 1e-6


def test_a_feature_of_ones_is_an_intercept():
    x, labels, _ = drawn()
    ones = np.column_stack([x, np.ones(N)])
    with_bias = regression.fit(x, labels, tol=1e-9).params
    without = regression.fit(ones, labels, fit_intercept=False, tol=1e-9).params
    probabilities = regression.predict_proba(with_bias, x)
    np.testing.assert_allclose(regression.predict_proba(without, ones), probabilities, atol=1e-7)
    v = inference.covariance(with_bias, x, labels)
    other = inference.covariance(without, ones, labels, fit_intercept=False)
    size = (D + 1) * K
    np.testing.assert_allclose(other[:size, :size], v, rtol=1e-5, atol=1e-9)
    assert not np.asarray(other)[size:].any()
    assert not np.asarray(other)[:, size:].any()
    left_out = regression.leave_one_out(with_bias, x, labels)
    others = regression.leave_one_out(without, ones, labels, fit_intercept=False)
    np.testing.assert_allclose(others, left_out, atol=1e-5)


def test_statistics_without_an_intercept_are_those_of_statsmodels():
    x, labels, _ = drawn()
    params = regression.fit(x, labels, fit_intercept=False, tol=1e-9).params
    peer = MNLogit(labels, x).fit(disp=0, tol=1e-12, maxiter=100)
    v = inference.covariance(params, x, labels, fit_intercept=False)
    table = inference.coefficients(params, v, reference=0)
    np.testing.assert_allclose(table.value[:-1], peer.params, rtol=1e-6)
    np.testing.assert_allclose(table.standard_error[:-1], peer.bse, rtol=1e-6)
    fit = inference.goodness_of_fit(params, x, labels, fit_intercept=False)
    np.testing.assert_allclose(fit.log_likelihood, peer.llf, rtol=1e-9)
    assert fit.num_parameters == D * (K - 1)
    np.testing.assert_allclose(fit.null_log_likelihood, -N * np.log(K), rtol=1e-12)
    summary = inference.summary(params, x, labels, fit_intercept=False)
    assert {row["feature"] for row in summary.rows} == {f"x{j}" for j in range(D)}


def test_a_part_of_the_model_that_is_held_is_an_offset():
    """The rest of the model is what it was: parameters, likelihood, predictions, statistics."""
    x, labels, _ = drawn()
    whole = regression.fit(x, labels, tol=1e-10).params
    offset = x[:, 2:] @ np.asarray(whole.kernel)[2:]
    rest = regression.fit(x[:, :2], labels, offset=offset, tol=1e-10).params
    probabilities = regression.predict_proba(rest, x[:, :2], offset=offset)
    np.testing.assert_allclose(probabilities, regression.predict_proba(whole, x), atol=1e-7)
    likelihood = inference.log_likelihood(rest, x[:, :2], labels, offset=offset)
    np.testing.assert_allclose(likelihood, inference.log_likelihood(whole, x, labels), rtol=1e-12)
    information = regression.fisher_information(whole, x).reshape(D + 1, K, D + 1, K)
    held = np.r_[0, 1, D]
    v = inference.covariance(rest, x[:, :2], labels, offset=offset)
    information = information[held][:, :, held][:, 1:, :, 1:].reshape(3 * (K - 1), -1)
    contrast = v.reshape(3, K, 3, K)
    contrast = contrast - contrast[:, :1]
    contrast = (contrast - contrast[:, :, :, :1])[:, 1:, :, 1:]
    inverse = np.linalg.inv(information)
    np.testing.assert_allclose(contrast.reshape(inverse.shape), inverse, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_null_model_has_the_bias_and_the_offset(size):
    x, labels, offset = drawn()
    offset, nothing = size * offset, np.zeros((N, 0))
    params = regression.init(D, K)
    fit = inference.goodness_of_fit(params, x, labels, offset=offset)
    null = regression.fit(nothing, labels, offset=offset, tol=1e-9).params
    expected = inference.log_likelihood(null, nothing, labels, offset=offset)
    np.testing.assert_allclose(fit.null_log_likelihood, expected, rtol=1e-9)
    fit = inference.goodness_of_fit(params, x, labels, offset=offset, fit_intercept=False)
    np.testing.assert_allclose(fit.null_log_likelihood, fit.log_likelihood, rtol=1e-12)


def test_the_optimum_is_differentiable_in_the_offset():
    x, labels, offset = drawn()

    def first(offset):
        return regression.fit(
            x, labels, l2=L2, offset=offset, num_classes=K, fit_intercept=False
        ).params.kernel[0, 0]

    slope = jax.jit(jax.grad(first))(offset)
    moved = np.zeros_like(offset)
    moved[3, 1] = 1e-4
    difference = (first(offset + moved) - first(offset - moved)) / 2e-4
    np.testing.assert_allclose(slope[3, 1], difference, rtol=1e-4, atol=1e-7)


def test_without_an_intercept_a_class_may_lack_examples():
    x, labels, _ = drawn()
    result = regression.fit(x, labels, l2=L2, num_classes=K + 1, fit_intercept=False, tol=1e-9)
    assert result.converged


def test_what_separates_is_the_model_and_not_its_offset():
    x, labels, _ = drawn()
    sure = 50.0 * np.eye(K)[labels]
    result = regression.fit(x, labels, l2=L2, offset=sure, fit_intercept=False)
    assert not result.separated
    apart = np.eye(K)[labels]
    result = regression.fit(apart, labels, offset=-sure / 10, fit_intercept=False)
    assert result.stop_reason == "separated"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"offset": np.zeros((N, K + 1))}, "`offset`"),
        ({"offset": np.full((N, K), np.nan)}, "`offset`"),
        ({"fit_intercept": 1}, "`fit_intercept`"),
        ({"fit_intercept": False, "init": regression.SoftmaxRegression(0, 1)}, "`init"),
        ({"offset": np.zeros((N, K)), "validation": (np.zeros((2, D)), [0, 1])}, "`validation`"),
    ],
)
def test_refusals(options, named):
    x, labels, _ = drawn()
    if "init" in options:
        init = regression.SoftmaxRegression(np.zeros((D, K)), np.ones(K))
        options = options | {"init": init}
    with pytest.raises((TypeError, ValueError), match=named):
        regression.fit(x, labels, **options)

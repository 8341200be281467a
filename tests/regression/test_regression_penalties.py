"""Penalty factors, elastic net and the grouped penalty: the conditions of the optimum, recomputed.

    |g_jk| <= f_j l1 where kernel_jk is 0, and g_jk + f_j l1 sign(kernel_jk) = 0 elsewhere,
    |g_j|_2 <= f_j l1 where kernel_j is 0, and g_j + f_j l1 kernel_j / |kernel_j|_2 = 0 elsewhere

where g is the gradient of the loss and the squared penalty, computed in NumPy from the parameters
of a fit.
"""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from sparse_rows import sparse_rows

from softjax import regression
from softjax.regression import inference

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]
N, D, K = 120, 8, 3


def drawn(examples=N, width=D):
    """Features far from 0 of several scales, and labels that a few of them explain."""
    rng = np.random.default_rng(examples + width)
    x = rng.normal(size=(examples, width)) * 2.0 ** rng.integers(-2, 3, width) + 3
    kernel = (
        np.where(np.arange(width)[:, None] < 3, rng.normal(size=(width, K)), 0) / x.std(0)[:, None]
    )
    return x, np.argmax((x - x.mean(0)) @ kernel + rng.gumbel(size=(examples, K)), 1)


FACTORS = np.array([0.0, 1.0, 0.5, 2.0, 1.0, 3.0, 0.0, 1.0])


def gradient(params, x, labels, l2=0.0, factors=1.0):
    kernel, bias = map(np.asarray, params)
    residual = (np.exp(log_softmax(x @ kernel + bias, 1)) - np.eye(K)[labels]) / len(x)
    factors = np.broadcast_to(factors, len(kernel))[:, None]
    return x.T @ residual + l2 * factors * kernel, residual.sum(0)


def assert_optimal(params, x, labels, l1=0.0, l2=0.0, factors=1.0, grouped=False, tol=1e-7):
    """Relative to the root mean square of each feature, as a fit judges its gradient."""
    kernel = np.asarray(params.kernel)
    g, of_bias = gradient(params, x, labels, l2, factors)
    threshold = l1 * np.broadcast_to(factors, len(kernel))[:, None]
    size = np.sqrt((x**2).mean(0))[:, None]
    unit = np.linalg.norm(kernel, axis=1, keepdims=True) if grouped else np.abs(kernel)
    zero = unit == 0
    inside = g + threshold * np.where(zero, 0, kernel / np.where(zero, 1, unit))
    np.testing.assert_allclose(np.where(zero, 0, inside) / size, 0, atol=tol)
    held = np.linalg.norm(g, axis=1, keepdims=True) if grouped else np.abs(g)
    assert np.all(np.where(zero, held - threshold, 0) <= tol * size)
    np.testing.assert_allclose(of_bias, 0, atol=tol)


@pytest.mark.parametrize("solver", ["newton-cg", "newton", "lbfgs", "proximal"])
def test_factors_of_a_squared_penalty(solver):
    x, labels = drawn()
    options = {"l2": 0.1, "penalty_factors": FACTORS, "tol": 1e-10}
    result = regression.fit(x, labels, solver=solver, **options)
    assert result.converged
    assert_optimal(result.params, x, labels, l2=0.1, factors=FACTORS)


def test_factors_where_there_are_fewer_examples_than_features():
    x, labels = drawn(20, 48)
    factors = np.tile(FACTORS, 6)
    result = regression.fit(x, labels, l2=0.1, penalty_factors=np.maximum(factors, 0.1), tol=1e-10)
    assert result.converged
    assert_optimal(result.params, x, labels, l2=0.1, factors=np.maximum(factors, 0.1))


def test_factors_of_many_fits():
    x, labels = drawn()
    options = {"penalty_factors": FACTORS, "tol": 1e-10}
    many = regression.fit_many(x, labels, l2=np.array([0.1, 1.0]), **options)
    for lane, l2 in enumerate((0.1, 1.0)):
        params = jax.tree.map(lambda leaf, lane=lane: leaf[lane], many.params)
        assert_optimal(params, x, labels, l2=l2, factors=FACTORS)
    sparse = regression.fit_many(sparse_rows(x), labels, l2=np.array([0.1, 1.0]), **options)
    np.testing.assert_allclose(sparse.params.kernel, many.params.kernel, atol=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_penalties_with_corners(grouped, l2):
    x, labels = drawn()
    for features in (x, sparse_rows(x)):
        for factors in (None, FACTORS):
            result = regression.fit(
                features,
                labels,
                l1=0.03,
                l2=l2,
                grouped=grouped,
                penalty_factors=factors,
                tol=1e-8,
            )
            assert result.converged
            f = 1.0 if factors is None else factors
            assert_optimal(result.params, x, labels, 0.03, l2, f, grouped)
            zero = np.asarray(result.params.kernel) == 0
            assert zero.any()
            assert not zero[[0, 6]].any() or factors is None
            if grouped:
                assert np.all(zero.all(1) == zero.any(1))


def test_a_grouped_penalty_that_is_large_enough_leaves_the_class_shares():
    x, labels = drawn()
    result = regression.fit(x, labels, l1=100.0, grouped=True)
    assert result.converged
    assert not np.asarray(result.params.kernel).any()
    shares = np.bincount(labels) / N
    np.testing.assert_allclose(jax.nn.softmax(result.params.bias), shares, rtol=1e-5)


def test_the_optimum_is_differentiable_in_a_grouped_penalty_and_its_factors():
    """In others it is in test_regression_traced.py, in both modes."""
    x, labels = drawn()
    f = np.maximum(FACTORS, 0.5)

    def first(l1, factors, tol=1e-6):
        options = {"l2": 0.01, "grouped": True, "num_classes": K, "tol": tol}
        fit = regression.fit(x, labels, l1=l1, penalty_factors=factors, **options)
        return fit.params.kernel[0, 0]

    slopes = jax.jit(jax.grad(first, (0, 1)))(0.02, f)
    step = 1e-5

    def change(l1, factors):
        ahead = first(0.02 + step * l1, f + step * factors, 1e-11)
        return (ahead - first(0.02 - step * l1, f - step * factors, 1e-11)) / (2 * step)

    unit = np.eye(D)[0]
    np.testing.assert_allclose(slopes[0], change(1, 0 * unit), rtol=1e-3)
    np.testing.assert_allclose(slopes[1][0], change(0, unit), rtol=1e-3)


def test_features_that_no_penalty_holds_may_separate_the_classes():
    x, labels = drawn()
    apart = np.column_stack([x, labels == 0, labels == 1])
    factors = np.append(np.ones(D), [0.0, 0.0])
    assert regression.fit(apart, labels, l2=0.1).stop_reason == "converged"
    result = regression.fit(apart, labels, l2=0.1, penalty_factors=factors)
    assert result.stop_reason == "separated"
    partly = np.column_stack([x, (labels == 0) & (np.arange(N) % 4 == 0), labels == 1])
    factors[-1] = 1
    result = regression.fit(partly, labels, l2=0.1, penalty_factors=factors)
    assert result.stop_reason == "quasi-separated"


def test_statistics_take_a_penalty_for_each_feature():
    x, labels = drawn()
    l2 = 0.1 * FACTORS
    params = regression.fit(x, labels, l2=0.1, penalty_factors=FACTORS, tol=1e-10).params
    g = regression.gradient(params, x, labels, l2=l2)
    np.testing.assert_allclose(g.kernel, 0, atol=1e-8)
    slope = jax.grad(lambda p: regression.objective(p, x, labels, l2=l2))(params)
    np.testing.assert_allclose(slope.kernel, g.kernel, atol=1e-12)
    h = regression.hessian(params, x, labels, l2=l2)
    plain = regression.hessian(params, x, labels)
    added = np.append(np.repeat(l2, K), np.zeros(K))
    np.testing.assert_allclose(h - plain, np.diag(added), atol=1e-12)
    # On what sums to 0 over the classes: the pseudo-inverse of the centred Hessian, around I.
    v = inference.covariance(params, x, labels, l2=l2)
    centring = np.kron(np.eye(D + 1), np.eye(K) - 1 / K)
    inverse = np.linalg.pinv(N * centring @ np.asarray(h) @ centring, rcond=1e-10)
    information = regression.fisher_information(params, x)
    np.testing.assert_allclose(v, inverse @ information @ inverse, rtol=1e-5, atol=1e-10)
    left_out = regression.leave_one_out(params, x, labels, l2=l2)
    others = np.arange(1, N)
    again = regression.fit(x[others], labels[others], l2=0.1, penalty_factors=FACTORS, init=params)
    np.testing.assert_allclose(left_out[0] - left_out[0].mean(), *centred(again.params, x[0]))


def centred(params, row):
    z = np.asarray(regression.logits(params, row))
    return (z - z.mean(), 0.05, 0.01)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"penalty_factors": np.ones(D + 1)}, "`penalty_factors`"),
        ({"penalty_factors": -np.ones(D)}, "`penalty_factors`"),
        ({"grouped": 1, "l1": 0.1}, "`grouped`"),
        ({"grouped": True, "l1": 0.1, "solver": "newton"}, "`solver`"),
    ],
)
def test_refusals(options, named):
    x, labels = drawn()
    with pytest.raises((TypeError, ValueError), match=named):
        regression.fit(x, labels, **options)

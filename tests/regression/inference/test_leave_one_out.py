"""Leave-one-out from one Hessian against refits, in float64 NumPy."""

import jax
import numpy as np
import oracles
import pytest
import scipy.special
from multinomial import fisher, optimum

import softjax
from softjax import regression

pytestmark = pytest.mark.compiled_quickly

N, D, K = 60, 2, 3
L2 = 0.02


def problem(dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, D)).astype(dtype)
    y = np.argmax(x @ rng.normal(size=(D, K)) + rng.gumbel(size=(N, K)), -1)
    return x, y, rng.integers(0, 4, N).astype(dtype)


def newton(params, x, y, weights, l2, i):
    """One step for the objective without example i: the logits of i, by pseudo-inverses."""
    theta = np.concatenate([np.float64(params.kernel), np.float64(params.bias)[None]])
    theta -= theta.mean(-1, keepdims=True)
    x = np.concatenate([np.float64(x), np.ones((N, 1))], 1)
    w = np.float64(weights).copy()
    w[i] = 0
    p = scipy.special.softmax(x @ theta, -1)
    penalty = l2 * (np.arange(D + 1) < D)[:, None]
    g = x.T @ (w[:, None] * (p - np.eye(K)[y])) + w.sum() * penalty * theta
    h = fisher(x, p, w) + weights.sum() * np.diag(np.repeat(penalty[:, 0], K))
    step = np.linalg.pinv(h, 1e-12, hermitian=True) @ g.ravel()
    return x[i] @ (theta - step.reshape(D + 1, K))


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("l2", [0.0, L2])
def test_it_is_one_newton_step_for_every_example(l2, dtype):
    x, y, weights = problem(dtype)
    params = optimum(x, y, K, dtype, l2, weights)
    ours = regression.leave_one_out(params, x, y, l2=l2, sample_weights=weights)
    expected = np.stack([newton(params, x, y, weights, l2, i) for i in range(N)])
    ours = np.float64(ours) - np.float64(ours).mean(-1, keepdims=True)
    tolerance = 2e-4 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(ours, expected, atol=tolerance)


@pytest.mark.x64_once
def test_the_losses_are_those_of_refitting(dtype):
    x, y, _ = problem(dtype)
    params = optimum(x, y, K, dtype, L2)
    refitted = []
    for i in range(N):
        others = np.arange(N) != i
        kernel, bias = optimum(x[others], y[others], K, dtype, L2)
        z = np.float64(x[i]) @ np.float64(kernel) + np.float64(bias)
        refitted.append(oracles.cross_entropy(z, y[i]))
    ours = softjax.cross_entropy(regression.leave_one_out(params, x, y, l2=L2), y)
    trained = softjax.cross_entropy(regression.logits(params, x), y)
    gap = np.mean(refitted) - float(trained.mean())
    assert gap > 0.02
    # A second Newton step would add what is of second order in 1 / N.
    assert abs(float(ours.mean()) - np.mean(refitted)) < 0.05 * gap
    assert np.abs(np.float64(ours) - refitted).max() < 0.2 * np.max(refitted - np.float64(trained))


@pytest.mark.x64_once(True)
def test_class_weights_and_soft_labels_are_those_of_the_objective(dtype):
    x, y, _ = problem(dtype)
    given = np.array([0.5, 1, 2], dtype)
    soft = (np.eye(K)[y] * given).astype(dtype)  # the same objective
    params = optimum(x, soft, K, dtype, L2)
    one = regression.leave_one_out(params, x, y, l2=L2, class_weights=given)
    other = regression.leave_one_out(params, x, soft, l2=L2)
    np.testing.assert_allclose(one, other, atol=1e-4 if dtype == "float32" else 1e-12)


@pytest.mark.x64_once
def test_what_it_does_at_the_edge(dtype):
    x, y, weights = problem(dtype)
    params = optimum(x, y, K, dtype, L2, weights)
    z = np.asarray(regression.leave_one_out(params, x, y, l2=L2, sample_weights=weights))
    off = weights == 0
    np.testing.assert_allclose(z[off], regression.logits(params, x)[off], rtol=1e-5, atol=1e-6)
    traced = jax.jit(regression.leave_one_out)(params, x, y, l2=L2, sample_weights=weights)
    np.testing.assert_allclose(traced, z, atol=1e-4 if dtype == "float32" else 1e-12)
    with pytest.raises(ValueError, match=r"leave_one_out: `params` must be at the optimum"):
        regression.leave_one_out(regression.init(D, K, dtype), x, y, l2=L2)
    one = regression.leave_one_out(regression.init(D, 1, dtype), x, np.zeros(N, int))
    np.testing.assert_array_equal(one, np.zeros((N, 1)))

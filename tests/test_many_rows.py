"""A million rows in float32, where sums of one row after the other are off by 0.1 to 1 %."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from softjax import regression
from softjax.regression import inference

pytestmark = [pytest.mark.x64_once, pytest.mark.compiled_quickly]

N = 2**20


def problem(num_features, num_classes):
    rng = np.random.default_rng(0)
    x = (1 + 0.3 * rng.normal(size=(N, num_features))).astype(np.float32)
    y = rng.integers(0, num_classes, N).astype(np.int32)
    kernel = rng.normal(size=(num_features, num_classes)).astype(np.float32)
    return x, y, regression.SoftmaxRegression(jnp.asarray(kernel), jnp.zeros(num_classes))


def probabilities(params, x):
    return scipy.special.softmax(np.float64(x) @ np.float64(params.kernel), 1)


@pytest.mark.parametrize(("num_features", "num_classes"), [(1, 2), (2, 3)])
def test_the_gradient_and_its_bound(num_features, num_classes):
    x, y, params = problem(num_features, num_classes)
    residuals = probabilities(params, x) - np.eye(num_classes)[y]
    gradient = regression.gradient(params, x, y)
    expected = np.float64(x).T @ residuals / N
    np.testing.assert_allclose(gradient.kernel, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient.bias, residuals.mean(0), rtol=1e-5, atol=1e-6)
    augmented = np.c_[np.float64(x), np.ones(N)]
    largest = np.linalg.eigvalsh(augmented.T @ augmented / N)[-1]
    bound = regression.lipschitz_constant(x, y, num_classes)
    np.testing.assert_allclose(bound, largest / 2, rtol=2e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_goodness_of_fit(weighted):
    x, y, params = problem(1, 2)
    y = (np.arange(N) % 8 == 0).astype(np.int32)
    w = np.full(N, 0.1 if weighted else 1, np.float32)
    fit = inference.goodness_of_fit(params, x, y, sample_weights=w if weighted else None)
    total = np.float64(w).sum()
    np.testing.assert_allclose(fit.num_examples, total, rtol=3e-6 if weighted else 0)
    null = total * (np.log(1 / 8) / 8 + np.log(7 / 8) * 7 / 8)
    np.testing.assert_allclose(fit.null_log_likelihood, null, rtol=3e-6)
    log_p = np.log(probabilities(params, x))[np.arange(N), y]
    np.testing.assert_allclose(fit.log_likelihood, w[0] * log_p.sum(), rtol=3e-6)

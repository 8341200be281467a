"""Firth's penalised likelihood."""

import jax
import numpy as np
import pytest
from test_regression import K, problem

from softjax import regression

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.usefixtures("compiled_fits")]


@pytest.mark.x64_once(True)
def test_firth_of_two_classes_without_features_adds_half_an_example_to_each():
    """Jeffreys' prior: p = (n_k + 1/2) / (N + 1)."""
    y = np.array([0, 0, 0, 0, 1])
    result = regression.fit(np.zeros((5, 0)), y, solver="firth", tol=1e-10)
    p = regression.predict_proba(result.params, np.zeros(0))
    np.testing.assert_allclose(p, [4.5 / 6, 1.5 / 6], rtol=1e-8)


@pytest.mark.x64_once(True)
def test_firth_counts_examples_by_their_weights():
    """A row of weight 0 is absent and one of weight 2 is two, without and under a trace."""
    x, y = problem()
    x, y = x[:60], y[:60]
    rows = np.repeat(np.arange(60), np.tile([0, 1, 2], 20))
    weights = np.tile([0.0, 1.0, 2.0], 20)
    repeated = regression.fit(x[rows], y[rows], solver="firth", tol=1e-9).params.kernel

    def fit(weights):
        return regression.fit(
            x, y, solver="firth", tol=1e-9, sample_weights=weights, num_classes=K
        ).params.kernel

    for weighted in (fit(weights), jax.jit(fit)(weights)):
        np.testing.assert_allclose(weighted, repeated, atol=1e-7)


@pytest.mark.x64_once(True)
def test_firth_of_collinear_features_is_that_of_those_that_span_them():
    """An indicator of every level, which sum to 1, and a constant; near 0 and far from it."""
    rng = np.random.default_rng(0)
    levels, other = np.eye(3)[rng.integers(3, size=60)], rng.normal(size=(60, 2))
    y = (levels @ rng.normal(size=(3, K)) + rng.gumbel(size=(60, K))).argmax(1)
    least = np.c_[levels[:, 1:], other]
    expected = regression.predict_proba(regression.fit(least, y, solver="firth").params, least)
    for offset in (0.0, -1000.0):
        x = np.c_[levels, other, np.full(60, 7.0)] + offset
        for dtype in (np.float64, np.float32):
            result = regression.fit(x.astype(dtype), y, solver="firth")
            p = regression.predict_proba(result.params, x)
            np.testing.assert_allclose(p, expected, atol=1e-4 if dtype == np.float32 else 2e-5)
            # Float32 does not tell collinear features from nearly collinear ones.
            floor = regression.PRECISION_FLOOR
            assert result.converged if dtype == np.float64 else result.stop_reason == floor

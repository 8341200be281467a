"""Discrete changes, elasticities and the effects of single examples.

For two classes they are compared with statsmodels' Logit (MNLogit does not support them); for three
classes with averages in NumPy, and with finite differences for the delta method.
"""

import jax.flatten_util
import numpy as np
import pytest
from statsmodels.discrete.discrete_model import Logit

from softjax import regression
from softjax.regression import inference

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]
N, K = 150, 3


@pytest.fixture(scope="module")
def table():
    """A continuous feature, a dummy and a count."""
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=N) + 2, rng.random(N) < 0.4, rng.poisson(2, N)])
    kernel = np.array([[0.0, 0.5, 1.0], [0.0, 1.0, -1.0], [0.0, 0.3, 0.2]])
    return x, np.argmax(x @ kernel + rng.gumbel(size=(N, K)), 1)


def fitted(x, labels):
    params = regression.fit(x, labels, tol=1e-10).params
    return params, inference.covariance(params, x, labels)


def test_of_two_classes_they_are_those_of_statsmodels(table):
    x, labels = table[0], (table[1] > 0).astype(int)
    params, v = fitted(x, labels)
    peer = Logit(labels, np.column_stack([x, np.ones(N)])).fit(disp=0, tol=1e-12)
    steps = peer.get_margeff(dummy=True, count=True)
    dummy = inference.average_changes(params, v, x, [1])
    elasticities = inference.average_elasticities(params, v, x)
    per_cent = peer.get_margeff(method="eyex")
    for found, effect, error in (
        (dummy, steps.margeff[1:2], steps.margeff_se[1:2]),
        (elasticities, per_cent.margeff, per_cent.margeff_se),
    ):
        np.testing.assert_allclose(found.value[:, 1], effect, rtol=1e-6)
        np.testing.assert_allclose(found.standard_error[:, 1], error, rtol=1e-5)


def test_of_three_classes_they_are_averages_by_the_delta_method(table):
    x, _ = table
    params, v = fitted(*table)

    def changes(params):
        ahead, there = x.copy(), x.copy()
        ahead[:, 1], there[:, 1] = 1, 0
        return np.mean(probabilities(params, ahead) - probabilities(params, there), 0)[None]

    def counted(params):
        ahead = x + np.eye(3)[2]
        return np.mean(probabilities(params, ahead) - probabilities(params, x), 0)[None]

    def elasticities(params):
        kernel, p = np.asarray(params.kernel), probabilities(params, x)
        return np.mean(x[:, :, None] * (kernel[None] - (p @ kernel.T)[:, :, None]), 0)

    theta, unravel = jax.flatten_util.ravel_pytree(params)
    for found, mean in (
        (inference.average_changes(params, v, x, [1]), changes),
        (inference.average_changes(params, v, x, [2], count=True), counted),
        (inference.average_elasticities(params, v, x), elasticities),
    ):
        np.testing.assert_allclose(found.value, mean(params), rtol=1e-9)
        steps = 1e-5 * np.eye(len(theta))
        jacobian = np.stack(
            [(mean(unravel(theta + d)) - mean(unravel(theta - d))) / 2e-5 for d in steps], -1
        )
        variance = np.einsum("jkp,pq,jkq->jk", jacobian, v, jacobian)
        np.testing.assert_allclose(found.standard_error, np.sqrt(variance), rtol=1e-5)


def probabilities(params, x):
    return np.asarray(regression.predict_proba(params, x))


def test_effects_of_single_examples_are_derivatives_and_have_the_average(table):
    x, _ = table
    params, v = fitted(*table)
    offset = np.linspace(-1, 1, N * K).reshape(N, K)
    effects = inference.marginal_effects(params, x, offset=offset)
    step = 1e-5 * np.eye(3)[0]
    ahead, back = (
        regression.predict_proba(params, x + sign * step, offset=offset) for sign in (1, -1)
    )
    np.testing.assert_allclose(effects[:, 0], (ahead - back) / 2e-5, atol=1e-8)
    average = inference.average_marginal_effects(params, v, x, offset=offset).value
    np.testing.assert_allclose(np.mean(effects, 0), average, atol=1e-12)


def test_weights_are_rows(table):
    x, _ = table
    params, v = fitted(*table)
    weights = np.arange(N) % 3
    rows = np.repeat(np.arange(N), weights)
    for found, expected in (
        (
            inference.average_changes(params, v, x, [1, 1], sample_weights=weights),
            inference.average_changes(params, v, x[rows], [1, 1]),
        ),
        (
            inference.average_elasticities(params, v, x, sample_weights=weights),
            inference.average_elasticities(params, v, x[rows]),
        ),
    ):
        np.testing.assert_allclose(found.value, expected.value, atol=1e-12)
        np.testing.assert_allclose(found.standard_error, expected.standard_error, rtol=1e-9)


@pytest.mark.parametrize(("columns", "named"), [([3], "`columns`"), ([0], "`features`")])
def test_refusals(table, columns, named):
    params, v = fitted(*table)
    with pytest.raises(ValueError, match=named):
        inference.average_changes(params, v, table[0], columns)

"""Invariances of all statistics: a table of functions times a table of laws.

The laws: a weight counts rows, and the order of the rows, the numbering of the classes and the
units of the features do not matter. Equally many examples have weight 0 and weight 2, so that
repeated rows are as many as weighted rows, and one compiled program serves both.
"""

from functools import cache, partial

import jax
import numpy as np
import pytest

import softjax
from softjax import calibration, regression
from softjax.regression import inference

pytestmark = [pytest.mark.x64_once(True), pytest.mark.compiled_quickly]

N, D, K = 60, 2, 3
L2 = 0.1
PARAMS = regression.SoftmaxRegression(*np.split(np.linspace(-1, 1, (D + 1) * K), [D * K]))
PARAMS = PARAMS._replace(kernel=PARAMS.kernel.reshape(D, K))
CLUSTERS = 7
V = np.eye((D + 1) * K)  # the covariance of PARAMS, for the statistics that take one


def data():
    """Features, labels, a number of the cluster, and weights of mean 1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D))
    y = (x @ PARAMS.kernel + rng.gumbel(size=(N, K))).argmax(1)
    return x, y, rng.integers(CLUSTERS, size=N), rng.permutation(np.repeat([0.0, 1.0, 2.0], N // 3))


def derivative(function, x, y, c, w):
    return function(PARAMS, x, y, l2=L2, sample_weights=w)


@cache
def optimum():
    x, y, _, w = data()
    return regression.fit(x, y, l2=L2, sample_weights=w, tol=1e-10).params


def covariance(x, y, c, w, **options):
    options = {"clusters": c} if options.get("clusters") else options
    return inference.covariance(optimum(), x, y, l2=L2, sample_weights=w, **options)


def effects(x, y, c, w):
    return inference.average_marginal_effects(PARAMS, V, x, sample_weights=w)


def of_probabilities(function, x, y, c, w, **options):
    return function(softjax.softmax(x @ PARAMS.kernel), y, sample_weights=w, **options)


def losses(x, y, c, w):
    z = x @ PARAMS.kernel
    means = softjax.cross_entropy(z, y, weights=w, reduction="mean")
    return means, softjax.weighted_mean(softjax.cross_entropy(z, y), w)


# Means: a scale of all weights changes nothing.
MEANS = {
    "objective": partial(derivative, regression.objective),
    "gradient": partial(derivative, regression.gradient),
    "hessian": partial(derivative, regression.hessian),
    "lipschitz_constant": lambda x, y, c, w: regression.lipschitz_constant(
        x, y, K, l2=L2, sample_weights=w
    ),
    "average_marginal_effects": effects,
    "calibrate_temperature": lambda x, y, c, w: calibration.calibrate_temperature(
        x @ PARAMS.kernel, y, sample_weights=w
    ),
    "calibrate_vector": lambda x, y, c, w: calibration.calibrate_vector(
        x @ PARAMS.kernel, y, l2=0.1, sample_weights=w
    ),
    "classwise_calibration_error": partial(
        of_probabilities, calibration.classwise_calibration_error, num_bins=5
    ),
    "expected_calibration_error": partial(
        of_probabilities, calibration.expected_calibration_error, num_bins=5
    ),
    "expected_calibration_error, adaptive": partial(
        of_probabilities, calibration.expected_calibration_error, num_bins=5, adaptive=True
    ),
    "cross_entropy": losses,
}
# Sums: a weight is how often a row was seen.
SUMS = {
    "fisher_information": lambda x, y, c, w: regression.fisher_information(
        PARAMS, x, sample_weights=w
    ),
    "reliability_diagram": partial(of_probabilities, calibration.reliability_diagram, num_bins=5),
    "covariance": covariance,
    "covariance, robust": partial(covariance, robust=True),
    "covariance, clusters": partial(covariance, clusters=True),
    "log_likelihood": lambda x, y, c, w: inference.log_likelihood(PARAMS, x, y, sample_weights=w),
    "goodness_of_fit": lambda x, y, c, w: inference.goodness_of_fit(PARAMS, x, y, sample_weights=w),
}


def assert_same(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [*MEANS, *SUMS])
def test_a_weight_is_so_many_rows_in_any_order(name):
    function = (MEANS | SUMS)[name]
    x, y, c, w = data()
    expected = function(x, y, c, w)
    copies = np.repeat(np.arange(N), w.astype(int))
    assert_same(function(x[copies], y[copies], c[copies], np.ones(N)), expected)
    order = np.random.default_rng(1).permutation(N)
    assert_same(function(x[order], y[order], c[order], w[order]), expected)
    absent = w == 0
    others = np.where(absent[:, None], 1e6, x), np.where(absent, 0, y)
    assert_same(function(*others, c, w), expected)
    if name in MEANS:
        assert_same(function(x, y, c, 1e-30 * w), expected)


# Parameters are divided by `UNITS` where features are multiplied by them; the bias has none.
UNITS = np.append(10.0 ** np.linspace(-1, 2, D), 1)
ORDER = np.roll(np.arange(K), 1)
TURN = np.kron(np.diag(1 / UNITS), np.eye(K)[ORDER])  # of the flat parameters, [(D + 1) K]


def turned(params):
    flat = TURN @ np.concatenate([np.ravel(params.kernel), params.bias])
    return regression.SoftmaxRegression(flat[: D * K].reshape(D, K), flat[D * K :])


def with_units(name, expected):
    """What `expected` becomes in other units and with the classes in another order."""
    if name == "gradient":
        # The gradient is a covector: it is multiplied where parameters are divided.
        kernel = expected.kernel[:, ORDER] * UNITS[:-1, None]
        return regression.SoftmaxRegression(kernel, expected.bias[ORDER])
    if name in ("hessian", "fisher_information"):
        inverse = np.linalg.inv(TURN)
        return inverse.T @ expected @ inverse
    if name.startswith("covariance"):
        return TURN @ expected @ TURN.T
    if name == "calibrate_vector":
        return type(expected)(*(a[..., ORDER] for a in expected))
    if name == "average_marginal_effects":
        scaled = {"value", "standard_error", "lower", "upper"}
        return type(expected)(
            *(
                a[:, ORDER] / (UNITS[:-1, None] if field in scaled else 1)
                for field, a in expected._asdict().items()
            )
        )
    return expected


# But for `lipschitz_constant`, which is a curvature per squared unit.
@pytest.mark.parametrize("name", sorted({*MEANS, *SUMS} - {"lipschitz_constant"}))
def test_classes_have_any_numbers_and_features_any_units(name, monkeypatch):
    function, (x, y, c, w) = (MEANS | SUMS)[name], data()
    monkeypatch.setattr(f"{__name__}.L2", 0.0)
    best = regression.fit(x, y, sample_weights=w, tol=1e-10).params
    monkeypatch.setattr(f"{__name__}.optimum", lambda: best)
    expected = with_units(name, jax.tree.map(np.asarray, function(x, y, c, w)))
    for module_name, value in (("PARAMS", turned(PARAMS)), ("V", TURN @ V @ TURN.T)):
        monkeypatch.setattr(f"{__name__}.{module_name}", value)
    monkeypatch.setattr(f"{__name__}.optimum", lambda: turned(best))
    ours = function(x * UNITS[:-1], np.argsort(ORDER)[y], c, w)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-11 * np.nanmax(np.abs(b)))

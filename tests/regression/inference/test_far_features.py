"""Features of any unit and far from 0 have the statistics of the same features around 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from multinomial import optimum

from softjax import regression
from softjax.regression import inference
from softjax.sklearn import SoftmaxClassifier

pytestmark = pytest.mark.compiled_quickly

N, K = 90, 3
# The middle of a feature and its unit: a year, a latitude, metres in a grid of a country.
PLACES = {
    "float32": [(2010.0, 6.0), (-52.5, 0.1), (4e5, 500.0)],
    "float64": [(2010.0, 6.0), (1e6, 5.0), (1.76e9, 1e4)],
}
KINDS = {
    "model": {"weighted": True},
    "penalised": {"l2": 0.05, "weighted": True},
    "HC1": {"robust": "HC1"},
    "HC3": {"robust": "HC3", "weighted": True},
    "clustered": {"clusters": np.arange(N) % 30},
}


def examples(place, dtype):
    """Features of which the first has this middle and unit, labels, weights, and the middles."""
    rng = np.random.default_rng(3)
    z = rng.normal(size=(N, 2))
    middle, unit = place
    x = (np.array([middle, 0.0]) + np.array([unit, 1.0]) * z).astype(dtype)
    return x, np.argmax(z @ rng.normal(size=(2, K)) + rng.gumbel(size=(N, K)), -1), middle


def fitted(x, y, middle, dtype, l2, weights):
    """The optimum for the features, and that for the features minus their middle."""
    around = np.float64(x) - np.array([middle, 0.0])
    unit = around.std(0)
    factors = l2 * unit**2  # of a penalty on the standardised features
    with jax.enable_x64(True):
        params = optimum(around / unit, y, K, "float64", l2, weights)
    kernel, bias = (np.float64(leaf) for leaf in params)
    kernel = kernel / unit[:, None]
    far = bias - np.array([middle, 0.0]) @ kernel

    def given(bias):
        return regression.SoftmaxRegression(*(jnp.asarray(part, dtype) for part in (kernel, bias)))

    return (given(far), x), (given(bias), around.astype(dtype)), factors


def figures(params, x, y, options, unit):
    """Statistics that no middle of a feature changes."""
    own = {name: options[name] for name in ("l2", "sample_weights")}
    v = inference.covariance(params, x, y, **options)
    table = inference.coefficients(params, v, reference=0)
    restrictions = np.zeros((2, 3, K))
    restrictions[0, 0], restrictions[1, 1] = [1, -1, 0], [0, 1, -1]
    predicted = inference.predictions(params, v, x[:20])
    effects = inference.average_marginal_effects(params, v, x)
    found = inference.influence(params, x, y, **own)
    return {
        "standard errors": table.standard_error[:-1] * np.array([[unit], [1]]),
        "wald": inference.wald_test(params, v, restrictions).statistic,
        "predictions": predicted.standard_error,
        "bounds": predicted.upper,
        "effects": effects.standard_error * np.array([[unit], [1]]),
        "changes": inference.average_changes(params, v, x, [1], count=True).standard_error,
        "leverage": found.leverage,
        "distance": found.cooks_distance,
        "leave one out": jax.nn.softmax(regression.leave_one_out(params, x, y, **own)),
        "aic": inference.goodness_of_fit(params, x, y).aic,
    }


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_far_from_0_all_statistics_are_those_of_centred_features(options, dtype):
    options = {"l2": 0.0, **options}
    rng = np.random.default_rng(4)
    weights = rng.integers(0, 3, N).astype(dtype) if options.pop("weighted", False) else None
    for middle, unit in PLACES[dtype]:
        x, y, middle = examples((middle, unit), dtype)
        far, around, l2 = fitted(x, y, middle, dtype, options["l2"], weights)
        given = options | {"l2": l2 if options["l2"] else 0.0, "sample_weights": weights}
        ours, expected = (figures(*problem, y, given, unit) for problem in (far, around))
        for name, value in ours.items():
            np.testing.assert_allclose(
                value, expected[name], rtol=4e-4, atol=4e-4 * np.max(expected[name]), err_msg=name
            )


def test_a_variance_that_rounding_hides_is_refused(dtype):
    """An interval of width 0 would look sure. Float64 has no digits left at 10^7 deviations."""
    place = (2010.0, 6.0) if dtype == "float32" else (1.76e9, 100.0)
    x, y, middle = examples(place, dtype)
    (params, x), _, _ = fitted(x, y, middle, dtype, 0.0, None)
    v = jnp.asarray(np.asarray(inference.covariance(params, x, y)), dtype)

    def intervals(v):
        return inference.predictions(params, v, x[:3])

    with pytest.raises(ValueError, match="`covariance` must be precise enough"):
        intervals(v)
    assert np.isnan(jax.jit(intervals)(v).standard_error).all()


@pytest.mark.x64_once
def test_the_summary_of_an_estimator_has_times_in_seconds_since_1970():
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(0, 600, 300))
    y = (t - 300 + 60 * rng.logistic(size=300) > 0).astype(int)

    def errors(start, **options):
        fit = SoftmaxClassifier(C=np.inf).fit((t + start)[:, None], y)
        return fit.summary(robust="HC3", **options).rows[0]["standard_error"]

    for options in ({}, {"marginal_effects": True}):
        np.testing.assert_allclose(errors(1.76e9, **options), errors(0.0, **options), rtol=1e-6)

"""The covariance of a fit: its kinds, its weights, and where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from multinomial import D, K, N, close, optimum, oracle, problem

from softjax import regression
from softjax.regression import inference

pytestmark = pytest.mark.compiled_quickly


KINDS = {
    "model": {},
    "penalised": {"l2": 0.05},
    "robust": {"robust": True, "weighted": True},
    "robust penalised": {"robust": True, "l2": 0.05},
    "clustered": {"clusters": np.arange(N) % 40, "weighted": True},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_covariance_is_that_of_numpy(options, dtype):
    x, y, weights = problem(dtype)
    given = {name: value for name, value in options.items() if name != "weighted"}
    weights = weights if "weighted" in options else None
    params = optimum(x, y, K, dtype, given.get("l2", 0.0), weights)
    ours = np.asarray(inference.covariance(params, x, y, sample_weights=weights, **given))
    close(ours, oracle(params, x, y, sample_weights=weights, **given), dtype)
    np.testing.assert_array_equal(ours, ours.T)


@pytest.mark.x64_once(True)
def test_a_weight_is_so_many_rows(dtype):
    x, y, weights = problem(dtype)
    params = optimum(x, y, K, dtype, sample_weights=weights)
    rows = np.repeat(np.arange(N), weights.astype(int))
    weighted = inference.covariance(params, x, y, sample_weights=weights, robust=True)
    repeated = inference.covariance(params, x[rows], y[rows], robust=True)
    close(weighted, np.float64(repeated), dtype)
    ours = inference.goodness_of_fit(params, x, y, sample_weights=weights)
    for got, want in zip(
        jax.tree.leaves(ours),
        jax.tree.leaves(inference.goodness_of_fit(params, x[rows], y[rows])),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4 if dtype == "float32" else 1e-10)


@pytest.mark.compiled_quickly
@pytest.mark.x64_once(True)
@pytest.mark.parametrize("options", [{}, {"robust": "HC1"}, {"robust": "HC3"}, {"clusters": True}])
def test_a_class_weight_counts_squared_and_is_no_number_of_examples(options):
    x, y, weights = problem("float64")
    c = np.array([1.0, 5.0, 0.5, 2.0])
    params = regression.fit(x, y, sample_weights=weights, class_weights=c, tol=1e-12).params
    rows = np.repeat(np.arange(N), weights.astype(int))

    def covariance(rows, class_weights, sample_weights=None):
        given = options | ({"clusters": rows % 7} if "clusters" in options else {})
        given |= {"class_weights": class_weights, "sample_weights": sample_weights}
        return np.asarray(inference.covariance(params, x[rows], y[rows], **given))

    ours = covariance(np.arange(N), c, weights)
    for other in (covariance(rows, c), covariance(np.arange(N), 20 * c, weights)):
        np.testing.assert_allclose(other, ours, rtol=1e-8, atol=1e-10)
    if not options:
        alone = regression.fit(x, y, class_weights=c, tol=1e-12).params
        squared = inference.covariance(alone, x, y, class_weights=c)
        own = {"sample_weights": c[y], "clusters": np.arange(N)}
        n = c[y].sum()
        correction = N / (N - 1) * (n - 1) / (n - (D + 1) * (K - 1))
        clustered = inference.covariance(alone, x, y, **own) / correction
        np.testing.assert_allclose(squared, clustered, rtol=1e-8, atol=1e-10)


@pytest.mark.x64_once(True)
def test_a_row_of_counts_is_as_many_examples(dtype):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 2)).astype(dtype)
    counts = rng.integers(0, 4, (30, 3)).astype(dtype)
    row, label = np.nonzero(counts)
    times = counts[row, label].astype(int)
    row, label = np.repeat(row, times), np.repeat(label, times)
    params = optimum(x, counts, 3, dtype)
    close(
        inference.covariance(params, x, counts),
        np.float64(inference.covariance(params, x[row], label)),
        dtype,
    )
    ours = inference.goodness_of_fit(params, x, counts)
    expected = inference.goodness_of_fit(params, x[row], label)
    assert ours.num_examples == expected.num_examples == counts.sum()
    np.testing.assert_allclose(ours.aic, expected.aic, rtol=1e-5)
    np.testing.assert_allclose(ours.null_log_likelihood, expected.null_log_likelihood, rtol=1e-5)


@pytest.mark.x64_once(True)
def test_a_row_of_weight_zero_takes_no_part(dtype):
    x, y, weights = problem(dtype)
    params = optimum(x, y, K, dtype, sample_weights=weights)
    off = np.flatnonzero(weights == 0)
    spoiled = x.copy()
    spoiled[off] = np.nan
    for options in ({}, {"clusters": np.arange(N) % 40}):
        np.testing.assert_array_equal(
            inference.covariance(params, spoiled, y, sample_weights=weights, **options),
            inference.covariance(params, x, y, sample_weights=weights, **options),
        )
    # Nor does a cluster of such rows count among the clusters: one more would change the correction
    # G / (G - 1) by 6e-4. Its sums of 0 are added too, and with them in another order.
    alone = np.where(weights == 0, N + np.arange(N), np.arange(N) % 40)
    np.testing.assert_allclose(
        inference.covariance(params, x, y, sample_weights=weights, clusters=alone),
        inference.covariance(params, x, y, sample_weights=weights, clusters=np.arange(N) % 40),
        rtol=1e-11,
    )
    v = inference.covariance(params, x, y, sample_weights=weights)
    effects = [
        inference.average_marginal_effects(params, v, rows, sample_weights=weights)
        for rows in (spoiled, x)
    ]
    jax.tree.map(np.testing.assert_array_equal, *effects)
    assert np.isfinite(inference.log_likelihood(params, spoiled, y, sample_weights=weights))


@pytest.mark.x64_once
def test_the_scale_of_a_feature_changes_nothing_but_its_unit(dtype):
    x, y, _ = problem(dtype)
    params = optimum(x, y, K, dtype)
    plain = inference.coefficients(params, inference.covariance(params, x, y), reference=1)
    scale = np.array([2.0**20, 1.0, 2.0**-20], dtype)
    scaled = params._replace(kernel=params.kernel / scale[:, None])
    ours = inference.coefficients(scaled, inference.covariance(scaled, x * scale, y), reference=1)
    np.testing.assert_allclose(ours.z, plain.z, rtol=1e-3 if dtype == "float32" else 1e-10)


@pytest.mark.x64_once
def test_two_classes_are_the_binary_logit(dtype):
    x, y, _ = problem(dtype, k=2)
    params = optimum(x, y, 2, dtype)
    ours = inference.coefficients(params, inference.covariance(params, x, y), reference=0)
    xa = np.concatenate([np.float64(x), np.ones((N, 1))], 1)
    p = scipy.special.expit(xa @ np.float64(ours.value)[:, 0])
    variance = np.linalg.inv(xa.T @ ((p * (1 - p))[:, None] * xa))
    close(np.float64(ours.standard_error)[:, 0], np.sqrt(np.diag(variance)), dtype)


@pytest.mark.x64_once
def test_contrasts_do_not_depend_on_the_gauge_nor_on_the_order_of_classes(dtype):
    x, y, _ = problem(dtype)
    params = optimum(x, y, K, dtype)
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.5, dtype), params)
    v, v_moved = (inference.covariance(p, x, y) for p in (params, moved))
    close(v_moved, np.float64(v), dtype)
    turned = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, -1), params)
    v_turned = inference.covariance(turned, x, (y + 1) % K)
    ours = inference.coefficients(turned, v_turned, reference=1)
    expected = inference.coefficients(params, v, reference=0)
    # Classes 2, 3 and 0 against 1, where 1, 2 and 3 were against 0.
    got = np.float64(ours.standard_error)[:, [1, 2, 0]]
    close(got, np.float64(expected.standard_error), dtype)


@pytest.mark.x64_once
def test_one_class_has_no_variance(dtype):
    params = regression.init(2, 1, dtype)
    v = inference.covariance(params, np.ones((4, 2), dtype), np.zeros(4, int))
    np.testing.assert_array_equal(v, np.zeros((3, 3)))
    p = inference.predictions(params, v, np.ones((4, 2), dtype))
    np.testing.assert_array_equal(p.probability, np.ones((4, 1)))
    np.testing.assert_array_equal(p.standard_error, np.zeros((4, 1)))


def test_separable_data_are_refused_wherever_the_fit_stopped(dtype):
    x, _, _ = problem(dtype)
    direction = np.random.default_rng(3).normal(size=(D, K))
    y = np.argmax(x @ direction, -1)
    for norm in (1.0, 10.0, 100.0):
        kernel = jnp.asarray(norm * direction, dtype)
        params = regression.SoftmaxRegression(kernel, jnp.zeros(K, dtype))
        with pytest.raises(ValueError, match="separable"):
            inference.covariance(params, x, y)
    penalised = optimum(x, y, K, dtype, 0.01)
    assert np.isfinite(inference.covariance(penalised, x, y, l2=0.01)).all()


def test_a_class_without_examples_is_refused(dtype):
    x, y, _ = problem(dtype, k=3)
    kernel, bias = optimum(x, y, 3, dtype)
    kernel = jnp.concatenate([kernel, jnp.zeros((D, 1), dtype)], 1)
    for low in (-5.0, -20.0):
        params = regression.SoftmaxRegression(kernel, jnp.append(bias, jnp.asarray(low, dtype)))
        with pytest.raises(ValueError, match="or one may have no examples"):
            inference.covariance(params, x, y)


def test_collinear_features_are_refused(dtype):
    x, y, _ = problem(dtype)
    params = optimum(x, y, K, dtype)
    zeros = jnp.zeros((1, K), dtype)
    wide = params._replace(kernel=jnp.concatenate([params.kernel, zeros]))
    for column in (x[:, :1] + x[:, 1:2], np.full((N, 1), 3, dtype)):
        words = "features that are collinear, .* determine 1 of them, such as column "
        with pytest.raises(ValueError, match=words):
            inference.covariance(wide, np.concatenate([x, column], 1), y)
    with pytest.raises(ValueError, match="`l2` must be >= 0, got -1"):
        inference.covariance(params, x, y, l2=-1.0)
    with pytest.raises(ValueError, match="`sample_weights` must be >= 0, got nan"):
        inference.covariance(params, x, y, sample_weights=np.full(N, np.nan))


@pytest.mark.parametrize("robust", [False, True])
def test_a_repeated_feature_halves_its_coefficient_and_its_error(robust, dtype):
    """b + b for b x + b x has half the penalty of b; the small penalty amplifies no rounding."""
    x, y, _ = problem(dtype)
    l2, factors = 1e-5 if dtype == "float32" else 1e-9, np.array([0.5, 1, 1])
    given = {"l2": l2 * factors, "robust": robust}
    params = regression.fit(x, y, l2=l2, penalty_factors=factors, tol=1e-7).params
    once = np.diag(inference.covariance(params, x, y, **given)).reshape(D + 1, K)
    kernel = jnp.concatenate([params.kernel.at[0].divide(2), params.kernel[:1] / 2])
    halved, twice = params._replace(kernel=kernel), np.concatenate([x, x[:, :1]], 1)
    for function in (inference.covariance, jax.jit(inference.covariance, static_argnames="robust")):
        v = function(halved, twice, y, l2=jnp.full(D + 1, l2, dtype), robust=robust)
        found = np.diag(v).reshape(D + 2, K)[[0, D, 1, 2, D + 1]]
        expected = once[[0, 0, 1, 2, D]] * np.array([0.25, 0.25, 1, 1, 1])[:, None]
        np.testing.assert_allclose(found, expected, rtol=np.finfo(dtype).eps / l2)


@pytest.mark.x64_once
def test_under_a_trace_refusals_are_nan(dtype):
    x, y, _ = problem(dtype)
    params = optimum(x, y, K, dtype)
    traced = jax.jit(inference.covariance)
    close(traced(params, x, y), np.float64(inference.covariance(params, x, y)), dtype)
    assert np.isnan(traced(regression.init(D, K, dtype), x, y)).all()
    y[0] = K
    assert np.isnan(traced(params, x, y)).all()


@pytest.mark.x64_once
def test_no_examples_and_no_features(dtype):
    x, y, _ = problem(dtype)
    params = optimum(x, y, K, dtype)
    v = inference.covariance(params, x, y)
    assert inference.predictions(params, v, x[:0]).lower.shape == (0, K)
    assert not inference.average_marginal_effects(params, v, x[:0]).value.any()
    with pytest.raises(ValueError, match="`features` must be such that the information"):
        inference.covariance(params, x[:0], y[:0])
    # A bias alone: the log odds of the class counts.
    params = optimum(x[:, :0], y, K, dtype)
    v = inference.covariance(params, x[:, :0], y)
    ours = inference.coefficients(params, v, reference=0)
    n = np.bincount(y)
    np.testing.assert_allclose(ours.value[0], np.log(n[1:] / n[0]), rtol=1e-4)
    np.testing.assert_allclose(ours.standard_error[0], np.sqrt(1 / n[1:] + 1 / n[0]), rtol=1e-4)
    assert inference.average_marginal_effects(params, v, x[:, :0]).value.shape == (0, K)

"""The statistics of a fit against statsmodels' MNLogit and against float64 NumPy."""

import functools
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.experimental.sparse import BCOO

from softjax import regression
from softjax.regression import inference

pytestmark = pytest.mark.compiled_quickly

N, D, K = 120, 3, 4
P = (D + 1) * K


def problem(dtype, n=N, d=D, k=K, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(dtype)
    y = np.argmax(x @ rng.normal(size=(d, k)) + rng.gumbel(size=(n, k)), -1)
    return x, y, rng.integers(0, 4, n).astype(dtype)


def optimum(x, labels, num_classes, dtype, l2=0.0, sample_weights=None):
    """Newton's steps in float64 NumPy, from zero."""
    x = np.concatenate([np.float64(x), np.ones((len(x), 1))], 1)
    y = np.eye(num_classes)[labels] if np.ndim(labels) == 1 else np.float64(labels)
    w = np.ones(len(x)) if sample_weights is None else np.float64(sample_weights)
    penalty = l2 * w.sum() * (np.arange(x.shape[1]) < x.shape[1] - 1)[:, None]
    theta = np.zeros((x.shape[1], num_classes))
    for _ in range(12):
        p = scipy.special.softmax(x @ theta, -1)
        g = x.T @ (w[:, None] * (y.sum(-1, keepdims=True) * p - y)) + penalty * theta
        h = fisher(x, p, w * y.sum(-1)) + np.diag(np.repeat(penalty[:, 0], num_classes))
        theta -= (np.linalg.pinv(h, 1e-12, hermitian=True) @ g.ravel()).reshape(theta.shape)
    return regression.SoftmaxRegression(
        jnp.asarray(theta[:-1], dtype), jnp.asarray(theta[-1], dtype)
    )


def fisher(x, p, a):
    cov = p[:, :, None] * (np.eye(p.shape[1]) - p[:, None, :])
    size = x.shape[1] * p.shape[1]
    return np.einsum("n,nd,nkl,ne->dkel", a, x, cov, x, optimize=True).reshape(size, size)


def oracle(params, x, labels, *, robust=False, clusters=None, l2=0.0, sample_weights=None):
    """The covariance by pseudo-inverses, in float64."""
    kernel, bias = (np.float64(leaf) for leaf in params)
    k = len(bias)
    x = np.concatenate([np.float64(x), np.ones((len(x), 1))], 1)
    y = np.eye(k)[labels] if np.ndim(labels) == 1 else np.float64(labels)
    w = np.ones(len(x)) if sample_weights is None else np.float64(sample_weights)
    p = scipy.special.softmax(x @ np.concatenate([kernel, bias[None]]), -1)
    information = fisher(x, p, w * y.sum(-1))
    h = information + l2 * w.sum() * np.diag(np.arange(len(information)) < kernel.size)
    scores = (x[:, :, None] * (y - y.sum(-1, keepdims=True) * p)[:, None, :]).reshape(len(x), -1)
    meat, factor = information, 1.0
    if clusters is not None:
        sums = np.stack([(w[:, None] * scores)[clusters == g].sum(0) for g in np.unique(clusters)])
        n, groups, size = (w * y.sum(-1)).sum(), len(sums), x.shape[1] * (k - 1)
        meat, factor = sums.T @ sums, groups / (groups - 1) * (n - 1) / (n - size)
    elif robust:
        meat = scores.T @ (w[:, None] * scores)
    centring = np.kron(np.eye(x.shape[1]), np.eye(k) - 1 / k)
    inverse = centring @ np.linalg.pinv(h, 1e-12, hermitian=True) @ centring
    return factor * inverse @ meat @ inverse


def close(ours, expected, dtype, units=2000):
    """Within so many roundings of the largest: condition numbers here are some hundreds."""
    largest = np.max(np.abs(expected))
    tolerance = units * float(np.finfo(dtype).eps) * largest
    np.testing.assert_allclose(np.float64(ours), expected, rtol=0, atol=tolerance)


# statsmodels, on its own example


@functools.cache
def anes96():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statsmodels' own, on import
        import statsmodels.api as sm
    data = sm.datasets.anes96.load_pandas()
    x, y = data.exog.to_numpy(float), data.endog.to_numpy().astype(int)
    model = sm.MNLogit(y, np.column_stack([x, np.ones(len(x))]))
    groups = np.arange(len(x)) // 7

    def fitted(**options):
        return model.fit(method="newton", disp=False, maxiter=50, **options)

    results = {
        "model": fitted(),
        "robust": fitted(cov_type="HC0"),
        "clustered": fitted(cov_type="cluster", cov_kwds={"groups": groups}),
    }
    return x, y, optimum(x, y, 7, np.float64), results


OPTIONS = {
    "model": {},
    "robust": {"robust": True},
    "clustered": {"clusters": np.arange(944) // 7},
}


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("kind", OPTIONS)
def test_coefficients_are_those_of_statsmodels(kind):
    x, y, params, results = anes96()
    expected = results[kind]
    v = inference.covariance(params, x, y, **OPTIONS[kind])
    ours = inference.coefficients(params, v, reference=0)
    np.testing.assert_allclose(ours.value, expected.params, rtol=1e-9)
    np.testing.assert_allclose(ours.standard_error, expected.bse, rtol=1e-9)
    np.testing.assert_allclose(ours.z, expected.tvalues, rtol=1e-9)
    np.testing.assert_allclose(ours.p_value, expected.pvalues, rtol=1e-7)
    interval = np.stack([ours.lower, ours.upper], -1)
    np.testing.assert_allclose(interval.swapaxes(0, 1), expected.conf_int(), rtol=1e-9)


@pytest.mark.x64_once(True)
def test_goodness_of_fit_is_that_of_statsmodels():
    x, y, params, results = anes96()
    expected = results["model"]
    ours = inference.goodness_of_fit(params, x, y)
    test = ours.likelihood_ratio
    pairs = {
        "log-likelihood": (ours.log_likelihood, expected.llf),
        # statsmodels fits the null model, to about 1e-9.
        "null": (ours.null_log_likelihood, expected.llnull),
        "aic": (ours.aic, expected.aic),
        "bic": (ours.bic, expected.bic),
        "pseudo-R2": (ours.pseudo_r2, expected.prsquared),
        "likelihood ratio": (test.statistic, expected.llr),
        "residual": (ours.degrees_of_freedom, expected.df_resid),
    }
    for name, (got, want) in pairs.items():
        np.testing.assert_allclose(got, want, rtol=1e-8, err_msg=name)
    np.testing.assert_allclose(test.p_value, expected.llr_pvalue, rtol=1e-5)
    assert test.degrees_of_freedom == expected.df_model


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_features_that_others_determine_are_no_parameters(fit_intercept, dtype):
    """The rank counts, in any units, for dense and sparse features, without rows of weight 0."""
    rng = np.random.default_rng(0)
    x, level, year = rng.normal(size=(N, 2)), np.arange(N) % 3, 2000.0 + np.arange(N) % 20
    params = regression.SoftmaxRegression(jnp.ones((4, 3), dtype), jnp.zeros(3, dtype))
    weights = np.where(np.arange(N) < N // 3, 0, 1 + level)
    other = np.where(weights > 0, x[:, 1], rng.normal(size=N))
    one = np.ones(N)
    # Two columns beside x, and how many of them count with an intercept, and without it.
    for pair, counts in (
        ((0 * one, 1e3 * x[:, 0] - x[:, 1] / 4), (0, 0)),
        ((3.3 * one, 0.1 * one), (0, 1)),
        ((level, 2 * level + 5), (1, 2)),
        ((level == 0, level > 0), (1, 2)),
        ((year, year / 10 + x[:, 1]), (1, 1)),
        ((1e-6 * x[:, 0], 1e9 * year), (1, 1)),
        ((other, x[:, 0] ** 2), (1, 1)),
    ):
        wide = np.column_stack([x, *pair]).astype(dtype)
        wide[0] = np.nan  # of weight 0
        sparse = BCOO.fromdense(wide)
        given = {"fit_intercept": fit_intercept, "sample_weights": weights}
        for features in (wide, sparse):
            found = inference.goodness_of_fit(params, features, level, **given)
            k = (2 + counts[not fit_intercept] + fit_intercept) * 2
            assert found.num_parameters == k
            assert found.likelihood_ratio.degrees_of_freedom == k - 2 * fit_intercept
            assert found.aic == 2 * k - 2 * found.log_likelihood
    weights[1:] = 1
    found = inference.goodness_of_fit(params, wide, level, **given)
    assert found.num_parameters == (4 + fit_intercept) * 2  # now `other` is another column
    traced = jax.jit(partial(inference.goodness_of_fit, fit_intercept=fit_intercept))
    assert traced(params, np.nan_to_num(wide), level).num_parameters == found.num_parameters


@pytest.mark.x64_once(True)
def test_marginal_effects_are_those_of_statsmodels():
    x, y, params, results = anes96()
    expected = results["model"].get_margeff()
    ours = inference.average_marginal_effects(params, inference.covariance(params, x, y), x)
    np.testing.assert_allclose(ours.value, expected.margeff, rtol=1e-9)
    np.testing.assert_allclose(ours.standard_error, expected.margeff_se, rtol=1e-9)
    np.testing.assert_allclose(ours.z, expected.tvalues, rtol=1e-9)
    np.testing.assert_allclose(ours.p_value, expected.pvalues, rtol=1e-7)
    interval = np.stack([ours.lower, ours.upper], 1)
    np.testing.assert_allclose(interval, expected.conf_int(), rtol=1e-9)


@pytest.mark.x64_once(True)
def test_a_wald_test_is_that_of_statsmodels():
    x, y, params, results = anes96()
    v = inference.covariance(params, x, y)
    # Neither age nor income matters: 14 restrictions, 12 of them independent.
    restrictions = np.zeros((2, 7, 6, 7))
    restrictions[0, :, 2], restrictions[1, :, 4] = np.eye(7) - 1 / 7, np.eye(7) - 1 / 7
    ours = inference.wald_test(params, v, restrictions.reshape(14, 6, 7))
    contrasts = np.zeros((12, 36))  # statsmodels has the classes first
    for row, (c, j) in enumerate((c, j) for j in (2, 4) for c in range(6)):
        contrasts[row, 6 * c + j] = 1
    theta = results["model"].params.T.ravel()
    distance = contrasts @ theta
    variance = contrasts @ np.asarray(results["model"].cov_params()) @ contrasts.T
    expected = distance @ np.linalg.solve(variance, distance)
    np.testing.assert_allclose(ours.statistic, expected, rtol=1e-8)
    assert ours.degrees_of_freedom == 12
    np.testing.assert_allclose(ours.p_value, scipy.stats.chi2.sf(expected, 12), rtol=1e-7)


# The covariance


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


# What has no optimum, and what cannot be told apart


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
        with pytest.raises(ValueError, match="features that are collinear"):
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


# The numbers made of it


def test_p_values_are_accurate_in_the_far_tail(dtype):
    z = np.array([0.0, 0.5, 2.0, 5.0, 9.0, 12.0], dtype)
    ours = inference.estimates(jnp.asarray(z), jnp.ones(6, dtype))
    expected = [float(mpmath.erfc(mpmath.mpf(float(v)) / mpmath.sqrt(2))) for v in z]
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(ours.p_value, expected, rtol=(z.max() ** 2) * eps)
    wide = inference.estimates(jnp.zeros((), dtype), jnp.ones((), dtype), level=0.999)
    np.testing.assert_allclose(wide.upper, scipy.special.ndtri(0.9995), rtol=1e4 * eps)
    for df in (1, 5, 36):
        statistic = np.array([0.0, df, 3.0 * df, 100.0], dtype)
        ours = inference.likelihood_ratio_test(-statistic / 2, np.zeros(4, dtype), df)
        np.testing.assert_allclose(ours.p_value, scipy.stats.chi2.sf(statistic, df), rtol=200 * eps)


@pytest.mark.x64_once
def test_a_larger_model_is_no_less_likely_and_has_more_parameters():
    test = inference.likelihood_ratio_test
    less = np.array([-200.0, -200.001])
    found = test(-200.0, less, 0.5 + np.arange(1, 3))  # within rounding, and numbers as 1.5
    assert not found.statistic.any()
    np.testing.assert_array_equal(found.p_value, 1)
    for full in (-300.0, -200.1, np.append(less, -201)):
        with pytest.raises(ValueError, match="are the arguments swapped"):
            test(-200.0, full, 2)
    for degrees in (0, -2, 0.5, np.array([1, 0])):
        with pytest.raises(ValueError, match="`degrees_of_freedom` must be >= 1, got"):
            test(-300.0, -200.0, degrees)
    traced = jax.jit(test)
    assert np.isnan(traced(-200.0, -300.0, 2).statistic)
    for given in ((-200.0, -300.0, 2), (-300.0, -200.0, 0)):
        assert np.isnan(traced(*given).p_value)
    assert traced(-201.0, -200.0, 2).statistic == 2


# The second is more than one chunk of rows.
@pytest.mark.parametrize(("n", "d", "k"), [(N, D, K), (3001, 2, 10)])
def test_effects_and_predictions_follow_the_delta_method(n, d, k, dtype):
    x, y, weights = problem(dtype, n, d, k)
    params = optimum(x, y, k, dtype)
    v = oracle(params, x, y)
    kernel, bias = (np.float64(leaf) for leaf in params)
    theta = np.concatenate([kernel, bias[None]])
    w = np.float64(weights / weights.sum())

    def probabilities(theta):
        return scipy.special.softmax(np.float64(x) @ theta[:-1] + theta[-1], -1)

    def effects(theta):
        p, kernel = probabilities(theta), theta[:-1]
        return np.einsum("n,nk,dk->dk", w, p, kernel) - np.einsum("n,nk,nl,dl->dk", w, p, p, kernel)

    def errors(function):
        step = 1e-5
        jacobian = np.stack(
            [
                (function(theta + step * e) - function(theta - step * e)) / (2 * step)
                for e in np.eye(theta.size).reshape(-1, *theta.shape)
            ],
            -1,
        )
        return np.sqrt(np.einsum("...p,pq,...q->...", jacobian, v, jacobian))

    tolerance = 2e-4 if dtype == "float32" else 1e-8
    covariance = jnp.asarray(v, dtype)
    ours = inference.average_marginal_effects(params, covariance, x, sample_weights=weights)
    np.testing.assert_allclose(ours.value, effects(theta), atol=tolerance)
    np.testing.assert_allclose(ours.standard_error, errors(effects), rtol=tolerance)
    p = inference.predictions(params, covariance, x)
    np.testing.assert_allclose(p.probability, probabilities(theta), atol=tolerance)
    error = errors(probabilities)
    np.testing.assert_allclose(p.standard_error, error, rtol=20 * tolerance)
    q = probabilities(theta)
    half_width = scipy.special.ndtri(0.975) * error / (q * (1 - q))
    for got, sign in ((p.lower, -1), (p.upper, 1)):
        expected = scipy.special.expit(scipy.special.logit(q) + sign * half_width)
        np.testing.assert_allclose(got, expected, atol=20 * tolerance)


@pytest.mark.x64_once
def test_predictions_stay_probabilities_where_they_are_sure(dtype):
    kernel = np.array([[40.0, 0.0, -40.0]], dtype)
    params = regression.SoftmaxRegression(jnp.asarray(kernel), jnp.zeros(3, dtype))
    x = np.array([[-3.0], [0.0], [1.0], [3.0]], dtype)
    p = inference.predictions(params, jnp.eye(6, dtype=dtype), x)
    for leaf in p:
        assert np.isfinite(leaf).all()
        assert (leaf >= 0).all()
        assert (leaf <= 1).all()
    sure = np.float64(p.standard_error)[2]
    assert (sure[:2] > 0).all()  # not 0: 1 - p is not a difference
    np.testing.assert_allclose(sure[0], sure[1], rtol=1e-5)


@pytest.mark.x64_once
def test_interval_coverage_of_simulated_fits():
    """Of 200 draws from a known model, the 90 % intervals of a slope hold it 90 % of the time."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 1)).astype(np.float32)
    theta = np.array([[0.5, 0.0, -0.5], [0.2, 0.0, -0.2]])

    @jax.jit
    def intervals(params, y):
        v = inference.covariance(params, x, y)
        return inference.coefficients(params, v, reference=1, level=0.9)

    held = 0
    for _ in range(200):
        y = np.argmax(x @ theta[:1] + theta[1] + rng.gumbel(size=(150, 3)), -1)
        c = intervals(optimum(x, y, 3, np.float32), y)
        held += bool(c.lower[0, 0] <= 0.5 <= c.upper[0, 0])
    assert 168 <= held <= 192  # binomial: 180 +- 12 is 2.8 standard deviations


@pytest.mark.x64_once
def test_the_summary_is_a_table_and_rows(dtype):
    x, y, _ = problem(dtype)
    params = optimum(x, y, K, dtype)
    given = {"feature_names": ["a", "b", "c"], "class_names": ["w", "x", "y", "z"]}
    ours = inference.summary(params, x, y, reference=2, robust=True, level=0.9, **given)
    v = inference.covariance(params, x, y, robust=True)
    expected = inference.coefficients(params, v, reference=2, level=0.9)
    assert [(row["class"], row["feature"]) for row in ours.rows] == [
        (c, f) for c in "wxz" for f in ("a", "b", "c", "bias")
    ]
    for name, field in {
        "coefficient": expected.value,
        "standard_error": expected.standard_error,
        "z": expected.z,
        "p_value": expected.p_value,
        "lower": expected.lower,
        "upper": expected.upper,
    }.items():
        np.testing.assert_array_equal([row[name] for row in ours.rows], np.asarray(field).T.ravel())
    assert str(ours) == ours.text
    for piece in (
        "120 examples, 4 classes, 12 parameters",
        "Covariance: robust",
        "Class x against y",
    ):
        assert piece in ours.text
    assert "[0.05" in ours.text
    assert "0.95]" in ours.text
    many = inference.summary(params, x, y, sample_weights=np.full(len(x), 12345, dtype))
    assert "1481400 examples" in many.text
    beside_the_mean = inference.summary(params, x, y, reference=None)
    assert len(beside_the_mean.rows) == P


@pytest.mark.x64_once
def test_bad_arguments_are_named():
    x, y, weights = problem(np.float32)
    params = optimum(x, y, K, np.float32)
    v = inference.covariance(params, x, y)
    with pytest.raises(ValueError, match=r"inference\.covariance: `features` must be of shape"):
        inference.covariance(params, x[:, 1:], y)
    with pytest.raises(ValueError, match="`sample_weights` must be >= 0"):
        inference.covariance(params, x, y, sample_weights=-weights)
    with pytest.raises(ValueError, match="`clusters` must be of shape"):
        inference.covariance(params, x, y, clusters=np.zeros(3))
    masked = np.ma.array(np.arange(N), mask=np.arange(N) == 3)
    with pytest.raises(ValueError, match="`clusters` must be without missing values"):
        inference.covariance(params, x, y, clusters=masked)
    with pytest.raises(ValueError, match="`clusters` must be at least two different clusters"):
        inference.covariance(params, x, y, clusters=np.zeros(N))
    few = {"l2": 1.0, "sample_weights": np.arange(N) < 10, "clusters": np.arange(N)}
    shrunk = regression.fit(x, y, l2=1.0, sample_weights=few["sample_weights"]).params
    with pytest.raises(ValueError, match=r"`clusters` must be two or more .* than .* parameters"):
        inference.covariance(shrunk, x, y, **few)
    with pytest.raises(TypeError, match="`clusters` must be known"):
        jax.jit(lambda c: inference.covariance(params, x, y, clusters=c))(np.arange(N))
    with pytest.raises(ValueError, match="`covariance` must be of shape"):
        inference.coefficients(params, v[1:])
    with pytest.raises(ValueError, match=r"`reference` must be in \[0, 4\), got 4"):
        inference.coefficients(params, v, reference=4)
    with pytest.raises(TypeError, match="`reference` must be an integer"):
        inference.coefficients(params, v, reference=1.5)
    with pytest.raises(ValueError, match=r"`level` must be a number in \(0, 1\), got 95"):
        inference.predictions(params, v, x, level=95)
    with pytest.raises(ValueError, match="`restrictions` must be contrasts"):
        inference.wald_test(params, v, np.ones((1, D + 1, K), np.float32))
    with pytest.raises(ValueError, match="`feature_names` must be 3 names, got 2"):
        inference.summary(params, x, y, feature_names=["a", "b"])
    with pytest.raises(ValueError, match="`feature_names` must be 3 names, got 'abc'"):
        inference.summary(params, x, y, feature_names="abc")


@pytest.mark.x64_once
def test_wald_test_of_no_restriction_is_sure(dtype):
    x, y, _ = problem(dtype)
    params = optimum(x, y, K, dtype)
    v = inference.covariance(params, x, y)
    ours = inference.wald_test(params, v, np.zeros((0, D + 1, K), dtype))
    assert (ours.statistic, ours.degrees_of_freedom, ours.p_value) == (0, 0, 1)
    # Contrasts of fewer digits than the covariance has are contrasts.
    equal = np.zeros((K, D + 1, K), np.float32)
    equal[:, 1] = (np.eye(K) - 1 / K) / 10
    assert inference.wald_test(params, v, equal).degrees_of_freedom == K - 1
    # One restriction is the square of z.
    contrast = np.zeros((1, D + 1, K), dtype)
    contrast[0, 1, 2], contrast[0, 1, 0] = 1, -1
    one = inference.wald_test(params, v, contrast)
    z = inference.coefficients(params, v, reference=0).z[1, 1]
    np.testing.assert_allclose(one.statistic, z**2, rtol=1e-3 if dtype == "float32" else 1e-10)

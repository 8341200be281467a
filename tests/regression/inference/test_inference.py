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
from multinomial import D, K, N, P, optimum, oracle, problem
from sparse_rows import sparse_rows

from softjax import regression
from softjax.regression import inference

pytestmark = pytest.mark.compiled_quickly


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
        sparse = sparse_rows(wide, nse=wide.size)  # one program for all pairs
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
    for level in (95, 0, np.nan, [0.9], "high"):
        with pytest.raises(ValueError, match=r"`level` must be a number in \(0, 1\), got "):
            inference.predictions(params, v, x, level=level)
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

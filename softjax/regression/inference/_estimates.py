"""Estimates with their standard errors and intervals, and tests of several parameters at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import erfc, gammaincc, ndtri
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._numerics import compute_dtype
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import EXACT
from softjax.regression.inference._precision import (
    Variances,
    by_class,
    covariance_array,
    deviations,
    of_covariance,
    sound,
)

# The log-likelihood of a larger model may be smaller by this part of it, because of rounding in
# float32 or because a fit stopped early.
UNCLEAR = 1e-5


class Estimates(NamedTuple):
    """Estimates with standard errors, tests against 0 and intervals; arrays of one shape.

    Attributes:
        value: the estimate.
        standard_error: the square root of its variance.
        z: value / standard_error, standard normal if the true value is 0; NaN if the standard error
            is 0.
        p_value: the two-sided p-value of |z|.
        lower: the lower end of the confidence interval.
        upper: the upper end of the confidence interval.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> inference = softjax.regression.inference
        >>> estimates = inference.estimates(jnp.array([2.0, -1.0]), jnp.array([1.0, 1.0]))
        >>> estimates.p_value
        Array([0.04550026, 0.31731051], dtype=float32)
    """

    value: Array
    standard_error: Array
    z: Array
    p_value: Array
    lower: Array
    upper: Array


class ChiSquareTest(NamedTuple):
    """The result of a chi-square test.

    Attributes:
        statistic: the test statistic, >= 0.
        degrees_of_freedom: degrees of freedom of the chi-square distribution.
        p_value: the probability of a statistic at least as large under the hypothesis.

    Example:
        >>> import softjax
        >>> softjax.regression.inference.likelihood_ratio_test(-12.0, -10.0, 2).statistic
        Array(4., dtype=float32)
    """

    statistic: Array
    degrees_of_freedom: Array
    p_value: Array


@on_auto_axes
def estimates(value: ArrayLike, variance: ArrayLike, *, level: ArrayLike = 0.95) -> Estimates:
    """Estimates from values and variances of anything that is asymptotically normal.

        z = value / sqrt(variance),  p = erfc(|z| / sqrt 2),  value -+ ndtri((1 + level) / 2) se

    Derivative: not supported.
    Edge cases: the p-value is accurate in the far tail, down to the smallest number of the dtype.

    Args:
        value: real, any shape.
        variance: real, >= 0, shape of `value`.
        level: the confidence level, in (0, 1).

    Returns:
        `Estimates` of the shape of `value`, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a level outside (0, 1).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.regression.inference.estimates(jnp.zeros(1), jnp.ones(1)).upper
        Array([1.959964], dtype=float32)

    Source: A. Wald, "Tests of statistical hypotheses concerning several parameters" (1943).
    """
    function = "regression.inference.estimates"
    value = _wide_array(function, "value", value)
    variance = _checks.real_array(function, "variance", variance).astype(value.dtype)
    _checks.same_shape(function, "variance", variance, value.shape)
    check_level(function, level)
    return estimates_core(value, variance, level)


@on_auto_axes
def coefficients(
    params: SoftmaxRegression,
    covariance: ArrayLike,
    *,
    reference: int | None = None,
    level: ArrayLike = 0.95,
) -> Estimates:
    """Coefficients with standard errors, tests and confidence intervals.

        theta_jk - mean_l theta_jl      without a reference class, for all K classes
        theta_jk - theta_jr             against class r, for the K - 1 others: log odds ratios

    The second form is the parametrisation of statsmodels' MNLogit (r = 0) and of the textbooks: the
    change of log p_k / p_r for one unit of the feature.

    Derivative: not supported.
    Edge cases: with one class, coefficients are 0, and z and p-value are NaN; against itself as the
        reference there are no coefficients.

    Args:
        params: kernel [D, K] and bias [K].
        covariance: [P, P], the result of `covariance`.
        reference: r in [0, K), or None.
        level: the confidence level, in (0, 1).

    Returns:
        `Estimates` [D + 1, K] or [D + 1, K - 1]; the last row is the bias.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> inference = softjax.regression.inference
        >>> params, labels = softjax.regression.init(0, 2), jnp.array([0, 1, 0, 1])
        >>> v = inference.covariance(params, jnp.ones((4, 0)), labels)
        >>> inference.coefficients(params, v, reference=0).standard_error
        Array([[1.]], dtype=float32)

    Source: A. Agresti, "Categorical Data Analysis" (2013), section 8.1.
    """
    function = "regression.inference.coefficients"
    v = covariance_array(function, params, covariance)
    if reference is not None:
        reference = class_index(function, "reference", reference, len(params.bias))
    check_level(function, level)
    return _coefficients(function, params, v, level, reference=reference)


@on_auto_axes
def odds_ratios(
    params: SoftmaxRegression, covariance: ArrayLike, *, reference: int, level: ArrayLike = 0.95
) -> Estimates:
    """Odds ratios against a reference class: factors of p_k / p_r for one unit of a feature.

        exp(theta_jk - theta_jr),  standard error exp(...) se(theta_jk - theta_jr)

    z, p-value and interval are computed for the logarithm, whose distribution is closer to normal:
    the interval is the exponential of the interval of `coefficients`, and the hypothesis is a ratio
    of 1. Odds ratios are also called relative risk ratios. The last row belongs to the bias: it has
    the odds for features that are all 0.

    Derivative: not supported.
    Edge cases: a ratio beyond the range of the dtype is infinite.

    Args:
        params: kernel [D, K] and bias [K].
        covariance: [P, P], the result of `covariance`.
        reference: r in [0, K).
        level: the confidence level, in (0, 1).

    Returns:
        `Estimates` [D + 1, K - 1].

    Raises:
        TypeError, ValueError: see `coefficients`.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> inference = softjax.regression.inference
        >>> params, labels = softjax.regression.init(0, 2), jnp.array([0, 1, 0, 1])
        >>> v = inference.covariance(params, jnp.ones((4, 0)), labels)
        >>> ratio = inference.odds_ratios(params, v, reference=0)
        >>> [round(float(bound[0, 0]), 2) for bound in (ratio.lower, ratio.value, ratio.upper)]
        [0.14, 1.0, 7.1]

    Source: A. Agresti, "Categorical Data Analysis" (2013), section 8.1.
    """
    function = "regression.inference.odds_ratios"
    v = covariance_array(function, params, covariance)
    reference = class_index(function, "reference", reference, len(params.bias))
    check_level(function, level)
    table = _coefficients(function, params, v, level, reference=reference)
    ratio, lower, upper = map(jnp.exp, (table.value, table.lower, table.upper))
    error = ratio * table.standard_error
    return table._replace(value=ratio, standard_error=error, lower=lower, upper=upper)


@on_auto_axes
def wald_test(
    params: SoftmaxRegression,
    covariance: ArrayLike,
    restrictions: ArrayLike,
    values: ArrayLike = 0.0,
) -> ChiSquareTest:
    """Wald test of linear restrictions on the parameters.

        R theta = v;  W = (R theta - v)^T (R V R^T)^+ (R theta - v),  chi-square of rank(R V R^T)

    Restrictions may be linearly dependent. For example, the hypothesis that a feature has no effect
    is K restrictions, of which K - 1 are independent.

    Derivative: not supported.
    Edge cases: without restrictions the statistic is 0 and the p-value 1.

    Args:
        params: kernel [D, K] and bias [K].
        covariance: [P, P], the result of `covariance`.
        restrictions: R, real [R, D + 1, K]. Each restriction must sum to 0 over the classes, since
            only differences between classes are determined; its last row is for the bias.
        values: v, real [R] or a scalar.

    Returns:
        `ChiSquareTest`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape; known restrictions that do
            not sum to 0 over the classes.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> inference = softjax.regression.inference
        >>> params, labels = softjax.regression.init(0, 2), jnp.array([0, 1, 0, 1])
        >>> v = inference.covariance(params, jnp.ones((4, 0)), labels)
        >>> inference.wald_test(params, v, jnp.array([[[1.0, -1.0]]]), 1.0).statistic
        Array(1., dtype=float32)

    Source: A. Wald (1943).
    """
    function = "regression.inference.wald_test"
    v = covariance_array(function, params, covariance)
    r = _checks.real_array(function, "restrictions", restrictions)
    # The tolerance follows the less precise dtype: float32 restrictions sum to 0 up to rounding.
    eps = max(jnp.finfo(r.dtype).eps, jnp.finfo(v.dtype).eps)
    d, k = jnp.shape(params.kernel)
    if r.shape[1:] != (d + 1, k):
        expected = f"of shape (restrictions, {d + 1}, {k}); one restriction is r[None]"
        raise ValueError(_checks.message(function, "restrictions", expected, f"shape {r.shape}"))
    known = _checks.known(restrictions)
    if known is not None:
        largest = np.max(np.abs(known), -1, initial=0)
        if np.any(np.abs(np.sum(known, -1)) > k * eps * largest):
            expected = "contrasts that sum to 0 over the classes"
            raise ValueError(_checks.message(function, "restrictions", expected, "others"))
    values = _checks.real_array(function, "values", values)
    values = _checks.broadcast(function, "values", values, (len(r),))
    return _wald_test(function, params, v, r, values)


@on_auto_axes
def likelihood_ratio_test(
    restricted: ArrayLike, full: ArrayLike, degrees_of_freedom: ArrayLike
) -> ChiSquareTest:
    """Likelihood-ratio test of a model against a larger model that contains it.

        LR = 2 (l_full - l_restricted),  chi-square with one degree for each omitted parameter

    Derivative: not supported.
    Edge cases: an LR below 0 by rounding, or since a fit stopped early, counts as 0 as long as the
        likelihoods differ by less than 1e-5 of their size. Under a trace the errors below are NaN.

    Args:
        restricted: the log-likelihood of the smaller model at its optimum, nats.
        full: the log-likelihood of the larger model on the same examples, nats.
        degrees_of_freedom: real, >= 1, the number of omitted parameters: K - 1 for each omitted
            feature. (Effective numbers of parameters differ by numbers that are not whole.)

    Returns:
        `ChiSquareTest`.

    Raises:
        TypeError, ValueError: an argument that is not real, degrees of freedom below 1, or a larger
            model that is clearly less likely than the smaller one.

    Example:
        >>> import softjax
        >>> softjax.regression.inference.likelihood_ratio_test(-12.0, -10.0, 2).p_value
        Array(0.13533528, dtype=float32)

    Source: S. S. Wilks, "The large-sample distribution of the likelihood ratio" (1938).
    """
    function = "regression.inference.likelihood_ratio_test"
    restricted = _wide_array(function, "restricted", restricted)
    full = _wide_array(function, "full", full)
    _checks.not_bool(function, "degrees_of_freedom", degrees_of_freedom)
    degrees = _checks.real_array(function, "degrees_of_freedom", degrees_of_freedom)
    few, swapped = degrees < 1, full < restricted - UNCLEAR * jnp.abs(restricted)
    if _checks.checks_values([few, swapped]):
        values = np.asarray(degrees)
        _checks.refuse_first(function, "degrees_of_freedom", ">= 1", values, np.asarray(few))
        if swapped.any():
            expected = "of the larger model, so not less than `restricted`"
            got = "a smaller likelihood; are the arguments swapped, or did a fit stop early?"
            raise ValueError(_checks.message(function, "full", expected, got))
    statistic = _checks.nan_where(swapped, 2 * jnp.maximum(full - restricted, 0))
    test = chi_square_test(statistic, degrees)
    return test._replace(p_value=_checks.nan_where(few | swapped, test.p_value))


@jax.jit
def estimates_core(value: Array, variance: Array, level: ArrayLike) -> Estimates:
    error = jnp.sqrt(variance)
    # The data tell nothing about a constant feature that a penalty holds near 0: z is NaN.
    z = jnp.where(error > 0, value / error, jnp.nan)
    p_value = erfc(jnp.abs(z) / jnp.asarray(2, z.dtype) ** 0.5)
    half_width = normal_quantile(level, z.dtype) * error
    return Estimates(value, error, z, p_value, value - half_width, value + half_width)


@of_covariance
def _coefficients(
    params: SoftmaxRegression, v: Array, eps: float, level: Array, *, reference: int | None
) -> Variances:
    of_parameter = deviations(v).reshape(-1, len(params.bias))
    theta, v = by_class(params, v)
    k = theta.shape[1]
    contrast = np.eye(k) - 1 / k
    if reference is not None:
        contrast = np.delete(np.eye(k) - np.eye(k)[:, [reference]], reference, 1)
    contrast = jnp.asarray(contrast, theta.dtype)
    within = jnp.einsum("dkdl->dkl", v)
    variance = jnp.einsum("km,dkl,lm->dm", contrast, within, contrast, precision=EXACT)
    value = jnp.matmul(theta, contrast, precision=EXACT)
    terms = jnp.matmul(of_parameter, jnp.abs(contrast), precision=EXACT)
    variance, lost = sound(variance, terms, eps)
    return Variances(estimates_core(value, variance, level), lost)


@jax.jit
def chi_square_test(statistic: Array, degrees_of_freedom: Array) -> ChiSquareTest:
    half = degrees_of_freedom.astype(statistic.dtype) / 2
    p_value = gammaincc(jnp.where(half > 0, half, 1), statistic / 2)
    return ChiSquareTest(statistic, degrees_of_freedom, jnp.where(half > 0, p_value, 1))


@of_covariance
def _wald_test(
    params: SoftmaxRegression, v: Array, eps: float, r: Array, values: Array
) -> Variances:
    of_parameter = deviations(v).reshape(-1, len(params.bias))
    terms = jnp.einsum("rdk,dk->r", jnp.abs(r), of_parameter, precision=EXACT)
    theta, v = by_class(params, v)
    distance = jnp.einsum("rdk,dk->r", r, theta, precision=EXACT) - values
    variance = jnp.einsum("rdk,dkel,sel->rs", r, v, r, precision=EXACT)
    own, lost = sound(jnp.diag(variance), terms, eps)
    scale = jnp.sqrt(jnp.where(own == 0, 1, own))
    eigenvalues, vectors = jnp.linalg.eigh(variance / (scale[:, None] * scale))
    # The matrix is scaled to a unit diagonal. Dependent restrictions then leave eigenvalues of the
    # size of rounding errors.
    used = eigenvalues > theta.size * eps * jnp.max(eigenvalues, initial=0)
    along = jnp.matmul(vectors.T, distance / scale, precision=EXACT)
    statistic = jnp.sum(jnp.where(used, along**2 / jnp.where(used, eigenvalues, 1), 0))
    return Variances(chi_square_test(statistic, jnp.sum(used, dtype=jnp.int32)), lost)


def class_index(function: str, argument: str, value: int, num_classes: int) -> int:
    index = _checks.integer(function, argument, value)
    if not 0 <= index < num_classes:
        raise ValueError(_checks.message(function, argument, f"in [0, {num_classes})", index))
    return index


def _wide_array(function: str, argument: str, x: ArrayLike) -> Array:
    x = _checks.real_array(function, argument, x)
    return x.astype(compute_dtype(x.dtype))


def check_level(function: str, level: ArrayLike) -> None:
    value = _checks.known(level)
    if value is not None and not (value.ndim == 0 and value.dtype.kind in "iuf" and 0 < value < 1):
        raise ValueError(_checks.message(function, "level", "a number in (0, 1)", level))


def normal_quantile(level: ArrayLike, dtype) -> Array:
    """The half-width of an interval of this level, in standard errors."""
    # The tail probability keeps its digits if the level is near 1; 1 minus the tail would not.
    return -ndtri((1 - jnp.asarray(level, dtype)) / 2)

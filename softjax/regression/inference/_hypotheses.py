"""Tests of several parameters at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import gammaincc
from jax.typing import ArrayLike

from softjax import _checks
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import EXACT
from softjax.regression.inference._estimates import by_class, covariance_array, wide_array


class ChiSquareTest(NamedTuple):
    """A test that refers its statistic to a chi-square distribution.

    Attributes:
        statistic: >= 0.
        degrees_of_freedom: of the chi-square distribution.
        p_value: the probability of a statistic as large or larger under the hypothesis.

    Example:
        >>> import softjax
        >>> softjax.regression.inference.likelihood_ratio_test(-12.0, -10.0, 2).statistic
        Array(4., dtype=float32)
    """

    statistic: Array
    degrees_of_freedom: Array
    p_value: Array


def wald_test(
    params: SoftmaxRegression,
    covariance: ArrayLike,
    restrictions: ArrayLike,
    values: ArrayLike = 0.0,
) -> ChiSquareTest:
    """Wald test of linear restrictions of the parameters.

        R theta = v;  W = (R theta - v)^T (R V R^T)^+ (R theta - v),  chi-square of rank(R V R^T)

    Restrictions may repeat each other: that no feature of a set matters, say, is K restrictions a
    feature, of which K - 1 are independent.

    Derivative: not the purpose.
    Edge cases: no restriction: statistic 0, p-value 1.

    Args:
        params: kernel [D, K] and bias [K].
        covariance: [P, P], of `covariance`.
        restrictions: R, real [R, D + 1, K], each sums to 0 over the classes, for anything else
            depends on the gauge; the last row of each is for the bias.
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
    r = _checks.real_array(function, "restrictions", restrictions).astype(v.dtype)
    d, k = jnp.shape(params.kernel)
    _checks.same_shape(function, "restrictions", r, (len(r) if r.ndim else 0, d + 1, k))
    known = _checks.known(restrictions)
    if known is not None:
        largest = np.max(np.abs(known), -1, initial=0)
        if np.any(np.abs(np.sum(known, -1)) > k * jnp.finfo(v.dtype).eps * largest):
            expected = "contrasts, which sum to 0 over the classes"
            raise ValueError(_checks.message(function, "restrictions", expected, "others"))
    values = _checks.real_array(function, "values", values).astype(v.dtype)
    return _wald_test(params, v, r, _checks.broadcast(function, "values", values, (len(r),)))


def likelihood_ratio_test(
    restricted: ArrayLike, full: ArrayLike, degrees_of_freedom: ArrayLike
) -> ChiSquareTest:
    """Likelihood-ratio test of a model within a larger one.

        LR = 2 (l_full - l_restricted),  chi-square of as many degrees as parameters are left out

    Derivative: not the purpose.
    Edge cases: an LR below 0, from fits that stopped early, counts as 0.

    Args:
        restricted: the log-likelihood of the smaller model at its optimum, nats.
        full: that of the larger one, on the same examples.
        degrees_of_freedom: a feature left out is K - 1.

    Returns:
        `ChiSquareTest`.

    Raises:
        TypeError: an argument that is not real.

    Example:
        >>> import softjax
        >>> softjax.regression.inference.likelihood_ratio_test(-12.0, -10.0, 2).p_value
        Array(0.13533528, dtype=float32)

    Source: S. S. Wilks, "The large-sample distribution of the likelihood ratio" (1938).
    """
    function = "regression.inference.likelihood_ratio_test"
    restricted = wide_array(function, "restricted", restricted)
    full = wide_array(function, "full", full)
    statistic = 2 * jnp.maximum(full - restricted, 0)
    return chi_square_test(statistic, jnp.asarray(degrees_of_freedom))


@jax.jit
def chi_square_test(statistic: Array, degrees_of_freedom: Array) -> ChiSquareTest:
    half = degrees_of_freedom.astype(statistic.dtype) / 2
    p_value = gammaincc(jnp.where(half > 0, half, 1), statistic / 2)
    return ChiSquareTest(statistic, degrees_of_freedom, jnp.where(half > 0, p_value, 1))


@jax.jit
def _wald_test(params: SoftmaxRegression, v: Array, r: Array, values: Array) -> ChiSquareTest:
    theta, v = by_class(params, v)
    distance = jnp.einsum("rdk,dk->r", r, theta, precision=EXACT) - values
    variance = jnp.einsum("rdk,dkel,sel->rs", r, v, r, precision=EXACT)
    scale = jnp.sqrt(jnp.diag(variance))
    scale = jnp.where(scale > 0, scale, 1)
    eigenvalues, vectors = jnp.linalg.eigh(variance / (scale[:, None] * scale))
    # Of a unit diagonal, so that what repetition leaves is rounding.
    used = eigenvalues > theta.size * jnp.finfo(theta.dtype).eps * jnp.max(eigenvalues, initial=0)
    along = jnp.matmul(vectors.T, distance / scale, precision=EXACT)
    statistic = jnp.sum(jnp.where(used, along**2 / jnp.where(used, eigenvalues, 1), 0))
    return chi_square_test(statistic, jnp.sum(used.astype(jnp.int32)))

"""Average marginal effects on the probabilities, and predictions with their uncertainty."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._auto_axes import on_auto_axes
from softjax._logsumexp import logsumexp_core
from softjax._softmax_core import softmax_core, softmax_tangent
from softjax.regression._features import Features
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import (
    EXACT,
    Rows,
    augmented,
    of_each_row,
    rows_without_labels,
    sum_of_chunks,
)
from softjax.regression.inference._estimates import (
    Estimates,
    check_level,
    estimates_core,
    normal_quantile,
)
from softjax.regression.inference._precision import (
    Variances,
    by_class,
    covariance_array,
    deviations,
    of_covariance,
    sound,
)


class Predictions(NamedTuple):
    """Predicted probabilities with their uncertainty, arrays [..., K].

    Attributes:
        probability: the predicted probabilities; each row sums to 1.
        standard_error: the standard error of the probability.
        lower: the lower end of the confidence interval, in [0, 1].
        upper: the upper end of the confidence interval, in [0, 1].

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> inference = softjax.regression.inference
        >>> params, x, labels = softjax.regression.init(0, 2), jnp.ones((4, 0)), [0, 1, 0, 1]
        >>> v = inference.covariance(params, x, jnp.array(labels))
        >>> inference.predictions(params, v, jnp.ones((1, 0))).standard_error  # sqrt(1/2 1/2 / 4)
        Array([[0.25, 0.25]], dtype=float32)
    """

    probability: Array
    standard_error: Array
    lower: Array
    upper: Array


@on_auto_axes
def average_marginal_effects(
    params: SoftmaxRegression,
    covariance: ArrayLike,
    features: Features,
    *,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    level: ArrayLike = 0.95,
) -> Estimates:
    """Average marginal effects: mean derivatives of the probabilities by the features.

        m_jk = sum_i w_i u_ijk / sum_i w_i
        u_ijk = dp_ik / dx_ij = p_ik (kernel_jk - <p_i, kernel_j>)

    The standard errors come from the delta method. Its Jacobian

        dm_jk / dtheta_el = mean_i [e = j] (diag(p) - p p^T)_kl
                            + mean_i x~_ie ([k = l] u_ijk - u_ijk p_il - p_ik u_ijl)

    is one matrix product over the rows, so that the function passes over the N rows once, and not
    once per effect.

    Derivative: not supported.
    Edge cases: the effects of all classes sum to 0. Features are treated as continuous, even if
        they are 0 or 1. With one class, effects are 0, and z and p-value are NaN.

    Args:
        params: kernel [D, K] and bias [K].
        covariance: [P, P], the result of `covariance`.
        features: real [N, D], dense, BCOO or BCSR: the population to average over.
        sample_weights: real [N], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.
        level: the confidence level, in (0, 1).

    Returns:
        `Estimates` [D, K], probability per unit of the feature.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a level outside (0, 1).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> inference = softjax.regression.inference
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> v = inference.covariance(params, x, labels)
        >>> effect = inference.average_marginal_effects(params, v, x)
        >>> [round(float(m), 3) for m in effect.value[0]]
        [-0.182, 0.182]

    Source: W. H. Greene, "Econometric Analysis" (2012), sections 17.3.2 and 18.2.
    """
    function = "regression.inference.average_marginal_effects"
    rows, v = population(function, params, covariance, features, sample_weights, offset, level)
    return average_effects_of(function, params, v, rows, level)


@on_auto_axes
def predictions(
    params: SoftmaxRegression,
    covariance: ArrayLike,
    features: Features,
    *,
    offset: ArrayLike | None = None,
    level: ArrayLike = 0.95,
) -> Predictions:
    """Predicted probabilities with standard errors and confidence intervals.

        logit p_k = z_k - log sum_{l != k} exp(z_l)
        se(logit p_k)^2 = g^T Cov(z) g,  g_k = 1, g_l = -p_l / (1 - p_k)
        se(p_k) = p_k (1 - p_k) se(logit p_k)

    by the delta method. The interval is computed for the log odds and mapped to probabilities, so
    that it stays in [0, 1].

    Derivative: not supported.
    Edge cases: with one class, the probability is 1 and the standard error 0. If features are far
        from 0, float32 cannot hold a covariance from which the error follows: that of `covariance`
        is float64. A variance that rounding hides is an error, or NaN under a trace.

    Args:
        params: kernel [D, K] and bias [K].
        covariance: [P, P], the result of `covariance`.
        features: real [N, D], dense, BCOO or BCSR.
        offset: real [N, K], nats; None for zeros.
        level: the confidence level, in (0, 1).

    Returns:
        `Predictions` [N, K], at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a level outside (0, 1).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> inference = softjax.regression.inference
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> v = inference.covariance(params, x, labels)
        >>> p = inference.predictions(params, v, jnp.array([[3.0]]))
        >>> round(float(p.lower[0, 1]), 2), round(float(p.upper[0, 1]), 2)
        (0.08, 0.99)

    Source: J. Xu and J. S. Long, "Confidence intervals for predicted outcomes in regression models
        for categorical outcomes" (2005).
    """
    function = "regression.inference.predictions"
    rows, v = population(function, params, covariance, features, None, offset, level)
    return _predictions(function, params, v, rows, level)


def population(
    function: str,
    params: SoftmaxRegression,
    covariance: ArrayLike,
    features: Features,
    sample_weights: ArrayLike | None,
    offset: ArrayLike | None,
    level: ArrayLike,
) -> tuple[Rows, Array]:
    """Checks the examples of an average or of predictions, and the covariance."""
    v = covariance_array(function, params, covariance)
    rows = rows_without_labels(function, params, features, sample_weights, offset).dense()
    check_level(function, level)
    return rows, v


def effects_of(p: Array, kernel: Array) -> Array:
    """dp_ik / dx_ij, [N, D, K]: the Jacobian of softmax at p [N, K] times rows of the kernel."""
    of_each = jnp.broadcast_to(kernel, (len(p), *kernel.shape))
    return softmax_tangent(p[:, None, :], of_each, (2,))


@of_covariance
def average_effects_of(
    params: SoftmaxRegression, v: Array, eps: float, rows: Rows, level: Array
) -> Variances:
    value, jacobian = _effects_and_jacobian(params, rows)
    jacobian = jacobian.reshape(value.size, len(v))
    variance = jnp.sum(jnp.matmul(jacobian, v, precision=EXACT) * jacobian, -1)
    terms = jnp.matmul(jnp.abs(jacobian), deviations(v), precision=EXACT)
    variance, lost = sound(variance.reshape(value.shape), terms.reshape(value.shape), eps)
    return Variances(estimates_core(value, variance, level), lost)


def _effects_and_jacobian(params: SoftmaxRegression, rows: Rows) -> tuple[Array, Array]:
    """m [D, K] and its Jacobian [D, K, D + 1, K]."""
    x, share = rows.counted()
    kernel = params.kernel.astype(x.dtype)
    d, k = kernel.shape
    p = softmax_core(rows.logits(x, params), (1,))

    def add_chunk(total, x, p, share):
        effects = share[:, None, None] * effects_of(p, kernel)
        moved = (p[:, None, :] * augmented(x)[:, :, None]).reshape(len(p), -1)
        cross = jnp.matmul(effects.reshape(len(p), -1).T, moved, precision=EXACT)
        unit = jnp.broadcast_to(jnp.eye(k, dtype=x.dtype), (len(p), k, k))
        jacobian = softmax_tangent(p[:, None, :], unit, (2,))
        means = jnp.sum(effects, 0), jnp.sum(share[:, None, None] * jacobian, 0)
        own = jnp.einsum("ndk,ne->dke", effects, augmented(x), precision=EXACT)
        return jax.tree.map(jnp.add, total, (*means, own, cross))

    shapes = ((d, k), (k, k), (d, k, d + 1), (d * k, (d + 1) * k))
    zeros = tuple(jnp.zeros(shape, x.dtype) for shape in shapes)
    effects, jacobian, own, cross = sum_of_chunks(add_chunk, zeros, (2 * d + k) * k, share, x, p)
    cross = cross.reshape(d, k, d + 1, k)
    same_class = jnp.eye(k, dtype=x.dtype)[:, None, :]
    same_feature = jnp.eye(d, d + 1, dtype=x.dtype)[:, None, :, None]
    derivative = same_feature * jacobian[:, None, :] + own[..., None] * same_class
    return effects, derivative - cross - cross.transpose(0, 3, 2, 1)


@of_covariance
def _predictions(
    params: SoftmaxRegression, v: Array, eps: float, rows: Rows, level: Array
) -> Variances:
    # sum_j |x~_ij| V_jj^(1/2) of each class
    of_logits = jnp.matmul(
        jnp.abs(augmented(rows.x)), deviations(v).reshape(-1, len(params.bias)), precision=EXACT
    )
    _, v = by_class(params, v)
    quantile = normal_quantile(level, rows.x.dtype)
    is_own = jnp.eye(v.shape[1], dtype=bool)

    def of_row(logit_covariance, z, of_logits):
        others = jnp.where(is_own, -jnp.inf, z)
        g = jnp.where(is_own, 1, -softmax_core(others, (1,)))
        variance = jnp.sum(jnp.matmul(g, logit_covariance, precision=EXACT) * g, 1)
        terms = jnp.matmul(jnp.abs(g), of_logits, precision=EXACT)
        variance, lost = sound(variance, terms, eps)
        logit_error = jnp.sqrt(variance)
        logit = z - logsumexp_core(others, (1,))[:, 0]
        slope = jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)
        lower, upper = (jax.nn.sigmoid(logit + q * logit_error) for q in (-quantile, quantile))
        predicted = Predictions(softmax_core(z, (0,)), slope * logit_error, lower, upper)
        return Variances(predicted, lost)

    return of_each_row(of_row, (v,), rows.x, rows.logits(rows.x, params), of_logits)

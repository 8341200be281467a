"""How well a model fits: the log-likelihood and what is made of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._labels import ClassIndices, Labels
from softjax._losses import expected_loss, index_loss
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import Rows, checked_rows, counted, masses, product, times
from softjax.regression.inference._hypotheses import ChiSquareTest, chi_square_test


class GoodnessOfFit(NamedTuple):
    """How well a softmax regression fits, beside the model that knows the class shares only.

    Attributes:
        log_likelihood: sum_i w_i log p_i(y_i), nats.
        null_log_likelihood: that of the class shares, sum_k n_k log(n_k / n).
        num_examples: n = sum_i w_i, counts of labels included.
        num_parameters: k = (D + 1) (K - 1), what the gauge leaves.
        degrees_of_freedom: n - k, of the residuals.
        aic: 2 k - 2 log_likelihood.
        bic: k log n - 2 log_likelihood.
        pseudo_r2: McFadden's 1 - log_likelihood / null_log_likelihood.
        likelihood_ratio: test against the class shares, D (K - 1) degrees of freedom.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> fit = softjax.regression.inference.goodness_of_fit(params, x, labels)
        >>> int(fit.num_parameters), round(float(fit.pseudo_r2), 3)
        (2, 0.153)
    """

    log_likelihood: Array
    null_log_likelihood: Array
    num_examples: Array
    num_parameters: Array
    degrees_of_freedom: Array
    aic: Array
    bic: Array
    pseudo_r2: Array
    likelihood_ratio: ChiSquareTest


def log_likelihood(
    params: SoftmaxRegression,
    features: ArrayLike,
    labels: Labels,
    *,
    sample_weights: ArrayLike | None = None,
) -> Array:
    """Log-likelihood of a softmax regression: a sum, not a mean, and without penalty.

        l = sum_i w_i sum_k y_ik log p_ik

    Of counts it leaves out the multinomial coefficients, which no parameter changes.

    Derivative: with respect to the logits w_i (y_i - p_i sum_k y_ik); both modes, any order.
    Edge cases: a row of weight 0 takes no part, NaN included.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D].
        labels: class indices, integer [N], or counts or a distribution, floating [N, K].
        sample_weights: real [N], >= 0, how often each row was seen; None for once.

    Returns:
        A scalar, nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(2, 4)
        >>> inference = softjax.regression.inference
        >>> inference.log_likelihood(params, jnp.ones((3, 2)), jnp.array([0, 1, 3]))  # -3 log 4
        Array(-4.158883, dtype=float32)

    Source: A. Agresti, "Categorical Rows Analysis" (2013), section 8.1.4.
    """
    function = "regression.inference.log_likelihood"
    return _log_likelihood(params, checked_rows(function, params, features, labels, sample_weights))


def goodness_of_fit(
    params: SoftmaxRegression,
    features: ArrayLike,
    labels: Labels,
    *,
    sample_weights: ArrayLike | None = None,
) -> GoodnessOfFit:
    """How well a softmax regression fits: log-likelihoods, AIC, BIC, pseudo-R2.

    They are those of maximum likelihood: with a penalty the parameters count for less than one
    each, so that AIC, BIC and the test are no more than an orientation.

    Derivative: not the purpose.
    Edge cases: one class only in the labels: pseudo-R2 is NaN, 0 / 0, or below 0.

    Args:
        params: kernel [D, K] and bias [K], at the optimum.
        features: real [N, D].
        labels: class indices, integer [N], or counts or a distribution, floating [N, K].
        sample_weights: real [N], >= 0, how often each row was seen; None for once.

    Returns:
        `GoodnessOfFit`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> x, labels = jnp.array([[0.0], [1.0], [2.0], [3.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> fit = softjax.regression.inference.goodness_of_fit(params, x, labels)
        >>> round(float(fit.aic), 3)
        8.695

    Source: D. McFadden, "Conditional logit analysis of qualitative choice behavior" (1974),
        section 4; H. Akaike (1974); G. Schwarz (1978).
    """
    function = "regression.inference.goodness_of_fit"
    rows = checked_rows(function, params, features, labels, sample_weights)
    return _goodness_of_fit(params, rows)


@jax.jit
def _goodness_of_fit(params: SoftmaxRegression, rows: Rows) -> GoodnessOfFit:
    d, k = params.kernel.shape
    log_likelihood = _log_likelihood(params, rows)
    counts = _class_counts(rows, k)
    n = jnp.sum(counts)
    null = jnp.sum(jnp.where(counts > 0, counts * jnp.log(counts / n), 0))
    size = (d + 1) * (k - 1)
    return GoodnessOfFit(
        log_likelihood,
        null,
        n,
        jnp.asarray(size),
        n - size,
        2 * size - 2 * log_likelihood,
        size * jnp.log(n) - 2 * log_likelihood,
        1 - log_likelihood / null,
        chi_square_test(2 * jnp.maximum(log_likelihood - null, 0), jnp.asarray(d * (k - 1))),
    )


@jax.jit
def _log_likelihood(params: SoftmaxRegression, rows: Rows) -> Array:
    x, _ = counted(rows.x, rows.w)
    z = product(x, params)
    if isinstance(rows.targets, ClassIndices):
        losses = masses(rows.targets, None, z.dtype) * index_loss(z, rows.targets.index, None)
    else:
        losses = expected_loss(z, rows.targets)
    return -jnp.sum(losses if rows.w is None else times(rows.w, losses))


def _class_counts(rows: Rows, num_classes: int) -> Array:
    weights = jnp.ones(len(rows.x), rows.x.dtype) if rows.w is None else rows.w
    if isinstance(rows.targets, ClassIndices):
        counts = times(weights, masses(rows.targets, None, weights.dtype))
        return jnp.zeros(num_classes, weights.dtype).at[rows.targets.index].add(counts)
    return jnp.sum(times(weights[:, None], rows.targets), 0)

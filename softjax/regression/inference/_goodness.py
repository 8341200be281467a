"""The log-likelihood of a model, and its goodness of fit beside a model without features."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax._auto_axes import on_auto_axes
from softjax._labels import ClassIndices, Labels
from softjax._losses import expected_loss, index_loss
from softjax._softmax_core import softmax_core
from softjax._weights import sums_by_class
from softjax.regression._features import Features
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import EXACT, Rows, checked_rows, times
from softjax.regression.inference._estimates import ChiSquareTest, chi_square_test
from softjax.regression.inference._rank import Determined, determined, num_parameters

# With an offset, Newton's method fits the bias of the null model. It takes at most NULL_STEPS steps
# and stops when the expected class shares agree with the shares of the labels up to NULL_TOLERANCE
# roundings.
NULL_STEPS, NULL_TOLERANCE = 100, 64


@on_auto_axes
def log_likelihood(
    params: SoftmaxRegression,
    features: Features,
    labels: Labels,
    *,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array:
    """Log-likelihood of a softmax regression: the sum over the examples, without a penalty.

        l = sum_i w_i sum_k y_ik log p_ik

    If the labels are counts, the multinomial coefficients are left out; they do not depend on the
    parameters.

    Derivative: w_i (y_i - p_i sum_k y_ik) with respect to the logits; both modes, any order.
    Edge cases: a row of weight 0 is ignored, even if it contains NaN.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], or counts or a distribution, floating [N, K].
        sample_weights: real [N], >= 0, how often each row was seen; None for once.
        offset: real [N, K], nats; None for zeros.

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

    Source: A. Agresti, "Categorical Data Analysis" (2013), section 8.1.4.
    """
    function = "regression.inference.log_likelihood"
    rows = checked_rows(function, params, features, labels, sample_weights, None, offset)
    return _log_likelihood(params, rows)


@jax.jit
def _log_likelihood(params: SoftmaxRegression, rows: Rows) -> Array:
    x, _ = rows.counted()
    z = rows.logits(x, params)
    if isinstance(rows.targets, ClassIndices):
        losses = rows.masses(z.dtype) * index_loss(z, rows.targets.index, None)
    else:
        losses = expected_loss(z, rows.targets)
    return -jnp.sum(losses if rows.w is None else times(rows.w, losses))


class GoodnessOfFit(NamedTuple):
    """The goodness of fit of a softmax regression, compared with a model without features.

    Attributes:
        log_likelihood: sum_i w_i log p_i(y_i), nats.
        null_log_likelihood: log-likelihood of the null model. With a bias and without an offset it
            is sum_k n_k log(n_k / n); `goodness_of_fit` defines the other cases.
        num_examples: n = sum_i w_i, where counts in the labels count too.
        num_parameters: k = rank([X, 1]) (K - 1), the number of independent parameters, which is
            (D + 1) (K - 1) if no feature is constant or a combination of others; rank(X) (K - 1)
            without an intercept. More than 2048 features all count.
        degrees_of_freedom: n - k, the degrees of freedom of the residuals.
        aic: 2 k - 2 log_likelihood.
        bic: k log n - 2 log_likelihood.
        pseudo_r2: McFadden's 1 - log_likelihood / null_log_likelihood.
        likelihood_ratio: the test against the null model; the bias has K - 1 of the k parameters.

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


@on_auto_axes
def goodness_of_fit(
    params: SoftmaxRegression,
    features: Features,
    labels: Labels,
    *,
    fit_intercept: bool = True,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> GoodnessOfFit:
    """Goodness of fit of a softmax regression: log-likelihoods, AIC, BIC, pseudo-R2.

    The formulas are those of maximum likelihood. A penalised fit has fewer effective parameters
    than these formulas count, so that AIC, BIC and the test are then only approximate. The null
    model has no features; it has a bias and an offset if the model has them, as in R's `glm`.

    Derivative: not supported.
    Edge cases: if the labels contain one class only, pseudo-R2 is NaN (0 / 0) or below 0. With
        class weights the fit does not maximise the likelihood of the data, so that pseudo-R2, test,
        AIC and BIC are NaN; the log-likelihood is without them.

    Args:
        params: kernel [D, K] and bias [K], at the optimum.
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], or counts or a distribution, floating [N, K].
        fit_intercept: as in the fit.
        sample_weights: real [N], >= 0, how often each row was seen; None for once.
        class_weights: real [K], >= 0, those of the fit.
        offset: real [N, K], as in the fit.

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
    rows = checked_rows(
        function, params, features, labels, sample_weights, class_weights, offset, fit_intercept
    )
    return goodness_of_rows(params, rows, determined(rows))


def goodness_of_rows(params: SoftmaxRegression, rows: Rows, found: Determined) -> GoodnessOfFit:
    """The goodness of fit for checked rows, which determine the parameters that are `found`."""
    size = num_parameters(found, rows.constant, len(params.bias))
    has_intercept = bool(rows.constant)
    fit = _goodness_of_fit(params, rows._replace(constant=1, c=None), has_intercept, size)
    return fit if rows.c is None else of_class_weights(fit)


def of_class_weights(fit: GoodnessOfFit) -> GoodnessOfFit:
    """The goodness of a fit that does not maximise the likelihood, without what needs that."""
    nan = jnp.full_like(fit.aic, jnp.nan)
    test = fit.likelihood_ratio._replace(statistic=nan, p_value=nan)
    return fit._replace(aic=nan, bic=nan, pseudo_r2=nan, likelihood_ratio=test)


@partial(jax.jit, static_argnames="fit_intercept")
def _goodness_of_fit(
    params: SoftmaxRegression, rows: Rows, fit_intercept: bool, size: Array
) -> GoodnessOfFit:
    counts = _class_counts(rows, len(params.bias))
    null = _null_log_likelihood(rows, counts, fit_intercept)
    return goodness_of_sums(_log_likelihood(params, rows), null, counts, fit_intercept, size)


def goodness_of_sums(
    log_likelihood: Array, null: Array, counts: Array, fit_intercept: bool, size: Array
) -> GoodnessOfFit:
    """The goodness of fit of `size` parameters for examples whose classes have these counts [K]."""
    k, n = len(counts), jnp.sum(counts)
    parameters = size.astype(n.dtype)
    return GoodnessOfFit(
        log_likelihood,
        null,
        n,
        size,
        n - parameters,
        2 * parameters - 2 * log_likelihood,
        parameters * jnp.log(n) - 2 * log_likelihood,
        1 - log_likelihood / null,
        chi_square_test(2 * jnp.maximum(log_likelihood - null, 0), size - fit_intercept * (k - 1)),
    )


def _null_log_likelihood(rows: Rows, counts: Array, fit_intercept: bool) -> Array:
    """The largest log-likelihood of a model with only the bias and the offset of this model."""
    k, n = len(counts), jnp.sum(counts)
    if rows.offset is None:
        shares = counts / n if fit_intercept else jnp.full_like(counts, 1 / k)
        return jnp.sum(jnp.where(counts > 0, counts * jnp.log(shares), 0))
    x = jnp.zeros((len(rows.offset), 0), counts.dtype)
    null = rows._replace(x=x, offset=rows.with_offset(jnp.zeros_like(rows.offset)))

    def log_likelihood(bias):
        return _log_likelihood(SoftmaxRegression(jnp.zeros((0, k), bias.dtype), bias), null)

    if not fit_intercept:
        return log_likelihood(jnp.zeros_like(counts))
    weights = times(jnp.ones(len(x), x.dtype) if rows.w is None else rows.w, rows.masses(x.dtype))
    # The bias of a class without examples would be log 0, so such a class is left out.
    present = counts > 0
    least = jnp.finfo(counts.dtype).min / 8

    def matched(bias):
        """Adds log(counts / expected counts) to the bias, which never lowers the likelihood."""
        p = softmax_core(null.offset + bias, (1,))
        expected = weights @ p
        return jnp.where(present, bias + jnp.log(counts / expected), least), p, expected

    def step(carry):
        bias, _, steps = carry
        next_bias, p, expected = matched(bias)
        h = jnp.diag(jnp.where(present, expected, 1)) - jnp.matmul(
            p.T, weights[:, None] * p, precision=EXACT
        )
        h += jnp.mean(expected) / k
        newton = bias + jnp.where(present, jnp.linalg.solve(h, counts - expected), 0)
        better = log_likelihood(newton) > log_likelihood(next_bias)
        missing = jnp.max(jnp.abs(counts - expected)) / n
        return jnp.where(better, newton, next_bias), missing, steps + 1

    def unmatched(carry):
        _, missing, steps = carry
        return (missing > NULL_TOLERANCE * jnp.finfo(counts.dtype).eps) & (steps < NULL_STEPS)

    bias = jnp.where(present, jnp.log(counts / n), least)
    start = (bias, jnp.full_like(n, jnp.inf), jnp.zeros((), jnp.int32))
    return log_likelihood(lax.while_loop(unmatched, step, start)[0])


def _class_counts(rows: Rows, num_classes: int) -> Array:
    dtype, examples = rows.x.dtype, rows.x.shape[0]
    weights = jnp.ones(examples, dtype) if rows.w is None else rows.w
    if isinstance(rows.targets, ClassIndices):
        if rows.w is None and rows.targets.bad is None:
            ones = jnp.ones(examples, jnp.int32)
            return sums_by_class(rows.targets.index, ones, num_classes).astype(dtype)
        counts = times(weights, rows.masses(dtype))
        return sums_by_class(rows.targets.index, counts, num_classes)
    return jnp.sum(times(weights[:, None], rows.targets), 0)

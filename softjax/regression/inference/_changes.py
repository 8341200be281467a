"""Effects of finite changes of a feature, elasticities, and marginal effects of each example."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._softmax_core import softmax_core
from softjax.regression._features import Features
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import EXACT, Rows, rows_without_labels
from softjax.regression.inference._effects import effects_of, population
from softjax.regression.inference._estimates import Estimates, estimates_core
from softjax.regression.inference._precision import Variances, deviations, of_covariance, sound


@on_auto_axes
def average_changes(
    params: SoftmaxRegression,
    covariance: ArrayLike,
    features: Features,
    columns: Sequence[int],
    *,
    count: bool = False,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    level: ArrayLike = 0.95,
) -> Estimates:
    """Average discrete changes: the effect of a unit step of a feature on the probabilities.

        mean_i w_i (p(x_i with x_ij = 1) - p(x_i with x_ij = 0))     a dummy, 0 or 1
        mean_i w_i (p(x_i with x_ij + 1) - p(x_i))                   a count

    For features that do not vary continuously these are the exact effects, which the derivatives of
    `average_marginal_effects` only approximate. Standard errors come from the delta method. (For a
    count, statsmodels takes half of the change from x - 1 to x + 1; it has neither effect for more
    than two classes.)

    Derivative: not supported.
    Edge cases: the changes of all classes sum to 0.

    Args:
        params: kernel [D, K] and bias [K].
        covariance: [P, P], the result of `covariance`.
        features: real [N, D], dense, BCOO or BCSR: the population to average over.
        columns: [J], the indices of the features.
        count: True if these features are counts, False if they are dummies.
        sample_weights: real [N], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.
        level: the confidence level, in (0, 1).

    Returns:
        `Estimates` [J, K].

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a column out of range, a
            dummy with a value other than 0 and 1, or a level outside (0, 1).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> inference = softjax.regression.inference
        >>> x, labels = jnp.array([[0.0], [1.0], [0.0], [1.0], [1.0]]), jnp.array([0, 1, 1, 1, 0])
        >>> params = softjax.regression.fit(x, labels).params
        >>> v = inference.covariance(params, x, labels)
        >>> change = inference.average_changes(params, v, x, [0])  # 2 / 3 - 1 / 2
        >>> round(float(change.value[0, 1]), 3)
        0.167

    Source: W. H. Greene, "Econometric Analysis" (2012), section 17.3.2.
    """
    function = "regression.inference.average_changes"
    rows, v = population(function, params, covariance, features, sample_weights, offset, level)
    if not np.iterable(columns):
        expected = f"a sequence of indices, such as [{columns}]"
        raise TypeError(_checks.message(function, "columns", expected, repr(columns)))
    places = tuple(_checks.integer(function, "columns", column) for column in columns)
    width = rows.x.shape[1]
    bad = np.array([not 0 <= place < width for place in places], bool)
    _checks.refuse_first(function, "columns", f"in [0, {width})", np.array(places), bad)
    known = _checks.known(rows.x)
    if known is not None and not _checks.flag(function, "count", count):
        of_columns = known[:, list(places)]
        bad = (of_columns != 0) & (of_columns != 1)
        _checks.refuse_first(function, "features", "0 or 1 in a dummy", of_columns, bad)
    return _averages(function, params, v, rows, level, places=places, count=bool(count))


@on_auto_axes
def average_elasticities(
    params: SoftmaxRegression,
    covariance: ArrayLike,
    features: Features,
    *,
    sample_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    level: ArrayLike = 0.95,
) -> Estimates:
    """Average elasticities: the change of a probability in per cent for one per cent of a feature.

        mean_i w_i x_ij dlog p_ik / dx_ij = mean_i w_i x_ij (kernel_jk - <p_i, kernel_j>)

    Standard errors come from the delta method.

    Derivative: not supported.
    Edge cases: an elasticity depends on the zero point of its feature, and is meaningful only if
        that zero point is.

    Args:
        params: kernel [D, K] and bias [K].
        covariance: [P, P], the result of `covariance`.
        features: real [N, D], dense, BCOO or BCSR: the population to average over.
        sample_weights: real [N], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.
        level: the confidence level, in (0, 1).

    Returns:
        `Estimates` [D, K].

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a level outside (0, 1).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> inference = softjax.regression.inference
        >>> x, labels = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([0, 1, 0, 1])
        >>> params = softjax.regression.fit(x, labels).params
        >>> v = inference.covariance(params, x, labels)
        >>> inference.average_elasticities(params, v, x).value.shape
        (1, 2)

    Source: W. H. Greene, "Econometric Analysis" (2012), section 18.2.
    """
    function = "regression.inference.average_elasticities"
    rows, v = population(function, params, covariance, features, sample_weights, offset, level)
    return _averages(function, params, v, rows, level, places=None, count=False)


@on_auto_axes
def marginal_effects(
    params: SoftmaxRegression, features: Features, *, offset: ArrayLike | None = None
) -> Array:
    """Marginal effects of every example: derivatives of its probabilities by its features.

        dp_ik / dx_ij = p_ik (kernel_jk - <p_i, kernel_j>)

    `average_marginal_effects` computes their mean, with standard errors.

    Derivative: by automatic differentiation.
    Edge cases: the effects of all classes sum to 0.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        offset: real [N, K], nats; None for zeros.

    Returns:
        [N, D, K], probability per unit of the feature, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.SoftmaxRegression(jnp.array([[0.0, 1.0]]), jnp.zeros(2))
        >>> softjax.regression.inference.marginal_effects(params, jnp.zeros((1, 1)))
        Array([[[-0.25,  0.25]]], dtype=float32)

    Source: W. H. Greene, "Econometric Analysis" (2012), section 18.2.
    """
    function = "regression.inference.marginal_effects"
    rows = rows_without_labels(function, params, features, offset=offset).dense()
    return _marginal_effects(params, rows)


@jax.jit
def _marginal_effects(params: SoftmaxRegression, rows: Rows) -> Array:
    kernel = params.kernel.astype(rows.x.dtype)
    return effects_of(softmax_core(rows.logits(rows.x, params), (1,)), kernel)


@of_covariance
def _averages(
    params: SoftmaxRegression,
    v: Array,
    eps: float,
    rows: Rows,
    level: Array,
    *,
    places: tuple[int, ...] | None,
    count: bool,
) -> Variances:
    """Changes, or elasticities if no columns are given, [J, K], by the delta method."""
    of_parameter = deviations(v)

    def means(params):
        if places is None:
            return _mean_elasticities(params, rows)
        return _mean_changes(places, count, params, rows)

    value, pull_back = jax.vjp(means, params)

    def variance_of(unit):  # called for one unit after the other: one gradient is in memory
        (slope,) = pull_back(unit)
        slope = jnp.append(slope.kernel, slope.bias)
        return slope @ jnp.matmul(v, slope, precision=EXACT), jnp.abs(slope) @ of_parameter

    units = jnp.eye(value.size, dtype=value.dtype).reshape(-1, *value.shape)
    variance, terms = (part.reshape(value.shape) for part in lax.map(variance_of, units))
    variance, lost = sound(variance, terms, eps)
    return Variances(estimates_core(value, variance, level), lost)


def _mean_changes(
    places: tuple[int, ...], count: bool, params: SoftmaxRegression, rows: Rows
) -> Array:
    x, share = rows.counted()

    def mean_of(x):
        return share @ softmax_core(rows.logits(x, params), (1,))

    changes = []
    for place in places:
        column = x[:, place]
        low, high = (column, column + 1) if count else (0 * column, 0 * column + 1)
        below, above = (mean_of(x.at[:, place].set(values)) for values in (low, high))
        changes.append(above - below)
    return jnp.stack(changes)


def _mean_elasticities(params: SoftmaxRegression, rows: Rows) -> Array:
    x, share = rows.counted()
    p = softmax_core(rows.logits(x, params), (1,))
    weighted = share[:, None] * x
    means = jnp.matmul(p, params.kernel.T, precision=EXACT)  # <p_i, kernel_j>, [N, D]
    total, drift = jnp.sum(weighted, 0), jnp.sum(weighted * means, 0)
    return total[:, None] * params.kernel - drift[:, None]

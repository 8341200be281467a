"""The number of parameters that the examples determine: the rank of the features and the bias.

A penalty gives an optimum even if features are constant or collinear. The likelihood then depends
on no more than rank([X, 1]) (K - 1) parameters, for the rows X of positive weight. The rank is
found from the scatter of the standardised features, so that units and means do not matter, by a
Cholesky factorisation. Its pivots are 1 - R^2, the share of the variance of a feature that the
features before it do not explain; large pivots come first. A share of the size of rounding counts
as 0, as in a fit.

Source: N. J. Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 10.3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax import _checks
from softjax._platforms import quickly_compiled
from softjax._weights import is_zero
from softjax.regression._features import is_sparse, product, with_data, without_duplicates
from softjax.regression._linear_solves import JITTER
from softjax.regression._rows import EXACT, Rows, sum_of_chunks
from softjax.regression._standardised import moments_of

# The scatter of more features than this would take more time and memory than a fit.
MOST_FEATURES = 2048
# The number of columns of the scatter of sparse features that are computed together.
TOGETHER = 16


class Determined(NamedTuple):
    """What the examples determine: two truth values for each feature, [D]."""

    varies: Any  # whether it is not constant; without an intercept, whether it is not 0
    # Whether it counts; all others are combinations of the features that count and the bias.
    counts: Any


def num_parameters(found: Determined, constant: Any, num_classes: int) -> Any:
    """k = rank([X, 1]) (K - 1); rank(X) (K - 1) without an intercept, for a `constant` of 0."""
    known = isinstance(found.counts, np.ndarray)
    rank = int(found.counts.sum()) if known else jnp.sum(found.counts, dtype=jnp.int32)
    return (rank + int(constant)) * (num_classes - 1)


def may_be_collinear(found: Determined) -> bool:
    """Whether features that vary may be combinations of others, as under a trace any may."""
    return not isinstance(found.counts, np.ndarray) or bool(np.any(found.varies & ~found.counts))


def determined(rows: Rows) -> Determined:
    """Which features count; beyond MOST_FEATURES all do.

    It is computed in float64, or in float32 under a trace without float64.
    """
    width = rows.x.shape[1]
    if not 0 < width <= MOST_FEATURES:
        return Determined(*np.ones((2, width), bool))
    x = without_duplicates(rows.x) if is_sparse(rows.x) else rows.x
    rows = rows._replace(x=x, offset=None)
    if not all(_checks.is_concrete(leaf) for leaf in jax.tree.leaves(rows)):
        return _determined(rows)
    with jax.enable_x64(True):
        return Determined(*map(np.asarray, quickly_compiled(_determined)(rows)))


def _determined(rows: Rows) -> Determined:
    x, _ = rows.counted()
    dtype = jax.dtypes.canonicalize_dtype(float)
    own_eps = float(jnp.finfo(x.dtype).eps)
    present = ~is_zero(rows.masses(x.dtype))
    if rows.w is not None:
        present &= ~is_zero(rows.w)
    x = with_data(x, x.data.astype(dtype)) if is_sparse(x) else x
    weights = present.astype(dtype)
    shares, zeros = weights / jnp.maximum(jnp.sum(weights), 1), jnp.zeros(x.shape[1], dtype)
    mean, variance = moments_of(x, shares, jnp.asarray(rows.constant, dtype), zeros)
    of: Any = _sparse_scatter if is_sparse(x) else _scatter
    return by_moments(mean, variance, own_eps, lambda scale: of(x, shares, mean, scale))


def by_moments(
    mean: Array, variance: Array, own_eps: float, scatter_of: Callable[[Array], Array]
) -> Determined:
    """What features [D] determine, whose dtype has the precision `own_eps`.

    `scatter_of` is their covariance matrix, divided by their scales.
    """
    eps = float(jnp.finfo(mean.dtype).eps)
    # The mean of a constant feature has a rounding error, which must not count as variance.
    varies = variance > (64 * eps) ** 2 * (variance + mean * mean)
    scale = jnp.where(varies, jnp.sqrt(variance), 1)
    least = JITTER * eps * jnp.maximum(jnp.abs(mean) / scale, 1)
    least = jnp.maximum(least, (len(mean) + 1) * own_eps)
    scatter = jnp.where(varies[:, None] & varies, scatter_of(scale), 0)
    return Determined(varies, pivoted(scatter, least)[1])


def _scatter(x: Array, shares: Array, mean: Array, scale: Array) -> Array:
    """sum_i shares_i s_i s_i^T of the standardised features s = (x - mean) / scale, [D, D]."""

    def add_chunk(total: Array, x: Array, shares: Array) -> Array:
        s = (x.astype(mean.dtype) - mean) / scale
        return total + jnp.matmul(s.T, shares[:, None] * s, precision=EXACT)

    d = x.shape[1]
    return sum_of_chunks(add_chunk, jnp.zeros((d, d), mean.dtype), 2 * d, shares, x)


def _sparse_scatter(x: Any, shares: Array, mean: Array, scale: Array) -> Array:
    def row(unit: Array) -> Array:
        s = shares * (product(x, unit) - jnp.vdot(mean, unit))
        return (product(s, x) - jnp.sum(s) * mean) / scale

    return lax.map(row, jnp.diag(1 / scale), batch_size=TOGETHER)


def pivoted(scatter: Array, least: Any) -> tuple[Array, Array]:
    """L with L L^T = scatter, up to rounding, and which rows have pivots above `least`, [D].

    The diagonal of the scatter is 1, or 0 where it has no information. Large pivots come first.
    """

    def open_pivots(left: Array, counts: Array) -> Array:
        return jnp.where(~counts & (left > least), left, 0)

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        factor, left, counts = state
        pivots = open_pivots(left, counts)
        # The first large pivot: which one is the largest may depend on rounding.
        j = jnp.argmax(pivots >= jnp.max(pivots) / 2)
        column = scatter[:, j] - jnp.matmul(factor, factor[j], precision=EXACT)
        column = column / jnp.sqrt(left[j])
        place = jnp.sum(counts, dtype=jnp.int32)
        return factor.at[:, place].set(column), left - column * column, counts.at[j].set(True)

    def running(state: tuple[Array, Array, Array]) -> Array:
        _, left, counts = state
        return jnp.any(open_pivots(left, counts) > 0)

    left = jnp.diag(scatter)
    start = jnp.zeros_like(scatter), left, jnp.zeros(left.shape, bool)
    factor, _, counts = lax.while_loop(running, body, start)
    return factor, counts

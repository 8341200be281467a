"""Standardised features, with mean 0 and standard deviation 1, for computing directions.

    x_ij = mean_j + scale_j s_ij

The gradient of the next step corrects the rounding error of a direction. So a direction is computed
in float32, from features within the range of float32. They need no copy: the formulas below apply
the means and the scales to parameters and gradients.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softjax.regression._features import (
    by_columns,
    by_examples,
    column_of,
    is_sparse,
    product,
    stored_mass,
    with_data,
)
from softjax.regression._problem import Problem

# The middle of a feature is the median of this many examples.
MEDIAN_ROWS = 32
# Larger penalties on a standardised feature are cut to this, which float32 holds.
LARGEST_RIDGE = 1e30


class Scales(NamedTuple):
    """The means and scales of `Standardised`, with all that follows from them."""

    offset: Any  # [D]
    unit: Any  # [D]
    mean: Any  # [D]
    scale: Any  # [D]
    ridge: Any  # [D + 1], the penalty on the scaled parameters; 0 for the bias
    # [D + 1], the rounding error of s; r may be larger than s, and its error counts.
    rounding: Any


class Standardised(NamedTuple):
    """Features s of mean 0 and standard deviation 1, and 1 for the bias, for directions only.

        x_ij = base_j + size_j r_ij = mean_j + scale_j s_ij
        s_ij = (r_ij - offset_j) / unit_j,  s_iD = c

    Without an intercept, c = 0, the means are 0 and the scales are root mean squares: there is no
    bias that could absorb the mean of a feature.

    If the features are float32, r is the features themselves, and the offsets and units are applied
    to parameters and gradients: s would be a copy. Else r is a float32 copy, for sparse features
    with the same stored entries, so that zeros stay zeros.
    """

    features: Any  # r [N, D], float32, dense or BCOO
    base: Array  # [D]
    size: Array  # [D]
    l2: Array  # the penalty, a scalar or [D]
    constant: Array  # c, 1 or 0
    # The fields of `Scales`.
    offset: Array
    unit: Array
    mean: Array
    scale: Array
    ridge: Array
    rounding: Array

    @property
    def scales(self) -> Scales:
        """The means and scales of these features."""
        return Scales(*(getattr(self, name) for name in Scales._fields))

    def rescaled(self, scales: Scales) -> "Standardised":
        """These features with other means and scales."""
        return self._replace(**scales._asdict())

    def reweighted(self, weights: Array) -> "Standardised":
        """These features with the means and scales of the examples under `weights`, [N].

        With the weights u of the Hessian, nearly certain examples, such as those with a very large
        feature, are ignored; the differences of the others are of order 1, not lost in rounding.
        """
        total = jnp.sum(weights)
        shares = weights / jnp.where(total > 0, total, 1)
        mean, variance = moments_of(self.features, shares, self.constant, self.offset)
        # A feature whose variation among these examples is only rounding keeps its scale.
        least = 64 * jnp.finfo(variance.dtype).eps
        varies = variance > least * least * (variance + mean * mean)
        # The moments of one example are useless; one may have nearly all weight if all are certain.
        known = varies & (total > 0) & (jnp.max(weights) <= 0.6 * total)
        offset = jnp.where(known, mean, self.offset)
        unit = jnp.where(known, jnp.sqrt(jnp.where(known, variance, 1)), self.unit)
        return _around(self.features, self.base, self.size, self.l2, self.constant, offset, unit)

    def scores(self, v: Array) -> Array:
        """The logits [K, N] of the parameters v [K, D + 1] of s: one product with the features."""
        kernel = v[:, :-1] / self.unit[None]
        bias = self.constant.astype(v.dtype) * v[:, -1:] - product(kernel, self.offset[:, None])
        return product(self.features, kernel.T).T + bias

    def pull_back(self, residual: Array) -> Array:
        """The transpose of `scores`: [K, N] to [K, D + 1], one product with the features."""
        total = jnp.sum(residual, 1, keepdims=True)
        kernel = (product(residual, self.features) - total * self.offset[None]) / self.unit[None]
        return jnp.concatenate([kernel, self.constant.astype(total.dtype) * total], 1)

    def squared(self, weights: Array) -> Array:
        """sum_j w_j s_ij^2, [N]."""
        if is_sparse(self.features):
            own = weights[:-1] / self.unit / self.unit
            squares = product(self._beyond_zero(), own) + jnp.vdot(own, self.offset * self.offset)
            squares = jnp.maximum(squares, 0)
        else:
            standard = (self.features - self.offset[None]) / self.unit[None]
            squares = jnp.sum(weights[None, :-1] * jnp.square(standard), 1)
        return squares + self.constant.astype(weights.dtype) * weights[-1]

    def squares_of_classes(self, uncertainty: Array) -> Array:
        """sum_i u_ki s_ij^2, [K, D + 1]."""
        if is_sparse(self.features):
            squares = product(uncertainty, self._beyond_zero())
            squares += jnp.sum(uncertainty, 1, keepdims=True) * jnp.square(self.offset)[None]
            squares = jnp.maximum(squares, 0) / jnp.square(self.unit)[None]
        else:

            def rows(columns, offset, unit):
                return product(uncertainty, jnp.square((columns - offset[None]) / unit[None])).T

            squares = by_columns(rows, self.features, self.offset, self.unit).T
        return jnp.concatenate([squares, jnp.sum(uncertainty, 1, keepdims=True)], 1)

    def gram(self, weights: Array) -> Array:
        """sum_i w_i s_i s_i^T, [D + 1, D + 1], of dense features."""

        def above_of(weights, features):
            def rows(columns, offset, unit):
                own = weights[:, None] * ((columns - offset[None]) / unit[None])
                total = jnp.sum(own, 0)[:, None]
                others = (product(own.T, features) - total * self.offset[None]) / self.unit[None]
                return jnp.concatenate([others, constant * total], 1)

            return by_columns(rows, features, self.offset, self.unit)

        constant = self.constant.astype(weights.dtype)
        above = by_examples(above_of, weights, self.features)
        # Row j is computed from s of feature j and r of the other features. For a pair of features,
        # take the row of the feature with the larger rounding: then only the smaller one remains.
        inner, rounding = above[:, :-1], self.rounding[:-1]
        inner = jnp.where(rounding[:, None] >= rounding[None], inner, inner.T)
        above = jnp.concatenate([inner, above[:, -1:]], 1)
        return jnp.concatenate([above, jnp.append(above[:, -1], constant * jnp.sum(weights))[None]])

    def _beyond_zero(self) -> Any:
        """(r - offset)^2 - offset^2 of sparse features, which is 0 where r is 0."""
        r = self.features
        return with_data(r, r.data * (r.data - 2 * column_of(r, self.offset)))


def standardise(problem: Problem, bound: Array, dtype: DTypeLike = jnp.float32) -> Standardised:
    """The standardised features; `bound` is `gradient_bound`, their root mean squares.

    The median of some examples is subtracted from dense features before they are cast: a few
    outliers do not change it. In float32 only numbers near the subtracted one keep their
    differences.
    """
    x = problem.features
    if is_sparse(x) or x.dtype == jnp.float32:
        middle = jnp.zeros(x.shape[1], x.dtype)
    else:
        rows = x[:: max(len(x) // MEDIAN_ROWS, 1)]
        middle = jnp.sort(rows, 0)[len(rows) // 2]
    return scaled(problem, *moments(problem, bound), middle, dtype)


def scaled(
    problem: Problem, mean: Array, scale: Array, base: Array, dtype: DTypeLike = jnp.float32
) -> Standardised:
    """The features minus `mean`, divided by `scale`; `base` is subtracted before the cast."""
    x, size = problem.features, scale
    if x.dtype == dtype:
        r, base, size = x, jnp.zeros_like(mean), jnp.ones_like(scale)
    elif is_sparse(x):
        # Padding must stay finite: once rows are added, it may be in one of them.
        r, base = with_data(x, (x.data * column_of(x, 1 / size)).astype(dtype)), mean * 0
    else:
        r = ((x - base[None]) / size[None]).astype(dtype)
    offset, unit = ((mean - base) / size).astype(r.dtype), (scale / size).astype(r.dtype)
    return _around(r, base, size, problem.ridge, problem.constant, offset, unit)


def _around(
    r: Any, base: Array, size: Array, l2: Array, constant: Array, offset: Array, unit: Array
) -> Standardised:
    """The features r with the means and scales that `offset` and `unit` give them."""
    dtype = size.dtype
    # Without an intercept the mean is exactly 0, not the rounding error of the offset.
    mean, scale = constant * (base + size * offset.astype(dtype)), size * unit.astype(dtype)
    rounding = jnp.finfo(r.dtype).eps * jnp.append(jnp.maximum(jnp.abs(offset) / unit, 1), 1)
    ridge = scaled_ridge(l2, scale, r.dtype)
    return Standardised(r, base, size, l2, constant, offset, unit, mean, scale, ridge, rounding)


def scaled_ridge(l2: Array, scale: Array, dtype: DTypeLike) -> Array:
    """The penalty on the scaled parameters, [D + 1]."""
    return jnp.append(jnp.minimum(l2 / scale / scale, LARGEST_RIDGE), 0).astype(dtype)


def moments(problem: Problem, bound: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each feature; the root mean square if it is constant.

    Without an intercept, 0 and the root mean square.
    """
    x, root_mean_square = problem.features, bound[:-1]
    weights = problem.weights
    total = jnp.sum(weights)
    mean, variance = moments_of(x, weights / total, problem.constant, jnp.zeros_like(bound[:-1]))
    variance *= total
    # The mean of a constant feature has a rounding error, which must not count as variance.
    least = 64 * jnp.finfo(x.dtype).eps * root_mean_square
    return mean, jnp.where(variance > least * least, jnp.sqrt(variance), root_mean_square)


def moments_of(x: Any, shares: Array, constant: Array, origin: Array) -> tuple[Array, Array]:
    """Mean and variance of each feature, [D], for shares [N] of the examples that sum to 1.

    Without an intercept (`constant` is 0), `origin` [D] and the mean square of the distances to it.
    The variance is a sum of squares, since a difference would cancel: one more pass over the
    features.
    """
    if is_sparse(x):
        mean = jnp.where(constant > 0, product(shares, x), origin)
        stored = product(shares, with_data(x, jnp.square(x.data - column_of(x, mean))))
        absent = jnp.maximum(1 - stored_mass(x, shares), 0)
        return mean, stored + absent * mean * mean

    def mean_and_variance(columns, origin):
        columns = columns.astype(shares.dtype)
        # XLA:CPU adds the rows of a product with a vector one by one, but a sum as a tree.
        mean = jnp.where(constant > 0, jnp.sum(shares[:, None] * columns, 0), origin)
        return jnp.stack([mean, jnp.sum(shares[:, None] * jnp.square(columns - mean[None]), 0)], 1)

    mean, variance = by_columns(mean_and_variance, x, origin).T
    return mean, variance


def to_standard(mean: Array, scale: Array, gradient: Array) -> Array:
    """The gradient with respect to the parameters of the standardised features."""
    bias = gradient[:, -1:]
    return jnp.concatenate([(gradient[:, :-1] - bias * mean[None]) / scale[None], bias], 1)


def of_standard(mean: Array, scale: Array, theta: Array) -> Array:
    """The parameters of the standardised features: the inverse of `from_standard`."""
    bias = theta[:, -1:] + theta[:, :-1] @ mean[:, None]
    return jnp.concatenate([theta[:, :-1] * scale[None], bias], 1)


def from_standard(mean: Array, scale: Array, direction: Array) -> Array:
    """The parameters of the original features: the transpose of `to_standard`."""
    kernel = direction[:, :-1] / scale[None]
    return jnp.concatenate([kernel, direction[:, -1:] - kernel @ mean[:, None]], 1)

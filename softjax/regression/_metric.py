"""The metric in which a step is steepest: the Hessian as a product of classes and features.

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T  ~  G kron A + ridge
    u_i = w_i sum_k p_ik (1 - p_ik),  A = sum_i u_i x_i x_i^T

where G, of trace 1, has the diagonal of sum_i w_i (diag p_i - p_i p_i^T) / sum_i u_i and the form
of one example's,

    G = diag(m) - m m^T / sum(m),  G^+ = C diag(1 / m) C,  C = I - 11^T/K,

so that nothing of K x K numbers is needed. One D x D factor serves all the classes and any penalty
of the features: A and the ridge are diagonalised together. Rows that are decided weigh nothing, as
in the Hessian. It is built in float32 from standardised features, which the gradient, in full
precision, makes good.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax.regression._problem import (
    Problem,
    by_columns,
    centred,
    example_weights,
    is_sparse,
    product,
)

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# Beyond, the D^3 of a factor costs more than the steps that it saves.
LARGEST_FACTOR = 1024
JITTER = 1e-5
ROUNDING = 1e-10
FLOOR = 1e-4
LARGEST_RIDGE = 1e30


class Standardised(NamedTuple):
    """Features of mean 0 and standard deviation 1, and 1 for the bias: for directions alone.

        x_ij = mean_j + scale_j s_ij,  s_ij = (r_ij - offset_j) / unit_j,  s_iD = 1

    Float32 features are r as they are, since s would be a copy of them: what it takes to make s
    of them is done to parameters and gradients. Of others s is made, in float32.

    Attributes:
        features: r [N, D], float32, dense or BCOO; a sparse one keeps its mean.
        offset: [D].
        unit: [D].
        mean: [D].
        scale: [D].
        ridge: [D + 1], the penalty on the scaled parameters; 0 for the bias.
        rounding: [D + 1], that of s as it is made of r, which is as much larger.
    """

    features: Any
    offset: Array
    unit: Array
    mean: Array
    scale: Array
    ridge: Array
    rounding: Array


class Kronecker(NamedTuple):
    """C (diag(m) kron A + ridge)^-1 C = C (I kron T) diag(inverse) (I kron T)^T C.

    Attributes:
        features: T [D + 1, D + 1].
        inverse: [K, D + 1].
    """

    features: Any
    inverse: Any


class Diagonal(NamedTuple):
    """The inverse of the diagonal of the Hessian, [K, D + 1]."""

    inverse: Any


Metric = Kronecker | Diagonal


def standardise(problem: Problem, bound: Array) -> Standardised:
    """`bound` is that of the gradient: the root mean squares of the features."""
    return scaled(problem, *moments(problem, bound))


def scaled(problem: Problem, mean: Array, scale: Array) -> Standardised:
    """The features less `mean`, over `scale`."""
    x = problem.features
    if x.dtype == jnp.float32:
        r, offset, unit = x, mean, scale
    else:
        r = _made(x, mean, scale)
        offset, unit = jnp.zeros(len(mean), r.dtype), jnp.ones(len(mean), r.dtype)
    rounding = jnp.finfo(r.dtype).eps * jnp.append(jnp.maximum(jnp.abs(offset) / unit, 1), 1)
    return Standardised(r, offset, unit, mean, scale, scaled_ridge(problem.l2, scale), rounding)


def scores(s: Standardised, v: Array) -> Array:
    """The logits [K, N] of the parameters v [K, D + 1] of s: one product with the features."""
    kernel = v[:, :-1] / s.unit[None]
    bias = v[:, -1:] - product(kernel, s.offset[:, None])
    return product(s.features, kernel.T).T + bias


def pulled(s: Standardised, residual: Array) -> Array:
    """The transpose of `scores`: [K, N] to [K, D + 1], one product with the features."""
    bias = jnp.sum(residual, 1, keepdims=True)
    return jnp.concatenate(
        [(product(residual, s.features) - bias * s.offset[None]) / s.unit[None], bias], 1
    )


def squared(s: Standardised, weights: Array) -> Array:
    """sum_j w_j s_ij^2, [N]."""
    if is_sparse(s.features):
        squares = product(s.features * s.features, weights[:-1] / s.unit / s.unit)
    else:
        standard = (s.features - s.offset[None]) / s.unit[None]
        squares = jnp.sum(weights[None, :-1] * jnp.square(standard), 1)
    return squares + weights[-1]


def gram(s: Standardised, weights: Array) -> Array:
    """sum_i w_i s_i s_i^T, [D + 1, D + 1], of dense features."""

    def rows(columns, offset, unit):
        own = weights[:, None] * ((columns - offset[None]) / unit[None])
        total = jnp.sum(own, 0)[:, None]
        others = (product(own.T, s.features) - total * s.offset[None]) / s.unit[None]
        return jnp.concatenate([others, total], 1)

    above = by_columns(rows, s.features, s.offset, s.unit)
    # Row j is made of the s of feature j and the r of the others: of two features, the s of the one
    # whose rounding is larger, so that that of the other is all that their product has.
    inner, rounding = above[:, :-1], s.rounding[:-1]
    inner = jnp.where(rounding[:, None] >= rounding[None], inner, inner.T)
    above = jnp.concatenate([inner, above[:, -1:]], 1)
    return jnp.concatenate([above, jnp.append(above[:, -1], jnp.sum(weights))[None]])


def scaled_ridge(l2: Array, scale: Array) -> Array:
    """The penalty on the scaled parameters, [D + 1], in float32."""
    return jnp.append(jnp.minimum(l2 / scale / scale, LARGEST_RIDGE), 0).astype(jnp.float32)


def moments(problem: Problem, bound: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of each feature.

    0 and the root mean square where features are sparse, the latter too where one is constant.

    The variance is not a difference, which cancels: it takes one more pass over the features.
    """
    x: Any = problem.features
    weights, root_mean_square = example_weights(problem.targets), bound[:-1]
    if is_sparse(x):
        return jnp.zeros_like(root_mean_square), root_mean_square

    def mean_and_variance(columns):
        # A sum, for XLA:CPU adds one example after the other in a product with a vector.
        mean = jnp.sum((weights / jnp.sum(weights))[:, None] * columns, 0)
        return jnp.stack([mean, jnp.sum(weights[:, None] * jnp.square(columns - mean[None]), 0)], 1)

    mean, variance = by_columns(mean_and_variance, x).T
    # The mean of a constant feature is off by some roundings, which leave no variance.
    least = 64 * jnp.finfo(x.dtype).eps * root_mean_square
    return mean, jnp.where(variance > least * least, jnp.sqrt(variance), root_mean_square)


def _made(x: "Array | BCOO", mean: Array, scale: Array) -> "Array | BCOO":
    """The features less their mean, over their scale, in float32."""
    if not is_sparse(x):
        return ((x - mean[None]) / scale[None]).astype(jnp.float32)
    data = (x.data / scale[x.indices[:, 1]]).astype(jnp.float32)
    return type(x)((data, x.indices), shape=x.shape)


def to_standard(mean: Array, scale: Array, gradient: Array) -> Array:
    """The gradient with respect to the parameters of the standardised features."""
    bias = gradient[:, -1:]
    return jnp.concatenate([(gradient[:, :-1] - bias * mean[None]) / scale[None], bias], 1)


def from_standard(mean: Array, scale: Array, direction: Array) -> Array:
    """The parameters of the features as they are: the transpose of `to_standard`."""
    kernel = direction[:, :-1] / scale[None]
    return jnp.concatenate([kernel, direction[:, -1:] - kernel @ mean[:, None]], 1)


def empty(features: "Array | BCOO", num_classes: int) -> Metric:
    """A metric of the shapes that `build` gives."""
    width = features.shape[1] + 1
    inverse = np.ones((num_classes, width), np.float32)
    if is_sparse(features) or width > LARGEST_FACTOR:
        return Diagonal(inverse)
    return Kronecker(np.zeros((width, width), np.float32), inverse)


def build(metric: Metric, s: Standardised, weights: Array, p: Array) -> Metric:
    """The metric at probabilities p [K, N], of the kind of `metric`."""
    weights, p = weights.astype(jnp.float32), p.astype(jnp.float32)
    if isinstance(metric, Kronecker):
        return _kronecker(s, weights, p)
    spread = weights[None] * p * (1 - p)
    if is_sparse(s.features):
        squares = product(spread, s.features * s.features) / s.unit[None] / s.unit[None]
    else:

        def rows(columns, offset, unit):
            return product(spread, jnp.square((columns - offset[None]) / unit[None])).T

        squares = by_columns(rows, s.features, s.offset, s.unit).T
    diagonal = jnp.concatenate([squares, jnp.sum(spread, 1, keepdims=True)], 1) + s.ridge[None]
    return Diagonal(1 / jnp.maximum(diagonal, JITTER * jnp.mean(diagonal)))


def _kronecker(s: Standardised, weights: Array, p: Array) -> Kronecker:
    """Diagonalises A and the ridge together.

    With the mean eigenvalue g of G, A g + ridge = L L^T and L^-1 A g L^-T = Q E Q^T,

        A m + ridge = L Q (1 + (m / g - 1) E) Q^T L^T    for every m.
    """
    spread = weights[None] * p * (1 - p)
    u, of_class = jnp.sum(spread, 0), jnp.sum(spread, 1)
    share = of_class / jnp.maximum(jnp.sum(u), jnp.finfo(u.dtype).tiny)
    # The diagonal of G is m (1 - m / sum(m)), and no class has more than half of it.
    m = share / (1 - jnp.minimum(share, 0.5))
    mean_eigenvalue = 1 / max(len(p) - 1, 1)
    a = mean_eigenvalue * gram(s, u)

    spreads = jnp.diag(a)
    size = spreads + s.ridge
    # What varies no more than by rounding is no direction, whatever the ridge of others.
    unit = jnp.where(size > ROUNDING * jnp.mean(spreads), lax.rsqrt(size), 0)
    a = unit[:, None] * a * unit[None]
    ridge = s.ridge * unit * unit + jnp.maximum(JITTER, 100 * s.rounding)
    lower = lax.linalg.cholesky(a + jnp.diag(ridge), symmetrize_input=False)

    def solved(b, **where):
        return lax.linalg.triangular_solve(lower, b, lower=True, **where)

    a = solved(solved(a, left_side=True), left_side=False, transpose_a=True)
    q, eigenvalues = _eigh(a)
    columns = unit[:, None] * solved(q, left_side=True, transpose_a=True)
    relative = m / mean_eigenvalue - 1
    scale = 1 + relative[:, None] * eigenvalues[None]
    return Kronecker(columns, 1 / jnp.maximum(scale, FLOOR))


def _eigh(a: Array) -> tuple[Array, Array]:
    """Eigenvectors and eigenvalues of a matrix that is symmetric already."""
    return lax.linalg.eigh(a, symmetrize_input=False, sort_eigenvalues=False)


def steepest(s: Standardised, metric: Metric, gradient: Array, size: Array) -> Array:
    """metric^-1 gradient, of features as they are; `size` scales to what float32 can hold."""
    g = (to_standard(s.mean, s.scale, gradient) / size).astype(jnp.float32)
    return from_standard(s.mean, s.scale, apply(metric, g).astype(gradient.dtype) * size)


def apply(metric: Metric, gradient: Array) -> Array:
    """The steepest direction, up: metric^-1 gradient."""
    if isinstance(metric, Diagonal):
        return centred(metric.inverse * gradient)
    t, inverse = metric
    return centred(((centred(gradient) @ t) * inverse) @ t.T)

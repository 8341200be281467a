"""The metric in which a step is steepest: the Hessian as a product of classes and features.

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T  ~  G kron A + ridge
    u_i = w_i sum_k p_ik (1 - p_ik),  A = sum_i u_i x_i x_i^T,
    G = sum_i w_i (diag p_i - p_i p_i^T) / sum_i u_i

of trace 1. One D x D factor serves all the classes and any penalty of the features: A and the
ridge are diagonalised together. Rows that are decided weigh nothing, as in the Hessian. It is
built in float32 from standardised features, which the gradient, in full precision, makes good.
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
    product,
)
from softjax.regression._sparse import is_sparse

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# Beyond, the D^3 of a factor costs more than the steps that it saves.
LARGEST_FACTOR = 1024
JITTER = 1e-5
ROUNDING = 1e-10
FLOOR = 1e-4
LARGEST_RIDGE = 1e30


class Standardised(NamedTuple):
    """Features of mean 0 and standard deviation 1 in float32, for directions alone.

        x_ij = mean_j + scale_j s_ij,  s_iD = 1 for the bias

    Attributes:
        features: s [N, D + 1], dense or BCOO; a sparse one keeps its mean.
        mean: [D].
        scale: [D].
        ridge: [D + 1], the penalty on the scaled parameters; 0 for the bias.
    """

    features: Any
    mean: Array
    scale: Array
    ridge: Array


class Kronecker(NamedTuple):
    """(G kron A + ridge)^-1 = (V kron T) diag(inverse) (V kron T)^T."""

    classes: Any
    features: Any
    inverse: Any


class Diagonal(NamedTuple):
    """The inverse of the diagonal of the Hessian, [K, D + 1]."""

    inverse: Any


Metric = Kronecker | Diagonal


def standardise(problem: Problem, bound: Array) -> Standardised:
    """`bound` is that of the gradient: the root mean squares of the features."""
    x = problem.features
    mean, scale = moments(problem, bound)
    return Standardised(_scaled(x, mean, scale), mean, scale, scaled_ridge(problem.l2, scale))


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
        mean = (weights / jnp.sum(weights)) @ columns
        return jnp.stack([mean, jnp.sum(weights[:, None] * jnp.square(columns - mean), 0)], 1)

    mean, variance = by_columns(mean_and_variance, x).T
    # The mean of a constant feature is off by some roundings, which leave no variance.
    least = 64 * jnp.finfo(x.dtype).eps * root_mean_square
    return mean, jnp.where(variance > least * least, jnp.sqrt(variance), root_mean_square)


def _scaled(x: "Array | BCOO", mean: Array, scale: Array) -> "Array | BCOO":
    """The features less their mean, over their scale, with a last column of ones."""
    if not is_sparse(x):
        return jnp.pad(
            ((x - mean) / scale).astype(jnp.float32), ((0, 0), (0, 1)), constant_values=1
        )
    examples, width = x.shape
    data = (x.data / scale[x.indices[:, 1]]).astype(jnp.float32)
    rows = jnp.arange(examples, dtype=x.indices.dtype)
    ones = jnp.stack([rows, jnp.full_like(rows, width)], 1)
    data = jnp.append(data, jnp.ones(examples, data.dtype))
    return type(x)((data, jnp.concatenate([x.indices, ones])), shape=(examples, width + 1))


def to_standard(mean: Array, scale: Array, gradient: Array) -> Array:
    """The gradient with respect to the parameters of the standardised features."""
    bias = gradient[:, -1:]
    return jnp.concatenate([(gradient[:, :-1] - bias * mean) / scale, bias], 1)


def from_standard(mean: Array, scale: Array, direction: Array) -> Array:
    """The parameters of the features as they are: the transpose of `to_standard`."""
    kernel = direction[:, :-1] / scale
    return jnp.concatenate([kernel, direction[:, -1:] - kernel @ mean[:, None]], 1)


def empty(features: "Array | BCOO", num_classes: int) -> Metric:
    """A metric of the shapes that `build` gives."""
    width = features.shape[1] + 1
    inverse = np.ones((num_classes, width), np.float32)
    if is_sparse(features) or width > LARGEST_FACTOR:
        return Diagonal(inverse)
    classes, columns = (np.zeros((size, size), np.float32) for size in (num_classes, width))
    return Kronecker(classes, columns, inverse)


def build(metric: Metric, s: Standardised, weights: Array, p: Array) -> Metric:
    """The metric at probabilities p [K, N], of the kind of `metric`."""
    weights, p = weights.astype(jnp.float32), p.astype(jnp.float32)
    if isinstance(metric, Kronecker):
        return _kronecker(s, weights, p)
    spread = weights * p * (1 - p)
    if is_sparse(s.features):
        diagonal = product(spread, s.features * s.features)
    else:
        diagonal = by_columns(lambda x: product(spread, x * x).T, s.features).T
    diagonal = diagonal + s.ridge
    return Diagonal(1 / jnp.maximum(diagonal, JITTER * jnp.mean(diagonal)))


def _kronecker(s: Standardised, weights: Array, p: Array) -> Kronecker:
    """Diagonalises A and the ridge together.

    With the mean eigenvalue g of G, C = A g + ridge = L L^T and L^-1 A g L^-T = Q E Q^T,

        A e + ridge = L Q (1 + (e / g - 1) E) Q^T L^T    for every eigenvalue e of G.
    """
    num_classes, width = len(p), len(s.ridge)
    x = s.features
    u = weights * jnp.sum(p * (1 - p), 0)
    total = jnp.maximum(jnp.sum(u), jnp.finfo(u.dtype).tiny)
    mean_eigenvalue = 1 / max(num_classes - 1, 1)
    gram = mean_eigenvalue * by_columns(lambda columns: (u[:, None] * columns).T @ x, x)
    spread = (jnp.diag(p @ weights) - (p * weights) @ p.T) / total
    v, class_eigenvalues = _eigh(spread)

    size = jnp.diag(gram) + s.ridge
    # What varies no more than by rounding is no direction.
    unit = jnp.where(size > ROUNDING * jnp.mean(size), lax.rsqrt(size), 0)
    identity = jnp.eye(width, dtype=u.dtype)
    both = unit[:, None] * gram * unit + jnp.diag(s.ridge * unit * unit) + JITTER * identity
    lower = lax.linalg.cholesky(both, symmetrize_input=False)
    inverse = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True) * unit
    q, eigenvalues = _eigh(inverse @ gram @ inverse.T)
    relative = class_eigenvalues / mean_eigenvalue - 1
    scale = 1 + relative[:, None] * eigenvalues
    return Kronecker(v, inverse.T @ q, 1 / jnp.maximum(scale, FLOOR))


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
    v, t, inverse = metric
    return centred(v @ ((v.T @ gradient @ t) * inverse) @ t.T)

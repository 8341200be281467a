"""The metric in which a step is steepest: the Hessian as a product of classes and features.

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T  ~  G kron A + ridge
    u_i = w_i sum_k p_ik (1 - p_ik),  A = sum_i u_i x_i x_i^T,
    G = sum_i w_i (diag p_i - p_i p_i^T) / sum_i u_i

of trace 1. One D x D factor serves all the classes and any penalty of the features: A and the
ridge are diagonalised together. Rows that are decided weigh nothing, as in the Hessian. It is
built in float32 from standardised features, which the gradient, in full precision, makes good.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.sparse import BCOO

from softjax.regression._problem import Problem, centred, example_weights

# Beyond, the D^3 of a factor costs more than the steps that it saves.
LARGEST_FACTOR = 1024
JITTER = 1e-6
FLOOR = 1e-4
LARGEST_RIDGE = 1e30


class Standardised(NamedTuple):
    """Features of mean 0 and standard deviation 1 in float32, for directions alone.

        x_ij = mean_j + scale_j s_ij

    Attributes:
        features: s [N, D], dense or BCOO; a sparse one keeps its mean.
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


def standardise(problem: Problem) -> Standardised:
    x, weights = problem.features, example_weights(problem.targets)
    weights = weights / jnp.sum(weights)
    dtype = weights.dtype
    if isinstance(x, BCOO):
        mean = jnp.zeros(x.shape[1], dtype)
        scale = jnp.sqrt(weights @ (x * x))
    else:
        mean = weights @ x
        # The weighted mean alone may be off by its rounding where a column is constant.
        scale = jnp.sqrt(jnp.einsum("n,nd->d", weights, jnp.square(x - mean)))
        scale = jnp.where(scale > 8 * jnp.finfo(dtype).eps * jnp.abs(mean), scale, 0)
    scale = jnp.where(scale > 0, scale, jnp.maximum(jnp.abs(mean), jnp.finfo(dtype).tiny))
    scale = jnp.where(scale > 1e-30, scale, 1)
    ridge = jnp.append(jnp.minimum(problem.l2 / scale / scale, LARGEST_RIDGE), 0)
    ridge = ridge.astype(jnp.float32)
    if isinstance(x, BCOO):
        columns = x.indices[:, 1]
        data = (x.data / scale[columns]).astype(jnp.float32)
        return Standardised(BCOO((data, x.indices), shape=x.shape), mean, scale, ridge)
    return Standardised(((x - mean) / scale).astype(jnp.float32), mean, scale, ridge)


def to_standard(s: Standardised, gradient: Array) -> Array:
    """The gradient with respect to the parameters of the standardised features."""
    kernel, bias = gradient[:, :-1], gradient[:, -1:]
    return jnp.concatenate([(kernel - bias * s.mean) / s.scale, bias], 1)


def from_standard(s: Standardised, direction: Array) -> Array:
    """The parameters of the features as they are: the transpose of `to_standard`."""
    kernel, bias = direction[:, :-1] / s.scale, direction[:, -1:]
    return jnp.concatenate([kernel, bias - jnp.sum(kernel * s.mean, 1, keepdims=True)], 1)


def empty(features: Array | BCOO, num_classes: int) -> Metric:
    """A metric of the shapes that `build` gives."""
    width = features.shape[1] + 1
    inverse = np.ones((num_classes, width), np.float32)
    if _is_diagonal(features):
        return Diagonal(inverse)
    zeros = [np.zeros((size, size), np.float32) for size in (num_classes, width)]
    return Kronecker(*zeros, inverse)


def build(s: Standardised, weights: Array, p: Array) -> Metric:
    weights, p = weights.astype(jnp.float32), p.astype(jnp.float32)
    if _is_diagonal(s.features):
        spread = weights * p * (1 - p)
        squares = jnp.concatenate(
            [spread @ (s.features * s.features), jnp.sum(spread, 1, keepdims=True)], 1
        )
        diagonal = squares + s.ridge
        return Diagonal(1 / jnp.maximum(diagonal, JITTER * jnp.mean(diagonal)))
    return _kronecker(s, weights, p)


def _kronecker(s: Standardised, weights: Array, p: Array) -> Kronecker:
    """Diagonalises A and the ridge together.

    With the mean eigenvalue g of G, C = A g + ridge = L L^T and L^-1 A g L^-T = Q E Q^T,

        A e + ridge = L Q (1 + (e / g - 1) E) Q^T L^T    for every eigenvalue e of G.
    """
    num_classes, width = len(p), len(s.ridge)
    u = weights * jnp.sum(p * (1 - p), 0)
    total = jnp.maximum(jnp.sum(u), jnp.finfo(u.dtype).tiny)
    x = jnp.concatenate([s.features, jnp.ones((len(u), 1), u.dtype)], 1)
    mean_eigenvalue = 1 / max(num_classes - 1, 1)
    gram = mean_eigenvalue * (x.T * u) @ x
    spread = (jnp.diag(p @ weights) - (p * weights) @ p.T) / total
    v, class_eigenvalues = _eigh(spread)

    size = jnp.diag(gram) + s.ridge
    unit = 1 / jnp.sqrt(jnp.maximum(size, JITTER * jnp.mean(size)))
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


def steepest(s: Standardised, metric: Metric, gradient: Array) -> Array:
    """metric^-1 gradient, of features as they are."""
    g, size = in_float32(to_standard(s, gradient))
    return from_standard(s, apply(metric, g).astype(gradient.dtype) * size)


def in_float32(gradient: Array) -> tuple[Array, Array]:
    """The gradient over its largest entry, and that entry: no float32 is too small for it."""
    size = jnp.max(jnp.abs(gradient))
    size = jnp.where(size > 0, size, 1)
    return (gradient / size).astype(jnp.float32), size


def apply(metric: Metric, gradient: Array) -> Array:
    """The steepest direction, up: metric^-1 gradient."""
    if isinstance(metric, Diagonal):
        return centred(metric.inverse * gradient)
    v, t, inverse = metric
    return centred(v @ ((v.T @ gradient @ t) * inverse) @ t.T)


def _is_diagonal(features: Any) -> bool:
    return isinstance(features, BCOO) or features.shape[1] >= LARGEST_FACTOR

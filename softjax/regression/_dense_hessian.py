"""The Hessian as a dense matrix, and its Cholesky factor.

H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T + ridge
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax.regression import _preconditioner, _standardised
from softjax.regression._standardised import Standardised


def hessian(gram: Callable[[Array], Array], weights: Array, p: Array, ridge: Array) -> Array:
    """[K, D, K, D]: blocks -X^T diag(w p_k p_j) X, and ridge less their sum in the place k = j.

    `gram` is of u, X^T diag(u) X.
    """
    num_classes, width = len(p), len(ridge)
    rows, columns = np.triu_indices(num_classes, 1)

    def block(pair):
        k, j = pair
        return gram(weights * p[k] * p[j])

    blocks = -lax.map(block, (jnp.asarray(rows), jnp.asarray(columns)))
    h = jnp.zeros((num_classes, num_classes, width, width), p.dtype)
    h = h.at[rows, columns].set(blocks).at[columns, rows].set(blocks)
    diagonal = np.arange(num_classes)
    own = jnp.diag(ridge)[None] - jnp.sum(h, 1)
    return h.at[diagonal, diagonal].set(own).transpose(0, 2, 1, 3)


def factored_hessian(s: Standardised, weights: Array, p: Array) -> tuple[Array, Array]:
    """`factor` of the Hessian [K (D + 1), K (D + 1)].

    All-ones over the classes is no direction: the curvature there is made that of the others.
    """
    h = hessian(partial(_standardised.gram, s), weights, p, s.ridge)
    num_classes, width = h.shape[:2]
    # Without an intercept the bias has neither curvature nor gradient: 1 keeps the factor regular.
    unit = (1 - s.constant).astype(h.dtype) * jnp.eye(num_classes, dtype=h.dtype)
    h = h.at[:, -1, :, -1].add(unit)
    mean = jnp.mean(jnp.einsum("kdkd->kd", h), 0)
    h = (h + jnp.diag(mean)[None, :, None] / num_classes).reshape(num_classes * width, -1)
    # The size of the bias, which no ridge holds.
    return factor(h, jnp.tile(s.rounding, num_classes), mean[-1])


def factor(
    h: Array, rounding: Array | None = None, size: Array | None = None
) -> tuple[Array, Array]:
    """L and u with L L^T = diag(u) h diag(u) of unit diagonal, and a little more of it.

    More than h is off by, relative: by `rounding` [D], or that of its dtype. `size` is that of a
    curvature without a ridge; None for the mean of the diagonal.
    """
    diagonal = jnp.diag(h)
    eps = jnp.finfo(h.dtype).eps
    unit = lax.rsqrt(jnp.maximum(diagonal, eps * (jnp.mean(diagonal) if size is None else size)))
    jitter = _preconditioner.JITTER * jnp.diag(
        jnp.full(len(h), eps, h.dtype) if rounding is None else rounding
    )
    return jnp.linalg.cholesky(unit[:, None] * h * unit[None] + jitter), unit


def factored_solve(lower: Array, unit: Array, b: Array) -> Array:
    """h^-1 b."""
    x = (unit * b)[:, None]
    for transpose in (False, True):
        x = lax.linalg.triangular_solve(lower, x, left_side=True, lower=True, transpose_a=transpose)
    return unit * x[:, 0]

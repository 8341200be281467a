"""Solves with the Hessian: by preconditioned conjugate gradients, and by a dense Cholesky factor.

    H = sum_i w_i (diag p_i - p_i p_i^T) kron x_i x_i^T + ridge

Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithms 5.3 and 7.1.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._sharding import while_loop
from softjax.regression import _standardised
from softjax.regression._features import by_examples
from softjax.regression._objective import Point, softmax_hvp
from softjax.regression._standardised import Standardised

CG_STEPS = 250
# The jitter of a factor, in roundings, is larger than the error of the factor.
JITTER = 100
# The bounds of the relative residual of a direction, in the norm of the preconditioner. It is rough
# far from the optimum, to save work there, and becomes finer as the gradient becomes smaller.
ROUGH, FINE = 0.25, 1e-3
# A curvature below this part of the preconditioner's is rounding.
FLAT = 1e-10


def truncated(
    s: Standardised, weights: Array, p: Array, point: Point, norm: Array, precondition: Callable
) -> tuple[Array, Array]:
    """Newton's direction -H^-1 g at a point, and the number of products with the features."""
    # If features are collinear, the curvature is only rounding: this ridge is larger.
    ridge = s.ridge + s.rounding * point.uncertainty.astype(s.ridge.dtype)

    def hvp(v):
        def curved(weights, features, p):
            own = s._replace(features=features)
            return own.pull_back(softmax_hvp(weights, p, own.scores(v)))

        return by_examples(curved, weights, s.features, p) + ridge[None] * v

    # Divided by its norm, float32 can hold the gradient. The norm is 0 in a finished lane.
    size = jnp.where(norm > 0, norm, 1)
    g = (_standardised.to_standard(s.mean, s.scale, point.gradient) / size).astype(s.ridge.dtype)
    tolerance = jnp.clip(3 * jnp.sqrt(norm).astype(s.ridge.dtype), FINE, ROUGH)
    d, steps = conjugate_gradients(hvp, precondition, -g, tolerance, CG_STEPS)
    return _standardised.from_standard(s.mean, s.scale, d.astype(norm.dtype) * size), 2 * steps


def conjugate_gradients(
    hvp: Callable, precondition: Callable, b: Array, tol: Any, limit: int
) -> tuple[Array, Array]:
    """x with H x = b, and the number of steps.

    `precondition` is the inverse of the preconditioner. The iteration ends once the residual, in
    the norm of the preconditioner, is `tol` times the first one, or after `limit` steps.
    """
    z = precondition(b)
    product = jnp.vdot(b, z)
    bound = tol * tol * product

    def unsolved(carry):
        _, _, _, product, step = carry
        return (product > bound) & (step < limit)

    def body(carry):
        x, r, direction, product, step = carry
        image = hvp(direction)
        length = product / jnp.vdot(direction, image)
        x, r = x + length * direction, r - length * image
        z = precondition(r)
        following = jnp.vdot(r, z)
        return x, r, z + following / product * direction, following, step + 1

    start = (jnp.zeros_like(b), b, z, product, jnp.zeros((), jnp.int32))
    x, _, _, _, steps = while_loop(unsolved, body, start)
    return x, steps


def conjugate_gradients_in_numpy(
    times: Callable, precondition: Callable, x: np.ndarray, r: np.ndarray, tol: float, limit: int
) -> tuple[np.ndarray, int]:
    """x with H x = b from a start with the residual r = b - H x, and the number of steps.

    The end is as in `conjugate_gradients`, or where the curvature is only rounding.
    """
    z = precondition(r)
    direction, product = z, np.vdot(r, z)
    expected = product  # the curvature of the preconditioner
    bound, steps = tol * tol * product, 0
    while product > bound and steps < limit:
        image = times(direction)
        curvature = np.vdot(direction, image)
        if not curvature > FLAT * expected:
            break
        length = product / curvature
        x, r = x + length * direction, r - length * image
        z, before = precondition(r), product
        product = np.vdot(r, z)
        direction = z + product / before * direction
        expected = product + (product / before) ** 2 * expected
        steps += 1
    return x, steps


def hessian(gram: Callable[[Array], Array], weights: Array, p: Array, ridge: Array) -> Array:
    """The Hessian [K, D, K, D] of blocks -X^T diag(w p_k p_j) X; ridge minus their sum if k = j.

    `gram` is the function u -> X^T diag(u) X.
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

    The curvature along the vector of ones over the classes, which is 0, is set to the mean one.
    """
    h = hessian(s.gram, weights, p, s.ridge)
    num_classes, width = h.shape[:2]
    # Without an intercept the bias has no curvature and no gradient: 1 makes the factor regular.
    unit = (1 - s.constant).astype(h.dtype) * jnp.eye(num_classes, dtype=h.dtype)
    h = h.at[:, -1, :, -1].add(unit)
    mean = jnp.mean(jnp.einsum("kdkd->kd", h), 0)
    h = (h + jnp.diag(mean)[None, :, None] / num_classes).reshape(num_classes * width, -1)
    # The curvature of the bias, which has no ridge.
    return factor(h, jnp.tile(s.rounding, num_classes), mean[-1])


def factor(
    h: Array, rounding: Array | None = None, size: Array | None = None
) -> tuple[Array, Array]:
    """L and u with L L^T = diag(u) h diag(u) + jitter, where diag(u) h diag(u) has unit diagonal.

    The jitter is larger than the relative error of h: `rounding` [D], or that of the dtype if None.
    `size` is the size of a curvature without a ridge; None for the mean of the diagonal.
    """
    diagonal = jnp.diag(h)
    eps = jnp.finfo(h.dtype).eps
    unit = lax.rsqrt(jnp.maximum(diagonal, eps * (jnp.mean(diagonal) if size is None else size)))
    jitter = JITTER * jnp.diag(jnp.full(len(h), eps, h.dtype) if rounding is None else rounding)
    return jnp.linalg.cholesky(unit[:, None] * h * unit[None] + jitter), unit


def factored_solve(lower: Array, unit: Array, b: Array) -> Array:
    """h^-1 b."""
    x = (unit * b)[:, None]
    for transpose in (False, True):
        x = lax.linalg.triangular_solve(lower, x, left_side=True, lower=True, transpose_a=transpose)
    return unit * x[:, 0]

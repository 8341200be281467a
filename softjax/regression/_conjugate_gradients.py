"""Preconditioned conjugate gradients, and Newton's direction by them.

Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithms 5.3 and 7.1.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from softjax._sharding import while_loop
from softjax.regression import _standardised
from softjax.regression._objective import Point, softmax_hvp
from softjax.regression._standardised import Standardised

CG_STEPS = 250
# The relative residual of a direction, in the norm of the preconditioner. It is rough at first, so
# that no work goes into directions far from the optimum, and becomes finer with the gradient.
ROUGH, FINE = 0.25, 1e-3


def truncated(
    s: Standardised, weights: Array, p: Array, point: Point, norm: Array, precondition: Callable
) -> tuple[Array, Array]:
    """Newton's direction -H^-1 g at a point, and the number of products with the features."""
    # Where the features are collinear, rounding is all of the curvature: this ridge is more.
    ridge = s.ridge + s.rounding * point.uncertainty.astype(s.ridge.dtype)

    def hvp(v):
        return (
            _standardised.pull_back(s, softmax_hvp(weights, p, _standardised.scores(s, v)))
            + ridge[None] * v
        )

    # The norm scales the gradient to what float32 can hold. It is 0 in a lane that is done.
    size = jnp.where(norm > 0, norm, 1)
    g = (_standardised.to_standard(s.mean, s.scale, point.gradient) / size).astype(s.ridge.dtype)
    tolerance = jnp.clip(3 * jnp.sqrt(norm).astype(s.ridge.dtype), FINE, ROUGH)
    d, steps = conjugate_gradients(hvp, precondition, -g, tolerance, CG_STEPS)
    return _standardised.from_standard(s.mean, s.scale, d.astype(norm.dtype) * size), 2 * steps


def conjugate_gradients(
    hvp: Callable, precondition: Callable, b: Array, tol: Array, limit: int
) -> tuple[Array, Array]:
    """x with H x = b, and the number of steps.

    `precondition` is the inverse of the preconditioner. The iteration ends where the residual, in
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

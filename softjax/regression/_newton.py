"""Newton's directions: truncated, by conjugate gradients, and exact, by a dense factor."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax.regression import _metric
from softjax.regression._metric import Metric, Standardised
from softjax.regression._problem import (
    Point,
    Problem,
    example_weights,
    penalised,
    product,
)

CG_STEPS = 250
# The residual of a direction, relative, in the norm of the metric: at first rough, so that no
# work goes into directions far from the optimum, then finer with the gradient.
ROUGH, FINE = 0.25, 1e-3


def newton_cg(
    problem: Problem, s: Standardised, point: Point, metric: Metric, step: Array, norm: Array
) -> tuple[Array, Metric, Array]:
    """The direction -H^-1 g by preconditioned conjugate gradients, in float32.

    A direction needs no more digits than that: what it misses, the gradient of the next step,
    which has all of them, finds again.
    """
    weights = example_weights(problem.targets).astype(jnp.float32)
    p = point.probabilities.astype(jnp.float32)
    # At steps 0, 1, 2, 4, 8 and so on: the probabilities settle.
    metric = lax.cond(
        step & (step - 1) == 0,
        lambda: _metric.build(metric, s, weights, p),
        lambda: metric,
    )

    def hvp(v):
        scores = product(s.features, v.T).T
        return product(spread(weights, p, scores), s.features) + s.ridge * v

    # The norm scales to what float32 can hold.
    g = (_metric.to_standard(s, point.gradient) / norm).astype(jnp.float32)
    tolerance = jnp.clip(3 * jnp.sqrt(norm).astype(jnp.float32), FINE, ROUGH)
    steepest = partial(_metric.apply, metric)
    d, steps = conjugate_gradients(hvp, steepest, -g, tolerance, CG_STEPS)
    return _metric.from_standard(s, d.astype(norm.dtype) * norm), metric, 2 * steps


def newton(
    problem: Problem, s: Standardised, point: Point, memory: tuple[()], step: Array, norm: Array
) -> tuple[Array, tuple[()], Array]:
    """The direction -H^-1 g by a Cholesky factor of the Hessian, scaled to a unit diagonal."""
    h = hessian(problem, point.probabilities)
    width = h.shape[1]
    # All-ones over the classes is no direction: the curvature there is made that of the others.
    mean = jnp.mean(jnp.einsum("kdkd->kd", h), 0)
    h = (h + jnp.diag(mean)[:, None] / len(h)).reshape(point.theta.size, -1)
    unit = lax.rsqrt(jnp.maximum(jnp.diag(h), jnp.finfo(h.dtype).tiny))
    jitter = 8 * jnp.finfo(h.dtype).eps * jnp.eye(len(h), dtype=h.dtype)
    lower = jnp.linalg.cholesky(unit[:, None] * h * unit + jitter)
    d = (unit * point.gradient.ravel())[:, None]
    for transpose in (False, True):
        d = lax.linalg.triangular_solve(lower, d, left_side=True, lower=True, transpose_a=transpose)
    d = -(unit * d[:, 0]).reshape(-1, width)
    return d, memory, jnp.full((), len(point.theta), jnp.int32)


def hessian(problem: Problem, p: Array) -> Array:
    """[K, D + 1, K, D + 1]: blocks X^T diag(w p_k (1{k = j} - p_j)) X + 1{k = j} ridge."""
    weights = example_weights(problem.targets)
    x: Any = problem.features
    x = jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1)
    num_classes, width = len(p), x.shape[1]
    rows, columns = np.triu_indices(num_classes)

    def block(pair):
        k, j = pair
        return (x.T * (weights * p[k] * ((k == j) - p[j]))) @ x

    blocks = lax.map(block, (jnp.asarray(rows), jnp.asarray(columns)))
    h = jnp.zeros((num_classes, num_classes, width, width), x.dtype)
    h = h.at[rows, columns].set(blocks).at[columns, rows].set(blocks)
    ridge = problem.l2 * penalised(jnp.ones((1, width), x.dtype))[0]
    diagonal = jnp.arange(num_classes)
    return h.at[diagonal, diagonal].add(jnp.diag(ridge)).transpose(0, 2, 1, 3)


def conjugate_gradients(
    hvp: Callable, steepest: Callable, b: Array, tol: Array, limit: int
) -> tuple[Array, Array]:
    """x with H x = b in the metric whose inverse is `steepest`, and the number of steps.

    Until the residual, in the norm of the metric, is `tol` times the first.
    """
    z = steepest(b)
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
        z = steepest(r)
        following = jnp.vdot(r, z)
        return x, r, z + following / product * direction, following, step + 1

    start = (jnp.zeros_like(b), b, z, product, jnp.zeros((), jnp.int32))
    x, _, _, _, steps = lax.while_loop(unsolved, body, start)
    return x, steps


def spread(weights: Array, p: Array, scores: Array) -> Array:
    """w_i (diag p_i - p_i p_i^T) scores_i."""
    moved = p * scores
    return weights * (moved - p * jnp.sum(moved, 0))

"""Directions: Newton's, truncated by conjugate gradients or exact by a dense factor, and L-BFGS.

    d = -H^-1 g

L-BFGS in the compact form, with the metric as its first inverse Hessian: with the last m steps S,
changes of the gradient Y and U = M^-1 Y, R the upper triangle of S Y^T and E its diagonal,

    H^-1 g ~ M^-1 g + [S; U]^T [[R^-T (E + Y U^T) R^-1, -R^-T], [-R^-1, 0]] [S; U] g

Two small triangular solves and four products in place of two loops over the memory.

Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithm 7.1; R. H. Byrd,
J. Nocedal and R. B. Schnabel, "Representations of quasi-Newton matrices and their use in limited
memory methods" (1994), theorem 2.2.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._sharding import cond, while_loop
from softjax.regression import _metric
from softjax.regression._metric import Metric, Standardised
from softjax.regression._problem import Point, Problem, example_weights, spread, uncertainty

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

CG_STEPS = 250
# The residual of a direction, relative, in the norm of the metric: at first rough, so that no
# work goes into directions far from the optimum, then finer with the gradient.
ROUGH, FINE = 0.25, 1e-3
# The steps that L-BFGS remembers.
LENGTH = 10


class Method(NamedTuple):
    """A way to find directions.

    Attributes:
        start: of (features, theta): the memory before the first step.
        direction: of (problem, standardised features, point, memory, step, norm): the direction,
            the new memory and the number of products with the features.
        patience: as many steps without a smaller gradient are rounding.
        unseen: of (standardised features, memory, gradient): as of `_metric`.
        precise: whether directions are computed in the dtype of the fit, and not in float32.
    """

    start: Callable
    direction: Callable
    patience: int
    unseen: Callable = _metric.unseen
    precise: bool = False


class Memory(NamedTuple):
    """The last LENGTH steps, oldest first; rows of zeros before there are as many.

    Attributes:
        metric: M.
        theta, gradient: of the step before, [K, D + 1].
        steps, changes, images: S, Y and U, [LENGTH, K (D + 1)].
    """

    metric: Metric
    theta: Any
    gradient: Any
    steps: Any
    changes: Any
    images: Any


def newton_cg(
    problem: Problem, s: Standardised, point: Point, metric: Metric, step: Array, norm: Array
) -> tuple[Array, Metric, Array]:
    """The direction -H^-1 g by preconditioned conjugate gradients, in float32.

    A direction needs no more digits than that: what it misses, the gradient of the next step,
    which has all of them, finds again.
    """
    weights = example_weights(problem.targets).astype(s.ridge.dtype)
    p = point.probabilities.astype(s.ridge.dtype)
    # At steps 0, 1, 2, 4, 8 and so on: the probabilities settle.
    metric = cond(
        step & (step - 1) == 0,
        lambda: _metric.build(metric, s, weights, p),
        lambda: metric,
    )

    steepest = partial(_metric.apply, metric)
    s = _metric.within(s, metric)
    d, passes = truncated(s, weights, p, point, norm, steepest)
    return d, metric, passes


def newton(
    problem: Problem, s: Standardised, point: Point, pivot: Array, step: Array, norm: Array
) -> tuple[Array, Array, Array]:
    """The direction -H^-1 g by a Cholesky factor of the Hessian, in float32 too.

    The memory is the smallest pivot of the factor, relative.
    """
    weights = example_weights(problem.targets).astype(jnp.float32)
    p = point.probabilities.astype(jnp.float32)
    s = _metric.reweighted(s, uncertainty(weights, p))
    lower, unit = factored_hessian(s, weights, p)
    num_classes, width = point.gradient.shape
    g = (_metric.to_standard(s.mean, s.scale, point.gradient) / norm).astype(jnp.float32)
    d = -factored_solve(lower, unit, g.ravel()).reshape(num_classes, width)
    d = _metric.from_standard(s.mean, s.scale, d.astype(norm.dtype) * norm)
    pivot = jnp.square(jnp.min(jnp.diag(lower)))
    return d, pivot, jnp.full((), num_classes, jnp.int32)


def _lbfgs_start(features: "Array | BCOO", theta: Any) -> Memory:
    zeros = np.zeros(theta.shape, theta.dtype)
    history = np.zeros((LENGTH, theta.size), theta.dtype)
    metric = _metric.empty(features, len(theta))
    return Memory(metric, zeros, zeros, history, history, history)


def lbfgs(
    problem: Problem, s: Standardised, point: Point, memory: Memory, step: Array, norm: Array
) -> tuple[Array, Memory, Array]:
    """The direction -H^-1 g with the H^-1 of the compact form, in the dtype of the fit."""
    shape = point.gradient.shape

    def steepest(metric, gradient):
        return _metric.steepest(s, metric, gradient.reshape(shape), norm).ravel()

    def refreshed():
        weights = example_weights(problem.targets)
        metric = _metric.build(memory.metric, s, weights, point.probabilities)
        return metric, jax.vmap(lambda y: steepest(metric, y))(memory.changes)

    # Early, where the first step may lead far, and again while the probabilities settle.
    metric, images = cond(
        (step == 0) | (step == 1) | (step == 4) | (step == 16) | (step == 64),
        refreshed,
        lambda: (memory.metric, memory.images),
    )
    moved = (point.theta - memory.theta).ravel()
    change = (point.gradient - memory.gradient).ravel()
    new = (step > 0) & (jnp.vdot(moved, change) > 0)

    def pushed(rows, row):
        return jnp.where(new, jnp.concatenate([rows[1:], row[None]]), rows)

    changes = pushed(memory.changes, change)
    steps = pushed(memory.steps, moved)
    images = pushed(images, steepest(metric, change))
    gradient = point.gradient.ravel()
    d = -_inverse_hessian(steps, changes, images, gradient, steepest(metric, gradient))
    memory = Memory(metric, point.theta, point.gradient, steps, changes, images)
    return d.reshape(shape), memory, jnp.zeros((), jnp.int32)


def _unseen_by_newton(s: Standardised, pivot: Array, gradient: Array) -> Array:
    """The largest number where the Hessian is singular but for what was added to factor it."""
    blurred = pivot * _metric.BLURRED < _metric.JITTER * jnp.finfo(pivot.dtype).eps
    return jnp.where(blurred, jnp.finfo(gradient.dtype).max, 0).astype(gradient.dtype)


def _unseen_by_lbfgs(s: Standardised, memory: Memory, gradient: Array) -> Array:
    return _metric.unseen(s, memory.metric, gradient)


NEWTON_CG = Method(lambda x, theta: _metric.empty(x, len(theta)), newton_cg, 5)
NEWTON = Method(lambda x, theta: np.ones((), np.float32), newton, 5, _unseen_by_newton)
LBFGS = Method(_lbfgs_start, lbfgs, 30, _unseen_by_lbfgs)
# Newton-CG for features that float32 does not tell apart.
PRECISE = Method(
    lambda x, theta: _metric.empty(x, len(theta), theta.dtype), newton_cg, 5, precise=True
)


def truncated(
    s: Standardised, weights: Array, p: Array, point: Point, norm: Array, steepest: Callable
) -> tuple[Array, Array]:
    """-H^-1 g at a point, and the products with the features that it took."""
    # Where the features are collinear there is no curvature but that of rounding: this is more.
    ridge = s.ridge + s.rounding * point.uncertainty.astype(s.ridge.dtype)

    def hvp(v):
        return _metric.pulled(s, spread(weights, p, _metric.scores(s, v))) + ridge[None] * v

    # The norm, 0 in a lane that is done, scales to what float32 can hold.
    size = jnp.where(norm > 0, norm, 1)
    g = (_metric.to_standard(s.mean, s.scale, point.gradient) / size).astype(s.ridge.dtype)
    tolerance = jnp.clip(3 * jnp.sqrt(norm).astype(s.ridge.dtype), FINE, ROUGH)
    d, steps = conjugate_gradients(hvp, steepest, -g, tolerance, CG_STEPS)
    return _metric.from_standard(s.mean, s.scale, d.astype(norm.dtype) * size), 2 * steps


def factored_hessian(s: Standardised, weights: Array, p: Array) -> tuple[Array, Array]:
    """`factor` of the Hessian [K (D + 1), K (D + 1)].

    All-ones over the classes is no direction: the curvature there is made that of the others.
    """
    h = hessian(partial(_metric.gram, s), weights, p, s.ridge)
    num_classes, width = h.shape[:2]
    # Without an intercept there is no curvature in the place of the bias, and no gradient.
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
    jitter = _metric.JITTER * jnp.diag(
        jnp.full(len(h), eps, h.dtype) if rounding is None else rounding
    )
    return jnp.linalg.cholesky(unit[:, None] * h * unit[None] + jitter), unit


def factored_solve(lower: Array, unit: Array, b: Array) -> Array:
    """h^-1 b."""
    x = (unit * b)[:, None]
    for transpose in (False, True):
        x = lax.linalg.triangular_solve(lower, x, left_side=True, lower=True, transpose_a=transpose)
    return unit * x[:, 0]


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
    x, _, _, _, steps = while_loop(unsolved, body, start)
    return x, steps


def _inverse_hessian(
    steps: Array, changes: Array, images: Array, gradient: Array, steepest: Array
) -> Array:
    products = steps @ changes.T
    e = jnp.diag(products)
    r = jnp.triu(products) + jnp.diag(jnp.where(e > 0, 0, 1).astype(e.dtype))
    # The metric is right in its shape, not in its size: as measured along the last step.
    last = jnp.vdot(changes[-1], images[-1])
    size = jnp.where(last > 0, e[-1] / jnp.where(last > 0, last, 1), 1)
    a, b = steps @ gradient, size * (images @ gradient)
    inner = jnp.diag(e) + size * (changes @ images.T)
    low = lax.linalg.triangular_solve(r, a[:, None], left_side=True, lower=False)
    top = lax.linalg.triangular_solve(
        r, inner @ low - b[:, None], left_side=True, lower=False, transpose_a=True
    )
    return size * steepest + (top[:, 0] @ steps) - size * (low[:, 0] @ images)

"""Accelerated proximal steps in the metric of the features, for a penalty with corners.

    theta <- argmin <g, theta - y> + 1/2 |theta - y|_M^2 + l1 |kernel|_1,  g = X^T (w p - q) + l2 y

with a momentum y that starts anew where it would lead up, and M = X^T diag(w) X / 2 + l2 of each
class, Boehning's bound of the Hessian, 1/2 (I - 11^T/K) kron X^T diag(w) X + l2: no step has to be
searched. Features may be collinear or of any size, since M is; how far apart it is from the Hessian
is all that counts. The minimum is that of a quadratic form of D dimensions, by steps of

    theta <- shrink(theta - slope / c, l1 / c),  shrink(v, s) = sign(v) max(|v| - s, 0)

without a product with the features; c_j is the largest eigenvalue of M between scaled features.
Where the features are sparse or many, M is diag(c), and one such step does.

Source: A. Beck and M. Teboulle, "A fast iterative shrinkage-thresholding algorithm" (2009);
B. O'Donoghue and E. Candes, "Adaptive restart for accelerated gradient schemes" (2015).
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax._sharding import fori_loop, while_loop
from softjax.regression._descent import State, initial
from softjax.regression._metric import LARGEST_FACTOR
from softjax.regression._problem import (
    Problem,
    by_columns,
    class_scores,
    example_weights,
    gradient_bound,
    is_sparse,
    penalised,
    point,
    product,
    pull_back,
    relative_norm,
    value,
)
from softjax.regression._result import Status

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

POWER_STEPS = 30
# The power method comes from below.
SAFETY = 1.1
PATIENCE = 2000
# The minimum in the metric: its slope, relative to the first, and no more steps than these.
INNER, INNER_STEPS = 0.1, 500


class Momentum(NamedTuple):
    """Where the next gradient is taken, and Nesterov's t."""

    ahead: Any
    t: Any


class Bound(NamedTuple):
    """M <= diag(c) on [K, D + 1]; `gram` None for diag(c) itself.

    Attributes:
        gram: [D + 1, D + 1].
        curvature: c [D + 1].
        threshold: l1, and 0 for the bias, [1, D + 1].
        scale: of the gradient.
    """

    gram: Array | None
    curvature: Array
    threshold: Array
    scale: Array


def start(features: "Array | BCOO", theta: Any) -> State:
    return initial(theta, Momentum(theta, np.ones((), theta.dtype)))


def advance(problem: Problem, tol: Array, state: State, stop: Array) -> tuple[State, Array]:
    bound = _bound(problem)

    def body(state):
        ahead, t = state.memory
        here = point(problem, ahead, class_scores(problem.features, ahead))
        theta, norm = _least(bound, ahead, here.gradient)
        image = _times(bound, ahead - theta)
        decrement = jnp.vdot(image, ahead - theta) / 2
        next_t, speed = _speed(t, jnp.vdot(image, theta - state.theta) > 0)
        momentum = Momentum(theta + speed * (theta - state.theta), next_t)

        stalled = jnp.where(norm < state.best, 0, state.stalled + 1)
        status = jnp.where(stalled >= PATIENCE, Status.PRECISION_FLOOR, Status.RUNNING)
        status = jnp.where((norm <= tol) & (decrement <= tol), Status.CONVERGED, status)
        finite = jnp.isfinite(norm)
        status = jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int32)
        return state._replace(
            theta=jnp.where(finite, theta, state.theta),
            memory=momentum,
            norm=norm,
            decrement=decrement,
            best=jnp.minimum(norm, state.best),
            stalled=stalled,
            step=state.step + 1,
            passes=state.passes + 2,
            status=status,
        )

    def running(state):
        return (state.status == Status.RUNNING) & (state.step < stop)

    state = while_loop(running, body, state)
    logits = class_scores(problem.features, state.theta)
    return state._replace(value=value(problem, state.theta, logits)), logits


def _least(bound: Bound, ahead: Array, gradient: Array) -> tuple[Array, Array]:
    """The argmin from `ahead`, and the gradient there as the penalty leaves it: 0 at the optimum.

    By the same accelerated steps, of the quadratic form.
    """

    def unsolved(carry):
        _, _, _, norm, first, step = carry
        return (norm > INNER * first) & (step < INNER_STEPS)

    def body(carry):
        theta, y, t, _, first, step = carry
        slope = gradient + _times(bound, y - ahead)
        following = _shrink(bound, y - slope / bound.curvature[None])
        change = bound.curvature[None] * (y - following)
        norm = relative_norm(change, bound.scale)
        uphill = jnp.vdot(change, following - theta) > 0
        next_t, speed = _speed(t, uphill)
        y = following + speed * (following - theta)
        return following, y, next_t, norm, jnp.where(step == 0, norm, first), step + 1

    one = jnp.ones((), ahead.dtype)
    carry = (ahead, ahead, one, one * jnp.inf, one, jnp.zeros((), jnp.int32))
    theta, _, _, _, first, _ = while_loop(unsolved, body, carry)
    return theta, first


def _speed(t: Array, uphill: Array) -> tuple[Array, Array]:
    """The next t, and how much of a step the next gradient is taken ahead; anew where uphill."""
    next_t = jnp.where(uphill, 1, (1 + jnp.sqrt(1 + 4 * t * t)) / 2)
    return next_t, jnp.where(uphill, 0, (t - 1) / next_t)


def _times(bound: Bound, v: Array) -> Array:
    """M v."""
    return v * bound.curvature[None] if bound.gram is None else product(v, bound.gram)


def _shrink(bound: Bound, v: Array) -> Array:
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - bound.threshold / bound.curvature[None], 0)


def _bound(problem: Problem) -> Bound:
    x: Any = problem.features
    weights = example_weights(problem.targets)
    scale = gradient_bound(problem)
    ridge = problem.l2 * penalised(jnp.ones_like(scale)[None])
    gram = None
    if not is_sparse(x) and len(scale) <= LARGEST_FACTOR:
        total = product(weights, x)
        squares = by_columns(lambda columns: product((weights[:, None] * columns).T, x), x)
        gram = (
            jnp.block(
                [
                    [squares, total[:, None]],
                    [total[None], jnp.sum(weights, keepdims=True)[None]],
                ]
            )
            / 2
        )

    def body(_, v):
        v = (v / (scale * jnp.linalg.norm(v)))[None]
        image = (
            pull_back(x, weights[None] / 2 * class_scores(x, v))
            if gram is None
            else product(v, gram)
        )
        return image[0] / scale

    v = fori_loop(0, POWER_STEPS, body, jnp.ones_like(scale))
    curvature = SAFETY * jnp.linalg.norm(v) * scale * scale + ridge[0]
    gram = None if gram is None else gram + jnp.diag(ridge[0])
    return Bound(gram, curvature, problem.l1 * penalised(jnp.ones_like(ridge)), scale)

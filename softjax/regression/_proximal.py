"""Accelerated proximal gradient steps, for a penalty with corners.

    theta <- shrink(y - (X^T (w p - q) + l2 y) / c, l1 / c),  shrink(v, s) = sign(v) max(|v| - s, 0)

with a momentum y that starts anew where it would lead up, and a curvature c_j for each feature from
Boehning's bound, Hessian <= 1/2 (I - 11^T/K) kron X^T diag(w) X + l2: no step has to be searched.

Source: A. Beck and M. Teboulle, "A fast iterative shrinkage-thresholding algorithm" (2009);
B. O'Donoghue and E. Candes, "Adaptive restart for accelerated gradient schemes" (2015).
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax.regression import _status
from softjax.regression._descent import State, initial
from softjax.regression._problem import (
    Problem,
    class_scores,
    example_weights,
    gradient_bound,
    penalised,
    point,
    pull_back,
    relative_norm,
    value,
)

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

POWER_STEPS = 30
# The power method comes from below.
SAFETY = 1.1
PATIENCE = 2000


class Momentum(NamedTuple):
    """Where the next gradient is taken, and Nesterov's t."""

    ahead: Any
    t: Any


def start(features: "Array | BCOO", theta: Any) -> State:
    return initial(theta, Momentum(theta, np.ones((), theta.dtype)))


def advance(problem: Problem, tol: Array, state: State, stop: Array) -> tuple[State, Array]:
    bound = gradient_bound(problem)
    curvature = _curvature(problem, bound)
    threshold = problem.l1 * penalised(1 / curvature[None])

    def body(state):
        ahead, t = state.memory
        here = point(problem, ahead, class_scores(problem.features, ahead))
        moved = ahead - here.gradient / curvature
        theta = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - threshold, 0)
        # The gradient as the penalty leaves it: 0 at the optimum alone.
        mapped = curvature * (ahead - theta)
        norm = relative_norm(mapped, bound)
        decrement = jnp.vdot(mapped, ahead - theta) / 2
        uphill = jnp.vdot(ahead - theta, theta - state.theta) > 0
        next_t = jnp.where(uphill, 1, (1 + jnp.sqrt(1 + 4 * t * t)) / 2)
        speed = jnp.where(uphill, 0, (t - 1) / next_t)
        momentum = Momentum(theta + speed * (theta - state.theta), next_t)

        stalled = jnp.where(norm < state.best, 0, state.stalled + 1)
        status = jnp.where(stalled >= PATIENCE, _status.PRECISION_FLOOR, _status.RUNNING)
        status = jnp.where((norm <= tol) & (decrement <= tol), _status.CONVERGED, status)
        finite = jnp.isfinite(norm)
        status = jnp.where(finite, status, _status.NON_FINITE).astype(jnp.int32)
        return State(
            jnp.where(finite, theta, state.theta),
            momentum,
            state.value,
            norm,
            decrement,
            jnp.minimum(norm, state.best),
            stalled,
            state.step + 1,
            state.passes + 2,
            status,
        )

    def running(state):
        return (state.status == _status.RUNNING) & (state.step < stop)

    state = lax.while_loop(running, body, state)
    logits = class_scores(problem.features, state.theta)
    return state._replace(value=value(problem, state.theta, logits)), logits


def _curvature(problem: Problem, scale: Array) -> Array:
    """[D + 1]: the largest eigenvalue of X^T diag(w) X / 2 between scaled features, scaled back."""
    weights = example_weights(problem.targets)
    x = problem.features

    def body(_, v):
        v = v / (scale * jnp.linalg.norm(v))
        return pull_back(x, weights * class_scores(x, v[None]))[0] / scale

    v = lax.fori_loop(0, POWER_STEPS, body, jnp.ones_like(scale))
    largest = SAFETY / 2 * jnp.linalg.norm(v)
    return largest * scale * scale + problem.l2 * penalised(jnp.ones_like(scale)[None])[0]

"""The length of a step along a direction, from its slope alone.

Along theta + t d the logits are Z + t Q with the known Q = X d: a trial costs O(N K) and no
product with the features. The objective is convex, so that the slope phi'(t) of
phi(t) = f(theta + t d) decides: its minimum is where the slope vanishes. Differences of
objectives, which cancel near the optimum, are not formed.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from softjax._sharding import while_loop
from softjax.regression._convergence import State, after_step
from softjax.regression._objective import (
    Problem,
    balanced,
    example_weights,
    penalised,
    probabilities,
    softmax_hvp,
)

TRIALS = 20
# A step ends where the slope has at least halved. Beyond the minimum, where the gain might be lost
# again, it ends only where the slope is no more than a tenth of the first one, and the curvature
# there puts the minimum at no less than half of the length.
SLOPE_LEFT, OVERSHOOT, MIN_FRACTION = 0.5, 0.1, 0.5


def take_step(
    problem: Problem,
    state: State,
    logits: Array,
    d: Array,
    d_logits: Array,
    slope: Array,
    passes: Any,
    patience: int,
) -> tuple[State, Array, Array]:
    """A step from `state` along d: the state after it, its logits, and the length.

    Args:
        problem: what is solved.
        state: where the step begins.
        logits: at its parameters, [K, N].
        d: the direction, [K, D + 1].
        d_logits: what it adds to the logits, [K, N].
        slope: of the objective along d.
        passes: the products with the features that the step takes.
        patience: that of the solver.
    """
    t = step_length(problem, state.theta, logits, slope, d, d_logits)
    state = after_step(
        state,
        add_step(state.theta, t, d),
        state.memory,
        decrement=-slope / 2,
        move=t * largest_move(d_logits),
        passes=passes,
        patience=patience,
        stuck=t == 0,
    )
    return state, add_step(logits, t, d_logits), t


def largest_move(d_logits: Array) -> Array:
    """The largest move, in nats, of one class of an example against another along a direction."""
    return jnp.max(jnp.max(d_logits, 0) - jnp.min(d_logits, 0))


def add_step(a: Array, t: Array, step: Array) -> Array:
    """a + t step, and a where t is 0: there the direction may be infinite, and 0 * inf is NaN."""
    return a + jnp.where(t == 0, 0, t * step)


def step_length(
    problem: Problem, theta: Array, logits: Array, first: Array, d: Array, d_logits: Array
) -> Array:
    """t > 0 near the minimum of phi(t) = f(theta + t d), and 0 where d does not go down.

    Newton's method on phi' = 0, from t = 1, kept between the last t known to go down and the
    first known to go up. `first` is phi'(0), which near the optimum cancels in phi'.
    """
    q, weights = problem.targets, example_weights(problem.targets)
    d_kernel = penalised(problem, d)
    linear = problem.l2 * jnp.vdot(theta, d_kernel)
    square = problem.l2 * jnp.vdot(d, d_kernel)

    def slope_and_curvature(t):
        p = probabilities(logits + t * d_logits)
        slope = jnp.vdot(balanced(p, weights[None] * p - q), d_logits) + linear + t * square
        curvature = jnp.vdot(softmax_hvp(weights, p, d_logits), d_logits) + square
        return slope, curvature

    def near(t, slope, curvature):
        return (slope <= -OVERSHOOT * first) & (slope <= MIN_FRACTION * curvature * t)

    def searching(carry):
        t, _, _, slope, curvature, trial = carry
        done = (slope >= SLOPE_LEFT * first) & near(t, slope, curvature)
        return (trial < TRIALS) & ~done

    def body(carry):
        t, low, high, slope, curvature, trial = carry
        newton = jnp.where(trial == 0, 1, t - slope / curvature)
        middle = jnp.where(jnp.isinf(high), 4 * t, (low + high) / 2)
        inside = (newton > low) & (newton < high) & ((trial == 0) | (newton <= 10 * t))
        t = jnp.where(inside, newton, middle)
        slope, curvature = slope_and_curvature(t)
        down = slope < 0
        low, high = jnp.where(down, t, low), jnp.where(down, high, t)
        return t, low, high, slope, curvature, trial + 1

    zero = jnp.zeros_like(first)
    start = (zero, zero, jnp.full_like(first, jnp.inf), first, zero, jnp.zeros((), jnp.int32))
    t, low, _, slope, curvature, _ = while_loop(searching, body, start)
    t = jnp.where(near(t, slope, curvature) & (slope >= first), t, low)
    return jnp.where(first < 0, t, 0)

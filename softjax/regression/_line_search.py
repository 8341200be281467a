"""The length of a step along a direction, from its slope alone.

Along theta + t d the logits are Z + t Q with the known Q = X d: a trial costs O(N K) and no
product with the features. The objective is convex, so that the slope phi'(t) of
phi(t) = f(theta + t d) decides: its minimum is where the slope vanishes. Differences of
objectives, which cancel near the optimum, are not formed.
"""

import jax.numpy as jnp
from jax import Array

from softjax._sharding import while_loop
from softjax.regression._data import Problem
from softjax.regression._objective import (
    balanced,
    example_weights,
    penalised,
    probabilities,
    softmax_hvp,
)

TRIALS = 20
# A step ends where the slope has halved at least; beyond the minimum, where what has been gained
# might be lost again, only where the slope is a tenth of the first and, by the curvature there,
# the minimum is no less than half as far.
SLOPE_LEFT, OVERSHOOT, MIN_FRACTION = 0.5, 0.1, 0.5


def largest_move(d_logits: Array) -> Array:
    """By how much a direction moves one class of an example against another, at most."""
    return jnp.max(jnp.max(d_logits, 0) - jnp.min(d_logits, 0))


def add_step(a: Array, t: Array, step: Array) -> Array:
    """a + t step; a direction that is not finite leads nowhere: 0 * inf would be NaN."""
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

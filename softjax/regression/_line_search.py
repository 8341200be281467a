"""A step length from the slope alone.

Along theta + t d the logits are Z + t Q with Q = X d known: a trial costs O(N K) and no product
with the features. The objective is convex, so that its slope phi'(t) says all: the minimum is
where it vanishes. Differences of objectives, which cancel near the optimum, are not formed.
"""

import jax.numpy as jnp
from jax import Array, lax

from softjax.regression._problem import Problem, example_weights, penalised, probabilities

TRIALS = 20
# A step ends where the slope has halved at least; beyond the minimum, where what has been gained
# might be lost again, only where the slope is a tenth of the first and, by the curvature there,
# the minimum is no less than half as far.
BEFORE, BEYOND, BACK = 0.5, 0.1, 0.5


def step_length(
    problem: Problem, theta: Array, logits: Array, first: Array, d: Array, d_logits: Array
) -> Array:
    """t > 0 near the minimum of phi(t) = f(theta + t d), and 0 where d does not go down.

    Newton's method on phi' = 0, from t = 1, kept between the last t known to go down and the
    first known to go up. `first` is phi'(0), which near the optimum cancels in phi'.
    """
    q, weights = problem.targets, example_weights(problem.targets)
    d_kernel = penalised(d)
    linear = problem.l2 * jnp.vdot(theta, d_kernel)
    square = problem.l2 * jnp.vdot(d_kernel, d_kernel)

    def slope_and_curvature(t):
        p = probabilities(logits + t * d_logits)
        moved = p * d_logits
        mean = jnp.sum(moved, 0)
        slope = jnp.vdot(weights * p - q, d_logits) + linear + t * square
        variance = jnp.sum(moved * d_logits, 0) - mean * mean
        curvature = jnp.vdot(weights, variance) + square
        return slope, curvature

    def near(t, slope, curvature):
        return (slope <= -BEYOND * first) & (slope <= BACK * curvature * t)

    def searching(carry):
        t, _, _, slope, curvature, trial = carry
        done = (slope >= BEFORE * first) & near(t, slope, curvature)
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
    t, low, _, slope, curvature, _ = lax.while_loop(searching, body, start)
    t = jnp.where(near(t, slope, curvature) & (slope >= first), t, low)
    return jnp.where(first < 0, t, 0)

"""The loop around directions: step, judge, stop. One program, in chunks or to the end.

Along theta + t d the logits are Z + t Q with Q = X d known: a trial costs O(N K) and no product
with the features. The objective is convex, so that its slope phi'(t) says all: the minimum is
where it vanishes. Differences of objectives, which cancel near the optimum, are not formed.
"""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from softjax._sharding import cond, while_loop
from softjax.regression import _metric
from softjax.regression._convergence import State, after_step, initial, judge
from softjax.regression._directions import Method
from softjax.regression._problem import (
    Problem,
    balanced,
    centred,
    class_scores,
    example_weights,
    gradient_bound,
    has_bounded_optimum,
    logits_at,
    penalised,
    point,
    probabilities,
    relative_norm,
    spread,
    value,
    without_offset,
)
from softjax.regression._result import Status

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

TRIALS = 20
# So many nats are further than TRIALS come back from.
FAR = 1e5
# A step ends where the slope has halved at least; beyond the minimum, where what has been gained
# might be lost again, only where the slope is a tenth of the first and, by the curvature there,
# the minimum is no less than half as far.
BEFORE, BEYOND, BACK = 0.5, 0.1, 0.5
# What the loop does at a point: it stops, computes the logits again, or takes a step.
STOP, REFRESH, STEP = range(3)
# Logits are sums over steps, and are computed anew to confirm an end. They are rounded otherwise,
# which may move a gradient of the size of `tol` by as much.
CONFIRMED = 2


def start(method: Method, features: "Array | BCOO", theta: Any) -> State:
    return initial(theta, method.start(features, theta))


def advance(
    method: Method, problem: Problem, tol: Array, state: State, stop: Array
) -> tuple[State, Array]:
    """Runs until step `stop` or until the status says so: the state and its logits."""
    bound = gradient_bound(problem)
    dtype = problem.features.dtype if method.precise else jnp.float32
    s = _metric.standardise(problem, bound, dtype)

    def judged(state, here, confirming):
        objective, norm = (
            value(problem, here.theta, here.logits),
            relative_norm(here.gradient, bound),
        )
        unseen = method.unseen(s, state.memory, here.gradient)
        within = jnp.where(confirming, CONFIRMED * tol, tol)
        return judge(state, objective, norm, within, unseen, method.precise)

    def stepped(state, here):
        d, memory, passes = method.direction(problem, s, here, state.memory, state.step, state.norm)
        d = centred(d)  # it was so in float32, and the gradient does not see what was not
        # A direction that is not finite, or does not go down, comes from a model without curvature.
        downhill = jnp.vdot(here.gradient, d) < 0
        d = jnp.where(downhill & jnp.all(jnp.isfinite(d)), d, _metric.descent(s, here.gradient))
        d_logits = class_scores(problem, d)
        # Where examples are decided, and wrongly, no curvature says how far: back towards 0.
        size = jnp.max(jnp.abs(d_logits))
        back = ~((size > 0) & (size < FAR)) & (jnp.vdot(here.gradient, here.theta) > 0)
        d = jnp.where(back, -here.theta, d)
        d_logits = jnp.where(back, -without_offset(problem, here.logits), d_logits)
        first = jnp.vdot(here.gradient, d)
        t = step_length(problem, here.theta, here.logits, first, d, d_logits)
        theta = moved(here.theta, t, d)
        state = after_step(
            state,
            theta,
            memory,
            decrement=-first / 2,
            move=t * largest_move(d_logits),
            passes=passes + 2,
            patience=method.patience,
            stuck=t == 0,
        )
        return state, moved(here.logits, t, d_logits), jnp.asarray(False)

    def refreshed(state, here):
        logits = logits_at(problem, here.theta)
        return state._replace(passes=state.passes + 2), logits, jnp.asarray(True)

    def body(carry):
        state, logits, fresh, confirming, _ = carry
        here = point(problem, state.theta, logits)
        here = here._replace(gradient=centred(here.gradient))
        after = judged(state, here, confirming)
        doubtful = (after.status != Status.RUNNING) & ~fresh
        running = (after.status == Status.RUNNING) & (state.step < stop)
        todo = jnp.where(running, STEP, jnp.where(doubtful, REFRESH, STOP))
        state = after._replace(status=jnp.where(doubtful, state.status, after.status))

        def rested(state, here):
            return state, logits, fresh

        def not_stepped(state, here):
            return cond(todo == REFRESH, refreshed, rested, state, here)

        state, logits, fresh = cond(todo == STEP, stepped, not_stepped, state, here)
        return state, logits, fresh, todo == REFRESH, todo != STOP

    theta = centred(state.theta)
    logits = logits_at(problem, theta)
    strict = state.strict | has_bounded_optimum(problem)
    state = state._replace(theta=theta, strict=strict, passes=state.passes + 2)
    fresh, confirming, going = jnp.asarray([True, False, True])
    state, logits, *_ = while_loop(
        lambda carry: carry[-1], body, (state, logits, fresh, confirming, going)
    )
    return state, logits


def largest_move(d_logits: Array) -> Array:
    """By how much a direction moves one class of an example against another, at most."""
    return jnp.max(jnp.max(d_logits, 0) - jnp.min(d_logits, 0))


def moved(a: Array, t: Array, step: Array) -> Array:
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
        curvature = jnp.vdot(spread(weights, p, d_logits), d_logits) + square
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
    t, low, _, slope, curvature, _ = while_loop(searching, body, start)
    t = jnp.where(near(t, slope, curvature) & (slope >= first), t, low)
    return jnp.where(first < 0, t, 0)

"""The loop around directions: step, check_convergence, stop. One program, in chunks or to the end.

Along theta + t d the logits are Z + t Q with Q = X d known: a trial costs O(N K) and no product
with the features. The objective is convex, so that its slope phi'(t) says all: the minimum is
where it vanishes. Differences of objectives, which cancel near the optimum, are not formed.
"""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from softjax._sharding import cond, while_loop
from softjax.regression import _preconditioner, _standardised
from softjax.regression._convergence import State, after_step, check_convergence, initial
from softjax.regression._data import Problem
from softjax.regression._existence import has_bounded_optimum
from softjax.regression._line_search import add_step, largest_move, step_length
from softjax.regression._newton import Method
from softjax.regression._objective import (
    centred,
    class_scores,
    gradient_bound,
    logits_at,
    point,
    relative_norm,
    value,
    without_offset,
)
from softjax.regression._result import Status

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# So many nats are further than TRIALS come back from.
FAR = 1e5
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
    s = _standardised.standardise(problem, bound, dtype)

    def judged(state, here, confirming):
        objective, norm = (
            value(problem, here.theta, here.logits),
            relative_norm(here.gradient, bound),
        )
        unseen = method.unseen(s, state.memory, here.gradient)
        within = jnp.where(confirming, CONFIRMED * tol, tol)
        return check_convergence(state, objective, norm, within, unseen, method.precise)

    def stepped(state, here):
        d, memory, passes = method.direction(problem, s, here, state.memory, state.step, state.norm)
        d = centred(d)  # it was so in float32, and the gradient does not see what was not
        # A direction that is not finite, or does not go down, comes from a model without curvature.
        downhill = jnp.vdot(here.gradient, d) < 0
        d = jnp.where(
            downhill & jnp.all(jnp.isfinite(d)), d, _preconditioner.descent(s, here.gradient)
        )
        d_logits = class_scores(problem, d)
        # Where examples are decided, and wrongly, no curvature says how far: back towards 0.
        size = jnp.max(jnp.abs(d_logits))
        back = ~((size > 0) & (size < FAR)) & (jnp.vdot(here.gradient, here.theta) > 0)
        d = jnp.where(back, -here.theta, d)
        d_logits = jnp.where(back, -without_offset(problem, here.logits), d_logits)
        first = jnp.vdot(here.gradient, d)
        t = step_length(problem, here.theta, here.logits, first, d, d_logits)
        theta = add_step(here.theta, t, d)
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
        return state, add_step(here.logits, t, d_logits), jnp.asarray(False)

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

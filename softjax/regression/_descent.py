"""The loop around directions: step, judge, stop. One program, in chunks or to the end.

Along theta + t d the logits are Z + t Q with Q = X d known: a trial costs O(N K) and no product
with the features. The objective is convex, so that its slope phi'(t) says all: the minimum is
where it vanishes. Differences of objectives, which cancel near the optimum, are not formed.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax._sharding import cond, while_loop
from softjax.regression import _metric
from softjax.regression._directions import Method
from softjax.regression._problem import (
    Problem,
    balanced,
    centred,
    class_scores,
    example_weights,
    gradient_bound,
    has_bounded_optimum,
    penalised,
    point,
    probabilities,
    relative_norm,
    spread,
    value,
)
from softjax.regression._result import Status

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# A gradient so small, relative, is near the end: from here on the farthest move counts.
NEAR = 1e-4
# A quadratic model says how far the optimum is only where its step moves the logits little.
STILL = 0.1
TRIALS = 20
# So many nats are further than TRIALS come back from.
FAR = 1e5
# A step ends where the slope has halved at least; beyond the minimum, where what has been gained
# might be lost again, only where the slope is a tenth of the first and, by the curvature there,
# the minimum is no less than half as far.
BEFORE, BEYOND, BACK = 0.5, 0.1, 0.5


class State(NamedTuple):
    """Where a fit stands.

    Attributes:
        theta: [K, D + 1].
        memory: of the method.
        value: the objective at `theta`.
        norm: the gradient there, relative to what it can be at most.
        decrement: half of what Newton's model promised at the last step, nats.
        move: by how many nats the last step moved one class of an example against another, at most.
        farthest: the largest such move of all the steps since the gradient has been NEAR.
        strict: whether a fit that still moves so much is not at its end. Where there is no optimum
            it always does: it ends, and a proof of separation is looked for.
        best: the smallest `norm` so far, and in `stalled` the number of steps since.
        step: how many steps were taken.
        passes: products with the features so far.
        status: of `Status`.
    """

    theta: Any
    memory: Any
    value: Any
    norm: Any
    decrement: Any
    move: Any
    farthest: Any
    strict: Any
    best: Any
    stalled: Any
    step: Any
    passes: Any
    status: Any


def start(method: Method, features: "Array | BCOO", theta: Any) -> State:
    return initial(theta, method.start(features, theta))


def advance(
    method: Method, problem: Problem, tol: Array, state: State, stop: Array
) -> tuple[State, Array]:
    """Runs until step `stop` or until the status says so: the state and its logits."""
    bound = gradient_bound(problem)
    s = _metric.standardise(problem, bound)

    def judged(state, here):
        objective = value(problem, here.theta, here.logits)
        return judge(state, objective, relative_norm(here.gradient, bound), tol)

    def stepped(state, here):
        d, memory, passes = method.direction(problem, s, here, state.memory, state.step, state.norm)
        d = centred(d)  # it was so in float32, and the gradient does not see what was not
        d_logits = class_scores(problem.features, d)
        # Where examples are decided, and wrongly, no curvature says how far: back towards 0.
        size = jnp.max(jnp.abs(d_logits))
        back = ~((size > 0) & (size < FAR)) & (jnp.vdot(here.gradient, here.theta) > 0)
        d = jnp.where(back, -here.theta, d)
        d_logits = jnp.where(back, -here.logits, d_logits)
        first = jnp.vdot(here.gradient, d)
        t = step_length(problem, here.theta, here.logits, first, d, d_logits)
        theta = moved(here.theta, t, d)
        state = taken(state, theta, memory, first, t, d_logits, passes + 2, method.patience)
        return state, moved(here.logits, t, d_logits)

    def body(carry):
        state, logits, _ = carry
        here = point(problem, state.theta, logits)
        here = here._replace(gradient=centred(here.gradient))
        state = judged(state, here)
        running = (state.status == Status.RUNNING) & (state.step < stop)
        state, logits = cond(running, stepped, lambda state, here: (state, logits), state, here)
        return state, logits, running

    theta = centred(state.theta)
    logits = class_scores(problem.features, theta)
    strict = state.strict | has_bounded_optimum(problem)
    state = state._replace(theta=theta, strict=strict, passes=state.passes + 2)
    state, logits, _ = while_loop(lambda carry: carry[-1], body, (state, logits, jnp.asarray(True)))
    return state, logits


def initial(theta: Any, memory: Any) -> State:
    """The state before the first step; in NumPy, which has nothing to compile."""
    # Not infinity, at which jax_debug_infs would stop where a solver leaves it in the state.
    largest, zero = np.array(np.finfo(theta.dtype).max), np.int32(0)
    measured = (largest, largest, largest, largest, largest)
    return State(theta, memory, *measured, np.bool_(False), largest, zero, zero, zero, zero)


def judge(state: State, objective: Array, norm: Array, tol: Array) -> State:
    """The state with what was found at its parameters, and what that says of it."""
    exact = state.decrement <= tol * jnp.maximum(objective, tol)
    at_rest = (state.move < STILL) | ~state.strict
    reached = (norm <= tol) & exact & at_rest | (norm == 0)
    status = jnp.where(reached, Status.CONVERGED, state.status)
    status = jnp.where(jnp.isfinite(norm), status, Status.NON_FINITE).astype(jnp.int32)
    return state._replace(value=objective, norm=norm, status=status)


def taken(
    state: State,
    theta: Any,
    memory: Any,
    first: Array,
    t: Array,
    d_logits: Array,
    passes: Any,
    patience: int,
) -> State:
    """The state after a step of length t along a slope `first`."""
    move = t * jnp.max(jnp.max(d_logits, 0) - jnp.min(d_logits, 0))
    farthest = jnp.where(state.best < NEAR, jnp.maximum(state.farthest, move), move)
    stalled = jnp.where(state.norm < state.best, 0, state.stalled + 1)
    lost = (stalled >= patience) | (t == 0)
    return state._replace(
        theta=theta,
        memory=memory,
        decrement=-first / 2,
        move=jnp.where(t == 0, state.move, move),
        farthest=jnp.where(t == 0, state.farthest, farthest),
        best=jnp.minimum(state.norm, state.best),
        stalled=stalled,
        step=state.step + 1,
        passes=state.passes + passes,
        status=jnp.where(lost, Status.PRECISION_FLOOR, state.status).astype(jnp.int32),
    )


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
    d_kernel = penalised(d)
    linear = problem.l2 * jnp.vdot(theta, d_kernel)
    square = problem.l2 * jnp.vdot(d_kernel, d_kernel)

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

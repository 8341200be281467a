"""The loop around directions: step, judge, stop. One program, in chunks or to the end."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax.regression import _lbfgs, _metric, _newton, _status
from softjax.regression._line_search import step_length
from softjax.regression._problem import (
    Problem,
    centred,
    class_scores,
    gradient_bound,
    point,
    relative_norm,
    value,
)

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO


NEAR = 1e-4


class Method(NamedTuple):
    """A way to find directions.

    Attributes:
        start: of (features, theta): the memory before the first step.
        direction: of (problem, standardised features, point, memory, step, norm): the direction,
            the new memory and the number of products with the features.
        patience: as many steps without a smaller gradient are rounding.
    """

    start: Callable
    direction: Callable
    patience: int


NEWTON_CG = Method(lambda x, theta: _metric.empty(x, len(theta)), _newton.newton_cg, 5)
NEWTON = Method(lambda x, theta: (), _newton.newton, 5)
LBFGS = Method(_lbfgs.start, _lbfgs.direction, 30)


class State(NamedTuple):
    """Where a fit stands.

    Attributes:
        theta: [K, D + 1].
        memory: of the method.
        value: the objective at `theta`.
        norm: the gradient there, relative to what it can be at most.
        decrement: half of what Newton's model promised at the last step, nats.
        move: by how many nats the last step moved one class of an example against another, at most;
            the most of all the steps since the gradient has been NEAR.
        best: the smallest `norm` so far, and in `stalled` the number of steps since.
        step: how many steps were taken.
        passes: products with the features so far.
        status: of `_status`.
    """

    theta: Any
    memory: Any
    value: Any
    norm: Any
    decrement: Any
    move: Any
    best: Any
    stalled: Any
    step: Any
    passes: Any
    status: Any


def start(method: Method, features: "Array | BCOO", theta: Any) -> State:
    return initial(theta, method.start(features, theta))


def initial(theta: Any, memory: Any) -> State:
    """The state before the first step; in NumPy, which has nothing to compile."""
    infinite, zero = np.array(np.inf, theta.dtype), np.int32(0)
    return State(
        theta, memory, infinite, infinite, infinite, infinite, infinite, zero, zero, zero, zero
    )


def judge(state: State, objective: Array, norm: Array, tol: Array) -> State:
    """The state with what was found at its parameters, and what that says of it."""
    exact = state.decrement <= tol * jnp.maximum(objective, tol)
    reached = (norm <= tol) & exact | (norm == 0)
    status = jnp.where(reached, _status.CONVERGED, state.status)
    status = jnp.where(jnp.isfinite(norm), status, _status.NON_FINITE).astype(jnp.int32)
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
    # Where there is no optimum a step moves a nat, until the ridge of a direction outweighs the
    # curvature that is left.
    move = jnp.where(state.best < NEAR, jnp.maximum(state.move, move), move)
    stalled = jnp.where(state.norm < state.best, 0, state.stalled + 1)
    lost = (stalled >= patience) | (t == 0)
    return state._replace(
        theta=theta,
        memory=memory,
        decrement=-first / 2,
        move=jnp.where(t == 0, state.move, move),
        best=jnp.minimum(state.norm, state.best),
        stalled=stalled,
        step=state.step + 1,
        passes=state.passes + passes,
        status=jnp.where(lost, _status.PRECISION_FLOOR, state.status).astype(jnp.int32),
    )


def moved(a: Array, t: Array, step: Array) -> Array:
    """a + t step; a direction that is not finite leads nowhere: 0 * inf would be NaN."""
    return a + jnp.where(t == 0, 0, t * step)


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
        running = (state.status == _status.RUNNING) & (state.step < stop)
        state, logits = lax.cond(running, stepped, lambda state, here: (state, logits), state, here)
        return state, logits, running

    theta = centred(state.theta)
    logits = class_scores(problem.features, theta)
    state = state._replace(theta=theta, passes=state.passes + 2)
    state, logits, _ = lax.while_loop(
        lambda carry: carry[-1], body, (state, logits, jnp.asarray(True))
    )
    return state, logits

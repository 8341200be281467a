"""The loop around directions: step, judge, stop. One program, in chunks or to the end."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax.regression import _lbfgs, _metric, _newton, _status
from softjax.regression._line_search import step_length
from softjax.regression._problem import (
    Problem,
    centred,
    class_scores,
    gradient_scale,
    point,
    relative_norm,
    value,
)


class Method(NamedTuple):
    """A way to find directions.

    Attributes:
        start: the memory before the first step, of a problem.
        direction: of (problem, standardised features, point, memory, step, norm): the direction,
            the new memory and the number of products with the features.
        patience: as many steps without a smaller gradient are rounding.
    """

    start: Callable
    direction: Callable
    patience: int


NEWTON_CG = Method(_newton.newton_cg_start, _newton.newton_cg, 5)
NEWTON = Method(_newton.newton_start, _newton.newton, 5)
LBFGS = Method(_lbfgs.start, _lbfgs.direction, 30)


class State(NamedTuple):
    """Where a fit stands.

    Attributes:
        theta: [K, D + 1].
        memory: of the method.
        norm: the gradient, relative to what it can be at most.
        decrement: half of what Newton's model promised at the last step, nats.
        best: the smallest `norm` so far, and in `stalled` the number of steps since.
        step: how many steps were taken.
        passes: products with the features so far.
        status: of `_status`.
    """

    theta: Array
    memory: Any
    norm: Array
    decrement: Array
    best: Array
    stalled: Array
    step: Array
    passes: Array
    status: Array


def start(method: Method, problem: Problem, theta: Array) -> State:
    return initial(centred(theta), method.start(problem))


def initial(theta: Array, memory: Any) -> State:
    infinite = jnp.full((), jnp.inf, theta.dtype)
    zero = jnp.zeros((), jnp.int32)
    return State(theta, memory, infinite, infinite, infinite, zero, zero, zero, zero)


def advance(
    method: Method, problem: Problem, tol: Array, state: State, stop: Array
) -> tuple[State, Array]:
    """Runs until step `stop` or until the status says so: the state, and the objective."""
    s = _metric.standardise(problem)
    scale = gradient_scale(problem)

    def at(theta, logits):
        here = point(problem, theta, logits)
        return here._replace(gradient=centred(here.gradient))

    def judged(state, point, decrement, moved):
        norm = relative_norm(point.gradient, scale)
        better = norm < state.best
        stalled = jnp.where(better, 0, state.stalled + 1)
        status = jnp.where(
            (stalled >= method.patience) | ~moved, _status.PRECISION_FLOOR, _status.RUNNING
        )
        status = jnp.where((norm <= tol) & (decrement <= tol), _status.CONVERGED, status)
        status = jnp.where(norm == 0, _status.CONVERGED, status)
        status = jnp.where(jnp.isfinite(norm), status, _status.NON_FINITE).astype(jnp.int32)
        best = jnp.minimum(norm, state.best)
        return state._replace(
            norm=norm, decrement=decrement, best=best, stalled=stalled, status=status
        )

    def body(carry):
        state, here = carry
        d, memory, passes = method.direction(problem, s, here, state.memory, state.step, state.norm)
        d_logits = class_scores(problem.features, d)
        t = step_length(problem, here, d, d_logits)
        there = at(here.theta + t * d, here.logits + t * d_logits)
        decrement = -jnp.sum(here.gradient * d) / 2
        new = judged(state, there, decrement, t > 0)
        new = new._replace(
            theta=there.theta,
            memory=memory,
            step=state.step + 1,
            passes=state.passes + passes + 2,
        )
        good = new.status != _status.NON_FINITE
        kept = state._replace(status=new.status)
        return jax.tree.map(partial(jnp.where, good), (new, there), (kept, here))

    def running(carry):
        return (carry[0].status == _status.RUNNING) & (carry[0].step < stop)

    here = at(state.theta, class_scores(problem.features, state.theta))
    norm = relative_norm(here.gradient, scale)
    status = jnp.where(norm == 0, _status.CONVERGED, state.status)
    status = jnp.where(jnp.isfinite(norm), status, _status.NON_FINITE).astype(jnp.int32)
    state = state._replace(norm=norm, passes=state.passes + 2, status=status)
    state, here = lax.while_loop(running, body, (state, here))
    return state, value(problem, here.theta, here.logits)

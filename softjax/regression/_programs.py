"""The solvers by name, and the compiled programs of a fit.

A program runs a fit from one state to a later one. With few examples and many features, Newton's
steps are computed in the span of the examples.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softjax import _platforms
from softjax._sharding import cond
from softjax.regression import _ending, _loop, _preconditioner
from softjax.regression._convergence import (
    CONFIRMED,
    OUTLYING,
    STILL,
    State,
    converged,
    hides_something,
    is_separated,
    status_where_separated,
)
from softjax.regression._dual import Dual
from softjax.regression._firth import Firth
from softjax.regression._frame import is_wide
from softjax.regression._lbfgs import LBFGS
from softjax.regression._loop import Solver
from softjax.regression._model import SoftmaxRegression
from softjax.regression._newton import Newton, NewtonCG, PreciseNewtonCG
from softjax.regression._objective import unpack
from softjax.regression._problem import Data, Problem
from softjax.regression._proximal import Proximal
from softjax.regression._result import Status

SOLVERS: dict[str, type[Solver]] = {
    "newton-cg": NewtonCG,
    "newton": Newton,
    "lbfgs": LBFGS,
    "proximal": Proximal,
    "firth": Firth,
}
# An internal solver, with which `fit` continues if features are nearly collinear.
PRECISELY = "precisely"
ALL = SOLVERS | {PRECISELY: PreciseNewtonCG}


def solver_of(name: str, problem: Data | Problem) -> type[Solver]:
    """The solver class of a name; `Dual` for "newton-cg" with few examples.

    With penalty factors the optimum is not in the span of the examples. A step of `Dual` factors a
    K x K matrix, which is smaller than the logits if there are no more classes than examples.
    """
    examples, width = problem.features.shape
    few = problem.factors is None and is_wide(examples, width) and problem.num_classes <= examples
    return Dual if name == "newton-cg" and few else ALL[name]


def run(name: str, problem: Problem, tol: Array, state: State, stop: Array) -> tuple[State, Array]:
    """Runs a solver up to step `stop`: the state and its logits.

    If steps in the span of the examples fail, Newton's steps in all parameters continue the fit.
    """
    kind = solver_of(name, problem)
    state, logits = _loop.advance(kind(problem), tol, state, stop)
    if kind is not Dual:
        return state, logits

    def among_all(state, logits):
        begin = NewtonCG.start(problem, state.theta)._replace(strict=state.strict)
        end, logits = _loop.advance(NewtonCG(problem), tol, begin, stop - state.step)
        return end._replace(
            memory=Dual.memory(problem.features, end.theta),
            first=state.first,
            step=state.step + end.step,
            passes=state.passes + end.passes,
        ), logits

    failed = state.status == Status.PRECISION_FLOOR
    return cond(failed, among_all, lambda *same: same, state, logits)


class Outcome(NamedTuple):
    """The result of a program, as arrays."""

    state: State  # the last state
    params: SoftmaxRegression  # its parameters
    objective: Array  # the objective there, not divided by the mass
    status: Array  # the status of the state, or SEPARATED
    separated: Array  # whether the parameters separate the classes
    suspected: Array  # whether quasi-complete separation should be looked for
    hidden: Array  # whether `PRECISELY` may decrease the objective further


@partial(jax.jit, static_argnames="name")
def start_of(name: str, data: Data, theta: Array) -> Array:
    """The start of a fit: the given parameters, or zeros if their objective is lower.

    Parameters that predict other labels with certainty, or are too large for the penalty, are a bad
    start: if every example is nearly certain, the curvature is 0 and Newton's model fails.
    """
    problem, _ = data.normalised_problem()
    objective, zeros = partial(ALL[name].objective, problem), jnp.zeros_like(theta)

    def better():
        return jnp.where(objective(theta) <= objective(zeros), theta, zeros)

    return cond(jnp.any(theta != 0), better, lambda: theta)


def advance(name: str, data: Data, tol: Array, state: State, stop: Array) -> Outcome:
    """Runs a fit to step `stop`, in one program."""
    problem, mass = data.normalised_problem()
    solver = ALL[name]
    state, logits = run(name, problem, tol, state, stop)
    separated = is_separated(problem.targets, problem.without_offset(logits))
    status, suspected, hidden = state.status, jnp.asarray(False), jnp.asarray(False)
    if solver.needs_optimum:
        status = status_where_separated(problem, state.theta, status, separated)
        suspected = _ending.suspected(problem, state, status)
    if solver.needs_optimum and name != PRECISELY:
        doubtful = hides_something(state, tol) | (state.farthest > OUTLYING)
        hidden = (status == Status.PRECISION_FLOOR) & doubtful
        if _preconditioner.is_diagonal(problem.features):
            at_optimum = _nothing_hidden(problem, tol, state, logits, hidden)
            status = jnp.where(at_optimum, Status.CONVERGED, status).astype(jnp.int32)
            hidden &= ~at_optimum
        hidden &= problem.l1 == 0
    objective = state.value * mass
    params = unpack(state.theta)
    return Outcome(state, params, objective, status, separated, suspected, hidden)


def _nothing_hidden(
    problem: Problem, tol: Array, state: State, logits: Array, hidden: Array
) -> Array:
    """Whether a fit has converged after all, since what seemed `hidden` is nothing."""
    at_end = converged(state.value, state.first, state.norm, state.decrement, CONFIRMED * tol)
    at_end &= (state.move < STILL) | ~state.strict
    nothing_hidden = partial(_ending.nothing_hidden, problem, state.theta, logits, tol)
    return cond(hidden & at_end, nothing_hidden, lambda: jnp.asarray(False))


within_trace = jax.jit(advance, static_argnames="name")
_in_place: dict[str, Any] = {"static_argnames": "name", "donate_argnames": "state"}


def quickly_compiled() -> Callable:
    """`advance`, compiled in a third of the time: most of a first fit is compilation.

    A fit consists of some 170 small kernels, which are as fast with these options on CPUs.
    """
    return _platforms.quickly_compiled(advance, **_in_place)

"""The solvers by name."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jax import Array

from softjax._sharding import cond
from softjax.regression import (
    _descent,
    _dual,
    _firth,
    _implicit,
    _proximal,
)
from softjax.regression._convergence import State
from softjax.regression._data import Data, Problem
from softjax.regression._lbfgs import LBFGS
from softjax.regression._newton import NEWTON, NEWTON_CG, PRECISE, Method
from softjax.regression._objective import objective
from softjax.regression._result import Status


class Solver(NamedTuple):
    """One way to the optimum.

    Attributes:
        start: of (data, theta): the state before the first step.
        advance: of (problem, tol, state, stop): the state at step `stop`, or where its status says
            so, with its logits.
        max_steps: more than enough.
        chunk: steps between two events.
        rotates: whether N dimensions do where N < D, as for an l2 penalty.
        takes_sparse: whether features may be BCOO.
        stationary: of (theta, problem): the optimum, as a function of the problem.
        objective: of (problem, theta): what is made small.
        needs_optimum: whether it has nothing to find where the classes are separated.
        by_newton: whether its last step is Newton's, which says how much is left.
    """

    start: Callable
    advance: Callable
    max_steps: int
    chunk: int
    rotates: bool = True
    takes_sparse: bool = True
    stationary: Callable = _implicit.stationary
    objective: Callable = objective
    needs_optimum: bool = True
    by_newton: bool = True


def _descending(method: Method, max_steps: int, chunk: int, **what: Any) -> Solver:
    def start(data, theta):
        return _descent.start(method, data.features, theta)

    return Solver(start, partial(_descent.advance, method), max_steps, chunk, **what)


def _newton_cg_start(data: Data | Problem, theta: Any) -> State:
    if _dual.takes(data, len(theta)):
        return _dual.start(data.features, theta)
    return _descent.start(NEWTON_CG, data.features, theta)


def _newton_cg_advance(
    problem: Problem, tol: Array, state: State, stop: Array
) -> tuple[State, Array]:
    """In the span of the examples where there are few; where that fails, among all parameters."""
    if not _dual.takes(problem, len(state.theta)):
        return _descent.advance(NEWTON_CG, problem, tol, state, stop)

    def among_all(state, logits):
        x = problem.features
        begin = _descent.start(NEWTON_CG, x, state.theta)._replace(strict=state.strict)
        end, logits = _descent.advance(NEWTON_CG, problem, tol, begin, stop - state.step)
        return end._replace(
            memory=_dual.start(x, end.theta).memory,
            first=state.first,
            step=state.step + end.step,
            passes=state.passes + end.passes,
        ), logits

    state, logits = _dual.advance(problem, tol, state, stop)
    failed = state.status == Status.PRECISION_FLOOR
    return cond(failed, among_all, lambda *same: same, state, logits)


SOLVERS = {
    "newton-cg": Solver(_newton_cg_start, _newton_cg_advance, 200, 1, rotates=False),
    "newton": _descending(NEWTON, 200, 1, takes_sparse=False),
    "lbfgs": _descending(LBFGS, 5000, 50, by_newton=False),
    "proximal": Solver(
        _proximal.start,
        _proximal.advance,
        20000,
        200,
        rotates=False,
        stationary=_implicit.stationary_l1,
        by_newton=False,
    ),
    "firth": Solver(
        _firth.start,
        _firth.advance,
        200,
        1,
        rotates=False,
        takes_sparse=False,
        stationary=_firth.stationary,
        objective=_firth.objective,
        needs_optimum=False,
    ),
}
# Not offered by name: what `fit` goes on with where features are nearly collinear.
PRECISELY = "precisely"
ALL = SOLVERS | {PRECISELY: _descending(PRECISE, 200, 1)}

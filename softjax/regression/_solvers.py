"""The solvers by name, and where a fit with fewer examples than features goes another way."""

from typing import Any

from jax import Array

from softjax._sharding import cond
from softjax.regression._convergence import State
from softjax.regression._dual import Dual, takes
from softjax.regression._firth import Firth
from softjax.regression._lbfgs import LBFGS
from softjax.regression._loop import Solver, advance
from softjax.regression._newton import Newton, NewtonCG, PreciseNewtonCG
from softjax.regression._objective import Data, Problem
from softjax.regression._proximal import Proximal
from softjax.regression._result import Status

SOLVERS: dict[str, type[Solver]] = {
    "newton-cg": NewtonCG,
    "newton": Newton,
    "lbfgs": LBFGS,
    "proximal": Proximal,
    "firth": Firth,
}
# Not offered by name: what `fit` goes on with where features are nearly collinear.
PRECISELY = "precisely"
ALL = SOLVERS | {PRECISELY: PreciseNewtonCG}


def start(name: str, data: Data | Problem, theta: Any) -> State:
    """The state before the first step of a solver."""
    return _kind(name, data, len(theta)).start(data, theta)


def run(name: str, problem: Problem, tol: Array, state: State, stop: Array) -> tuple[State, Array]:
    """A solver up to step `stop`: the state and its logits.

    Where steps in the span of the examples fail, Newton's steps among all parameters go on.
    """
    kind = _kind(name, problem, len(state.theta))
    state, logits = advance(kind(problem), tol, state, stop)
    if kind is not Dual:
        return state, logits

    def among_all(state, logits):
        begin = NewtonCG.start(problem, state.theta)._replace(strict=state.strict)
        end, logits = advance(NewtonCG(problem), tol, begin, stop - state.step)
        return end._replace(
            memory=Dual.memory(problem.features, end.theta),
            first=state.first,
            step=state.step + end.step,
            passes=state.passes + end.passes,
        ), logits

    failed = state.status == Status.PRECISION_FLOOR
    return cond(failed, among_all, lambda *same: same, state, logits)


def _kind(name: str, problem: Data | Problem, num_classes: int) -> type[Solver]:
    return Dual if name == "newton-cg" and takes(problem, num_classes) else ALL[name]

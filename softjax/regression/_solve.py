"""The solvers by name, each run in chunks for the host or to the end under a trace."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.sparse import BCOO

from softjax.regression import _descent, _firth, _metric, _problem, _proximal, _rotation, _status
from softjax.regression._implicit import stationary
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data, Problem
from softjax.regression._result import FitResult, Progress


class Solver(NamedTuple):
    """One way to the optimum.

    Attributes:
        start: of (problem, theta): the state before the first step.
        advance: of (problem, tol, state, stop): the state at step `stop`, or where its status says
            so, and the objective there.
        max_steps: more than enough.
        chunk: steps between two events.
        rotates: whether N dimensions do where N < D, as for an l2 penalty.
        takes_sparse: whether features may be BCOO.
        differentiable: whether what it finds is where the gradient of the objective vanishes.
        needs_optimum: whether it has nothing to find where the classes are separated.
    """

    start: Callable
    advance: Callable
    max_steps: int
    chunk: int
    rotates: bool = True
    takes_sparse: bool = True
    differentiable: bool = True
    needs_optimum: bool = True


def _descending(method: _descent.Method, max_steps: int, chunk: int, **what: bool) -> Solver:
    start, advance = partial(_descent.start, method), partial(_descent.advance, method)
    return Solver(start, advance, max_steps, chunk, **what)


SOLVERS = {
    "newton-cg": _descending(_descent.NEWTON_CG, 200, 5),
    "newton": _descending(_descent.NEWTON, 200, 5, takes_sparse=False),
    "lbfgs": _descending(_descent.LBFGS, 5000, 50),
    "proximal": Solver(
        _proximal.start, _proximal.advance, 20000, 200, rotates=False, differentiable=False
    ),
    "firth": Solver(
        _firth.start,
        _firth.advance,
        200,
        5,
        rotates=False,
        takes_sparse=False,
        differentiable=False,
        needs_optimum=False,
    ),
}


class Run:
    """A fit in chunks."""

    epoch_steps = 1

    def __init__(
        self,
        name: str,
        data: Data,
        num_classes: int,
        params: SoftmaxRegression,
        tol: float,
        max_steps: int | None,
    ):
        self.solver = SOLVERS[name]
        self.limit = self.solver.max_steps if max_steps is None else max_steps
        self.chunk = self.solver.chunk
        self.problem = _problem.problem_of(data, num_classes)
        self.tol = jnp.asarray(tol, data.features.dtype)
        self.rotation, problem, params = _rotated(self.solver, self.problem, params)
        self.solved, self.state = problem, _start(name, problem, params)
        self.name = name

    def advance(self, stop: int) -> Progress:
        """Steps until `stop`, or until there is nothing left to do."""
        end = jnp.asarray(stop, jnp.int32)
        self.state, value = _advance(self.name, self.solved, self.tol, self.state, end)
        state = self.state
        params = _turned_back(self.rotation, _problem.unpack(state.theta))
        return Progress(params, float(value), float(state.norm), int(state.step), int(state.status))

    def result(self, progress: Progress, status: int, history: list[dict[str, float]]) -> FitResult:
        separated, status = self._separation(progress.params, status)
        return FitResult(
            progress.params,
            progress.objective,
            status,
            progress.step,
            int(self.state.passes),
            progress.gradient_norm,
            separated,
            history,
        )

    def _separation(self, params: SoftmaxRegression, status: int) -> tuple[bool, int]:
        ended = jnp.asarray(status, jnp.int32)
        separated, ended = _problem.separation(self.problem, params, ended)
        return bool(separated), int(ended) if self.solver.needs_optimum else status


def traced(
    name: str,
    data: Data,
    num_classes: int,
    params: SoftmaxRegression,
    tol: Any,
    max_steps: int | None,
) -> FitResult:
    """A fit inside of a trace: one loop to the end, and the optimum's derivative."""
    solver = SOLVERS[name]
    problem = _problem.problem_of(data, num_classes)
    fixed, start = lax.stop_gradient((problem, params))
    rotation, turned, start = _rotated(solver, fixed, start)
    state = solver.start(turned, _problem.pack(start))
    limit = solver.max_steps if max_steps is None else max_steps
    tol = jnp.asarray(tol, data.features.dtype)
    state, value = solver.advance(turned, tol, state, jnp.asarray(limit, jnp.int32))
    theta = _problem.pack(_turned_back(rotation, _problem.unpack(state.theta)))
    undefined = (state.status == _status.NON_FINITE) & (state.step == 0)
    theta = lax.stop_gradient(jnp.where(undefined, jnp.nan, theta))
    if solver.differentiable:
        theta = stationary(theta, problem)
        logits = _problem.class_scores(problem.features, theta)
        value = _problem.value(problem, theta, logits)
    params = _problem.unpack(theta)
    separated, ended = _problem.separation(fixed, params, state.status)
    status = ended if solver.needs_optimum else state.status
    return FitResult(params, value, status, state.step, state.passes, state.norm, separated, [])


def _rotated(
    solver: Solver, problem: Problem, params: SoftmaxRegression
) -> tuple[_rotation.Rotation | None, Problem, SoftmaxRegression]:
    """In N dimensions where that is worth the factorization, which 2 N^2 D operations take."""
    x = problem.features
    if isinstance(x, BCOO) or not solver.rotates:
        return None, problem, params
    if not (2 * len(x) <= x.shape[1] and len(x) < _metric.LARGEST_FACTOR):
        return None, problem, params
    turned, rotation = _rotation.rotate(problem)
    return rotation, turned, _rotation.forth(rotation, params)


def _turned_back(
    rotation: _rotation.Rotation | None, params: SoftmaxRegression
) -> SoftmaxRegression:
    return params if rotation is None else _rotation.back(rotation, params)


@partial(jax.jit, static_argnames="name")
def _start(name: str, problem: Problem, params: SoftmaxRegression) -> _descent.State:
    return SOLVERS[name].start(problem, _problem.pack(params))


@partial(jax.jit, static_argnames="name")
def _advance(
    name: str, problem: Problem, tol: Array, state: _descent.State, stop: Array
) -> tuple[_descent.State, Array]:
    return SOLVERS[name].advance(problem, tol, state, stop)

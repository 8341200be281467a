"""A fit by one solver: the solvers by name, the compiled programs, and a fit in chunks of steps.

A program runs a fit from one state to a later one. With few examples and many features, Newton's
steps are computed in the span of the examples. `Run` decides what follows: if the steps of the
solver cannot tell the remaining decrease, the end is checked; if rounding may hide a decrease, the
fit continues in a higher precision; and if parameters still move, a proof of separation is looked
for.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax import _platforms
from softjax._platforms import run_where_data_are
from softjax._sharding import cond
from softjax.regression import _ending, _frame, _loop, _preconditioner
from softjax.regression._descent import Newton, NewtonCG, PreciseNewtonCG
from softjax.regression._dual import Dual
from softjax.regression._firth import Firth
from softjax.regression._frame import is_wide
from softjax.regression._lbfgs import LBFGS
from softjax.regression._loop import (
    CONFIRMED,
    NEAR,
    OUTLYING,
    STILL,
    Solver,
    State,
    converged,
    hides_something,
    is_separated,
    rounding_of,
    status_where_separated,
)
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import unpack
from softjax.regression._problem import Data, Problem
from softjax.regression._proximal import Proximal
from softjax.regression._result import FitResult, Status

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
    # Whether the fit has converged if `_ending.nothing_hidden`, which a diagonal preconditioner
    # does not show. This is a separate program, since most fits do not need it.
    doubted: Array


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
    status, suspected, hidden, doubted = state.status, *jnp.asarray([False] * 3)
    if solver.needs_optimum:
        status = status_where_separated(problem, state.theta, status, separated)
        suspected = _ending.suspected(problem, state, status)
    if solver.needs_optimum and name != PRECISELY:
        doubtful = hides_something(state, tol) | (state.farthest > OUTLYING)
        hidden = (status == Status.PRECISION_FLOOR) & doubtful
        if _preconditioner.is_diagonal(problem.features):
            within = CONFIRMED * tol
            doubted = converged(state.value, state.first, state.norm, state.decrement, within)
            doubted &= hidden & ((state.move < STILL) | ~state.strict)
        hidden &= problem.l1 == 0
    objective = state.value * mass
    params = unpack(state.theta)
    return Outcome(state, params, objective, status, separated, suspected, hidden, doubted)


within_trace = jax.jit(advance, static_argnames="name")
_in_place: dict[str, Any] = {"static_argnames": "name", "donate_argnames": "state"}


def quickly_compiled() -> Callable:
    """`advance`, compiled in a third of the time: most of a first fit is compilation.

    A fit consists of some 170 small kernels, which are as fast with these options on CPUs.
    """
    return _platforms.quickly_compiled(advance, **_in_place)


def _advanced(name: str, data: Data, tol: np.ndarray, state: State, stop: int) -> Outcome:
    """The outcome of `advance`, compiled quickly; the arrays of `state` are not read again."""
    return run_where_data_are(quickly_compiled(), name, data, tol, state, np.int32(stop))


class Run:
    """A fit in chunks, for the loop of `fit`."""

    epoch_steps = 1

    def __init__(
        self, name: str, data: Data, params: SoftmaxRegression, tol: float, max_steps: int | None
    ):
        self.limit = SOLVERS[name].max_steps if max_steps is None else max_steps
        self.chunk = SOLVERS[name].chunk
        data, self.frame = _frame.framed(data, SOLVERS[name].rotates)
        params = _frame.inside(self.frame, params)
        if self.frame.rotation is None:
            data = _frame.in_bucket(data)
        self.name, self.data, self.tol = name, data, np.asarray(tol, data.features.dtype)
        kernel, bias = map(np.asarray, params)
        theta = np.concatenate([kernel, bias[None]]).T
        if theta.any():
            theta = np.asarray(start_of(name, data, theta))
        self.state = solver_of(name, data).start(data, theta)

    def advance(self, stop: int) -> FitResult:
        """The result of the steps until `stop`, or until the fit ends."""
        self._step_to(stop)
        proven = self._is_proven()
        if not proven and self.outcome.hidden:
            self.outcome = _more_precisely(self.data, self.tol, self.outcome, self.limit)
            self.state = self.outcome.state
            proven = self._is_proven()
        elif not proven and self.outcome.suspected and not self.state.strict:
            # Without a proof there may be an optimum: the fit continues.
            going_on = {"strict": np.bool_(True), "status": np.int32(Status.RUNNING)}
            before, self.state = int(self.state.step), self.state._replace(**going_on)
            self._step_to(stop)
            proven = int(self.state.step) > before and self._is_proven()
        status = int(self.outcome.status)
        if proven:  # a fit that meets its limit of steps may separate all examples, too
            all_of_them = bool(self.outcome.separated) and self.data.l2 == 0
            status = Status.SEPARATED if all_of_them else Status.QUASI_SEPARATED
        params, reached = _frame.expand(self.frame, self.outcome.params), self.outcome.objective
        if self.frame.centre is not None:
            params, moved = _frame.outside(self.frame.centre, params)
            at_end = _frame.status_outside(np.int32(status), moved, self.state.value, self.tol)
            if int(at_end) != status:
                status, theta = int(at_end), self.state.theta.at[:, -1].add(moved)
                reached = _objective_of(self.data, theta)
        counts = (int(self.state.step), int(self.state.passes), float(self.state.norm))
        separated = bool(self.outcome.separated)
        return FitResult(params, float(reached), status, *counts, separated, [])

    def _step_to(self, stop: int) -> None:
        """Steps until `stop`, and checks the end if the steps do not predict what is left."""
        self._run(stop, self.tol)
        if SOLVERS[self.name].by_newton:
            return
        if self.data.l1:
            self._check_l1(stop)
        elif self.outcome.status == Status.CONVERGED and self.data.is_loose:
            at_end = (self.data, self.state.theta, self.state.first, self.tol)
            checked = _ending.in_float64(_ending.check, *at_end)
            self.outcome = with_check(self.outcome, checked)

    def _run(self, stop: int, tol: np.ndarray) -> None:
        self.outcome = _advanced(self.name, self.data, tol, self.state, stop)
        self.state = self.outcome.state
        if self.outcome.doubted:
            check = _platforms.quickly_compiled(_ending.nothing_hidden)
            if run_where_data_are(check, self.data, self.state.theta, tol):
                status = np.int32(Status.CONVERGED)
                self.outcome = self.outcome._replace(status=status, hidden=np.False_)

    def _check_l1(self, stop: int) -> None:
        """Continues with smaller tolerances while Newton's model predicts a larger decrease."""

        def at_optimum() -> bool:
            at_end = (self.data, self.state.theta, self.tol)
            return bool(_ending.in_float64(_ending.check_l1, *at_end))

        tol = self.tol
        while self.outcome.status == Status.CONVERGED:
            if at_optimum():
                return
            tol = tol / tol.dtype.type(10)
            if tol < np.finfo(tol.dtype).eps:
                self.outcome = self.outcome._replace(status=np.int32(Status.PRECISION_FLOOR))
                return
            self.state = self.state._replace(status=np.int32(Status.RUNNING))
            self._run(stop, tol)
        at_floor = tol < self.tol and self.outcome.status == Status.PRECISION_FLOOR
        if at_floor and at_optimum():
            self.outcome = self.outcome._replace(status=np.int32(Status.CONVERGED))

    def _is_proven(self) -> bool:
        """Whether quasi-complete separation is suspected and proven.

        A fit at its limit of steps is suspected if its gradient is small but its logits still move.
        """
        state = self.state
        suspected = bool(self.outcome.suspected)
        if self.outcome.status == Status.RUNNING and state.step >= self.limit:
            near_end = state.norm < NEAR and state.farthest >= STILL
            suspected = SOLVERS[self.name].needs_optimum and near_end and bool(self.data.is_loose)
        at_end = (self.data, state.theta, np.True_)
        return suspected and bool(_ending.in_float64(_ending.quasi_separated, *at_end))


def _more_precisely(data: Data, tol: np.ndarray, ended: Outcome, limit: int) -> Outcome:
    """Continues the fit, up to step `limit`, in float64 whatever the dtype of the data.

    The parameters are then rounded to this dtype, and converged if the rounded ones satisfy the
    rule. If rounding makes them worse than those before, the latter are kept and judged in float64.
    """
    dtype, state = tol.dtype, ended.state
    # NumPy needs no compilation.
    old = jax.tree.map(np.asarray, state._replace(memory=()))

    def run(*arguments):
        return jax.tree.map(np.array, _advanced(*arguments))

    def judged(theta):
        # The outcome before and after a step, whose decrement predicts what is left.
        begin = PreciseNewtonCG.start(data, theta)
        return (run(PRECISELY, data, within, begin, stop) for stop in (0, 1))

    with jax.enable_x64(True):
        data, before = _ending.as_float64((data, ended._replace(state=old)))
        within = np.float64(tol)
        outcome = continued(data, within, before, limit, run)
        status, end = int(outcome.status), outcome.state
        if dtype != np.float64:
            rounded = np.asarray(end.theta, dtype).astype(np.float64)
            there, beyond = judged(rounded)
            was, was_beyond = judged(before.state.theta)
            if not there.state.value < was.state.value:
                rounded, there, beyond = before.state.theta, was, was_beyond
            at, step = there.state, beyond.state
            first = np.asarray(state.first)
            first = first + rounding_of(first)  # in the dtype of its computation
            # Rounding may change a gradient of the size of `tol` by as much.
            tols = CONFIRMED * within
            measured = map(float, (at.value, first, at.norm, step.decrement, tols))
            reached = converged(*measured)
            if status in (Status.CONVERGED, Status.PRECISION_FLOOR):
                fell = reached and bool(step.move < STILL)
                status = Status.CONVERGED if fell else Status.PRECISION_FLOOR
            outcome = outcome._replace(objective=there.objective, separated=there.separated)
            end = end._replace(theta=rounded, value=at.value, norm=at.norm)
        outcome = jax.tree.map(np.asarray, outcome._replace(state=end))
    state = jax.tree.map(_cast, outcome.state, old)
    params = unpack(jnp.asarray(state.theta))
    return outcome._replace(state=state, params=params, status=np.int32(status))


def _cast(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """`new` in the dtype of `old`; the largest number of the wider dtype becomes the narrower's."""
    if old.dtype.kind == "f":
        new = np.minimum(new, np.finfo(old.dtype).max)
    return new.astype(old.dtype)


@jax.jit
def _objective_of(data: Data, theta: Array) -> Array:
    return data.problem().objective(theta)


def with_check(outcome: Outcome, ending: _ending.Ending) -> Outcome:
    """The outcome with the result of the final check of a fit that had converged."""
    status = np.where if isinstance(ending.converged, np.ndarray) else jnp.where
    status = status(ending.converged, outcome.status, Status.PRECISION_FLOOR).astype(np.int32)
    suspected = outcome.suspected | ending.moving
    hidden = outcome.hidden | suspected | ~ending.converged
    return outcome._replace(status=status, suspected=suspected, hidden=hidden)


def continued(
    data: Data, tol: Any, ended: Outcome, limit: Any, run: Callable = within_trace
) -> Outcome:
    """Continues the fit, up to step `limit`, with directions in the dtype of the features.

    `run` is `advance` in a program.
    """
    state = ended.state
    begin = PreciseNewtonCG.start(data, state.theta)._replace(strict=np.bool_(True))
    outcome = run(PRECISELY, data, tol, begin, limit - state.step)
    end = outcome.state._replace(
        memory=(),
        first=state.first,
        step=state.step + outcome.state.step,
        passes=state.passes + outcome.state.passes,
    )
    return outcome._replace(state=end)

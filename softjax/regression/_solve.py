"""A fit by one solver: in chunks with events between them, or to its end inside of a trace.

A program takes the steps. This module decides what follows: if the steps of the solver cannot tell
the remaining decrease, the end is checked; if rounding may hide a decrease, the fit continues in a
higher precision; and if parameters still move, a proof of separation is looked for.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax import _checks
from softjax._platforms import tracing_for_platform_of
from softjax._sharding import cond
from softjax.regression import _ending, _frame, _programs
from softjax.regression._convergence import CONFIRMED, NEAR, STILL, converged, rounding_of
from softjax.regression._implicit import stationary
from softjax.regression._model import SoftmaxRegression
from softjax.regression._newton import PreciseNewtonCG
from softjax.regression._objective import pack, unpack
from softjax.regression._problem import Data
from softjax.regression._programs import PRECISELY, SOLVERS, Outcome, solver_of
from softjax.regression._result import FitResult, Status


class Run:
    """A fit in chunks, for the loop of `fit`."""

    epoch_steps = 1

    def __init__(
        self,
        name: str,
        data: Data,
        params: SoftmaxRegression,
        tol: float,
        max_steps: int | None,
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
            theta = np.asarray(_programs.start_of(name, data, theta))
        self.state = solver_of(name, data).start(data, theta)

    def advance(self, stop: int) -> FitResult:
        """The result of the steps until `stop`, or until the fit ends."""
        self._step_to(stop)
        proven = self._is_proven()
        if not proven and self.outcome.hidden:
            limit = np.int32(self.limit)
            self.outcome = _more_precisely(self.data, self.tol, self.outcome, limit)
            self.state = self.outcome.state
            proven = self._is_proven()
        elif not proven and self.outcome.suspected and not self.state.strict:
            # Without a proof there may be an optimum: the fit continues.
            going_on = {"strict": np.bool_(True), "status": np.int32(Status.RUNNING)}
            before, self.state = int(self.state.step), self.state._replace(**going_on)
            self._step_to(stop)
            proven = int(self.state.step) > before and self._is_proven()
        status = Status.QUASI_SEPARATED if proven else int(self.outcome.status)
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
            checked = _ending.check_in_float64(
                self.data, self.state.theta, self.state.first, self.tol
            )
            self.outcome = _with_check(self.outcome, checked)

    def _run(self, stop: int, tol: np.ndarray) -> None:
        program = _programs.quickly_compiled()
        with tracing_for_platform_of(jax.tree.leaves(self.data)):
            self.outcome = program(self.name, self.data, tol, self.state, np.int32(stop))
        self.state = self.outcome.state

    def _check_l1(self, stop: int) -> None:
        """Continues with smaller tolerances while Newton's model predicts a larger decrease."""
        tol = self.tol
        while self.outcome.status == Status.CONVERGED:
            if _ending.check_l1_in_float64(self.data, self.state.theta, self.tol):
                return
            tol = tol / tol.dtype.type(10)
            if tol < np.finfo(tol.dtype).eps:
                self.outcome = self.outcome._replace(status=np.int32(Status.PRECISION_FLOOR))
                return
            self.state = self.state._replace(status=np.int32(Status.RUNNING))
            self._run(stop, tol)
        at_floor = tol < self.tol and self.outcome.status == Status.PRECISION_FLOOR
        if at_floor and _ending.check_l1_in_float64(self.data, self.state.theta, self.tol):
            self.outcome = self.outcome._replace(status=np.int32(Status.CONVERGED))

    def _is_proven(self) -> bool:
        """Whether quasi-complete separation is suspected and proven.

        Also if the last step was taken near an end that `tol` was too small for.
        """
        state = self.state
        suspected = bool(self.outcome.suspected)
        if self.outcome.status == Status.RUNNING and state.step >= self.limit:
            near_end = state.norm < NEAR and state.farthest >= STILL
            suspected = SOLVERS[self.name].needs_optimum and near_end and bool(self.data.is_loose)
        return suspected and _ending.is_proven(self.data, state.theta)

    def ended(self, result: FitResult) -> FitResult:
        """The result of the last call of `advance`, which is already complete."""
        return result


def _more_precisely(data: Data, tol: np.ndarray, ended: Outcome, limit: np.int32) -> Outcome:
    """Continues the fit, up to step `limit`, in float64 whatever the dtype of the data.

    The parameters are then rounded to this dtype, and converged if the rounded ones satisfy the
    rule. If rounding makes them worse than those before, the latter are kept and judged in float64.
    """
    dtype, state = tol.dtype, ended.state
    old = state._replace(memory=())

    def judged(theta):
        # The outcome before and after a step, whose decrement predicts what is left.
        begin = PreciseNewtonCG.start(data, theta)
        return (
            _programs.within_trace(PRECISELY, data, within, begin, np.int32(stop))
            for stop in (0, 1)
        )

    with jax.enable_x64(True):
        data, before = _ending.in_float64((data, ended._replace(state=old)))
        within = np.float64(tol)
        outcome = _continuing(data, within, before, limit)
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


def traced(
    name: str,
    data: Data,
    params: SoftmaxRegression,
    tol: Any,
    max_steps: int | None,
    penalised: bool,
) -> FitResult:
    """A fit inside of a trace: one loop to the end, and the derivative of the optimum.

    If it is known to be `penalised`, quasi-complete separation is not looked for.
    """
    fixed, start = lax.stop_gradient((data, params))
    fixed = replace(fixed, constant=data.constant)  # stop_gradient made the number a tracer
    fixed, frame = _frame.framed(fixed, SOLVERS[name].rotates)
    start = _frame.inside(frame, start)
    fit, value_over_mass = to_the_end(name, fixed, start, tol, max_steps, penalised)

    theta = lax.stop_gradient(pack(_frame.expand(frame, fit.params)))
    if frame.centre is not None:
        data = replace(data, features=_frame.less(data.features, frame.centre))
    problem = data.problem()
    theta = stationary(SOLVERS[name].condition, theta, problem)
    objective = problem.value(theta, problem.logits(theta))
    params, moved = _frame.outside(frame.centre, unpack(theta))
    moved = lax.stop_gradient(moved)
    status = _frame.status_outside(fit.status, moved, value_over_mass, tol)
    return fit._replace(params=params, objective=objective, status=status)


def to_the_end(
    name: str,
    data: Data,
    params: SoftmaxRegression,
    tol: Any,
    max_steps: Any,
    penalised: bool,
) -> tuple[FitResult, Array]:
    """A fit inside of a trace, in the coordinates of `data`, and its value divided by the mass."""
    solver = SOLVERS[name]
    limit = jnp.asarray(solver.max_steps if max_steps is None else max_steps, jnp.int32)
    state = solver_of(name, data).start(data, _programs.start_of(name, data, pack(params)))
    tol = jnp.asarray(tol, data.features.dtype)
    outcome = _programs.within_trace(name, data, tol, state, limit)
    if not penalised and not solver.by_newton:
        unseen = (outcome.status == Status.CONVERGED) & data.is_loose & (data.l1 == 0)
        at_end = (data, outcome.state.theta, outcome.state.first, tol)
        outcome = cond(
            unseen,
            lambda: _with_check(outcome, _ending.check(*at_end)),
            lambda: outcome,
        )
    if not solver.by_newton and _checks.known(data.l1) != 0:
        doubtful = (outcome.status == Status.CONVERGED) & (data.l1 > 0)
        at_optimum = cond(
            doubtful,
            lambda: _ending.check_l1(data, outcome.state.theta, tol),
            lambda: jnp.asarray(True),
        )
        status = jnp.where(at_optimum, outcome.status, Status.PRECISION_FLOOR)
        outcome = outcome._replace(status=status.astype(jnp.int32))
    if not penalised and data.features.dtype == np.float64:
        ended = outcome._replace(state=outcome.state._replace(memory=()))
        outcome = cond(
            outcome.hidden,
            lambda: _continued(data, tol, ended, limit),
            lambda: ended,
        )
    state, status = outcome.state, outcome.status
    if not penalised:
        proven = cond(
            outcome.suspected,
            lambda: _ending.quasi_separated(data, state.theta, outcome.suspected),
            lambda: jnp.asarray(False),
        )
        # If parameters keep moving, neither an optimum nor its absence is established.
        moving = outcome.suspected & (state.move >= STILL)
        unproven = jnp.where(moving, Status.PRECISION_FLOOR, status)
        status = jnp.where(proven, Status.QUASI_SEPARATED, unproven).astype(jnp.int32)
    undefined = (state.status == Status.NON_FINITE) & (state.step == 0)
    params = jax.tree.map(lambda leaf: jnp.where(undefined, jnp.nan, leaf), outcome.params)
    counts = (state.step, state.passes, state.norm, outcome.separated)
    return FitResult(params, outcome.objective, status, *counts, []), state.value


def _with_check(outcome: Outcome, ending: _ending.Ending) -> Outcome:
    """The outcome with the result of the final check of a fit that had converged."""
    status = np.where if isinstance(ending.converged, np.ndarray) else jnp.where
    status = status(ending.converged, outcome.status, Status.PRECISION_FLOOR).astype(np.int32)
    suspected = outcome.suspected | ending.moving
    hidden = outcome.hidden | suspected | ~ending.converged
    return outcome._replace(status=status, suspected=suspected, hidden=hidden)


def _continued(data: Data, tol: Array, ended: Outcome, limit: Array) -> Outcome:
    """Continues the fit, up to step `limit`, with directions in the dtype of the features."""
    state = ended.state
    begin = PreciseNewtonCG.start(data, state.theta)._replace(strict=jnp.asarray(True))
    outcome = _programs.within_trace(PRECISELY, data, tol, begin, limit - state.step)
    end = outcome.state._replace(
        memory=(),
        first=state.first,
        step=state.step + outcome.state.step,
        passes=state.passes + outcome.state.passes,
    )
    return outcome._replace(state=end)


_continuing = jax.jit(_continued)

"""A fit by one solver: in chunks for a caller that looks on, or to its end inside of a trace."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._platforms import tracing_for_platform_of
from softjax._sharding import cond
from softjax.regression import (
    _ending,
    _frame,
    _programs,
)
from softjax.regression._convergence import STILL, is_loose
from softjax.regression._implicit import stationary
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import Data, logits_at, pack, problem_of, unpack, value
from softjax.regression._programs import SOLVERS, solver_of
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
        self.state = solver_of(name, data).start(data, theta)

    def advance(self, stop: int) -> FitResult:
        """The result of the steps until `stop`, or until there is nothing left to do."""
        self._step_to(stop)
        proven = self._is_proven()
        if not proven and self.outcome.hidden:
            limit = np.int32(self.limit)
            self.outcome = _programs.more_precisely(self.data, self.tol, self.outcome, limit)
            self.state = self.outcome.state
            proven = self._is_proven()
        elif not proven and self.outcome.suspected and not self.state.strict:
            # Without a proof there may be an optimum.
            going_on = {"strict": np.bool_(True), "status": np.int32(Status.RUNNING)}
            before, self.state = int(self.state.step), self.state._replace(**going_on)
            self._step_to(stop)
            proven = int(self.state.step) > before and self._is_proven()
        status = Status.QUASI_SEPARATED if proven else int(self.outcome.status)
        params, objective = _frame.expand(self.frame, self.outcome.params), None
        if self.frame.centre is not None:
            params, moved = _frame.outside(self.frame.centre, params)
            at_end = _frame.status_outside(np.int32(status), moved, self.state.value, self.tol)
            if int(at_end) != status:
                status, theta = int(at_end), self.state.theta.at[:, -1].add(moved)
                objective = _programs.objective_of(self.data, theta)
        return FitResult(
            params,
            float(self.outcome.objective if objective is None else objective),
            status,
            int(self.state.step),
            int(self.state.passes),
            float(self.state.norm),
            bool(self.outcome.separated),
            [],
        )

    def _step_to(self, stop: int) -> None:
        """Steps until `stop`, and looks at the end where no step says how much is left."""
        program = _programs.quickly_compiled()
        with tracing_for_platform_of(jax.tree.leaves(self.data)):
            self.outcome = program(self.name, self.data, self.tol, self.state, np.int32(stop))
        self.state = self.outcome.state
        smooth = not self.data.l1 and self.data.l1_rows is None
        unseen = smooth and not SOLVERS[self.name].by_newton
        if self.outcome.status == Status.CONVERGED and unseen and is_loose(self.data):
            looked = _ending.look(self.data, self.state.theta, self.state.first, self.tol)
            self.outcome = _programs.doubted(self.outcome, looked)

    def _is_proven(self) -> bool:
        """Whether quasi-complete separation is suspected, and proven."""
        return bool(self.outcome.suspected) and _ending.is_proven(self.data, self.state.theta)

    def ended(self, result: FitResult) -> FitResult:
        """The result of the last call of `advance`, of which all is known."""
        return result


def traced(
    name: str,
    data: Data,
    params: SoftmaxRegression,
    tol: Any,
    max_steps: int | None,
    penalised: bool,
) -> FitResult:
    """A fit inside of a trace: one loop to the end, and the optimum's derivative.

    Where it is known to be `penalised`, quasi-complete separation is not looked for.
    """
    fixed, start = lax.stop_gradient((data, params))
    fixed = replace(fixed, constant=data.constant)  # a number, not a tracer of it
    fixed, frame = _frame.framed(fixed, SOLVERS[name].rotates)
    start = _frame.inside(frame, start)
    fit, value_over_mass = to_the_end(name, fixed, start, tol, max_steps, penalised)

    theta = lax.stop_gradient(pack(_frame.expand(frame, fit.params)))
    shifted = replace(data, features=_frame.less(data.features, frame.centre))
    problem = problem_of(shifted)
    theta = stationary(SOLVERS[name].condition, theta, problem)
    objective = value(problem, theta, logits_at(problem, theta))
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
    """A fit inside of a trace, in the coordinates of `data`, and its value over the mass."""
    solver = SOLVERS[name]
    limit = jnp.asarray(solver.max_steps if max_steps is None else max_steps, jnp.int32)
    state = solver_of(name, data).start(data, pack(params))
    tol = jnp.asarray(tol, data.features.dtype)
    outcome = _programs.within_trace(name, data, tol, state, limit)
    if not penalised and not solver.by_newton and data.l1_rows is None:
        unseen = (outcome.status == Status.CONVERGED) & is_loose(data) & (data.l1 == 0)
        at_end = (data, outcome.state.theta, outcome.state.first, tol)
        outcome = cond(
            unseen,
            lambda: _programs.doubted(outcome, _ending.looked(*at_end)),
            lambda: outcome,
        )
    if not penalised and data.features.dtype == np.float64:
        ended = outcome._replace(state=outcome.state._replace(memory=()))
        outcome = cond(
            outcome.hidden,
            lambda: _programs.continued(data, tol, ended, limit),
            lambda: ended,
        )
    state, status = outcome.state, outcome.status
    if not penalised:
        proven = cond(
            outcome.suspected,
            lambda: _ending.quasi_separated(data, state.theta, outcome.suspected),
            lambda: jnp.asarray(False),
        )
        # Parameters that move on have no known optimum, and no proof says that there is none.
        moving = outcome.suspected & (state.move >= STILL)
        unproven = jnp.where(moving, Status.PRECISION_FLOOR, status)
        status = jnp.where(proven, Status.QUASI_SEPARATED, unproven).astype(jnp.int32)
    undefined = (state.status == Status.NON_FINITE) & (state.step == 0)
    params = jax.tree.map(lambda leaf: jnp.where(undefined, jnp.nan, leaf), outcome.params)
    counts = (state.step, state.passes, state.norm, outcome.separated)
    return FitResult(params, outcome.objective, status, *counts, []), state.value

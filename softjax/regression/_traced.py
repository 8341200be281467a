"""A fit inside of a trace: one loop to its end, with the derivative of the optimum."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax import _checks
from softjax._sharding import cond
from softjax.regression import _ending, _frame
from softjax.regression._arguments import error
from softjax.regression._implicit import stationary
from softjax.regression._loop import STILL
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import pack, unpack
from softjax.regression._preconditioner import is_diagonal
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, Status
from softjax.regression._solve import (
    SOLVERS,
    continued,
    solver_of,
    start_of,
    with_check,
    within_trace,
)


def traced(
    name: str,
    data: Data,
    params: SoftmaxRegression,
    tol: Any,
    max_steps: int | None,
    on_host: bool,
) -> FitResult:
    """A fit inside of a trace: one loop to the end, and the derivative of the optimum.

    A fit that is known to be penalised is not searched for quasi-complete separation. One that runs
    `on_host`, with events or by an optimizer, is refused.
    """
    if on_host:
        expected = "concrete where `callback`, `validation` or the solver 'optax' is used"
        raise error("features", expected, "a tracer among the data")
    penalties = [_checks.known(penalty) for penalty in (data.l2, data.l1)]
    penalised = data.factors is None and any(a is not None and a != 0 for a in penalties)
    limit = SOLVERS[name].max_steps if max_steps is None else max_steps
    centre = None
    if data.constant > 0:
        centre = _frame.centre_of(*lax.stop_gradient((data.features, data.weights)))
    known = (name, penalised, float(data.constant), bool(penalties[1] == 0))
    return _optimum(known, data, params, centre, tol, limit)


@partial(jax.jit, static_argnums=0)
def _optimum(
    known: tuple, data: Data, params: SoftmaxRegression, centre: Any, tol: Any, limit: Any
) -> FitResult:
    """The fit of `traced`, one program: `jax.grad` outside of `jax.jit` traces it once."""
    name, penalised, constant, is_smooth = known
    data = replace(data, constant=np.asarray(constant, data.features.dtype))
    data = replace(data, l1=np.zeros((), data.l1.dtype)) if is_smooth else data
    fixed, start = lax.stop_gradient((data, params))
    fixed = replace(fixed, constant=data.constant)  # stop_gradient made the number a tracer
    fixed, frame = _frame.framed_around(centre, fixed, SOLVERS[name].rotates)
    start = _frame.inside(frame, start)
    fit, value_over_mass = to_the_end(name, fixed, start, tol, limit, penalised)

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
    name: str, data: Data, params: SoftmaxRegression, tol: Any, max_steps: Any, penalised: bool
) -> tuple[FitResult, Array]:
    """A fit inside of a trace, in the coordinates of `data`, and its value divided by the mass."""
    solver = SOLVERS[name]
    limit = jnp.asarray(solver.max_steps if max_steps is None else max_steps, jnp.int32)
    state = solver_of(name, data).start(data, start_of(name, data, pack(params)))
    tol = jnp.asarray(tol, data.features.dtype)
    outcome = within_trace(name, data, tol, state, limit)
    if solver.needs_optimum and is_diagonal(data.features):
        at_optimum = cond(
            outcome.doubted,
            lambda: _ending.nothing_hidden(data, outcome.state.theta, tol),
            lambda: jnp.asarray(False),
        )
        status = jnp.where(at_optimum, Status.CONVERGED, outcome.status).astype(jnp.int32)
        outcome = outcome._replace(status=status, hidden=outcome.hidden & ~at_optimum)
    if not penalised and not solver.by_newton:
        unseen = (outcome.status == Status.CONVERGED) & data.is_loose & (data.l1 == 0)
        at_end = (data, outcome.state.theta, outcome.state.first, tol)
        outcome = cond(unseen, lambda: with_check(outcome, _ending.check(*at_end)), lambda: outcome)
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
        outcome = cond(outcome.hidden, lambda: continued(data, tol, ended, limit), lambda: ended)
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

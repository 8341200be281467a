"""The solvers by name, each run in chunks for the host or to the end under a trace."""

import contextlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._sharding import cond
from softjax.regression import (
    _buckets,
    _descent,
    _ending,
    _firth,
    _frame,
    _metric,
    _optimum,
    _proximal,
    _wide,
)
from softjax.regression._convergence import STILL, State, converged, hides_something, rounding_of
from softjax.regression._descent import CONFIRMED
from softjax.regression._directions import LBFGS, NEWTON, NEWTON_CG, PRECISE, Method
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import (
    Data,
    Problem,
    is_loose,
    is_separated,
    logits_at,
    no_worse_than_zeros,
    normalised,
    objective,
    pack,
    problem_of,
    status_where_separated,
    unpack,
    value,
)
from softjax.regression._result import FitResult, Progress, Status


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
    stationary: Callable = _optimum.stationary
    objective: Callable = objective
    needs_optimum: bool = True
    by_newton: bool = True


def _descending(method: Method, max_steps: int, chunk: int, **what: Any) -> Solver:
    def start(data, theta):
        return _descent.start(method, data.features, theta)

    return Solver(start, partial(_descent.advance, method), max_steps, chunk, **what)


def _newton_cg_start(data: Data | Problem, theta: Any) -> State:
    if _wide.takes(data, len(theta)):
        return _wide.start(data.features, theta)
    return _descent.start(NEWTON_CG, data.features, theta)


def _newton_cg_advance(
    problem: Problem, tol: Array, state: State, stop: Array
) -> tuple[State, Array]:
    """In the span of the examples where there are few; where that fails, among all parameters."""
    if not _wide.takes(problem, len(state.theta)):
        return _descent.advance(NEWTON_CG, problem, tol, state, stop)

    def among_all(state, logits):
        x = problem.features
        begin = _descent.start(NEWTON_CG, x, state.theta)._replace(strict=state.strict)
        end, logits = _descent.advance(NEWTON_CG, problem, tol, begin, stop - state.step)
        return end._replace(
            memory=_wide.start(x, end.theta).memory,
            first=state.first,
            step=state.step + end.step,
            passes=state.passes + end.passes,
        ), logits

    state, logits = _wide.advance(problem, tol, state, stop)
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
        stationary=_optimum.stationary_l1,
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
_SOLVERS = SOLVERS | {PRECISELY: _descending(PRECISE, 200, 1)}


class Outcome(NamedTuple):
    """What a program comes to: the state, and what is known of it as arrays.

    Attributes:
        state: the last one.
        params: its parameters.
        objective: there, of the data and not over their mass.
        status: that of the state, or SEPARATED.
        separated: whether the parameters separate the classes.
        suspected: whether quasi-complete separation should be looked for.
        hidden: whether `PRECISELY` may find more.
    """

    state: State
    params: SoftmaxRegression
    objective: Array
    status: Array
    separated: Array
    suspected: Array
    hidden: Array


class Run:
    """A fit in chunks, for the loop of `fit`."""

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
        self.limit = SOLVERS[name].max_steps if max_steps is None else max_steps
        self.chunk = SOLVERS[name].chunk
        rotates = SOLVERS[name].rotates
        data, self.frame = _frame.framed(data, rotates)
        params = _frame.inside(self.frame, params)
        if self.frame.rotation is None:
            data = _buckets.in_bucket(data, num_classes)
        self.fixed = (name, num_classes)
        self.data, self.tol = data, np.asarray(tol, data.features.dtype)
        kernel, bias = map(np.asarray, params)
        theta = np.concatenate([kernel, bias[None]]).T
        self.state = SOLVERS[name].start(data, theta)

    def advance(self, stop: int) -> Progress:
        """Steps until `stop`, or until there is nothing left to do."""
        status = self._status_at(stop)
        proven = bool(self.outcome.suspected) and self._quasi_separated()
        if not proven and self.outcome.hidden:
            limit = np.int32(self.limit)
            self.outcome = _more_precisely(self.fixed[1], self.data, self.tol, self.outcome, limit)
            self.state = self.outcome.state
            status = int(self.outcome.status)
            proven = bool(self.outcome.suspected) and self._quasi_separated()
        elif not proven and self.outcome.suspected and not self.state.strict:
            # Then there may be an optimum.
            going_on = {"strict": np.bool_(True), "status": np.int32(Status.RUNNING)}
            before, self.state = int(self.state.step), self.state._replace(**going_on)
            status = self._status_at(stop)
            moved = self.outcome.suspected and int(self.state.step) > before
            proven = bool(moved) and self._quasi_separated()
        status = Status.QUASI_SEPARATED if proven else status
        params, objective = _frame.turned_back(self.frame, self.outcome.params), None
        if self.frame.centre is not None:
            params, moved = _frame.outside(self.frame.centre, params)
            at_end = _frame.status_outside(np.int32(status), moved, self.state.value, self.tol)
            if int(at_end) != status:
                status, theta = int(at_end), self.state.theta.at[:, -1].add(moved)
                objective = _objective(self.fixed[1], self.data, theta)
        return Progress(
            params,
            float(self.outcome.objective if objective is None else objective),
            float(self.state.norm),
            int(self.state.step),
            status,
        )

    def _status_at(self, stop: int) -> int:
        program = _quickly_compiled()
        self.outcome = program(*self.fixed, self.data, self.tol, self.state, np.int32(stop))
        self.state = self.outcome.state
        if self.outcome.status == Status.CONVERGED and self._is_unseen():
            looked = _ending.look(
                self.fixed[1], self.data, self.state.theta, self.state.first, self.tol
            )
            self.outcome = _doubted(self.outcome, looked)
        return int(self.outcome.status)

    def _is_unseen(self) -> bool:
        """Whether the solver takes no step of Newton's, and no penalty holds some parameters."""
        smooth = not self.data.l1 and self.data.l1_rows is None
        return smooth and not SOLVERS[self.fixed[0]].by_newton and bool(is_loose(self.data))

    def _quasi_separated(self) -> bool:
        return _ending.is_proven(self.fixed[1], self.data, self.state.theta)

    def result(self, progress: Progress, status: int, history: list[dict[str, float]]) -> FitResult:
        return FitResult(
            progress.params,
            progress.objective,
            status,
            progress.step,
            int(self.state.passes),
            progress.gradient_norm,
            bool(self.outcome.separated),
            history,
        )


def traced(
    name: str,
    data: Data,
    num_classes: int,
    params: SoftmaxRegression,
    tol: Any,
    max_steps: int | None,
    penalised: bool,
) -> FitResult:
    """A fit inside of a trace: one loop to the end, and the optimum's derivative.

    Where it is known to be `penalised`, quasi-complete separation is not looked for.
    """
    fixed, start = lax.stop_gradient((data, params))
    fixed = fixed._replace(constant=data.constant)  # a number, not a tracer of it
    fixed, frame = _frame.framed(fixed, SOLVERS[name].rotates)
    start = _frame.inside(frame, start)
    fit, value_over_mass = to_the_end(name, fixed, num_classes, start, tol, max_steps, penalised)

    theta = lax.stop_gradient(pack(_frame.turned_back(frame, fit.params)))
    shifted = data._replace(features=_frame.less(data.features, frame.centre))
    problem = problem_of(shifted, num_classes)
    theta = SOLVERS[name].stationary(theta, problem)
    objective = value(problem, theta, logits_at(problem, theta))
    params, moved = _frame.outside(frame.centre, unpack(theta))
    moved = lax.stop_gradient(moved)
    status = _frame.status_outside(fit.status, moved, value_over_mass, tol)
    return fit._replace(params=params, objective=objective, status=status)


def to_the_end(
    name: str,
    data: Data,
    num_classes: int,
    params: SoftmaxRegression,
    tol: Any,
    max_steps: Any,
    penalised: bool,
) -> tuple[FitResult, Array]:
    """A fit inside of a trace, in the coordinates of `data`, and its value over the mass."""
    solver = SOLVERS[name]
    limit = jnp.asarray(solver.max_steps if max_steps is None else max_steps, jnp.int32)
    state = solver.start(data, pack(params))
    tol = jnp.asarray(tol, data.features.dtype)
    outcome = _within_trace(name, num_classes, data, tol, state, limit)
    if not penalised and not solver.by_newton and data.l1_rows is None:
        unseen = (outcome.status == Status.CONVERGED) & is_loose(data) & (data.l1 == 0)
        at_end = (num_classes, data, outcome.state.theta, outcome.state.first, tol)
        outcome = cond(
            unseen,
            lambda: _doubted(outcome, _ending.looked(*at_end)),
            lambda: outcome,
        )
    if not penalised and data.features.dtype == np.float64:
        ended = outcome._replace(state=outcome.state._replace(memory=()))
        outcome = cond(
            outcome.hidden,
            lambda: _continued(num_classes, data, tol, ended, limit),
            lambda: ended,
        )
    state, status = outcome.state, outcome.status
    if not penalised:
        proven = cond(
            outcome.suspected,
            lambda: _ending.quasi_separated(num_classes, data, state.theta, outcome.suspected),
            lambda: jnp.asarray(False),
        )
        # What moves on has no optimum that is known, and no proof that there is none.
        moving = outcome.suspected & (state.move >= STILL)
        unproven = jnp.where(moving, Status.PRECISION_FLOOR, status)
        status = jnp.where(proven, Status.QUASI_SEPARATED, unproven).astype(jnp.int32)
    undefined = (state.status == Status.NON_FINITE) & (state.step == 0)
    params = jax.tree.map(lambda leaf: jnp.where(undefined, jnp.nan, leaf), outcome.params)
    counts = (state.step, state.passes, state.norm, outcome.separated)
    return FitResult(params, outcome.objective, status, *counts, []), state.value


def _advance(
    name: str, num_classes: int, data: Data, tol: Array, state: State, stop: Array
) -> Outcome:
    """To step `stop`: all of a fit in one program."""
    data, mass = normalised(data, num_classes)
    problem = problem_of(data, num_classes)
    solver = _SOLVERS[name]
    begun = partial(solver.objective, problem)
    state = state._replace(theta=no_worse_than_zeros(begun, state.theta, state.step == 0))
    state, logits = solver.advance(problem, tol, state, stop)
    separated = is_separated(problem, logits)
    status, suspected, hidden = state.status, jnp.asarray(False), jnp.asarray(False)
    if solver.needs_optimum:
        status = status_where_separated(problem, state.theta, status, separated)
        suspected = _optimum.suspected(problem, state, status)
    if solver.needs_optimum and name != PRECISELY:
        hidden = (status == Status.PRECISION_FLOOR) & hides_something(state, tol)
        if _metric.is_diagonal(problem.features):
            seen = _seen(problem, tol, state, logits, hidden)
            status = jnp.where(seen, Status.CONVERGED, status).astype(jnp.int32)
            hidden &= ~seen
        hidden &= problem.l1 == 0
        hidden &= problem.l1_rows is None
    objective = state.value * mass
    params = unpack(state.theta)
    return Outcome(state, params, objective, status, separated, suspected, hidden)


def _doubted(outcome: Outcome, ending: _ending.Ending) -> Outcome:
    """The outcome with what was found where the solver had converged by its own steps."""
    status = np.where if isinstance(ending.converged, np.ndarray) else jnp.where
    status = status(ending.converged, outcome.status, Status.PRECISION_FLOOR).astype(np.int32)
    suspected = outcome.suspected | ending.moving
    hidden = outcome.hidden | suspected | ~ending.converged
    return outcome._replace(status=status, suspected=suspected, hidden=hidden)


def _seen(problem: Problem, tol: Array, state: State, logits: Array, hidden: Array) -> Array:
    """Whether all that a diagonal metric may have `hidden` is known, and the fit has converged."""
    at_end = converged(state.value, state.first, state.norm, state.decrement, CONFIRMED * tol)
    at_end &= (state.move < STILL) | ~state.strict
    looked = partial(_ending.seen, problem, state.theta, logits, tol)
    return cond(hidden & at_end, looked, lambda: jnp.asarray(False))


def _continued(num_classes: int, data: Data, tol: Array, ended: Outcome, limit: Array) -> Outcome:
    """The fit goes on, up to step `limit`, with directions in the dtype of the features."""
    solver, state = _SOLVERS[PRECISELY], ended.state
    begin = solver.start(data, state.theta)._replace(strict=jnp.asarray(True))
    outcome = _within_trace(PRECISELY, num_classes, data, tol, begin, limit - state.step)
    end = outcome.state._replace(
        memory=(),
        first=state.first,
        step=state.step + outcome.state.step,
        passes=state.passes + outcome.state.passes,
    )
    return outcome._replace(state=end)


def _more_precisely(
    num_classes: int, data: Data, tol: np.ndarray, ended: Outcome, limit: np.int32
) -> Outcome:
    """The fit goes on, up to step `limit`, in float64 whatever the dtype of the data.

    Its parameters are rounded to this dtype, and have converged if the rounded ones have. What
    rounding makes worse than the end of the fit is not taken: then this end is judged, in float64.
    """
    dtype, state = tol.dtype, ended.state
    old = state._replace(memory=())

    def precise(leaf: Any) -> Any:
        return leaf.astype(np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def judged(theta):
        # Before and after a step, which says how much is left.
        begin = _SOLVERS[PRECISELY].start(data, theta)
        return (
            _within_trace(PRECISELY, num_classes, data, within, begin, np.int32(stop))
            for stop in (0, 1)
        )

    with jax.enable_x64(True):
        data, before = jax.tree.map(precise, (data, ended._replace(state=old)))
        within = np.float64(tol)
        outcome = _continuing()(num_classes, data, within, before, limit)
        status, end = int(outcome.status), outcome.state
        if dtype != np.float64:
            rounded = np.asarray(end.theta, dtype).astype(np.float64)
            there, beyond = judged(rounded)
            was, was_beyond = judged(before.state.theta)
            if not there.state.value < was.state.value:
                rounded, there, beyond = before.state.theta, was, was_beyond
            at, step = there.state, beyond.state
            first = np.asarray(state.first)
            first = first + rounding_of(first)  # of the dtype that it was computed in
            # Rounding may move a gradient of the size of `tol` by as much.
            tols = CONFIRMED * within
            measured = map(float, (at.value, first, at.norm, step.decrement, tols))
            reached = converged(*measured)
            if status in (Status.CONVERGED, Status.PRECISION_FLOOR):
                fell = reached and bool(step.move < STILL)
                status = Status.CONVERGED if fell else Status.PRECISION_FLOOR
            outcome = outcome._replace(objective=there.objective, separated=there.separated)
            end = end._replace(theta=rounded, value=at.value, norm=at.norm)
        outcome = jax.tree.map(np.asarray, outcome._replace(state=end))
    state = jax.tree.map(lambda new, old: new.astype(old.dtype), outcome.state, old)
    params = unpack(jnp.asarray(state.theta))
    return outcome._replace(state=state, params=params, status=np.int32(status))


@partial(jax.jit, static_argnames="num_classes")
def _objective(num_classes: int, data: Data, theta: Array) -> Array:
    return objective(problem_of(data, num_classes), theta)


_STATIC = ("name", "num_classes")
_within_trace = jax.jit(_advance, static_argnames=_STATIC)
_continuing = cache(lambda: jax.jit(_continued, static_argnames="num_classes"))
_in_place = {"static_argnames": _STATIC, "donate_argnames": "state"}


@cache
def _quickly_compiled() -> Callable:
    """`_advance`, compiled in a third of the time: most of a first fit is compilation.

    A fit is some 170 small kernels. On CPUs they run as fast with LLVM's first level of
    optimization, and by the older of the two ways in which jaxlib 0.10 makes them; later ones have
    it no more, which a program of nothing finds out. Only a program that is not part of another may
    choose.
    """
    first_level = {"xla_backend_optimization_level": 1}
    if jax.default_backend() == "cpu":
        for options in (first_level | {"xla_cpu_use_fusion_emitters": False}, first_level):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                jax.jit(lambda: (), compiler_options=options).lower().compile()
                return jax.jit(_advance, **_in_place, compiler_options=options)
    return jax.jit(_advance, **_in_place)

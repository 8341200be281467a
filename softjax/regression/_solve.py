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
from softjax.regression import _descent, _firth, _optimum, _proximal, _shift, _wide
from softjax.regression._descent import STILL, State
from softjax.regression._directions import LBFGS, NEWTON, NEWTON_CG, Method
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import (
    Data,
    Problem,
    class_scores,
    is_separated,
    is_sparse,
    no_worse_than_zeros,
    pack,
    problem_of,
    status_where_separated,
    unpack,
    value,
)
from softjax.regression._result import FitResult, Progress, Status

# What the parameters are turned back by: a rotation, or the centres of sparse columns.
Frame = _wide.Rotation | Array | None


class Solver(NamedTuple):
    """One way to the optimum.

    Attributes:
        start: of (features, theta): the state before the first step.
        advance: of (problem, tol, state, stop): the state at step `stop`, or where its status says
            so, with its logits.
        max_steps: more than enough.
        chunk: steps between two events.
        rotates: whether N dimensions do where N < D, as for an l2 penalty.
        takes_sparse: whether features may be BCOO.
        stationary: of (theta, problem): the optimum, as a function of the problem.
        needs_optimum: whether it has nothing to find where the classes are separated.
    """

    start: Callable
    advance: Callable
    max_steps: int
    chunk: int
    rotates: bool = True
    takes_sparse: bool = True
    stationary: Callable = _optimum.stationary
    needs_optimum: bool = True


def _descending(method: Method, max_steps: int, chunk: int, **what: Any) -> Solver:
    start, advance = partial(_descent.start, method), partial(_descent.advance, method)
    return Solver(start, advance, max_steps, chunk, **what)


def _newton_cg_start(features: Any, theta: Any) -> State:
    if _wide.takes(features, len(theta)):
        return _wide.start(features, theta)
    return _descent.start(NEWTON_CG, features, theta)


def _newton_cg_advance(
    problem: Problem, tol: Array, state: State, stop: Array
) -> tuple[State, Array]:
    """In the span of the examples where there are few; where that fails, among all parameters."""
    if not _wide.takes(problem.features, len(state.theta)):
        return _descent.advance(NEWTON_CG, problem, tol, state, stop)

    def among_all(state, logits):
        x = problem.features
        begin = _descent.start(NEWTON_CG, x, state.theta)
        end, logits = _descent.advance(NEWTON_CG, problem, tol, begin, stop - state.step)
        return end._replace(
            memory=_wide.start(x, end.theta).memory,
            step=state.step + end.step,
            passes=state.passes + end.passes,
        ), logits

    state, logits = _wide.advance(problem, tol, state, stop)
    failed = state.status == Status.PRECISION_FLOOR
    return cond(failed, among_all, lambda *same: same, state, logits)


SOLVERS = {
    "newton-cg": Solver(_newton_cg_start, _newton_cg_advance, 200, 1, rotates=False),
    "newton": _descending(NEWTON, 200, 1, takes_sparse=False),
    "lbfgs": _descending(LBFGS, 5000, 50),
    "proximal": Solver(
        _proximal.start,
        _proximal.advance,
        20000,
        200,
        rotates=False,
        stationary=_optimum.stationary_l1,
    ),
    "firth": Solver(
        _firth.start,
        _firth.advance,
        200,
        1,
        rotates=False,
        takes_sparse=False,
        stationary=_firth.stationary,
        needs_optimum=False,
    ),
}


class Outcome(NamedTuple):
    """What a program comes to: the state, and what is known of it as arrays.

    `suspected` says that quasi-complete separation should be looked for.
    """

    state: State
    params: SoftmaxRegression
    status: Array
    separated: Array
    suspected: Array


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
        self.rotation, data, params = _rotated(name, data, params)
        self.fixed = (name, num_classes)
        self.data, self.tol = data, np.asarray(tol, data.features.dtype)
        kernel, bias = map(np.asarray, params)
        theta = np.concatenate([kernel, bias[None]]).T
        self.state = SOLVERS[name].start(data.features, theta)

    def advance(self, stop: int) -> Progress:
        """Steps until `stop`, or until there is nothing left to do."""
        status = self._status_at(stop)
        if self.outcome.suspected:
            if self._quasi_separated():
                status = Status.QUASI_SEPARATED
            elif not self.state.strict:  # no proof: then there may be an optimum
                going_on = {"strict": np.bool_(True), "status": np.int32(Status.RUNNING)}
                before, self.state = int(self.state.step), self.state._replace(**going_on)
                status = self._status_at(stop)
                moved = self.outcome.suspected and int(self.state.step) > before
                if moved and self._quasi_separated():
                    status = Status.QUASI_SEPARATED
        return Progress(
            _turned_back(self.rotation, self.outcome.params),
            float(self.state.value),
            float(self.state.norm),
            int(self.state.step),
            status,
        )

    def _status_at(self, stop: int) -> int:
        program = _quickly_compiled()
        self.outcome = program(*self.fixed, self.data, self.tol, self.state, np.int32(stop))
        self.state = self.outcome.state
        return int(self.outcome.status)

    def _quasi_separated(self) -> bool:
        """Whether there is a proof of it, in float64 whatever the dtype of the fit."""

        def doubled(leaf):
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf.astype(np.float64) if floating else leaf

        with jax.enable_x64(True):
            data, theta = jax.tree.map(doubled, (self.data, self.state.theta))
            return bool(_quasi_separated(self.fixed[1], data, theta, self.outcome.suspected))

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
    solver = SOLVERS[name]
    limit = jnp.asarray(solver.max_steps if max_steps is None else max_steps, jnp.int32)
    rotation, turned, start = _rotated(name, *lax.stop_gradient((data, params)))
    state = solver.start(turned.features, pack(start))
    tol = jnp.asarray(tol, data.features.dtype)
    outcome = _within_trace(name, num_classes, turned, tol, state, limit)
    theta = pack(_turned_back(rotation, outcome.params))
    state = outcome.state
    status = outcome.status
    if not penalised:
        proven = cond(
            outcome.suspected,
            lambda: _quasi_separated(num_classes, turned, state.theta, outcome.suspected),
            lambda: jnp.asarray(False),
        )
        # What moves on has no optimum that is known, and no proof that there is none.
        moving = outcome.suspected & (state.move >= STILL)
        unproven = jnp.where(moving, Status.PRECISION_FLOOR, status)
        status = jnp.where(proven, Status.QUASI_SEPARATED, unproven).astype(jnp.int32)
    undefined = (state.status == Status.NON_FINITE) & (state.step == 0)
    theta = lax.stop_gradient(jnp.where(undefined, jnp.nan, theta))
    problem = problem_of(data, num_classes)
    theta = solver.stationary(theta, problem)
    logits = class_scores(problem.features, theta)
    return FitResult(
        unpack(theta),
        value(problem, theta, logits),
        status,
        state.step,
        state.passes,
        state.norm,
        outcome.separated,
        [],
    )


def _advance(
    name: str, num_classes: int, data: Data, tol: Array, state: State, stop: Array
) -> Outcome:
    """To step `stop`: all of a fit in one program."""
    problem = problem_of(data, num_classes)
    begun = no_worse_than_zeros(problem, state.theta, state.step == 0)
    state = state._replace(theta=begun)
    state, logits = SOLVERS[name].advance(problem, tol, state, stop)
    separated = is_separated(problem, logits)
    status, suspected = state.status, jnp.asarray(False)
    if SOLVERS[name].needs_optimum:
        status = status_where_separated(problem, status, separated)
        suspected = _optimum.suspected(problem, state, status)
    return Outcome(state, unpack(state.theta), status, separated, suspected)


@partial(jax.jit, static_argnames="num_classes")
def _quasi_separated(num_classes: int, data: Data, theta: Array, suspected: Array) -> Array:
    """In a program of its own: most fits have no need of it."""
    problem = problem_of(data, num_classes)
    return _optimum.is_quasi_separated(problem, theta, suspected)


_STATIC = ("name", "num_classes")
_within_trace = jax.jit(_advance, static_argnames=_STATIC)
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


def _rotated(
    name: str, data: Data, params: SoftmaxRegression
) -> tuple[Frame, Data, SoftmaxRegression]:
    """In N dimensions, where that pays; sparse columns that are stored whole around their means."""
    x = data.features
    if is_sparse(x):
        x, centre = _shift.shift(x)
        if centre is None:
            return None, data, params
        return centre, data._replace(features=x), _shift.inside(centre, params)
    if not SOLVERS[name].rotates or not _wide.rotation_pays(x):
        return None, data, params
    features, rotation = _wide.rotate(x)
    return rotation, data._replace(features=features), _wide.turned(rotation, params)


def _turned_back(frame: Frame, params: SoftmaxRegression) -> SoftmaxRegression:
    if frame is None:
        return params
    if isinstance(frame, _wide.Rotation):
        return _wide.turned_back(frame, params)
    return _shift.outside(frame, params)

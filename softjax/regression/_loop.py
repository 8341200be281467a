"""The loop that every solver runs in: look at the point, then stop, or take a step and go on.

A solver says four things, and a loop of Newton's steps, of proximal steps or of any others is made
of them:

    init        what is known at the parameters that the loop starts from
    terminate   the state with what is found at its parameters, and the status that follows
    step        the next parameters, and what is known there
    refresh     what is known at the parameters, computed anew: for a solver that adds up steps

An end is confirmed: where sums over steps say that a solver has converged, what is known is
computed anew and looked at once more. One program runs a fit in chunks, for a caller that looks on,
or to its end.

Source: J. Rader, T. Lyons and P. Kidger, "Optimistix: modular optimisation in JAX and Equinox"
(2024), whose solvers have the same parts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from jax import Array

from softjax._sharding import cond, while_loop
from softjax.regression._convergence import CONFIRMED, State, initial
from softjax.regression._implicit import SMOOTH, Stationarity
from softjax.regression._objective import Data, Problem, gradient_bound, objective
from softjax.regression._result import Status

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# What the loop does at a point: it stops, computes what is known anew, or takes a step.
STOP, REFRESH, STEP = range(3)


class Solver(ABC):
    """A way to the optimum of one problem. `__init__` computes what is the same at every step.

    Attributes:
        problem: what is solved.
        bound: what each entry of its gradient can be at most, `gradient_bound`.
        max_steps: more steps than any problem needs.
        chunk: the number of steps between two events.
        patience: so many steps in turn without a smaller objective or gradient are rounding.
        rotates: whether N dimensions do where N < D, as they do for an l2 penalty.
        takes_sparse: whether features may be BCOO.
        needs_optimum: whether there is nothing to find where the classes are separated.
        by_newton: whether the last step is Newton's, which says how much is left.
        condition: what the optimum fulfils, for its derivative.
        refresh: of (state, known), as above; None where no step leaves a rounding behind.
    """

    max_steps: ClassVar[int] = 200
    chunk: ClassVar[int] = 1
    patience: ClassVar[int] = 5
    rotates: ClassVar[bool] = True
    takes_sparse: ClassVar[bool] = True
    needs_optimum: ClassVar[bool] = True
    by_newton: ClassVar[bool] = True
    condition: ClassVar[Stationarity] = SMOOTH
    refresh: Callable[[State, Any], tuple[State, Any]] | None = None

    def __init__(self, problem: Problem):
        self.problem, self.bound = problem, gradient_bound(problem)

    @classmethod
    def start(cls, data: Data | Problem, theta: Any) -> State:
        """The state before the first step."""
        return initial(theta, cls.memory(data.features, theta))

    @staticmethod
    def memory(features: "Array | BCOO", theta: Any) -> Any:
        """What the solver remembers before the first step, in NumPy, which compiles nothing."""
        return ()

    @staticmethod
    def objective(problem: Problem, theta: Array) -> Array:
        """The function that the solver makes small."""
        return objective(problem, theta)

    @abstractmethod
    def init(self, state: State) -> tuple[State, Any]:
        """The state at the start of the loop, and what is known there."""

    @abstractmethod
    def terminate(self, state: State, known: Any, tol: Array) -> tuple[State, Any]:
        """The state with what is found at its parameters, and what a step needs of it."""

    @abstractmethod
    def step(self, state: State, known: Any, here: Any) -> tuple[State, Any]:
        """The state after a step from the point that `terminate` has looked at."""

    def postprocess(self, state: State, known: Any, tol: Array) -> tuple[State, Array]:
        """The state after the loop, and its logits."""
        return state, known


def advance(solver: Solver, tol: Array, state: State, stop: Array) -> tuple[State, Array]:
    """Runs until step `stop` or until the status says so: the state and its logits."""
    refresh: Any = solver.refresh

    def body(carry):
        state, known, exact, confirming, _ = carry
        within = jnp.where(confirming, CONFIRMED * tol, tol)
        looked, here = solver.terminate(state, known, within)
        ended = looked.status != Status.RUNNING
        doubtful = ended & ~exact
        todo = jnp.where(ended | (state.step >= stop), STOP, STEP)
        todo = jnp.where(doubtful, REFRESH, todo)
        state = looked._replace(status=jnp.where(doubtful, state.status, looked.status))

        def stepped(state, known, here):
            return *solver.step(state, known, here), jnp.asarray(refresh is None)

        def rested(state, known, here):
            return state, known, exact

        otherwise = rested
        if refresh is not None:

            def refreshed(state, known, here):
                return *refresh(state, known), jnp.asarray(True)

            otherwise = partial(cond, todo == REFRESH, refreshed, rested)

        state, known, exact = cond(todo == STEP, stepped, otherwise, state, known, here)
        return state, known, exact, todo == REFRESH, todo != STOP

    state, known = solver.init(state)
    exact, confirming, going = jnp.asarray([True, False, True])
    carry = (state, known, exact, confirming, going)
    state, known, *_ = while_loop(lambda carry: carry[-1], body, carry)
    return solver.postprocess(state, known, tol)

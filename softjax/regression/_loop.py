"""The loop that every solver runs in: judge the point, then stop or take the next step.

A solver defines four methods, from which the loop is built for Newton's steps, proximal steps and
all others. `known` is what the solver has computed at the parameters, such as their logits:

    init        the state and `known` at the parameters at which the loop starts
    terminate   the state with the objective and gradient at its parameters, and its status
    step        the next state and `known`
    refresh     `known` computed again from the parameters, for a solver that sums it over steps

An end is confirmed: if a solver has converged according to sums over steps, `known` is computed
again and judged once more. One program runs a fit either in chunks, with events between them, or to
its end.

Source: J. Rader, T. Lyons and P. Kidger, "Optimistix: modular optimisation in JAX and Equinox"
(2024), whose solvers have the same parts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from softjax._sharding import cond, while_loop
from softjax.regression._convergence import CONFIRMED, State, initial
from softjax.regression._features import Matrix
from softjax.regression._implicit import SMOOTH, Stationarity
from softjax.regression._problem import Data, Problem
from softjax.regression._result import Status

# The choices of the loop at a point: stop, compute `known` again, or take a step.
STOP, REFRESH, STEP = range(3)


class Solver(ABC):
    """A method for the optimum of one problem. `__init__` computes what does not change per step.

    Attributes:
        problem: the problem to solve.
        bound: `gradient_bound`, the largest possible entries of its gradient.
        max_steps: the default limit of the steps.
        chunk: the number of steps between two events.
        patience: after this many steps in a row without a smaller objective or gradient the fit is
            at the precision floor.
        rotates: whether a fit with N < D may run in N dimensions, as an l2 penalty allows.
        takes_sparse: whether features may be BCOO.
        needs_optimum: whether the solver finds no optimum if the classes are separated.
        by_newton: whether the steps are Newton's, which predict the remaining decrease.
        condition: the condition of the optimum, for its derivative.
        refresh: (state, known) -> the same, as above; None if no rounding errors add up over steps.
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
        self.problem, self.bound = problem, problem.gradient_bound()

    @classmethod
    def start(cls, data: Data | Problem, theta: Any) -> State:
        """The state before the first step."""
        return initial(theta, cls.memory(data.features, theta))

    @staticmethod
    def memory(features: Matrix, theta: Any) -> Any:
        """The solver's own state before the first step, in NumPy, so that nothing is compiled."""
        return ()

    @staticmethod
    def objective(problem: Problem, theta: Array) -> Array:
        """The function that the solver minimises."""
        return problem.objective(theta)

    @abstractmethod
    def init(self, state: State) -> tuple[State, Any]:
        """The state at the start of the loop, and `known`."""

    @abstractmethod
    def terminate(self, state: State, known: Any, tol: Array) -> tuple[State, Any]:
        """The judged state, and the quantities at its parameters that a step needs."""

    @abstractmethod
    def step(self, state: State, known: Any, here: Any) -> tuple[State, Any]:
        """The state and `known` after a step from the point that `terminate` has judged."""

    def postprocess(self, state: State, known: Any, tol: Array) -> tuple[State, Array]:
        """The state after the loop, and its logits."""
        return state, known


def advance(solver: Solver, tol: Array, state: State, stop: Array) -> tuple[State, Array]:
    """Runs until step `stop` or until the fit ends: the state and its logits."""
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

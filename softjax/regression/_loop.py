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

**When a fit has converged.** One rule holds for every solver. The objective is convex. It has an
optimum if a penalty bounds the kernel and every class has examples, which bound the biases; without
a penalty it has one unless the classes are separated, which `_ending` proves.

A solver works with the objective divided by the mass of its targets (`Data.normalised`), so that
nothing below depends on the scale of labels or weights. At a point with the gradient g and the
objective f it has converged if

    max_j |g_j| / (sum_i w_i x_ij^2 / sum_i w_i)^(1/2) <= tol    and    decrement <= tol f,

where `decrement` is the decrease that a quadratic model of the objective predicted for the last
step, -g^T d / 2 for Newton's method. The first condition does not depend on the unit of a feature;
the second does not depend on the basis of the features at all, and is stricter if some features are
nearly collinear. A point whose objective is above that of the start has not converged, whatever its
gradient. A point has not converged either, but is at the precision floor, if features are so nearly
collinear that rounding hides the decrease which the model predicts along their difference.

Source: J. Rader, T. Lyons and P. Kidger, "Optimistix: modular optimisation in JAX and Equinox"
(2024), whose solvers have the same parts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax._sharding import cond, while_loop
from softjax.regression._features import Matrix
from softjax.regression._implicit import SMOOTH, Stationarity
from softjax.regression._problem import Data, Problem
from softjax.regression._result import Status


def is_separated(targets: Any, scores: Any) -> Any:
    """Whether every example has one class and its score is strictly largest; both are [K, N].

    Then the loss along s * theta falls to 0 as s grows: without a penalty there is no optimum.
    Scores are logits without the offset, of JAX or of NumPy.
    """
    xp, own = scores.__array_namespace__(), targets > 0
    lowest = xp.where(own, scores, np.inf).min(0)
    highest = xp.where(own, -np.inf, scores).max(0)
    return ((own.sum(0) <= 1) & (lowest > highest)).all()


def status_where_separated(
    problem: Problem, theta: Array, status: Array, separated: Array
) -> Array:
    """The status, replaced by SEPARATED or QUASI_SEPARATED if a finished fit has no optimum.

    SEPARATED if parameters that are not penalised separate the classes; `separated` says whether
    `theta` does. QUASI_SEPARATED if a class has no examples.
    """
    unbounded = separated & ~problem.is_penalised
    if problem.factors is not None:
        alone = problem.scores(theta * problem.free)
        unbounded |= is_separated(problem.targets, alone)
    done = (status == Status.CONVERGED) | (status == Status.PRECISION_FLOOR)
    status = jnp.where(done & problem.lacks_examples, Status.QUASI_SEPARATED, status)
    return jnp.where(unbounded & done, Status.SEPARATED, status).astype(jnp.int32)


# A fit is near its end once the relative gradient is below this; from then on `State.farthest` is
# the maximum over its steps.
NEAR = 1e-4
# A quadratic model predicts the distance to the optimum only if its step moves the logits by less
# than this, in nats.
STILL = 0.1
# The limit for Newton's steps to an optimum that is known to exist. A step of m nats changes the
# Hessian by at most a factor e^m, and the next decrement is at most e^m ((e^m - 1 - m) / m)^2 times
# this one: here 0.15 times.
NEWTONIAN = 0.5
# A step of more nats than this passes an example with extreme features: no other logits move so far
# in one step. The model then predicts little: the next step may lead back past this example. A fit
# that is at the precision floor after such a step goes on in float64.
OUTLYING = 30
# Logits that were summed over the steps have other rounding errors than logits computed from the
# parameters. The difference may change a gradient of the size of `tol` by as much, so that an end
# is confirmed within this multiple of `tol`.
CONFIRMED = 2
# An objective that changes by no more than this number of roundings has not changed.
ROUNDINGS = 8


class State(NamedTuple):
    """The state of a fit between two steps."""

    theta: Any  # the parameters, [K, D + 1]
    memory: Any  # the solver's own state
    value: Any  # the objective at `theta`
    norm: Any  # the largest entry of the gradient at `theta`, relative to its bound
    decrement: Any  # the decrease that the model predicted for the last step, nats
    # The largest change of a difference of two logits of an example by the last step; if the line
    # search has shortened this step, by the whole step of the model.
    move: Any
    # The largest `move` of all steps since the gradient first was below NEAR. Until then it is the
    # last `move`, or the one before it if that step passed an example with extreme features.
    farthest: Any
    # Whether a fit may end only once `move` is below a limit. Without an optimum the logits never
    # come to rest; a fit that is not `strict` ends nevertheless, and separation is then proven.
    strict: Any
    unseen: Any  # a bound of the decrease along directions whose curvature rounding hides, nats
    first: Any  # the objective at the start
    lowest: Any  # the smallest objective before the last step
    best: Any  # the smallest `norm` before the last step
    stalled: Any  # the number of steps in a row without a smaller objective or a smaller gradient
    step: Any  # the number of steps taken
    passes: Any  # the number of products with the features so far
    status: Any  # a number of `Status`


def initial(theta: Any, memory: Any) -> State:
    """The state before the first step, made by NumPy, so that nothing is compiled."""
    # Infinity would raise an error of jax_debug_infs if a solver leaves it in the state.
    largest, zero = np.array(np.finfo(theta.dtype).max), np.int32(0)
    state = State(theta, memory, *[largest] * 10, *[zero] * 4)
    return state._replace(strict=np.bool_(False), unseen=np.zeros((), theta.dtype))


def converged(objective: Any, first: Any, norm: Any, decrement: Any, tol: Any) -> Any:
    """The rule of this module, for numbers or arrays. An objective below `tol` counts as `tol`."""
    promised_little = (decrement <= tol * objective) | (decrement <= tol * tol)
    reached = (norm <= tol) & promised_little | (norm == 0)
    return reached & (objective <= first + rounding_of(first))


def check_convergence(
    state: State,
    objective: Array,
    norm: Array,
    tol: Array,
    unseen: Any = 0.0,
    goes_on: bool = False,
    still: Any = STILL,
) -> State:
    """The state with the objective and gradient at its parameters, and the status that follows.

    With `goes_on` a fit does not end where rounding hides something: its next steps find it. A
    `strict` fit may end where the last step moved the logits by less than `still` nats.
    """
    first = jnp.where(state.step == 0, objective, state.first)
    at_rest = (state.move < still) | ~state.strict | (norm == 0)
    reached = converged(objective, first, norm, state.decrement, tol) & at_rest
    unseen = jnp.asarray(unseen, objective.dtype)
    state = state._replace(value=objective, norm=norm, first=first, unseen=unseen)
    otherwise = state.status if goes_on else Status.PRECISION_FLOOR
    end = jnp.where(hides_something(state, tol), otherwise, Status.CONVERGED)
    status = jnp.where(reached, end, state.status)
    finite = jnp.isfinite(norm) & jnp.isfinite(objective)
    status = jnp.where(finite, status, Status.NON_FINITE).astype(jnp.int32)
    return state._replace(status=status)


def hides_something(state: State, tol: Array) -> Array:
    """Whether a decrease of more than `tol` of the objective may be hidden by rounding."""
    return state.unseen > tol * jnp.maximum(state.value, tol)


def after_step(
    state: State,
    theta: Any,
    memory: Any,
    *,
    decrement: Array,
    move: Array,
    passes: Any,
    patience: int,
    stuck: Any = False,
) -> State:
    """The state after a step from the point that `check_convergence` has judged.

    The status is PRECISION_FLOOR if the step is `stuck`, or if `patience` steps in a row have
    lowered neither the objective nor the gradient.
    """
    # Without an optimum every step moves logits by a nat, until the small ridge that a solver adds
    # exceeds the remaining curvature.
    last = jnp.where((state.step > 0) & (state.move > OUTLYING), state.move, 0)
    farthest = jnp.maximum(jnp.where(state.best < NEAR, state.farthest, last), move)
    better = progressed(state.value, state.lowest, state.norm, state.best)
    stalled = jnp.where(better, 0, state.stalled + 1)
    lost = (stalled >= patience) | stuck
    return state._replace(
        theta=theta,
        memory=memory,
        decrement=decrement,
        move=jnp.where(stuck, state.move, move),
        farthest=jnp.where(stuck, state.farthest, farthest),
        lowest=jnp.minimum(state.value, state.lowest),
        best=jnp.minimum(state.norm, state.best),
        stalled=stalled,
        step=state.step + 1,
        passes=state.passes + passes,
        status=jnp.where(lost, Status.PRECISION_FLOOR, state.status).astype(jnp.int32),
    )


def progressed(objective: Any, lowest: Any, norm: Any, best: Any) -> Any:
    """Whether a step decreased the objective by more than rounding, or decreased the gradient."""
    return (objective < lowest - rounding_of(objective)) | (norm < best)


def rounding_of(objective: Any) -> Any:
    """A bound of the rounding error of an objective."""
    return ROUNDINGS * np.finfo(np.result_type(objective)).eps * abs(objective)


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

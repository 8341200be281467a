"""Whether there is an optimum, and when a fit has converged: one rule for every solver.

The objective is convex. It has an optimum where a penalty holds the kernel and every class has
examples, which hold the biases; without a penalty it has one unless the classes are separated,
which `_ending` proves.

A solver sees the objective over the mass of its targets (`_objective.normalised`), so that nothing
below depends on the scale of labels or weights. At a point with the gradient g and the objective f
it has converged where

    max_j |g_j| / (sum_i w_i x_ij^2 / sum_i w_i)^(1/2) <= tol    and    decrement <= tol f,

where `decrement` is half of what a quadratic model of the objective promised for the last step,
-g^T d / 2 for Newton's method. The first part does not depend on the unit of a feature; the second
does not depend on the basis of the features at all, and grows where some of them are nearly
collinear. A point whose objective is above that of the start has not converged, whatever its
gradient; nor one where features are so nearly collinear that rounding hides what the model of the
objective would promise along their difference: that is at the floor of the precision.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax.regression._objective import (
    Data,
    Problem,
    class_scores,
    penalised,
    with_offset,
    without_offset,
)
from softjax.regression._result import Status


def is_penalised(problem: Problem | Data) -> Any:
    """Whether a penalty holds those features whose factor is not 0."""
    penalised = (problem.l2 > 0) | (problem.l1 > 0)
    return penalised if problem.l1_rows is None else penalised | (problem.l1_rows > 0)


def is_loose(problem: Problem | Data) -> Any:
    """Whether no penalty holds the parameters of some features, which may have no optimum then."""
    loose = ~is_penalised(problem)
    return loose if problem.factors is None else loose | jnp.any(problem.factors == 0)


def free(problem: Problem) -> Array:
    """Which features no penalty holds, [1, D + 1], as 0 or 1; the bias is among them."""
    dtype, width = problem.targets.dtype, problem.features.shape[1] + 1
    held = penalised(problem, jnp.ones((1, width), dtype)) > 0
    return jnp.where(held & is_penalised(problem), 0, 1).astype(dtype)


def lacks_examples(problem: Problem) -> Array:
    """Whether a class has no examples: its bias, which no penalty holds, falls for ever."""
    return jnp.any(jnp.sum(problem.targets, 1) == 0) & (problem.constant > 0)


def has_bounded_optimum(problem: Problem) -> Array:
    """Whether a penalty holds the kernel and examples hold the bias."""
    return ~is_loose(problem) & ~lacks_examples(problem)


def is_separated(problem: Problem, logits: Array) -> Array:
    """Whether every example of a hard label has its own class strictly on top, offset or not.

    Then the loss along s * theta falls to 0 as s grows: without a penalty there is no optimum.
    """
    own, scores = problem.targets > 0, without_offset(problem, logits)
    lowest = jnp.min(jnp.where(own, scores, jnp.inf), 0)
    highest = jnp.max(jnp.where(own, -jnp.inf, scores), 0)
    return jnp.all((jnp.sum(own, 0) <= 1) & (lowest > highest))


def status_where_separated(
    problem: Problem, theta: Array, status: Array, separated: Array
) -> Array:
    """SEPARATED or QUASI_SEPARATED in place of the end of a fit that has no optimum.

    The first where parameters that no penalty holds separate the classes, which `theta` does where
    it is `separated`; the second where a class has no examples.
    """
    unbounded = separated & ~is_penalised(problem)
    if problem.factors is not None:
        alone = class_scores(problem, theta * free(problem))
        unbounded |= is_separated(problem, with_offset(problem, alone))
    done = (status == Status.CONVERGED) | (status == Status.PRECISION_FLOOR)
    status = jnp.where(done & lacks_examples(problem), Status.QUASI_SEPARATED, status)
    return jnp.where(unbounded & done, Status.SEPARATED, status).astype(jnp.int32)


# A fit is near its end where the relative gradient is below this. From there on the largest move of
# its steps counts.
NEAR = 1e-4
# Only where its step moves the logits by less, in nats, does a quadratic model say how far away the
# optimum is.
STILL = 0.1
# Logits that are sums over steps are rounded otherwise than those of the parameters, which may move
# a gradient of the size of `tol` by as much: an end is confirmed within this multiple of `tol`.
CONFIRMED = 2
# An objective that changes by no more than this number of roundings has not changed.
ROUNDINGS = 8


class State(NamedTuple):
    """Where a fit stands.

    Attributes:
        theta: the parameters, [K, D + 1].
        memory: what the solver remembers.
        value: the objective at `theta`.
        norm: the gradient at `theta`, relative to what it can be at most.
        decrement: half of what the model promised for the last step, nats.
        move: how far, at most, the last step moved one class of an example against another, nats.
        farthest: the largest such move of all the steps since the gradient has been NEAR.
        strict: whether a fit that still moves by so much has not ended. Where there is no optimum
            every fit does: it ends, and a proof of separation is looked for.
        unseen: how much, at most, may be left where rounding hides the curvature, nats.
        first: the objective at the start.
        lowest: the smallest objective before the last step.
        best: the smallest `norm` before the last step.
        stalled: how many steps have passed without a smaller objective or a smaller gradient.
        step: how many steps were taken.
        passes: products with the features so far.
        status: a number of `Status`.
    """

    theta: Any
    memory: Any
    value: Any
    norm: Any
    decrement: Any
    move: Any
    farthest: Any
    strict: Any
    unseen: Any
    first: Any
    lowest: Any
    best: Any
    stalled: Any
    step: Any
    passes: Any
    status: Any


def initial(theta: Any, memory: Any) -> State:
    """The state before the first step; in NumPy, which has nothing to compile."""
    # Not infinity, at which jax_debug_infs would stop where a solver leaves it in the state.
    largest, zero = np.array(np.finfo(theta.dtype).max), np.int32(0)
    state = State(theta, memory, *[largest] * 10, *[zero] * 4)
    return state._replace(strict=np.bool_(False), unseen=np.zeros((), theta.dtype))


def converged(objective: Any, first: Any, norm: Any, decrement: Any, tol: Any) -> Any:
    """The rule above, for numbers or arrays. An objective below `tol` nats counts as `tol`."""
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
) -> State:
    """The state with what was found at its parameters, and the status that follows from it.

    A solver that `goes_on` has not ended where something is hidden, since its next steps find it.
    """
    first = jnp.where(state.step == 0, objective, state.first)
    at_rest = (state.move < STILL) | ~state.strict | (norm == 0)
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
    """Whether more than `tol` of the objective may be left where rounding hides the curvature."""
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

    PRECISION_FLOOR where the step is `stuck`, or where `patience` steps in turn have lowered
    neither the objective nor the gradient.
    """
    # Where there is no optimum a step moves a nat, until the ridge of a direction outweighs the
    # curvature that is left.
    farthest = jnp.where(state.best < NEAR, jnp.maximum(state.farthest, move), move)
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
    """Whether a step has led to a smaller objective, beyond rounding, or to a smaller gradient."""
    return (objective < lowest - rounding_of(objective)) | (norm < best)


def rounding_of(objective: Any) -> Any:
    """How far rounding may have moved an objective."""
    return ROUNDINGS * np.finfo(np.result_type(objective)).eps * abs(objective)

"""Many fits at once: problems that share their features and differ in targets and penalty.

Each problem is a lane. S slots hold the lanes in progress; when a lane is finished, the next one
takes its slot, so that no lane waits for the slowest. All slots take a step of Newton-CG together:
the features are multiplied with S K columns at once, while each lane has its own step length and
its own end. The lanes start at a nearby optimum, and share a preconditioner that was factored
there once.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from softjax.regression import _loop, _objective, _preconditioner, _standardised
from softjax.regression._descent import NewtonCG, take_step
from softjax.regression._ending import suspected
from softjax.regression._features import Matrix, is_sparse
from softjax.regression._linear_solves import truncated
from softjax.regression._loop import State, check_convergence, hides_something, initial
from softjax.regression._objective import Point, centred
from softjax.regression._problem import Data, Problem
from softjax.regression._result import FitResult, Status
from softjax.regression._standardised import Standardised

# A slot needs the memory of this many arrays of logits. The slots together may fill a cache, or
# need as much memory as the features if that is more: a step reads the features once for all slots.
SLOT_ARRAYS, CACHE_BYTES = 8, 2**24


class Lane(NamedTuple):
    """The data of one lane: its labels, its weights of mean 1, and its penalty."""

    labels: Any
    weights: Any
    l2: Any


class Lanes(NamedTuple):
    """Problems that share their features."""

    data: Data  # the shared data; its `l2` is passed to `lane_of`
    # The features for directions; each lane replaces the ridge by its own.
    standardised: Standardised
    bound: Array  # the largest possible entries of the gradient
    start: Array  # theta [K, D + 1], the start of the lanes
    preconditioner: Any  # at the start; from `_preconditioner`, or a dense inverse Hessian
    sight: Any  # at the start, from `_preconditioner`, to judge what rounding may hide
    least: Array  # a lower bound of the relative curvatures of the Hessians of all lanes
    lane_of: Partial  # the function (l2, number of a lane) -> its `Lane`
    report_of: Partial  # the function (number of a lane, logits) -> additional results of the lane


class Active(NamedTuple):
    """The lanes in progress, each in a slot: arrays [S, ...]."""

    lane: Array  # the number of the lane; B, the count of all lanes, if the slot is empty
    targets: Array  # the targets of its `Problem`
    l2: Array  # the penalty of its `Problem`
    mass: Array  # the divisor of its objective
    state: State  # its state, without a memory
    point: Point  # the `Point` at the parameters of `state`


class Schedule(NamedTuple):
    """The state of all lanes."""

    slots: Active  # the lanes in progress
    following: Array  # the first lane that has not been started
    done: Array  # the number of finished lanes
    # Of the finished lanes, [B, ...]: their fits, their reports, and whether the end of each has to
    # be checked again.
    results: tuple[FitResult, Any, Array]


def begin(lanes: Lanes, count: int, tol: Array) -> Schedule:
    """Empty slots for `count` lanes."""
    size = slot_count(lanes.data.features, len(lanes.start), count)
    slot = jax.eval_shape(lambda: _loaded(lanes, tol, jnp.zeros((), jnp.int32)))
    result = jax.eval_shape(partial(_result, lanes, tol), slot)
    slots = _zeros(size, slot)._replace(lane=jnp.full(size, count, jnp.int32))
    zero = jnp.zeros((), jnp.int32)
    return Schedule(slots, zero, zero, _zeros(count, result))


def slot_count(features: Matrix, num_classes: int, count: int) -> int:
    """The number of lanes, of `count`, that are in progress at once."""
    (examples, width), itemsize = features.shape, features.dtype.itemsize
    entries = features.nse if is_sparse(features) else examples * width
    slot_bytes = SLOT_ARRAYS * num_classes * examples * itemsize
    room = max(CACHE_BYTES, entries * itemsize) // slot_bytes
    return min(max(room, 1), count)


@jax.jit
def advance(lanes: Lanes, work: Schedule, tol: Array, max_steps: Array, rounds: Array) -> Schedule:
    """Takes `rounds` steps in all slots, or fewer if no lane is left."""
    count = len(work.results[0].separated)

    def running(slots):
        going = (slots.state.status == Status.RUNNING) & (slots.state.step < max_steps)
        return (slots.lane < count) & going

    def body(carry):
        work, left = carry
        work = _retire_and_refill(lanes, tol, work, ~running(work.slots))
        slots, left = lax.while_loop(nothing_to_retire(work), stepped, (work.slots, left))
        return work._replace(slots=slots), left

    def nothing_to_retire(work):
        full = work.following >= count

        def going_on(carry):
            slots, left = carry
            is_running, is_empty = running(slots), slots.lane >= count
            return (left > 0) & jnp.any(is_running) & jnp.all(is_running | is_empty & full)

        return going_on

    def stepped(carry):
        slots, left = carry
        step = partial(_stepped, lanes, tol)
        return jax.vmap(step)(slots, running(slots)), left - 1

    def unfinished(carry):
        work, left = carry
        return (left > 0) & (work.done < count)

    return lax.while_loop(unfinished, body, (work, rounds))[0]


def _retire_and_refill(lanes: Lanes, tol: Array, work: Schedule, idle: Array) -> Schedule:
    """Stores the results of the lanes in idle slots, and puts the next lanes into these slots."""
    count, slots = len(work.results[0].separated), work.slots
    place = jnp.where(idle, slots.lane, count)  # a result at `count` is dropped
    results = jax.tree.map(
        lambda all_, new: all_.at[place].set(new, mode="drop"),
        work.results,
        jax.vmap(partial(_result, lanes, tol))(slots),
    )
    done = work.done + jnp.sum(place < count, dtype=jnp.int32)
    number = jnp.cumsum(idle, dtype=jnp.int32)
    lane = jnp.minimum(jnp.where(idle, work.following + number - 1, slots.lane), count)
    fresh = jax.vmap(partial(_loaded, lanes, tol))(lane)
    following = jnp.minimum(work.following + number[-1], count)
    chosen = jax.vmap(lambda *slot: jax.tree.map(partial(jnp.where, slot[0]), *slot[1:]))
    return Schedule(chosen(idle, fresh, slots), following, done, results)


def _loaded(lanes: Lanes, tol: Array, lane: Array) -> Active:
    """A lane at its start; for a number beyond the last lane, a placeholder that is never used."""
    own = lanes.lane_of(lanes.data.l2, lane)
    data = replace(lanes.data, labels=own.labels, weights=own.weights, l2=own.l2)
    problem, mass = data.normalised_problem()
    zeros, logits = jnp.zeros_like(lanes.start), problem.logits(lanes.start)
    of_zeros = problem.with_offset(jnp.zeros_like(logits))
    good = problem.value(lanes.start, logits) <= problem.value(zeros, of_zeros)
    theta, logits = jnp.where(good, lanes.start, 0), jnp.where(good, logits, of_zeros)
    here = _point(problem, theta, logits)
    state = initial(theta, ())._replace(strict=problem.has_bounded_optimum)
    state = _judged(lanes, tol, state, here)
    return Active(lane, problem.targets, problem.l2, mass, state, here)


def _stepped(lanes: Lanes, tol: Array, slot: Active, running: Array) -> Active:
    """A step of a lane that is running."""
    problem, state, here = _problem_in(lanes, slot), slot.state, slot.point
    # With a gradient of 0, conjugate gradients and the line search end at once.
    here = here._replace(gradient=jnp.where(running, here.gradient, 0))
    d, passes = _direction(lanes, problem, here, state.norm)
    d_logits = problem.scores(d)
    slope = jnp.vdot(here.gradient, d)
    state, logits, _ = take_step(
        problem, state, here.logits, d, d_logits, slope, passes + 2, NewtonCG.patience
    )
    there = _point(problem, state.theta, logits)
    return slot._replace(state=_judged(lanes, tol, state, there), point=there)


def _direction(lanes: Lanes, problem: Problem, here: Point, norm: Array) -> tuple[Array, Array]:
    """Newton's direction, with the preconditioner of all lanes and the penalty of this one."""
    s = _of_lane(lanes, problem)
    weights = problem.weights.astype(jnp.float32)
    p = here.probabilities.astype(jnp.float32)
    precondition = partial(_steepest, lanes.preconditioner)
    d, passes = truncated(s, weights, p, here, norm, precondition)
    return centred(d), passes


def _steepest(preconditioner: Any, gradient: Array) -> Array:
    if not isinstance(preconditioner, Array):
        return preconditioner.apply(gradient)
    product = jnp.matmul(preconditioner, gradient.ravel(), precision=lax.Precision.HIGHEST)
    return centred(product.reshape(gradient.shape))


def _point(problem: Problem, theta: Array, logits: Array) -> Point:
    here = problem.point(theta, logits)
    return here._replace(gradient=centred(here.gradient))


def _judged(lanes: Lanes, tol: Array, state: State, here: Point) -> State:
    """Judges a lane as a single fit is judged, but with the bound of all lanes."""
    norm = _objective.relative_norm(here.gradient, lanes.bound)
    unseen = _preconditioner.unseen(lanes.sight, here.gradient, lanes.least)
    return check_convergence(state, here.value, norm, tol, unseen)


def _of_lane(lanes: Lanes, problem: Problem) -> Standardised:
    s = lanes.standardised
    return s._replace(ridge=_standardised.scaled_ridge(problem.ridge, s.scale, s.ridge.dtype))


def _result(lanes: Lanes, tol: Array, slot: Active) -> tuple[FitResult, Any, Array]:
    problem, state, logits = _problem_in(lanes, slot), slot.state, slot.point.logits
    separated = _loop.is_separated(problem.targets, problem.without_offset(logits))
    status = _loop.status_where_separated(problem, state.theta, state.status, separated)
    params = _objective.unpack(state.theta)
    objective = state.value * slot.mass
    fit = FitResult(params, objective, status, state.step, state.passes, state.norm, separated, [])
    hidden = (status == Status.PRECISION_FLOOR) & hides_something(state, tol) & (state.norm <= tol)
    doubtful = hidden | suspected(problem, state, status)
    return fit, lanes.report_of(slot.lane, logits), doubtful


def _problem_in(lanes: Lanes, slot: Active) -> Problem:
    return replace(lanes.data, l2=slot.l2).with_targets(slot.targets)


def _zeros(size: int, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), tree)

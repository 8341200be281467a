"""Many fits at once: problems that share their features and differ in targets and penalty.

Some slots hold the lanes that are worked on; a lane that is done makes room for the next, so that
none waits for the slowest. A step is one of Newton-CG in all slots together: the features are
multiplied with S K columns at once, while each lane has its own step length and its own stop. The
lanes start at an optimum near to theirs, with a preconditioner that was factored there, once for
all of them.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from softjax.regression import _convergence, _objective, _preconditioner, _standardised
from softjax.regression._convergence import (
    State,
    check_convergence,
    hides_something,
    initial,
)
from softjax.regression._descent import take_step
from softjax.regression._ending import suspected
from softjax.regression._features import is_sparse
from softjax.regression._linear_solves import truncated
from softjax.regression._newton import NewtonCG
from softjax.regression._objective import (
    Data,
    Point,
    Problem,
    centred,
    class_scores,
    logits_at,
    value,
    with_offset,
    with_targets,
)
from softjax.regression._result import FitResult, Status
from softjax.regression._standardised import Standardised

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

# A slot takes the place of so many logits of all examples. The slots together take what a cache
# holds or, if that is more, what the features take: these are read once for all of them.
SLOT_ARRAYS, CACHE_BYTES = 8, 2**24


class Lane(NamedTuple):
    """What a lane does not share with others: its labels, weights of mean 1 and penalty."""

    labels: Any
    weights: Any
    l2: Any


class Lanes(NamedTuple):
    """Problems that share their features.

    Attributes:
        data: what they share; `l2` is the penalty of lanes that have none of their own.
        standardised: the features for directions; the ridge is that of each lane.
        bound: of the gradient.
        start: theta [K, D + 1], where the lanes start.
        preconditioner: there; of `_preconditioner`, or a dense inverse Hessian.
        sight: the preconditioner of `_preconditioner`, for what it does not see.
        least: a curvature that the Hessians of all lanes have along all features, relative.
        lane_of: `l2` and a lane's number to its `Lane`.
        report_of: a lane's number and logits to what else is asked of it.
    """

    data: Data
    standardised: Standardised
    bound: Array
    start: Array
    preconditioner: Any
    sight: Any
    least: Array
    lane_of: Partial
    report_of: Partial


class Active(NamedTuple):
    """The lanes that are worked on, each in a slot: arrays [S, ...].

    Attributes:
        lane: the number of the lane; the number of all lanes where the slot is empty.
        targets: the targets of its `Problem`.
        l2: the penalty of its `Problem`.
        mass: what its objective was divided by.
        state: where it stands, without a memory.
        point: what is known at the parameters of `state`.
    """

    lane: Array
    targets: Array
    l2: Array
    mass: Array
    state: State
    point: Point


class Schedule(NamedTuple):
    """Where all lanes stand.

    Attributes:
        slots: what is worked on.
        following: the first lane that has not been started.
        done: the number of lanes that are done.
        results: of the lanes that are done, [B, ...]: their fits, their reports, and which of them
            are to be looked at once more.
    """

    slots: Active
    following: Array
    done: Array
    results: tuple[FitResult, Any, Array]


def begin(lanes: Lanes, count: int, tol: Array) -> Schedule:
    """Empty slots for `count` lanes."""
    size = slot_count(lanes.data.features, len(lanes.start), count)
    slot = jax.eval_shape(lambda: _loaded(lanes, tol, jnp.zeros((), jnp.int32)))
    result = jax.eval_shape(partial(_result, lanes, tol), slot)
    slots = _zeros(size, slot)._replace(lane=jnp.full(size, count, jnp.int32))
    zero = jnp.zeros((), jnp.int32)
    return Schedule(slots, zero, zero, _zeros(count, result))


def slot_count(features: "Array | BCOO", num_classes: int, count: int) -> int:
    """How many of `count` lanes are worked on at once."""
    (examples, width), itemsize = features.shape, features.dtype.itemsize
    entries = features.nse if is_sparse(features) else examples * width
    slot_bytes = SLOT_ARRAYS * num_classes * examples * itemsize
    room = max(CACHE_BYTES, entries * itemsize) // slot_bytes
    return min(max(room, 1), count)


@jax.jit
def advance(lanes: Lanes, work: Schedule, tol: Array, max_steps: Array, rounds: Array) -> Schedule:
    """Takes `rounds` steps in all slots, or fewer where no lane is left."""
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
    """The results of the lanes in the slots that are idle, and the next lanes in these slots."""
    count, slots = len(work.results[0].separated), work.slots
    place = jnp.where(idle, slots.lane, count)  # beyond the last: dropped
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
    return Schedule(jax.vmap(_chosen)(idle, fresh, slots), following, done, results)


def _loaded(lanes: Lanes, tol: Array, lane: Array) -> Active:
    """A lane at its start; a number beyond the last lane gives what is never used."""
    own = lanes.lane_of(lanes.data.l2, lane)
    data = replace(lanes.data, labels=own.labels, weights=own.weights, l2=own.l2)
    data, mass = _objective.normalised(data)
    problem = _objective.problem_of(data)
    zeros, logits = jnp.zeros_like(lanes.start), logits_at(problem, lanes.start)
    of_zeros = with_offset(problem, jnp.zeros_like(logits))
    good = value(problem, lanes.start, logits) <= value(problem, zeros, of_zeros)
    theta, logits = jnp.where(good, lanes.start, 0), jnp.where(good, logits, of_zeros)
    here = _point(problem, theta, logits)
    state = initial(theta, ())._replace(strict=_convergence.has_bounded_optimum(problem))
    state = _judged(lanes, tol, problem, state, here)
    return Active(lane, problem.targets, problem.l2, mass, state, here)


def _stepped(lanes: Lanes, tol: Array, slot: Active, running: Array) -> Active:
    """A step of a lane that is running."""
    problem, state, here = _problem_in(lanes, slot), slot.state, slot.point
    # With a gradient of 0, conjugate gradients and the line search end at once.
    here = here._replace(gradient=jnp.where(running, here.gradient, 0))
    d, passes = _direction(lanes, problem, here, state.norm)
    d_logits = class_scores(problem, d)
    slope = jnp.vdot(here.gradient, d)
    state, logits, _ = take_step(
        problem, state, here.logits, d, d_logits, slope, passes + 2, NewtonCG.patience
    )
    there = _point(problem, state.theta, logits)
    return slot._replace(state=_judged(lanes, tol, problem, state, there), point=there)


def _direction(lanes: Lanes, problem: Problem, here: Point, norm: Array) -> tuple[Array, Array]:
    """Newton's direction, with the preconditioner of all lanes and the penalty of this one."""
    s = _of_lane(lanes, problem)
    weights = _objective.example_weights(problem.targets).astype(jnp.float32)
    p = here.probabilities.astype(jnp.float32)
    precondition = partial(_steepest, lanes.preconditioner)
    d, passes = truncated(s, weights, p, here, norm, precondition)
    return centred(d), passes


def _steepest(preconditioner: Any, gradient: Array) -> Array:
    if not isinstance(preconditioner, Array):
        return _preconditioner.apply(preconditioner, gradient)
    product = jnp.matmul(preconditioner, gradient.ravel(), precision=lax.Precision.HIGHEST)
    return centred(product.reshape(gradient.shape))


def _point(problem: Problem, theta: Array, logits: Array) -> Point:
    here = _objective.point(problem, theta, logits)
    return here._replace(gradient=centred(here.gradient))


def _judged(lanes: Lanes, tol: Array, problem: Problem, state: State, here: Point) -> State:
    """Judges a lane as a single fit is judged, but with the bound of all lanes."""
    norm = _objective.relative_norm(here.gradient, lanes.bound)
    s = _of_lane(lanes, problem)
    unseen = _preconditioner.unseen(s, lanes.sight, here.gradient, lanes.least)
    return check_convergence(state, here.value, norm, tol, unseen)


def _of_lane(lanes: Lanes, problem: Problem) -> Standardised:
    """The standardised features with the penalty of a lane."""
    s = lanes.standardised
    return s._replace(
        ridge=_standardised.scaled_ridge(_objective.ridge(problem), s.scale, s.ridge.dtype)
    )


def _result(lanes: Lanes, tol: Array, slot: Active) -> tuple[FitResult, Any, Array]:
    problem, state, logits = _problem_in(lanes, slot), slot.state, slot.point.logits
    separated = _convergence.is_separated(problem, logits)
    status = _convergence.status_where_separated(problem, state.theta, state.status, separated)
    params = _objective.unpack(state.theta)
    objective = state.value * slot.mass
    fit = FitResult(params, objective, status, state.step, state.passes, state.norm, separated, [])
    hidden = (status == Status.PRECISION_FLOOR) & hides_something(state, tol) & (state.norm <= tol)
    doubtful = hidden | suspected(problem, state, status)
    return fit, lanes.report_of(slot.lane, logits), doubtful


def _problem_in(lanes: Lanes, slot: Active) -> Problem:
    return with_targets(replace(lanes.data, l2=slot.l2), slot.targets)


def _chosen(condition: Array, new: Active, old: Active) -> Active:
    return jax.tree.map(partial(jnp.where, condition), new, old)


def _zeros(size: int, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), tree)

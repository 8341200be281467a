"""Groups of fits that share their features and a penalty: their start, and the loop around them.

In each group one fit to all the data comes first, and the others, the lanes of the group, start at
its optimum. The groups go from the largest penalty to the smallest.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from softjax import _checks
from softjax._descriptions import is_random_key
from softjax._platforms import quickly_compiled, run_where_data_are
from softjax.regression import _batched, _ending, _frame, _preconditioner, _standardised
from softjax.regression._arguments import (
    called,
    error,
    initial_params,
    is_traced,
)
from softjax.regression._batched import Lanes, Schedule
from softjax.regression._features import in_full_precision, is_sparse
from softjax.regression._host_arrays import is_on_host, placed
from softjax.regression._linear_solves import factored_hessian
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import pack, probabilities, uncertainty
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, ManyEvent, Status
from softjax.regression._standardised import Standardised
from softjax.regression._traced import to_the_end

T = TypeVar("T")
MAX_STEPS, ALL = 200, np.iinfo(np.int32).max
# The Hessian of the start is a better preconditioner than its Kronecker product: it needs a third
# of the steps of conjugate gradients. It has (K (D + 1))^2 numbers, and its factorization is only
# worthwhile for enough lanes.
LARGEST_DENSE, DENSE_A_LANE = 1500, 100


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Groups of `count` lanes: all the data, their penalties, and functions that define a lane."""

    data: Data
    lane_of: Partial
    report_of: Partial
    tol: Array
    count: int = field(metadata={"static": True})

    def at(self, l2: Any) -> "Groups":
        """The group of one penalty, for which any number of groups share a program."""
        return replace(self, data=replace(self.data, l2=l2))


# The fit to all the data, the fits of the lanes [B, ...], and their reports [B, ...].
Outcome = tuple[FitResult, FitResult, Any]


@in_full_precision
def run(
    data: Data,
    lane_of: Partial,
    report_of: Partial,
    count: int,
    *,
    tol: float,
    max_steps: int | None,
    callback: Callable[[ManyEvent], bool | None] | None,
    init: SoftmaxRegression | None = None,
) -> list[Outcome]:
    """The outcome of each group of `count` lanes; `data.l2` [G] has the penalties of the groups.

    `tol` and `max_steps` have been checked by `limits`.

    The fits to all the data go from the largest penalty to the smallest, and each starts at the one
    before; the lanes of a group start at its fit to all the data.
    """
    limit = MAX_STEPS if max_steps is None else max_steps
    params = initial_params(init, data.features, data.num_classes, data.constant)
    data, frame = _frame.framed(data, True)
    params = _frame.inside(frame, params)
    tolerance = jnp.asarray(tol, data.features.dtype)
    groups = Groups(data, lane_of, report_of, tolerance, count)
    if is_traced((groups, params)):
        if callback is not None:
            raise error("callback", "None where the data are traced", callback)
        outcomes = _in_a_scan(groups, params, limit)
    else:
        outcomes = _on_the_host(groups, params, limit, callback)

    def of_features(fits: FitResult) -> FitResult:
        params = _frame.expand(frame, fits.params)
        if frame.centre is None:
            return fits._replace(params=params)
        params, moved = _frame.outside(frame.centre, params)
        value = fits.objective / _mean_mass(groups)
        status = _frame.status_outside(fits.status, moved, value, groups.tol)
        return fits._replace(params=params, status=status)

    return [(of_features(whole), of_features(fits), report) for whole, fits, report in outcomes]


@jax.jit
def _mean_mass(groups: Groups) -> Array:
    """The mean over the lanes of the masses by which their objectives were divided."""
    return groups.data.normalised()[1]


def mean_one(weights: Array) -> Array:
    """Weights divided by their mean; zeros if all weights are 0."""
    mean = jnp.mean(weights)
    return weights / jnp.where(mean > 0, mean, 1)


def random_key(seed: ArrayLike) -> Array:
    if is_random_key(seed):
        return seed
    if isinstance(seed, (Array, np.ndarray)) and seed.ndim:  # of `jax.random.PRNGKey`
        if seed.dtype != np.uint32:
            got = f"dtype {seed.dtype} of shape {seed.shape}"
            raise error("seed", "an integer or a key of jax.random", got)
        return jax.random.wrap_key_data(jnp.asarray(seed))
    if not isinstance(seed, Array):
        seed = _checks.integer(called(), "seed", seed)
        if not -(2**63) <= seed < 2**63:
            raise error("seed", "an integer of 64 bits", seed)
    return jax.random.key(seed)


def no_report(*_: Array) -> tuple[()]:
    return ()


class Watch:
    """Reports the number of finished fits to a callback, and remembers whether it has stopped."""

    def __init__(self, callback: Callable[[ManyEvent], bool | None] | None, count: int):
        _checks.refuse_uncallable(called(), "callback", callback)
        self.callback, self.count, self.begin = callback, count, time.perf_counter()
        self.stopped = False
        self.tell(0)

    def tell(self, done: int) -> None:
        self.done, seconds = done, time.perf_counter() - self.begin
        if self.callback is not None and not self.stopped:
            self.stopped = bool(self.callback(ManyEvent(done, self.count, seconds)))

    def counted(self, fits: Iterable[T]) -> Iterator[T]:
        """The fits of an iterable, each reported once it is there."""
        for fit in fits:
            self.tell(self.done + 1)
            yield fit


def _in_a_scan(groups: Groups, params: SoftmaxRegression, limit: int) -> list[Outcome]:
    """Runs all groups inside of a trace, as a `scan`: a loop in Python would trace each group."""

    def of_group(params, l2):
        whole, lanes, work = _begun(groups.at(l2), params, limit)
        work = _batched.advance(lanes, work, groups.tol, limit, ALL)
        fits, report, doubtful = work.results
        doubtful &= fits.status == Status.CONVERGED
        status = jnp.where(doubtful, Status.PRECISION_FLOOR, fits.status).astype(jnp.int32)
        return whole.params, (whole, fits._replace(status=status), report)

    order = jnp.argsort(-groups.data.l2)
    _, outcomes = lax.scan(of_group, params, groups.data.l2[order])
    return [
        jax.tree.map(lambda leaf, place=place: leaf[place], outcomes)
        for place in jnp.argsort(order)
    ]


def _on_the_host(
    groups: Groups,
    params: SoftmaxRegression,
    limit: int,
    callback: Callable[[ManyEvent], bool | None] | None,
) -> list[Outcome]:
    """Runs the groups until `callback` stops them."""
    functions = map(quickly_compiled, (_begun, _batched.advance))
    begun, advance = (partial(run_where_data_are, function) for function in functions)
    count, penalties = groups.count, np.asarray(groups.data.l2)
    order = np.argsort(-penalties, kind="stable")
    outcomes: list[Any] = [None] * len(order)
    watch = Watch(callback, count * len(penalties))
    for done, group in enumerate(order):
        here = groups.at(penalties[group])
        whole, lanes, work = begun(here, params, 0 if watch.stopped else limit)
        while callback is not None and not watch.stopped and work.done < count:
            work = advance(lanes, work, groups.tol, limit, 1)
            watch.tell(done * count + int(work.done))
        # After an interrupt the remaining lanes take no more steps.
        work = advance(lanes, work, groups.tol, 0 if watch.stopped else limit, ALL)
        fits, report, doubtful = work.results
        fits = _with_checked_ends(groups, lanes, fits, np.flatnonzero(doubtful))
        if watch.stopped:
            whole, fits = _called_back(whole), _called_back(fits)
        outcomes[group] = whole, fits, report
        params = whole.params
    return outcomes


def _with_checked_ends(
    groups: Groups, lanes: Lanes, fits: FitResult, doubtful: np.ndarray
) -> FitResult:
    """The fits, in which the status of the doubtful lanes is replaced by that of a final check."""
    status, theta = np.array(fits.status), None
    for lane in doubtful:
        labels, weights, l2 = groups.lane_of(lanes.data.l2, jnp.int32(lane))
        data = replace(lanes.data, labels=labels, weights=weights, l2=l2)
        theta = pack(SoftmaxRegression(fits.params.kernel[lane], fits.params.bias[lane]))
        first = np.inf  # the loop has checked already that no lane ends above its start
        ending = _ending.in_float64(_ending.check, data, theta, first, groups.tol)
        loose = bool(data.is_loose)
        if loose and _ending.in_float64(_ending.quasi_separated, data, theta, np.True_):
            status[lane] = Status.QUASI_SEPARATED
        else:
            settled = ending.converged and not (ending.moving and loose)
            status[lane] = Status.CONVERGED if settled else Status.PRECISION_FLOOR
    return fits._replace(status=jnp.asarray(status)) if len(doubtful) else fits


def _called_back(fits: FitResult) -> FitResult:
    running = fits.status == Status.RUNNING
    return fits._replace(status=jnp.where(running, Status.CALLBACK, fits.status))


@jax.jit
def _begun(
    groups: Groups, params: SoftmaxRegression, max_steps: Any
) -> tuple[FitResult, Lanes, Schedule]:
    """The fit to all the data at one penalty, and the lanes that start there."""
    data, tol = groups.data, groups.tol
    whole, _ = to_the_end("newton-cg", data, params, tol, max_steps, True)
    problem, _ = data.normalised_problem()
    start, bound = pack(whole.params), problem.gradient_bound()
    s = _standardised.standardise(problem, bound)
    weights = problem.weights
    p = probabilities(problem.logits(start))
    small = start.size <= min(LARGEST_DENSE, DENSE_A_LANE * groups.count)
    preconditioner = sight = _preconditioner.build(s, weights, p)
    least = jnp.zeros((), s.ridge.dtype)
    if _preconditioner.is_diagonal(data.features):
        least = _preconditioner.least_curvature(s, uncertainty(weights, p).astype(s.ridge.dtype))
        least = _preconditioner.known_curvature(least)
    if small and not is_sparse(data.features):
        s = s.reweighted(uncertainty(weights, p).astype(jnp.float32))
        preconditioner = _dense(s, weights, p)
    else:
        s = s.rescaled(preconditioner.scales)
    lanes = Lanes(
        replace(data, labels=(), weights=None, count=None),
        s,
        bound,
        start,
        preconditioner,
        sight,
        least,
        groups.lane_of,
        groups.report_of,
    )
    return whole, lanes, _batched.begin(lanes, groups.count, tol)


def _dense(s: Standardised, weights: Array, p: Array) -> Array:
    """The inverse Hessian [K (D + 1), K (D + 1)], from the factor of the exact Newton method."""
    lower, unit = factored_hessian(s, weights.astype(jnp.float32), p.astype(jnp.float32))
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.diag(unit))
    return unit[:, None] * inverse


def stacked(outcomes: list[Outcome]) -> Any:
    """The outcomes of several penalties, stacked; NumPy does it if it can, without compilation."""
    if is_on_host(outcomes):
        return jax.tree.map(lambda *leaves: placed(np.stack(leaves)), *outcomes)
    return _stacked(outcomes)


@jax.jit
def _stacked(outcomes: list[Outcome]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outcomes)

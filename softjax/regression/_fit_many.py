"""Many fits to the same features: label sets, weights or penalties, and the loop around them.

One fit to all the data comes first, and the others, its lanes, start there. It is made for a group
of lanes that share a penalty, the groups from the largest penalty to the smallest.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from softjax import _checks
from softjax.regression import _ending, _frame, _lanes, _metric
from softjax.regression._arguments import (
    FIT,
    at_least,
    class_count,
    class_weights_array,
    constant,
    error,
    factors_array,
    features_array,
    initial_params,
    is_traced,
    labels_array,
    mean_one_weights,
    not_negative,
    offset_array,
    refuse_one_class,
    refuse_sizes,
)
from softjax.regression._directions import factored_hessian
from softjax.regression._lanes import Lane, Lanes, Work
from softjax.regression._metric import Standardised
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import (
    Data,
    example_weights,
    gradient_bound,
    in_full_precision,
    is_loose,
    is_sparse,
    logits_at,
    normalised,
    pack,
    probabilities,
    problem_of,
    uncertainty,
)
from softjax.regression._result import FitResult, Status
from softjax.regression._solve import to_the_end

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

    from softjax.regression._sparse import Features

MAX_STEPS, ALL = 200, np.iinfo(np.int32).max
# The Hessian of the start is a better metric than its Kronecker product: it takes a third of the
# steps of conjugate gradients. It has (K (D + 1))^2 numbers, and has to pay for its factorization.
LARGEST_DENSE, DENSE_A_LANE = 1500, 100


class ManyEvent(NamedTuple):
    """How far many fits have come.

    Attributes:
        done: how many of them are done.
        count: how many there are.
        seconds: since the start, compilation included.

    Example:
        >>> import softjax
        >>> event = softjax.regression.ManyEvent(done=40, count=200, seconds=1.5)
        >>> f"{event.done} of {event.count}"
        '40 of 200'
    """

    done: int
    count: int
    seconds: float


def fit_many(
    features: "Features",
    labels: ArrayLike,
    *,
    l2: ArrayLike = 0.0,
    penalty_factors: ArrayLike | None = None,
    fit_intercept: bool = True,
    tol: float = 1e-6,
    max_steps: int | None = None,
    num_classes: int | None = None,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    init: SoftmaxRegression | None = None,
    callback: Callable[[ManyEvent], bool | None] | None = None,
) -> FitResult:
    """Fits many softmax regressions to the same features, in one go.

        argmin sum_i w_bi loss_bi / sum_i w_bi + l2_b / 2 |kernel_b|^2    for every lane b

    Labels, weights and penalties are those of all lanes or have a leading axis of B lanes, and one
    of them has it at least. Each lane comes to what `fit` comes to. The features are multiplied
    with the parameters of many lanes at once, and the metric of Newton's steps is factored once, at
    the optimum of the mean of the lanes' objectives, where they all start.

    Derivative: not the purpose; `fit` has it.
    Edge cases: those of `fit`, lane by lane: one that is separated stops no other.

    Args:
        features: real [N, D], finite, dense, BCOO or BCSR.
        labels: class indices, integer [N] or [B, N], or a distribution over the classes or counts
            of them, floating [N, K] or [B, N, K].
        l2: >= 0, the strength of the penalty, a scalar or [B].
        penalty_factors: as `fit`, of all lanes.
        fit_intercept: as `fit`, of all lanes.
        tol: as of `fit`; the gradient is relative to what it can be in the mean of the lanes.
        max_steps: of each lane; None for more than enough.
        num_classes: K, of all lanes; None for what the labels show.
        sample_weights: real [N] or [B, N], >= 0, in no lane all 0.
        class_weights: real [K], >= 0.
        offset: real [N, K], nats, of all lanes; as `fit`.
        init: parameters to look for the common start from; None for zeros.
        callback: called with a `ManyEvent` at the start and after every step; True stops.

    Returns:
        `FitResult` of arrays with a leading axis of B lanes.

    Raises:
        TypeError, ValueError: as `fit`.

    Example:
        >>> import numpy as np, softjax
        >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> labels = np.array([[0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
        >>> fits = softjax.regression.fit_many(x, labels, l2=0.1)
        >>> fits.params.kernel.shape, fits.stop_reason
        ((3, 1, 2), ['converged', 'converged', 'converged'])

    Source: as `fit`.
    """
    x = features_array("features", features)
    named = "labels" if num_classes is None else "num_classes"
    y, num_classes = _labels(labels, x.shape[0], num_classes)
    refuse_sizes(named, x, num_classes)
    lanes = Lane(y, _weights(sample_weights, x), penalties(l2, x.dtype))
    shared, stacked = _parted(lanes)
    counts = {len(leaf) for leaf in jax.tree.leaves(stacked)}
    if len(counts) != 1:
        got = f"{sorted(counts)} of them" if counts else "none of them"
        expected = "stacked, or `sample_weights`, or `l2`, each with the same number of lanes"
        raise error("labels", expected, got)
    (count,) = counts
    lane_of = Partial(_lane, shared, stacked)
    mean_labels, median = _middle(lane_of, lanes.l2, x, num_classes=num_classes, count=count)
    class_weights = class_weights_array(class_weights, num_classes, x.dtype)
    ((_, fits, _),) = run(
        Data(
            x,
            mean_labels,
            None,
            class_weights,
            median,
            jnp.zeros((), x.dtype),
            constant=constant(fit_intercept, x.dtype),
            offset=offset_array("offset", offset, x, num_classes),
            factors=factors_array(penalty_factors, x),
        ),
        num_classes,
        lane_of,
        Partial(no_report),
        count,
        tol=tol,
        max_steps=max_steps,
        callback=callback,
        init=init,
    )
    return fits


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "lane_of", "report_of", "tol"),
    meta_fields=("num_classes", "count"),
)
@dataclass(frozen=True)
class Groups:
    """Groups of `count` lanes: all the data, their penalties, and what the lanes are."""

    data: Data
    lane_of: Partial
    report_of: Partial
    tol: Array
    num_classes: int
    count: int


# The fit to all the data, the fits of the lanes and what else was asked of them, all [B, ...].
Outcome = tuple[FitResult, FitResult, Any]


@in_full_precision
def run(
    data: Data,
    num_classes: int,
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

    The fits to all the data go from the largest penalty to the smallest, each from the one before;
    the lanes of a group start at its fit to all the data.
    """
    known_tol = not_negative("tol", tol)
    limit = MAX_STEPS if max_steps is None else at_least("max_steps", max_steps, 0)
    params = initial_params(init, data, num_classes)
    data, frame = _frame.framed(data, True)
    params = _frame.inside(frame, params)
    tolerance = jnp.asarray(known_tol, data.features.dtype)
    groups = Groups(data, lane_of, report_of, tolerance, num_classes, count)
    if is_traced((groups, params)):
        if callback is not None:
            raise error("callback", "None where the data are traced", callback)
        outcomes = _in_a_scan(groups, params, limit)
    else:
        outcomes = _on_the_host(groups, params, limit, callback)

    def of_features(fits: FitResult) -> FitResult:
        params = _frame.turned_back(frame, fits.params)
        if frame.centre is None:
            return fits._replace(params=params)
        params, moved = _frame.outside(frame.centre, params)
        value = fits.objective / _mean_mass(groups)
        status = _frame.status_outside(fits.status, moved, value, groups.tol)
        return fits._replace(params=params, status=status)

    return [(of_features(whole), of_features(fits), report) for whole, fits, report in outcomes]


@jax.jit
def _mean_mass(groups: Groups) -> Array:
    """What the objectives of the lanes were divided by, in the mean of the lanes."""
    return normalised(groups.data, groups.num_classes)[1]


def penalties(l2: ArrayLike, dtype, argument: str = "l2") -> Array:
    """A scalar or [P], finite and >= 0."""
    array = _checks.real_array(FIT, argument, l2)
    if array.ndim > 1 or not array.size:
        raise error(argument, "a scalar or of shape (penalties,)", f"shape {array.shape}")
    values = _checks.known(l2)
    if values is not None:
        bad = ~((values >= 0) & (values < np.inf))
        _checks.refuse_first(FIT, argument, "finite and >= 0", values, bad)
    return array.astype(dtype)


def mean_one(weights: Array) -> Array:
    """Weights over their mean; zeros where all are."""
    mean = jnp.mean(weights)
    return weights / jnp.where(mean > 0, mean, 1)


def no_report(lane: Array, logits: Array) -> tuple[()]:
    return ()


def _in_a_scan(groups: Groups, params: SoftmaxRegression, limit: int) -> list[Outcome]:
    """Inside of a trace, where a loop of Python would be as many programs."""

    def of_group(params, l2):
        whole, lanes, work = _begun(groups, l2, params, limit)
        work = _lanes.advance(lanes, work, groups.tol, limit, ALL)
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
    """As long as `callback` lets it run."""
    begin, count, penalties = time.perf_counter(), groups.count, np.asarray(groups.data.l2)
    total = count * len(penalties)

    def stops(done):
        event = ManyEvent(done, total, time.perf_counter() - begin)
        return callback is not None and bool(callback(event))

    order = np.argsort(-penalties, kind="stable")
    outcomes: list[Any] = [None] * len(order)
    interrupted = stops(0)
    for done, group in enumerate(order):
        whole, lanes, work = _begun(groups, penalties[group], params, 0 if interrupted else limit)
        while callback is not None and not interrupted and work.done < count:
            work = _lanes.advance(lanes, work, groups.tol, limit, 1)
            interrupted = stops(done * count + int(work.done))
        # What is left after an interrupt ends where it stands.
        work = _lanes.advance(lanes, work, groups.tol, 0 if interrupted else limit, ALL)
        fits, report, doubtful = work.results
        fits = _looked_at(groups, lanes, fits, np.flatnonzero(doubtful))
        if interrupted:
            whole, fits = _called_back(whole), _called_back(fits)
        outcomes[group] = whole, fits, report
        params = whole.params
    return outcomes


def _looked_at(groups: Groups, lanes: Lanes, fits: FitResult, doubtful: np.ndarray) -> FitResult:
    """The fits, of which the doubtful ones have converged, or are separated, or are not known."""
    status, theta = np.array(fits.status), None
    for lane in doubtful:
        labels, weights, l2 = groups.lane_of(lanes.data.l2, jnp.int32(lane))
        data = lanes.data._replace(labels=labels, weights=weights, l2=l2)
        theta = pack(SoftmaxRegression(fits.params.kernel[lane], fits.params.bias[lane]))
        first = np.inf  # that no lane ends above its start, the loop has seen
        ending = _ending.look(groups.num_classes, data, theta, first, groups.tol)
        loose = bool(is_loose(data))
        if loose and _ending.is_proven(groups.num_classes, data, theta):
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
    groups: Groups, l2: Array, params: SoftmaxRegression, max_steps: Any
) -> tuple[FitResult, Lanes, Work]:
    """The fit to all the data at one penalty, and the lanes that start there."""
    data, num_classes, tol = groups.data._replace(l2=l2), groups.num_classes, groups.tol
    whole, _ = to_the_end("newton-cg", data, num_classes, params, tol, max_steps, True)
    problem = problem_of(normalised(data, num_classes)[0], num_classes)
    start, bound = pack(whole.params), gradient_bound(problem)
    s = _metric.standardise(problem, bound)
    weights = example_weights(problem.targets)
    p = probabilities(logits_at(problem, start))
    small = start.size <= min(LARGEST_DENSE, DENSE_A_LANE * groups.count)
    metric = sight = _metric.build(_metric.empty(data.features, num_classes), s, weights, p)
    least = jnp.zeros((), s.ridge.dtype)
    if _metric.is_diagonal(data.features):
        least = _metric.least_curvature(s, uncertainty(weights, p).astype(s.ridge.dtype))
        least = _metric.known_curvature(least)
    if small and not is_sparse(data.features):
        s = _metric.reweighted(s, uncertainty(weights, p).astype(jnp.float32))
        metric = _dense(s, weights, p)
    else:
        s = _metric.within(s, metric)
    lanes = Lanes(
        data._replace(labels=(), weights=None, count=None),
        s,
        bound,
        start,
        metric,
        sight,
        least,
        groups.lane_of,
        groups.report_of,
    )
    return whole, lanes, _lanes.begin(lanes, groups.count, tol)


def _dense(s: Standardised, weights: Array, p: Array) -> Array:
    """The inverse Hessian [K (D + 1), K (D + 1)], as exact Newton factors it."""
    lower, unit = factored_hessian(s, weights.astype(jnp.float32), p.astype(jnp.float32))
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.diag(unit))
    return unit[:, None] * inverse


def _labels(labels: ArrayLike, num_examples: int, num_classes: int | None) -> tuple[Array, int]:
    """Labels [N], [B, N], [N, K] or [B, N, K], checked, and K."""
    y = labels if isinstance(labels, Array) else np.asarray(_checks.native(FIT, "labels", labels))
    rank = 2 if jnp.issubdtype(y.dtype, jnp.floating) else 1
    if y.ndim not in (rank, rank + 1) or y.shape[-rank] != num_examples or not y.size:
        n = num_examples
        expected = f"integer of shape ({n},) or (B, {n}), or floating of ({n}, K) or (B, {n}, K)"
        raise error("labels", expected, f"{y.dtype} of shape {y.shape}")
    shape = y.shape
    rows = y.reshape(-1, *shape[len(shape) - rank + 1 :])
    rows = labels_array("labels", rows, len(rows))
    num_classes = class_count("labels", rows, num_classes)
    refuse_one_class(rows, num_classes)
    return rows.reshape(shape), num_classes


def _weights(sample_weights: ArrayLike | None, x: "Array | BCOO") -> Array | None:
    """Weights [N] or [B, N], checked."""
    if sample_weights is None or jnp.ndim(sample_weights) < 2:
        return mean_one_weights(sample_weights, x.shape[0], x.dtype)
    w = _checks.real_array(FIT, "sample_weights", sample_weights)
    _checks.same_shape(FIT, "sample_weights", w, (len(w), x.shape[0]))
    mean_one_weights(w.ravel(), w.size, x.dtype)  # for its checks
    known = _checks.known(w)
    if known is not None and not known.any(-1).all():
        lane = int(np.argmin(known.any(-1)))
        raise error("sample_weights", "> 0 somewhere", f"zeros only in lane {lane}")
    return w.astype(x.dtype)


def _parted(lanes: Lane) -> tuple[Lane, Lane]:
    """What all lanes share, and what is stacked; None in the place of the other."""
    floating = jnp.issubdtype(lanes.labels.dtype, jnp.floating)
    ranks = Lane(3 if floating else 2, 2, 1)
    is_stacked = [a is not None and a.ndim == rank for a, rank in zip(lanes, ranks, strict=True)]
    shared = Lane(*(None if s else a for a, s in zip(lanes, is_stacked, strict=True)))
    stacked = Lane(*(a if s else None for a, s in zip(lanes, is_stacked, strict=True)))
    return shared, stacked


def _lane(shared: Lane, stacked: Lane, _: Array, lane: Array) -> Lane:
    labels, weights, l2 = (
        a if b is None else b[lane] for a, b in zip(shared, stacked, strict=True)
    )
    weights = None if weights is None else mean_one(weights)
    return Lane(labels, weights, l2)


@partial(jax.jit, static_argnames=("num_classes", "count"))
def _middle(
    lane_of: Partial, l2: Array, x: "Array | BCOO", *, num_classes: int, count: int
) -> tuple[Array, Array]:
    """The mean of the weighted labels of all lanes, [N, K], and the median of their penalties, [1].

    Without labels that are out of range, which are to make their own lane NaN and no other.
    """

    def add(lane, total):
        labels, weights, l2 = lane_of(None, lane)
        targets = problem_of(Data(x, labels, weights, None, l2, l2), num_classes).targets
        return total + jnp.where(jnp.isnan(targets), 0, targets)

    zeros = jnp.zeros((num_classes, x.shape[0]), x.dtype)
    total = lax.fori_loop(jnp.int32(0), jnp.int32(count), add, zeros)
    return total.T * (x.shape[0] / count), jnp.atleast_1d(jnp.median(l2))

"""What the fits of many lanes begin with and share, and the loop around their compiled rounds."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.tree_util import Partial
from jax.typing import ArrayLike

from softjax import _checks
from softjax.regression import (
    _arguments,
    _lanes,
    _metric,
    _problem,
    _solve,
    _wide,
)
from softjax.regression._directions import factored_hessian
from softjax.regression._lanes import Lanes, Work
from softjax.regression._metric import Standardised
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data, is_sparse
from softjax.regression._result import FitResult, Status

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

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


def arguments(
    features: "ArrayLike | BCOO",
    labels: ArrayLike,
    l2: ArrayLike,
    num_classes: int | None,
    sample_weights: ArrayLike | None,
    class_weights: ArrayLike | None,
) -> tuple[Data, int]:
    """The data of one fit, checked; `l2` of any number of penalties."""
    x = _arguments.features_array("features", features)
    num_examples = x.shape[0]
    y = _arguments.labels_array("labels", labels, num_examples)
    num_classes = _arguments.class_count("labels", y, num_classes)
    _arguments.refuse_one_class(y, num_classes)
    data = Data(
        x,
        y,
        _arguments.mean_one_weights(sample_weights, num_examples, x.dtype),
        _arguments.class_weights_array(class_weights, num_classes, x.dtype),
        penalties(l2, x.dtype),
        jnp.zeros((), x.dtype),
    )
    return data, num_classes


def penalties(l2: ArrayLike, dtype) -> Array:
    """A scalar or [P], finite and >= 0."""
    array = _checks.real_array(_arguments.FIT, "l2", l2)
    if array.ndim > 1 or not array.size:
        raise _arguments.error("l2", "a scalar or of shape (penalties,)", f"shape {array.shape}")
    values = _checks.known(l2)
    if values is not None:
        bad = ~((values >= 0) & (values < np.inf))
        _checks.refuse_first(_arguments.FIT, "l2", "finite and >= 0", values, bad)
    return array.astype(dtype)


def random_key(seed: ArrayLike) -> Array:
    """A key as it is, or that of an integer."""
    if isinstance(seed, Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    return jax.random.key(seed)


def mean_one(weights: Array) -> Array:
    """Weights over their mean; zeros where all are."""
    mean = jnp.mean(weights)
    return weights / jnp.where(mean > 0, mean, 1)


def no_report(lane: Array, logits: Array) -> tuple[()]:
    return ()


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
    tol = _arguments.not_negative("tol", tol)
    limit = MAX_STEPS if max_steps is None else _arguments.at_least("max_steps", max_steps, 0)
    rotation, x = None, data.features
    params = _arguments.initial_params(init, x.shape[1], num_classes, x.dtype)
    if not is_sparse(x) and _wide.rotation_pays(x):
        x, rotation = _wide.rotate(x)
        data, params = data._replace(features=x), _wide.turned(rotation, params)
    groups = Groups(data, lane_of, report_of, jnp.asarray(tol, x.dtype), num_classes, count)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((groups, params))):
        if callback is not None:
            raise _arguments.error("callback", "None where the data are traced", callback)
        outcomes = _in_a_scan(groups, params, limit)
    else:
        outcomes = _on_the_host(groups, params, limit, callback)
    if rotation is None:
        return outcomes
    return [
        (_turned_back(rotation, whole), _turned_back(rotation, fits), report)
        for whole, fits, report in outcomes
    ]


@jax.jit
def stacked(outcomes: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outcomes)


def _in_a_scan(groups: Groups, params: SoftmaxRegression, limit: int) -> list[Outcome]:
    """Inside of a trace, where a loop of Python would be as many programs."""

    def of_group(params, l2):
        whole, lanes, work = _begun(groups, l2, params, limit)
        work = _lanes.advance(lanes, work, groups.tol, limit, ALL)
        return whole.params, (whole, *work.results)

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
        fits, report = work.results
        if interrupted:
            whole, fits = _called_back(whole), _called_back(fits)
        outcomes[group] = whole, fits, report
        params = whole.params
    return outcomes


def _called_back(fits: FitResult) -> FitResult:
    running = fits.status == Status.RUNNING
    return fits._replace(status=jnp.where(running, Status.CALLBACK, fits.status))


@jax.jit
def _begun(
    groups: Groups, l2: Array, params: SoftmaxRegression, max_steps: Any
) -> tuple[FitResult, Lanes, Work]:
    """The fit to all the data at one penalty, and the lanes that start there."""
    data, num_classes, tol = groups.data._replace(l2=l2), groups.num_classes, groups.tol
    whole = _solve.traced("newton-cg", data, num_classes, params, tol, max_steps, True)
    problem = _problem.problem_of(data, num_classes)
    start, bound = _problem.pack(whole.params), _problem.gradient_bound(problem)
    s = _metric.standardise(problem, bound)
    weights = _problem.example_weights(problem.targets)
    p = _problem.probabilities(_problem.class_scores(data.features, start))
    small = start.size <= min(LARGEST_DENSE, DENSE_A_LANE * groups.count)
    if small and not is_sparse(data.features):
        metric = _dense(s, weights, p)
    else:
        metric = _metric.build(_metric.empty(data.features, num_classes), s, weights, p)
    lanes = Lanes(
        data.features,
        data.class_weights,
        l2,
        s,
        bound,
        start,
        metric,
        groups.lane_of,
        groups.report_of,
    )
    return whole, lanes, _lanes.begin(lanes, groups.count, tol)


@jax.jit
def _turned_back(rotation: _wide.Rotation, fits: FitResult) -> FitResult:
    """Every kernel of a stack in D dimensions, in one product."""
    kernel, bias = fits.params
    columns = jnp.moveaxis(kernel, -2, 0)
    rank, *stack = columns.shape
    stacked = SoftmaxRegression(columns.reshape(rank, -1), bias.ravel())
    turned = _wide.turned_back(rotation, stacked)
    kernel = jnp.moveaxis(turned.kernel.reshape(-1, *stack), 0, -2)
    return fits._replace(params=SoftmaxRegression(kernel, turned.bias.reshape(bias.shape)))


def _dense(s: Standardised, weights: Array, p: Array) -> Array:
    """The inverse Hessian [K (D + 1), K (D + 1)], as exact Newton factors it."""
    lower, unit = factored_hessian(s, weights.astype(jnp.float32), p.astype(jnp.float32))
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.diag(unit))
    return unit[:, None] * inverse

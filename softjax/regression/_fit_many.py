"""fit_many: many fits to the same features, with several sets of labels, weights or penalties."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._labels import numbers_as_classes
from softjax.regression._arguments import (
    called,
    checked_features,
    class_count,
    data_of,
    error,
    errors_name,
    labels_array,
    limits,
    mean_one_weights,
    penalties,
    refuse_one_class,
    refuse_sizes,
)
from softjax.regression._batched import Lane
from softjax.regression._features import Features, Matrix
from softjax.regression._groups import mean_one, no_report, run
from softjax.regression._model import SoftmaxRegression
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, ManyEvent


@on_auto_axes
@errors_name("regression.fit_many")
def fit_many(
    features: Features,
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
    """Fits many softmax regressions to the same features at once.

        argmin sum_i w_bi loss_bi / sum_i w_bi + l2_b / 2 |kernel_b|^2    for every lane b

    Each fit is a lane. Labels, weights and penalties are either shared by all lanes or have a
    leading axis of B lanes; at least one of them has this axis. Each lane has the same optimum as
    `fit`. The features are multiplied with the parameters of many lanes at once, and the
    preconditioner of Newton's steps is factored once, at the optimum of the mean of the lanes'
    objectives, where all lanes start.

    Derivative: not differentiable; `fit` is.
    Edge cases: as in `fit`, for each lane: a separated lane does not stop the others.

    Args:
        features: real [N, D], finite, dense, BCOO or BCSR.
        labels: class indices, integer [N] or [B, N], or a distribution over the classes or counts
            of them, floating [N, K] or [B, N, K].
        l2: >= 0, the strength of the penalty, a scalar or [B].
        penalty_factors: as in `fit`, for all lanes.
        fit_intercept: as in `fit`, for all lanes.
        tol: as in `fit`; the gradient is relative to its largest possible value for the mean of the
            lanes.
        max_steps: the limit of each lane; None for 200.
        num_classes: K, for all lanes; None to take it from the labels.
        sample_weights: real [N] or [B, N], >= 0, not all 0 in any lane.
        class_weights: real [K], >= 0.
        offset: real [N, K], nats, for all lanes; as in `fit`.
        init: parameters at which the search for the common start begins; None for zeros.
        callback: called with a `ManyEvent` at the start and after every step; True stops.

    Returns:
        `FitResult` of arrays with a leading axis of B lanes.

    Raises:
        TypeError, ValueError: as in `fit`.

    Example:
        >>> import numpy as np, softjax
        >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> labels = np.array([[0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
        >>> fits = softjax.regression.fit_many(x, labels, l2=0.1)
        >>> fits.params.kernel.shape, fits.stop_reason
        ((3, 1, 2), ['converged', 'converged', 'converged'])

    Source: as in `fit`.
    """
    x = checked_features(features)
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
    options = class_weights, fit_intercept, offset, penalty_factors
    data = replace(data_of(x, mean_labels, num_classes, *options), l2=median)
    tol, max_steps = limits(tol, max_steps)
    ((_, fits, _),) = run(
        data,
        lane_of,
        Partial(no_report),
        count,
        tol=tol,
        max_steps=max_steps,
        callback=callback,
        init=init,
    )
    return fits


def _labels(labels: ArrayLike, num_examples: int, num_classes: int | None) -> tuple[Array, int]:
    """Labels [N], [B, N], [N, K] or [B, N, K], checked, and K."""
    y = _checks.native(called(), "labels", labels)
    y = y if isinstance(y, Array) else np.asarray(y)
    y = numbers_as_classes(y)
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


def _weights(sample_weights: ArrayLike | None, x: Matrix) -> Array | None:
    """Weights [N] or [B, N], checked."""
    if sample_weights is None or jnp.ndim(sample_weights) < 2:
        return mean_one_weights(sample_weights, x.shape[0], x.dtype)[0]
    w = _checks.real_array(called(), "sample_weights", sample_weights)
    _checks.same_shape(called(), "sample_weights", w, (len(w), x.shape[0]))
    mean_one_weights(w.ravel(), w.size, x.dtype)  # for its checks
    known = _checks.known(w)
    if known is not None and not known.any(-1).all():
        lane = int(np.argmin(known.any(-1)))
        raise error("sample_weights", "> 0 somewhere", f"zeros only in lane {lane}")
    return w.astype(x.dtype)


def _parted(lanes: Lane) -> tuple[Lane, Lane]:
    """The part that all lanes share and the stacked part; each has None for the other's entries."""
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
    lane_of: Partial, l2: Array, x: Matrix, *, num_classes: int, count: int
) -> tuple[Array, Array]:
    """The mean of the weighted labels of all lanes, [N, K], and the median of their penalties, [1].

    Labels out of range are left out: they must make only their own lane NaN.
    """

    def add(lane, total):
        labels, weights, l2 = lane_of(None, lane)
        data = Data(
            num_classes=num_classes, features=x, labels=labels, weights=weights, l2=l2, l1=l2
        )
        targets = data.problem().targets
        return total + jnp.where(jnp.isnan(targets), 0, targets)

    zeros = jnp.zeros((num_classes, x.shape[0]), x.dtype)
    total = lax.fori_loop(jnp.int32(0), jnp.int32(count), add, zeros)
    return total.T * (x.shape[0] / count), jnp.atleast_1d(jnp.median(l2))

"""The summary of a streamed fit, from two passes over the rows at its parameters.

The covariance and the goodness of fit are functions of sums over the rows, whose size is that of
the information matrix. The first pass finds them. The second one finds the largest change of a
logit by Newton's step, which shows whether the parameters are at the optimum.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from softjax import _checks, processes
from softjax._losses import index_loss, index_loss_gradient
from softjax._weights import sums_by_class
from softjax.regression._features import linear
from softjax.regression._loop import STILL
from softjax.regression._model import SoftmaxRegression
from softjax.regression._rows import EXACT, augmented, information
from softjax.regression._steps import Batch
from softjax.regression.inference._covariance import meat_of, sandwich
from softjax.regression.inference._goodness import (
    GoodnessOfFit,
    goodness_of_sums,
    of_class_weights,
)
from softjax.regression.inference._optimum import (
    Hessian,
    NoCovarianceError,
    Sums,
    hessian_of,
    lifted,
)
from softjax.regression.inference._rank import (
    MOST_FEATURES,
    Determined,
    by_moments,
    may_be_collinear,
    num_parameters,
)
from softjax.regression.inference._summary import (
    SUMMARY,
    Summary,
    kind_of_covariance,
    summary_of,
)
from softjax.streaming._passes import Passes
from softjax.streaming._rows import Rows


class _Added(NamedTuple):
    """Sums over the rows with a weight, in float64."""

    information: Any  # [P, P]
    slope: Any  # [D + 1, K]
    # The sum of the outer products of the scores, [P, P]; 0 without class weights.
    meat: Any
    log_likelihood: Any  # without class weights
    counts: Any  # the number of rows of each class, [K]
    second: Any  # sum_i x~_i x~_i^T, x~ = (x, 1), [D + 1, D + 1]


def summary(
    params: SoftmaxRegression,
    rows: Rows,
    left_out: np.ndarray,
    *,
    l2: float,
    class_weighted: bool,
    odds_ratios: bool,
    feature_names: list[str],
    class_names: list[str],
) -> Summary:
    """The result of `inference.summary` for the rows that are not left out, on all processes.

    The weights of the rows are those of their classes if it is `class_weighted`; otherwise they are
    1. The parameters must be at the optimum of `streaming.fit`, or a ValueError is raised.
    """
    dtype = np.dtype(np.float32)
    passes = Passes(rows, len(class_names), l2, np.ones((), dtype), None, left_out, dtype)
    penalty = l2 if l2 > 0 else None
    with jax.enable_x64(True):
        params = SoftmaxRegression(*(jnp.asarray(part, float) for part in params))
        own = (_added(params, chunk, class_weighted) for chunk in passes.chunks())
        total = reduce(_plus, processes.gather(reduce(_plus, own, _Added(*[0.0] * 6))))
        hessian, found = _hessian(params, total, penalty)
        step = np.zeros(total.slope.shape[::-1], dtype)
        step[np.asarray(hessian.classes)[:-1]] = np.asarray(hessian.step).T
        move = passes.move(step)
        if not (hessian.regular and move < STILL):
            got = f"others: the next Newton step changes a logit by {move:.2g} nats"
            raise NoCovarianceError(_checks.message(SUMMARY, "params", "at a regular optimum", got))
        found = Determined(*map(np.asarray, found))
        size = num_parameters(found, 1, len(class_names))
        collinear = penalty is not None and may_be_collinear(found)
        v, fit = _statistics(hessian, total, penalty, size, collinear, class_weighted)
        return summary_of(
            params,
            v,
            fit,
            found,
            kind_of_covariance(False, False, class_weighted, l2),
            feature_names,
            class_names,
            odds_ratios=odds_ratios,
            class_weighted=class_weighted,
        )


@partial(jax.jit, static_argnames="class_weighted")
def _added(params: SoftmaxRegression, batch: Batch, class_weighted: bool) -> _Added:
    x, weights = batch.features.astype(float), batch.weights.astype(float)
    counted = weights > 0
    z, targets = linear(x, *params), batch.labels
    scores = -weights[:, None] * index_loss_gradient(z, targets, None)
    with_one = jnp.where(counted[:, None], augmented(x), 0)
    losses = jnp.where(counted, index_loss(z, targets, None), 0)
    return _Added(
        information(x, z, weights),
        jnp.matmul(with_one.T, scores, precision=EXACT),
        meat_of(x, scores, counted.astype(float), None, 0) if class_weighted else jnp.zeros(()),
        -jnp.sum(losses),
        sums_by_class(targets, counted.astype(float), z.shape[1]),
        jnp.matmul(with_one.T, with_one, precision=EXACT),
    )


def _plus(total: _Added, part: _Added) -> _Added:
    return jax.tree.map(lambda a, b: a + np.asarray(b), total, part)


@jax.jit
def _hessian(
    params: SoftmaxRegression, total: _Added, penalty: float | None
) -> tuple[Hessian, Determined]:
    """The Hessian from the sums, and what features in float32 determine."""
    examples, width = total.second[-1, -1], len(total.second) - 1
    found = Determined(*jnp.ones((2, width), bool))
    if width <= MOST_FEATURES:
        mean = total.second[-1, :-1] / examples
        scatter = total.second[:-1, :-1] / examples - jnp.outer(mean, mean)
        eps = float(np.finfo(np.float32).eps)
        found = by_moments(mean, jnp.diag(scatter), eps, lambda s: scatter / s / s[:, None])
    sums = Sums(total.information, total.slope, examples, found.varies)
    return hessian_of(params, sums, penalty, 1), found


@partial(jax.jit, static_argnames=("collinear", "class_weighted"))
def _statistics(
    hessian: Hessian,
    total: _Added,
    penalty: float | None,
    size: int,
    collinear: bool,
    class_weighted: bool,
) -> tuple[Array, GoodnessOfFit]:
    """The covariance [P, P], and the goodness of fit of `size` parameters."""
    meat = None if penalty is None else hessian.fisher
    if class_weighted:
        others = hessian.classes[:-1]
        blocks = total.meat.reshape(total.slope.shape * 2)
        meat = jnp.take(jnp.take(blocks, others, 1), others, 3).reshape(hessian.inverse.shape)
    v = lifted(sandwich(hessian.inverse, meat, collinear), hessian.classes)
    counts, examples = total.counts, total.second[-1, -1]
    null = jnp.sum(counts * jnp.log(jnp.where(counts > 0, counts, 1) / examples))
    fit = goodness_of_sums(total.log_likelihood, null, counts, True, jnp.asarray(size))
    fit = of_class_weights(fit) if class_weighted else fit
    return v.reshape(total.information.shape), fit

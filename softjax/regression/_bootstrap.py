"""The bootstrap: fits to resampled examples, which run at once like those of `fit_many`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from softjax._auto_axes import on_auto_axes
from softjax.regression._arguments import (
    at_least,
    checked_data,
    error,
    errors_name,
    limits,
    penalties,
)
from softjax.regression._batched import Lane
from softjax.regression._features import Features
from softjax.regression._groups import mean_one, no_report, random_key, run
from softjax.regression._host_arrays import placed
from softjax.regression._model import SoftmaxRegression
from softjax.regression._result import FitResult, ManyEvent
from softjax.regression.inference._estimates import check_level


class Bootstrap(NamedTuple):
    """Fits to resampled examples, and the fit to the original examples.

    Attributes:
        fit: the fit to all examples.
        resamples: the fits to the resamples, stacked [B, ...]; parameters are centred over the
            classes.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> result = softjax.regression.bootstrap(x, y, resamples=20, l2=0.1)
        >>> lower, upper = result.intervals(0.9)
        >>> bool(lower.kernel[0, 1] < result.fit.params.kernel[0, 1] < upper.kernel[0, 1])
        True
    """

    fit: FitResult
    resamples: FitResult

    def __repr__(self) -> str:
        count = Counter(self.resamples.stop_reason)
        reasons = ", ".join(f"{number} {reason}" for reason, number in count.most_common())
        shapes = " and ".join(str(leaf.shape) for leaf in self.resamples.params)
        return f"Bootstrap({count.total()} resamples: {reasons}; parameters {shapes})"

    def standard_errors(self) -> SoftmaxRegression:
        """The standard deviation of each parameter over the resamples."""
        return jax.tree.map(lambda leaf: jnp.std(leaf, 0, ddof=1), self.resamples.params)

    def intervals(self, level: ArrayLike = 0.95) -> tuple[SoftmaxRegression, SoftmaxRegression]:
        """Percentile intervals: quantiles (1 - level) / 2 and (1 + level) / 2 of each parameter."""
        check_level("regression.Bootstrap.intervals", level)
        params = self.resamples.params
        tail = (1 - jnp.asarray(level, params.bias.dtype)) / 2

        def quantile(share):
            return jax.tree.map(lambda leaf: jnp.quantile(leaf, share, 0), params)

        return quantile(tail), quantile(1 - tail)


@on_auto_axes
@errors_name("regression.bootstrap")
def bootstrap(
    features: Features,
    labels: ArrayLike,
    *,
    resamples: int = 200,
    l2: ArrayLike = 0.0,
    seed: ArrayLike = 0,
    penalty_factors: ArrayLike | None = None,
    fit_intercept: bool = True,
    tol: float = 1e-6,
    max_steps: int | None = None,
    num_classes: int | None = None,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    callback: Callable[[ManyEvent], bool | None] | None = None,
) -> Bootstrap:
    """Fits to resamples of the examples: N draws with replacement, as weights of the examples.

        argmin sum_i n_i w_i loss_i / sum_i n_i w_i + l2 / 2 |kernel|^2,  n ~ Multinomial(N, 1 / N)

    Derivative: not differentiable.
    Edge cases: a resample may be separated, or lack a class, even if the examples are not and do
        not. The status of a resample without one of the classes is QUASI_SEPARATED, and `print`
        shows how many have which status. All parameters are finite.

    Args:
        features: real [N, D], finite, dense, BCOO or BCSR.
        labels: class indices, integer [N], or a distribution over the classes, floating [N, K].
        resamples: B, at least 2.
        l2: scalar >= 0, the strength of the penalty.
        seed: an integer or a key of `jax.random`, which determines the resamples.
        penalty_factors: as in `fit`.
        fit_intercept: as in `fit`.
        tol: as in `fit`; the gradient is relative to its largest possible value on all examples.
        max_steps: the limit of each fit; None for 200.
        num_classes: K; as in `fit`.
        sample_weights: real [N], >= 0; they do not change how often a row is drawn, and a row keeps
            its weight.
        class_weights: real [K], >= 0.
        offset: real [N, K], nats; as in `fit`. A row keeps its offset in every resample.
        callback: called with a `ManyEvent` at the start and after every step; True stops.

    Returns:
        `Bootstrap`.

    Raises:
        TypeError, ValueError: as in `fit`.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> result = softjax.regression.bootstrap(x, y, resamples=20, l2=0.1)
        >>> result.resamples.params.kernel.shape, bool(result.resamples.converged.all())
        ((20, 1, 2), True)

    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), sections 6.2
        and 13.3.
    """
    count = at_least("resamples", resamples, 2)
    options = (sample_weights, class_weights, fit_intercept, offset, penalty_factors)
    data = checked_data(features, labels, num_classes, *options)
    data = replace(data, l2=penalties(l2, data.features.dtype))
    if data.l2.ndim:
        raise error("l2", "a scalar", f"shape {data.l2.shape}")
    weights = data.weights
    if weights is None:
        weights = placed(np.ones(data.features.shape[0], data.features.dtype))
    lane_of = Partial(_resample, random_key(seed), data.labels, weights)
    tol, max_steps = limits(tol, max_steps)
    ((whole, fits, _),) = run(
        replace(data, l2=data.l2[None]),
        lane_of,
        Partial(no_report),
        count,
        tol=tol,
        max_steps=max_steps,
        callback=callback,
    )
    return Bootstrap(whole, fits)


def _resample(key: Array, labels: Array, weights: Array, l2: Array, lane: Array) -> Lane:
    weights = resample_counts(key, lane, len(weights)).astype(weights.dtype) * weights
    return Lane(labels, mean_one(weights), l2)


def resample_counts(key: Array, resample: Array, num_examples: int) -> Array:
    """The number of times each example is drawn for a resample, [N]."""
    shape = (num_examples,)
    drawn = jax.random.randint(jax.random.fold_in(key, resample), shape, 0, num_examples)
    return jnp.zeros(shape, jnp.int32).at[drawn].add(1)

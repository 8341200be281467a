"""The bootstrap: how much a fit would vary with other examples."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from softjax.regression import _arguments, _many
from softjax.regression._lanes import Lane
from softjax.regression._many import ManyEvent
from softjax.regression._model import SoftmaxRegression
from softjax.regression._result import FitResult
from softjax.regression.inference._estimates import check_level

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO


class Bootstrap(NamedTuple):
    """Fits to resampled examples, beside the fit to the examples as they are.

    Attributes:
        fit: to all examples.
        resamples: to the resamples, stacked [B, ...]; parameters are centred over the classes.

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


def bootstrap(
    features: "ArrayLike | BCOO",
    labels: ArrayLike,
    *,
    resamples: int = 200,
    l2: ArrayLike = 0.0,
    seed: ArrayLike = 0,
    tol: float = 1e-6,
    max_steps: int | None = None,
    num_classes: int | None = None,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    callback: Callable[[ManyEvent], bool | None] | None = None,
) -> Bootstrap:
    """Fits to resamples of the examples: N draws with replacement, as weights of all examples.

        argmin sum_i n_i w_i loss_i / sum_i n_i w_i + l2 / 2 |kernel|^2,  n ~ Multinomial(N, 1 / N)

    Derivative: not the purpose.
    Edge cases: a resample may be separated, or lack a class, where the examples are not and do
        not; `resamples.status` and `resamples.separated` say so, and the parameters are finite.

    Args:
        features: real [N, D], finite, dense or BCOO.
        labels: class indices, integer [N], or a distribution over the classes, floating [N, K].
        resamples: B, at least 2.
        l2: scalar >= 0, the strength of the penalty.
        seed: an integer or a key of `jax.random`, which determines the resamples.
        tol: as of `fit`; the gradient is relative to what it can be on all the examples.
        max_steps: of each fit; None for more than enough.
        num_classes: K; None for what the labels show.
        sample_weights: real [N], >= 0; a row is drawn as often as others, and keeps its weight.
        class_weights: real [K], >= 0.
        callback: called with a `ManyEvent` at the start and after every step; True stops.

    Returns:
        `Bootstrap`.

    Raises:
        TypeError, ValueError: as `fit`.

    Example:
        >>> import numpy as np, softjax
        >>> x, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> result = softjax.regression.bootstrap(x, y, resamples=20, l2=0.1)
        >>> result.resamples.params.kernel.shape, bool(result.resamples.converged.all())
        ((20, 1, 2), True)

    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), sections 6.2
        and 13.3.
    """
    count = _arguments.at_least("resamples", resamples, 2)
    data, num_classes = _many.arguments(
        features, labels, l2, num_classes, sample_weights, class_weights
    )
    if data.l2.ndim:
        raise _arguments.error("l2", "a scalar", f"shape {data.l2.shape}")
    ones = jnp.ones(data.features.shape[0], data.features.dtype)
    weights = ones if data.weights is None else data.weights
    lane_of = Partial(_resample, _many.random_key(seed), data.labels, weights)
    ((whole, fits, _),) = _many.run(
        data._replace(l2=data.l2[None]),
        num_classes,
        lane_of,
        Partial(_many.no_report),
        count,
        tol=tol,
        max_steps=max_steps,
        callback=callback,
    )
    return Bootstrap(whole, fits)


def _resample(key: Array, labels: Array, weights: Array, l2: Array, lane: Array) -> Lane:
    weights = resample_counts(key, lane, len(weights)).astype(weights.dtype) * weights
    return Lane(labels, _many.mean_one(weights), l2)


def resample_counts(key: Array, resample: Array, num_examples: int) -> Array:
    """How often each example is drawn."""
    shape = (num_examples,)
    drawn = jax.random.randint(jax.random.fold_in(key, resample), shape, 0, num_examples)
    return jnp.zeros(shape, jnp.int32).at[drawn].add(1)

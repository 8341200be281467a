"""Calibration errors and the reliability diagram: predictions in bins of their probability."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._labels import ClassIndices, Labels
from softjax._weights import in_unit, is_zero, sums_by_class
from softjax.calibration._arguments import (
    probabilities_of,
    refuse_no_examples,
    refuse_rows,
    rows,
    targets,
)

T = TypeVar("T")


class ReliabilityDiagram(NamedTuple):
    """The data of a reliability diagram, one entry per bin [M]; NaN in an empty bin.

    Attributes:
        confidence: mean probability of the predicted class.
        accuracy: share of the examples whose predicted class is right.
        weight: the number of examples, or the sum of their weights.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> p = jnp.array([[0.75, 0.25], [0.25, 0.75]])
        >>> softjax.calibration.reliability_diagram(p, jnp.array([0, 0]), num_bins=2).accuracy
        Array([nan, 0.5], dtype=float32)
    """

    confidence: Array
    accuracy: Array
    weight: Array


@on_auto_axes
def reliability_diagram(
    probabilities: ArrayLike,
    labels: Labels,
    *,
    num_bins: int = 15,
    adaptive: bool = False,
    sample_weights: ArrayLike | None = None,
) -> ReliabilityDiagram:
    """Confidence and accuracy of predictions, in bins of the confidence.

        confidence_i = max_k p_ik,  bin m: m / M <= confidence < (m + 1) / M; the last includes 1

    `adaptive` bins have equal numbers of examples instead, except that ties stay together.

    Derivative: not useful, since examples jump between bins.
    Edge cases: the first of several equal probabilities is the prediction; a row of weight 0 is
    left out; under a trace a NaN, or a label out of range, gives NaN in its bin.

    Args:
        probabilities: real [..., K], in [0, 1], rows that sum to 1.
        labels: class indices [...], a distribution [..., K], or TopKLabels; with a distribution,
            the probability of the predicted class is counted as the accuracy of an example.
        num_bins: M >= 1.
        adaptive: whether the bins have equal numbers of examples instead of equal widths.
        sample_weights: real [...], >= 0: weight 2 counts an example twice, weight 0 leaves it out;
            None for equal weights.

    Returns:
        `ReliabilityDiagram` of arrays [M], at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a known label outside
            [0, K), a known row of weight > 0 with a NaN or a sum that is not 1, no rows.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> p = jnp.array([[0.75, 0.25], [0.25, 0.75]])
        >>> softjax.calibration.reliability_diagram(p, jnp.array([0, 0]), num_bins=2).confidence
        Array([ nan, 0.75], dtype=float32)

    Source: A. Niculescu-Mizil and R. Caruana, "Predicting good probabilities with supervised
        learning" (2005), section 4.
    """
    options = (probabilities, labels, num_bins, adaptive, sample_weights)
    return _binned(_reliability_diagram, "reliability_diagram", *options)


@partial(jax.jit, static_argnames=("num_bins", "adaptive"))
def _reliability_diagram(
    p: Array, targets: ClassIndices | Array, w: Array | None, num_bins: int, adaptive: bool
) -> ReliabilityDiagram:
    bins, confidence, right = _placed(p, targets, w, num_bins, adaptive)
    counted, unit = _counted(w, confidence)
    sums = partial(sums_by_class, bins, num_classes=num_bins)
    if w is None:
        weight = sums(jnp.ones(p.shape[:1], jnp.int32)).astype(p.dtype)
        filled = weight
    else:
        weight, filled = sums(w), sums(unit)
    filled = jnp.where(filled > 0, filled, jnp.nan)

    def mean(x):
        return sums(jnp.where(counted, unit * x, 0)) / filled

    return ReliabilityDiagram(mean(confidence), mean(right), weight)


@on_auto_axes
def expected_calibration_error(
    probabilities: ArrayLike,
    labels: Labels,
    *,
    num_bins: int = 15,
    adaptive: bool = False,
    sample_weights: ArrayLike | None = None,
) -> Array:
    """Expected calibration error: the mean distance of confidence and accuracy over the bins.

        ECE = sum_m weight_m / sum_m weight_m |accuracy_m - confidence_m|

    for the predicted class, in the bins of `reliability_diagram`. Sampling noise keeps it above 0,
    more so in small bins: compare errors only at equal numbers of examples and bins.

    Derivative: not useful, since examples jump between bins.
    Edge cases: NaN if all weights are 0; otherwise as for `reliability_diagram`.

    Args:
        probabilities: real [..., K], in [0, 1], rows that sum to 1.
        labels: class indices [...], a distribution [..., K], or TopKLabels.
        num_bins: M >= 1.
        adaptive: whether the bins have equal numbers of examples instead of equal widths.
        sample_weights: real [...], >= 0: weight 2 counts an example twice, weight 0 leaves it out;
            None for equal weights.

    Returns:
        A scalar in [0, 1], at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a known label outside
            [0, K), a known row of weight > 0 with a NaN or a sum that is not 1, no rows.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> p = jnp.array([[0.75, 0.25], [0.25, 0.75]])
        >>> softjax.calibration.expected_calibration_error(p, jnp.array([0, 0]))
        Array(0.25, dtype=float32)

    Source: Guo et al. (2017), eq. (3); M. P. Naeini, G. F. Cooper, M. Hauskrecht (2015).
    """
    options = (probabilities, labels, num_bins, adaptive, sample_weights)
    return _binned(_calibration_error, "expected_calibration_error", *options)


@partial(jax.jit, static_argnames=("num_bins", "adaptive"))
def _calibration_error(
    p: Array, targets: ClassIndices | Array, w: Array | None, num_bins: int, adaptive: bool
) -> Array:
    bins, confidence, right = _placed(p, targets, w, num_bins, adaptive)
    return _mean_gap(bins, right - confidence, w, num_bins)


@on_auto_axes
def classwise_calibration_error(
    probabilities: ArrayLike,
    labels: Labels,
    *,
    num_bins: int = 15,
    adaptive: bool = False,
    sample_weights: ArrayLike | None = None,
) -> Array:
    """Class-wise calibration error: the calibration error of each class, averaged over the classes.

        CW-ECE = 1 / K sum_k sum_m |sum_{i in bin m of class k} w_i (y_ik - p_ik)| / sum_i w_i

    Bin m of class k holds the examples whose probability of class k is in [m / M, (m + 1) / M).
    `expected_calibration_error` measures only the probability of the predicted class; this error
    also measures the probabilities of the other classes. It is small for any model if most
    probabilities are near 0, as with many classes: compare errors only at equal K, N and M.

    Derivative: not useful, since examples jump between bins.
    Edge cases: NaN if all weights are 0; a row of weight 0 is left out; under a trace a NaN gives
    NaN, and so does a label out of range.

    Args:
        probabilities: real [..., K], in [0, 1], rows that sum to 1.
        labels: class indices [...], a distribution [..., K], or TopKLabels.
        num_bins: M >= 1.
        adaptive: whether the bins of a class have equal numbers of examples, except for ties,
            instead of equal widths.
        sample_weights: real [...], >= 0: weight 2 counts an example twice, weight 0 leaves it out;
            None for equal weights.

    Returns:
        A scalar in [0, 2 / K], at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a known label outside
            [0, K), a known row of weight > 0 with a NaN or a sum that is not 1, no rows.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> p = jnp.array([[0.75, 0.25, 0.0], [0.75, 0.0, 0.25]])
        >>> softjax.calibration.classwise_calibration_error(p, jnp.array([0, 0]))
        Array(0.16666667, dtype=float32)

    Source: M. Kull, M. Perello-Nieto, M. Kaengsepp, T. Silva Filho, H. Song, P. Flach, "Beyond
        temperature scaling: obtaining well-calibrated multiclass probabilities with Dirichlet
        calibration" (2019), eq. (2).
    """
    options = (probabilities, labels, num_bins, adaptive, sample_weights)
    return _binned(_classwise_error, "classwise_calibration_error", *options)


@partial(jax.jit, static_argnames=("num_bins", "adaptive"))
def _classwise_error(
    p: Array, targets: ClassIndices | Array, w: Array | None, num_bins: int, adaptive: bool
) -> Array:
    def error(p: Array, y: Array) -> Array:
        return _mean_gap(_bins(p, w, num_bins, adaptive), y - p, w, num_bins)

    return jnp.mean(jax.vmap(error, 1)(p, probabilities_of(targets, p)))


def _mean_gap(bins: Array, gaps: Array, w: Array | None, num_bins: int) -> Array:
    """sum_m |sum over bin m of w gap| / sum w, which divides by no bin's own weight."""
    counted, unit = _counted(w, gaps)
    sums = sums_by_class(bins, jnp.where(counted, unit * gaps, 0), num_bins)
    return jnp.sum(jnp.abs(sums)) / jnp.sum(unit)


def _binned(
    compute: Callable[..., T],
    function: str,
    probabilities: ArrayLike,
    labels: Labels,
    num_bins: int,
    adaptive: bool,
    sample_weights: ArrayLike | None,
) -> T:
    """Checks the arguments and applies `compute` to them."""
    function = f"calibration.{function}"
    probabilities = _checks.real_array(function, "probabilities", probabilities)
    p, w = rows(function, "probabilities", probabilities, sample_weights)
    if not _checks.holds(_is_probability, probabilities):
        values = np.asarray(probabilities)
        outside = ~_is_probability(values)
        _checks.refuse_first(function, "probabilities", "in [0, 1]", values, outside)
    refuse_no_examples(function, "probabilities", probabilities)
    refuse_rows(
        function,
        "probabilities",
        "rows that sum to 1",
        _sums_to_one,
        probabilities,
        sample_weights,
        _sums,
    )
    num_bins = _checks.at_least(function, "num_bins", num_bins, 1)
    adaptive = _checks.flag(function, "adaptive", adaptive)
    y = targets(function, labels, probabilities.shape, p.dtype)
    return compute(p, y, w, num_bins, adaptive)


def _sums(p: np.ndarray) -> np.ndarray:
    return p.sum(-1, dtype=np.float64)


def _counted(w: Array | None, like: Array) -> tuple[Array, Array]:
    """Which examples have a weight above 0, and the weights in a unit in which no sum overflows."""
    if w is None:
        return jnp.ones(like.shape, bool), jnp.ones_like(like)
    return ~is_zero(w), in_unit(w)


def _placed(
    p: Array, targets: ClassIndices | Array, w: Array | None, num_bins: int, adaptive: bool
) -> tuple[Array, Array, Array]:
    """For each example its bin, its confidence, and its accuracy: 0, 1, or a probability."""
    predicted = jnp.argmax(p, -1).astype(jnp.int32)
    confidence = jnp.max(p, -1)
    if isinstance(targets, ClassIndices):
        right = (predicted == targets.index).astype(p.dtype)
        right = _checks.nan_where(targets.bad, right)
    else:
        right = jnp.take_along_axis(targets, predicted[:, None], -1)[:, 0]
    return _bins(confidence, w, num_bins, adaptive), confidence, right


def _bins(x: Array, w: Array | None, num_bins: int, adaptive: bool) -> Array:
    place = _rank_below(x, w, num_bins) if adaptive else x * num_bins
    return jnp.minimum(jnp.where(jnp.isnan(place), 0, place).astype(jnp.int32), num_bins - 1)


def _rank_below(x: Array, w: Array | None, scale: int) -> Array:
    """`scale` times the share of the weight at smaller entries of x; equal for equal entries."""
    order = jnp.argsort(x)
    ranked = x[order]
    # Equal entries get the place of the first of them. (`searchsorted` needs a known length.)
    place = jnp.arange(x.shape[0], dtype=jnp.int32)
    is_new = jnp.concatenate([jnp.ones_like(ranked[:1], bool), ranked[1:] != ranked[:-1]])
    place = lax.cummax(jnp.where(is_new, place, 0))
    place = jnp.zeros_like(place).at[order].set(place)
    if w is None:
        count = jnp.maximum(jnp.sum(jnp.ones(x.shape, jnp.int32)), 1)
        return place.astype(x.dtype) * scale / count.astype(x.dtype)
    below = jnp.concatenate([jnp.zeros(1, w.dtype), jnp.cumsum(in_unit(w)[order])])
    return below[place] * scale / jnp.where(below[-1] == 0, 1, below[-1])


def _is_probability(p: Any) -> Any:
    return ~((p < 0) | (p > 1.001))  # sums of rounded exponentials may exceed 1


def _sums_to_one(p: Any) -> Any:
    """Whether each row sums to 1, but for rounding; also of a row with NaN, which has no sum."""
    # Probabilities of fewer digits are often converted, and texts have three or four digits.
    tolerance = max(1e-3, float(jnp.finfo(p.dtype).eps) ** 0.5)
    return ~(abs(p.astype(np.float32).sum(-1) - 1) > tolerance)

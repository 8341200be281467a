"""Calibration: whether what is predicted with probability p comes true in a share p of cases."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import ClassIndices, Labels, class_indices, distribution, is_class_indices
from softjax._numerics import compute_dtype, inner, maximum
from softjax._reductions import shift
from softjax._sharding import while_loop
from softjax._softmax import softmax_core
from softjax._weights import in_unit, is_zero, shares, sums_by_class

T = TypeVar("T")

__all__ = [
    "ReliabilityDiagram",
    "calibrate_temperature",
    "expected_calibration_error",
    "reliability_diagram",
]

# A bound for the loop, which needs some ten steps.
_MAX_STEPS = 200


class ReliabilityDiagram(NamedTuple):
    """What a reliability diagram shows, one entry a bin [M]; NaN where a bin is empty.

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


def calibrate_temperature(
    logits: ArrayLike, labels: Labels, *, sample_weights: ArrayLike | None = None
) -> Array:
    """The temperature at which softmax(logits / T) explains held-out labels best.

        T = argmin sum_i w_i cross_entropy(x_i / T, y_i)

    In b = 1 / T the loss is convex, with f'(b) = sum_i w_i <Q_i p_i - y_i, x_i>, Q_i = sum_k y_ik:
    at the optimum the logits are expected to be what they are at the labels. Newton's method
    within a bracket finds it. It changes no prediction, only how sure they are.

    Derivative: by the implicit function theorem, of first order, both modes.
    Edge cases: T = 0 where every label has the largest logit of its row: the surer, the better;
    T = inf where no b > 0 does better than equal probabilities, as for a label of logit -inf; NaN
    where every T is as good (equal logits, weights that are all 0), beside NaN or +inf, and for
    a label out of range under a trace. A class of logit -inf keeps probability 0. softmax takes
    T = inf, but not T = 0.

    Args:
        logits: real [..., K], nats; of examples that the model was not fitted to.
        labels: class indices [...], a distribution [..., K], or TopKLabels.
        sample_weights: real [...], >= 0: 2 is the example twice, 0 as if it were not there; None
            for equal weights.

    Returns:
        A scalar, T >= 0, at least float32.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, a known label outside [0, K).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> softjax.calibration.calibrate_temperature(logits, jnp.array([0, 0, 0, 1]))  # 4 / log 3
        Array(3.640957, dtype=float32)

    Source: C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks"
        (2017), section 4.2.
    """
    function = "calibration.calibrate_temperature"
    x, w = _rows(function, "logits", logits, sample_weights)
    targets = _targets(function, labels, jnp.shape(logits), x.dtype)
    return _calibrated_temperature(x, targets, jnp.ones(x.shape[:1], x.dtype) if w is None else w)


def reliability_diagram(
    probabilities: ArrayLike,
    labels: Labels,
    *,
    num_bins: int = 15,
    adaptive: bool = False,
    sample_weights: ArrayLike | None = None,
) -> ReliabilityDiagram:
    """Confidence and accuracy of predictions, in bins of the confidence.

        confidence_i = max_k p_ik,  bin m holds those in [m / M, (m + 1) / M), the last one 1 too

    `adaptive` bins hold the same number of examples each instead, up to ties, which stay together.

    Derivative: none of use, the bins jump.
    Edge cases: the first of equal probabilities is the prediction; a row of weight 0 takes no
    part; a NaN or a label out of range under a trace: NaN in its bin.

    Args:
        probabilities: real [..., K], in [0, 1].
        labels: class indices [...], a distribution [..., K], or TopKLabels: what is right with
            some probability counts as much.
        num_bins: M >= 1.
        adaptive: whether the bins have equal numbers rather than equal widths.
        sample_weights: real [...], >= 0: 2 is the example twice, 0 as if it were not there; None
            for equal weights.

    Returns:
        `ReliabilityDiagram` of arrays [M], at least float32.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, a known label outside [0, K).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> p = jnp.array([[0.75, 0.25], [0.25, 0.75]])
        >>> softjax.calibration.reliability_diagram(p, jnp.array([0, 0]), num_bins=2).confidence
        Array([ nan, 0.75], dtype=float32)

    Source: A. Niculescu-Mizil and R. Caruana, "Predicting good probabilities with supervised
        learning" (2005), section 4.
    """
    return _binned(
        _reliability_diagram,
        "reliability_diagram",
        probabilities,
        labels,
        num_bins,
        adaptive,
        sample_weights,
    )


def expected_calibration_error(
    probabilities: ArrayLike,
    labels: Labels,
    *,
    num_bins: int = 15,
    adaptive: bool = False,
    sample_weights: ArrayLike | None = None,
) -> Array:
    """Expected calibration error: how far confidence is from accuracy, on average over the bins.

        ECE = sum_m weight_m / sum_m weight_m |accuracy_m - confidence_m|

    of the predicted class, in the bins of `reliability_diagram`. Chance keeps it above 0 in small
    bins: compare at equal numbers of examples and bins.

    Derivative: none of use, the bins jump.
    Edge cases: no examples, or all weights 0: 0; else those of `reliability_diagram`.

    Args:
        probabilities: real [..., K], in [0, 1].
        labels: class indices [...], a distribution [..., K], or TopKLabels.
        num_bins: M >= 1.
        adaptive: whether the bins have equal numbers rather than equal widths.
        sample_weights: real [...], >= 0: 2 is the example twice, 0 as if it were not there; None
            for equal weights.

    Returns:
        A scalar in [0, 1], at least float32.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, a known label outside [0, K).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> p = jnp.array([[0.75, 0.25], [0.25, 0.75]])
        >>> softjax.calibration.expected_calibration_error(p, jnp.array([0, 0]))
        Array(0.25, dtype=float32)

    Source: Guo et al. (2017), eq. (3); M. P. Naeini, G. F. Cooper, M. Hauskrecht (2015).
    """
    return _binned(
        _calibration_error,
        "expected_calibration_error",
        probabilities,
        labels,
        num_bins,
        adaptive,
        sample_weights,
    )


@jax.jit
def _calibrated_temperature(x: Array, targets: ClassIndices | Array, w: Array) -> Array:
    """1 / b for the root b of A(b) = C: what the logits cost in the mean is what the labels cost.

        f'(b) = C - A(b),  A(b) = sum_i w_i Q_i <p_i(b), g_i>,  C = sum_i w_i <y_i, g_i>

    with the gaps g_i = max x_i - x_i: sums of terms >= 0. A falls from that of equal probabilities
    to 0, in the end exponentially, so that Newton's method on log A(b) = log C needs few steps.

    The gaps may be of very different sizes, as beside a class that is masked by -1e30. A class of
    gap g counts until b g is some 100. So b starts at 1 / C, b A and b^2 A' are sums of functions
    of u = b g where p is not 0, and no gap is ever squared or divided by another one.
    """
    counted = ~is_zero(w)
    d = jnp.where(counted[:, None], shift(x, maximum(x, (1,))), 0)
    absent = jnp.isneginf(x) & counted[:, None]
    gaps = jnp.where(absent, 0, jnp.minimum(-d, jnp.finfo(d.dtype).max))
    mass, cost = _mass_and_cost(targets, jnp.where(absent, jnp.inf, gaps))
    w = shares(w)
    rows = w * jnp.where(counted, mass, 0)
    cost = jnp.sum(w * jnp.where(counted, cost, 0))
    present = jnp.maximum(jnp.sum((~absent).astype(d.dtype), -1), 1)
    at_equal = jnp.sum(rows * jnp.sum(gaps / present[:, None], -1))
    solvable = (cost > 0) & (at_equal > cost)

    fixed_gaps, fixed_rows, fixed_cost = lax.stop_gradient((gaps, rows, cost))
    info = jnp.finfo(d.dtype)

    def running(state):
        b, previous, _, _, step = state
        return solvable & (jnp.abs(b - previous) > 4 * info.eps * b) & (step < _MAX_STEPS)

    def advance(state):
        b, _, low, high, step = state
        a, decrease = _mean_cost(fixed_gaps, absent, fixed_rows, b)
        label_cost = b * fixed_cost
        low, high = jnp.where(a > label_cost, b, low), jnp.where(a > label_cost, high, b)
        newton = jnp.clip(b * (1 + a / decrease * jnp.log(a / label_cost)), b / 8, b * 8)
        middle = jnp.where(jnp.isinf(high), 8 * b, jnp.sqrt(low) * jnp.sqrt(high))
        middle = jnp.where(low == 0, b / 8, middle)
        inside = (newton > low) & (newton < high)  # False beside NaN
        return jnp.where(inside, newton, middle), b, low, high, step + 1

    zero, infinity = jnp.zeros((), d.dtype), jnp.full((), jnp.inf, d.dtype)
    b = jnp.clip(1 / jnp.where(solvable, fixed_cost, 1), info.tiny, info.max)
    state = (b, zero, zero, infinity, jnp.zeros((), jnp.int32))
    b = while_loop(running, advance, state)[0]

    # One step more, in exact arithmetic of no effect, whose derivative is that of the root.
    a, decrease = _mean_cost(gaps, absent, rows, b)
    step = jnp.where(solvable, a - b * cost, 0) / lax.stop_gradient(
        jnp.where(solvable, decrease, 1)
    )
    temperature = 1 / b / (1 + step)
    # Where `at_equal` is 0, no T is better than another.
    known = (at_equal > 0) & ((cost == 0) | (at_equal <= cost))
    limit = jnp.where(cost == 0, jnp.zeros_like(cost), jnp.inf)
    return _checks.nan_where(~(solvable | known), jnp.where(solvable, temperature, limit))


def _mean_cost(gaps: Array, absent: Array, rows: Array, b: Array) -> tuple[Array, Array]:
    """b A(b) and -b^2 A'(b): the sums of the means of u = b g, and of the variances."""
    p = softmax_core(jnp.where(absent, -jnp.inf, -b * gaps), (1,))
    u = jnp.where(p == 0, 0, b * gaps)
    mean = inner(p, u, (1,))
    variance = jnp.sum(p * jnp.square(u - mean), -1)
    return jnp.sum(rows * mean[:, 0]), jnp.sum(rows * variance)


def _mass_and_cost(targets: ClassIndices | Array, gaps: Array) -> tuple[Array, Array]:
    """sum_k y_ik and sum_k y_ik g_ik, with 0 * inf = 0; NaN at a bad label."""
    if not isinstance(targets, ClassIndices):
        return jnp.sum(targets, -1), jnp.sum(jnp.where(targets == 0, 0, targets * gaps), -1)
    mass = jnp.ones(gaps.shape[:1], gaps.dtype)
    if targets.bad is not None:
        mass = jnp.where(targets.bad, jnp.nan, mass)
    return mass, mass * jnp.take_along_axis(gaps, targets.index[:, None], -1)[:, 0]


def _binned(
    compute: Callable[..., T],
    function: str,
    probabilities: ArrayLike,
    labels: Labels,
    num_bins: int,
    adaptive: bool,
    sample_weights: ArrayLike | None,
) -> T:
    """`compute` of the checked arguments."""
    function = f"calibration.{function}"
    p, w = _rows(function, "probabilities", probabilities, sample_weights)
    if not _checks.holds(_is_probability, probabilities):
        values = np.asarray(probabilities)
        outside = ~_is_probability(values)
        _checks.refuse_first(function, "probabilities", "in [0, 1]", values, outside)
    num_bins = _checks.at_least(function, "num_bins", num_bins, 1)
    adaptive = _checks.flag(function, "adaptive", adaptive)
    targets = _targets(function, labels, jnp.shape(probabilities), p.dtype)
    return compute(p, targets, w, num_bins, adaptive)


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


@partial(jax.jit, static_argnames=("num_bins", "adaptive"))
def _calibration_error(
    p: Array, targets: ClassIndices | Array, w: Array | None, num_bins: int, adaptive: bool
) -> Array:
    """sum_m |sum over bin m of w (right - confidence)| / sum w: no empty bin is divided by 0."""
    bins, confidence, right = _placed(p, targets, w, num_bins, adaptive)
    counted, unit = _counted(w, confidence)
    gaps = sums_by_class(bins, jnp.where(counted, unit * (right - confidence), 0), num_bins)
    total = jnp.sum(unit)
    return jnp.sum(jnp.abs(gaps)) / jnp.where(total == 0, 1, total)


def _counted(w: Array | None, like: Array) -> tuple[Array, Array]:
    """Which examples have a weight, and the weights in a unit in which their sum is finite."""
    if w is None:
        return jnp.ones(like.shape, bool), jnp.ones_like(like)
    return ~is_zero(w), in_unit(w)


def _placed(
    p: Array, targets: ClassIndices | Array, w: Array | None, num_bins: int, adaptive: bool
) -> tuple[Array, Array, Array]:
    """The bin of each example, its confidence, and how right it is: 0, 1, or a probability."""
    predicted = jnp.argmax(p, -1).astype(jnp.int32)
    confidence = jnp.max(p, -1)
    if isinstance(targets, ClassIndices):
        right = (predicted == targets.index).astype(p.dtype)
        right = _checks.nan_where(targets.bad, right)
    else:
        right = jnp.take_along_axis(targets, predicted[:, None], -1)[:, 0]
    place = _rank_below(confidence, w, num_bins) if adaptive else confidence * num_bins
    bins = jnp.minimum(jnp.where(jnp.isnan(place), 0, place).astype(jnp.int32), num_bins - 1)
    return bins, confidence, right


def _rank_below(x: Array, w: Array | None, scale: int) -> Array:
    """The share of the weight at smaller entries of x, out of `scale`; equal for equal entries."""
    order = jnp.argsort(x)
    ranked = x[order]
    # Of equal entries the first one's place; `searchsorted` wants to know how many there are.
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
    return ~((p < 0) | (p > 1.001))  # sums of rounded exponentials may pass 1


def _rows(
    function: str, argument: str, x: ArrayLike, sample_weights: ArrayLike | None
) -> tuple[Array, Array | None]:
    """x as [N, K] and the weights as [N], at least float32; None for equal weights."""
    x = _checks.real_array(function, argument, x)
    if x.ndim == 0 or not x.shape[-1]:
        expected = "of rank >= 1, with classes on the last axis"
        raise ValueError(_checks.message(function, argument, expected, f"shape {x.shape}"))
    dtype = compute_dtype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if sample_weights is None:
        return rows, None
    w = _checks.real_array(function, "sample_weights", sample_weights)
    _checks.same_shape(function, "sample_weights", w, x.shape[:-1])
    _checks.not_negative(function, "sample_weights", sample_weights)
    return rows, w.reshape(-1).astype(dtype)


def _targets(function: str, labels: Labels, shape: tuple[int, ...], dtype) -> ClassIndices | Array:
    """Class indices [N] or distributions [N, K]."""
    if not is_class_indices(labels, function):
        return distribution(function, labels, shape, dtype).reshape(-1, shape[-1])
    _checks.same_shape(function, "labels", labels, shape[:-1])
    index, bad, _ = class_indices(function, labels, shape[-1])
    return ClassIndices(index.reshape(-1), None if bad is None else bad.reshape(-1), None)

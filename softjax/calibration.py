"""Calibration: whether what is predicted with probability p comes true in a share p of cases."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import ClassIndices, Labels, class_indices, distribution, is_class_indices
from softjax._numerics import compute_dtype, inner, maximum, shift
from softjax._softmax import softmax_core

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
        sample_weights: real [...], >= 0; None for equal weights.

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
    return _calibrated_temperature(x, targets, w)


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
        sample_weights: real [...], >= 0; None for equal weights.

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
    return _binned("reliability_diagram", probabilities, labels, num_bins, adaptive, sample_weights)


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
        sample_weights: real [...], >= 0; None for equal weights.

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
    function = "expected_calibration_error"
    bins = _binned(function, probabilities, labels, num_bins, adaptive, sample_weights)
    filled = bins.weight > 0
    gaps = jnp.where(filled, bins.weight * jnp.abs(bins.accuracy - bins.confidence), 0)
    total = jnp.sum(bins.weight)
    return jnp.sum(gaps) / jnp.where(total == 0, 1, total)


@jax.jit
def _calibrated_temperature(x: Array, targets: ClassIndices | Array, w: Array) -> Array:
    """1 / b for the root b of A(b) = C: what the logits cost in the mean is what the labels cost.

        f'(b) = C - A(b),  A(b) = sum_i w_i Q_i <p_i(b), m_i - x_i>,  C = sum_i w_i <y_i, m_i - x_i>

    with m_i = max x_i: sums of terms >= 0. A falls from that of equal probabilities to 0, in the
    end exponentially, so that Newton's method on log A(b) = log C needs few steps.
    """
    d = jnp.where(w[:, None] == 0, 0, shift(x, maximum(x, (1,))))
    # In a unit in which neither squares nor 1 / T overflow.
    unit = lax.stop_gradient(jnp.max(jnp.where(jnp.isneginf(d), 0, -d), initial=0))
    unit = jnp.where(unit > 0, unit, 1)
    d = d / unit
    mass, cost = _mass_and_cost(targets, d)
    rows, cost = w * jnp.where(w == 0, 0, mass), jnp.sum(w * jnp.where(w == 0, 0, cost))
    at_equal, _ = _mean_cost(d, rows, jnp.zeros((), d.dtype))
    solvable = (cost > 0) & (at_equal > cost)

    fixed_d, fixed_rows, fixed_cost = lax.stop_gradient((d, rows, cost))
    eps = jnp.finfo(d.dtype).eps

    def running(state):
        b, previous, _, _, step = state
        return solvable & (jnp.abs(b - previous) > 4 * eps * b) & (step < _MAX_STEPS)

    def advance(state):
        b, _, low, high, step = state
        a, decrease = _mean_cost(fixed_d, fixed_rows, b)
        low, high = jnp.where(a > fixed_cost, b, low), jnp.where(a > fixed_cost, high, b)
        newton = jnp.clip(b + a / decrease * jnp.log(a / fixed_cost), b / 8, b * 8)
        middle = jnp.where(jnp.isinf(high), 8 * b, jnp.sqrt(low) * jnp.sqrt(high))
        middle = jnp.where(low == 0, b / 8, middle)
        inside = (newton > low) & (newton < high)  # False beside NaN
        return jnp.where(inside, newton, middle), b, low, high, step + 1

    zero, infinity = jnp.zeros((), d.dtype), jnp.full((), jnp.inf, d.dtype)
    b = jnp.sum(fixed_rows) / lax.stop_gradient(jnp.where(solvable, at_equal, 1))
    state = (b, zero, zero, infinity, jnp.zeros((), jnp.int32))
    b = lax.while_loop(running, advance, state)[0]

    # One step more, in exact arithmetic of no effect, whose derivative is that of the root.
    a, decrease = _mean_cost(d, rows, b)
    decrease = lax.stop_gradient(jnp.where(solvable, decrease, 1))
    temperature = unit / (b + jnp.where(solvable, a - cost, 0) / decrease)
    limit = jnp.where(cost == 0, 0, jnp.where(at_equal <= cost, jnp.inf, jnp.nan))
    limit = jnp.where(at_equal == 0, jnp.nan, limit)  # no T is better than another
    return jnp.where(solvable, temperature, limit.astype(d.dtype))


def _mean_cost(d: Array, rows: Array, b: Array) -> tuple[Array, Array]:
    """A(b) and -A'(b), for d = x - max x."""
    absent = jnp.isneginf(d)
    p = softmax_core(jnp.where(absent, d, b * d), (1,))
    cost = jnp.where(absent, 0, -d)
    mean = inner(p, cost, (1,))
    variance = jnp.sum(p * jnp.square(cost - mean), -1)
    return jnp.sum(rows * mean[:, 0]), jnp.sum(rows * variance)


def _mass_and_cost(targets: ClassIndices | Array, d: Array) -> tuple[Array, Array]:
    """sum_k y_ik and -sum_k y_ik d_ik, with 0 * inf = 0; NaN at a bad label."""
    if not isinstance(targets, ClassIndices):
        return jnp.sum(targets, -1), jnp.sum(jnp.where(targets == 0, 0, targets * -d), -1)
    mass = jnp.ones(len(d), d.dtype)
    if targets.bad is not None:
        mass = jnp.where(targets.bad, jnp.nan, mass)
    return mass, mass * -jnp.take_along_axis(d, targets.index[:, None], -1)[:, 0]


def _binned(
    function: str,
    probabilities: ArrayLike,
    labels: Labels,
    num_bins: int,
    adaptive: bool,
    sample_weights: ArrayLike | None,
) -> ReliabilityDiagram:
    function = f"calibration.{function}"
    p, w = _rows(function, "probabilities", probabilities, sample_weights)
    if not _checks.holds(_is_probability, probabilities):
        values = np.asarray(probabilities)
        outside = ~_is_probability(values)
        _checks.refuse_first(function, "probabilities", "in [0, 1]", values, outside)
    num_bins = _checks.at_least(function, "num_bins", num_bins, 1)
    targets = _targets(function, labels, jnp.shape(probabilities), p.dtype)
    return _reliability_diagram(p, targets, w, num_bins, bool(adaptive))


@partial(jax.jit, static_argnames=("num_bins", "adaptive"))
def _reliability_diagram(
    p: Array, targets: ClassIndices | Array, w: Array, num_bins: int, adaptive: bool
) -> ReliabilityDiagram:
    predicted = jnp.argmax(p, -1).astype(jnp.int32)
    confidence = jnp.max(p, -1)
    if isinstance(targets, ClassIndices):
        right = (predicted == targets.index).astype(p.dtype)
        right = right if targets.bad is None else jnp.where(targets.bad, jnp.nan, right)
    else:
        right = jnp.take_along_axis(targets, predicted[:, None], -1)[:, 0]
    place = _rank_below(confidence, w, num_bins) if adaptive else confidence * num_bins
    bins = jnp.minimum(jnp.where(jnp.isnan(place), 0, place).astype(jnp.int32), num_bins - 1)

    def total(x):
        return jnp.zeros(num_bins, p.dtype).at[bins].add(jnp.where(w == 0, 0, w * x))

    weight = total(jnp.ones_like(w))
    filled = jnp.where(weight > 0, weight, jnp.nan)
    return ReliabilityDiagram(total(confidence) / filled, total(right) / filled, weight)


def _rank_below(x: Array, w: Array, scale: int) -> Array:
    """The share of the weight at smaller entries of x, out of `scale`; equal for equal entries."""
    order = jnp.argsort(x)
    below = jnp.concatenate([jnp.zeros(1, w.dtype), jnp.cumsum(w[order])])
    total = jnp.where(below[-1] == 0, 1, below[-1])
    return below[jnp.searchsorted(x[order], x)] * scale / total


def _is_probability(p: Any) -> Any:
    return ~((p < 0) | (p > 1.001))  # sums of rounded exponentials may pass 1


def _rows(
    function: str, argument: str, x: ArrayLike, sample_weights: ArrayLike | None
) -> tuple[Array, Array]:
    """x as [N, K] and the weights as [N], at least float32."""
    x = _checks.real_array(function, argument, x)
    if x.ndim == 0 or not x.shape[-1]:
        expected = "of rank >= 1, with classes on the last axis"
        raise ValueError(_checks.message(function, argument, expected, f"shape {x.shape}"))
    dtype = compute_dtype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if sample_weights is None:
        return rows, jnp.ones(len(rows), dtype)
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

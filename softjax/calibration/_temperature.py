"""Temperature scaling: one number that corrects the confidence of a model."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._labels import ClassIndices, Labels
from softjax._numerics import inner, maximum
from softjax._reductions import shift
from softjax._sharding import while_loop
from softjax._softmax_core import softmax_core
from softjax._weights import is_zero, shares
from softjax.calibration._arguments import refuse_no_examples, rows, targets

# Newton's method needs about ten steps; this bounds the loop.
_MAX_STEPS = 200


@on_auto_axes
def calibrate_temperature(
    logits: ArrayLike, labels: Labels, *, sample_weights: ArrayLike | None = None
) -> Array:
    """The temperature at which softmax(logits / T) explains held-out labels best.

        T = argmin sum_i w_i cross_entropy(x_i / T, y_i)

    In b = 1 / T the loss is convex, with f'(b) = sum_i w_i <Q_i p_i - y_i, x_i>, Q_i = sum_k y_ik:
    at the optimum, the mean logit under p equals the mean logit of the labels. Newton's method
    within a bracket finds it. A temperature changes the confidence, but not the predicted class.

    Derivative: by the implicit function theorem, of first order, both modes.
    Edge cases: T = 0 if every label has the largest logit of its row. T = inf if no b > 0 has a
    smaller loss than equal probabilities, for example if a label has logit -inf. NaN if all T have
    the same loss (equal logits, or all weights 0), and, under a trace, for NaN, +inf or a label
    out of range. A class of logit -inf keeps probability 0. softmax accepts T = inf, but not T = 0.

    Args:
        logits: real [..., K], nats, of examples that were not used to fit the model.
        labels: class indices [...], a distribution [..., K], or TopKLabels.
        sample_weights: real [...], >= 0: weight 2 counts an example twice, weight 0 leaves it out;
            None for equal weights.

    Returns:
        A scalar, T >= 0, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a known label outside
            [0, K), a known NaN or +inf in a row whose weight is not 0, no rows.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> softjax.calibration.calibrate_temperature(logits, jnp.array([0, 0, 0, 1]))  # 4 / log 3
        Array(3.640957, dtype=float32)

    Source: C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks"
        (2017), section 4.2.
    """
    function = "calibration.calibrate_temperature"
    logits = _checks.real_array(function, "logits", logits)
    x, w = rows(function, "logits", logits, sample_weights)
    refuse_no_examples(function, "logits", logits)
    y = targets(function, labels, logits.shape, x.dtype)
    return optimal_temperature(x, y, jnp.ones(x.shape[:1], x.dtype) if w is None else w)


@jax.jit
def optimal_temperature(x: Array, targets: ClassIndices | Array, w: Array) -> Array:
    """T = 1 / b for the root b of A(b) = C, where the mean gap under p equals that of the labels.

        f'(b) = C - A(b),  A(b) = sum_i w_i Q_i <p_i(b), g_i>,  C = sum_i w_i <y_i, g_i>

    with the gaps g_i = max x_i - x_i, so that all terms are >= 0. A falls from its value at equal
    probabilities to 0, exponentially for large b, so that Newton's method for log A(b) = log C
    needs few steps.

    The gaps may have very different sizes, for example if a class is masked by -1e30. A class of
    gap g contributes only while b g is below about 100. Therefore b starts at 1 / C, b A and b^2 A'
    are computed as sums of functions of u = b g over the classes whose p is not 0, and no gap is
    squared or divided by another gap.
    """
    counted = ~is_zero(w)
    d = jnp.where(counted[:, None], shift(x, maximum(x, (1,))), 0)
    absent = jnp.isneginf(x) & counted[:, None]
    gaps = jnp.where(absent, 0, jnp.minimum(-d, jnp.finfo(d.dtype).max))
    mass, cost = _mass_and_cost(targets, jnp.where(absent, jnp.inf, gaps))
    w = shares(w)
    masses = w * jnp.where(counted, mass, 0)
    cost = jnp.sum(w * jnp.where(counted, cost, 0))
    present = jnp.maximum(jnp.sum((~absent).astype(d.dtype), -1), 1)
    at_equal = jnp.sum(masses * jnp.sum(gaps / present[:, None], -1))
    solvable = (cost > 0) & (at_equal > cost)

    fixed_gaps, fixed_masses, fixed_cost = lax.stop_gradient((gaps, masses, cost))
    info = jnp.finfo(d.dtype)

    def running(state):
        b, previous, _, _, step = state
        return solvable & (jnp.abs(b - previous) > 4 * info.eps * b) & (step < _MAX_STEPS)

    def advance(state):
        b, _, low, high, step = state
        a, decrease = _mean_cost(fixed_gaps, absent, fixed_masses, b)
        label_cost = b * fixed_cost
        low, high = jnp.where(a > label_cost, b, low), jnp.where(a > label_cost, high, b)
        newton = jnp.clip(b * (1 + a / decrease * jnp.log(a / label_cost)), b / 8, b * 8)
        middle = jnp.where(jnp.isinf(high), 8 * b, jnp.sqrt(low) * jnp.sqrt(high))
        middle = jnp.where(low == 0, b / 8, middle)
        inside = (newton > low) & (newton < high)  # False for NaN
        return jnp.where(inside, newton, middle), b, low, high, step + 1

    zero, infinity = jnp.zeros((), d.dtype), jnp.full((), jnp.inf, d.dtype)
    b = jnp.clip(1 / jnp.where(solvable, fixed_cost, 1), info.tiny, info.max)
    state = (b, zero, zero, infinity, jnp.zeros((), jnp.int32))
    b = while_loop(running, advance, state)[0]

    # In exact arithmetic this last Newton step is 0, but its derivative is that of the root.
    a, decrease = _mean_cost(gaps, absent, masses, b)
    step = jnp.where(solvable, a - b * cost, 0) / lax.stop_gradient(
        jnp.where(solvable, decrease, 1)
    )
    temperature = 1 / b / (1 + step)
    # If `at_equal` is 0, all T have the same loss.
    known = (at_equal > 0) & ((cost == 0) | (at_equal <= cost))
    limit = jnp.where(cost == 0, jnp.zeros_like(cost), jnp.inf)
    return _checks.nan_where(~(solvable | known), jnp.where(solvable, temperature, limit))


def _mean_cost(gaps: Array, absent: Array, masses: Array, b: Array) -> tuple[Array, Array]:
    """b A(b) and -b^2 A'(b): the weighted sums of the means and of the variances of u = b g."""
    p = softmax_core(jnp.where(absent, -jnp.inf, -b * gaps), (1,))
    u = jnp.where(p == 0, 0, b * gaps)
    mean = inner(p, u, (1,))
    variance = jnp.sum(p * jnp.square(u - mean), -1)
    return jnp.sum(masses * mean[:, 0]), jnp.sum(masses * variance)


def _mass_and_cost(targets: ClassIndices | Array, gaps: Array) -> tuple[Array, Array]:
    """sum_k y_ik and sum_k y_ik g_ik, with 0 * inf = 0; NaN for a bad label."""
    if not isinstance(targets, ClassIndices):
        return jnp.sum(targets, -1), jnp.sum(jnp.where(targets == 0, 0, targets * gaps), -1)
    mass = jnp.ones(gaps.shape[:1], gaps.dtype)
    if targets.bad is not None:
        mass = jnp.where(targets.bad, jnp.nan, mass)
    return mass, mass * jnp.take_along_axis(gaps, targets.index[:, None], -1)[:, 0]

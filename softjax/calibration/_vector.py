"""Vector scaling: a scale and a bias for the logits of each class."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.linalg import cho_factor, cho_solve
from jax.typing import ArrayLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._labels import Labels
from softjax._log_softmax_core import log_softmax_core
from softjax._sharding import while_loop
from softjax._weights import is_zero, power_of_two, shares, significand_and_exponent
from softjax.calibration._arguments import (
    probabilities_of,
    refuse_no_examples,
    rows,
    targets,
)
from softjax.calibration._temperature import optimal_temperature

# Newton's method needs about ten steps. Without an optimum, each step divides the loss by about e,
# until rounding spoils the Hessian.
_MAX_STEPS = 100
# The line search halves the step until the loss falls by this share of the decrease that its slope
# predicts.
_ARMIJO, _MAX_HALVINGS = 1e-4, 30
# A penalty holds all scales nearer to 1 than this.
_FARTHEST = 1e12


class VectorScaling(NamedTuple):
    """A scale and a bias for each class, a pytree.

    Attributes:
        scale: [K].
        bias: [K], nats; its sum is 0.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> scaling = softjax.calibration.VectorScaling(jnp.array([2.0, 1.0]), jnp.zeros(2))
        >>> scaling.logits(jnp.array([3.0, -jnp.inf]))
        Array([  6., -inf], dtype=float32)
    """

    scale: Array
    bias: Array

    def logits(self, logits: ArrayLike) -> Array:
        """The calibrated logits, scale * logits + bias [..., K]; -inf stays -inf."""
        x = _checks.real_array("calibration.VectorScaling.logits", "logits", logits)
        absent = jnp.isneginf(x)
        return jnp.where(absent, -jnp.inf, self.scale * jnp.where(absent, 0, x) + self.bias)


@on_auto_axes
def calibrate_vector(
    logits: ArrayLike,
    labels: Labels,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
) -> VectorScaling:
    """The scale and bias of each class at which softmax explains held-out labels best.

        argmin sum_i w_i cross_entropy(s x_i + b, y_i) / sum_i w_i + l2 / 2 (|s - 1|^2 + |b|^2)

    The objective is convex in s and b. Newton's method with a line search starts at the optimal
    temperature, s = 1 / T and b = 0, so that without a penalty the loss is never above the loss of
    temperature scaling. Unlike a temperature, the result changes if a constant is added to all
    logits of a row, and it may change predictions. A step takes N K^2 operations and a K x K
    matrix.

    Derivative: by the implicit function theorem, of first order, both modes.
    Edge cases: without a penalty there is no optimum if some scales and biases separate a class
    from the others, for example a class without examples. The scales and biases are then finite,
    but so large that the loss is near its infimum; l2 > 0 keeps them small. NaN if all weights are
    0, for a label of logit -inf, and, under a trace, for NaN, +inf or a label out of range. A
    class of logit -inf keeps probability 0. Do not write a large finite number, such as -1e9, for
    it: the other logits of the class would lose digits beside it.

    Args:
        logits: real [..., K], nats, of examples that were not used to fit the model.
        labels: class indices [...], a distribution [..., K], or TopKLabels.
        l2: scalar >= 0, the strength of the penalty, which is 0 for unchanged logits.
        sample_weights: real [...], >= 0: weight 2 counts an example twice, weight 0 leaves it out;
            None for equal weights.

    Returns:
        `VectorScaling`, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a known label outside
            [0, K), a known NaN or +inf in a row whose weight is not 0, no rows.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> logits = jnp.array([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0], [0.0, -1.0]])
        >>> labels = jnp.array([1, 0, 0, 0, 1])
        >>> scaling = softjax.calibration.calibrate_vector(logits, labels)
        >>> softjax.softmax(scaling.logits(logits))[::2, 1].round(3)
        Array([0.5  , 0.333, 0.333], dtype=float32)

    Source: C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks"
        (2017), section 4.2.
    """
    function = "calibration.calibrate_vector"
    logits = _checks.real_array(function, "logits", logits)
    x, w = rows(function, "logits", logits, sample_weights)
    refuse_no_examples(function, "logits", logits)
    strength = _checks.not_negative_scalar(function, "l2", l2, x.dtype)
    y = probabilities_of(targets(function, labels, logits.shape, x.dtype), x)
    return _scaled(x, y, jnp.ones(x.shape[:1], x.dtype) if w is None else w, strength)


@jax.jit
def _scaled(x: Array, y: Array, w: Array, l2: Array) -> VectorScaling:
    """Newton's method for theta = (u s, c), where c are the biases of centred logits: b = c - s m.

    m is the mean of the logits of each class. They are divided by u, a power of two near the
    largest logit of the class, since the Hessian has their squares, which may overflow.
    """
    counted = ~is_zero(w)
    absent = jnp.isneginf(x) & counted[:, None]
    x = jnp.where(counted[:, None] & ~absent, x, 0)
    y, shares_of_rows = jnp.where(counted[:, None], y, 0), shares(w)
    impossible = jnp.any(absent & (y > 0))
    unit = lax.stop_gradient(_units(x))
    scaled = x / unit[None]
    mean = lax.stop_gradient(shares_of_rows @ scaled)
    problem = _Problem(scaled, y, shares_of_rows, absent, mean, unit, l2)
    start = _start(*lax.stop_gradient((problem, x)), w)
    theta = _minimum(lax.stop_gradient(problem), start)
    # The derivative of this last step is the derivative of the optimum.
    gradient, hessian = _derivatives(problem, theta)
    step = _solved(lax.stop_gradient(hessian), gradient)
    # Without an optimum the Hessian may be singular. A step that does not lower the objective is
    # used only for its derivative.
    better = _value(problem, theta - step) <= _value(problem, theta)
    theta = theta - jnp.where(better, step, step - lax.stop_gradient(step))
    scale, bias = theta[0] / unit, _centred_bias(problem, theta)
    unknown = impossible | (jnp.sum(shares_of_rows) == 0)
    return VectorScaling(*(_checks.nan_where(unknown, part) for part in (scale, bias)))


class _Problem(NamedTuple):
    """The data: x / u, labels, `absent` [N, K], weights [N] that sum to 1, mean and u [K], l2."""

    x: Array
    y: Array
    w: Array
    absent: Array
    mean: Array
    unit: Array
    l2: Array


def _units(x: Array) -> Array:
    """A power of two near the largest logit of each class, [K]; 1 / u^2 does not overflow."""
    _, exponent = significand_and_exponent(jnp.max(jnp.abs(x), 0, initial=0))
    largest = jnp.finfo(x.dtype).maxexp
    return power_of_two(jnp.clip(exponent, -(3 * largest // 8), 3 * largest // 4))


def _start(problem: _Problem, x: Array, w: Array) -> Array:
    """u s for s = 1 / T of the optimal temperature, or 1 / max |x| for T = 0, and its c, [2, K]."""
    temperature = optimal_temperature(jnp.where(problem.absent, -jnp.inf, x), problem.y, w)
    largest = jnp.max(jnp.abs(x), initial=0)
    inverse = 1 / jnp.where(largest > 0, largest, 1)
    scale = jnp.where(temperature > 0, 1 / temperature, inverse)
    scale = jnp.where(jnp.isfinite(scale), scale, 0) * problem.unit
    return jnp.stack([scale, scale * problem.mean])


def _log_probabilities(problem: _Problem, theta: Array) -> Array:
    z = theta[:1] * (problem.x - problem.mean[None]) + theta[1:]
    return log_softmax_core(jnp.where(problem.absent, -jnp.inf, z), (1,))


def _centred_bias(problem: _Problem, theta: Array) -> Array:
    """b = c - s m minus its mean over the classes, which is 0 at the optimum for any l2 > 0."""
    bias = theta[1] - theta[0] * problem.mean
    return bias - jnp.mean(bias)


def _change(problem: _Problem, theta: Array) -> Array:
    """s - 1 for the penalty; it is bounded, so that l2 times its square is 0 if l2 is 0."""
    return jnp.clip(theta[0] / problem.unit - 1, -_FARTHEST, _FARTHEST)


def _value(problem: _Problem, theta: Array) -> Array:
    """The objective at centred biases: adding a constant to all biases changes no probability."""
    log_p, y = _log_probabilities(problem, theta), problem.y
    losses = -jnp.sum(jnp.where(y == 0, 0, y * log_p), 1)
    change = jnp.square(_change(problem, theta)) + jnp.square(_centred_bias(problem, theta))
    return jnp.sum(problem.w * losses) + problem.l2 / 2 * jnp.sum(change)


def _derivatives(problem: _Problem, theta: Array) -> tuple[Array, Array]:
    """Gradient [2, K] and Hessian [2 K, 2 K] of the objective.

    d / dz_k = Q p_k - y_k,    d^2 / dz_k dz_j = Q p_k ((k = j) - p_j),    Q = sum_k y_k

    1 - p_k is computed separately, since p_k rounds to 1 if the model is confident. Adding a
    constant to all biases changes no probability, so that the Hessian is singular along a vector v.
    A multiple of v v^T is added to it, which changes no step.
    """
    y, w, mean, unit, l2 = problem.y, problem.w[:, None], *problem[-3:]
    log_p = _log_probabilities(problem, theta)
    p, others = jnp.exp(log_p), -jnp.expm1(log_p)
    mass, k = jnp.sum(y, 1, keepdims=True), len(mean)
    slope, centred = w * ((mass - y) * p - y * others), problem.x - mean[None]
    bias = _centred_bias(problem, theta)
    gradient = jnp.stack([jnp.sum(slope * centred, 0), jnp.sum(slope, 0)])
    gradient += l2 * jnp.stack([_change(problem, theta) / unit - bias * mean, bias])

    q = w * mass * p
    crossed = jnp.sum(q * others * centred, 0) - l2 * mean
    blocks = [
        [jnp.sum(q * others * centred**2, 0) + l2 * (unit**-2 + mean**2), crossed],
        [crossed, jnp.sum(q * others, 0) + l2],
    ]
    own = jnp.block([[jnp.diag(part) for part in line] for line in blocks])
    half = jnp.concatenate([p * centred, p], 1)
    mixed = jnp.matmul((w * mass * half).T, half, precision=lax.Precision.HIGHEST)
    mixed = jnp.where(jnp.tile(jnp.eye(k, dtype=bool), (2, 2)), 0, mixed)
    of_bias = jnp.concatenate([-mean, jnp.ones_like(mean)])
    v = jnp.repeat(jnp.array([0, 1], p.dtype), k)
    hessian = own - mixed - l2 / k * jnp.outer(of_bias, of_bias)
    return gradient, hessian + (jnp.sum(w * mass) + l2) / k**2 * jnp.outer(v, v)


def _solved(hessian: Array, gradient: Array) -> Array:
    """H^-1 g by the Cholesky factor of the Hessian, scaled to a unit diagonal.

    A ridge of a few roundings makes the factor exist if the objective does not change along some
    direction, for example if all logits of a class are equal. The step has no part along it.
    """
    diagonal = jnp.diag(hessian)
    root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    ridge = 4 * len(root) ** 0.5 * jnp.finfo(root.dtype).eps
    unit = hessian / root[:, None] / root[None] + ridge * jnp.eye(len(root), dtype=root.dtype)
    return (cho_solve(cho_factor(unit), gradient.ravel() / root) / root).reshape(gradient.shape)


def _minimum(problem: _Problem, start: Array) -> Array:
    """Newton's method with a line search, until the predicted gain of a step is below rounding."""
    eps = jnp.finfo(start.dtype).eps

    def running(state: tuple[Array, Array, Array, Array]) -> Array:
        _, value, gain, step = state
        return (gain > eps * value) & (value > eps) & (step < _MAX_STEPS)

    def advance(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        theta, value, _, step = state
        gradient, hessian = _derivatives(problem, theta)
        direction = _solved(hessian, gradient)
        gain = jnp.sum(gradient * direction)

        def too_long(state: tuple[Array, Array, Array]) -> Array:
            t, reached, halvings = state
            enough = reached <= value - _ARMIJO * t * gain + eps * value
            return ~enough & (halvings < _MAX_HALVINGS)

        def halved(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            t, _, halvings = state
            return t / 2, _value(problem, theta - t / 2 * direction), halvings + 1

        whole = (jnp.ones_like(value), _value(problem, theta - direction), jnp.zeros_like(step))
        t, reached, _ = while_loop(too_long, halved, whole)
        better = reached <= value + eps * value  # False for NaN
        theta = jnp.where(better, theta - t * direction, theta)
        return theta, jnp.where(better, reached, value), jnp.where(better, gain, 0), step + 1

    value = _value(problem, start)
    state = (start, value, jnp.full_like(value, jnp.inf), jnp.zeros((), jnp.int32))
    return while_loop(running, advance, state)[0]

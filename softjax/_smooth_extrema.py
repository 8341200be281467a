"""smooth_max and smooth_min, which are RealSoftMax with a temperature, and their bounds."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._checks import Axis
from softjax._logsumexp import logsumexp_core
from softjax._numerics import compute_dtype, masked, maximum, reduced
from softjax._softmax import tempered


def smooth_max(
    x: ArrayLike,
    axis: Axis = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Smooth maximum (RealSoftMax): convex, differentiable, never below the maximum.

        y = T log sum_i exp(x_i / T),     max x <= y <= max x + T log n

    With lambda = 1 / T this is the textbook's lambda^-1 RealSoftMax(lambda a, lambda b): it falls
    to the maximum as T -> 0.

    Derivative: dy/dx = softmax(x / T), dy/dT = entropy of softmax(x / T). Both modes, any order.
    Edge cases: as for logsumexp; in a row of -inf, dy/dT is 0 too.

    Args:
        x: real, any shape.
        axis: axis or axes to reduce; None for all.
        where: booleans that broadcast to `x`; False leaves the entry out.
        keepdims: keep the reduced axes with size 1.
        temperature: scalar T > 0 in the units of `x`, may be traced.

    Returns:
        `x` without `axis`, in the units and the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis, or T <= 0.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.smooth_max(jnp.array([2.0, 4.0]), temperature=0.1)
        Array(4., dtype=float32)

    Source: A. Zhang et al., "Dive into Deep Learning", section 4.1, exercise 5 (RealSoftMax);
        S. Boyd, L. Vandenberghe, "Convex Optimization" (2004), section 3.1.5.
    """
    return _smooth_max("smooth_max", x, axis, where, keepdims, temperature)


def smooth_min(
    x: ArrayLike,
    axis: Axis = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Smooth minimum: concave, differentiable, never above the minimum.

        y = -T log sum_i exp(-x_i / T),     min x - T log n <= y <= min x

    Derivative: dy/dx = softmin(x / T), dy/dT = -(entropy of softmin(x / T)).
    Edge cases: as for smooth_max at -x; if `where` masks every entry, the result is +inf.

    Args:
        x: real, any shape.
        axis: axis or axes to reduce; None for all.
        where: booleans that broadcast to `x`; False leaves the entry out.
        keepdims: keep the reduced axes with size 1.
        temperature: scalar T > 0 in the units of `x`, may be traced.

    Returns:
        `x` without `axis`, in the units and the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis, or T <= 0.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.smooth_min(jnp.array([2.0, 4.0]), temperature=0.1)
        Array(2., dtype=float32)

    Source: see smooth_max, with min x = -max(-x).
    """
    negated = -_checks.real_array("smooth_min", "x", x)
    return -_smooth_max("smooth_min", negated, axis, where, keepdims, temperature)


def smooth_max_bounds(
    x: ArrayLike,
    axis: Axis = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    temperature: ArrayLike = 1.0,
) -> tuple[Array, Array]:
    """Lower and upper bounds of smooth_max; the upper bound is reached if all entries are equal.

        max x <= smooth_max(x) <= max x + T log n

    Derivative: the derivative of max for the lower bound, and of max x + T log n for the upper one.
    Edge cases: if `where` masks every entry, the bounds are (-inf, -inf).

    Args:
        x: real, any shape.
        axis: axis or axes to reduce; None for all.
        where: booleans that broadcast to `x`; n is the number of entries that are not masked.
        keepdims: keep the reduced axes with size 1.
        temperature: scalar T > 0 in the units of `x`, may be traced.

    Returns:
        (lower, upper), each `x` without `axis`, in the units and the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis, or T <= 0.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.smooth_max_bounds(jnp.array([2.0, 4.0]), temperature=0.5)
        (Array(4., dtype=float32), Array(4.3465734, dtype=float32))

    Source: Boyd and Vandenberghe (2004), section 3.1.5.
    """
    options = axis, where, keepdims, temperature
    axes, keepdims, x, where, scalar = _checked("smooth_max_bounds", x, *options)
    counted = jnp.ones(x.shape, bool) if where is None else where
    wide = compute_dtype(x.dtype)
    lower = jnp.max(masked(x, where), axes, keepdims=keepdims, initial=-jnp.inf)
    n = jnp.maximum(jnp.sum(counted.astype(jnp.int32), axes, keepdims=keepdims), 1).astype(wide)
    upper = lower + scalar * jnp.log(n)
    return lower.astype(x.dtype), upper.astype(x.dtype)


def _smooth_max(function, *arguments) -> Array:
    return reduced(_scaled, *_checked(function, *arguments))


def _checked(function, x, axis, where, keepdims, temperature):
    x = _checks.real_array(function, "x", x)
    keepdims = _checks.flag(function, "keepdims", keepdims)
    axes = _checks.axes(function, axis, x.ndim)
    where = _checks.mask(function, where, x.shape)
    dtype = compute_dtype(x.dtype)
    scalar = _checks.positive_scalar(function, "temperature", temperature, dtype)
    return axes, keepdims, x, where, scalar


def _scaled(x: Array, where: Array | None, temperature: Array, *, axes: tuple[int, ...]) -> Array:
    """smooth_max of an array in any dtype."""
    wide = masked(x, where)
    m = maximum(jax.lax.stop_gradient(wide), axes)
    # m keeps +inf, and the difference of +inf and m is set to 0 instead of NaN.
    finite = jnp.where(wide == jnp.inf, jnp.finfo(wide.dtype).max, wide)
    log_sum = logsumexp_core(tempered(finite, temperature, axes), axes)
    # In a row without entries the derivative with respect to T would be log 0 = -inf.
    empty = jnp.isneginf(log_sum)
    y = m + temperature * jnp.where(empty, 0, log_sum)
    return jnp.where(empty, -jnp.inf, y).astype(x.dtype)

"""softmax, log_softmax and softmin, for arguments of any dtype."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._checks import Axis
from softjax._custom_jvp import custom_jvp
from softjax._log_softmax_core import log_softmax_core
from softjax._numerics import compute_dtype, keeping_half, masked, maximum
from softjax._reductions import Axes, shift
from softjax._sharding import together
from softjax._softmax_core import softmax_core


def softmax(
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Exponentials divided by their sum: the probabilities with logits x / T.

        p_i = exp(x_i / T) / sum_j exp(x_j / T)

    Derivative: p_dot = p (w - <p, w>) / T, where w is the tangent minus the tangent of a dominant
    entry. The difference 1 - p_i is then never computed where p_i is near 1. Both modes, any order;
    the backward pass keeps p, or the logits if these are in half precision.
    Edge cases: masked entries, and all entries of a row of -inf, are 0 with zero gradient; +inf or
    NaN in a row gives NaN.

    Args:
        x: real, any shape, nats; integers and booleans become the default float.
        axis: axis or axes that sum to one; None for all.
        where: booleans that broadcast to `x`; False leaves the entry out.
        temperature: scalar T > 0, may be traced; 1 / T is the lambda of the textbook.

    Returns:
        Probabilities, shape and dtype of `x`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis, or T <= 0.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.softmax(jnp.array([0.0, 0.0]))
        Array([0.5, 0.5], dtype=float32)

    Source: Blanchard, Higham and Higham (2021), section 4: dividing is more accurate than
        exp(x - logsumexp(x)).
    """
    return _probabilities("softmax", softmax_core, x, axis, where, temperature)


def log_softmax(
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Logarithm of softmax: the log-probabilities with logits x / T.

        y_i = (x_i - m) / T - log1p(r),  m = max x,  r = sum of exp((x - m) / T) without the top

    Derivative: y_dot = w - <p, w>, where w is the tangent minus the tangent of a dominant entry.
    Both modes, any order; the backward pass keeps p, or the logits if these are in half precision.
    Edge cases: a masked or -inf entry gives -inf; if `where` masks every entry, the results are
    -inf with zero gradient; +inf or NaN in a row gives NaN.

    Args:
        x: real, any shape, nats; integers and booleans become the default float.
        axis: axis or axes whose exponentials sum to one; None for all.
        where: booleans that broadcast to `x`; False leaves the entry out.
        temperature: scalar T > 0, may be traced.

    Returns:
        Log-probabilities in nats, shape and dtype of `x`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis, or T <= 0.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.log_softmax(jnp.array([0.0, -20.0]))
        Array([-2.0611537e-09, -2.0000000e+01], dtype=float32)

    Source: Blanchard, Higham and Higham (2021), section 5.
    """
    return _probabilities("log_softmax", log_softmax_core, x, axis, where, temperature)


def softmin(
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Softmax of the negated input: the Boltzmann probabilities of the energies x.

        p_i = exp(-x_i / T) / sum_j exp(-x_j / T)

    Derivative and edge cases: as for softmax at -x; a class with x = +inf has probability 0.

    Args:
        x: real, any shape, nats (energies in units of T).
        axis: axis or axes that sum to one; None for all.
        where: booleans that broadcast to `x`; False leaves the entry out.
        temperature: scalar T > 0, may be traced.

    Returns:
        Probabilities, shape and dtype of `x`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis, or T <= 0.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.softmin(jnp.array([0.0, 1000.0]))
        Array([1., 0.], dtype=float32)

    Source: I. Goodfellow, Y. Bengio, A. Courville, "Deep Learning" (2016), section 16.2.4.
    """
    x = -_checks.real_array("softmin", "x", x)
    return _probabilities("softmin", softmax_core, x, axis, where, temperature)


def tempered(x: Array, temperature: Array, axes: Axes) -> Array:
    """z = (x - max x) / T; the subtraction comes first, so that an offset of x does not change z.

    The maximum has no derivative here: every caller adds it back, or does not depend on it.
    """
    m = maximum(jax.lax.stop_gradient(x), axes)
    return _divided(x, m, temperature)


@custom_jvp
def _divided(x: Array, m: Array, temperature: Array) -> Array:
    d = shift(x, m)
    return jnp.where(jnp.isneginf(d), d, d / temperature)


@_divided.defjvp
def _divided_jvp(primals, tangents):
    x, m, temperature = primals
    x_dot, _, temperature_dot = tangents
    z = _divided(x, m, temperature)
    z_known = jnp.where(jnp.isneginf(z), 0, z)  # T has no effect on a class without mass
    return z, (x_dot - z_known * temperature_dot) / temperature


def _probabilities(function, core, x, axis, where, temperature) -> Array:
    """The checks and the dispatch that softmax, log_softmax and softmin share."""
    plain = _checks.is_number(temperature, 1)
    if plain and where is None and type(axis) is int and isinstance(x, Array):
        return _along_one_axis(function, core, x, axis)
    x = _checks.real_array(function, "x", x)
    axes = _checks.axes(function, axis, x.ndim)
    where = _checks.mask(function, where, x.shape)
    scalar = None
    if not plain:
        dtype = compute_dtype(x.dtype)
        remedy = "; x / T has a temperature for each row"
        scalar = _checks.positive_scalar(function, "temperature", temperature, dtype, remedy)
    return _normalized(core, x, where, scalar, axes)


@partial(jax.jit, static_argnums=(0, 1, 3))
def _along_one_axis(function: str, core, x: Array, axis: int) -> Array:
    """The most frequent form of a call, whose checks of shape and dtype run once, in the trace."""
    x = _checks.real_array(function, "x", x)
    axes = _checks.axes(function, axis, x.ndim)
    return keeping_half(_normalizer, axes, x, None, None, core=core)


def _normalizer(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    *,
    axes: Axes,
    core: Callable[[Array, Axes], Array],
) -> Array:
    """softmax or log_softmax of an array in any dtype."""
    z = masked(x, where)
    if temperature is not None:
        z = tempered(z, temperature, axes)
    if core is softmax_core:
        is_widened = where is None and temperature is None
        y = softmax_core(z, axes, x.dtype if is_widened else None)
    else:
        y = core(z, axes)
    if where is not None:
        y = jnp.where(where, y, 0 if core is softmax_core else -jnp.inf)
    return y.astype(x.dtype)


@partial(jax.jit, static_argnums=(0, 4))
def _normalized(core, x: Array, where: Array | None, temperature: Array | None, axes) -> Array:
    x, where = together((x, where))
    return keeping_half(_normalizer, axes, x, where, temperature, core=core)

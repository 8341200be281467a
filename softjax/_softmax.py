"""softmax, log_softmax and softmin, with their derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._checks import Axis
from softjax._numerics import compute_dtype, excess, inner, log_total, masked, maximum, shift, total


def softmax(
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Exponentials divided by their sum: the probabilities with logits x / T.

        p_i = exp(x_i / T) / sum_j exp(x_j / T)

    Derivative: p_dot = p (w - <p, w>) / T with w the tangent relative to that of a dominant
    entry, so that 1 - p_i is never a difference where p_i is near 1. Both modes, any order; the
    backward pass keeps p.
    Edge cases: a masked entry, a row of -inf, nothing left by `where`: 0 with zero gradient;
    +inf or NaN in a row: NaN.

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

        y_i = (x_i - m) / T - log1p(r),  m = max x,  r = sum of exp((x - m) / T) less the top

    Derivative: y_dot = w - <p, w>, w the tangent relative to that of a dominant entry. Both
    modes, any order; the backward pass keeps p.
    Edge cases: a masked or -inf entry: -inf; nothing left by `where`: -inf with zero gradient;
    +inf or NaN in a row: NaN.

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

    Derivative and edge cases: those of softmax at -x; +inf is a class that has probability 0.

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


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax_core(x: Array, axes: tuple[int, ...]) -> Array:
    e = jnp.exp(shift(x, maximum(x, axes)))
    total = jnp.sum(e, axes, keepdims=True)
    return e / jnp.maximum(total, jnp.finfo(x.dtype).tiny)  # 0 / 0 in a row of -inf


@softmax_core.defjvp
def _softmax_jvp(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    p = softmax_core(x, axes)
    return p, softmax_tangent(p, x_dot, axes)


@partial(jax.checkpoint, static_argnums=(2,), prevent_cse=False)
def softmax_tangent(p: Array, x_dot: Array, axes: tuple[int, ...]) -> Array:
    """J x_dot for the Jacobian J = diag(p) - p p^T, accurate entry by entry.

    J 1 = 0, so tangents count relative to any one entry's. Where an entry dominates (p > 1/2)
    they are taken relative to its own, and its output from the others', which sum to minus it:
    1 - p is then nowhere a difference of near equals. Both steps are each other's transpose, so
    that reverse mode is as accurate as forward mode. It saves p and does the rest again.
    """
    dominant = p > 0.5
    w = relative_to_dominant(dominant, x_dot, axes)
    v = p * (w - inner(p, w, axes))
    others = jnp.sum(jnp.where(dominant, 0, v), axes, keepdims=True)
    return jnp.where(dominant, -others, v)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def log_softmax_core(x: Array, axes: tuple[int, ...]) -> Array:
    m, r = excess(x, axes)
    return shift(x, m) - log_total(m, r)


@log_softmax_core.defjvp
def _log_softmax_jvp(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    return log_softmax_core(x, axes), _log_softmax_tangent(softmax_core(x, axes), x_dot, axes)


@partial(jax.checkpoint, static_argnums=(2,), prevent_cse=False)
def _log_softmax_tangent(p: Array, x_dot: Array, axes: tuple[int, ...]) -> Array:
    w = relative_to_dominant(p > 0.5, x_dot, axes)
    return jnp.where(is_empty(p, axes), 0, w - inner(p, w, axes))


@jax.custom_jvp
def softmax_and_complement(x: Array) -> tuple[Array, Array]:
    """p = softmax(x) over the last axis, and 1 - p.

    An entry with p > 1/2 is the only maximal one: there 1 - p is the share r / (1 + r) of all the
    others, elsewhere the difference loses nothing.
    """
    m, r = excess(x, (x.ndim - 1,))
    whole = total(m, r)
    p = jnp.exp(shift(x, m)) / whole
    return p, jnp.where(p > 0.5, r / whole, 1 - p)


@softmax_and_complement.defjvp
def _softmax_and_complement_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    p, complement = softmax_and_complement(x)
    p_dot = softmax_tangent(p, x_dot, (x.ndim - 1,))
    return (p, complement), (p_dot, -p_dot)


def is_empty(p: Array, axes: tuple[int, ...]) -> Array:
    """Whether no class of a row has a probability: all are -inf, masked, or not there."""
    return jnp.all(p == 0, axes, keepdims=True)


def relative_to_dominant(dominant: Array, x_dot: Array, axes: tuple[int, ...]) -> Array:
    """x_dot less that of the dominant entry, where there is one: exactly 0 at that entry."""
    reference = jnp.sum(jnp.where(dominant, x_dot, 0), axes, keepdims=True)
    return jnp.where(dominant, 0, x_dot - reference)


def tempered(x: Array, temperature: Array, axes: tuple[int, ...]) -> Array:
    """z = (x - max x) / T: dividing after the subtraction keeps the offset out of z.

    The maximum carries no derivative: every use adds it back, or does not depend on it.
    """
    m = jax.lax.stop_gradient(maximum(x, axes))
    return _divided(x, m, temperature)


@jax.custom_jvp
def _divided(x: Array, m: Array, temperature: Array) -> Array:
    d = shift(x, m)
    return jnp.where(jnp.isneginf(d), d, d / temperature)


@_divided.defjvp
def _divided_jvp(primals, tangents):
    x, m, temperature = primals
    x_dot, _, temperature_dot = tangents
    z = _divided(x, m, temperature)
    z_known = jnp.where(jnp.isneginf(z), 0, z)  # a class without mass does not feel T
    return z, (x_dot - z_known * temperature_dot) / temperature


def _probabilities(function, core, x, axis, where, temperature) -> Array:
    """The checks and the dispatch that softmax, log_softmax and softmin share."""
    plain = isinstance(temperature, (int, float)) and temperature == 1
    if plain and where is None and type(axis) is int and isinstance(x, Array):
        return _along_one_axis(function, core, x, axis)
    x = _checks.real_array(function, "x", x)
    axes = _checks.axes(function, axis, x.ndim)
    where = _checks.mask(function, where, x.shape)
    scalar = None
    if not plain:
        dtype = compute_dtype(x.dtype)
        scalar = _checks.positive_scalar(function, "temperature", temperature, dtype)
    return _normalized(core, x, where, scalar, axes)


@partial(jax.jit, static_argnums=(0, 1, 3))
def _along_one_axis(function: str, core, x: Array, axis: int) -> Array:
    """What most calls ask for, whose checks are of shape and dtype: made once, in the trace."""
    x = _checks.real_array(function, "x", x)
    return _normalized(core, x, None, None, _checks.axes(function, axis, x.ndim))


@partial(jax.jit, static_argnums=(0, 4))
def _normalized(core, x: Array, where: Array | None, temperature: Array | None, axes) -> Array:
    z = masked(x, where)
    if temperature is not None:
        z = tempered(z, temperature, axes)
    y = core(z, axes)
    if where is not None:
        y = jnp.where(where, y, 0 if core is softmax_core else -jnp.inf)
    return y.astype(x.dtype)

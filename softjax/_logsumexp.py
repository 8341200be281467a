"""logsumexp and logmeanexp, with their derivatives."""

from functools import partial
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._checks import Axis
from softjax._numerics import compute_dtype, excess, inner, masked, maximum, shift
from softjax._softmax import softmax_core


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: ArrayLike | None = None,
) -> Array: ...


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: ArrayLike | None = None,
) -> tuple[Array, Array]: ...


def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
) -> Array | tuple[Array, Array]:
    """Logarithm of a sum of exponentials: the log-partition function.

        y = log(sum_i b_i exp(a_i)) = m + log1p(r),  m = max a,  r = sum of exp(a - m) less the top

    The top is left out before the sum rounds, so that a row that one entry dominates keeps its
    digits: logsumexp([0, -20]) is 2.06e-9 in float32.

    Derivative: dy/da_i = b_i exp(a_i - y), without `b` the softmax; dy/db_i = exp(a_i - y). Both
    modes, any order; without `b` the Hessian diag(p) - p p^T is accurate entry by entry.
    Edge cases: a row of -inf, or nothing left by `where`: -inf with zero gradient; +inf: +inf;
    NaN: NaN. A negative sum is NaN unless `return_sign`.

    Args:
        a: real, any shape, nats; integers and booleans become the default float.
        axis: axis or axes to reduce; None for all.
        b: real factors of the exponentials, of a shape that broadcasts with `a`; a factor 0
            leaves its entry out.
        keepdims: keep the reduced axes with size 1.
        return_sign: also return the sign of the sum, and log|sum| in place of log(sum).
        where: booleans that broadcast to `a`; False leaves the entry out.

    Returns:
        `a` without `axis`, in nats, in the dtype of `a`; with `return_sign` a pair (y, sign).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.logsumexp(jnp.array([0.0, -20.0]))
        Array(2.0611537e-09, dtype=float32)

    Source: P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and
        softmax functions", IMA J. Numer. Anal. 41 (2021), eq. (3.3) and section 5.
    """
    x = _checks.real_array("logsumexp", "a", a)
    if b is None:
        axes = _checks.axes("logsumexp", axis, x.ndim)
        where = _checks.mask("logsumexp", where, x.shape)
        y = _logsumexp_where(x, where, axes, keepdims)
        if not return_sign:
            return y
        return y, jnp.where(jnp.isnan(y), y, jnp.where(jnp.isneginf(y), 0, 1).astype(y.dtype))

    factors = _checks.real_array("logsumexp", "b", b)
    if _takes_dtype_of_other("b", b):
        dtype = x.dtype
    elif _takes_dtype_of_other("a", a):
        dtype = factors.dtype
    else:
        dtype = jnp.promote_types(x.dtype, factors.dtype)
    try:
        shape = jnp.broadcast_shapes(x.shape, factors.shape)
    except ValueError as error:
        expected = f"of a shape that broadcasts with {x.shape}"
        raise ValueError(
            _checks.message("logsumexp", "b", expected, f"shape {factors.shape}")
        ) from error
    axes = _checks.axes("logsumexp", axis, len(shape))
    where = _checks.mask("logsumexp", where, shape)
    x, factors = x.astype(dtype), factors.astype(dtype)
    y, sign = _scaled_logsumexp_where(x, factors, where, axes, keepdims)
    return (y, sign) if return_sign else jnp.where(sign < 0, jnp.nan, y)


def logmeanexp(
    x: ArrayLike, axis: Axis = None, where: ArrayLike | None = None, keepdims: bool = False
) -> Array:
    """Logarithm of the mean of exponentials.

        y = log(1/n sum_i exp(x_i)) = logsumexp(x) - log n

    Derivative: softmax(x), both modes, any order.
    Edge cases: as logsumexp; nothing left by `where`: -inf.

    Args:
        x: real, any shape, nats.
        axis: axis or axes to reduce; None for all.
        where: booleans that broadcast to `x`; n counts the entries that it leaves.
        keepdims: keep the reduced axes with size 1.

    Returns:
        `x` without `axis`, in nats, in the dtype of `x`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or axis.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.logmeanexp(jnp.array([1.0, 1.0, 1.0]))
        Array(1., dtype=float32)

    Source: the definition; near equal entries log1p(mean of expm1(x - m)) keeps the digits that
        the difference of two logarithms loses.
    """
    x = _checks.real_array("logmeanexp", "x", x)
    axes = _checks.axes("logmeanexp", axis, x.ndim)
    return _logmeanexp_where(x, _checks.mask("logmeanexp", where, x.shape), axes, keepdims)


def _takes_dtype_of_other(argument: str, x: ArrayLike) -> bool:
    """Whether promotion lets `x` follow a floating array: integers, booleans, Python numbers."""
    x = jnp.asarray(_checks.native("logsumexp", argument, x))
    return x.weak_type or not jnp.issubdtype(x.dtype, jnp.floating)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def logsumexp_core(x: Array, axes: tuple[int, ...], exact: DTypeLike | None = None) -> Array:
    """log sum exp(x), the axes kept; `exact` as in `maximum`."""
    m, r = excess(x, axes, exact)
    return m + jnp.log1p(r)


@logsumexp_core.defjvp
def _logsumexp_jvp(axes, exact, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    return logsumexp_core(x, axes, exact), inner(softmax_core(x, axes), x_dot, axes)


@partial(jax.jit, static_argnums=(2, 3))
def _logsumexp_where(x: Array, where: Array | None, axes: tuple[int, ...], keepdims: bool) -> Array:
    y = logsumexp_core(masked(x, where), axes, x.dtype).astype(x.dtype)
    return y if keepdims else jnp.squeeze(y, axes)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _scaled_logsumexp(x: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """log|sum b exp(x)| and the sign of the sum, with |b| exp(x) = exp(x + log|b|) = e^m e.

    The maximal entries give a whole number, `tops`, which the others do not touch before the end.
    """
    scaled = jnp.where(b == 0, -jnp.inf, x + jnp.log(jnp.abs(b)))
    m = maximum(scaled, axes)
    is_top = scaled == m
    signs = jnp.sign(b)
    tops = jnp.sum(jnp.where(is_top, signs, 0), axes, keepdims=True)
    signed = jnp.where(is_top, 0, signs * jnp.exp(shift(scaled, m)))
    rest = jnp.sum(signed, axes, keepdims=True)
    sign = jnp.sign(tops + rest)
    r = (jnp.abs(tops) - 1) + jnp.sign(tops) * rest
    log_sum = jnp.where(tops == 0, jnp.log(jnp.abs(rest)), jnp.log1p(r))
    return m + log_sum, sign


@_scaled_logsumexp.defjvp
def _scaled_logsumexp_jvp(axes, primals, tangents):
    (x, b), (x_dot, b_dot) = primals, tangents
    y, sign = _scaled_logsumexp(x, b, axes)
    present = x > -jnp.inf
    e = jnp.where(present, jnp.exp(jnp.where(present, x - y, 0)), 0)
    y_dot = sign * inner(e, b * x_dot + b_dot, axes)
    return (y, sign), (y_dot, jnp.zeros_like(sign))


@partial(jax.jit, static_argnums=(3, 4))
def _scaled_logsumexp_where(
    x: Array, b: Array, where: Array | None, axes: tuple[int, ...], keepdims: bool
) -> tuple[Array, Array]:
    dtype, wide = x.dtype, compute_dtype(x.dtype)
    shape = jnp.broadcast_shapes(x.shape, b.shape)
    x, b = jnp.broadcast_to(x, shape).astype(wide), jnp.broadcast_to(b, shape).astype(wide)
    if where is not None:
        b = jnp.where(where, b, 0)
    left_out = (b == 0) & ~jnp.isfinite(x)
    if where is not None:
        left_out |= ~where
    y, sign = _scaled_logsumexp(jnp.where(left_out, -jnp.inf, x), b, axes)
    if not keepdims:
        y, sign = jnp.squeeze(y, axes), jnp.squeeze(sign, axes)
    return y.astype(dtype), sign.astype(dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _logmeanexp(x: Array, where: Array | None, axes: tuple[int, ...]) -> Array:
    m, r = excess(x, axes)
    counted = jnp.ones_like(x) if where is None else where.astype(x.dtype)
    n = jnp.maximum(jnp.sum(counted, axes, keepdims=True), 1)
    gain = jnp.expm1(shift(x, m))
    gain = gain if where is None else jnp.where(where, gain, 0)
    mean_gain = jnp.sum(gain, axes, keepdims=True) / n
    near = (mean_gain > -0.5) & (r >= 0)
    return m + jnp.where(near, jnp.log1p(mean_gain), jnp.log1p(r) - jnp.log(n))


@_logmeanexp.defjvp
def _logmeanexp_jvp(axes, primals, tangents):
    (x, where), (x_dot, _) = primals, tangents
    return _logmeanexp(x, where, axes), inner(softmax_core(x, axes), x_dot, axes)


@partial(jax.jit, static_argnums=(2, 3))
def _logmeanexp_where(
    x: Array, where: Array | None, axes: tuple[int, ...], keepdims: bool
) -> Array:
    y = _logmeanexp(masked(x, where), where, axes).astype(x.dtype)
    return y if keepdims else jnp.squeeze(y, axes)

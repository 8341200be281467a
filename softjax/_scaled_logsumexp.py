"""log|sum_i b_i exp(x_i)| for factors b of any sign and size, and the sign of the sum."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softjax import _checks
from softjax._custom_jvp import custom_jvp
from softjax._numerics import compute_dtype, inner, keeping_half, log1p, maximum
from softjax._reductions import relative_to
from softjax._sharding import brought_to, together
from softjax._weights import is_zero, power_of_two, significand_and_exponent

# log 2, split into its leading ten bits and the rest. An integer times the first part is exact.
LOG_2_LEADING, LOG_2_REST = 0.693359375, -2.121944400546906e-4
# exp(-FAR) times the quotient of any two numbers of float64 is 0.
FAR = 3000


@partial(jax.jit, static_argnums=(3, 4, 5))
def scaled_logsumexp(
    x: Array, b: Array, where: Array | None, axes: tuple[int, ...], keepdims: bool, dtype: DTypeLike
) -> tuple[Array, Array]:
    """log|sum b exp(x)| over the unmasked entries, and the sign of the sum, both in `dtype`."""
    x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, b.shape))
    x, where = together((x, where))
    b = brought_to(b, x) if b.shape == x.shape else b
    y = keeping_half(_scaled, axes, x, b, where, place=0)
    sign = _scaled(*lax.stop_gradient((x, b)), where, axes=axes, place=1)
    if not keepdims:
        y, sign = jnp.squeeze(y, axes), jnp.squeeze(sign, axes)
    return y.astype(dtype), sign.astype(dtype)


def _scaled(x: Array, b: Array, where: Array | None, *, axes: tuple[int, ...], place: int) -> Array:
    """log|sum b exp(x)| or the sign of the sum, by its place among both, of arrays in any dtype."""
    wide = max(compute_dtype(x.dtype), compute_dtype(b.dtype), key=lambda dtype: dtype.itemsize)
    x, b = x.astype(wide), jnp.broadcast_to(b, x.shape).astype(wide)
    if where is not None:
        b = jnp.where(where, b, 0)
    left_out = is_zero(b) & ~jnp.isfinite(x)
    if where is not None:
        left_out |= ~where
    return _scaled_logsumexp(jnp.where(left_out, -jnp.inf, x), b, axes)[place]


class _Terms(NamedTuple):
    """The terms of sum_i b_i exp(x_i), with b = f 2^k, relative to one of the largest terms, t.

        b_i exp(x_i) = 2^k_t exp(x_t) c_i,  sum_i c_i = tops f_t + rest

    Attributes:
        log_unit: x_t + k_t log 2.
        f_top: |f_t|, in [1, 2), the magnitude of term t; no other term is many times as large.
        c: the terms c_i.
        tops: the number of terms equal to f_t minus the number of terms equal to -f_t.
        rest: the sum of the other terms.
    """

    log_unit: Array
    f_top: Array
    c: Array
    tops: Array
    rest: Array


def _terms(x: Array, b: Array, axes: tuple[int, ...]) -> _Terms:
    """c_i = f_i 2^(k_i - k_t) exp(x_i - x_t), which is exact where x_i = x_t.

    No logarithm of b is computed: in an exponent, its rounding error would be amplified if terms
    cancel. With n = round((x_i - x_t) / log 2), the form 2^n exp(x_i - x_t - n log 2) keeps the
    exponential in range until it is multiplied by 2^(k_i - k_t).
    """
    f, k = significand_and_exponent(b)
    # The magnitude up to a factor of about 2. The product is exact, so no contraction changes it.
    log_size = x + jnp.where(jnp.isfinite(f), k * LOG_2_LEADING, jnp.abs(f))
    log_size = jnp.where(is_zero(b), -jnp.inf, log_size)
    is_top = log_size == maximum(log_size, axes)
    x_top = maximum(jnp.where(is_top, x, -jnp.inf), axes)
    is_top &= x == x_top
    k_top = maximum(jnp.where(is_top, k, -jnp.inf), axes)
    is_top &= k == k_top
    f_top = maximum(jnp.where(is_top, jnp.abs(f), -jnp.inf), axes)
    is_top &= jnp.abs(f) == f_top

    d = jnp.clip(relative_to(x, x_top), -FAR, FAR)
    n = jnp.round(d / math.log(2))
    e = jnp.exp((d - n * LOG_2_LEADING) - n * LOG_2_REST)
    absent = jnp.isneginf(log_size)
    c = jnp.where(absent, 0, f) * e * power_of_two(jnp.where(absent, 0, n + (k - k_top)))

    # If a term is infinite, the finite terms count as 0. Infinite terms of both signs give NaN.
    is_infinite = log_size == jnp.inf
    some_infinite = jnp.any(is_infinite, axes, keepdims=True)
    c = jnp.where(some_infinite, jnp.where(is_infinite, jnp.sign(f), 0), c)
    c = jnp.where(jnp.isnan(log_size), log_size, c)
    is_top = jnp.where(some_infinite, is_infinite, is_top)
    tops = jnp.sum(jnp.where(is_top, jnp.sign(f), 0), axes, keepdims=True)
    infinities = jnp.sum(is_infinite.astype(x.dtype), axes, keepdims=True)
    tops = _checks.nan_where(jnp.abs(tops) < infinities, tops)
    rest = jnp.sum(jnp.where(is_top, 0, c), axes, keepdims=True)
    log_unit = jnp.where(some_infinite, jnp.inf, x_top + k_top * math.log(2))
    return _Terms(log_unit, jnp.where(some_infinite, 1, f_top), c, tops, rest)


@partial(custom_jvp, nondiff_argnums=(2,))
def _scaled_logsumexp(x: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """log|sum b exp(x)| and the sign of the sum.

    Up to its sign the sum is f_t (1 + r). The integer `tops` allows one top to be left out of r
    before r is rounded. If the terms cancel, 1 + r is not near 1, and the sum itself is accurate.
    """
    log_unit, f_top, _, tops, rest = _terms(x, b, axes)
    r = (jnp.abs(tops) - 1) + jnp.sign(tops) * rest / f_top
    total = tops * f_top + rest
    near_top = (tops != 0) & (r > -0.5)
    f_top, r = jnp.where(near_top, f_top, 1), jnp.where(near_top, r, 0)
    log_total = jnp.where(near_top, jnp.log(f_top) + log1p(r), jnp.log(jnp.abs(total)))
    return log_unit + log_total, jnp.sign(total)


@_scaled_logsumexp.defjvp
def _scaled_logsumexp_jvp(axes, primals, tangents):
    y, sign = _scaled_logsumexp(*primals, axes)
    return (y, sign), (_scaled_tangent(primals, tangents, axes), jnp.zeros_like(sign))


def _scaled_tangent(primals, tangents, axes: tuple[int, ...]) -> Array:
    (x, b), (x_dot, b_dot) = primals, tangents
    by_b = jnp.sum(_times_slope(x, b, b_dot, axes), axes, keepdims=True)
    return inner(_share_of_sum(x, b, axes), x_dot, axes) + by_b


@partial(custom_jvp, nondiff_argnums=(2,))
def _share_of_sum(x: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """dy/dx_i = b_i exp(x_i) / sum_j b_j exp(x_j), which is 0 where b_i is 0, for any x_i."""
    _, f_top, c, tops, rest = _terms(x, b, axes)
    return c / jnp.where(c == 0, 1, tops * f_top + rest)


@_share_of_sum.defjvp
def _share_of_sum_jvp(axes, primals, tangents):
    (x, b), (x_dot, b_dot) = primals, tangents
    share = _share_of_sum(x, b, axes)
    change = x_dot - _scaled_tangent(primals, tangents, axes)
    return share, jnp.where(share == 0, 0, share * change) + _times_slope(x, b, b_dot, axes)


def _times_slope(x: Array, b: Array, b_dot: Array, axes: tuple[int, ...]) -> Array:
    """b_dot_i dy/db_i, with dy/db_i = sign exp(x_i - y).

    The slope overflows if b_i = 0 leaves out a large entry. Therefore its square root is applied
    twice: a tangent of 0 times this root is then 0.
    """
    y, sign = _scaled_logsumexp(x, b, axes)
    present = x > -jnp.inf
    largest = math.log(float(jnp.finfo(x.dtype).max)) - 1
    d = jnp.where(present, x, 0) - jnp.where(present, y, 0)
    half = jnp.minimum(d / 2, largest)
    root = jnp.where(present, jnp.exp(half), 0)
    return sign * ((b_dot * root) * root)

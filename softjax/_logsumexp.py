"""logsumexp and logmeanexp, with their derivatives."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._checks import Axis
from softjax._numerics import (
    compute_dtype,
    excess,
    excess_and_exponentials,
    inner,
    keeping_half,
    masked,
    maximum,
    total,
)
from softjax._platforms import platform_dependent
from softjax._reductions import relative_to, shift
from softjax._softmax import place_of_top, softmax_core, softmax_tangent
from softjax._weights import is_zero, power_of_two, significand_and_exponent

# log 2, split into its leading ten bits and the rest. An integer times the first part is exact.
LOG_2_LEADING, LOG_2_REST = 0.693359375, -2.121944400546906e-4
# exp(-FAR) times the quotient of any two numbers of float64 is 0.
FAR = 3000


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

        y = log(sum_i b_i exp(a_i)) = m + log1p(r),  m = max a,  r = sum of exp(a - m) without top

    The largest term is left out before the sum is rounded, so that a row with one dominant entry
    keeps its digits: logsumexp([0, -20]) is 2.06e-9 in float32.

    Derivative: dy/da_i = b_i exp(a_i - y), which without `b` is the softmax, and
    dy/db_i = exp(a_i - y). Both modes, any order; without `b` the Hessian diag(p) - p p^T is
    accurate entry by entry.
    Edge cases: a row of -inf, or one in which `where` masks every entry, gives -inf with zero
    gradient; +inf gives +inf and NaN gives NaN. A negative sum gives NaN unless `return_sign`.

    Args:
        a: real, any shape, nats; integers and booleans become the default float.
        axis: axis or axes to reduce; None for all.
        b: real factors of the exponentials, of a shape that broadcasts with `a`; a factor 0
            leaves its entry out.
        keepdims: keep the reduced axes with size 1.
        return_sign: also return the sign of the sum, and log|sum| in place of log(sum).
        where: booleans that broadcast to `a`; False leaves the entry out.

    Returns:
        `a` without `axis`, in nats, in the dtype of `a`, or float64 if `b` is a float64 array; with
        `return_sign` a pair (y, sign).

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
    keepdims = _checks.flag("logsumexp", "keepdims", keepdims)
    return_sign = _checks.flag("logsumexp", "return_sign", return_sign)
    if b is None:
        axes = _checks.axes("logsumexp", axis, x.ndim)
        where = _checks.mask("logsumexp", where, x.shape)
        y = _logsumexp_where(x, where, axes, keepdims)
        if not return_sign:
            return y
        return y, jnp.where(jnp.isnan(y), y, jnp.where(jnp.isneginf(y), 0, 1).astype(y.dtype))

    factors = _checks.real_array("logsumexp", "b", b)
    dtype = x.dtype
    if not _takes_dtype_of_other("b", b) and (
        _takes_dtype_of_other("a", a) or factors.dtype == jnp.float64
    ):
        dtype = factors.dtype
    try:
        shape = jnp.broadcast_shapes(x.shape, factors.shape)
    except ValueError as error:
        expected = f"of a shape that broadcasts with {x.shape}"
        raise ValueError(
            _checks.message("logsumexp", "b", expected, f"shape {factors.shape}")
        ) from error
    axes = _checks.axes("logsumexp", axis, len(shape))
    where = _checks.mask("logsumexp", where, shape)
    y, sign = _scaled_logsumexp_where(x, factors, where, axes, keepdims, dtype)
    return (y, sign) if return_sign else _checks.nan_where(sign < 0, y)


def logmeanexp(
    x: ArrayLike, axis: Axis = None, where: ArrayLike | None = None, keepdims: bool = False
) -> Array:
    """Logarithm of the mean of exponentials.

        y = log(1/n sum_i exp(x_i)) = logsumexp(x) - log n

    Derivative: softmax(x), both modes, any order.
    Edge cases: as for logsumexp; if `where` masks every entry, the result is -inf.

    Args:
        x: real, any shape, nats.
        axis: axis or axes to reduce; None for all.
        where: booleans that broadcast to `x`; n is the number of entries that are not masked.
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
    keepdims = _checks.flag("logmeanexp", "keepdims", keepdims)
    axes = _checks.axes("logmeanexp", axis, x.ndim)
    return _logmeanexp_where(x, _checks.mask("logmeanexp", where, x.shape), axes, keepdims)


def _takes_dtype_of_other(argument: str, x: ArrayLike) -> bool:
    """Whether `x` takes the dtype of a floating array: integers, booleans and Python numbers do."""
    x = jnp.asarray(_checks.native("logsumexp", argument, x))
    return x.weak_type or not jnp.issubdtype(x.dtype, jnp.floating)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def logsumexp_core(x: Array, axes: tuple[int, ...], exact: DTypeLike | None = None) -> Array:
    """log sum exp(x), which keeps the axes; `maximum` explains `exact`."""
    m, r = excess(x, axes, exact)
    return m + jnp.log1p(r)


@logsumexp_core.defjvp
def _logsumexp_jvp(axes, exact, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    y, p = _logsumexp_and_gradient(x, axes)
    return y, inner(p, x_dot, axes)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _logsumexp_and_gradient(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """log sum exp(x) and softmax(x), which share their exponentials on a CPU."""

    def on_cpu(x: Array) -> tuple[Array, Array]:
        m, r, e = excess_and_exponentials(x, axes)
        return m + jnp.log1p(r), e / total(m, r)

    def plain(x: Array) -> tuple[Array, Array]:
        return logsumexp_core(x, axes), softmax_core(x, axes)

    return platform_dependent(x, cpu=on_cpu, default=plain)


@_logsumexp_and_gradient.defjvp
def _logsumexp_and_gradient_jvp(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    y, p = _logsumexp_and_gradient(x, axes)
    return (y, p), (inner(p, x_dot, axes), softmax_tangent(p, x_dot, axes, place_of_top(x, axes)))


@dataclass(frozen=True)
class _Logsumexp:
    """logsumexp of an array in any dtype."""

    axes: tuple[int, ...]

    def __call__(self, x: Array, where: Array | None) -> Array:
        return logsumexp_core(masked(x, where), self.axes, x.dtype).astype(x.dtype)


@partial(jax.jit, static_argnums=(2, 3))
def _logsumexp_where(x: Array, where: Array | None, axes: tuple[int, ...], keepdims: bool) -> Array:
    y = keeping_half(_Logsumexp(axes), axes, x, where)
    return y if keepdims else jnp.squeeze(y, axes)


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
    c = jnp.where(jnp.isneginf(log_size), 0, f * e * power_of_two(n + (k - k_top)))

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


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _scaled_logsumexp(x: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """log|sum b exp(x)| and the sign of the sum.

    Up to its sign the sum is f_t (1 + r). The integer `tops` allows one top to be left out of r
    before r is rounded. If the terms cancel, 1 + r is not near 1, and the sum itself is accurate.
    """
    log_unit, f_top, _, tops, rest = _terms(x, b, axes)
    r = (jnp.abs(tops) - 1) + jnp.sign(tops) * rest / f_top
    total = tops * f_top + rest
    near_top = (tops != 0) & (r > -0.5)
    log_total = jnp.where(
        near_top, jnp.log(f_top) + log1p(jnp.where(near_top, r, 0)), jnp.log(jnp.abs(total))
    )
    return log_unit + log_total, jnp.sign(total)


@_scaled_logsumexp.defjvp
def _scaled_logsumexp_jvp(axes, primals, tangents):
    y, sign = _scaled_logsumexp(*primals, axes)
    return (y, sign), (_scaled_tangent(primals, tangents, axes), jnp.zeros_like(sign))


def _scaled_tangent(primals, tangents, axes: tuple[int, ...]) -> Array:
    (x, b), (x_dot, b_dot) = primals, tangents
    by_b = jnp.sum(_times_slope(x, b, b_dot, axes), axes, keepdims=True)
    return inner(_share_of_sum(x, b, axes), x_dot, axes) + by_b


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _share_of_sum(x: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """dy/dx_i = b_i exp(x_i) / sum_j b_j exp(x_j), which is 0 where b_i is 0, for any x_i."""
    _, f_top, c, tops, rest = _terms(x, b, axes)
    return jnp.where(c == 0, 0, c / (tops * f_top + rest))


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
    half = jnp.minimum(jnp.where(present, x - y, 0) / 2, largest)
    root = jnp.where(present, jnp.exp(half), 0)
    return sign * ((b_dot * root) * root)


@dataclass(frozen=True)
class _Scaled:
    """log|sum b exp(x)| or the sign of the sum, by its place among both, of arrays in any dtype."""

    axes: tuple[int, ...]
    place: int

    def __call__(self, x: Array, b: Array, where: Array | None) -> Array:
        wide = max(compute_dtype(x.dtype), compute_dtype(b.dtype), key=lambda dtype: dtype.itemsize)
        x, b = x.astype(wide), jnp.broadcast_to(b, x.shape).astype(wide)
        if where is not None:
            b = jnp.where(where, b, 0)
        left_out = is_zero(b) & ~jnp.isfinite(x)
        if where is not None:
            left_out |= ~where
        return _scaled_logsumexp(jnp.where(left_out, -jnp.inf, x), b, self.axes)[self.place]


@partial(jax.jit, static_argnums=(3, 4, 5))
def _scaled_logsumexp_where(
    x: Array, b: Array, where: Array | None, axes: tuple[int, ...], keepdims: bool, dtype: DTypeLike
) -> tuple[Array, Array]:
    x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, b.shape))
    y = keeping_half(_Scaled(axes, 0), axes, x, b, where)
    sign = _Scaled(axes, 1)(*lax.stop_gradient((x, b)), where)
    if not keepdims:
        y, sign = jnp.squeeze(y, axes), jnp.squeeze(sign, axes)
    return y.astype(dtype), sign.astype(dtype)


def log1p(x: Array) -> Array:
    """log(1 + x). The float64 log1p of XLA has errors of up to 126 ulp between -1 and 0.

    Between -1 and -1/2 the sum 1 + x is exact. Between -1/2 and 0, log(1 + x) = -log(1 + y) with
    y = -x / (1 + x).
    """
    below_half, below_zero = x < -0.5, (x >= -0.5) & (x < 0)
    y = jnp.where(below_zero, -x / jnp.where(below_zero, 1 + x, 1), jnp.where(below_half, 0, x))
    value = jnp.where(below_zero, -1, 1).astype(x.dtype) * jnp.log1p(y)
    return jnp.where(below_half, jnp.log(jnp.where(below_half, 1 + x, 1)), value)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _logmeanexp(x: Array, where: Array | None, axes: tuple[int, ...]) -> Array:
    m, r = excess(x, axes)
    counted = jnp.ones_like(x) if where is None else where.astype(x.dtype)
    n = jnp.maximum(jnp.sum(counted, axes, keepdims=True), 1)
    gain = jnp.expm1(shift(x, m))
    gain = gain if where is None else jnp.where(where, gain, 0)
    mean_gain = jnp.sum(gain, axes, keepdims=True) / n
    near = (mean_gain > -0.5) & (r >= 0)
    return m + jnp.where(near, log1p(mean_gain), jnp.log1p(r) - jnp.log(n))


@_logmeanexp.defjvp
def _logmeanexp_jvp(axes, primals, tangents):
    (x, where), (x_dot, _) = primals, tangents
    return _logmeanexp(x, where, axes), inner(softmax_core(x, axes), x_dot, axes)


@dataclass(frozen=True)
class _Logmeanexp:
    """logmeanexp of an array in any dtype."""

    axes: tuple[int, ...]

    def __call__(self, x: Array, where: Array | None) -> Array:
        return _logmeanexp(masked(x, where), where, self.axes).astype(x.dtype)


@partial(jax.jit, static_argnums=(2, 3))
def _logmeanexp_where(
    x: Array, where: Array | None, axes: tuple[int, ...], keepdims: bool
) -> Array:
    y = keeping_half(_Logmeanexp(axes), axes, x, where)
    return y if keepdims else jnp.squeeze(y, axes)

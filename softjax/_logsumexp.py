"""logsumexp and logmeanexp, with their derivatives."""

from functools import partial
from typing import Literal, overload

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._checks import Axis
from softjax._custom_jvp import custom_jvp
from softjax._numerics import excess, excess_and_exponentials, inner, log1p, masked, reduced, total
from softjax._platforms import platform_dependent
from softjax._reductions import shift
from softjax._scaled_logsumexp import scaled_logsumexp
from softjax._softmax_core import softmax_core, tangent_at


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
        y = reduced(_logsumexp, axes, keepdims, x, where)
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
    y, sign = scaled_logsumexp(x, factors, where, axes, keepdims, dtype)
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
    where = _checks.mask("logmeanexp", where, x.shape)
    return reduced(_logmeanexp, axes, keepdims, x, where)


def _takes_dtype_of_other(argument: str, x: ArrayLike) -> bool:
    """Whether `x` takes the dtype of a floating array: integers, booleans and Python numbers do."""
    x = jnp.asarray(_checks.native("logsumexp", argument, x))
    return x.weak_type or not jnp.issubdtype(x.dtype, jnp.floating)


@partial(custom_jvp, nondiff_argnums=(1, 2))
def logsumexp_core(x: Array, axes: tuple[int, ...], exact: DTypeLike | None = None) -> Array:
    """log sum exp(x), which keeps the axes; `maximum` explains `exact`."""
    m, r = excess(x, axes, exact)
    return m + jnp.log1p(r)


@logsumexp_core.defjvp
def _logsumexp_jvp(axes, exact, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    y, p = _logsumexp_and_gradient(x, axes)
    return y, inner(p, x_dot, axes)


@partial(custom_jvp, nondiff_argnums=(1,))
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
    return (y, p), (inner(p, x_dot, axes), tangent_at(x, x_dot, axes))


def _logsumexp(x: Array, where: Array | None, *, axes: tuple[int, ...]) -> Array:
    exact = x.dtype if x.dtype.itemsize > 1 else None  # most dtypes of one byte have no -inf
    return logsumexp_core(masked(x, where), axes, exact).astype(x.dtype)


@partial(custom_jvp, nondiff_argnums=(2,))
def _logmeanexp_core(x: Array, where: Array | None, axes: tuple[int, ...]) -> Array:
    m, r = excess(x, axes)
    counted = jnp.ones_like(x) if where is None else where.astype(x.dtype)
    n = jnp.maximum(jnp.sum(counted, axes, keepdims=True), 1)
    gain = jnp.expm1(shift(x, m))
    gain = gain if where is None else jnp.where(where, gain, 0)
    mean_gain = jnp.sum(gain, axes, keepdims=True) / n
    near = (mean_gain > -0.5) & (r >= 0)
    return m + jnp.where(near, log1p(mean_gain), jnp.log1p(r) - jnp.log(n))


@_logmeanexp_core.defjvp
def _logmeanexp_jvp(axes, primals, tangents):
    (x, where), (x_dot, _) = primals, tangents
    return _logmeanexp_core(x, where, axes), inner(softmax_core(x, axes), x_dot, axes)


def _logmeanexp(x: Array, where: Array | None, *, axes: tuple[int, ...]) -> Array:
    return _logmeanexp_core(masked(x, where), where, axes).astype(x.dtype)

"""The dtype policy, and the excess that all normalizers use.

With m = max x, everything here is a function of m and of the *excess*

    r = (sum of exp(x - m) over all entries but one maximal one),   sum exp(x) = e^m (1 + r).

The 1 of the maximal entry is left out before the sum is rounded, and not subtracted afterwards: in
a row whose top is far above the other entries, 1 + r rounds to 1, and only r holds information.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from softjax._custom_jvp import custom_jvp
from softjax._one_pass import excess_in_one_pass
from softjax._platforms import platform_dependent
from softjax._reductions import (
    Axes,
    above_minus_infinity,
    behind_barrier_on_cpu,
    exponentials_and_sums,
    in_one_pass_if_long,
    rows_fit_a_kernel,
    shift_row,
    sum_of_terms,
    sums_beside_top,
)
from softjax._row_maps import Form, WithOptions, linear_map, of_operands, row_map
from softjax._sharding import is_split, together


def compute_dtype(dtype) -> jnp.dtype:
    """The dtype of computations, at least float32; half precision is rounded once, at the end."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def is_half(x: Any) -> TypeGuard[Array]:
    """Whether x is an array of NumPy or JAX in half precision, or in a narrower floating dtype."""
    dtype = getattr(x, "dtype", None)  # a dtype of pandas is of another class
    is_numpy = isinstance(dtype, np.dtype)
    return is_numpy and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4


def masked(x: Array, where: Array | None) -> Array:
    """x in the dtype of the computation, with -inf where it is masked."""
    wide = x.astype(compute_dtype(x.dtype))
    return wide if where is None else jnp.where(where, wide, -jnp.inf)


def keeping_half(
    function: Callable[..., Array], axes: Axes, x: Array, *others: Any, **options: Any
) -> Array:
    """function(x, *others, axes=axes, **options), whose backward pass keeps no array wider than x.

    For half precision it keeps the operands, and computes the arrays of float32 again, unless x is
    sharded: devices between which a row of x is distributed would send their sums twice for that.
    """
    whole = WithOptions(function, (("axes", axes), *options.items()))
    if not is_half(x) or is_split(x, axes):
        return whole(x, *others)
    return of_operands(whole, x, *others)


@partial(jax.jit, static_argnums=(0, 1, 2))
def reduced(function: Callable[..., Array], axes: Axes, keepdims: bool, *operands: Any) -> Array:
    """function(*operands, axes=axes) by `keeping_half`, with or without the axes that it keeps."""
    y = keeping_half(function, axes, *together(operands))
    return y if keepdims else jnp.squeeze(y, axes)


def maximum(x: Array, axes: Axes, exact: DTypeLike | None = None) -> Array:
    """max x over `axes`, which are kept; the lowest finite number if every entry is -inf.

    `exact` is a narrower dtype that represents x exactly. XLA:CPU finds the maximum in it 20 times
    as fast, and without a copy in the wide dtype. The maximum may lose NaN; the excess keeps it.

    In a row of -inf, the finite m makes x - m = -inf instead of NaN. The exponentials are then 0
    and the excess is -1, so that logsumexp = m + log1p(-1) = -inf without a special case.
    """

    def plain(narrow: Array) -> Array:
        return jnp.max(narrow, axes, keepdims=True, initial=jnp.finfo(narrow.dtype).min)

    def on_gpu(narrow: Array) -> Array:
        # `initial` is compared with the maximum, here in a kernel of its own.
        return jnp.max(above_minus_infinity(narrow), axes, keepdims=True)

    def on_tpu(narrow: Array) -> Array:
        lowest = np.asarray(jnp.finfo(narrow.dtype).min, narrow.dtype)
        return jnp.expand_dims(lax.reduce(narrow, lowest, lax.max, axes), axes)

    narrow = x if exact is None else x.astype(exact)
    is_known = all(isinstance(x.shape[axis], int) for axis in axes)
    on_gpu = on_gpu if is_known and not rows_fit_a_kernel(x, axes) else plain
    # JAX differentiates a general reduction only where every size is known.
    on_tpu = on_tpu if all(isinstance(n, int) for n in x.shape) and not is_split(x, axes) else plain
    forms = {"cuda": on_gpu, "rocm": on_gpu, "tpu": on_tpu}
    return platform_dependent(narrow, **forms, default=plain).astype(x.dtype)


def excess(x: Array, axes: Axes, exact: DTypeLike | None = None) -> tuple[Array, Array]:
    """The result m of `maximum`, and the excess r of x over `axes`, which both keep.

    r >= 0; r = -1 in a row of -inf or without entries; r is NaN if an entry is NaN. Entries of +inf
    are maximal, so that m + log1p(r) is +inf without a special case.
    """

    def in_two_passes(x: Array) -> tuple[Array, Array]:
        m = stored_maximum(x, axes, exact)
        rest, tops = sums_beside_top(x, m, axes)
        return m, rest + (tops - 1)

    return in_one_pass_if_long(x, axes, partial(excess_in_one_pass, axes=axes), in_two_passes)


def excess_and_exponentials(x: Array, axes: Axes) -> tuple[Array, Array, Array]:
    """The results m and r of `excess`, and exp(x - m), which value and gradient share."""

    def in_two_passes(x: Array) -> tuple[Array, Array, Array]:
        m = stored_maximum(x, axes)
        e, (rest, tops) = exponentials_and_sums(x, m, axes)
        return m, rest + (tops - 1), e

    def in_one_pass(x: Array) -> tuple[Array, Array, Array]:
        m, r = excess_in_one_pass(x, axes)
        return m, r, jnp.exp(shift_row(x, m, axes))

    return in_one_pass_if_long(x, axes, in_one_pass, in_two_passes)


def stored_maximum(x: Array, axes: Axes, exact: DTypeLike | None = None) -> Array:
    """The result of `maximum`, which XLA:CPU computes once and does not fuse into the sums."""
    return behind_barrier_on_cpu(maximum(x, axes, exact))


def total(m: Array, r: Array) -> Array:
    """sum exp(x - m) = 1 + r; 1 in an empty row, NaN if an entry is +inf."""
    return 1 + not_negative(r) + 0 * m  # 0 m is NaN where m is infinite


def log_total(m: Array, r: Array) -> Array:
    """log sum exp(x - m) = log1p(r); 0 in an empty row, NaN if an entry is +inf."""
    return jnp.log1p(not_negative(r)) + 0 * m


def not_negative(r: Array) -> Array:
    """max(r, 0), and NaN where r is NaN, which the maximum of XLA:CPU may lose."""
    return (r + jnp.abs(r)) / 2


def log1p(x: Array) -> Array:
    """log(1 + x). The float64 log1p of XLA has errors of up to 126 ulp between -1 and 0.

    Between -1 and -1/2 the sum 1 + x is exact. Between -1/2 and 0, log(1 + x) = -log(1 + y) with
    y = -x / (1 + x).
    """
    below_half, below_zero = x < -0.5, (x >= -0.5) & (x < 0)
    y = jnp.where(below_zero, -x / jnp.where(below_zero, 1 + x, 1), jnp.where(below_half, 0, x))
    value = jnp.where(below_zero, -1, 1).astype(x.dtype) * jnp.log1p(y)
    return jnp.where(below_half, jnp.log(jnp.where(below_half, 1 + x, 1)), value)


def inner(a: Array, b: Array, axes: Axes) -> Array:
    """<a, b> over `axes`, which are kept, with 0 b = 0: a class of probability 0 has no tangent.

    The map is linear in b. The derivative with respect to a replaces a by its tangent, so that a
    product with the Hessian of a loss does not compute the gradient.
    """
    like = jnp.sum(jnp.zeros_like(b), axes, keepdims=True)  # has the type of the result
    there, back = (WithOptions(f, (("axes", axes),)) for f in (_inner, _inner_transposed))
    return linear_map(Form(there, 2), Form(back, 1), b, jnp.broadcast_to(a, b.shape), like)


def _inner(b: Array, a: Array, like: Array, *, axes: Axes) -> Array:
    return sum_of_terms(_product, (a, b), axes)


def _inner_transposed(u: Array, a: Array, like: Array, *, axes: Axes) -> Array:
    return _product(a, jnp.broadcast_to(u, a.shape))


def _product_with(v: Array, c: Array, *, axes: Axes) -> Array:
    """c v with 0 v = 0, linear in v."""
    return _product(c, v)


def _product_of(v: Array, c: Array, *, axes: Axes) -> Array:
    """v c with 0 c = 0, linear in v: where v is 0, the result is 0 for every c."""
    return v * jnp.where(v == 0, 0, c)


@custom_jvp
def _product(a: Array, b: Array) -> Array:
    """a b with 0 b = 0.

    XLA:CPU of jaxlib 0.10 computes p (v - sum(p v)) wrongly, with an error as large as the result,
    if p is the same for a batch of v, as in a Jacobian. A data-dependent `where` in the sum avoids
    this.
    """

    def on_cpu(a: Array, b: Array) -> Array:
        # The choice comes last, since XLA:CPU gives a product that is summed to a library, for
        # which it stores both factors.
        is_zero = lax.optimization_barrier(a) == 0
        return jnp.where(is_zero, 0, a * jnp.where(is_zero, 0, b))

    def plain(a: Array, b: Array) -> Array:
        return a * jnp.where(a == 0, 0, b)

    return platform_dependent(a, b, cpu=on_cpu, default=plain)


@partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(primals, tangents):
    (a, b), (a_dot, b_dot) = primals, tangents
    value, parts = _product(a, b), []
    if not isinstance(a_dot, SymbolicZero):
        a_dot = jnp.broadcast_to(a_dot, value.shape)  # `row_map` needs arguments of the shape of v
        parts.append(row_map(_product_of, _product_of, a_dot, (b,), ()))
    if not isinstance(b_dot, SymbolicZero):
        b_dot = jnp.broadcast_to(b_dot, value.shape)
        parts.append(row_map(_product_with, _product_with, b_dot, (a,), ()))
    return value, sum(parts[1:], parts[0])

"""The dtype policy, and the excess that every normalizer shares.

With m = max x, everything here is a function of m and of the *excess*

    r = (sum of exp(x - m) over all entries but one maximal one),   sum exp(x) = e^m (1 + r).

The 1 of the maximal entry is left out before the sum rounds, not subtracted after it: in a row
whose top is far above the rest, 1 + r is 1 and all the information is in r.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from softjax._reductions import (
    Axes,
    behind_barrier_on_cpu,
    exponentials_and_sums,
    sums_beside_top,
)
from softjax._row_maps import row_map


def compute_dtype(dtype) -> jnp.dtype:
    """At least float32: half precision is computed there and rounded once, at the end."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def masked(x: Array, where: Array | None) -> Array:
    """x in the dtype of the computation, -inf where it is left out."""
    wide = x.astype(compute_dtype(x.dtype))
    return wide if where is None else jnp.where(where, wide, -jnp.inf)


def maximum(x: Array, axes: Axes, exact: DTypeLike | None = None) -> Array:
    """max x over `axes`, kept; the lowest finite number where every entry is -inf.

    `exact` is a narrower dtype that holds x: XLA:CPU finds the maximum there 20 times as fast, and
    without a wide copy. NaN may be lost here; the excess has it.

    The finite floor makes x - m = -inf, not NaN, in a row of -inf: its exponentials are then 0
    and its excess is -1, from which logsumexp = m + log1p(-1) = -inf needs no case of its own.
    """
    narrow = x if exact is None else x.astype(exact)
    lowest = jnp.finfo(narrow.dtype).min
    return jnp.max(narrow, axes, keepdims=True, initial=lowest).astype(x.dtype)


def excess(x: Array, axes: Axes, exact: DTypeLike | None = None) -> tuple[Array, Array]:
    """The maximum m, as `maximum`, and the excess r of x over `axes`, both with the axes kept.

    r >= 0; -1 in a row of -inf or without entries; NaN beside NaN. Entries of +inf are maximal, so
    that m + log1p(r) is +inf by itself.
    """
    # Behind the barrier XLA:CPU computes the maximum once, and no sums of logits that it knows.
    m = behind_barrier_on_cpu(maximum(x, axes, exact))
    rest, tops = sums_beside_top(x, m, axes)
    return m, rest + (tops - 1)


def excess_and_exponentials(x: Array, axes: Axes) -> tuple[Array, Array, Array]:
    """m and r as `excess`, and exp(x - m), of which value and gradient are both made."""
    m = behind_barrier_on_cpu(maximum(x, axes))
    e, (rest, tops) = exponentials_and_sums(x, m, axes)
    return m, rest + (tops - 1), e


def total(m: Array, r: Array) -> Array:
    """sum exp(x - m) = 1 + r: 1 in an empty row, NaN beside +inf, where no probability is left."""
    return 1 + not_negative(r) + 0 * m  # 0 m is NaN where m is infinite


def log_total(m: Array, r: Array) -> Array:
    """log sum exp(x - m) = log1p(r): 0 in an empty row, NaN beside +inf."""
    return jnp.log1p(not_negative(r)) + 0 * m


def not_negative(r: Array) -> Array:
    """max(r, 0), NaN where r is NaN: the maximum that XLA:CPU computes may lose it."""
    return (r + jnp.abs(r)) / 2


def inner(a: Array, b: Array, axes: Axes) -> Array:
    """<a, b> over `axes`, kept, with 0 b = 0: a class without probability has no tangent.

    The map is linear in b. In the derivative with respect to a, the tangent of a stands in the
    place of a, so that the Hessian of a loss times a vector does not compute the gradient.
    """
    return jnp.sum(row_map(_product_with, _product_with, b, (a,), axes), axes, keepdims=True)


def _product_with(v: Array, c: Array, *, axes: Axes) -> Array:
    """c v with 0 v = 0, linear in v."""
    return _product(c, v)


def _product_of(v: Array, c: Array, *, axes: Axes) -> Array:
    """v c with 0 c = 0, taken as linear in v: where v is 0, c has no say."""
    return jnp.where(v == 0, 0, v * c)


@jax.custom_jvp
def _product(a: Array, b: Array) -> Array:
    """a b with 0 b = 0.

    XLA:CPU of jaxlib 0.10 gets p (v - sum(p v)) wrong, by as much as the result, where p is the
    same for a batch of v, as in a Jacobian; with a choice that it does not know in the sum it does
    not.
    """
    return jnp.where(behind_barrier_on_cpu(a) == 0, 0, a * b)


@partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(primals, tangents):
    (a, b), (a_dot, b_dot) = primals, tangents
    value, parts = _product(a, b), []
    if not isinstance(a_dot, SymbolicZero):
        a_dot = jnp.broadcast_to(a_dot, value.shape)  # `row_map` has the rank and sizes of its v
        parts.append(row_map(_product_of, _product_of, a_dot, (b,), ()))
    if not isinstance(b_dot, SymbolicZero):
        b_dot = jnp.broadcast_to(b_dot, value.shape)
        parts.append(row_map(_product_with, _product_with, b_dot, (a,), ()))
    return value, sum(parts[1:], parts[0])

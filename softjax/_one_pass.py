"""The maximum of a row and what depends on it, in one pass over the memory, for GPU and TPU.

Two parts of a row are joined into one by an associative operation. A compiler reduces the row with
that operation, and need not know the maximum before it begins to sum. If the first part has the
larger maximum, then the maximum m and the excess r of both parts together are

    m = m_1,    r = r_1 + (1 + r_2) exp(m_2 - m_1)

The 1 of a maximal entry enters no sum here either.
"""

import math
import operator
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from softjax._cpu_sums import Axes, sums_down
from softjax._platforms import platform_dependent

# XLA:GPU processes a row of up to about this many entries within one kernel.
ROW_OF_ONE_KERNEL = 16384

Parts = tuple[Array, ...]


def excess_in_one_pass(x: Array, axes: Axes, *summed: Array) -> Parts:
    """max x, the excess of x, and the sums of further arrays of its shape; all keep the axes.

    The edge cases are those of `softjax._numerics.excess`.
    """
    lowest = float(jnp.finfo(x.dtype).min)
    nothing = (lowest, -1, *(0 for _ in summed))

    def plain(*parts: Array) -> Parts:
        return _reduced(_joined, axes, parts, nothing)

    def by_blocks(*parts: Array) -> Parts:
        blocks = (_in_blocks(a, value) for a, value in zip(parts, nothing, strict=True))
        found = _reduced(_joined, (x.ndim,), tuple(blocks), nothing)
        return plain(*(a[..., 0] for a in found))

    on_gpu = by_blocks if has_blocks(x, axes) else plain
    # An entry of -inf counts as no entry; finite numbers leave no difference of infinities.
    parts = jnp.maximum(x, lowest), jnp.where(x == -jnp.inf, -1, jnp.zeros_like(x)), *summed
    m, r, *sums = platform_dependent(*parts, cuda=on_gpu, rocm=on_gpu, default=plain)
    return m, jnp.where(m == jnp.inf, 0, r), *sums


def _joined(a: Parts, b: Parts) -> Parts:
    """The maximum, the excess and the sums of two parts together."""
    (m, r, *sums), (n, s, *others) = a, b
    first = lax.ge(m, n)
    # The choice also separates the difference from a product in x, as in
    # `softjax._reductions.shift`.
    high, low = lax.select(first, m, n), lax.select(first, n, m)
    rest = lax.select(first, r, s) + (1 + lax.select(first, s, r)) * lax.exp(low - high)
    return high, rest, *map(operator.add, sums, others)


def sums_by_blocks(terms: Parts) -> Parts:
    """The sums of several arrays over the last axis, which is kept, in one pass of a GPU."""
    axis = terms[0].ndim
    sums = sums_down(sums_down(tuple(_in_blocks(a, 0) for a in terms), axis), axis - 1)
    return tuple(a[..., None] for a in sums)


def has_blocks(x: Array, axes: Axes) -> bool:
    """Whether XLA:GPU would divide each row into hundreds of parts, which it writes to memory."""
    if axes != (x.ndim - 1,):
        return False
    length = x.shape[-1]
    return isinstance(length, int) and length > ROW_OF_ONE_KERNEL


def _in_blocks(a: Array, filling: float) -> Array:
    """a with its last axis divided into equal blocks, each of at most ROW_OF_ONE_KERNEL entries."""
    length = a.shape[-1]
    count = math.ceil(length / ROW_OF_ONE_KERNEL)
    width = math.ceil(length / count)
    if missing := count * width - length:
        widths = [(0, 0)] * (a.ndim - 1) + [(0, missing)]
        a = jnp.pad(a, widths, constant_values=filling)
    return a.reshape(*a.shape[:-1], count, width)


def maximum_and_value(x: Array, v: Array, axis: int) -> tuple[Array, Array]:
    """max x and v at a maximal entry of x, along an axis, which is kept.

    In a row of -inf they are the lowest finite number and 0.
    """
    m, at_top = _reduced(_larger, (axis,), (x, v), (float(jnp.finfo(x.dtype).min), 0))
    return m, at_top


def _larger(a: Parts, b: Parts) -> Parts:
    """The pair with the larger first number."""
    first = lax.ge(a[0], b[0])
    return lax.max(a[0], b[0]), lax.select(first, a[1], b[1])


def _reduced(
    join: Callable[[Parts, Parts], Parts], axes: Axes, parts: Parts, empty: tuple[float, ...]
) -> Parts:
    """All entries along the axes joined to one, which keeps the axes; `empty` changes nothing."""
    start = tuple(np.asarray(value, a.dtype) for value, a in zip(empty, parts, strict=True))
    return tuple(jnp.expand_dims(a, axes) for a in lax.reduce(parts, start, join, axes))

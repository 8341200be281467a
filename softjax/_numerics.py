"""The dtype policy, and the shifted exponentials that every normalizer shares.

With m = max x, d = x - m and e = exp(d), everything here is a function of m and of the *excess*

    r = (sum of e over all entries but one maximal one),      so that sum exp(x) = e^m (1 + r).

The 1 of the maximal entry is left out before the sum rounds, not subtracted after it: in a row
whose top is far above the rest, 1 + r is 1 and all the information is in r.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

# Up to this many classes the columns are written out: one loop over the rows does it all.
SHORT = 16
# From this many on, the axis is reduced in blocks. XLA:CPU fuses two reductions of one array only
# while its rows are short; beyond, it would write the exponentials to memory.
LONG = 4096
BLOCKS = (*range(1024, 127, -1), *range(1025, 4097))


def compute_dtype(dtype) -> jnp.dtype:
    """At least float32: half precision is computed there and rounded once, at the end."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def masked(x: Array, where: Array | None) -> Array:
    """x in the dtype of the computation, -inf where it is left out."""
    wide = x.astype(compute_dtype(x.dtype))
    return wide if where is None else jnp.where(where, wide, -jnp.inf)


def maximum(x: Array, axes: tuple[int, ...]) -> Array:
    """max x over `axes`, kept; the lowest finite number where every entry is -inf.

    The finite floor makes x - m = -inf, not NaN, in a row of -inf: its exponentials are then 0
    and its excess is -1, from which logsumexp = m + log1p(-1) = -inf needs no case of its own.
    """
    return jnp.max(x, axes, keepdims=True, initial=jnp.finfo(x.dtype).min)


def shift(x: Array, m: Array) -> Array:
    """x - m for m = max x: exactly 0 at a maximal entry, nowhere above 0.

    Where x is a product, a compiler may contract x - m into one multiply-add, which does not
    round the product as m was rounded. The top would not be at 0 then: a confident row of
    logits * scale would lose its digits, and at 2e10 the exponential of the top be infinite.
    min(x, m) is x, and cannot be contracted.
    """
    return jnp.minimum(x, m) - m


def excess(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The maximum m and the excess r of x over `axes`, both with the axes kept.

    r >= 0; -1 in a row of -inf or without entries; NaN beside NaN, which m may have lost: in long
    rows the maximum that XLA:CPU calls skips a NaN beside +inf. Entries of +inf are tops, so that
    m + log1p(r) needs no case of its own there either.
    """
    if len(axes) == 1 and 0 < x.shape[axes[0]] <= SHORT:
        return _excess_of_columns(x, axes[0])
    return _excess_of_rows(x, axes, _exp_finite_shift)


def excess_beside(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The same, for a result as large as x: its loop would do the columns again at every entry.

    r is NaN beside +inf, where no entry of the result has a limit.
    """
    return _excess_of_rows(x, axes, _exp_shift)


def log1p_excess(r: Array) -> Array:
    """log(1 + r), and 0 in an empty row (r = -1), where there is nothing to normalize."""
    return jnp.log1p(jnp.maximum(r, 0))


def _exp_shift(x: Array, m: Array) -> Array:
    """exp(x - m): NaN for +inf."""
    return jnp.exp(shift(x, m))


def _exp_finite_shift(x: Array, m: Array) -> Array:
    """exp(x - m), and 1 for +inf: the difference to the largest finite number is 0, not NaN."""
    return _exp_shift(x, jnp.minimum(m, jnp.finfo(x.dtype).max))


def _excess_of_rows(x: Array, axes: tuple[int, ...], exp_shift: Callable) -> tuple[Array, Array]:
    length = x.shape[-1] if axes == (x.ndim - 1,) else 0
    block = next((b for b in BLOCKS if length % b == 0), 0) if length >= LONG else 0
    if block:
        return _excess_of_blocks(x, block, exp_shift)
    return _excess_of_sums(x, axes, exp_shift)


def _excess_of_sums(x: Array, axes: tuple[int, ...], exp_shift: Callable) -> tuple[Array, Array]:
    """r = sum(e - floor(e)) + (sum(floor(e)) - 1): floor(e) is 1 at a top and 0 elsewhere.

    Without a comparison, so that XLA:CPU keeps the whole row in one fused call. Entries so close
    below the top that e rounds to 1 count as tops, in both sums alike.
    """
    m = maximum(x, axes)
    e = exp_shift(x, m)
    tops = jnp.floor(e)
    rest = jnp.sum(e - tops, axes, keepdims=True)
    if any(x.shape[axis] >= LONG for axis in axes):
        # A second read of x costs less than writing e and reading it twice.
        tops = jnp.floor(exp_shift(x, lax.optimization_barrier(m)))
    return m, rest + (jnp.sum(tops, axes, keepdims=True) - 1)


def _excess_of_columns(x: Array, axis: int) -> tuple[Array, Array]:
    columns = [lax.index_in_dim(x, k, axis) for k in range(x.shape[axis])]
    m = jnp.full_like(columns[0], jnp.finfo(x.dtype).min)
    for column in columns:
        m = jnp.maximum(m, column)
    r = jnp.zeros_like(m)
    found = jnp.zeros(m.shape, bool)
    for column in columns:
        top = (column == m) & ~found
        found |= top
        r += jnp.where(top, 0, _exp_finite_shift(column, m))
    return m, jnp.where(found | jnp.isnan(r), r, -1)


def _excess_of_blocks(x: Array, block: int, exp_shift: Callable) -> tuple[Array, Array]:
    """Sums the exponentials block by block, and once more, without the top, in the top's block."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    block_maxima = jnp.max(blocks, -1)
    m = maximum(block_maxima, (x.ndim - 1,))
    sums = jnp.sum(exp_shift(blocks, m[..., None]), -1)

    top_block = jnp.argmax(block_maxima, -1, keepdims=True)
    entries = jnp.take_along_axis(blocks, top_block[..., None], -2).squeeze(-2)
    e = exp_shift(entries, m)
    is_top = jnp.arange(block) == jnp.argmax(entries, -1, keepdims=True)
    is_top_block = jnp.arange(sums.shape[-1]) == top_block

    other_blocks = jnp.sum(jnp.where(is_top_block, 0, sums), -1, keepdims=True)
    same_block = jnp.sum(jnp.where(is_top, 0, e), -1, keepdims=True)
    top = jnp.sum(jnp.where(is_top, e, 0), -1, keepdims=True)  # 1, or 0 in a row of -inf
    return m, other_blocks + same_block + (top - 1)

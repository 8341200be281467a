"""The dtype policy, and the excess that every normalizer shares.

With m = max x, everything here is a function of m and of the *excess*

    r = (sum of exp(x - m) over all entries but one maximal one),   sum exp(x) = e^m (1 + r).

The 1 of the maximal entry is left out before the sum rounds, not subtracted after it: in a row
whose top is far above the rest, 1 + r is 1 and all the information is in r.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._sharding import shards

# XLA:CPU writes out a reduction of up to about this many terms, and vectorizes over its results.
# A longer one is a loop of single additions, eight times slower. Of bfloat16 the limit is 21 terms.
UNROLLED = 21
# From this many classes on, the results that it vectorizes over are classes, below they are rows.
WIDE = 64
# From this many results on behind the classes, it vectorizes over those.
LONG = 16

Pair = tuple[Array, Array]


def compute_dtype(dtype) -> jnp.dtype:
    """At least float32: half precision is computed there and rounded once, at the end."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def masked(x: Array, where: Array | None) -> Array:
    """x in the dtype of the computation, -inf where it is left out."""
    wide = x.astype(compute_dtype(x.dtype))
    return wide if where is None else jnp.where(where, wide, -jnp.inf)


def maximum(x: Array, axes: tuple[int, ...], exact: DTypeLike | None = None) -> Array:
    """max x over `axes`, kept; the lowest finite number where every entry is -inf.

    `exact` is a narrower dtype that holds x: XLA:CPU finds the maximum there 20 times as fast, and
    without a wide copy.

    The finite floor makes x - m = -inf, not NaN, in a row of -inf: its exponentials are then 0
    and its excess is -1, from which logsumexp = m + log1p(-1) = -inf needs no case of its own.
    """
    narrow = x if exact is None else x.astype(exact)
    lowest = jnp.finfo(narrow.dtype).min
    return jnp.max(narrow, axes, keepdims=True, initial=lowest).astype(x.dtype)


def shift(x: Array, m: Array) -> Array:
    """x - m for m = max x: exactly 0 at a maximal entry, nowhere above 0.

    Where x is a product, a compiler may contract x - m into one multiply-add, which does not
    round the product as m was rounded. The top would not be at 0 then: a confident row of
    logits * scale would lose its digits, and at 2e10 the exponential of the top be infinite.
    min(x, m) is x, and cannot be contracted.
    """
    return jnp.minimum(x, m) - m


def excess(x: Array, axes: tuple[int, ...], exact: DTypeLike | None = None) -> tuple[Array, Array]:
    """The maximum m, as `maximum`, and the excess r of x over `axes`, both with the axes kept.

    r >= 0; -1 in a row of -inf or without entries; NaN beside NaN, which m may have lost: in long
    rows the maximum that XLA:CPU calls skips a NaN beside +inf. Entries of +inf are tops, so that
    m + log1p(r) is +inf by itself.
    """
    counts = shards(x, axes)
    if math.prod(counts) > 1:
        m = maximum(x, axes, exact)
        rows, top = _by_shard(x, axes, counts), _by_shard(m, axes, (1,) * len(axes))
        rest, tops = _over_shards(_sums_beside_top(rows, top, rows.ndim - 1), axes)
        return m, rest + (tops - 1)
    # Behind the barrier no compiler spends its time on evaluating the sums of logits that it knows.
    m = lax.optimization_barrier(maximum(x, axes, exact))
    order, axis = _layout(x.shape, axes)
    shape = [x.shape[i] for i in order]
    shape[axis : axis + len(axes)] = [math.prod(x.shape[i] for i in axes)]
    rows = x.transpose(order).reshape(shape)
    shape[axis] = 1
    top = m.reshape(shape)
    narrow = 0 < axis == rows.ndim - 1 and rows.shape[-1] < WIDE
    if narrow and rows.shape[-2] > 1 and rows.shape[-2] % 2 and shards(rows, (axis - 1,)) == (1,):
        # XLA:CPU vectorizes over rows, but only over an even number of them.
        even = _sums_beside_top(rows[..., :-1, :], top[..., :-1, :], axis)
        odd = _sums_beside_top(rows[..., -1:, :], top[..., -1:, :], axis)
        rest, tops = (jnp.concatenate(parts, -1) for parts in zip(even, odd, strict=True))
    else:
        rest, tops = _sums_beside_top(rows, top, axis)
    return m, (rest + (tops - 1)).reshape(m.shape)


def beside_label(x: Array, index: Array) -> tuple[Array, Array, Array]:
    """m = max x, d = x_y - m and the sum of exp(x - m) beside the class y, over the last axis.

    For classes on many devices: two sums and a maximum, where `excess` and a look-up have three.
    """
    axes = (x.ndim - 1,)
    m, counts = maximum(x, axes), shards(x, axes)
    is_label = jnp.arange(x.shape[-1], dtype=index.dtype) == index[..., None]
    rows, labels = (_by_shard(a, axes, counts) for a in (x, is_label))
    top = _by_shard(m, axes, (1,))

    def terms(part: slice) -> Pair:
        d, is_label = shift(rows[..., part], top), labels[..., part]
        return jnp.where(is_label, d, 0), jnp.where(is_label, 0, jnp.exp(d))

    return m, *_over_shards(_sums(terms, rows.shape[-1], rows.ndim - 1, last=True), axes)


def total(m: Array, r: Array) -> Array:
    """sum exp(x - m) = 1 + r: 1 in an empty row, NaN beside +inf, where no probability is left."""
    return jnp.where(m < jnp.inf, 1 + jnp.maximum(r, 0), jnp.nan)


def log_total(m: Array, r: Array) -> Array:
    """log sum exp(x - m) = log1p(r): 0 in an empty row, NaN beside +inf."""
    return jnp.where(m < jnp.inf, jnp.log1p(jnp.maximum(r, 0)), jnp.nan)


@partial(jax.checkpoint, static_argnums=(2,), prevent_cse=False)  # saves a, not the choice
def inner(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """<a, b> over `axes`, kept, with 0 b = 0: a class without probability has no tangent.

    XLA:CPU of jaxlib 0.10 gets p (v - sum(p v)) wrong, by as much as the result, where p is the
    same for a batch of v, as in a Jacobian; with a choice in the sum it does not.
    """
    is_zero = lax.optimization_barrier(lax.stop_gradient(a)) == 0
    return jnp.sum(jnp.where(is_zero, 0, a * b), axes, keepdims=True)


def _layout(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """An order of all axes that has `axes` as neighbours, and the place of their first.

    The order that there is, where the axes behind are long enough to vectorize over: an image's
    classes stay where they are. Otherwise `axes` come last.
    """
    given, axes = tuple(range(len(shape))), tuple(sorted(axes))
    if axes and axes == given[axes[0] : axes[-1] + 1] and math.prod(shape[axes[-1] + 1 :]) >= LONG:
        return given, axes[0]
    return tuple(axis for axis in given if axis not in axes) + axes, len(shape) - len(axes)


def _sums_beside_top(rows: Array, m: Array, axis: int) -> Pair:
    """The sum of exp(x - m) over an axis without the maximal entries, and how many those are."""

    def terms(part: slice) -> Pair:
        x = lax.slice_in_dim(rows, part.start, part.stop, axis=axis)
        is_top = x == m
        return jnp.where(is_top, 0, jnp.exp(shift(x, m))), is_top.astype(x.dtype)

    return _sums(terms, rows.shape[axis], axis, last=axis == rows.ndim - 1)


def _by_shard(x: Array, axes: tuple[int, ...], counts: tuple[int, ...]) -> Array:
    """x as [..., *counts, what one device holds]: sums over the last axis need no other device."""
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    x = x.transpose(*kept, *axes)
    for axis, count in zip(range(len(kept), x.ndim), counts, strict=True):
        # Split where it stands, for Explicit axes take one step at a time, then to its place.
        axis = axis + (axis - len(kept))
        x = x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
    outer, inner = (range(len(kept) + i, x.ndim, 2) for i in (0, 1))
    x = x.transpose(*range(len(kept)), *outer, *inner)
    parts = len(kept) + len(axes)
    return x.reshape(*x.shape[:parts], math.prod(x.shape[parts:]))  # -1 is unknown of no rows


def _over_shards(sums: Pair, axes: tuple[int, ...]) -> Pair:
    """The sums of all shards, with the axes kept."""
    a, b = (jnp.sum(x, range(x.ndim - len(axes), x.ndim)) for x in sums)
    return jnp.expand_dims(a, axes), jnp.expand_dims(b, axes)


def _sums(terms: Callable[[slice], Pair], length: int, axis: int, last: bool) -> Pair:
    """The sums of two arrays over an axis, both in one loop, as a tree.

    The axis is cut into tiles [height, width], which are summed down their columns, then over
    the columns, then over the tiles. This is exact to a few ulp and vectorizes, and the first
    loop, which has all the exponentials, writes 1 / height of what it reads. `terms` gives the
    arrays part by part: an expression that is sliced in two places would be an array in memory.
    """
    sums, start = [], 0
    for count, height, width in _tiling(length, last):
        stop = start + count * height * width
        a, b = terms(slice(start, stop))
        start = stop
        tiles = (*a.shape[:axis], count, height, width, *a.shape[axis + 1 :])
        columns = _sums_down(a.reshape(tiles), b.reshape(tiles), axis + 1)
        sums.append(_sums_along(*_sums_along(*columns, axis + 1, last), axis, last))
    (a, b), *others = sums
    for other in others:
        a, b = a + other[0], b + other[1]
    return a, b


def _sums_along(a: Array, b: Array, axis: int, last: bool) -> Pair:
    """The same of arrays in memory."""
    if a.shape[axis] == 1:
        return jnp.squeeze(a, axis), jnp.squeeze(b, axis)

    def part_of(x: Array, part: slice) -> Array:
        return lax.slice_in_dim(x, part.start, part.stop, axis=axis)

    return _sums(lambda part: (part_of(a, part), part_of(b, part)), a.shape[axis], axis, last)


def _sums_down(a: Array, b: Array, axis: int) -> Pair:
    zero = jnp.zeros((), a.dtype)
    return lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), (axis,))


@cache
def _tiling(length: int, last: bool) -> list[tuple[int, int, int]]:
    """(count, height, width) of the tiles that cover an axis, one kind after the other.

    Narrow ones vectorize over rows, wide ones over classes too, which must be the last axis.
    """
    if length < WIDE:
        starts = range(0, max(length, 1), UNROLLED)
        return [(1, min(UNROLLED, length - start), 1) for start in starts]
    if not last:
        count, left_over = divmod(length, UNROLLED)
        return [(count, UNROLLED, 1)] + ([(1, left_over, 1)] if left_over else [])
    tiles = [(h, w) for h in range(8, UNROLLED + 1) for w in range(8, 49, 8) if h * w <= length]
    height, width = min(tiles, key=lambda tile: (length % math.prod(tile), -tile[0], tile[1]))
    count = length // (height * width)
    left_over = length - count * height * width
    return [(count, height, width)] + (_tiling(left_over, last) if left_over else [])

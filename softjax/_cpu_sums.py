"""Sums of rows and the index of a maximum, in the form that compiles best with XLA:CPU.

A long row is divided into tiles, which are summed as a tree. The tree depends on the length of the
row and not on the other rows, and two sums of the same row are computed in one loop.

Comments about XLA:CPU are true for jaxlib 0.10 to 0.12.
"""

import math
from collections.abc import Callable
from functools import cache, partial, reduce

import jax.numpy as jnp
from jax import Array, lax

from softjax._custom_jvp import custom_jvp
from softjax._sharding import shards

# XLA:CPU unrolls a reduction of up to about this many terms, and vectorizes over its results. A
# longer reduction is a loop of single additions, which is eight times slower. For bfloat16 the
# limit is 21 terms.
UNROLLED = 21
# XLA:CPU computes with this many numbers at once.
VECTOR = 8
# A reduction that vectorizes over other axes than its own is unrolled up to 29 terms. Rows of up to
# LONG_ROW entries have tiles up to HIGHEST, since few lower tiles of whole vectors divide them
# without a rest. A tile lower than LOWEST would write too many numbers.
LOWEST, HIGHEST, LONG_ROW = 8, 25, 4096
# The last sum of a tree adds up to this many terms one after the other. With 20 terms the error of
# the whole sum would be 1.5 times as large. A reduction of so few terms is unrolled even if each
# takes ten operations; a higher one of such terms is a loop, which takes four times as long.
FEW = 11
# Up to this many numbers are summed in one loop, which adds its vectors, or halves, first.
MANY = 128
# With at least this many results on the axes after the classes, it vectorizes over those axes.
LONG = 16

Axes = tuple[int, ...]
Pair = tuple[Array, Array]
Sums = tuple[Array, ...]
Terms = Callable[[Array, Array], Sums]
Combine = Callable[[Sums, Sums], Sums]


def added(a: Sums, b: Sums) -> Sums:
    return tuple(map(lax.add, a, b))


def larger(a: Sums, b: Sums) -> Sums:
    return tuple(map(lax.max, a, b))


def added_beside_place(a: Sums, b: Sums) -> Sums:
    """The sums, and of the last array the larger index."""
    return *added(a[:-1], b[:-1]), *larger(a[-1:], b[-1:])


def terms_beside_top(x: Array, m: Array) -> Pair:
    """exp(x - m) with 0 at the maximal entries, and a mask of these; NaN where x is NaN."""
    is_top = x == m
    return jnp.where(is_top, 0, jnp.exp(x - m)), _counted(is_top, x)


def terms_of_exponentials(e: Array, one: Array) -> Pair:
    """The terms from exp(x - m). An entry that rounds to 1 counts as a maximal entry."""
    is_top = e == one
    return jnp.where(is_top, 0, e), _counted(is_top, e)


def _counted(mask: Array, x: Array) -> Array:
    """The mask as integers as wide as x, which take less time to add than floating numbers."""
    return mask.astype(jnp.int64 if x.dtype == jnp.float64 else jnp.int32)


def exponentials_alone(e: Array, m: Array) -> Sums:
    """The terms from exp(x - m), of which none is left out."""
    return (e,)


def sums_in_tiles(
    x: Array,
    m: Array,
    axes: Axes,
    terms: Terms = terms_beside_top,
    has_place: bool = False,
    inlined: bool = False,
) -> Sums:
    """The sums of `terms` over `axes`, which are kept.

    With the first two terms given here these are the sum without the maximal entries, and their
    number. With `has_place` the last result is the largest index where x is 1, or 0 without any,
    along the only axis, whose size is known and which is on one device. `sums_of_tiles` explains
    `inlined`.
    """
    counts = shards(x, axes)
    if math.prod(counts) > 1:
        rows, top = by_shard(x, axes, counts), by_shard(m, axes, (1,) * len(axes))
        return over_shards(_tiled(terms, rows, top, rows.ndim - 1, inlined=inlined), axes)
    order, axis = _layout(x.shape, axes)
    shape = [x.shape[i] for i in order]
    shape[axis : axis + len(axes)] = [math.prod(x.shape[i] for i in axes)]
    rows = x.transpose(order).reshape(shape)
    shape[axis] = 1
    top = m.reshape(shape)
    if not isinstance(rows.shape[axis], int):  # the size is a symbol in an exported program
        sums = tuple(jnp.sum(a, axis) for a in terms(rows, top))
    elif _is_odd(rows, axis):
        # XLA:CPU vectorizes over rows only if their number is even.
        even = _tiled(terms, rows[..., :-1, :], top[..., :-1, :], axis, has_place, inlined)
        odd = _tiled(terms, rows[..., -1:, :], top[..., -1:, :], axis, has_place, inlined)
        sums = tuple(jnp.concatenate(parts, -1) for parts in zip(even, odd, strict=True))
    else:
        sums = _tiled(terms, rows, top, axis, has_place, inlined)
    place = (sums[-1].reshape(m.shape),) if has_place else ()
    sums = sums[:-1] if has_place else sums
    return *(a.reshape(m.shape).astype(m.dtype) for a in sums), *place


def _is_odd(rows: Array, axis: int) -> bool:
    """Whether there is an odd number of rows with few classes, one after the other in memory."""
    if not 0 < axis == rows.ndim - 1 or rows.shape[-1] > UNROLLED:
        return False
    count = rows.shape[-2]
    return (
        isinstance(count, int)
        and count > 1
        and count % 2 == 1
        and shards(rows, (axis - 1,)) == (1,)
    )


def _tiled(
    terms: Terms, rows: Array, m: Array, axis: int, has_place: bool = False, inlined: bool = False
) -> Sums:
    """The sums of `terms` over an axis, and with `has_place` the index where `rows` is 1."""

    def of_part(part: slice) -> Sums:
        x = lax.slice_in_dim(rows, part.start, part.stop, axis=axis)
        places = (jnp.where(x == 1, _indices(x, axis) + part.start, 0),) if has_place else ()
        return *terms(x, m), *places

    combine = added_beside_place if has_place else added
    is_last = axis == rows.ndim - 1
    return sums_of_tiles(of_part, rows.shape[axis], axis, is_last, combine=combine, inlined=inlined)


def _indices(rows: Array, axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, rows.shape, axis)


def _layout(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """An order of all axes in which `axes` are adjacent, and the position of the first of them.

    If the axes after them are long enough to vectorize over, the order stays as it is, as for the
    classes of an image. Otherwise, also if a size is a symbol, `axes` come last.
    """
    given, axes = tuple(range(len(shape))), tuple(sorted(axes))
    if axes and axes == given[axes[0] : axes[-1] + 1] and has_long_vectors(shape[axes[-1] + 1 :]):
        return given, axes[0]
    return tuple(axis for axis in given if axis not in axes) + axes, len(shape) - len(axes)


def has_long_vectors(after: tuple[int, ...]) -> bool:
    """Whether axes after the classes are long enough to vectorize over; False with a symbol."""
    return all(isinstance(n, int) for n in after) and math.prod(after) >= LONG


def place_in_tiles(x: Array, m: Array, axis: int) -> Array:
    """The index of a maximal entry along an axis, which is kept, for m = max x; 0 without any.

    XLA:CPU searches for an index entry by entry, but a maximum of integers vectorizes. If the
    program computes x itself, XLA:CPU may compute it again here with other roundings than for m.
    Then no entry may equal m. An entry that differs from it by a few roundings serves as well.
    """
    least = m - 4 * jnp.finfo(x.dtype).eps * jnp.abs(m)

    def places(part: slice) -> Sums:
        rows = lax.slice_in_dim(x, part.start, part.stop, axis=axis)
        return (jnp.where(rows >= least, _indices(rows, axis) + part.start, 0),)

    length, is_last = x.shape[axis], axis == x.ndim - 1
    if not isinstance(length, int):  # a symbol
        return jnp.max(places(slice(0, length))[0], axis, keepdims=True, initial=0)
    (place,) = sums_of_tiles(places, length, axis, is_last, combine=larger)
    return jnp.expand_dims(place, axis)


def by_shard(x: Array, axes: tuple[int, ...], counts: tuple[int, ...]) -> Array:
    """x as [..., *counts, size per device]: sums over the last axis need no other device."""
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    x = x.transpose(*kept, *axes)
    for axis, count in zip(range(len(kept), x.ndim), counts, strict=True):
        # The axis is split first and moved afterwards, as Explicit axes allow one step at a time.
        axis = axis + (axis - len(kept))
        x = x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
    outer, inner = (range(len(kept) + i, x.ndim, 2) for i in (0, 1))
    x = x.transpose(*range(len(kept)), *outer, *inner)
    parts = len(kept) + len(axes)
    return x.reshape(*x.shape[:parts], math.prod(x.shape[parts:]))  # -1 fails if there are no rows


def over_shards(sums: Sums, axes: tuple[int, ...]) -> Sums:
    """The sums over all shards, which keep the axes."""
    whole = (jnp.sum(x, range(x.ndim - len(axes), x.ndim)) for x in sums)
    return tuple(jnp.expand_dims(a, axes).astype(sums[0].dtype) for a in whole)


def sums_of_tiles(
    terms: Callable[[slice], Sums],
    length: int,
    axis: int,
    last: bool,
    in_any_order: bool = False,
    highest: int | None = None,
    combine: Combine = added,
    inlined: bool = False,
) -> Sums:
    """The sums of several arrays over an axis, as a tree.

    The last axis is divided into tiles of vectors. The first loop sums the vectors of each tile. It
    computes all exponentials, and writes only 1 / height of the numbers that it reads. Then the
    vectors of all tiles are added, and at last the numbers of one vector. This is accurate to a few
    ulp and vectorizes. `terms` returns the arrays part by part, because an expression that is
    sliced twice would be stored.

    Each loop takes 10 ms to compile, whatever it computes. With `inlined` the vectors are added
    without a loop of their own, within the loop that uses the sum. That loop must have one step for
    each row: it computes a quotient or a logarithm of the sum. Otherwise the sum would be computed
    for each entry, as in a Hessian.

    With `in_any_order`, for the last axis and floating numbers, a library sums what the first loop
    writes. That is as accurate and compiles two loops, but the order may depend on the number of
    rows.

    With `highest`, tiles are at most as high: UNROLLED for terms of several operations, and FEW for
    several such terms.

    `combine` is another operation in place of the addition, for which 0 is the smallest number.
    """
    if length <= UNROLLED:
        return sums_down(terms(slice(0, length)), axis, combine)
    if not last:
        return _sums_over_other_axis(terms, length, axis, combine)
    if in_any_order:
        return _sums_by_library(terms, length, axis)
    vectors = _halved(_vectors_of_sums(terms, length, axis, highest, combine), axis, combine)
    if not inlined:
        return sums_down(vectors, axis, combine)
    numbers = (tuple(v[..., n] for v in vectors) for n in range(VECTOR // 2))
    return reduce(combine, numbers)


def _vectors_of_sums(
    terms: Callable[[slice], Sums], length: int, axis: int, highest: int | None, combine: Combine
) -> Sums:
    """The sums over all entries of the last axis that have the same place in their vector."""
    height, stop = _tiles(length, highest)
    columns = _columns(terms(slice(0, stop)), axis, height, combine)
    count = columns[0].shape[axis]
    if count * VECTOR > MANY:

        def of_part(part: slice) -> Sums:
            flat = (c.reshape(*c.shape[:axis], count * VECTOR) for c in columns)
            return tuple(lax.slice_in_dim(c, part.start, part.stop, axis=axis) for c in flat)

        vectors = _vectors_of_sums(of_part, count * VECTOR, axis, FEW, combine)
    else:
        every = [tuple(c[..., n, :] for c in columns) for n in range(count)]
        while len(every) > 1:
            pairs = [combine(a, b) for a, b in zip(every[::2], every[1::2], strict=False)]
            every = pairs + every[2 * len(pairs) :]
        vectors = every[0]
    if stop < length:
        rest = _terms_of_rest(terms, slice(stop, length), axis, VECTOR)
        columns = _columns(rest, axis, rest[0].shape[axis] // VECTOR, combine)
        vectors = combine(vectors, tuple(c[..., 0, :] for c in columns))
    return vectors


def _columns(parts: Sums, axis: int, height: int, combine: Combine) -> Sums:
    """The sums down the columns of tiles of whole vectors, as [..., tiles, VECTOR]."""
    shape, length = parts[0].shape[:axis], parts[0].shape[axis]
    tiles = (*shape, length // (height * VECTOR), height, VECTOR)
    return sums_down(tuple(a.reshape(tiles) for a in parts), axis + 1, combine)


def _terms_of_rest(terms: Callable[[slice], Sums], rest: slice, axis: int, width: int) -> Sums:
    """The terms of what tiles leave over, in at least two whole vectors of this width.

    They begin before the rest, with 0 in place of the terms that are in other tiles. XLA:CPU does
    not reduce an axis of size 1: each loop that uses the sum would compute the terms, and none
    could overwrite the array from which they come.
    """
    size = max(math.ceil((rest.stop - rest.start) / width), 2) * width
    parts, before = terms(slice(rest.stop - size, rest.stop)), size - (rest.stop - rest.start)
    if not before:
        return parts
    is_new = _indices(parts[0], axis) >= before
    return tuple(jnp.where(is_new, a, 0) for a in parts)


def _sums_by_library(terms: Callable[[slice], Sums], length: int, axis: int) -> Sums:
    """The sums over the last axis, of which a library adds what the first loop writes.

    A short rest is added in the loop that uses the sums.
    """
    height, stop = _tiles(length, None)

    def by_library(parts: Sums, height: int) -> Sums:
        columns = _columns(parts, axis, height, added)
        flat = (*columns[0].shape[:axis], math.prod(columns[0].shape[axis:]))
        return tuple(jnp.sum(c.reshape(flat), axis) for c in columns)

    sums, rest = by_library(terms(slice(0, stop)), height), slice(stop, length)
    if stop == length:
        return sums
    if length - stop <= UNROLLED:
        return added(sums, sums_down(terms(rest), axis))
    parts = _terms_of_rest(terms, rest, axis, VECTOR)
    return added(sums, by_library(parts, parts[0].shape[axis] // VECTOR))


def _sums_over_other_axis(
    terms: Callable[[slice], Sums], length: int, axis: int, combine: Combine
) -> Sums:
    """The sums over an axis that is not the last one; XLA:CPU vectorizes over the axes after it."""
    count = length // UNROLLED
    stop = count * UNROLLED
    parts = terms(slice(0, stop))
    tiles = (*parts[0].shape[:axis], count, UNROLLED, *parts[0].shape[axis + 1 :])
    columns = sums_down(tuple(a.reshape(tiles) for a in parts), axis + 1, combine)
    while FEW < columns[0].shape[axis] <= MANY:
        columns = _halved(columns, axis, combine)

    def of_part(part: slice) -> Sums:
        return tuple(lax.slice_in_dim(c, part.start, part.stop, axis=axis) for c in columns)

    sums = sums_of_tiles(of_part, columns[0].shape[axis], axis, last=False, combine=combine)
    if stop == length:
        return sums
    rest = _terms_of_rest(terms, slice(stop, length), axis, 1)
    return combine(sums, sums_down(rest, axis, combine))


def _halved(arrays: Sums, axis: int, combine: Combine) -> Sums:
    """Both halves of an axis, combined; the last of an odd number goes to the first result."""
    half, is_odd = divmod(arrays[0].shape[axis], 2)

    def part(start: int, stop: int) -> Sums:
        return tuple(lax.slice_in_dim(a, start, stop, axis=axis) for a in arrays)

    combined = combine(part(0, half), part(half, 2 * half))
    if not is_odd:
        return combined
    is_first = _indices(combined[0], axis) == 0
    with_last = combine(combined, part(2 * half, 2 * half + 1))
    return tuple(jnp.where(is_first, b, a) for a, b in zip(combined, with_last, strict=True))


@partial(custom_jvp, nondiff_argnums=(1, 2))
def sums_down(arrays: Sums, axis: int, combine: Combine = added) -> Sums:
    """The sums of several arrays over an axis by one reduction.

    Its derivative rule is defined here: JAX would differentiate it like a reduction by an arbitrary
    operation, part by part of the axis.
    """
    # XLA:CPU gives a single sum to a library, for which it stores the terms. It does not recognize
    # a sum that is written as a difference.
    if len(arrays) == 1 and combine is added:
        combine = _subtracted
    zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)
    return tuple(lax.reduce(arrays, zeros, combine, (axis,)))


def _subtracted(a: Sums, b: Sums) -> Sums:
    return (a[0] - -b[0],)


@sums_down.defjvp
def _sums_down_jvp(axis, combine, primals, tangents):
    return sums_down(*primals, axis, combine), tuple(jnp.sum(dot, axis) for dot in tangents[0])


@cache
def _tiles(length: int, highest: int | None) -> tuple[int, int]:
    """The height of tiles of whole vectors that leave the fewest entries over, and their end."""
    limit = highest or (UNROLLED if length > LONG_ROW else HIGHEST)
    most = length // VECTOR
    heights = range(min(LOWEST, most), min(limit, most) + 1)
    height = min(heights, key=lambda height: (length % (VECTOR * height), -height))
    return height, length - length % (VECTOR * height)

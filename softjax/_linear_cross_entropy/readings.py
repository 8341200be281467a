"""Readings of the logits of a row: the entropy of its distribution, and its most probable classes.

With d = (x - m) / T relative to the largest logit m of a row, the entropy is

    log sum_k e^d_k + sum_k e^d_k (-d_k) / sum_k e^d_k

The sums and the largest d may be computed in blocks of classes, if all blocks use the same m.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal

from softjax._custom_jvp import custom_jvp
from softjax._linear_cross_entropy.blocks import Block, class_logits
from softjax._linear_cross_entropy.tops import distance
from softjax._platforms import platform_dependent
from softjax._sharding import taken_along

# The index of the empty class, which sorts behind all others.
LAST = np.int32(np.iinfo(np.int32).max)


class Readings(NamedTuple):
    """The readings of each row from some of its classes."""

    surprise: Array  # [n], sum_k e^d_k (-d_k)
    top_d: Array  # [n, k], the largest d, in falling order
    top_classes: Array  # int32 [n, k], their classes


def readings(block: Block, top: Array, start: Array | int, k: int) -> Readings:
    """The readings of a block whose first class is `start`, relative to the given tops."""
    x = class_logits(block.product, block.bias, block.scalars.softcap)
    d = distance(x, top[:, None], block.scalars.temperature)
    e = jnp.exp(d)
    terms, k = e * -jnp.where(e == 0, 0, d), min(k, x.shape[-1])
    one_pass = _sum_and_largest if k == 1 else partial(_sum_and_top_k, k)
    form = {"cpu": partial(_sum_and_top_k, k), "default": one_pass}
    surprise, top_x, top_classes = platform_dependent(terms, x, **form)
    top_d = distance(top_x, top[:, None], block.scalars.temperature)
    return Readings(surprise, top_d, top_classes + start)


def _sum_and_top_k(k: int, terms: Array, x: Array) -> tuple[Array, Array, Array]:
    """The sum of the terms of each row, its k largest x in falling order, and their places.

    `lax.top_k` takes 0 to be larger than -0, which a row of zeros times a kernel contains.
    """
    _, places = lax.top_k(lax.stop_gradient(jnp.where(x == 0, 0, x)), k)
    return jnp.sum(terms, -1), jnp.take_along_axis(x, places, -1, mode="promise_in_bounds"), places


@custom_jvp
def _sum_and_largest(terms: Array, x: Array) -> tuple[Array, Array, Array]:
    """`_sum_and_top_k` for k = 1, in one reduction, which reads the row once."""

    def merged(a: list[Array], b: list[Array]) -> list[Array]:
        same = (a[1] == b[1]) | (jnp.isnan(a[1]) & jnp.isnan(b[1]))
        first = jnp.where(same, a[2] < b[2], (a[1] > b[1]) | jnp.isnan(a[1]))
        return [a[0] + b[0], *(jnp.where(first, *pair) for pair in zip(a[1:], b[1:], strict=True))]

    place = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    nothing = [*(jnp.full((), a, x.dtype) for a in (0, -jnp.inf)), LAST]
    surprise, top_x, place = lax.reduce([terms, x, place], nothing, merged, (1,))
    return surprise, top_x[:, None], place[:, None]


@_sum_and_largest.defjvp
def _sum_and_largest_jvp(primals, tangents):
    surprise, top_x, place = _sum_and_largest(*primals)
    top_dot = taken_along(tangents[1], place, -1, "promise_in_bounds")
    dots = jnp.sum(tangents[0], -1), top_dot, zero_from_primal(place)
    return (surprise, top_x, place), dots


def no_readings(rows: int, k: int, dtype: jnp.dtype) -> Readings:
    """The readings of no class, which sort behind all classes."""
    last = jnp.full((rows, k), LAST)
    return Readings(jnp.zeros(rows, dtype), jnp.full((rows, k), -jnp.inf, dtype), last)


def merged_readings(a: Readings, b: Readings) -> Readings:
    """The readings of both sets of classes together, with as many top classes as `a` has.

    For equal logits the first class comes first, and NaN comes before every number, as in
    `lax.top_k`.
    """
    d, classes = (jnp.concatenate(pair, -1) for pair in zip(a[1:], b[1:], strict=True))
    order = jnp.where(jnp.isnan(d), -jnp.inf, -d)
    _, classes, d = lax.sort((order, classes, d), num_keys=2)
    k = a.top_d.shape[-1]
    return Readings(a.surprise + b.surprise, d[:, :k], classes[:, :k])


def side_by_side(a: Array, axes: tuple[str, ...]) -> Array:
    """The arrays [n, k] of all devices in the order of the classes, concatenated on each device."""
    (n, k), shards = a.shape, lax.axis_size(axes)
    every = jnp.zeros((n, k * shards), a.dtype)
    every = lax.pcast(every, tuple(jax.typeof(a).manual_axis_type.varying), to="varying")
    placed = lax.dynamic_update_slice_in_dim(every, a, k * lax.axis_index(axes), axis=1)
    return lax.psum(placed, axes)


def best(top_d: Array, top_classes: Array, axes: tuple[str, ...], k: int) -> tuple[Array, Array]:
    """The k most probable classes of all devices; for equal logits the first class comes first."""
    top_d, at = lax.top_k(side_by_side(top_d, axes), k)
    return top_d, jnp.take_along_axis(side_by_side(top_classes, axes), at, -1)

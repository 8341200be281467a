"""Readings of the logits of a row: the entropy of its distribution, and its best classes.

With d = (x - m) / T below the largest logit m of a row, the entropy is

    log sum_k e^d_k + sum_k e^d_k (-d_k) / sum_k e^d_k

The sums and the largest d may come from blocks of classes, if all of them are below the same m.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._linear_cross_entropy.blocks import Block, class_logits, distance


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
    top_d, top_classes = lax.top_k(d, min(k, d.shape[-1]))
    return Readings(jnp.sum(jnp.where(e == 0, 0, e * -d), -1), top_d, top_classes + start)


def no_readings(rows: int, k: int, dtype: jnp.dtype) -> Readings:
    """The readings of no class, which sort behind every class that may be merged with them."""
    last = jnp.full((rows, k), jnp.iinfo(jnp.int32).max, jnp.int32)
    return Readings(jnp.zeros(rows, dtype), jnp.full((rows, k), -jnp.inf, dtype), last)


def merged_readings(a: Readings, b: Readings) -> Readings:
    """The readings of the classes of both, with as many of the best as `a` has.

    Of equal logits the first class comes first, and NaN before every number, as in `lax.top_k`.
    """
    d, classes = (jnp.concatenate(pair, -1) for pair in zip(a[1:], b[1:], strict=True))
    order = jnp.where(jnp.isnan(d), -jnp.inf, -d)
    _, classes, d = lax.sort((order, classes, d), num_keys=2)
    k = a.top_d.shape[-1]
    return Readings(a.surprise + b.surprise, d[:, :k], classes[:, :k])


def side_by_side(a: Array, axes: tuple[str, ...]) -> Array:
    """[n, k] of every device in the order of the classes, the same on each."""
    (n, k), shards = a.shape, lax.axis_size(axes)
    every = jnp.zeros((n, k * shards), a.dtype)
    every = lax.pcast(every, tuple(jax.typeof(a).manual_axis_type.varying), to="varying")
    placed = lax.dynamic_update_slice_in_dim(every, a, k * lax.axis_index(axes), axis=1)
    return lax.psum(placed, axes)


def best(top_d: Array, top_classes: Array, axes: tuple[str, ...], k: int) -> tuple[Array, Array]:
    """The best k classes of all devices; of equal logits the first class comes first."""
    top_d, at = lax.top_k(side_by_side(top_d, axes), k)
    return top_d, jnp.take_along_axis(side_by_side(top_classes, axes), at, -1)

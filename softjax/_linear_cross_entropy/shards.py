"""Classes that are sharded over several devices: which of them are here, and merged statistics.

    M = max_s m_s,   1 + R = sum_s (1 + r_s) exp(m_s - M)     over the shards s of the classes

As on one device, the 1 of the shard that holds M is subtracted before anything is rounded.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from softjax._custom_jvp import custom_jvp
from softjax._linear_cross_entropy.blocks import Statistics, times
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.tops import difference, distance

TwoStatistics = tuple[Statistics, Statistics]


def joined(s: Statistics, axes: tuple[str, ...], temperature: Array | None) -> Statistics:
    """The statistics of all shards merged, by one maximum and one sum over the devices.

    A shard that holds the top contributes (1 + r) e^d - 1 = r + (1 + r) expm1(d), where d = 0.
    """
    top = _top_over(s.top, axes)
    is_top = s.top == top
    d = _distance(s, top, temperature)
    beside = s.excess + (1 + s.excess) * jnp.expm1(jnp.where(is_top, d, 0))
    r = jnp.where(is_top, beside, (1 + s.excess) * jnp.exp(d))
    columns = [r, is_top.astype(r.dtype)]
    if s.mass is not None and s.cost is not None:
        cost = s.cost + times(s.mass, -d)
        columns += [s.mass, cost]
    if s.label_logits is not None:
        columns += list(s.label_logits.T)
    rest, tops, *others = lax.psum(jnp.stack(columns), axes)
    mass = cost = label_logits = None
    if s.mass is not None:
        mass, cost, *others = others
    if s.label_logits is not None:
        label_logits = (
            jnp.stack(others, -1) if others else jnp.zeros((rest.shape[0], 0), rest.dtype)
        )
    return Statistics(top, rest + (tops - 1), label_logits, mass, cost)


def joined_gap(
    gap: Array, s: TwoStatistics, axes: tuple[str, ...], temperature: Array | None
) -> tuple[Array, TwoStatistics]:
    """The gap r_x - r_y of two heads and their statistics, of all shards (see tops.py)."""
    x, y = (joined(own, axes, temperature) for own in s)
    d_x, d_y = (_distance(a, b.top, temperature) for a, b in zip(s, (x, y), strict=True))
    own_gap = (1 + s[0].excess) * difference(jnp.exp(d_x), jnp.exp(d_y), d_x - d_y)
    return lax.psum(own_gap + gap * jnp.exp(d_y), axes), (x, y)


def _distance(s: Statistics, top: Array, temperature: Array | None) -> Array:
    """d of the top of a shard; 0 for one without a class, where derivatives by T would overflow."""
    return distance(jnp.where(s.excess < 0, top, s.top), top, temperature)


@partial(custom_jvp, nondiff_argnums=(1,))
def _top_over(top: Array, axes: tuple[str, ...]) -> Array:
    return lax.pmax(top, axes)


@_top_over.defjvp
def _top_over_jvp(axes, primals, tangents):
    """The tangent of the shard with the largest top; for ties the mean, as the excess assumes."""
    top = _top_over(primals[0], axes)
    is_top = (primals[0] == top).astype(top.dtype)
    share = is_top / lax.psum(is_top, axes)
    return top, lax.psum(share * tangents[0], axes)


def first_class(axes: tuple[str, ...], part: Arguments) -> Array | int:
    """The first class of this device; 0 if every device has all classes."""
    return lax.axis_index(axes) * part.classes.length if axes else 0


def on_first_device(a: Array, axes: tuple[str, ...]) -> Array:
    """`a` on the first device of the axes and 0 on the others, for a sum over all devices."""
    return jnp.where(lax.axis_index(axes) == 0, a, 0) if axes else a

"""The examples that take part, put together, so that the others cost no product.

How many there are is known when the program runs, and the size of arrays when it is compiled: there
is room for `most` of them. More than that spoil the result, which is then NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.sharding import use_abstract_mesh

from softjax._linear_cross_entropy.blocks import Rows
from softjax._linear_cross_entropy.layout import Layout
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.sharded import padded, specs_of


class Packed(NamedTuple):
    """The rows that take part, over a mesh those of each device.

    Attributes:
        arguments: with as many rows as there is room for.
        scale: that of these rows.
        places: where each was; the number of all rows where there is none.
        spoiled: 1, or NaN where there was not room for all.
    """

    arguments: Arguments
    scale: Array
    places: Array
    spoiled: Array


def packed(layout: Layout | None, arguments: Arguments, scale: Array, most: int) -> Packed:
    """The active rows, in their order."""
    shards = 1 if layout is None else layout.size(layout.rows)
    room = -(-most // shards)

    def local(rows: Rows, scale: Array) -> tuple[Rows, Array, Array, Array]:
        assert rows.active is not None
        count, length = jnp.sum(rows.active, dtype=jnp.int32), rows.active.shape[0]
        (places,) = jnp.nonzero(rows.active, size=room, fill_value=length)
        taken = jax.tree.map(lambda a: a.at[places].get(mode="fill", fill_value=0), (rows, scale))
        overflows = count > room
        if layout is not None and layout.rows:
            overflows = lax.psum(overflows.astype(scale.dtype), layout.rows) > 0
        return *taken, places, jnp.where(overflows, jnp.nan, 1).astype(scale.dtype)

    if layout is None or layout.is_manual:
        rows, scale, places, spoiled = local(arguments.rows, scale)
        return Packed(arguments._replace(rows=rows), scale, places, spoiled)
    arguments, spec = padded(layout, arguments), P(layout.rows)
    specs = specs_of(layout, arguments).rows, spec
    rows, scale, places, spoiled = _on_devices(
        layout, local, (arguments.rows, layout.evened(scale, spec)), specs, (*specs, spec, P())
    )
    return Packed(arguments._replace(rows=rows), scale, places, spoiled)


def unpacked(layout: Layout | None, losses: Array, places: Array, count: int) -> Array:
    """The losses [count] of all rows, 0 for those that take no part."""

    def local(losses: Array, places: Array, zeros: Array) -> Array:
        return zeros.at[places].set(losses, mode="drop")

    if layout is None or layout.is_manual:
        return local(losses, places, jnp.zeros(count, losses.dtype))
    spec = P(layout.rows)
    zeros = layout.evened(jnp.zeros(count, losses.dtype), spec)
    every = _on_devices(layout, local, (losses, places, zeros), (spec, spec, spec), spec)
    return layout.as_rows(every[:count])


def _on_devices(
    layout: Layout, local: Callable, operands: tuple, in_specs: tuple, out_specs: Any
) -> Any:
    """`local` of what each device has."""
    with use_abstract_mesh(layout.mesh):
        operands = jax.tree.map(layout.placed, operands, in_specs)
        over = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs)
        return over(*operands)

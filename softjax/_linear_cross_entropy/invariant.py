"""Results of a row with the same bits in any batch: rows are computed in tiles of equal size.

A product of n rows is computed by different programs for different n, which add in different
orders. With padded tiles, n is always the same, and the other rows of a tile do not affect a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import zero_from_primal

from softjax._linear_cross_entropy.pieces import Arguments, dots_of, jvp_along, put, some_rows
from softjax._platforms import platform_dependent
from softjax._sharding import fori_loop

# The number of rows in a tile, with which products run at full speed.
ON_CPU, ELSEWHERE = 64, 256


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def in_tiles(function: Callable, whole: Callable, arguments: Arguments) -> Any:
    """function(arguments), computed one tile of rows at a time.

    The function returns a tree of real and a tree of integer arrays, whose first axis are the rows.
    The derivative of the real arrays is the derivative of `whole`, the same function for all rows.
    """

    def of_size(size: int, arguments: Arguments) -> Any:
        def step(i, values):
            new = function(some_rows(padded, i * size, size))
            return jax.tree.map(partial(put, start=i * size, axis=0), values, new)

        count = arguments.rows.hidden.shape[0]
        # With a single tile, a compiler would unroll the loop and fuse the tile with other
        # operations.
        more = -count % size + (size if count <= size else 0)
        rows = jax.tree.map(lambda a: _filled(a, more), arguments.rows)
        padded = arguments._replace(rows=rows)
        shapes = jax.eval_shape(function, padded)
        values = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        if count:
            values = fori_loop(0, _unknown(-(-count // size), rows.hidden), step, values)
        return jax.tree.map(lambda a: a[:count], values)

    on_cpu, elsewhere = partial(of_size, ON_CPU), partial(of_size, ELSEWHERE)
    return platform_dependent(arguments, cpu=on_cpu, default=elsewhere)


@partial(in_tiles.defjvp, symbolic_zeros=True)
def _in_tiles_jvp(function, whole, primals, tangents):
    values = in_tiles(function, whole, *primals)
    reals_dot = jvp_along(lambda arguments: whole(arguments)[0], primals, dots_of(tangents))
    no_tangents = jax.tree.map(partial(zero_from_primal, symbolic_zeros=True), values[1])
    return values, (reals_dot, no_tangents)


def _unknown(count: int, some: Array) -> Array:
    """`count` in a form that a compiler cannot evaluate, so that it keeps the loop."""
    first = some.ravel()[0] if some.size else jnp.zeros((), some.dtype)
    never = jnp.isnan(first) & (first == first)
    return count - never.astype(jnp.int32)


def _filled(a: Array, more: int) -> Array:
    return jnp.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1))

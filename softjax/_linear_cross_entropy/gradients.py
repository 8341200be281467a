"""The losses of single rows, in pieces of rows, without all logits at once, and their derivative.

`each` gives the losses of all rows. Their cotangents are not known in the forward pass, so that its
derivative rule computes the logits again, which makes four products. `of_rows` does the same for
any function of the logits of a row.

`in_tiles` gives results of a row with the same bits in any batch. A product of n rows is computed
by different programs for different n, which add in different orders. In padded tiles n is always
the same, and the other rows of a tile do not affect a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import zero_from_primal

from softjax._custom_jvp import custom_jvp
from softjax._linear_cross_entropy.blocks import (
    Block,
    Statistics,
    block_of,
    losses,
    row_tangent,
    statistics,
    tangent,
)
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    block_dots,
    dots_like,
    dots_of,
    jvp_along,
    product_tangent,
    put,
    shapes_of,
    some_rows,
    sweep,
    transposed,
    with_more_rows,
)
from softjax._linear_cross_entropy.plans import rows_of_tangents, rows_of_values
from softjax._linear_cross_entropy.shards import first_class, joined
from softjax._numerics import compute_dtype
from softjax._platforms import platform_dependent
from softjax._sharding import fori_loop, varying


def each(arguments: Arguments, budget: int | None, batch_invariant: bool = False) -> Array:
    """The loss l_i of each row."""

    def of_part(part: Arguments) -> tuple[Array, tuple]:
        return losses_of_part(part), ()

    whole = partial(of_rows, of_part, _losses_tangent, budget)
    return (in_tiles(of_part, whole, arguments) if batch_invariant else whole(arguments))[0]


@partial(custom_jvp, nondiff_argnums=(0, 1, 2))
def of_rows(function: Callable, tangent: Callable, budget: int | None, arguments: Arguments) -> Any:
    """function(arguments), computed some rows at a time.

    The function returns a tree of real and a tree of integer arrays, whose first axis are the rows.
    The derivative of the real arrays is tangent(arguments, dots), also computed some rows at a
    time.
    """

    def step(values, arguments, start, size):
        new = function(some_rows(arguments, start, size))
        return jax.tree.map(partial(put, start=start, axis=0), values, new)

    shapes, results = shapes_of(arguments), jax.eval_shape(function, arguments)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), results)
    count = arguments.rows.hidden.shape[0]
    return sweep(step, zeros, arguments, count, rows_of_values(shapes, budget))


@partial(of_rows.defjvp, symbolic_zeros=True)
def _of_rows_jvp(function, tangent, budget, primals, tangents):
    (arguments,), (dots,) = primals, dots_of(tangents)
    values, shapes = of_rows(function, tangent, budget, arguments), shapes_of(arguments)
    # In reverse mode the cotangents are summed over the steps in this dtype, and rounded once.
    wide = compute_dtype(arguments.rows.hidden.dtype)
    dots = jax.tree.map(lambda dot: dot.astype(wide), dots)

    def step(values_dot, operands, start, size):
        part, part_dots = (some_rows(a, start, size) for a in operands)
        new = tangent(part, part_dots)
        return jax.tree.map(partial(put, start=start, axis=0), values_dot, new)

    zeros, kernels = jax.tree.map(jnp.zeros_like, values[0]), dots.classes.kernel is not None
    size = rows_of_tangents(shapes, budget, int(kernels))
    count = arguments.rows.hidden.shape[0]
    reals_dot = sweep(step, zeros, (arguments, dots), count, size)
    no_tangents = jax.tree.map(partial(zero_from_primal, symbolic_zeros=True), values[1])
    return values, (reals_dot, no_tangents)


def by_rows(function: Callable, budget: int | None, arguments: Arguments) -> Any:
    """`of_rows` for a function whose derivative is computed by JAX."""

    def tangent(part: Arguments, dots: Arguments):
        return jvp_along(lambda part: function(part)[0], (part,), (dots_like(part, dots),))

    return of_rows(function, tangent, budget, arguments)


def statistics_over(axes: tuple[str, ...], budget: int | None, arguments: Arguments) -> Statistics:
    """The statistics of all classes, which are sharded over the devices."""

    def local(part: Arguments) -> tuple[Statistics, tuple]:
        return statistics(block_of(*part), part.rows.index, first_class(axes, part)), ()

    s, _ = by_rows(local, budget, varying(arguments, axes))
    return joined(s, axes, arguments.scalars.temperature)


def block_tangent(
    part: Arguments, dots: Arguments, block: Block, s: Statistics, start: Array | int
) -> Array:
    """The contribution of a block of classes to the tangent of the losses."""
    rows = part.rows
    linear = partial(tangent, block, s, rows.index, start, rows.active)
    l_dot = linear(block_dots(None, dots))
    if dots.rows.hidden is None and dots.classes.kernel is None:
        return l_dot
    of_product = jax.tree.map(lambda _: None, block)._replace(product=block.product)
    (g, *_) = transposed(linear, of_product, jnp.ones_like(l_dot))
    assert g is not None
    return l_dot + product_tangent(g, part, dots, l_dot.dtype)


def losses_of_part(part: Arguments) -> Array:
    rows, _, scalars = part
    return losses(statistics(block_of(*part), rows.index, 0), rows.mass, rows.active, scalars)


def _losses_tangent(part: Arguments, dots: Arguments) -> Array:
    rows, _, scalars = part
    block = block_of(*part)
    s = statistics(block, rows.index, 0)
    of_rows = row_tangent(s, rows.mass, rows.active, scalars, block_dots(None, dots))
    return of_rows + block_tangent(part, dots, block, s, 0)


# The number of rows in a tile, with which products run at full speed.
ON_CPU, ELSEWHERE = 64, 256


@partial(custom_jvp, nondiff_argnums=(0, 1))
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
        # operations. The number of rows of an exported program may be a symbol.
        one_tile = not isinstance(count, int) or count <= size
        more = -count % size + (size if one_tile else 0)
        rows = with_more_rows(arguments.rows, more)
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

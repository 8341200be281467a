"""The sum of the losses and its gradients, by pieces of rows or by pieces of classes."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from softjax._linear_cross_entropy import plan
from softjax._linear_cross_entropy.blocks import (
    Block,
    Classes,
    Rows,
    Statistics,
    block_of,
    losses,
    merged,
    statistics,
)
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    plus_times_rows,
    shapes_of,
    some_classes,
    some_rows,
    times_classes,
    times_rows,
    transposed,
    wanted_of,
)
from softjax._linear_cross_entropy.sweep import accumulated, cut, put, sweep
from softjax._linear_cross_entropy.tangents import row_tangent, tangent
from softjax._numerics import compute_dtype

Result = tuple[Array, Arguments, Array]  # the sum, its gradients, the losses


def gradients_by_rows(
    arguments: Arguments, scale: Array, dots: Arguments, budget: int | None
) -> Result:
    """sum scale_i l_i and its gradients by what has a tangent in `dots`: three products.

    The logits of some rows, all their classes, give the loss and the gradient at once.
    """
    dtype = scale.dtype

    def step(sums, operands, start, size):
        value, bars, values = sums
        part, c = some_rows(operands[0], start, size), cut(operands[1], start, size, 0)
        rows, scalars, block = part.rows, part.scalars, block_of(*part)
        s = statistics(block, rows.index, 0)
        some_losses = losses(s, rows.mass, rows.active, scalars)

        def linear(dots: Block) -> Array:
            l_dot = tangent(block, s, rows.index, 0, rows.active, dots)
            return l_dot + row_tangent(s, rows.mass, rows.active, scalars, dots)

        new = transposed(linear, wanted_of(block, dots), c)
        put_rows = partial(put, start=start, axis=0)
        hidden_bar, kernel_bar = bars.rows.hidden, bars.classes.kernel
        g = None if new.product is None else new.product.astype(rows.hidden.dtype)
        if g is not None and hidden_bar is not None:
            hidden_bar = put_rows(hidden_bar, times_classes(g, part.classes.kernel, dtype))
        if g is not None and kernel_bar is not None:
            kernel_bar = plus_times_rows(kernel_bar, rows.hidden, g)
        mass_bar = jax.tree.map(put_rows, bars.rows.mass, new.mass)
        dense_bar = jax.tree.map(put_rows, bars.rows.dense, new.dense)
        class_bars = jax.tree.map(jnp.add, bars.classes[1:], new[1:4])
        bars = Arguments(
            Rows(hidden_bar, None, mass_bar, dense_bar, None),
            Classes(kernel_bar, *class_bars),
            jax.tree.map(jnp.add, bars.scalars, new.scalars),
        )
        return value + jnp.sum(c * some_losses), bars, put_rows(values, some_losses)

    shapes = shapes_of(arguments)
    sizes = plan.rows_of_gradients(shapes, budget), plan.rows_of_second(shapes, budget)
    bars = _shapes_of_bars(arguments, dots, arguments.rows.hidden.dtype, dtype)
    sums = ShapeDtypeStruct((), dtype), bars, ShapeDtypeStruct(scale.shape, dtype)
    return accumulated(step, sums, shapes.rows, sizes, (arguments, scale))


def gradients_by_classes(
    arguments: Arguments, scale: Array, dots: Arguments, budget: int | None
) -> Result:
    """The same in two passes over the classes: four products.

    The logits of all rows, some classes, give statistics at first and gradients when those of all
    the classes are there. What belongs to a class is then done in one product, and rounded once.
    """
    (rows, classes, scalars), dtype = arguments, scale.dtype
    length = classes.kernel.shape[-1]
    size = plan.classes_of_gradients(shapes_of(arguments), budget)

    def joined(s, arguments, start, size):
        part = some_classes(arguments, start, size)
        new = statistics(block_of(*part), part.rows.index, start)
        return merged(s, new, part.scalars.temperature)

    s = sweep(joined, _no_class(arguments), arguments, length, size)
    values = losses(s, rows.mass, rows.active, scalars)

    def step(bars, operands, start, size):
        arguments, scale, s = operands
        part = some_classes(arguments, start, size)
        rows, block = part.rows, block_of(*part)
        linear = partial(tangent, block, s, rows.index, start, rows.active)
        new = transposed(linear, wanted_of(block, dots)._replace(mass=None), scale)
        put_classes = partial(put, start=start, axis=-1)
        hidden_bar, kernel_bar = bars.rows.hidden, bars.classes.kernel
        g = None if new.product is None else new.product.astype(rows.hidden.dtype)
        if g is not None and hidden_bar is not None:
            hidden_bar += times_classes(g, part.classes.kernel, dtype)
        if g is not None and kernel_bar is not None:
            kernel_bar = put_classes(kernel_bar, times_rows(rows.hidden, g, dtype))
        dense_bar = jax.tree.map(put_classes, bars.rows.dense, new.dense)
        class_bars = jax.tree.map(put_classes, bars.classes[1:], new[1:4])
        return Arguments(
            Rows(hidden_bar, None, bars.rows.mass, dense_bar, None),
            Classes(kernel_bar, *class_bars),
            jax.tree.map(jnp.add, bars.scalars, new.scalars),
        )

    sums = _shapes_of_bars(arguments, dots, dtype, classes.kernel.dtype)
    bars = accumulated(step, sums, length, (size, size), (arguments, scale, s))
    linear = partial(row_tangent, s, rows.mass, rows.active, scalars)
    wanted = Block(None, None, None, None, None, bars.rows.mass, bars.scalars)
    new = transposed(linear, wanted, scale)
    scalar_bars = jax.tree.map(jnp.add, bars.scalars, new.scalars)
    bars = Arguments(bars.rows._replace(mass=new.mass), bars.classes, scalar_bars)
    return jnp.sum(scale * values), bars, values


def _shapes_of_bars(arguments: Arguments, dots: Arguments, hidden_dtype, kernel_dtype) -> Arguments:
    """What the gradients are like; what adds up is in the dtype of the computation."""
    wide = compute_dtype(arguments.rows.hidden.dtype)
    shapes = jax.tree.map(lambda dot: ShapeDtypeStruct(dot.shape, wide), dots)
    hidden = jax.tree.map(lambda s: s.update(dtype=hidden_dtype), shapes.rows.hidden)
    kernel = jax.tree.map(lambda s: s.update(dtype=kernel_dtype), shapes.classes.kernel)
    return shapes._replace(
        rows=shapes.rows._replace(hidden=hidden), classes=shapes.classes._replace(kernel=kernel)
    )


def _no_class(arguments: Arguments) -> Statistics:
    """The statistics of no class."""
    rows, classes, _ = arguments
    zeros = jnp.zeros(len(rows.hidden), compute_dtype(rows.hidden.dtype))
    at_index = None if rows.mass is None else jnp.zeros_like(rows.mass)
    spread = None if rows.dense is None and classes.spread is None else zeros
    top = jnp.full_like(zeros, jnp.finfo(zeros.dtype).min)
    return Statistics(top, zeros - 1, at_index, spread, spread)

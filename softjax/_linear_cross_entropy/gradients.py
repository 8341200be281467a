"""The sum of the losses and its gradients, in pieces of rows and, within them, of classes."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from softjax._linear_cross_entropy.blocks import (
    Block,
    Classes,
    Scalars,
    Statistics,
    block_of,
    losses,
    merged,
    statistics,
)
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    some_classes,
    some_rows,
    times_classes,
    times_rows,
    transposed,
    wanted_of,
)
from softjax._linear_cross_entropy.plan import Plan
from softjax._linear_cross_entropy.sweep import accumulated, cut, plus, put, sweep
from softjax._linear_cross_entropy.tangents import row_tangent, tangent
from softjax._numerics import compute_dtype


def gradients(
    arguments: Arguments, scale: Array, dots: Arguments, plan: Plan
) -> tuple[Array, Arguments, Array]:
    """sum scale_i l_i, its gradients by what has a tangent in `dots`, and the l_i.

    Of some rows at a time, the statistics of all classes come first, then the gradients of some
    classes at a time. These take the logits of the statistics, three products in all, or multiply
    again, four, where that would be too many logits.
    """
    length, dtype = arguments.classes.kernel.shape[-1], scale.dtype

    def step(sums, operands, start, size):
        value, bars, values = sums
        part, c = some_rows(operands[0], start, size), cut(operands[1], start, size, 0)
        rows, _, scalars = part
        if plan.keep:
            block = block_of(*part)
            logits, s = block.product, statistics(block, rows.index, 0)
        else:
            logits, s = None, sweep(_joined, _no_class(part), part, length, plan.classes)
        some_losses = losses(s, rows.mass, rows.active, scalars)

        mass_bar, scalar_bars = _bars_of_rows(part, s, c, dots)
        some = bars.rows._replace(
            hidden=jax.tree.map(lambda a: jnp.zeros((size, a.shape[1]), dtype), bars.rows.hidden),
            mass=mass_bar,
            dense=jax.tree.map(lambda a: jnp.zeros((size, a.shape[1]), dtype), bars.rows.dense),
        )
        some = Arguments(some, bars.classes, jax.tree.map(jnp.add, bars.scalars, scalar_bars))
        some = sweep(
            partial(_bars_of_classes, dots), some, (part, logits, s, c), length, plan.classes
        )
        put_rows = partial(put, start=start, axis=0)
        bars = some._replace(rows=jax.tree.map(put_rows, bars.rows, some.rows))
        return value + jnp.sum(c * some_losses), bars, put_rows(values, some_losses)

    count = len(scale)
    sums = ShapeDtypeStruct((), dtype), _shapes_of_bars(arguments, dots, plan.rows < count), scale
    return accumulated(step, sums, count, (plan.rows, plan.second), (arguments, scale))


def _joined(s: Statistics, part: Arguments, start: Array | int, size: int) -> Statistics:
    rows, classes, scalars = some_classes(part, start, size)
    new = statistics(block_of(rows, classes, scalars), rows.index, start)
    return merged(s, new, scalars.temperature)


def _bars_of_rows(part: Arguments, s: Statistics, scale: Array, dots: Arguments):
    """What the gradients by masses and scalars have from no class."""
    rows, _, scalars = part
    mass = rows.mass if dots.rows.mass is not None else None
    kept = [None if dot is None else a for a, dot in zip(scalars, dots.scalars, strict=True)]
    linear = partial(row_tangent, s, rows.mass, rows.active, scalars)
    wanted = Block(None, None, None, None, None, mass, Scalars(*kept))
    new = transposed(linear, wanted, scale)
    return new.mass, new.scalars


def _bars_of_classes(
    dots: Arguments, bars: Arguments, operands, start: Array | int, size: int
) -> Arguments:
    """`bars`, with the gradients that come from the classes from `start` on."""
    part, logits, s, scale = operands
    rows, classes, scalars = some_classes(part, start, size)
    logits = None if logits is None else cut(logits, start, size, 1)
    block = block_of(rows, classes, scalars, logits)
    linear = partial(tangent, block, s, rows.index, start, rows.active)
    new = transposed(linear, wanted_of(block, dots)._replace(mass=None), scale)

    hidden_bar, kernel_bar, dtype = bars.rows.hidden, bars.classes.kernel, scale.dtype
    g = None if new.product is None else new.product.astype(rows.hidden.dtype)
    if g is not None and hidden_bar is not None:
        hidden_bar += times_classes(g, classes.kernel, dtype)
    plus_classes = partial(plus, start=start, axis=-1)
    if g is not None and kernel_bar is not None:
        # One that is not wide is of all rows at once, and XLA:CPU would copy it to read it.
        place = plus if kernel_bar.dtype == dtype else put
        kernel_bar = place(kernel_bar, times_rows(rows.hidden, g, dtype), start, -1)
    dense_bar = jax.tree.map(plus_classes, bars.rows.dense, new.dense)
    class_bars = jax.tree.map(plus_classes, bars.classes[1:], new[1:4])
    return Arguments(
        bars.rows._replace(hidden=hidden_bar, dense=dense_bar),
        Classes(kernel_bar, *class_bars),
        jax.tree.map(jnp.add, bars.scalars, new.scalars),
    )


def _shapes_of_bars(arguments: Arguments, dots: Arguments, adds_up: bool) -> Arguments:
    """What the gradients are like: wide, but hidden's, and the kernel's unless it adds up."""
    hidden, kernel = arguments.rows.hidden.dtype, arguments.classes.kernel.dtype
    wide = compute_dtype(hidden)
    shapes = jax.tree.map(lambda dot: ShapeDtypeStruct(dot.shape, wide), dots)
    rows, classes, _ = shapes
    of_hidden = jax.tree.map(lambda s: s.update(dtype=hidden), rows.hidden)
    of_kernel = jax.tree.map(lambda s: s.update(dtype=wide if adds_up else kernel), classes.kernel)
    return shapes._replace(
        rows=rows._replace(hidden=of_hidden), classes=classes._replace(kernel=of_kernel)
    )


def _no_class(arguments: Arguments) -> Statistics:
    """The statistics of no class."""
    rows, classes, _ = arguments
    zeros = jnp.zeros(len(rows.hidden), compute_dtype(rows.hidden.dtype))
    at_index = None if rows.mass is None else jnp.zeros_like(rows.mass)
    spread = None if rows.dense is None and classes.spread is None else zeros
    top = jnp.full_like(zeros, jnp.finfo(zeros.dtype).min)
    return Statistics(top, zeros - 1, at_index, spread, spread)

"""Sums of losses over pieces of rows or classes, with their gradients in the same pass.

`total` is the sum of scale_i l_i. Its derivative rule computes the gradients in the same pass as
the value and returns their inner product with the tangents. The rule is linear, so that its
transpose gives the gradient, and it is plain JAX, so that it can be differentiated again. If
several devices share the classes of a row, they merge the statistics of each piece of rows before
they compute its gradients.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax

from softjax._custom_jvp import custom_jvp
from softjax._linear_cross_entropy.blocks import (
    Block,
    Scalars,
    Statistics,
    block_of,
    losses,
    merged,
    row_tangent,
    statistics,
    tangent,
)
from softjax._linear_cross_entropy.gradients import losses_of_part, statistics_over
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    accumulated,
    cut,
    dots_of,
    plus,
    put,
    shapes_of,
    some_classes,
    some_rows,
    sweep,
    times_classes,
    times_rows,
    transposed,
    wanted_of,
)
from softjax._linear_cross_entropy.plans import Plan, plan_of_gradients, rows_of_values
from softjax._linear_cross_entropy.readings import Readings, merged_readings, no_readings, readings
from softjax._linear_cross_entropy.shards import first_class, joined, on_first_device
from softjax._numerics import compute_dtype
from softjax._platforms import lowered_for_platform
from softjax._sharding import varying


@partial(custom_jvp, nondiff_argnums=(2, 3))
def total(
    arguments: Arguments, scale: Array, budget: int | None, axes: tuple[str, ...] = ()
) -> Array:
    """sum_i scale_i l_i; if `axes` are given, each device has a part of the classes."""
    if axes:
        (rows, _, scalars), s = arguments, statistics_over(axes, budget, arguments)
        return jnp.sum(scale * losses(s, rows.mass, rows.active, scalars))

    def step(value, operands, start, size):
        part, c = some_rows(operands[0], start, size), cut(operands[1], start, size, 0)
        return value + jnp.sum(c * losses_of_part(part))

    shapes, zero = shapes_of(arguments), jnp.zeros((), scale.dtype)
    size = rows_of_values(shapes, budget)
    return sweep(step, zero, (arguments, scale), scale.shape[0], size)


@partial(total.defjvp, symbolic_zeros=True)
def _total_jvp(budget, axes, primals, tangents):
    (arguments, scale), (dots, scale_dot) = primals, dots_of(tangents)
    found = total_with_gradients(arguments, scale, budget, axes, dots)
    return slope_of_total(found, axes, dots, scale_dot)


class Asked(NamedTuple):
    """The requested results of a sum with its gradients."""

    dots: Arguments  # a shape for each argument whose gradient is requested
    axes: tuple[str, ...]  # the mesh axes of the classes
    # How many of the most probable classes of each row are requested, with its statistics; 0 for no
    # such readings.
    best: int = 0


class Found(NamedTuple):
    """A sum with its gradients; or their shapes.

    If the classes are sharded, each value is this device's part of a sum over the devices, except
    that the statistics are those of all classes, and the readings are relative to their tops.
    """

    value: Any
    bars: Arguments
    values: Any  # [N], the losses
    statistics: Statistics | None
    readings: Readings | None


def total_with_gradients(
    arguments: Arguments,
    scale: Array,
    budget: int | None,
    axes: tuple[str, ...],
    dots: Arguments,
    best: int = 0,
) -> Found:
    """sum_i scale_i l_i, its gradients for the tangents in `dots`, and readings of rows."""
    with_kernel = dots.classes.kernel is not None
    plans = plan_of_gradients(shapes_of(arguments), budget, with_kernel=with_kernel)
    # A function that JAX keeps for a derivative must not close over the tangents.
    like_dots = jax.tree.map(lambda dot: ShapeDtypeStruct(dot.shape, dot.dtype), dots)
    asked = Asked(like_dots, axes, min(best, arguments.classes.length))
    gradients, operands = partial(_gradients, asked), varying((arguments, scale), axes)
    return lowered_for_platform(gradients, plans, _shapes_of_found(asked, *operands), *operands)


def slope_of_total(
    found: Found, axes: tuple[str, ...], dots: Arguments, scale_dot: Array | None
) -> tuple[Array, Array]:
    """The value and its tangent, summed over the shards of the classes."""
    value, bars, values = found[:3]
    pairs = zip(jax.tree.leaves(bars), jax.tree.leaves(varying(dots, axes)), strict=True)
    value_dot = sum((inner(bar, dot, value.dtype) for bar, dot in pairs), jnp.zeros_like(value))
    if scale_dot is not None:
        value_dot += inner(values, varying(scale_dot, axes), value.dtype)
    return (lax.psum(value, axes), lax.psum(value_dot, axes)) if axes else (value, value_dot)


def _gradients(asked: Asked, plan: Plan, arguments: Arguments, scale: Array) -> Found:
    """sum_i scale_i l_i with the requested results.

    For each piece of rows, the statistics of all classes are computed first, and then the gradients
    of some classes at a time. The gradients use the logits of the statistics, which makes three
    products, or compute them again, which makes four, if these logits take too much memory. If the
    gradient of the kernel is computed separately, for all rows and some classes at a time, the
    logits are computed again for it.
    """
    count, classes = scale.shape[0], arguments.classes
    adds_up = not isinstance(count, int) or plan.rows < count
    beside = asked._replace(dots=_with_kernel(asked.dots, None)) if plan.apart else asked
    sums = _shapes_of_found(beside, arguments, scale, adds_up)
    if plan.apart or asked.best:
        sums = sums._replace(statistics=jax.eval_shape(_statistics, arguments))
    if asked.best:
        # The losses are computed from the statistics of all rows, with fewer kernels than by
        # pieces.
        sums = sums._replace(value=None, values=None)
    step, sizes = partial(_step_of_gradients, beside, plan), (plan.rows, plan.second)
    found = accumulated(step, sums, count, sizes, (arguments, scale))
    bars = found.bars
    if found.values is None:
        rows, _, scalars = arguments
        values = on_first_device(
            losses(found.statistics, rows.mass, rows.active, scalars), asked.axes
        )
        found = found._replace(value=jnp.sum(scale * values), values=values)
    if plan.apart:
        nothing = jax.tree.map(lambda _: None, asked.dots)
        alone = Asked(_with_kernel(nothing, asked.dots.classes.kernel), asked.axes)
        shapes = shapes_of_bars(arguments, alone.dots, False)
        step, sizes = partial(_bars_of_classes, alone), (plan.classes, -(-plan.classes // 4))
        operands = arguments, None, found.statistics, scale
        new, _ = accumulated(step, (shapes, None), classes.length, sizes, operands)
        bars = _with_kernel(bars, new.classes.kernel)
    # Every plan returns the same dtype.
    rounded = jax.tree.map(lambda a: a.astype(classes.kernel.dtype), bars.classes.kernel)
    every_s = found.statistics if asked.best else None
    return found._replace(bars=_with_kernel(bars, rounded), statistics=every_s)


def _shapes_of_found(
    asked: Asked, arguments: Arguments, scale: Array, adds_up: bool = False
) -> Found:
    """The shapes of the requested results, or of the sums in which they accumulate."""
    every_s = seen = None
    if asked.best:
        every_s = jax.eval_shape(_statistics, arguments)
        seen = jax.eval_shape(lambda: no_readings(scale.shape[0], asked.best, scale.dtype))
    bars = shapes_of_bars(arguments, asked.dots, adds_up)
    value, values = (ShapeDtypeStruct(shape, scale.dtype) for shape in ((), scale.shape))
    return Found(value, bars, values, every_s, seen)


def _with_kernel(a: Arguments, kernel: Any) -> Arguments:
    return a._replace(classes=a.classes._replace(kernel=kernel))


def _step_of_gradients(
    asked: Asked, plan: Plan, sums: Found, operands, start: Array | int, size: int
) -> Found:
    """`sums`, plus the contribution of a piece of rows to the value and its gradients.

    The losses of the rows are written to their places, as are their statistics and readings if
    these are requested.
    """
    axes, (value, bars, values, every_s, seen) = asked.axes, sums
    part, c = some_rows(operands[0], start, size), cut(operands[1], start, size, 0)
    (rows, classes, scalars), dtype = part, c.dtype
    logits = None
    if plan.keep:
        block = block_of(*part)
        logits, s = block.product, statistics(block, rows.index, first_class(axes, part))
    else:
        merge = partial(_merged, axes)
        s = sweep(merge, _no_class(part), part, classes.length, plan.classes)
    s = varying(joined(s, axes, scalars.temperature), axes) if axes else s
    # Terms that belong to no class are counted on only one of the devices that share the classes.
    mass_bar, scalar_bars = _bars_of_rows(part, s, on_first_device(c, axes), asked.dots)
    some = bars.rows._replace(
        hidden=jax.tree.map(lambda a: jnp.zeros((size, a.shape[1]), dtype), bars.rows.hidden),
        mass=mass_bar,
        dense=jax.tree.map(lambda a: jnp.zeros((size, a.shape[1]), dtype), bars.rows.dense),
    )
    some = Arguments(some, bars.classes, jax.tree.map(jnp.add, bars.scalars, scalar_bars))
    width = classes.length if plan.apart else plan.classes
    new = no_readings(size, asked.best, dtype) if asked.best else None
    of_classes = partial(_bars_of_classes, asked)
    some, new = sweep(of_classes, (some, new), (part, logits, s, c), classes.length, width)
    put_rows = partial(put, start=start, axis=0)
    bars = some._replace(rows=jax.tree.map(put_rows, bars.rows, some.rows))
    if values is not None:
        some_losses = on_first_device(losses(s, rows.mass, rows.active, scalars), axes)
        value, values = value + jnp.sum(c * some_losses), put_rows(values, some_losses)
    if every_s is not None:
        every_s = jax.tree.map(put_rows, every_s, s)
    return Found(value, bars, values, every_s, jax.tree.map(put_rows, seen, new))


def _statistics(part: Arguments) -> Statistics:
    return statistics(block_of(*part), part.rows.index, 0)


def _merged(
    axes: tuple[str, ...], s: Statistics, part: Arguments, start: Array | int, size: int
) -> Statistics:
    rows, classes, scalars = some_classes(part, start, size)
    start += first_class(axes, part)
    new = statistics(block_of(rows, classes, scalars), rows.index, start)
    return merged(s, new, scalars.temperature)


def _bars_of_rows(part: Arguments, s: Statistics, scale: Array, dots: Arguments):
    """The part of the gradients by masses and scalars that belongs to no class."""
    rows, _, scalars = part
    mass = rows.mass if dots.rows.mass is not None else None
    kept = [None if dot is None else a for a, dot in zip(scalars, dots.scalars, strict=True)]
    linear = partial(row_tangent, s, rows.mass, rows.active, scalars)
    wanted = Block(mass=mass, scalars=Scalars(*kept))
    new = transposed(linear, wanted, scale)
    return new.mass, new.scalars


def _bars_of_classes(
    asked: Asked, sums: tuple[Arguments, Readings | None], operands, start: Array | int, size: int
) -> tuple[Arguments, Readings | None]:
    """`sums`, plus the gradients from a piece of classes, and the readings of these classes."""
    (bars, seen), dots = sums, asked.dots
    part, logits, s, scale = operands
    rows, classes, scalars = some_classes(part, start, size)
    logits = None if logits is None else cut(logits, start, size, 1)
    block = block_of(rows, classes, scalars, logits)
    first = start + first_class(asked.axes, part)
    if seen is not None:
        # The derivative of the readings is computed in row_outputs.py.
        some = readings(*lax.stop_gradient((block, s.top)), first, asked.best)
        seen = some if size == part.classes.length else merged_readings(seen, some)
    linear = partial(tangent, block, s, rows.index, first, rows.active)
    new = transposed(linear, wanted_of(block, dots)._replace(mass=None), scale)

    hidden_bar, kernel_bar, dtype = bars.rows.hidden, bars.classes.kernel, scale.dtype
    g = None if new.product is None else new.product.astype(rows.hidden.dtype)
    if g is not None and hidden_bar is not None:
        hidden_bar += times_classes(g, classes.kernel, classes.axis, dtype)
    plus_classes = partial(plus, start=start, axis=-1)
    if g is not None and kernel_bar is not None:
        # A gradient in half precision is not a sum over pieces of rows, so that nothing has to be
        # added; and XLA:CPU would copy an array of half precision to read it.
        place = plus if kernel_bar.dtype == dtype else put
        new_bar = times_rows(rows.hidden, g, classes.axis, dtype)
        kernel_bar = place(kernel_bar, new_bar, start, classes.axis)
    dense_bar = jax.tree.map(plus_classes, bars.rows.dense, new.dense)
    class_bars = jax.tree.map(plus_classes, bars.classes[1:], new[1:4])
    bars = Arguments(
        bars.rows._replace(hidden=hidden_bar, dense=dense_bar),
        type(classes)(kernel_bar, *class_bars),
        jax.tree.map(jnp.add, bars.scalars, new.scalars),
    )
    return bars, seen


def shapes_of_bars(arguments: Arguments, dots: Arguments, adds_up: bool) -> Arguments:
    """The shapes of the gradients: wide, except hidden's, and the kernel's if it is not a sum."""
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
    """The statistics of an empty set of classes."""
    rows, classes, _ = arguments
    zeros = jnp.zeros(rows.hidden.shape[0], compute_dtype(rows.hidden.dtype))
    at_index = None if rows.mass is None else jnp.zeros_like(rows.mass)
    spread = None if rows.dense is None and classes.spread is None else zeros
    top = jnp.full_like(zeros, jnp.finfo(zeros.dtype).min)
    return Statistics(top, zeros - 1, at_index, spread, spread)


def inner(a: Array, b: Array, dtype) -> Array:
    return jnp.sum(a.astype(dtype) * b.astype(dtype))

"""The losses in pieces, of rows or of classes, without all logits at once; and their derivatives.

`total` is the sum of scale_i l_i. Its rule computes the gradients in the same pass as the value
and returns their inner product with the tangents: linear, so that it transposes to the gradient,
and plain JAX, so that it is differentiated again. By rows that takes three matrix products, by
classes four, for the losses need all classes before the first gradient.

`each` gives the losses themselves. Their cotangents are not known beforehand, so the rule computes
the logits again, four products in all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._linear_cross_entropy import plan
from softjax._linear_cross_entropy.blocks import (
    Block,
    Classes,
    Rows,
    Scalars,
    Statistics,
    block_of,
    losses,
    merged,
    statistics,
)
from softjax._linear_cross_entropy.gradient import row_tangent, tangent
from softjax._linear_cross_entropy.sweep import accumulated, cut, has_tangent, put, sweep
from softjax._numerics import compute_dtype


class Arguments(NamedTuple):
    """All that the losses depend on."""

    rows: Rows
    classes: Classes
    scalars: Scalars


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def total(arguments: Arguments, scale: Array, budget: int | None) -> Array:
    """sum_i scale_i l_i."""
    shapes = _shapes(arguments)

    def step(value, operands, start, size):
        part, c = _some_rows(operands[0], start, size), cut(operands[1], start, size, 0)
        return value + jnp.sum(c * _losses(part))

    zero, size = jnp.zeros((), scale.dtype), plan.rows_of_values(shapes, budget)
    return sweep(step, zero, (arguments, scale), shapes.rows, size)


@partial(total.defjvp, symbolic_zeros=True)
def _total_jvp(budget, primals, tangents):
    (arguments, scale), (dots, scale_dot) = primals, _dots(tangents)
    shapes = _shapes(arguments)
    half, kernel = arguments.rows.hidden.dtype.itemsize < 4, dots.classes.kernel is not None
    by_rows = plan.by_rows(shapes, budget, half=half, kernel=kernel)
    gradients = _gradients_by_rows if by_rows else _gradients_by_classes
    value, bars, scale_bar = gradients(arguments, scale, dots, budget)
    pairs = zip(jax.tree.leaves(bars), jax.tree.leaves(dots), strict=True)
    value_dot = sum((_inner(bar, dot) for bar, dot in pairs), jnp.zeros_like(value))
    if scale_dot is not None:
        value_dot += _inner(scale_bar, scale_dot)
    return value, value_dot


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def each(arguments: Arguments, budget: int | None) -> Array:
    """l_i."""
    shapes = _shapes(arguments)

    def step(values, arguments, start, size):
        return put(values, _losses(_some_rows(arguments, start, size)), start, 0)

    values = jnp.zeros(shapes.rows, compute_dtype(arguments.rows.hidden.dtype))
    return sweep(step, values, arguments, shapes.rows, plan.rows_of_values(shapes, budget))


@partial(each.defjvp, symbolic_zeros=True)
def _each_jvp(budget, primals, tangents):
    (arguments,), (dots,) = primals, _dots(tangents)
    values, shapes = each(arguments, budget), _shapes(arguments)
    # Their cotangents add up over the steps in this dtype, and are rounded once after that.
    dots = jax.tree.map(lambda dot: dot.astype(values.dtype), dots)

    def step(values_dot, operands, start, size):
        part, part_dots = (_some_rows(a, start, size) for a in operands)
        return put(values_dot, _losses_tangent(part, part_dots), start, 0)

    zeros, size = jnp.zeros_like(values), plan.rows_of_gradients(shapes, budget)
    return values, sweep(step, zeros, (arguments, dots), shapes.rows, size)


def _gradients_by_rows(
    arguments: Arguments, scale: Array, dots: Arguments, budget: int | None
) -> tuple[Array, Arguments, Array]:
    """The value and the gradients by what has a tangent, in one pass and three products."""
    shapes = _shapes(arguments)

    def step(sums, operands, start, size):
        value, bars, values = sums
        part, c = _some_rows(operands[0], start, size), cut(operands[1], start, size, 0)
        rows, scalars, block = part.rows, part.scalars, block_of(*part)
        s = statistics(block, rows.index, 0)
        l = losses(s, rows.mass, rows.active, scalars)

        def linear(block_dots: Block) -> Array:
            l_dot = tangent(block, s, rows.index, 0, rows.active, block_dots)
            return l_dot + row_tangent(s, rows.mass, rows.active, scalars, block_dots)

        new = _transposed(linear, _wanted(block, dots), c)
        hidden_bar = kernel_bar = None
        if new.product is not None:
            g = new.product.astype(rows.hidden.dtype)
            if dots.rows.hidden is not None:
                hidden_bar = put(bars.rows.hidden, _back(g, part.classes.kernel, scale.dtype), start, 0)
            if dots.classes.kernel is not None:
                kernel_bar = _plus_product(bars.classes.kernel, rows.hidden, g)
        put_rows = partial(put, start=start, axis=0)
        bars = Arguments(
            Rows(
                hidden_bar,
                None,
                jax.tree.map(put_rows, bars.rows.mass, new.mass),
                jax.tree.map(put_rows, bars.rows.dense, new.dense),
                None,
            ),
            Classes(kernel_bar, *jax.tree.map(jnp.add, list(bars.classes[1:]), list(new[1:4]))),
            jax.tree.map(jnp.add, bars.scalars, new.scalars),
        )
        return value + jnp.sum(c * l), bars, put(values, l, start, 0)

    bars = _bars_shapes(arguments, dots, arguments.rows.hidden.dtype, scale.dtype)
    sums = (jax.ShapeDtypeStruct((), scale.dtype), bars, jax.ShapeDtypeStruct(scale.shape, scale.dtype))
    sizes = plan.rows_of_gradients(shapes, budget), plan.rows_of_second(shapes, budget)
    return accumulated(step, sums, shapes.rows, sizes, (arguments, scale))


def _gradients_by_classes(
    arguments: Arguments, scale: Array, dots: Arguments, budget: int | None
) -> tuple[Array, Arguments, Array]:
    """The same in two passes and four products; what a class gets is summed in one product."""
    shapes, (rows, classes, scalars) = _shapes(arguments), arguments
    size = plan.classes_of_gradients(shapes, budget)

    def joined(s, arguments, start, size):
        part = _some_classes(arguments, start, size)
        new = statistics(block_of(*part), part.rows.index, start)
        return merged(s, new, part.scalars.temperature)

    s = sweep(joined, _no_class(arguments), arguments, shapes.classes, size)
    values = losses(s, rows.mass, rows.active, scalars)

    def step(bars, operands, start, size):
        arguments, scale, s = operands
        part = _some_classes(arguments, start, size)
        rows, block = part.rows, block_of(*part)
        linear = partial(tangent, block, s, rows.index, start, rows.active)
        new = _transposed(linear, _wanted(block, dots)._replace(mass=None), scale)
        hidden_bar = kernel_bar = None
        put_classes = partial(put, start=start, axis=-1)
        if new.product is not None:
            g = new.product.astype(rows.hidden.dtype)
            if dots.rows.hidden is not None:
                hidden_bar = bars.rows.hidden + _back(g, part.classes.kernel, scale.dtype)
            if dots.classes.kernel is not None:
                kernel_bar = put_classes(bars.classes.kernel, _over_rows(rows.hidden, g, scale.dtype))
        dense_bar = jax.tree.map(put_classes, bars.rows.dense, new.dense)
        return Arguments(
            Rows(hidden_bar, None, bars.rows.mass, dense_bar, None),
            Classes(kernel_bar, *jax.tree.map(put_classes, list(bars.classes[1:]), list(new[1:4]))),
            jax.tree.map(jnp.add, bars.scalars, new.scalars),
        )

    sums = _bars_shapes(arguments, dots, scale.dtype, classes.kernel.dtype)
    bars = accumulated(step, sums, shapes.classes, (size, size), (arguments, scale, s))
    linear = partial(row_tangent, s, rows.mass, rows.active, scalars)
    wanted = Block(None, None, None, None, None, bars.rows.mass, bars.scalars)
    new = _transposed(linear, wanted, scale)
    scalar_bars = jax.tree.map(jnp.add, bars.scalars, new.scalars)
    bars = Arguments(bars.rows._replace(mass=new.mass), bars.classes, scalar_bars)
    return jnp.sum(scale * values), bars, values


def _losses(part: Arguments) -> Array:
    rows, _, scalars = part
    s = statistics(block_of(*part), rows.index, 0)
    return losses(s, rows.mass, rows.active, scalars)


def _losses_tangent(part: Arguments, dots: Arguments) -> Array:
    """sum_k g_k (h W)_dot_k as <h_dot, g W^T> + <h, g W_dot^T>, and the rest.

    Every product has g as a factor, in the dtype of the inputs, and so has its transpose.
    """
    rows, classes, scalars = part
    block = block_of(*part)
    s = statistics(block, rows.index, 0)
    linear = partial(tangent, block, s, rows.index, 0, rows.active)
    others = Block(None, *dots.classes[1:], dots.rows.dense, dots.rows.mass, dots.scalars)
    l_dot = linear(others) + row_tangent(s, rows.mass, rows.active, scalars, others)
    hidden_dot, kernel_dot = dots.rows.hidden, dots.classes.kernel
    wanted = _wanted(block, Arguments(Rows(hidden_dot, *4 * [None]), Classes(kernel_dot, *3 * [None]), Scalars(None, None, None)))
    if wanted.product is None:
        return l_dot
    g = _transposed(linear, wanted, jnp.ones_like(l_dot)).product.astype(rows.hidden.dtype)
    if hidden_dot is not None:
        l_dot += jnp.sum(hidden_dot * _back(g, classes.kernel, l_dot.dtype), -1)
    if kernel_dot is not None:
        back = _back(g, kernel_dot.astype(g.dtype), g.dtype)
        l_dot += jnp.sum((rows.hidden * back).astype(l_dot.dtype), -1)
    return l_dot


def _plus_product(total: Array, hidden: Array, g: Array) -> Array:
    """total + h^T g, some columns at a time: the product takes less than the logits did."""

    def step(total, operands, start, size):
        hidden, g = operands
        new = _over_rows(hidden, cut(g, start, size, 1), total.dtype)
        return put(total, cut(total, start, size, 1) + new, start, 1)

    rows, classes = g.shape
    pieces = min(2 * -(-total.shape[0] // rows), 16)
    return sweep(step, total, (hidden, g), classes, -(-classes // pieces))


def _over_rows(hidden: Array, g: Array, dtype) -> Array:
    """h^T g."""
    return lax.dot_general(hidden, g, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def _back(g: Array, kernel: Array, dtype) -> Array:
    """g W^T."""
    over_classes = (((1,), (1,)), ((), ()))
    return lax.dot_general(g, kernel, over_classes, preferred_element_type=dtype)


def _wanted(block: Block, dots: Arguments) -> Block:
    """The block where the arguments have tangents, and None where they have none."""
    product = dots.rows.hidden is not None or dots.classes.kernel is not None
    tangents = Block(
        block.product if product else None,
        *dots.classes[1:],
        dots.rows.dense,
        dots.rows.mass,
        dots.scalars,
    )
    return jax.tree.map(
        lambda dot, a: None if dot is None else a, tangents, block, is_leaf=lambda x: x is None
    )


def _transposed(linear: Callable[[Block], Array], wanted: Block, l_bar: Array) -> Block:
    """The transpose of `linear` at `l_bar`, for the arguments of which `wanted` has the shapes."""
    if not jax.tree.leaves(wanted):
        return wanted
    return jax.linear_transpose(linear, wanted)(l_bar)[0]


def _bars_shapes(arguments: Arguments, dots: Arguments, hidden_dtype, kernel_dtype) -> Arguments:
    """The gradients of what has a tangent; what adds up is in the dtype of the computation."""
    wide = compute_dtype(arguments.rows.hidden.dtype)
    shapes = jax.tree.map(lambda dot: jax.ShapeDtypeStruct(dot.shape, wide), dots)
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


def _some_rows(arguments: Arguments, start: Array | int, size: int) -> Arguments:
    piece = partial(cut, start=start, size=size, axis=0)
    return arguments._replace(rows=jax.tree.map(piece, arguments.rows))


def _some_classes(arguments: Arguments, start: Array | int, size: int) -> Arguments:
    piece = partial(cut, start=start, size=size, axis=-1)
    rows, classes, scalars = arguments
    dense = jax.tree.map(piece, rows.dense)
    return Arguments(rows._replace(dense=dense), jax.tree.map(piece, classes), scalars)


def _inner(a: Array, b: Array) -> Array:
    """<a, b>, in the dtype of a."""
    return jnp.sum(a * b.astype(a.dtype))


def _dots(tangents: Any) -> Any:
    """The tangents, with None where there is none."""
    return jax.tree.map(lambda t: t if has_tangent(t) else None, tangents)


def _shapes(arguments: Arguments) -> plan.Shapes:
    hidden, kernel = arguments.rows.hidden, arguments.classes.kernel
    return plan.Shapes(*hidden.shape, kernel.shape[-1], compute_dtype(hidden.dtype).itemsize)

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
from jax.custom_derivatives import SymbolicZero

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

    def step(value, start, size):
        part = _some_rows(arguments, start, size)
        return value + jnp.sum(_cut(scale, start, size, 0) * _losses(part))

    zero = jnp.zeros((), scale.dtype)
    return _sweep(step, zero, shapes.rows, plan.rows_of_values(shapes, budget))


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

    def step(values, start, size):
        return _put(values, _losses(_some_rows(arguments, start, size)), start, 0)

    values = jnp.zeros(shapes.rows, compute_dtype(arguments.rows.hidden.dtype))
    return _sweep(step, values, shapes.rows, plan.rows_of_values(shapes, budget))


@partial(each.defjvp, symbolic_zeros=True)
def _each_jvp(budget, primals, tangents):
    (arguments,), (dots,) = primals, _dots(tangents)
    values, shapes = each(arguments, budget), _shapes(arguments)
    # Their cotangents add up over the steps in this dtype, and are rounded once after that.
    dots = jax.tree.map(lambda dot: dot.astype(values.dtype), dots)

    def step(values_dot, start, size):
        part, part_dots = (_some_rows(a, start, size) for a in (arguments, dots))
        return _put(values_dot, _losses_tangent(part, part_dots), start, 0)

    size = plan.rows_of_gradients(shapes, budget)
    return values, _sweep(step, jnp.zeros_like(values), shapes.rows, size)


def _gradients_by_rows(
    arguments: Arguments, scale: Array, dots: Arguments, budget: int | None
) -> tuple[Array, Arguments, Array]:
    """The value and the gradients by what has a tangent, in one pass and three products."""
    shapes = _shapes(arguments)

    def step(carry, start, size):
        value, bars, values = carry
        part, c = _some_rows(arguments, start, size), _cut(scale, start, size, 0)
        rows, scalars, block = part.rows, part.scalars, block_of(*part)
        s = statistics(block, rows.index, 0)
        l = losses(s, rows.mass, rows.active, scalars)

        def linear(block_dots: Block) -> Array:
            l_dot = tangent(block, s, rows.index, 0, rows.active, block_dots)
            return l_dot + row_tangent(s, rows.mass, rows.active, scalars, block_dots)

        new = _argument_bars(part, dots, _transposed(linear, _wanted(block, dots), c))
        bars = Arguments(
            jax.tree.map(partial(_put, start=start, axis=0), bars.rows, new.rows),
            jax.tree.map(jnp.add, bars.classes, new.classes),
            jax.tree.map(jnp.add, bars.scalars, new.scalars),
        )
        return value + jnp.sum(c * l), bars, _put(values, l, start, 0)

    carry = (jnp.zeros((), scale.dtype), _zeros(arguments, dots, arguments.rows.hidden.dtype, scale.dtype), jnp.zeros_like(scale))
    return _sweep(step, carry, shapes.rows, plan.rows_of_gradients(shapes, budget))


def _gradients_by_classes(
    arguments: Arguments, scale: Array, dots: Arguments, budget: int | None
) -> tuple[Array, Arguments, Array]:
    """The same in two passes and four products; what a class gets is summed in one product."""
    shapes, (rows, classes, scalars) = _shapes(arguments), arguments
    size = plan.classes_of_gradients(shapes, budget)

    def joined(s, start, size):
        part = _some_classes(arguments, start, size)
        return merged(s, statistics(block_of(*part), rows.index, start), scalars.temperature)

    s = _sweep(joined, _no_class(arguments), shapes.classes, size)
    values = losses(s, rows.mass, rows.active, scalars)

    def step(bars, start, size):
        part = _some_classes(arguments, start, size)
        block = block_of(*part)
        linear = partial(tangent, block, s, rows.index, start, rows.active)
        wanted = _wanted(block, dots)._replace(mass=None)
        new = _argument_bars(part, dots, _transposed(linear, wanted, scale))
        put = partial(_put, start=start, axis=-1)
        rows_bars = bars.rows._replace(
            hidden=jax.tree.map(jnp.add, bars.rows.hidden, new.rows.hidden),
            dense=jax.tree.map(put, bars.rows.dense, new.rows.dense),
        )
        class_bars = jax.tree.map(put, bars.classes, new.classes)
        return Arguments(rows_bars, class_bars, jax.tree.map(jnp.add, bars.scalars, new.scalars))

    bars = _sweep(step, _zeros(arguments, dots, scale.dtype, classes.kernel.dtype), shapes.classes, size)
    linear = partial(row_tangent, s, rows.mass, rows.active, scalars)
    of_rows = Block(None, None, None, None, None, bars.rows.mass, bars.scalars)
    of_rows = _transposed(linear, of_rows, scale)
    bars = Arguments(
        bars.rows._replace(mass=of_rows.mass),
        bars.classes,
        jax.tree.map(jnp.add, bars.scalars, of_rows.scalars),
    )
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


def _argument_bars(part: Arguments, dots: Arguments, bars: Block) -> Arguments:
    """The gradients of the arguments from those of their block: the two products of the backward
    pass, in the dtype of the inputs and summed in that of the computation."""
    hidden_bar = kernel_bar = None
    hidden, kernel = part.rows.hidden, part.classes.kernel
    if bars.product is not None:
        g, wide = bars.product.astype(hidden.dtype), bars.product.dtype
        if dots.rows.hidden is not None:
            hidden_bar = _back(g, kernel, wide)
        if dots.classes.kernel is not None:
            over_rows = (((0,), (0,)), ((), ()))
            kernel_bar = lax.dot_general(hidden, g, over_rows, preferred_element_type=wide)
    return Arguments(
        Rows(hidden_bar, None, bars.mass, bars.dense, None),
        Classes(kernel_bar, bars.bias, bars.spread, bars.class_weights),
        bars.scalars,
    )


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


def _zeros(arguments: Arguments, dots: Arguments, hidden_dtype, kernel_dtype) -> Arguments:
    """Zeros for the gradients of what has a tangent; what adds up is in the wide dtype."""
    zeros = jax.tree.map(lambda dot: jnp.zeros(dot.shape, _wide(arguments)), dots)
    hidden, kernel = zeros.rows.hidden, zeros.classes.kernel
    return zeros._replace(
        rows=zeros.rows._replace(hidden=jax.tree.map(lambda a: a.astype(hidden_dtype), hidden)),
        classes=zeros.classes._replace(kernel=jax.tree.map(lambda a: a.astype(kernel_dtype), kernel)),
    )


def _wide(arguments: Arguments):
    return compute_dtype(arguments.rows.hidden.dtype)


def _no_class(arguments: Arguments) -> Statistics:
    """The statistics of no class."""
    rows, classes, _ = arguments
    zeros = jnp.zeros(len(rows.hidden), compute_dtype(rows.hidden.dtype))
    at_index = None if rows.mass is None else jnp.zeros_like(rows.mass)
    spread = None if rows.dense is None and classes.spread is None else zeros
    top = jnp.full_like(zeros, jnp.finfo(zeros.dtype).min)
    return Statistics(top, zeros - 1, at_index, spread, spread)


def _some_rows(arguments: Arguments, start: Array | int, size: int) -> Arguments:
    cut = partial(_cut, start=start, size=size, axis=0)
    return arguments._replace(rows=jax.tree.map(cut, arguments.rows))


def _some_classes(arguments: Arguments, start: Array | int, size: int) -> Arguments:
    cut = partial(_cut, start=start, size=size, axis=-1)
    rows, classes, scalars = arguments
    dense = jax.tree.map(cut, rows.dense)
    return Arguments(rows._replace(dense=dense), jax.tree.map(cut, classes), scalars)


def _sweep(step: Callable, carry: Any, length: int, size: int) -> Any:
    """carry = step(carry, start, size) for one piece after the other; the last may be smaller.

    A step is computed again where its derivative needs what it computed.
    """
    step = jax.checkpoint(step, static_argnums=(2,), prevent_cse=False)
    whole = length // size
    if whole > 1:
        starts = size * jnp.arange(whole, dtype=jnp.int32)
        carry, _ = lax.scan(lambda carry, start: (step(carry, start, size), None), carry, starts)
    elif whole:
        carry = step(carry, 0, size)
    if rest := length - whole * size:
        carry = step(carry, whole * size, rest)
    return carry


def _cut(a: Array, start: Array | int, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(a, start, size, axis)


def _put(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    return lax.dynamic_update_slice_in_dim(a, piece.astype(a.dtype), start, axis)


def _inner(a: Array, b: Array) -> Array:
    """<a, b>, in the dtype of a."""
    return jnp.sum(a * b.astype(a.dtype))


def _dots(tangents: Any) -> Any:
    """The tangents, with None where there is none."""
    return jax.tree.map(lambda t: None if isinstance(t, SymbolicZero) else t, tangents)


def _shapes(arguments: Arguments) -> plan.Shapes:
    hidden, kernel = arguments.rows.hidden, arguments.classes.kernel
    return plan.Shapes(*hidden.shape, kernel.shape[-1], compute_dtype(hidden.dtype).itemsize)

"""The losses in pieces, of rows or of classes, without all logits at once; and their derivatives.

`total` is the sum of scale_i l_i. Its rule computes the gradients in the same pass as the value
and returns their inner product with the tangents: linear, so that it transposes to the gradient,
and plain JAX, so that it is differentiated again.

`each` gives the losses themselves. Their cotangents are not known beforehand, so its rule computes
the logits again: four products.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from softjax._linear_cross_entropy import plan
from softjax._linear_cross_entropy.blocks import block_of, losses, statistics
from softjax._linear_cross_entropy.gradients import gradients
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    block_dots,
    dots_of,
    shapes_of,
    some_rows,
    times_classes,
    transposed,
)
from softjax._linear_cross_entropy.sweep import cut, put, sweep
from softjax._linear_cross_entropy.tangents import row_tangent, tangent
from softjax._numerics import compute_dtype


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def total(arguments: Arguments, scale: Array, budget: int | None) -> Array:
    """sum_i scale_i l_i."""

    def step(value, operands, start, size):
        part, c = some_rows(operands[0], start, size), cut(operands[1], start, size, 0)
        return value + jnp.sum(c * _losses(part))

    shapes, zero = shapes_of(arguments), jnp.zeros((), scale.dtype)
    size = plan.rows_of_values(shapes, budget)
    return sweep(step, zero, (arguments, scale), shapes.rows, size)


@partial(total.defjvp, symbolic_zeros=True)
def _total_jvp(budget, primals, tangents):
    (arguments, scale), (dots, scale_dot) = primals, dots_of(tangents)
    half, kernel = arguments.rows.hidden.dtype.itemsize < 4, dots.classes.kernel is not None
    pieces = plan.of_gradients(shapes_of(arguments), budget, whole=half and kernel)
    value, bars, values = gradients(arguments, scale, dots, pieces)
    pairs = zip(jax.tree.leaves(bars), jax.tree.leaves(dots), strict=True)
    value_dot = sum((_inner(bar, dot) for bar, dot in pairs), jnp.zeros_like(value))
    if scale_dot is not None:
        value_dot += _inner(values, scale_dot)
    return value, value_dot


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def each(arguments: Arguments, budget: int | None) -> Array:
    """l_i."""

    def step(values, arguments, start, size):
        return put(values, _losses(some_rows(arguments, start, size)), start, 0)

    shapes = shapes_of(arguments)
    values = jnp.zeros(shapes.rows, compute_dtype(arguments.rows.hidden.dtype))
    return sweep(step, values, arguments, shapes.rows, plan.rows_of_values(shapes, budget))


@partial(each.defjvp, symbolic_zeros=True)
def _each_jvp(budget, primals, tangents):
    (arguments,), (dots,) = primals, dots_of(tangents)
    values, shapes = each(arguments, budget), shapes_of(arguments)
    # In reverse their cotangents add up over the steps in this dtype, and are rounded once.
    dots = jax.tree.map(lambda dot: dot.astype(values.dtype), dots)

    def step(values_dot, operands, start, size):
        part, part_dots = (some_rows(a, start, size) for a in operands)
        return put(values_dot, _losses_tangent(part, part_dots), start, 0)

    zeros, size = jnp.zeros_like(values), plan.rows_of_losses(shapes, budget)
    return values, sweep(step, zeros, (arguments, dots), shapes.rows, size)


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
    others = block_dots(None, dots)
    l_dot = linear(others) + row_tangent(s, rows.mass, rows.active, scalars, others)
    hidden_dot, kernel_dot = dots.rows.hidden, dots.classes.kernel
    if hidden_dot is None and kernel_dot is None:
        return l_dot
    of_product = jax.tree.map(lambda _: None, block)._replace(product=block.product)
    g = transposed(linear, of_product, jnp.ones_like(l_dot)).product.astype(rows.hidden.dtype)
    if hidden_dot is not None:
        l_dot += jnp.sum(hidden_dot * times_classes(g, classes.kernel, l_dot.dtype), -1)
    if kernel_dot is not None:
        back = times_classes(g, kernel_dot.astype(g.dtype), g.dtype)
        l_dot += jnp.sum((rows.hidden * back).astype(l_dot.dtype), -1)
    return l_dot


def _inner(a: Array, b: Array) -> Array:
    """<a, b>, in the dtype of a."""
    return jnp.sum(a * b.astype(a.dtype))

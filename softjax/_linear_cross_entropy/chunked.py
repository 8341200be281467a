"""The losses in pieces, of rows or of classes, without all logits at once; and their derivatives.

`total` is the sum of scale_i l_i. Its rule computes the gradients in the same pass as the value
and returns their inner product with the tangents: linear, so that it transposes to the gradient,
and plain JAX, so that it is differentiated again.

`each` gives the losses themselves. Their cotangents are not known beforehand, so its rule computes
the logits again: four products.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import zero_from_primal

from softjax._linear_cross_entropy import plan
from softjax._linear_cross_entropy.blocks import (
    Block,
    Statistics,
    block_of,
    losses,
    statistics,
)
from softjax._linear_cross_entropy.gradients import gradients
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    block_dots,
    shapes_of,
    some_rows,
    times_classes,
    transposed,
)
from softjax._linear_cross_entropy.sweep import cut, dots_of, jvp_along, put, sweep
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
    value_dot = sum((_inner(bar, dot, value.dtype) for bar, dot in pairs), jnp.zeros_like(value))
    if scale_dot is not None:
        value_dot += _inner(values, scale_dot, value.dtype)
    return value, value_dot


def each(arguments: Arguments, budget: int | None) -> Array:
    """l_i."""
    return of_rows(lambda part: (_losses(part), ()), _losses_tangent, budget, arguments)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def of_rows(function: Callable, tangent: Callable, budget: int | None, arguments: Arguments) -> Any:
    """function(arguments), some rows at a time: trees of real numbers and of integers, each a row.

    The derivative of the real ones is tangent(arguments, dots), some rows at a time.
    """

    def step(values, arguments, start, size):
        new = function(some_rows(arguments, start, size))
        return jax.tree.map(partial(put, start=start, axis=0), values, new)

    shapes, results = shapes_of(arguments), jax.eval_shape(function, arguments)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), results)
    return sweep(step, zeros, arguments, shapes.rows, plan.rows_of_values(shapes, budget))


@partial(of_rows.defjvp, symbolic_zeros=True)
def _of_rows_jvp(function, tangent, budget, primals, tangents):
    (arguments,), (dots,) = primals, dots_of(tangents)
    values, shapes = of_rows(function, tangent, budget, arguments), shapes_of(arguments)
    # In reverse their cotangents add up over the steps in this dtype, and are rounded once.
    wide = compute_dtype(arguments.rows.hidden.dtype)
    dots = jax.tree.map(lambda dot: dot.astype(wide), dots)

    def step(values_dot, operands, start, size):
        part, part_dots = (some_rows(a, start, size) for a in operands)
        new = tangent(part, part_dots)
        return jax.tree.map(partial(put, start=start, axis=0), values_dot, new)

    zeros, size = jax.tree.map(jnp.zeros_like, values[0]), plan.rows_of_losses(shapes, budget)
    reals_dot = sweep(step, zeros, (arguments, dots), shapes.rows, size)
    no_tangents = jax.tree.map(partial(zero_from_primal, symbolic_zeros=True), values[1])
    return values, (reals_dot, no_tangents)


def by_rows(function: Callable, budget: int | None, arguments: Arguments) -> Any:
    """The same, with the derivative by JAX."""

    def tangent(part: Arguments, dots: Arguments):
        dots = jax.tree.map(
            lambda a, dot: None if dot is None else dot.astype(a.dtype),
            part,
            dots,
            is_leaf=lambda a: a is None,
        )
        return jvp_along(lambda part: function(part)[0], (part,), (dots,))

    return of_rows(function, tangent, budget, arguments)


def _losses(part: Arguments) -> Array:
    rows, _, scalars = part
    s = statistics(block_of(*part), rows.index, 0)
    return losses(s, rows.mass, rows.active, scalars)


def _losses_tangent(part: Arguments, dots: Arguments) -> Array:
    rows, _, scalars = part
    block = block_of(*part)
    s = statistics(block, rows.index, 0)
    of_rows = row_tangent(s, rows.mass, rows.active, scalars, block_dots(None, dots))
    return of_rows + block_tangent(part, dots, block, s, 0)


def block_tangent(
    part: Arguments, dots: Arguments, block: Block, s: Statistics, start: Array | int
) -> Array:
    """What the classes of a block, those from `start` on, add to the tangent of the losses.

    sum_k g_k (h W)_dot_k as <h_dot, g W^T> + <h, g W_dot^T>, and the rest: every product has g as
    a factor, in the dtype of the inputs, and so has its transpose.
    """
    rows, classes, _ = part
    linear = partial(tangent, block, s, rows.index, start, rows.active)
    l_dot = linear(block_dots(None, dots))
    hidden_dot, kernel_dot = dots.rows.hidden, dots.classes.kernel
    if hidden_dot is None and kernel_dot is None:
        return l_dot
    of_product = jax.tree.map(lambda _: None, block)._replace(product=block.product)
    (g, *_) = transposed(linear, of_product, jnp.ones_like(l_dot))
    assert g is not None
    g = g.astype(rows.hidden.dtype)
    if hidden_dot is not None:
        l_dot += jnp.sum(hidden_dot * times_classes(g, classes.kernel, l_dot.dtype), -1)
    if kernel_dot is not None:
        back = times_classes(g, kernel_dot.astype(g.dtype), g.dtype)
        l_dot += jnp.sum((rows.hidden * back).astype(l_dot.dtype), -1)
    return l_dot


def _inner(a: Array, b: Array, dtype) -> Array:
    """<a, b>, in the given dtype."""
    return jnp.sum(a.astype(dtype) * b.astype(dtype))

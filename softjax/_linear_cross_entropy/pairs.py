"""The divergences of two linear heads, some rows at a time, with their derivatives.

`each_pair` gives the divergence of each row. It takes two products, and four for the gradients of
one head, since the cotangents are not known in the forward pass. `total_pair` is a sum, whose
derivative rule computes the gradients while the logits are in memory: two products, and two more
for the gradients of each head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from softjax._custom_jvp import custom_jvp
from softjax._linear_cross_entropy.blocks import Block, block_of
from softjax._linear_cross_entropy.comparison import Blocks, Comparison
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    accumulated,
    block_dots,
    cut,
    dots_like,
    dots_of,
    product_tangent,
    put,
    shapes_of,
    some_rows,
    sweep,
    times_classes,
    times_rows,
    transposed,
    wanted_of,
)
from softjax._linear_cross_entropy.plans import rows_of_pairs, sizes_of_pairs
from softjax._linear_cross_entropy.sums import inner, shapes_of_bars
from softjax._numerics import compute_dtype
from softjax._platforms import lowered_for_platform
from softjax._sharding import axes_of, varying


class Pair(NamedTuple):
    """The student and the teacher; or the student alone, whose rows hold the teacher's top k."""

    student: Arguments
    teacher: Arguments | None


@partial(custom_jvp, nondiff_argnums=(0, 1))
def each_pair(comparison: Comparison, budget: int | None, pair: Pair) -> Array:
    """The losses of all rows, computed some rows at a time."""

    def step(values, pair, start, size):
        return put(values, of_part(_some(pair, start, size)), start, 0)

    def of_part(part: Pair) -> Array:
        return comparison.losses(comparison.contrast(part.student, _blocks(part)))

    shape = jax.eval_shape(of_part, pair)
    zeros = jnp.zeros(shape.shape, shape.dtype)
    size = rows_of_pairs(shapes_of(pair.student), budget)
    return sweep(step, zeros, pair, shape.shape[0], size)


@partial(each_pair.defjvp, symbolic_zeros=True)
def _each_pair_jvp(comparison, budget, primals, tangents):
    (pair,), (dots,) = primals, dots_of(tangents)
    values = each_pair(comparison, budget, pair)
    # In reverse mode the cotangents are summed over the steps in this dtype, and rounded once.
    dots = jax.tree.map(lambda dot: dot.astype(values.dtype), dots)

    def step(values_dot, operands, start, size):
        part, part_dots = (_some(a, start, size) for a in operands)
        blocks = _blocks(part)
        linear = partial(comparison.tangent, comparison.contrast(part.student, blocks))
        beside = tuple(None if dots is None else block_dots(None, dots) for dots in part_dots)
        new = linear(dots_like(blocks, beside))
        of_products = _of_both(_product_of, blocks, part_dots)
        ones = varying(jnp.ones_like(new), axes_of(of_products))
        products = transposed(linear, of_products, ones)
        for head, head_dots, block in zip(part, part_dots, products, strict=True):
            g = None if block is None else block.product
            if g is not None and head is not None and head_dots is not None:
                new += product_tangent(g, head, head_dots, values.dtype)
        return put(values_dot, new, start, 0)

    size = rows_of_pairs(shapes_of(pair.student), budget, _kernels(dots))
    return values, sweep(step, jnp.zeros_like(values), (pair, dots), values.shape[0], size)


@partial(custom_jvp, nondiff_argnums=(0, 1))
def total_pair(comparison: Comparison, budget: int | None, pair: Pair, scale: Array) -> Array:
    """sum_i scale_i l_i, where l_i are the losses of `each_pair`."""
    return jnp.sum(scale * each_pair(comparison, budget, pair))


@partial(total_pair.defjvp, symbolic_zeros=True)
def _total_pair_jvp(comparison, budget, primals, tangents):
    (pair, scale), (dots, scale_dot) = primals, dots_of(tangents)
    # A function that JAX keeps for a derivative must not close over the tangents.
    like_dots = jax.tree.map(lambda dot: ShapeDtypeStruct(dot.shape, dot.dtype), dots)
    gradients = partial(_gradients, comparison, like_dots)
    shapes = shapes_of(pair.student)
    # The number of float32 arrays [n, V] that are stored on a GPU or TPU: the logits of both heads
    # and their gradients. In half precision, a KL divergence computes one of these in place.
    few = shapes.half and pair.teacher is not None and comparison.divergence != "jensen_shannon"
    sizes = sizes_of_pairs(shapes, budget, _kernels(dots), 3 if few else 4)
    of_value, of_values = (ShapeDtypeStruct(shape, scale.dtype) for shape in ((), scale.shape))
    like = of_value, like_dots, of_values
    value, bars, values = lowered_for_platform(gradients, sizes, like, pair, scale)
    leaves = zip(jax.tree.leaves(bars), jax.tree.leaves(dots), strict=True)
    value_dot = sum((inner(bar, dot, value.dtype) for bar, dot in leaves), jnp.zeros_like(value))
    if scale_dot is not None:
        value_dot += inner(values, scale_dot, value.dtype)
    return value, value_dot


def _gradients(
    comparison: Comparison, dots: Pair, sizes: tuple[int, int], pair: Pair, scale: Array
) -> tuple[Array, Pair, Array]:
    """sum scale_i l_i, its gradients for the shapes in `dots`, and the l_i."""

    def step(sums, operands, start, size):
        value, bars, values = sums
        part, c = _some(operands[0], start, size), cut(operands[1], start, size, 0)
        blocks = _blocks(part)
        wanted = _of_both(wanted_of, blocks, dots)
        contrast = comparison.contrast(part.student, blocks)
        some = comparison.losses(contrast)
        new = transposed(partial(comparison.tangent, contrast), wanted, c)
        bars = Pair(*_of_both(partial(_plus, start=start), part, bars, new))
        return value + jnp.sum(c * some), bars, put(values, some, start, 0)

    shapes = Pair(*_of_both(partial(shapes_of_bars, adds_up=True), pair, dots))
    like, of_value = (ShapeDtypeStruct(shape, scale.dtype) for shape in (scale.shape, ()))
    sums = of_value, shapes, like
    value, bars, values = accumulated(step, sums, scale.shape[0], sizes, (pair, scale))
    return value, jax.tree.map(lambda bar, dot: bar.astype(dot.dtype), bars, dots), values


def _of_both(function: Callable, *pairs: Any) -> list[Any]:
    """`function` of the parts of both heads; None for a head of which a part is None."""
    parts = zip(*pairs, strict=True)
    return [None if any(part is None for part in own) else function(*own) for own in parts]


def _product_of(block: Block, dots: Arguments) -> Block:
    """The block with only its product, if a tangent acts on it."""
    acts = dots.rows.hidden is not None or dots.classes.kernel is not None
    return Block(block.product if acts else None)


def _plus(head: Arguments, bars: Arguments, new: Block, start: Array | int) -> Arguments:
    """The gradients by a head, plus the contribution of its rows from `start` on."""
    (rows, classes, _), dtype = head, compute_dtype(head.rows.hidden.dtype)
    hidden_bar, kernel_bar = bars.rows.hidden, bars.classes.kernel
    g = None if new.product is None else new.product.astype(rows.hidden.dtype)
    if g is not None and hidden_bar is not None:
        of_rows = times_classes(g, classes.kernel, classes.axis, dtype)
        hidden_bar = put(hidden_bar, of_rows, start, 0)
    if g is not None and kernel_bar is not None:
        kernel_bar += times_rows(rows.hidden, g, classes.axis, dtype)
    put_rows = partial(put, start=start, axis=0)
    mass_bar, dense_bar = (
        jax.tree.map(put_rows, bar, of_rows)
        for bar, of_rows in ((bars.rows.mass, new.mass), (bars.rows.dense, new.dense))
    )
    return Arguments(
        bars.rows._replace(hidden=hidden_bar, mass=mass_bar, dense=dense_bar),
        type(classes)(kernel_bar, *jax.tree.map(jnp.add, bars.classes[1:], new[1:4])),
        jax.tree.map(jnp.add, bars.scalars, new.scalars),
    )


def _kernels(dots: Pair) -> int:
    """The number of kernels that have a tangent."""
    return sum(head is not None and head.classes.kernel is not None for head in dots)


def _some(pair: Any, start: Array | int, size: int) -> Pair:
    return Pair(*_of_both(partial(some_rows, start=start, size=size), pair))


def _blocks(pair: Pair) -> Blocks:
    student, teacher = _of_both(lambda head: block_of(*head), pair)
    return student, teacher

"""The divergences of two linear heads, some rows at a time, with their derivatives.

`each_pair` gives the divergence of each row. It takes two products, and four for the gradients of
one head, since the cotangents are not known in the forward pass. `total_pair` is a sum, whose
derivative rule computes the gradients while the logits are in memory: two products, and two more
for the gradients of each head.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from softjax._linear_cross_entropy.blocks import Block, Scalars, block_of
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
from softjax._linear_cross_entropy.plans import Shapes, rows_of_pairs, sizes_of_pairs
from softjax._linear_cross_entropy.sums import inner, shapes_of_bars
from softjax._numerics import compute_dtype
from softjax._platforms import lowered_for_platform
from softjax._sharding import axes_of, varying


class Pair(NamedTuple):
    """The student and the teacher; or the student alone, whose rows hold the teacher's top k."""

    student: Arguments
    teacher: Arguments | None


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def each_pair(comparison: Comparison, budget: int | None, pair: Pair) -> Array:
    """The losses of all rows, computed some rows at a time."""

    def step(values, pair, start, size):
        part = _some(pair, start, size)
        return put(values, of_part(part), start, 0)

    def of_part(part: Pair) -> Array:
        return comparison.losses(comparison.contrast(part.student, _blocks(part)))

    shape = jax.eval_shape(of_part, pair)
    zeros = jnp.zeros(shape.shape, shape.dtype)
    size = rows_of_pairs(_shapes(pair), budget)
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
        of_products = [_product_of(*both) for both in zip(blocks, part_dots, strict=True)]
        ones = varying(jnp.ones_like(new), axes_of(of_products))
        products = transposed(linear, of_products, ones)
        for head, head_dots, block in zip(part, part_dots, products, strict=True):
            g = None if block is None else block.product
            if g is not None and head is not None and head_dots is not None:
                new += product_tangent(g, head, head_dots, values.dtype)
        return put(values_dot, new, start, 0)

    zeros, size = jnp.zeros_like(values), rows_of_pairs(_shapes(pair), budget, _kernels(dots))
    return values, sweep(step, zeros, (pair, dots), values.shape[0], size)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def total_pair(comparison: Comparison, budget: int | None, pair: Pair, scale: Array) -> Array:
    """sum_i scale_i l_i, where l_i are the losses of `each_pair`."""
    return jnp.sum(scale * each_pair(comparison, budget, pair))


@partial(total_pair.defjvp, symbolic_zeros=True)
def _total_pair_jvp(comparison, budget, primals, tangents):
    (pair, scale), (dots, scale_dot) = primals, dots_of(tangents)
    # A function that JAX keeps for a derivative must not close over the tangents.
    like_dots = jax.tree.map(lambda dot: ShapeDtypeStruct(dot.shape, dot.dtype), dots)
    gradients = partial(_gradients, comparison, like_dots)
    arrays = _arrays(comparison, pair)
    sizes = sizes_of_pairs(_shapes(pair), budget, _kernels(dots), arrays)
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
        wanted = [
            None if block is None or of_head is None else wanted_of(block, of_head)
            for block, of_head in zip(blocks, dots, strict=True)
        ]
        contrast = comparison.contrast(part.student, blocks)
        some = comparison.losses(contrast)
        new = transposed(partial(comparison.tangent, contrast), wanted, c)
        student = _plus(part.student, bars.student, new[0], start)
        teacher = None
        if part.teacher is not None and bars.teacher is not None:
            teacher = _plus(part.teacher, bars.teacher, new[1], start)
        bars = Pair(student, teacher)
        return value + jnp.sum(c * some), bars, put(values, some, start, 0)

    like = ShapeDtypeStruct(scale.shape, scale.dtype)
    student, teacher = pair
    of_student, of_teacher = dots
    shapes = Pair(
        shapes_of_bars(student, of_student, True),
        None
        if teacher is None or of_teacher is None
        else shapes_of_bars(teacher, of_teacher, True),
    )
    sums = ShapeDtypeStruct((), scale.dtype), shapes, like
    value, bars, values = accumulated(step, sums, scale.shape[0], sizes, (pair, scale))
    return value, jax.tree.map(lambda bar, dot: bar.astype(dot.dtype), bars, dots), values


def _product_of(block: Block | None, dots: Arguments | None) -> Block | None:
    """The block with only its product, if a tangent acts on it."""
    if block is None or dots is None:
        return None
    acts = dots.rows.hidden is not None or dots.classes.kernel is not None
    product, nothing = block.product if acts else None, Scalars(None, None, None)
    return Block(product, None, None, None, None, None, nothing)


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


def _shapes(pair: Pair) -> Shapes:
    return shapes_of(pair.student)


def _arrays(comparison: Comparison, pair: Pair) -> int:
    """The number of float32 arrays [n, V] that a sum with its gradients stores on a GPU or TPU.

    They are the logits of both heads and their gradients; in half precision, a KL divergence
    computes one of these without storing it.
    """
    few = _shapes(pair).half and pair.teacher is not None
    return 3 if few and comparison.divergence != "jensen_shannon" else 4


def _kernels(dots: Pair) -> int:
    """The number of kernels that have a tangent."""
    return sum(head is not None and head.classes.kernel is not None for head in dots)


def _some(pair: Any, start: Array | int, size: int) -> Pair:
    student, teacher = pair
    teacher = None if teacher is None else some_rows(teacher, start, size)
    return Pair(some_rows(student, start, size), teacher)


def _blocks(pair: Pair) -> Blocks:
    student, teacher = pair
    return block_of(*student), None if teacher is None else block_of(*teacher)

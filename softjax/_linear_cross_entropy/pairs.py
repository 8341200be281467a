"""The divergences of two linear heads, some rows at a time, with their derivatives.

`each_pair` gives those of the rows: two products, and four for the gradients of one head, since
their cotangents are not known beforehand. `total_pair` is a sum, whose rule computes the gradients
while the logits are there: two products, and two more for the gradients of each head.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax

from softjax._linear_cross_entropy.blocks import (
    Block,
    Statistics,
    block_of,
    class_logits,
    distance,
    log_total,
    top_and_excess,
)
from softjax._linear_cross_entropy.divergences import Divergence, divergence_terms
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    accumulated,
    block_dots,
    cut,
    dots_like,
    dots_of,
    jvp_along,
    product_tangent,
    put,
    shapes_of,
    some_rows,
    sweep,
    times_classes,
    times_rows,
    wanted_of,
)
from softjax._linear_cross_entropy.plans import Shapes, rows_of_pairs, sizes_of_pairs
from softjax._linear_cross_entropy.shards import first_class, joined
from softjax._linear_cross_entropy.sums import inner, shapes_of_bars
from softjax._numerics import compute_dtype
from softjax._platforms import lowered_for_platform


class Pair(NamedTuple):
    """The student and the teacher; or the student alone, with the top k of the teacher as rows."""

    student: Arguments
    teacher: Arguments | None


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def each_pair(losses: Callable, budget: int | None, pair: Pair) -> Array:
    """The losses of the blocks of some rows at a time."""

    def step(values, pair, start, size):
        part = _some(pair, start, size)
        return put(values, losses(part, _blocks(part)), start, 0)

    shape = jax.eval_shape(lambda pair: losses(pair, _blocks(pair)), pair)
    zeros = jnp.zeros(shape.shape, shape.dtype)
    size = rows_of_pairs(_shapes(pair), budget)
    return sweep(step, zeros, pair, shape.shape[0], size)


@partial(each_pair.defjvp, symbolic_zeros=True)
def _each_pair_jvp(losses, budget, primals, tangents):
    (pair,), (dots,) = primals, dots_of(tangents)
    values = each_pair(losses, budget, pair)
    # In reverse their cotangents add up over the steps in this dtype, and are rounded once.
    dots = jax.tree.map(lambda dot: dot.astype(values.dtype), dots)

    def step(values_dot, operands, start, size):
        part, part_dots = (_some(a, start, size) for a in operands)
        blocks, of_part = _blocks(part), partial(losses, part)
        beside = [None if dots is None else block_dots(None, dots) for dots in part_dots]
        beside = dots_like(blocks, beside)
        new = jnp.zeros(size, values.dtype)
        if jax.tree.leaves(beside):
            new += jvp_along(of_part, (blocks,), (beside,))
        for n, (head, head_dots) in enumerate(zip(part, part_dots, strict=True)):
            if head is not None and head_dots is not None:
                new += _through_product(of_part, n, head, head_dots, blocks)
        return put(values_dot, new, start, 0)

    zeros, size = jnp.zeros_like(values), rows_of_pairs(_shapes(pair), budget, _kernels(dots))
    return values, sweep(step, zeros, (pair, dots), values.shape[0], size)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def total_pair(losses: Callable, budget: int | None, pair: Pair, scale: Array) -> Array:
    """sum_i scale_i l_i of the losses of blocks."""
    return jnp.sum(scale * each_pair(losses, budget, pair))


@partial(total_pair.defjvp, symbolic_zeros=True)
def _total_pair_jvp(losses, budget, primals, tangents):
    (pair, scale), (dots, scale_dot) = primals, dots_of(tangents)
    # A function that is kept for its derivative may not keep the tangents themselves.
    like_dots = jax.tree.map(lambda dot: ShapeDtypeStruct(dot.shape, dot.dtype), dots)
    gradients = partial(_gradients, losses, like_dots)
    sizes = sizes_of_pairs(_shapes(pair), budget, _kernels(dots))
    of_value, of_values = (ShapeDtypeStruct(shape, scale.dtype) for shape in ((), scale.shape))
    like = of_value, like_dots, of_values
    value, bars, values = lowered_for_platform(gradients, sizes, like, pair, scale)
    leaves = zip(jax.tree.leaves(bars), jax.tree.leaves(dots), strict=True)
    value_dot = sum((inner(bar, dot, value.dtype) for bar, dot in leaves), jnp.zeros_like(value))
    if scale_dot is not None:
        value_dot += inner(values, scale_dot, value.dtype)
    return value, value_dot


def _gradients(
    losses: Callable, dots: Pair, sizes: tuple[int, int], pair: Pair, scale: Array
) -> tuple[Array, Pair, Array]:
    """sum scale_i l_i, its gradients by what has a tangent in `dots`, of shapes, and the l_i."""

    def step(sums, operands, start, size):
        value, bars, values = sums
        part, c = _some(operands[0], start, size), cut(operands[1], start, size, 0)
        blocks = _blocks(part)
        wanted = [
            None if block is None or of_head is None else wanted_of(block, of_head)
            for block, of_head in zip(blocks, dots, strict=True)
        ]

        def of_wanted(wanted: list[Block | None]) -> Array:
            return losses(part, [*map(_filled, blocks, wanted)])

        some, pull = jax.vjp(of_wanted, wanted)
        (new,) = pull(c)
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


def _filled(block: Block | None, wanted: Block | None) -> Block | None:
    """`block` with the arrays of `wanted` that are not None."""
    if block is None or wanted is None:
        return block
    is_none = partial(operator.is_, None)
    return jax.tree.map(lambda new, a: a if new is None else new, wanted, block, is_leaf=is_none)


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


def _through_product(
    losses: Callable, n: int, head: Arguments, dots: Arguments, blocks: list[Block | None]
) -> Array | float:
    """The tangent of the losses with respect to the product of a head."""
    if dots.rows.hidden is None and dots.classes.kernel is None:
        return 0.0
    block = blocks[n]
    assert block is not None

    def of_product(product: Array) -> Array:
        return losses([*blocks[:n], block._replace(product=product), *blocks[n + 1 :]])

    value, pull = jax.vjp(of_product, block.product)
    (g,) = pull(jnp.ones_like(value))
    return product_tangent(g, head, dots, value.dtype)


def _shapes(pair: Pair) -> Shapes:
    return shapes_of(pair.student)


def _kernels(dots: Pair) -> int:
    """How many kernels have a tangent."""
    return sum(head is not None and head.classes.kernel is not None for head in dots)


def _some(pair: Any, start: Array | int, size: int) -> Pair:
    student, teacher = pair
    teacher = None if teacher is None else some_rows(teacher, start, size)
    return Pair(some_rows(student, start, size), teacher)


def _blocks(pair: Pair) -> list[Block | None]:
    return [None if head is None else block_of(*head) for head in pair]


def divergences(
    axes: tuple[str, ...],
    divergence: Divergence,
    beta: float,
    part: Pair,
    blocks: list[Block | None],
) -> Array:
    """The part of the losses from the classes of this device; without axes it has all classes."""
    student, teacher = blocks
    assert student is not None
    x, s, log_q = _log_probabilities(axes, student)
    if teacher is None:
        log_p, log_q = _with_tail(axes, part.student, student, x, s, log_q)
    else:
        _, _, log_p = _log_probabilities(axes, teacher)
    dtype = jnp.promote_types(log_p.dtype, log_q.dtype)
    log_p, log_q = log_p.astype(dtype), log_q.astype(dtype)
    if (active := part.student.rows.active) is not None:
        # A row that takes no part is compared with itself: 0, with gradient 0, whatever it brings.
        log_p = jnp.where(active[:, None], log_p, log_q)
    terms = divergence_terms(log_p, log_q, divergence, beta)
    loss, temperature = jnp.sum(terms, -1), student.scalars.temperature
    return loss if temperature is None else temperature.astype(dtype) ** 2 * loss


def _log_probabilities(axes: tuple[str, ...], block: Block) -> tuple[Array, Statistics, Array]:
    """Logits before T divides them, their statistics over all classes, and log softmax."""
    temperature = block.scalars.temperature
    x = class_logits(block.product, block.bias, block.scalars.softcap)
    s = _statistics(axes, x, temperature)
    return x, s, distance(x, s.top[:, None], temperature) - log_total(s)[:, None]


def _statistics(axes: tuple[str, ...], x: Array, temperature: Array | None) -> Statistics:
    s = Statistics(*top_and_excess(x, temperature), None, None, None)
    return joined(s, axes, temperature) if axes else s


def _with_tail(
    axes: tuple[str, ...], part: Arguments, block: Block, x: Array, s: Statistics, log_q: Array
) -> tuple[Array, Array]:
    """log p and log q of the k classes of the teacher and, last, of all others as one class.

    The student's tail is a sum over the others, and the teacher's an exact difference: no 1 - P
    that has been rounded is left. What other devices have is without probability here.
    """
    index, mass, temperature = part.rows.index, block.mass, block.scalars.temperature
    assert index is not None
    assert mass is not None
    index = index - first_class(axes, part)
    inside = (index >= 0) & (index < x.shape[-1])
    place = jnp.where(inside, index, x.shape[-1])
    row = jnp.arange(x.shape[0])[:, None]
    is_listed = jnp.zeros_like(x, bool).at[row, place].set(True, mode="drop")
    others = _statistics(axes, jnp.where(is_listed, -jnp.inf, x), temperature)
    tail_q = distance(others.top, s.top, temperature) + (log_total(others) - log_total(s))
    tail_q = jnp.where(others.excess < 0, -jnp.inf, tail_q)
    is_here = jnp.ones_like(tail_q, bool) if not axes else lax.axis_index(axes) == 0

    at = jnp.where(inside, index, 0)
    listed_q = jnp.take_along_axis(log_q, at, -1, mode="promise_in_bounds")
    log_p = jnp.concatenate((_log(mass), _log(_rest(mass))[:, None]), -1)
    log_q = jnp.concatenate((listed_q, tail_q[:, None]), -1)
    here = jnp.concatenate((inside, jnp.broadcast_to(is_here, tail_q.shape)[:, None]), -1)
    return jnp.where(here, log_p, -jnp.inf), jnp.where(here, log_q, -jnp.inf)


def _log(p: Array) -> Array:
    """log p, with the slope 0 where p is 0."""
    return jnp.where(p == 0, -jnp.inf, jnp.log(jnp.where(p == 0, 1, p)))


def _rest(mass: Array) -> Array:
    """1 - sum of the masses, at least 0, as if rounded once: every sum keeps what it rounds off.

    Source: D. E. Knuth, "The art of computer programming", volume 2, section 4.2.2, theorem B.
    """
    a = jnp.concatenate((jnp.ones_like(mass[:, :1]), -mass), -1)
    lost = jnp.zeros_like(a)
    while a.shape[-1] > 1:
        if a.shape[-1] % 2:
            a, lost = (jnp.pad(x, ((0, 0), (0, 1))) for x in (a, lost))
        b, a = a[:, 1::2], a[:, ::2]
        total = a + b
        part = total - a
        lost = lost[:, ::2] + lost[:, 1::2] + ((a - (total - part)) + (b - part))
        a = total
    rest = (a + lost)[:, 0]
    return jnp.where(rest < 0, 0, rest)

"""The losses in pieces of rows and classes: how large they are, how they are cut, and their sums.

N rows, D features, V classes; b bytes a number of the computation. At once there are, for pieces
of n rows and v classes,

    the losses                            b n V
    their sum with its gradients          b (n V + n D + (2 n + 3 D) v)     logits kept
                                          b (n D + (3 n + 3 D) v)           multiplied again

and a budget of bytes for temporaries gives n and v. A sum over pieces takes one at a time, and so
does its derivative.

Where jax.export leaves N open, as a symbolic dimension, n is that of many rows, and the number of
pieces and their size are symbolic in turn: see `sweep`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from softjax._linear_cross_entropy.blocks import Block, Classes, Rows, Scalars
from softjax._numerics import compute_dtype
from softjax._sharding import axes_of, varying

# Fewer rows or logits at a time cost more in steps than they save.
FEWEST_ROWS = 8
FEWEST_LOGITS = 2**18
# More rows make no product faster.
MOST_ROWS = 1024
# So many rows are expected where N is symbolic.
MANY_ROWS = 16 * MOST_ROWS
# The arrays of a piece of classes are of about this many numbers, so that caches hold them.
PIECE = 2**21
# step(sums, operands, start, size) -> sums, with what the pieces from `start` on add
Step = Callable[[Any, Any, Array | int, int], Any]


class Arguments(NamedTuple):
    """What the losses are functions of. Its tangents and gradients are of the same form.

    There None stands for what has none.
    """

    rows: Rows
    classes: Classes
    scalars: Scalars


class Shapes(NamedTuple):
    """N, D and V, and b; for a symbolic N the number of rows that is expected."""

    rows: int
    features: int
    classes: int
    bytes: int


class Plan(NamedTuple):
    """The pieces of a sum with its gradients.

    Attributes:
        rows: n.
        second: n for the derivative of the gradients, which holds four times as much.
        classes: v.
        keep: whether the logits of n rows and all classes are kept.
    """

    rows: int
    second: int
    classes: int
    keep: bool


def rows_of_values(shapes: Shapes, budget: int | None) -> int:
    """n for the losses alone."""
    return _rows(shapes, shapes.features // 8, 16, _fitting(budget, shapes.bytes * shapes.classes))


def rows_of_losses(shapes: Shapes, budget: int | None) -> int:
    """n for the losses with derivatives: logits and their gradient, and again for second ones."""
    row = 2 * shapes.bytes * shapes.classes
    return _rows(shapes, shapes.features // 2, 4, _fitting(budget, row))


def plan_of_gradients(shapes: Shapes, budget: int | None, *, whole: bool) -> Plan:
    """The pieces of a sum with its gradients; of all rows where `whole` or the budget is small.

    A gradient of the kernel that adds up over pieces of rows is read and written once for each.
    In float32 few pieces cost less than a fourth product. In half precision (`whole`) it would
    be another array, in float32 and larger than the kernel.
    """
    n, d, classes, size = shapes
    if not whole:
        width = _even(classes, min(max(PIECE // max(n, d, 1), 1), classes))
        used = size * (2 * n + 3 * d) * width
        fitting = _fitting(None if budget is None else budget - used, size * (classes + d))
        rows = _rows(shapes, d, 2, fitting)
        if fitting is None or fitting >= min(n, FEWEST_ROWS):
            return Plan(rows, _even(n, max(rows // 4, 1)), width, keep=True)
    wanted = max(d * classes // 8, FEWEST_LOGITS) // max(n, 1)
    fitting = _fitting(None if budget is None else budget - size * n * d, size * 3 * (n + d))
    width = wanted if fitting is None else min(wanted, fitting)
    width = _even(classes, min(max(width, 1), classes))
    return Plan(max(n, 1), max(n, 1), width, keep=False)


def shapes_of(arguments: Arguments) -> Shapes:
    hidden, classes = arguments.rows.hidden, arguments.classes.length
    rows, features = hidden.shape
    rows = rows if isinstance(rows, int) else MANY_ROWS
    return Shapes(rows, features, classes, compute_dtype(hidden.dtype).itemsize)


def some_rows(arguments: Arguments, start: Array | int, size: int) -> Arguments:
    piece = partial(cut, start=start, size=size, axis=0)
    return arguments._replace(rows=jax.tree.map(piece, arguments.rows))


def some_classes(arguments: Arguments, start: Array | int, size: int) -> Arguments:
    piece = partial(cut, start=start, size=size, axis=-1)
    rows, classes, scalars = arguments
    dense = jax.tree.map(piece, rows.dense)
    kernel = cut(classes.kernel, start, size, classes.axis)
    classes = jax.tree.map(piece, classes._replace(kernel=None))._replace(kernel=kernel)
    return Arguments(rows._replace(dense=dense), classes, scalars)


def cut(a: Array, start: Array | int, size: int, axis: int) -> Array:
    """The piece of `a` from `start` on; zeros beyond the end of a symbolic axis."""
    if not isinstance(a.shape[axis], int):
        a = jnp.moveaxis(a, axis, 0)
        piece = a.at[_places(start, size)].get(mode="fill", fill_value=0, **_IN_ORDER)
        return jnp.moveaxis(piece, 0, axis)
    cutter = _cut_half if a.dtype.itemsize == 2 else lax.dynamic_slice_in_dim
    return cutter(a, start, size, axis)


def put(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    """`a` with the piece from `start` on, in the dtype of `a`; less what is beyond its end."""
    if not isinstance(a.shape[axis], int):
        a, piece = (jnp.moveaxis(x, axis, 0) for x in (a, piece.astype(a.dtype)))
        places = _places(start, piece.shape[0])
        return jnp.moveaxis(a.at[places].set(piece, mode="drop", **_IN_ORDER), 0, axis)
    putter = _put_half if a.dtype.itemsize == 2 else lax.dynamic_update_slice_in_dim
    return putter(a, piece.astype(a.dtype), start, axis)


def plus(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    """`a` with the piece added from `start` on."""
    return put(a, cut(a, start, piece.shape[axis], axis) + piece, start, axis)


def sweep(step: Step, sums: Any, operands: Any, length: int, size: int) -> Any:
    """`sums` after a step for every piece of [0, length); the last piece may be smaller.

    A step is computed again where its derivative needs what it computed.

    A symbolic length is cut into the fewest pieces, which are equal: the last one reaches beyond
    the end by less than their number. Its own size may be 0, and a loop of no step is not allowed.
    """
    step = jax.checkpoint(step, static_argnums=(3,), prevent_cse=False)
    sums = varying(sums, axes_of((sums, operands)))

    def looped(count, size):
        starts = size * jnp.arange(count, dtype=jnp.int32)
        return lax.scan(lambda s, start: (step(s, operands, start, size), None), sums, starts)[0]

    if not isinstance(length, int):
        count = -(-length // size)
        return looped(count, -(-length // count))
    whole, rest = divmod(length, size)
    if whole > 1:
        sums = looped(whole, size)
    elif whole:
        sums = step(sums, operands, 0, size)
    if rest:
        sums = step(sums, operands, whole * size, rest)
    return sums


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def accumulated(step: Step, shapes: Any, length: int, sizes: tuple[int, int], operands: Any) -> Any:
    """The same from zeros, for a step whose derivative does not depend on `sums`.

    Its derivative is accumulated too, in pieces of the second size: nothing is kept for it, and
    the first sums are not computed beside it.
    """
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return sweep(step, zeros, operands, length, sizes[0])


@partial(accumulated.defjvp, symbolic_zeros=True)
def _accumulated_jvp(step, shapes, length, sizes, primals, tangents):
    def step_dot(sums_dot, operands, start, size):
        operands, dots = operands
        # Any sums do as the point, for the tangent does not depend on it.
        point, dots = (sums_dot, operands), (sums_dot, dots)
        return jvp_along(lambda sums, operands: step(sums, operands, start, size), point, dots)

    sums, dots = accumulated(step, shapes, length, sizes, primals[0]), dots_of(tangents[0])
    zeros = jax.tree.map(jnp.zeros_like, sums)
    return sums, sweep(step_dot, zeros, (primals[0], dots), length, sizes[1])


def dots_of(tangents: Any) -> Any:
    """The tangents of a rule with symbolic zeros, with None where there is none."""
    return jax.tree.map(lambda dot: None if isinstance(dot, SymbolicZero) else dot, tangents)


def jvp_along(function: Callable, primals: tuple, dots: tuple) -> Any:
    """The tangent of function(*primals); what is None in `dots` has none."""
    leaves, tree = jax.tree.flatten(primals)
    dots_of_leaves = tree.flatten_up_to(dots)
    varies = [dot is not None for dot in dots_of_leaves]

    def of_varying(*varying):
        rest = iter(varying)
        filled = [next(rest) if v else a for a, v in zip(leaves, varies, strict=True)]
        return function(*jax.tree.unflatten(tree, filled))

    varying = tuple(a for a, v in zip(leaves, varies, strict=True) if v)
    given = tuple(dot for dot in dots_of_leaves if dot is not None)
    return jax.jvp(of_varying, varying, given)[1]


def block_dots(product: Array | None, dots: Arguments) -> Block:
    """The tangents `dots` of all but hidden and kernel, for a block, and that of their product."""
    return Block(product, *dots.classes[1:], dots.rows.dense, dots.rows.mass, dots.scalars)


def wanted_of(block: Block, dots: Arguments) -> Block:
    """The arrays of `block` that the arguments with tangents act on, None for the others."""
    acts = dots.rows.hidden is not None or dots.classes.kernel is not None
    tangents = block_dots(block.product if acts else None, dots)
    return jax.tree.map(
        lambda dot, a: None if dot is None else a, tangents, block, is_leaf=lambda a: a is None
    )


def transposed(linear: Callable[[Block], Array], wanted: Block, l_bar: Array) -> Block:
    """The transpose of `linear` at `l_bar`; its arguments have the shapes of `wanted`."""
    if not jax.tree.leaves(wanted):
        return wanted
    return jax.linear_transpose(linear, wanted)(l_bar)[0]


def times_classes(g: Array, kernel: Array, axis: int, dtype) -> Array:
    """g W^T, summed in `dtype`; the classes of the kernel are on `axis`."""
    contracted = ((1,), (axis,)), ((), ())
    return lax.dot_general(g, kernel, contracted, preferred_element_type=dtype)


def times_rows(hidden: Array, g: Array, axis: int, dtype) -> Array:
    """h^T g, summed in `dtype`, with its classes on `axis`."""
    first, second = (hidden, g) if axis else (g, hidden)
    return lax.dot_general(first, second, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def _rows(shapes: Shapes, wanted: int, pieces: int, fitting: int | None) -> int:
    """`wanted`, in the limits, for at least as many pieces."""
    n = shapes.rows
    wanted = min(max(wanted, FEWEST_LOGITS // max(shapes.classes, 1)), MOST_ROWS, -(-n // pieces))
    size = max(wanted, FEWEST_ROWS)
    size = size if fitting is None else max(min(size, fitting), 1)
    return _even(n, min(size, n))


def _fitting(budget: int | None, bytes_of_one: int) -> int | None:
    """How many fit into the budget."""
    return None if budget is None else max(budget, 0) // max(bytes_of_one, 1)


def _even(length: int, size: int) -> int:
    """A size, at most the given one: one that divides, or that of pieces that differ little.

    A last piece of its own size is compiled for itself.
    """
    size = min(max(size, 1), max(length, 1))
    for divisor in range(size, size // 2, -1):
        if length % divisor == 0:
            return divisor
    return -(-length // -(-length // size))


# How the rows of a piece are found in a symbolic axis.
_IN_ORDER: dict[str, Any] = {"unique_indices": True, "indices_are_sorted": True}


def _places(start: Array | int, size: int) -> Array:
    return start + jnp.arange(size, dtype=jnp.int32)


# XLA:CPU has no bfloat16 slices: it would widen all of the array first, a float32 kernel beside
# the kernel. Slices of the bits it has.


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _cut_half(a: Array, start: Array | int, size: int, axis: int) -> Array:
    # Tied to `start`, so that no loop has the bits of the whole array computed before it.
    a, start = lax.optimization_barrier((a, start))
    bits = lax.bitcast_convert_type(a, jnp.uint16)
    return lax.bitcast_convert_type(lax.dynamic_slice_in_dim(bits, start, size, axis), a.dtype)


@_cut_half.defjvp
def _cut_half_jvp(size, axis, primals, tangents):
    dot = lax.dynamic_slice_in_dim(tangents[0], primals[1], size, axis)
    return _cut_half(*primals, size, axis), dot


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _put_half(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    bits, new = (lax.bitcast_convert_type(x, jnp.uint16) for x in (a, piece))
    bits = lax.dynamic_update_slice_in_dim(bits, new, start, axis)
    return lax.bitcast_convert_type(bits, a.dtype)


@_put_half.defjvp
def _put_half_jvp(axis, primals, tangents):
    a_dot, piece_dot, _ = tangents
    dot = lax.dynamic_update_slice_in_dim(a_dot, piece_dot, primals[2], axis)
    return _put_half(*primals, axis), dot

"""All that the losses depend on, as one tree: its pieces, its tangents, its gradients."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax import Array, lax

from softjax._linear_cross_entropy.blocks import Block, Classes, Rows, Scalars
from softjax._linear_cross_entropy.plan import Shapes
from softjax._linear_cross_entropy.sweep import cut
from softjax._numerics import compute_dtype


class Arguments(NamedTuple):
    """What the losses are functions of. Its tangents and gradients are of the same form.

    There None stands for what has none.
    """

    rows: Rows
    classes: Classes
    scalars: Scalars


def shapes_of(arguments: Arguments) -> Shapes:
    hidden, kernel = arguments.rows.hidden, arguments.classes.kernel
    (rows, features), classes = hidden.shape, kernel.shape[-1]
    return Shapes(rows, features, classes, compute_dtype(hidden.dtype).itemsize)


def some_rows(arguments: Arguments, start: Array | int, size: int) -> Arguments:
    piece = partial(cut, start=start, size=size, axis=0)
    return arguments._replace(rows=jax.tree.map(piece, arguments.rows))


def some_classes(arguments: Arguments, start: Array | int, size: int) -> Arguments:
    piece = partial(cut, start=start, size=size, axis=-1)
    rows, classes, scalars = arguments
    dense = jax.tree.map(piece, rows.dense)
    return Arguments(rows._replace(dense=dense), jax.tree.map(piece, classes), scalars)


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


def times_classes(g: Array, kernel: Array, dtype) -> Array:
    """g W^T, summed in `dtype`."""
    return lax.dot_general(g, kernel, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def times_rows(hidden: Array, g: Array, dtype) -> Array:
    """h^T g, summed in `dtype`."""
    return lax.dot_general(hidden, g, (((0,), (0,)), ((), ())), preferred_element_type=dtype)

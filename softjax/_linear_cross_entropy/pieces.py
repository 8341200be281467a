"""Pieces of rows and classes: how arrays are cut into them and put together, and sums over them.

A sum over pieces processes one piece at a time, and so does its derivative. `plans` determines the
sizes of the pieces.

If jax.export leaves the number of rows open, as a symbolic dimension, the number of pieces and
their size are symbolic too: see `sweep`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from softjax._custom_jvp import custom_jvp
from softjax._linear_cross_entropy.blocks import Block, Classes, Rows, Scalars
from softjax._linear_cross_entropy.plans import MANY_ROWS, Shapes
from softjax._linear_cross_entropy.unused_meshes import warn_if_mesh_unknown
from softjax._numerics import compute_dtype
from softjax._platforms import Choice, lowered_for_platform, platform_dependent
from softjax._row_maps import Form, WithOptions, linear_map
from softjax._sharding import axes_of, on_mesh_of, varying

# step(sums, operands, start, size) -> sums, plus the contribution of the piece at `start`
Step = Callable[[Any, Any, Array | int, int], Any]


class Arguments(NamedTuple):
    """The arguments of the losses; tangents and gradients have this form, with None for none."""

    rows: Rows
    classes: Classes
    scalars: Scalars


def shapes_of(arguments: Arguments) -> Shapes:
    hidden, classes = arguments.rows.hidden, arguments.classes.length
    rows, features = hidden.shape
    rows = rows if isinstance(rows, int) else MANY_ROWS
    wide = compute_dtype(hidden.dtype).itemsize
    return Shapes(rows, features, classes, wide, half=hidden.dtype.itemsize < wide)


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
    if a.shape[axis] == size:
        return a
    if not isinstance(a.shape[axis], int):
        a = jnp.moveaxis(a, axis, 0)
        piece = a.at[_places(start, size)].get(mode="fill", fill_value=0, **_IN_ORDER)
        return jnp.moveaxis(piece, 0, axis)
    if a.dtype.itemsize != 2:
        return _slice(a, start, size, axis)
    on_cpu = partial(_cut_half, size=size, axis=axis)
    other = partial(_slice, size=size, axis=axis)
    return platform_dependent(a, start, cpu=on_cpu, default=other)


def put(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    """`a`, in which `piece` is written from `start` on, except for the part beyond the end."""
    piece = piece.astype(a.dtype)
    if a.shape[axis] == piece.shape[axis]:
        return piece
    if not isinstance(a.shape[axis], int):
        a, piece = (jnp.moveaxis(x, axis, 0) for x in (a, piece))
        places = _places(start, piece.shape[0])
        return jnp.moveaxis(a.at[places].set(piece, mode="drop", **_IN_ORDER), 0, axis)
    if a.dtype.itemsize != 2:
        return _update(a, piece, start, axis)
    on_cpu, other = partial(_put_half, axis=axis), partial(_update, axis=axis)
    return platform_dependent(a, piece, start, cpu=on_cpu, default=other)


def with_more_rows(rows: Rows, more: int) -> Rows:
    """The rows, followed by rows of zeros."""
    return jax.tree.map(lambda a: jnp.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)), rows)


def plus(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    """`a`, to which `piece` is added from `start` on."""
    return put(a, cut(a, start, piece.shape[axis], axis) + piece, start, axis)


def sweep(step: Step, sums: Any, operands: Any, length: int, size: int | Choice) -> Any:
    """`sums` after a step for every piece of [0, length); the last piece may be smaller.

    The size may depend on the platform. If the derivative of a step needs intermediate results, the
    step is computed again.

    A symbolic length is divided into the fewest pieces of equal size. The last piece extends beyond
    the end by less than the number of pieces. A smaller last piece is not possible, since its size
    might be 0, and a loop without steps is not allowed.
    """
    if isinstance(size, Choice):

        def of_size(size: int, sums: Any, operands: Any) -> Any:
            return sweep(step, sums, operands, length, size)

        sums = varying(sums, axes_of((sums, operands)))
        return lowered_for_platform(of_size, size, sums, sums, operands)
    step = jax.checkpoint(step, static_argnums=(3,), prevent_cse=False)
    sums = varying(sums, axes_of((sums, operands)))

    if not isinstance(length, int):
        count = -(-length // size)
        size = -(-length // count)
        starts = size * jnp.arange(count, dtype=jnp.int32)
        return lax.scan(lambda s, start: (step(s, operands, start, size), None), sums, starts)[0]

    def next_piece(carry, _):
        sums, start = carry
        return (step(sums, operands, start, size), start + size), None

    whole, rest = divmod(length, size)
    if whole > 1:
        first = warn_if_mesh_unknown(jnp.zeros((), jnp.int32), operands)
        (sums, _), _ = lax.scan(next_piece, (sums, first), length=whole)
    elif whole:
        sums = step(sums, operands, 0, size)
    if rest:
        sums = step(sums, operands, whole * size, rest)
    return sums


@partial(custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def accumulated(step: Step, shapes: Any, length: int, sizes: tuple[int, int], operands: Any) -> Any:
    """`sweep` starting from zeros, for a step whose derivative does not depend on `sums`.

    Its derivative is also summed over pieces, of the second size. Nothing is kept for it, and the
    first sums are not computed again.
    """
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return sweep(step, on_mesh_of(zeros, operands), operands, length, sizes[0])


@partial(accumulated.defjvp, symbolic_zeros=True)
def _accumulated_jvp(step, shapes, length, sizes, primals, tangents):
    def step_dot(sums_dot, operands, start, size):
        operands, dots = operands
        # The tangent does not depend on the sums, so that any value serves as the point.
        reals_dot = jax.tree.map(lambda a: a if _is_real(a) else None, sums_dot)
        point, dots = (sums_dot, operands), (reals_dot, dots)
        new = jvp_along(lambda sums, operands: step(sums, operands, start, size), point, dots)
        return jax.tree.map(lambda a, dot: dot if _is_real(a) else a, sums_dot, new)

    sums, dots = accumulated(step, shapes, length, sizes, primals[0]), dots_of(tangents[0])
    zeros = jax.tree.map(jnp.zeros_like, sums)
    sums_dot = sweep(step_dot, zeros, (primals[0], dots), length, sizes[1])
    none = partial(zero_from_primal, symbolic_zeros=True)
    return sums, jax.tree.map(lambda a: a if _is_real(a) else none(a), sums_dot)


def _is_real(a: Array) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def dots_of(tangents: Any) -> Any:
    """The tangents of a rule with symbolic zeros, in which None replaces a zero."""
    return jax.tree.map(lambda dot: None if isinstance(dot, SymbolicZero) else dot, tangents)


def where_given(given: Any, tree: Any) -> Any:
    """The tree, with None where `given` is None."""
    return jax.tree.map(
        lambda a, part: None if a is None else part, given, tree, is_leaf=lambda a: a is None
    )


def dots_like(primals: Any, dots: Any) -> Any:
    """The tangents in the dtypes of their primals; None stays None."""
    return jax.tree.map(lambda dot, a: dot.astype(a.dtype), dots, where_given(dots, primals))


def jvp_along(function: Callable, primals: tuple, dots: tuple) -> Any:
    """The tangent of function(*primals); None in `dots` is a zero tangent."""
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
    """The tangents of a block: the tangent of its product, and those of `dots` for the rest."""
    return Block(product, *dots.classes[1:], dots.rows.dense, dots.rows.mass, dots.scalars)


def wanted_of(block: Block, dots: Arguments) -> Block:
    """The arrays of `block` for which the arguments have a tangent; None for the others."""
    acts = dots.rows.hidden is not None or dots.classes.kernel is not None
    return where_given(block_dots(block.product if acts else None, dots), block)


def transposed(linear: Callable[[Any], Array], wanted: Any, l_bar: Array) -> Any:
    """The transpose of `linear` at `l_bar`; its argument has the shapes of `wanted`."""
    if not jax.tree.leaves(wanted):
        return wanted
    return jax.linear_transpose(linear, wanted)(l_bar)[0]


def product_tangent(g: Array, part: Arguments, dots: Arguments, dtype) -> Array | float:
    """sum_k g_k (h W)_dot_k of each row, as <h_dot, g W^T> + <h, g W_dot^T>.

    Every product has g as a factor, in the dtype of the inputs, and so has its transpose.
    """
    (rows, classes, _), hidden_dot = part, dots.rows.hidden
    g, l_dot = g.astype(rows.hidden.dtype), 0.0
    if hidden_dot is not None:
        back = times_classes(g, classes.kernel, classes.axis, dtype)
        l_dot += jnp.sum(hidden_dot * back, -1)
    if (kernel_dot := dots.classes.kernel) is not None:
        likes = jnp.zeros(g.shape[:1], dtype), jnp.zeros_like(kernel_dot)
        paired, unpaired = (WithOptions(f, (("axis", classes.axis),)) for f in (_paired, _unpaired))
        there, back = Form(paired, 3), Form(unpaired, 4)
        l_dot += linear_map(there, back, kernel_dot, rows.hidden, g, *likes)
    return l_dot


def _paired(
    kernel_dot: Array, hidden: Array, g: Array, like: Array, _: Array, *, axis: int
) -> Array:
    """<h, g W_dot^T> of each row; the last two operands have the shapes of the result and W_dot."""
    back = times_classes(g, kernel_dot.astype(g.dtype), axis, like.dtype)
    return jnp.sum(hidden.astype(like.dtype) * back, -1)


def _unpaired(l_bar: Array, hidden: Array, g: Array, _: Array, like: Array, *, axis: int) -> Array:
    """The transpose of `_paired`, (l_bar h)^T g, with the classes on the axis of the kernel.

    JAX's own transpose would have the features first and transpose the product, for which XLA:CPU
    makes a copy in half precision, and would round the product before it is summed over the pieces.
    """
    scaled = (hidden.astype(l_bar.dtype) * l_bar[:, None]).astype(g.dtype)
    return times_rows(scaled, g, axis, like.dtype)


def times_classes(g: Array, kernel: Array, axis: int, dtype) -> Array:
    """g W^T, summed in `dtype`; the classes of the kernel are on `axis`."""
    contracted = ((1,), (axis,)), ((), ())
    return lax.dot_general(g, kernel, contracted, preferred_element_type=dtype)


def times_rows(hidden: Array, g: Array, axis: int, dtype) -> Array:
    """h^T g, summed in `dtype`; the classes of the result are on `axis`."""
    first, second = (hidden, g) if axis else (g, hidden)
    return lax.dot_general(first, second, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


# The properties of the row numbers of a piece, for a symbolic axis.
_IN_ORDER: dict[str, Any] = {"unique_indices": True, "indices_are_sorted": True}


def _places(start: Array | int, size: int) -> Array:
    return start + jnp.arange(size, dtype=jnp.int32)


def _slice(a: Array, start: Array | int, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(a, start, size, axis, allow_negative_indices=False)


def _update(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    return lax.dynamic_update_slice_in_dim(a, piece, start, axis, allow_negative_indices=False)


# XLA:CPU cannot slice bfloat16 arrays: it would convert the whole array first, which makes a
# float32 copy of the kernel. It can slice the bits as integers. On other platforms the conversion
# to bits would copy the whole array.


@partial(custom_jvp, nondiff_argnums=(2, 3))
def _cut_half(a: Array, start: Array | int, size: int, axis: int) -> Array:
    # The barrier ties the bits to `start`, so that they are not computed for the whole array first.
    a, start = lax.optimization_barrier((a, start))
    bits = lax.bitcast_convert_type(a, jnp.uint16)
    return lax.bitcast_convert_type(_slice(bits, start, size, axis), a.dtype)


@_cut_half.defjvp
def _cut_half_jvp(size, axis, primals, tangents):
    return _cut_half(*primals, size, axis), _slice(tangents[0], primals[1], size, axis)


@partial(custom_jvp, nondiff_argnums=(3,))
def _put_half(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    bits, new = (lax.bitcast_convert_type(x, jnp.uint16) for x in (a, piece))
    return lax.bitcast_convert_type(_update(bits, new, start, axis), a.dtype)


@_put_half.defjvp
def _put_half_jvp(axis, primals, tangents):
    a_dot, piece_dot, _ = tangents
    return _put_half(*primals, axis), _update(a_dot, piece_dot, primals[2], axis)

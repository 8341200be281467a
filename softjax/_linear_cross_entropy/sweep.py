"""Sums over pieces, one piece at a time, and their derivatives one piece at a time."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

# step(sums, operands, start, size) -> sums, with what the pieces from `start` on add
Step = Callable[[Any, Any, Array | int, int], Any]


def sweep(step: Step, sums: Any, operands: Any, length: int, size: int) -> Any:
    """`sums` after a step for every piece of [0, length); the last piece may be smaller.

    A step is computed again where its derivative needs what it computed.
    """
    step = jax.checkpoint(step, static_argnums=(3,), prevent_cse=False)
    sums = varying(sums, axes_of((sums, operands)))
    whole = length // size
    if whole > 1:
        starts = size * jnp.arange(whole, dtype=jnp.int32)
        sums, _ = lax.scan(lambda s, start: (step(s, operands, start, size), None), sums, starts)
    elif whole:
        sums = step(sums, operands, 0, size)
    if rest := length - whole * size:
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


def axes_of(tree: Any) -> frozenset[str]:
    """The axes of a mesh, within a `shard_map`, over which any array of the tree varies."""
    return frozenset[str]().union(*map(_axes_of, jax.tree.leaves(tree)))


def varying(tree: Any, axes: Iterable[str]) -> Any:
    """The tree with arrays that vary over `axes`: what is the same everywhere is so by accident.

    A loop needs its sums to be of one type; and the transpose of the cast is the sum over `axes`.
    """

    def cast(a: Array) -> Array:
        more = tuple(axis for axis in sorted(axes) if axis not in _axes_of(a))
        return lax.pcast(a, more, to="varying") if more else a

    return jax.tree.map(cast, tree)


def _axes_of(a: Array) -> frozenset[str]:
    return jax.typeof(a).manual_axis_type.varying


def cut(a: Array, start: Array | int, size: int, axis: int) -> Array:
    """The piece of `a` from `start` on."""
    cutter = _cut_half if a.dtype.itemsize == 2 else lax.dynamic_slice_in_dim
    return cutter(a, start, size, axis)


def put(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    """`a` with the piece from `start` on, in the dtype of `a`."""
    putter = _put_half if a.dtype.itemsize == 2 else lax.dynamic_update_slice_in_dim
    return putter(a, piece.astype(a.dtype), start, axis)


def plus(a: Array, piece: Array, start: Array | int, axis: int) -> Array:
    """`a` with the piece added from `start` on."""
    return put(a, cut(a, start, piece.shape[axis], axis) + piece, start, axis)


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

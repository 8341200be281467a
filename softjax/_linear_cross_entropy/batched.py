"""The error for jax.vmap with a `spmd_axis_name` that the examples or the classes are over.

Such a name places the batch on an axis of the mesh. A linear head is computed within a `shard_map`
over all axes of its examples and classes, and JAX cannot place a batch on one of these.
"""

from typing import Any

from jax import Array
from jax.interpreters import ad, batching, mlir

from softjax._platforms import Primitive
from softjax._sharding import Names

MESSAGE = (
    "softjax: a linear head shares its examples and classes over the axes {axes} of the mesh. "
    "Within jax.vmap, `spmd_axis_name` must be None or another axis, got {got}. Without it the "
    "results are the same; or pass hidden and labels with their leading axes as they are."
)


def placed_by_us(a: Array, axes: Names) -> Array:
    """`a`, which is over these axes, or at least not over others."""
    return _placed_p.bind(a, axes=axes)


def _batched(axis: Any, operands: Any, dims: Any, *, axes: Names) -> tuple[Array, Any]:
    names = axis.spmd_name or ()
    if set(names) & set(axes):
        raise ValueError(MESSAGE.format(axes=axes, got=names))
    return _placed_p.bind(*operands, axes=axes), *dims


_placed_p = Primitive("placed_by_us")
_placed_p.def_impl(lambda a, *, axes: a)
_placed_p.def_abstract_eval(lambda a, *, axes: a)
ad.deflinear2(_placed_p, lambda bar, _, *, axes: [bar])
batching.fancy_primitive_batchers[_placed_p] = _batched
mlir.register_lowering(_placed_p, lambda _, operand, *, axes: [operand])

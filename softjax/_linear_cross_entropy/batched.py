"""The error for jax.vmap whose `spmd_axis_name` is a mesh axis of the examples or classes.

This name shards the batch over a mesh axis. A linear head is computed in a `shard_map` over all
axes of its examples and classes, and JAX cannot shard a batch over one of these axes.
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
    """`a`, marked as sharded by softjax over these axes, so that no batch may use them."""
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

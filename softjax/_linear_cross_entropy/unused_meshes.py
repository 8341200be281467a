"""What a linear head says about a mesh that it cannot use: an error and a warning.

The error is for jax.vmap whose `spmd_axis_name` is a mesh axis of the examples or classes. This
name shards the batch over a mesh axis. A linear head is computed in a `shard_map` over all axes of
its examples and classes, and JAX cannot shard a batch over one of these axes.

The warning is for a program for several devices that was traced without knowledge of their mesh.
JAX knows the mesh while tracing if an argument was placed on it, or if a mesh is set. It does not
know the shardings of `jax.jit(in_shardings=...)`. The loop over pieces then goes over the rows of
all devices, and each device computes all of them. The number of devices is known only when the
program is lowered.
"""

import warnings
from typing import Any

import jax
from jax import Array
from jax.interpreters import ad, batching, mlir
from jax.sharding import get_abstract_mesh

from softjax._platforms import Primitive
from softjax._sharding import Names

SHARDED_BATCH = (
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
        raise ValueError(SHARDED_BATCH.format(axes=axes, got=names))
    return _placed_p.bind(*operands, axes=axes), *dims


_placed_p = Primitive("placed_by_us")
_placed_p.def_impl(lambda a, *, axes: a)
_placed_p.def_abstract_eval(lambda a, *, axes: a)
ad.deflinear2(_placed_p, lambda bar, _, *, axes: [bar])
batching.fancy_primitive_batchers[_placed_p] = _batched
mlir.register_lowering(_placed_p, lambda _, operand, *, axes: [operand])


MESH_UNKNOWN = (
    "softjax: a loss of a linear head is compiled for {devices} devices, but JAX did not know "
    "their mesh while tracing it: every device computes the losses of all examples. To share them, "
    "place the arguments on the mesh by jax.device_put, or trace within jax.set_mesh(mesh)."
)


def warn_if_mesh_unknown(first: Array, operands: Any) -> Array:
    """`first`, the start of a loop over pieces; its lowering warns if the mesh was unknown."""
    meshes = (jax.typeof(a).sharding.mesh for a in jax.tree.leaves(operands))
    known = not get_abstract_mesh().empty or not all(mesh.empty for mesh in meshes)
    return first if known else _mesh_unknown_p.bind(first)


def _lowered(context: Any, operand: Any) -> list[Any]:
    devices = getattr(context.module_context.axis_context, "num_devices", 1)
    if devices > 1:
        warnings.warn(MESH_UNKNOWN.format(devices=devices), stacklevel=2)
    return [operand]


_mesh_unknown_p = Primitive("mesh_unknown")
_mesh_unknown_p.def_impl(lambda a: a)
_mesh_unknown_p.def_abstract_eval(lambda a: a)
mlir.register_lowering(_mesh_unknown_p, _lowered)
